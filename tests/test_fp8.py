"""8-bit floats, in the KV cache and in the weights: what they change, how little, and where they are refused."""

import copy
import gc
import inspect
import math
import textwrap
import weakref

import pytest
import torch
from torch import nn

from minivllm import LLM, SamplingParams
from minivllm.backends import make_backend
from minivllm.layers import fp8_linear
from minivllm.layers.fp8_linear import Fp8Linear, quantize_linears
from minivllm.layers.linear import Linear

OPTIONS = [dict(kv_cache_dtype="fp8"), dict(quantization="fp8"), dict(kv_cache_dtype="fp8_e4m3", quantization="fp8")]
PROMPTS = [[1, 2, 3, 4, 5], list(range(20, 60)), [7] * 17, list(range(20, 50))]


@pytest.fixture
def make(tiny):
    def make(**options):
        defaults = dict(skip_tokenizer_init=True, device="cpu", block_size=16, max_num_batched_tokens=256)
        return LLM(tiny("gqa-tied"), **(defaults | options))

    return make


def tokens_of(llm, **options):
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, **options)
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, params, use_tqdm=False)]


def test_the_kv_cache_holds_as_many_more_tokens(make):
    memory = dict(kv_cache_memory_bytes=1 << 20)
    with make(**memory) as full, make(kv_cache_dtype="fp8", **memory) as small:
        assert small.engine.scheduler.block_manager.num_blocks // 4 == full.engine.scheduler.block_manager.num_blocks
        runner = small._executor.runner
        assert all(cache.dtype == torch.float8_e4m3fn for layer in runner.kv_caches for cache in layer)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_tokens_do_not_depend_on_chunks_hits_or_preemption(make, options):
    """Everyone reads the rounded K and V, also in the prompt's own step."""
    with make(**options) as llm:
        whole = tokens_of(llm)
        assert tokens_of(llm) == whole and llm.engine.scheduler.stats.num_cached_tokens > 0
        block_bytes = llm._executor.runner.kv_caches[0][0][0].nbytes * 2 * llm.model_config.num_hidden_layers
    with make(max_num_batched_tokens=16, enable_prefix_caching=False, max_num_seqs=4, **options) as llm:
        assert tokens_of(llm) == whole
    with make(kv_cache_memory_bytes=6 * block_bytes, max_num_batched_tokens=16, **options) as llm:
        assert tokens_of(llm) == whole and llm.engine.scheduler.stats.num_preemptions > 0


@pytest.mark.parametrize("quantization", [None, "fp8"])
def test_weights_are_freed_before_the_kv_cache_is_sized(make, monkeypatch, quantization):
    """Those that were packed or rounded."""
    from minivllm.runner import model_runner

    live = []

    def matrices():
        gc.collect()
        return {id(t): t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and t.ndim == 2}

    def measure(*arguments):
        live.append(matrices())
        return kv_cache_blocks(*arguments)

    kv_cache_blocks = model_runner.kv_cache_blocks
    monkeypatch.setattr(model_runner, "kv_cache_blocks", measure)
    before = matrices()
    with make(quantization=quantization) as llm:
        model, size = llm._executor.runner.model, llm.model_config.hidden_size
        own = {id(t) for module in model.modules() for t in vars(module).values()} | set(map(id, model.parameters()))
        left = [t for key, t in live[0].items() if key not in own and key not in before and size in t.shape]
        assert not left, [tuple(t.shape) for t in left]


def test_layers_are_freed_one_by_one(monkeypatch):
    """Or the weights would be there twice for a while."""
    replaced = []

    class Watched(Fp8Linear):
        def __init__(self, linear):
            assert all(layer() is None for layer in replaced)
            replaced.append(weakref.ref(linear))
            super().__init__(linear)

    monkeypatch.setattr(fp8_linear, "Fp8Linear", Watched)
    model = nn.Module()
    model.inner = nn.Module()
    for name in "abc":
        made = Linear(16, 16, False, make_backend("torch"), torch.float32, torch.device("cpu"))
        setattr(model.inner, name, made)
    del made
    quantize_linears(model)
    assert len(replaced) == 3 and all(isinstance(layer, Watched) for layer in model.inner.children())


def test_every_linear_layer_but_the_lm_head_is_quantized():
    backend = make_backend("torch")

    def linear(size_in, size_out):
        made = Linear(size_in, size_out, True, backend, torch.float32, torch.device("cpu"))
        nn.init.normal_(made.weight)
        nn.init.normal_(made.bias)
        return made

    model = nn.Module()
    model.inner = nn.Module()
    model.inner.proj, model.lm_head = linear(300, 5000), linear(30, 10)
    original = copy.deepcopy(model)
    quantize_linears(model)
    assert isinstance(model.inner.proj, Fp8Linear) and type(model.lm_head) is Linear
    rounded = model.inner.proj.weight.float() * model.inner.proj.scale[:, None]
    assert ((rounded - original.inner.proj.weight).norm() / rounded.norm()) < 0.03  # e4m3: 3 bits after the point
    x = torch.randn(7, 300) * torch.tensor([1, 1e-3, 1e3, 1, 1, 1, 0])[:, None]
    out, ref = model.inner.proj(x), original.inner.proj(x)
    error = (out - ref).norm(dim=-1) / ref.norm(dim=-1)
    assert error[:6].max() < 0.06 and error[6] < 1e-6, "each token has a scale of its own"


def look(embedded, continuation=None, **options):
    """Perplexity of a text, 64 tokens after half of it (greedy ones, unless given), how many of them are likeliest."""
    greedy = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    want_all = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    with LLM(embedded, device="cpu", max_model_len=1024, kv_cache_memory_bytes=1 << 28, **options) as llm:
        ids = llm.get_tokenizer()(inspect.getsource(textwrap)).input_ids[:600]
        tokens = continuation or llm.generate([ids[:300]], greedy, use_tqdm=False)[0].outputs[0].token_ids
        one, two = llm.generate(
            [dict(prompt_token_ids=ids), dict(prompt_token_ids=ids[:300] + list(tokens))], want_all, use_tqdm=False
        )
    loss = -sum(entry[t].logprob for entry, t in zip(one.prompt_logprobs[1:], ids[1:], strict=True)) / 599
    same = sum(entry[t].rank == 1 for entry, t in zip(two.prompt_logprobs[300:], tokens, strict=True))
    return math.exp(loss), tokens, same / len(tokens)


@pytest.fixture(scope="module")
def unrounded(embedded):
    return look(embedded)


@pytest.mark.parametrize(
    ("options", "more_perplexity", "agreement"),
    zip(OPTIONS, (1.03, 1.06, 1.08), (0.9, 0.8, 0.8), strict=True),
    ids=str,
)
def test_the_embedded_model_loses_little(embedded, unrounded, options, more_perplexity, agreement):
    """Perplexity of a text, and how many of the unrounded model's greedy tokens are the rounded one's too."""
    full, tokens, own = unrounded
    rounded, _, same = look(embedded, tokens, **options)
    assert own > 0.98, "greedy tokens are the likeliest"
    assert rounded < full * more_perplexity and rounded != full
    assert same > agreement


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(kv_cache_dtype="fp4"), "kv_cache_dtype must be one of auto, fp8, fp8_e4m3; got 'fp4'"),
        (dict(quantization="awq"), "quantization must be None or 'fp8', got 'awq'"),
    ],
    ids=str,
)
def test_other_formats_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
