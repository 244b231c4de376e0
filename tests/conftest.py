"""Options, and fixtures that many tests share: the embedded model, tiny random checkpoints, Hugging Face's tokens."""

import functools
import os
import signal
import time

# Read when torch is loaded: threads that wait sleep, since on busy cores those that spin take tens of times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:  # tests run side by side
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as under `pytest &`; tests send it, to what they start too
    signal.signal(signal.SIGINT, signal.default_int_handler)

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined, so set before any is imported

# Tiny checkpoints, by name; `model_type`: "llama" unless given.  `shard`: as several safetensors files.
TINY = {
    "mha": dict(num_key_value_heads=4),
    "gqa-tied": dict(num_key_value_heads=2, tie_word_embeddings=True),
    "bias": dict(num_key_value_heads=1, attention_bias=True, mlp_bias=True, rms_norm_eps=0.1),
    "odd-head-dim": dict(num_key_value_heads=1, head_dim=20, rope_parameters=dict(rope_theta=500.0)),
    "llama3-rope-sharded": dict(
        num_key_value_heads=2,
        rope_parameters=dict(
            rope_type="llama3",
            rope_theta=100.0,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
        shard="60KB",
    ),
    "linear-rope": dict(num_key_value_heads=2, rope_parameters=dict(rope_type="linear", rope_theta=50.0, factor=3.0)),
    "yarn": dict(
        num_key_value_heads=2,
        rope_parameters=dict(
            rope_type="yarn",
            rope_theta=80.0,
            factor=5.0,
            original_max_position_embeddings=40,
            beta_fast=3,
            beta_slow=0.5,
        ),
    ),
    "mistral-window": dict(model_type="mistral", num_key_value_heads=2, sliding_window=21),
    "mistral": dict(model_type="mistral", num_key_value_heads=1, sliding_window=None, tie_word_embeddings=True),
    "qwen2-windows": dict(
        model_type="qwen2", num_key_value_heads=2, use_sliding_window=True, sliding_window=18, max_window_layers=2
    ),
    "gemma2": dict(
        model_type="gemma2",
        num_key_value_heads=2,
        head_dim=24,
        query_pre_attn_scalar=40,
        sliding_window=19,
        attn_logit_softcapping=4.0,  # small, so that it counts
        final_logit_softcapping=20.0,
        tie_word_embeddings=False,
        initializer_range=0.7,
    ),
    "gemma3": dict(
        model_type="gemma3_text",
        num_key_value_heads=1,
        head_dim=24,
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=40,
        sliding_window=19,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters=dict(
            full_attention=dict(rope_type="linear", rope_theta=500.0, factor=2.0),
            sliding_attention=dict(rope_type="default", rope_theta=60.0),
        ),
        tie_word_embeddings=False,
        initializer_range=0.5,
    ),
    "qwen3": dict(model_type="qwen3", num_key_value_heads=2, head_dim=24, initializer_range=0.8),
    "phi3-longrope": dict(
        model_type="phi3",
        num_key_value_heads=2,
        sliding_window=50,
        pad_token_id=0,
        original_max_position_embeddings=32,
        rope_parameters=dict(
            rope_type="longrope",
            rope_theta=90.0,
            original_max_position_embeddings=32,
            # Equal, since Hugging Face goes from one to the other with the length of the sequence.
            short_factor=[1.0, 1.1, 1.3, 1.6, 2.0, 2.5, 3.0, 4.0],
            long_factor=[1.0, 1.1, 1.3, 1.6, 2.0, 2.5, 3.0, 4.0],
        ),
    ),
}
TINY_VOCAB = 157


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the full grids too")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="needs --slow"))
        if "gpu" in item.keywords and not ON_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def num_threads(request):
    """Two threads for the embedded model, unless OMP_NUM_THREADS says otherwise; one for what is tiny."""
    if not ON_GPU:
        threads = int(os.environ.get("OMP_NUM_THREADS", 2))
        torch.set_num_threads(threads if "embedded" in request.fixturenames else 1)


@pytest.fixture(scope="session")
def embedded():
    """The folder of the embedded model."""
    from minivllm.loading import embedded_model

    return embedded_model()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """tiny(name): the folder of a random float32 checkpoint out of TINY, without tokenizer or end-of-sequence."""
    from transformers import AutoConfig, AutoModelForCausalLM

    @functools.cache
    def make(name):
        options = dict(TINY[name])
        shard, model_type = options.pop("shard", "1GB"), options.pop("model_type", "llama")
        torch.manual_seed(list(TINY).index(name))
        settings = dict(
            vocab_size=TINY_VOCAB,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=256,
            tie_word_embeddings=False,
            initializer_range=0.3,  # large, so that greedy tokens vary and hang on every part of the model
            bos_token_id=None,
            eos_token_id=None,
            dtype="float32",
        )
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings | options))
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name or "bias" in parameter_name:  # else all ones, all zeros
                torch.nn.init.normal_(parameter, float("norm" in parameter_name), 0.3)
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder, max_shard_size=shard)
        return str(folder)

    return make


@pytest.fixture(scope="session")
def hugging_face():
    """hugging_face(folder): Hugging Face's model, float32, on the CPU."""
    from transformers import AutoModelForCausalLM

    @functools.cache
    def load(folder):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        if getattr(model.config, "attn_logit_softcapping", None):
            model.set_attn_implementation("eager")  # torch's own attention knows no cap
        return model

    return load


@pytest.fixture(scope="session")
def greedy(hugging_face):
    """greedy(folder, prompts, n): the n tokens that Hugging Face's `generate` continues each prompt with, greedily."""

    @functools.cache
    @torch.inference_mode()
    def generate(folder, prompts, num_tokens):
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        model = hugging_face(folder)
        model.generation_config.update(eos_token_id=None, pad_token_id=0)
        out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=num_tokens)
        assert out.shape[1] == longest + num_tokens
        return out[:, longest:].tolist()

    return lambda folder, prompts, num_tokens: generate(folder, tuple(map(tuple, prompts)), num_tokens)


def ray_engines():
    """Of the engines in actors of the Ray cluster that this process runs: (the actor's process id, the engine's).

    Known by descent (this process, raylet, actor, engine): actors have been seen without their title.
    """
    import subprocess

    lines = subprocess.run(["ps", "-wweo", "pid=,ppid=,args="], capture_output=True, text=True).stdout.splitlines()
    processes = {int(pid): (int(parent), args) for pid, parent, args in (line.split(None, 2) for line in lines)}
    found = []
    for pid, (actor, args) in processes.items():
        raylet = processes.get(actor, (0, ""))[0]
        driver, command = processes.get(raylet, (0, ""))
        if "minivllm.engine_process" in args and driver == os.getpid() and command.split()[0].endswith("/raylet"):
            found.append((actor, pid))
    return found


class RunningServer:
    """The server in this process, on a thread of its own, so that a test can look into its engine."""

    def __init__(self, model, **options):
        import asyncio
        import threading

        import uvicorn

        from minivllm.async_llm import AsyncLLM
        from minivllm.server.app import bind, make_app
        from minivllm.server.service import ServerOptions

        listener = bind("127.0.0.1", 0)
        self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        names = ("model_names", "api_keys", "max_queued_requests", "max_body_bytes", "tool_call_parser")
        server_options = {name: options.pop(name) for name in names if name in options}
        self.llm = AsyncLLM(model, device="cpu", **options)
        app = make_app(self.llm, ServerOptions(**{"model_names": ["smol"]} | server_options))
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        self.loop = asyncio.new_event_loop()

        def run():
            asyncio.set_event_loop(self.loop)
            self.loop.run_until_complete(self._server.serve([listener]))

        self._thread = threading.Thread(target=run)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    def call(self, coroutine):
        """The result of a coroutine run on the server's loop."""
        import asyncio

        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(60)

    def metric(self, name):
        """A figure of the engine after its last step."""
        return next(metric.value for metric in self.llm.get_metrics() if metric.name == f"vllm:{name}")

    def wait_until_idle(self, seconds=10.0):
        """Wait until no request is left, and check that the engine lost nothing."""
        end = time.monotonic() + seconds
        while self.llm._streams or self.metric("num_requests_running") or self.metric("kv_cache_usage_perc"):
            assert time.monotonic() < end, "requests are left over"
            time.sleep(0.01)
        self.call(self.llm.check_integrity())

    def close(self):
        self._server.should_exit = True
        self._thread.join(30)
        self.llm.shutdown()


@pytest.fixture(scope="session")
def server(embedded):
    """A server with the embedded model, which answers to the name smol."""
    pytest.importorskip("uvicorn")
    running = RunningServer(embedded, max_model_len=2048, max_num_seqs=64, block_size=16, kv_cache_memory_bytes=1 << 28)
    yield running
    running.close()
