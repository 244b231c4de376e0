"""What else a script written for vLLM's LLM calls: chat with tools and templates, beam search, metrics, overrides."""

import json
import shutil
import warnings

import pytest
import torch
from conftest import TINY_VOCAB
from tqdm import tqdm

from minivllm import LLM, BeamSearchParams, RequestMetrics, SamplingParams, TextPrompt, TokensPrompt, sampling_params
from minivllm.chat_template import TEXTS
from minivllm.config import EngineConfig

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
TEMPLATE = (
    "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}{{ mood }}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def llm(embedded):
    with LLM(embedded, device="cpu") as llm:
        yield llm


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(), "<user>Hi</><assistant>"),
        (dict(add_generation_prompt=False), "<user>Hi</>"),
        (dict(tools=TOOLS), "[weather]<user>Hi</><assistant>"),
        (dict(chat_template_kwargs=dict(mood="merry ")), "merry <user>Hi</><assistant>"),
        (dict(chat_template_kwargs=dict(add_generation_prompt=False)), "<user>Hi</>"),
    ],
    ids=str,
)
def test_what_goes_to_the_template(llm, options, text):
    prompt = llm.preprocess_chat([{"role": "user", "content": "Hi"}], chat_template=TEMPLATE, **options)
    assert prompt["prompt"] == text
    assert llm.get_tokenizer().decode(prompt["prompt_token_ids"]) == text


def test_the_bar_is_what_use_tqdm_makes(llm):
    made = []

    class Bar(tqdm):
        def __init__(self, **options):
            made.append(self)
            super().__init__(**options, disable=True)

    prompts = [TokensPrompt(prompt_token_ids=[5, 6], prompt="x"), TextPrompt(prompt="a")]
    outputs = llm.generate(prompts, SamplingParams(max_tokens=1), use_tqdm=Bar)
    assert [output.prompt for output in outputs] == ["x", "a"] and outputs[0].prompt_token_ids == [5, 6]
    llm.chat(MESSAGES, SamplingParams(max_tokens=1), use_tqdm=Bar)
    assert [bar.total for bar in made] == [2, 1]


def test_ends_that_the_model_has_no_logits_for(tiny):
    """As where a tokenizer has more tokens than the model."""
    params = SamplingParams(max_tokens=4, min_tokens=3)
    ends = dict(eos_token_id=[2, 5000])
    with LLM(tiny("mha"), skip_tokenizer_init=True, device="cpu", hf_overrides=ends) as llm:
        assert len(llm.generate([5], params, use_tqdm=False)[0].outputs[0].token_ids) >= 3


def test_a_template_of_one_s_own(embedded, tmp_path):
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    for template in (TEMPLATE, tmp_path / "template.jinja", str(tmp_path / "template.jinja")):
        with LLM(embedded, device="cpu", chat_template=template, kv_cache_memory_bytes=1 << 24) as llm:
            assert llm.preprocess_chat(MESSAGES)["prompt"] == f"<user>{MESSAGES[0]['content']}</><assistant>"
            output = llm.chat(MESSAGES, SamplingParams(max_tokens=1), use_tqdm=False)[0]
            assert output.prompt == f"<user>{MESSAGES[0]['content']}</><assistant>"


def test_continue_final_message(llm):
    """The answer goes on where the message stopped."""
    messages = [*MESSAGES, {"role": "assistant", "content": "The capital of France"}]
    output = llm.chat(
        messages,
        SamplingParams(temperature=0, max_tokens=20),
        add_generation_prompt=False,
        continue_final_message=True,
        use_tqdm=False,
    )[0]
    assert output.prompt.endswith("The capital of France") and output.outputs[0].text == " is Paris."


def test_parts_of_text_and_messages_without_content(llm):
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert llm.preprocess_chat(parts, chat_template=TEMPLATE)["prompt"] == "<user>a\nb</><assistant>"
    called = [*MESSAGES, {"role": "assistant", "tool_calls": []}]
    template = "{{ messages[1].role }}{{ 'tool_calls' in messages[1] }}"  # Llama's asks so, and then expects one
    assert llm.preprocess_chat(called, chat_template=template)["prompt"] == "assistantFalse"


def test_other_names_of_text_in_contents(llm):
    parts = [{"type": kind, ("text" if kind.endswith("text") else kind): "a"} for kind in TEXTS]
    prompt = llm.preprocess_chat([{"role": "assistant", "content": parts}], chat_template=TEMPLATE)["prompt"]
    assert prompt == "<assistant>a\na\na\na\na</><assistant>"


def test_results_of_tools_are_texts_for_every_template(llm):
    template = (
        "{% for m in messages %}<{{ m.role }}>{% for c in m.content %}[{{ c.text or c }}]{% endfor %}{% endfor %}"
    )
    for content in ("ab", [{"type": "text", "text": "ab"}]):
        messages = [{"role": "user", "content": "Hi"}, {"role": "tool", "content": content}]
        assert llm.preprocess_chat(messages, chat_template=template)["prompt"] == "<user>[Hi]<tool>[a][b]"


LOOP = "{% for c in m.content %}[{{ c.text }}]{% endfor %}"


@pytest.mark.parametrize(
    ("body", "text", "parts"),
    [
        ("{{ m.content }}", "Hi", "a\nb"),
        (LOOP, "[Hi]", "[a][b]"),
        (LOOP.replace("m.content", "m['content'] | list"), "[Hi]", "[a][b]"),
        ("{% set parts = m['content'] %}" + LOOP.replace("m.content", "parts"), "[Hi]", "[a][b]"),
        ("{% if m.content is string %}{{ m.content }}{% else %}" + LOOP + "{% endif %}", "Hi", "[a][b]"),
        ("{% if m.role is string %}" + LOOP + "{% endif %}", "[Hi]", "[a][b]"),
        ("{% generation %}" + LOOP + "{%- endgeneration %}", "[Hi]", "[a][b]"),
        ("{% for c in m.content.split() %}{{ c }}{% endfor %}", "Hi", "ab"),
        ("{% for c in 'xy' %}{{ c }}{% endfor %}{{ m.content }}", "xyHi", "xya\nb"),
    ],
)
def test_contents_as_the_template_wants_them(llm, body, text, parts):
    template = "{% for m in messages %}" + body + "{% endfor %}"
    for content, expected in (("Hi", text), ([{"type": "text", "text": "a"}, "b"], parts)):
        found = llm.preprocess_chat([{"role": "user", "content": content}], chat_template=template)["prompt"]
        assert found == expected


def test_a_content_format_of_one_s_own(llm):
    def prompt(template, **options):
        messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None}]
        return llm.preprocess_chat(messages, chat_template=template, add_generation_prompt=False, **options)["prompt"]

    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert prompt(template, chat_template_content_format="openai") == "[{'type': 'text', 'text': 'Hi'}][]"
    assert prompt(template, chat_template_content_format="string") == "Hi"
    loop = "{% for m in messages %}" + LOOP + "{% endfor %}"
    assert prompt(loop) == "[Hi]" and prompt(loop, chat_template_content_format="string") == "[][]"


@pytest.mark.parametrize(
    ("messages", "options", "message"),
    [
        (MESSAGES, dict(continue_final_message=True), "set add_generation_prompt=False"),
        (MESSAGES, dict(chat_template="no-such-file"), "neither a Jinja template nor a file"),
        (MESSAGES, dict(chat_template_kwargs=dict(chat_template="x")), "chat_template_kwargs: chat_template cannot"),
        (MESSAGES, dict(chat_template_kwargs=dict(continue_final_message=True)), "set add_generation_prompt=False"),
        ([{"role": "user", "content": "\ud800"}], {}, "half a surrogate pair"),
        (MESSAGES, dict(chat_template=7), "chat_template must be"),
        (MESSAGES, dict(chat_template="{{ raise_exception('no system') }}"), "cannot render these messages: no system"),
        (MESSAGES, dict(chat_template="{% for %}"), "chat_template, line 1: Expected"),
        (MESSAGES, dict(chat_template="x" * 300), "chat_template 'xxx.* is neither a Jinja template nor a file"),
        (MESSAGES, dict(chat_template_kwargs="x"), "chat_template_kwargs must be a dict, got 'x'"),
        (MESSAGES, dict(tools=5), "tools must be a list of JSON schemas, got 5"),
        (MESSAGES, dict(tools=["abc"]), "tools must be a list of JSON schemas"),
        ([{"role": "user", "content": 5}], {}, "messages: content must be text or a list of parts, got 5"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], dict(), "only content of text"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], dict(), "only content of text"),
    ],
    ids=str,
)
def test_wrong_chats(llm, messages, options, message):
    with pytest.raises(ValueError, match=message):
        llm.chat(messages, **options)


# ---- beam search


@torch.no_grad()
def reference(model, prompt, width, num_tokens, ends=(), length_penalty=1.0):
    """[(tokens, sum of log probabilities)], best first, from whole forward passes."""
    beams, finished = [(list(prompt), 0.0)], []

    def score(beam):
        return beam[1] / (len(beam[0]) - (beam[0][-1] in ends)) ** length_penalty

    for _ in range(num_tokens):
        longer = []
        for tokens, total in beams:
            values, ids = model(torch.tensor([tokens])).logits[0, -1].double().log_softmax(-1).topk(2 * width)
            for value, token in zip(values.tolist(), ids.tolist(), strict=True):
                (finished if token in ends else longer).append(([*tokens, token], total + value))
        beams = sorted(longer, key=score, reverse=True)[:width]
    return sorted(finished + beams, key=score, reverse=True)[:width]


@pytest.mark.parametrize("ends", [(), tuple(range(0, TINY_VOCAB, 5))], ids=["endless", "with ends"])
@pytest.mark.parametrize("length_penalty", [1.0, 0.3])
def test_beam_search(tiny, hugging_face, ends, length_penalty):
    model, prompts = hugging_face(tiny("gqa-tied")), [[1, 2, 3], [50, 60, 70, 80]]
    with LLM(
        tiny("gqa-tied"), skip_tokenizer_init=True, device="cpu", hf_overrides=dict(eos_token_id=list(ends))
    ) as llm:
        params = BeamSearchParams(beam_width=4, max_tokens=7, length_penalty=length_penalty)
        outputs = llm.beam_search(prompts, params)
        for prompt, output in zip(prompts, outputs, strict=True):
            expected = reference(model, prompt, 4, 7, ends, length_penalty)
            assert [sequence.tokens for sequence in output.sequences] == [tokens for tokens, _ in expected]
            for sequence, (tokens, total) in zip(output.sequences, expected, strict=True):
                assert sequence.cum_logprob == pytest.approx(total, abs=1e-3)
                end = ("stop", tokens[-1]) if tokens[-1] in ends else ("length", None)
                assert (sequence.finish_reason, sequence.stop_reason) == end
                assert len(sequence.logprobs) == len(tokens) - len(prompt) and sequence.text is None
        if ends:
            ignoring = BeamSearchParams(beam_width=4, max_tokens=7, length_penalty=length_penalty, ignore_eos=True)
            assert all(s.finish_reason == "length" for s in llm.beam_search(prompts[0], ignoring)[0].sequences)


def test_beam_search_finds_more_than_greedy(llm):
    """And gives text."""
    prompt = "The best thing about the sea is"
    greedy = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=10, logprobs=0), use_tqdm=False)[0].outputs[
        0
    ]
    best = llm.beam_search(prompt, BeamSearchParams(beam_width=3, max_tokens=10))[0].sequences[0]
    assert best.cum_logprob >= greedy.cumulative_logprob - 1e-3 and best.text.startswith(prompt)


def test_arguments_of_vllm_that_ask_for_nothing(llm):
    params, messages = SamplingParams(temperature=0, max_tokens=2), MESSAGES
    nothing = dict(lora_request=None, mm_processor_kwargs=None, priority=None, trace_headers=None)
    expected = llm.generate("a", params, use_tqdm=False)[0].outputs[0].token_ids
    output = llm.generate("a", params, use_tqdm=False, **nothing)[0]
    assert output.outputs[0].token_ids == expected
    assert output.lora_request is output.encoder_prompt is output.kv_transfer_params is output.outputs[0].lora_request
    assert output.lora_request is None and sampling_params.BeamSearchParams is BeamSearchParams
    assert llm.chat(messages, params, False, chat_template_content_format="auto", **nothing)
    assert llm.beam_search("a", BeamSearchParams(beam_width=1, max_tokens=1), use_tqdm=True, lora_request=None)
    for call, message in (
        (lambda: llm.generate("a", params, lora_request=1), "generate: lora_request=1 is not supported"),
        (
            lambda: llm.generate("a", params, lora_requests=None),
            "no argument 'lora_requests'; did you mean 'lora_request'",
        ),
        (
            lambda: llm.chat(messages, chat_template_content_format="parts"),
            "chat_template_content_format must be 'auto', 'string' or 'openai', got 'parts'",
        ),
        (lambda: llm.chat(messages, tool=[]), "chat has no argument 'tool'; did you mean 'tools'"),
        (
            lambda: llm.beam_search("a", BeamSearchParams(beam_width=1, max_tokens=1), concurrency_limit=2),
            "concurrency",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_names_of_vllm_s_that_are_not_here_say_what_to_take(llm):
    with pytest.raises(ImportError, match="minivllm has no EngineArgs: give its arguments to LLM"):
        from minivllm import EngineArgs  # noqa: F401
    with pytest.raises(AttributeError, match="no attribute 'embed': only models that generate are supported"):
        llm.embed("a")
    with pytest.raises(AttributeError, match="'LLM' object has no attribute 'anything'$"):
        llm.anything  # noqa: B018
    assert not hasattr(llm, "sleep")


def test_none_is_the_default():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = EngineConfig.from_arguments(dict(seed=None, block_size=None, attention_config=None, dtype=None))
    assert config == EngineConfig()


def test_moments_under_later_names():
    metrics = RequestMetrics(1.0, first_scheduled_time=2.0, first_token_time=3.5, last_token_time=9.0)
    assert (metrics.queued_ts, metrics.scheduled_ts, metrics.first_token_ts, metrics.last_token_ts) == (1, 2, 3.5, 9)
    assert metrics.first_token_latency == 2.5


def test_longrope_is_for_short_texts_unless_longer_are_asked_for(tiny, tmp_path, hugging_face):
    """Hugging Face takes the factors that the length of a text asks for; an engine has to choose."""
    folder = shutil.copytree(tiny("phi3-longrope"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    rope = config.get("rope_parameters") or config["rope_scaling"]
    rope["long_factor"] = [9 * factor for factor in rope["short_factor"]]
    (folder / "config.json").write_text(json.dumps(config))
    prompt, params = list(range(9)), SamplingParams(max_tokens=1, logprobs=-1)
    with torch.no_grad():
        expected = hugging_face(str(folder))(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    for limit, same in ((None, True), (256, False)):
        options = dict(skip_tokenizer_init=True, device="cpu", max_logprobs=-1, max_model_len=limit)
        with LLM(str(folder), **options) as llm:
            assert llm.config.max_model_len == (limit or 32)
            (found,) = llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].logprobs
        found = torch.tensor([found[i].logprob for i in range(TINY_VOCAB)])
        assert torch.allclose(found, expected, atol=1e-4) == same


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(beam_width=0, max_tokens=1), "beam_width must be"),
        (dict(beam_width=1, max_tokens=0), "max_tokens must be"),
        (dict(beam_width=1, max_tokens=1, temperature=0.5), "beam search with a temperature is not supported"),
        (dict(beam_width=1, max_tokens=1, length_penalty=float("nan")), "length_penalty must be a number"),
        (dict(beam_width=1, max_tokens=1, include_stop_str_in_output=True), "include_stop_str_in_output: beam search"),
        (
            dict(beam_width=1, max_tokens=9000),
            r"prompts\[0\]: 1 tokens and max_tokens \(9000\) are more than max_model",
        ),
        (dict(beam_width=11, max_tokens=1), r"^beam_width \(11\) asks for 22 logprobs, more than max_logprobs \(20\)"),
        (dict(beam_width=1, max_tokens=1, length_penalty=-1e308), "length_penalty must be a number of at most ±50"),
    ],
    ids=str,
)
def test_wrong_beam_searches(llm, options, message):
    with pytest.raises(ValueError, match=message):
        llm.beam_search("a", BeamSearchParams(**options))


# ---- the rest


def test_metrics(tiny):
    with LLM(tiny("mha"), skip_tokenizer_init=True, device="cpu", block_size=16) as llm:
        names = {metric.name for metric in llm.get_metrics()}
        assert all(metric.labels == {} for metric in llm.get_metrics())
        for _ in range(2):
            llm.generate([list(range(40)), [1] * 5], SamplingParams(max_tokens=7), use_tqdm=False)
        values = {metric.name.removeprefix("vllm:"): metric.value for metric in llm.get_metrics()}
        assert names == {f"vllm:{name}" for name in values}
        assert values == {
            "num_requests_running": 0,
            "num_requests_waiting": 0,
            "kv_cache_usage_perc": 0,
            "prefix_cache_queries": 90,
            "prefix_cache_hits": 32,
            "num_preemptions": 0,
            "prompt_tokens": 90,
            "generation_tokens": 28,
            "spec_decode_num_drafts": 0,
            "spec_decode_num_draft_tokens": 0,
            "spec_decode_num_accepted_tokens": 0,
        }
        for output in llm.stream([1, 2, 3], SamplingParams(max_tokens=4)):
            running = {metric.name: metric.value for metric in llm.get_metrics()}
            assert running["vllm:num_requests_running"] == (not output.finished)


@pytest.mark.parametrize(
    "overrides",
    [
        dict(rope_theta=77.0),
        dict(rope_scaling=dict(rope_type="linear", factor=2.0)),
        dict(rope_parameters=dict(rope_theta=77.0, rope_type="linear", factor=2.0)),
        dict(rms_norm_eps=0.2),
    ],
    ids=str,
)
def test_overrides(tiny, hugging_face, overrides):
    """Against a model of Hugging Face's with the same change."""
    from transformers import AutoConfig, AutoModelForCausalLM

    prompt = [1, 2, 3, 4, 5]
    config = AutoConfig.from_pretrained(tiny("mha"))
    rope = dict(config.rope_parameters)
    if "rope_theta" in overrides:
        rope["rope_theta"] = 77.0
    rope |= overrides.get("rope_scaling") or overrides.get("rope_parameters") or {}
    config.rope_parameters, config.rms_norm_eps = rope, overrides.get("rms_norm_eps", config.rms_norm_eps)
    model = AutoModelForCausalLM.from_pretrained(tiny("mha"), config=config, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        unchanged = hugging_face(tiny("mha"))(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    with LLM(tiny("mha"), skip_tokenizer_init=True, device="cpu", hf_overrides=overrides, max_logprobs=-1) as llm:
        found = (
            llm.generate(prompt, SamplingParams(max_tokens=1, logprobs=-1), use_tqdm=False)[0].outputs[0].logprobs[0]
        )
    found = torch.tensor([found[i].logprob for i in range(TINY_VOCAB)])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (expected - unchanged).abs().max() > 1e-2


def test_calls_of_tools_go_to_the_template_as_objects(llm):
    template = (
        "{% for m in messages %}<{{ m.content }}>{% for c in m.tool_calls or [] %}"
        "{{ c.function.name }}{{ c.function.arguments.city }}{% endfor %}{% endfor %}"
    )

    def prompt(arguments, **message):
        call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
        turn = [{"role": "user", "content": ["Hi", "you"]}, {"role": "assistant", "tool_calls": [call], **message}]
        return llm.preprocess_chat(turn, chat_template=template, add_generation_prompt=False)["prompt"]

    for arguments in ('{"city": "Rome"}', {"city": "Rome"}):
        for message in ({}, {"content": None}, {"content": ""}):
            assert prompt(arguments, **message) == "<Hi\nyou><>weatherRome"
    with pytest.raises(ValueError, match="a tool call's arguments are not JSON"):
        prompt("{")
    with pytest.raises(ValueError, match="tool_calls must be a list of calls"):
        llm.preprocess_chat([{"role": "assistant", "content": "a", "tool_calls": ["b"]}], chat_template=template)


def test_generation_config_overrides(tiny):
    """They end texts too, and are checked at once."""
    options = dict(skip_tokenizer_init=True, device="cpu")
    with LLM(tiny("mha"), override_generation_config=dict(temperature=0.0, max_new_tokens=6), **options) as llm:
        assert llm.get_default_sampling_params() == SamplingParams(temperature=0.0, max_tokens=6)
        tokens = llm.generate([5, 6], SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))[0].outputs[0]
        end = tokens.token_ids[3]
    with LLM(tiny("mha"), override_generation_config=dict(eos_token_id=[end]), **options) as llm:
        output = llm.generate([5, 6], SamplingParams(temperature=0, max_tokens=6))[0].outputs[0]
        assert (
            output.token_ids == tokens.token_ids[: tokens.token_ids.index(end) + 1] and output.finish_reason == "stop"
        )
        longer = SamplingParams(temperature=0, max_tokens=6, min_tokens=6, ignore_eos=True)
        assert end not in llm.generate([5, 6], longer)[0].outputs[0].token_ids, "as in vLLM"
        for more in ({}, dict(allowed_token_ids=[end, 7], logit_bias={7: float("-inf")})):
            with pytest.raises(ValueError, match="min_tokens, bad_words and logit_bias leave none of the allowed"):
                llm.generate([5], SamplingParams(**dict(min_tokens=2, allowed_token_ids=[end]) | more))
    for override, message in (
        (dict(temprature=0.0), "did you mean 'temperature'"),
        (dict(temperature="hot"), "temperature must be"),
    ):
        with pytest.raises(ValueError, match=message):
            LLM(tiny("mha"), override_generation_config=override, **options)


def test_params_can_be_cloned(llm):
    assert SamplingParams(logprobs=True, prompt_logprobs=True) == SamplingParams(logprobs=1, prompt_logprobs=1)
    biases = {1: -1e39, 2: float("-inf"), 3: 250, 4: -1000}
    assert SamplingParams(logit_bias=biases).logit_bias == biases | {1: float("-inf")}
    params = SamplingParams(logit_bias={3: 1.0}, stop_token_ids=[4], logits_processors=[print])
    other = params.clone()
    other.logit_bias[3], other.stop_token_ids[0] = 2.0, 5
    assert params.logit_bias == {3: 1.0} and params.stop_token_ids == [4] and other.logits_processors == [print]


def test_wrong_overrides(tiny):
    with pytest.raises(ValueError, match="hf_overrides must be a dict"):
        LLM(tiny("mha"), skip_tokenizer_init=True, hf_overrides=[1])
    with pytest.raises(ValueError, match="'Foo' is not supported.*never run, whatever trust_remote_code says"):
        LLM(tiny("mha"), skip_tokenizer_init=True, hf_overrides=dict(architectures=["Foo"]), trust_remote_code=True)
    with LLM(tiny("mha"), skip_tokenizer_init=True, device="cpu", trust_remote_code=True) as llm:
        assert llm.generate([1], SamplingParams(max_tokens=1), use_tqdm=False)
