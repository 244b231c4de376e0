"""Tool parsers: content and calls are those of the whole text, however it is cut into pieces."""

import json
import random
import time

import pytest

from minivllm.server.tool_parsers import PARSERS, ToolCall, guess_parser, needs_special_tokens

# Strings that hold what ends or begins things outside of strings.
NASTY = {
    "text": 'a "quoted" } ] { [ ; \\ back\\slash </tool_call><tool_call>{"name": "x", "arguments": {}} [TOOL_CALLS]x{}',
    "more": "<|python_tag|>{} functools[ <|/tool_call|> \u00e9 \u4f60\u597d \U0001f600 \x7f\n\t</tool_call>",
    "nested": {"list": [1, 2.5, -3e20, True, None, [], {}, [{"deep": ["}"]}]], "": ""},
}


def call(name="get_weather", /, **arguments):
    return ToolCall(name, json.dumps(arguments, ensure_ascii=False))


def js(name="get_weather", /, key="arguments", ascii_only=False, **arguments):
    return json.dumps({"name": name, key: arguments}, ensure_ascii=ascii_only)


PARIS, ROME = call(city="Paris"), call(city="Rome")
P, R = js(city="Paris"), js(city="Rome")

# Of each parser: texts, the content, the calls.  Content None: the very text.
TEXTS = {
    "hermes": [
        (f"<tool_call>\n{P}\n</tool_call>", "", [PARIS]),
        (f"<tool_call>{P}</tool_call>\n<tool_call>{R}</tool_call>", "", [PARIS, ROME]),
        (f"\n\n<tool_call>\n{P}\n</tool_call>\n \n<tool_call>\n{R}\n</tool_call>\n", "", [PARIS, ROME]),
        (f"Let me  see.\n\n<tool_call>\n{P}\n</tool_call>", "Let me  see.", [PARIS]),
        (f"One. <tool_call>{P}</tool_call> Two.\n<tool_call>{R}</tool_call> Three \n", "One.Two.Three \n",
         [PARIS, ROME]),
        (f"<tool_call>{js('f', **NASTY)}</tool_call>", "", [call("f", **NASTY)]),
        (f"<tool_call>{js('f', ascii_only=True, **NASTY)}</tool_call>", "", [call("f", **NASTY)]),
        (f"<tool_call>{P}", "", [PARIS]),  # the end of the answer in place of the tag
        (f"<tool_call>{P}<tool_call>{R}</tool_call></tool_call>", "", [PARIS, ROME]),
        (f"<tool_call>{P}</tool", "</tool", [PARIS]),
        ('<tool_call>{"arguments": "{\\"city\\": \\"Paris\\"}", "name": "get_weather"}</tool_call>', "", [PARIS]),
        ('<tool_call>{"name": "now", "arguments": {}}</tool_call>', "", [call("now")]),
        ('<tool_call>{"name": "now", "arguments": null}</tool_call>', "", [call("now")]),
        ('<tool_call>{"name": "f", "parameters": {"x": "two\nlines"}}</tool_call>', "", [call("f", x="two\nlines")]),
        (f"<tool_call> is a tag, <tool_call>{P}</tool_call>", "<tool_call> is a tag,", [PARIS]),
        (f'<tool_call>{{"name": none}}</tool_call> <tool_call>{P}', '<tool_call>{"name": none}</tool_call>', [PARIS]),
        (f"<tool_call><tool_call>{P}</tool_call>", "<tool_call>", [PARIS]),
        (f"<tool_<tool_call>{P}", "<tool_", [PARIS]),
        ("Hello there.  \n How are you? \n", None, []),
        ("  \n ", None, []),
        ("", None, []),
        ("a < b, <tool, <tool_cal, </tool_call> and <tool_call", None, []),
        ("<tool_call>\n", None, []),
        (f"<tool_call>\n{P[:-1]}", None, []),
        (f" <tool_call>\n{P[:-9]}\n</tool_call> and so on", None, []),
        ("<tool_call>\n{'name': 'f', 'arguments': {}}\n</tool_call>", None, []),
        ('<tool_call>{"name": "f"}</tool_call>', None, []),
        ('<tool_call>{"name": "", "arguments": {}}</tool_call>', None, []),
        ('<tool_call>{"name": 3, "arguments": {}}</tool_call>', None, []),
        ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', None, []),
        ('<tool_call>{"name": "f", "arguments": "no JSON"}</tool_call>', None, []),
        ('<tool_call>{"name": "f", "arguments": {"x": NaN, "y": -Infinity}}</tool_call>', None, []),
        ('<tool_call>{"name": "f", "arguments": {"x": 1e999}}</tool_call>', None, []),
        ('<tool_call>{"name": "\\ud83d", "arguments": {}}</tool_call>', None, []),
        (f"<tool_call>[{P}]</tool_call>", None, []),
        (f"{P} and [TOOL_CALLS][{P}] and functools[{P}]", None, []),
    ],
    "llama3_json": [
        (P, "", [PARIS]),
        (js(key="parameters", city="Paris"), "", [PARIS]),
        (f"\n {P}\n", "", [PARIS]),
        (f"<|python_tag|>{P}", "", [PARIS]),
        (f"<|python_tag|> {P}; {R}", "", [PARIS, ROME]),
        (f"{P};{R} ;\n{P}", "", [PARIS, ROME, PARIS]),
        (f"{P}\n<|python_tag|>{R}", "", [PARIS, ROME]),
        (f"I call it. <|python_tag|>{P}; {R}", "I call it.", [PARIS, ROME]),
        (f"{P}; and so on", "and so on", [PARIS]),
        ('{"type": "function", "name": "f", "parameters": {"x": "1"}}', "", [call("f", x="1")]),
        (js("f", **NASTY) + ";" + js("g", key="parameters", ascii_only=True, **NASTY), "",
         [call("f", **NASTY), call("g", **NASTY)]),
        (f'{P}; {{"answer": 42}}', '{"answer": 42}', [PARIS]),
        (f'{{"name": "Ann"}}<|python_tag|>{P}', '{"name": "Ann"}', [PARIS]),
        (f"Here is JSON: {P}", None, []),
        (f"{{x | x > 0}} and {P}", None, []),
        ('{"answer": 42, "list": [1, {"name": "x"}]}\n', None, []),
        ('  {"name": "Ann", "age": 30}', None, []),
        ('<|python_tag|>brave_search.call(query="a {b}")', None, []),
        ("<|python_tag|>", None, []),
        ("{", None, []),
        (" { {", None, []),
        (P[:-1], None, []),
        (P[:-2] + "; and then } prose, and more of it } and more", None, []),
        (f"[{P}]", None, []),
        ("Hello; <|python|> {} ; there", None, []),
        ("```json\n" + P + "\n```", None, []),
    ],
    "mistral": [
        (f"[TOOL_CALLS] [{P}]", "", [PARIS]),
        (f"[TOOL_CALLS][{P}, {R}]", "", [PARIS, ROME]),
        (f"[TOOL_CALLS] [ {P} ,\n{R} ] \n", "", [PARIS, ROME]),
        (f"Wait.\n[TOOL_CALLS] {P}", "Wait.", [PARIS]),
        ('[TOOL_CALLS] [{"name": "f", "arguments": {"x": 1}, "id": "abcdefghi"}]', "", [call("f", x=1)]),
        ('[TOOL_CALLS]get_weather{"city": "Paris"}', "", [PARIS]),
        ('[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}', "", [PARIS]),
        ('[TOOL_CALLS]get_weather[CALL_ID]a1B2c3D4e[ARGS]{"city": "Paris"}', "", [PARIS]),
        ('Hm [TOOL_CALLS] get_weather [ARGS] {"city":\n"Paris"} [TOOL_CALLS]a-b.c{"x": {}}', "Hm",
         [PARIS, call("a-b.c", x={})]),
        ('[TOOL_CALLS]get_weather{"city": "Paris"}[TOOL_CALLS]get_weather[ARGS]{"city": "Rome"} ok', "ok",
         [PARIS, ROME]),
        (f"[TOOL_CALLS]f[ARGS]{json.dumps(NASTY)}", "", [call("f", **NASTY)]),
        (f"[TOOL_CALLS][{js('f', **NASTY)}, {js('g', ascii_only=True, **NASTY)}]", "",
         [call("f", **NASTY), call("g", **NASTY)]),
        (f"[TOOL_CALLS] is a marker. [TOOL_CALLS][{P}]", "[TOOL_CALLS] is a marker.", [PARIS]),
        (f"[TOOL_CALLS][TOOL_CALLS][{P}]", "[TOOL_CALLS]", [PARIS]),
        ("[TOOL_CALLS]", None, []),
        ("[TOOL_CALLS] []", None, []),
        ("[TOOL_CALLS] [1, 2]", None, []),
        (f'[TOOL_CALLS] [{P}, {{"x": 1}}]', None, []),
        (f"[TOOL_CALLS] [{P}", None, []),
        ("[TOOL_CALLS]some_name", None, []),
        ("[TOOL_CALLS]some_name[ARGS]", None, []),
        ("[TOOL_CALLS]some_name[ARGS]{broken} and so on", None, []),
        ("[TOOL_CALLS]some_name[WHAT]{}", None, []),
        ("[TOOL_CALLS]two names {}", None, []),
        ("Lists: [1, 2], [TOOL, [TOOL_CALL] [ARGS]{} [TOOL_", None, []),
        (P, None, []),
    ],
    "phi4_mini_json": [
        (f"functools[{P}]", "", [PARIS]),
        (f"<|tool_call|>[{P}, {R}]<|/tool_call|>", "", [PARIS, ROME]),
        (f"<|tool_call|>{P}<|/tool_call|>\n<|tool_call|>{R}<|/tool_call|>", "", [PARIS, ROME]),
        (f"I will. functools [{P}] Done", "I will.Done", [PARIS]),
        (f"functools[{js('f', **NASTY)}, {js('g', ascii_only=True, **NASTY)}]", "",
         [call("f", **NASTY), call("g", **NASTY)]),
        (f"import functools\nfunctools[{P}]", "import functools", [PARIS]),
        (f"<|tool_call|> functools[{P}]<|/tool_call|>", "<|tool_call|>", [PARIS]),
        ("import functools\n\n@functools.cache\ndef f(): return functools", None, []),
        ("functools[0] and functools[i], func, <|tool_", None, []),
        (f"functools[{P}", None, []),
        ("<|tool_call|><|/tool_call|>", None, []),
        (P, None, []),
    ],
}  # fmt: skip
CASES = [(name, *case) for name, cases in TEXTS.items() for case in cases]


def parse(name, pieces):
    parser = PARSERS[name]()
    outputs = [parser.feed(piece) for piece in pieces] + [parser.finish()]
    assert parser.finish() == ("", [])
    return "".join(content for content, _ in outputs), [call for _, calls in outputs for call in calls]


def cut(text, places):
    places = [0, *sorted(places), len(text)]
    return [text[begin:end] for begin, end in zip(places, places[1:], strict=False)]


@pytest.mark.parametrize("name, text, content, calls", CASES)
def test_every_split_gives_the_same(name, text, content, calls):
    expected = (text if content is None else content, calls)
    assert parse(name, [text]) == expected
    assert parse(name, text) == expected  # a character at a time
    for place in range(len(text) + 1):
        assert parse(name, cut(text, [place])) == expected, place
    rng = random.Random(0)
    for _ in range(60):
        places = [rng.randint(0, len(text)) for _ in range(rng.randint(2, 2 + len(text) // 3))]
        assert parse(name, cut(text, places)) == expected, places


@pytest.mark.parametrize("name", PARSERS)
def test_random_texts(name):
    """Pieces of calls in any order: no split changes anything, and what is content all through comes out unchanged."""
    rng = random.Random(1)
    rare = [
        "[",
        "]",
        "{",
        "}",
        ",",
        ";",
        "\n",
        "x",
        '"',
        "\\",
        '"name"',
        ":",
        "tru",
        "1",
        "-",
        "\\u12",
        "<",
        "<|",
        "f{}",
    ]
    rare += ["[TOOL", "func", "</tool_", "[ARGS]", "[CALL_ID]"]
    parts = 4 * [*PARSERS[name].markers, PARSERS[name].closer, P, R, " "] + rare
    num_calls = num_plain = 0
    for _ in range(1500):
        text = "".join(rng.choices(parts, k=rng.randint(1, 12)))
        whole = parse(name, [text])
        num_calls += bool(whole[1])
        if not whole[1]:
            num_plain += 1
            assert whole[0] == text
        assert parse(name, text) == whole, text
        assert parse(name, cut(text, [rng.randint(0, len(text)) for _ in range(3)])) == whole, text
    assert num_calls > 50 and num_plain > 50


@pytest.mark.parametrize("name, marker", [("hermes", "<tool_call>"), ("llama3_json", ""), ("mistral", "[TOOL_CALLS]")])
def test_calls_come_at_once(name, marker):
    """A call is out with the last bracket of its JSON, and no part of it is content before."""
    parser = PARSERS[name]()
    text = marker + ("f[ARGS]" + json.dumps(NASTY) if name == "mistral" else js("f", **NASTY))
    for character in text[:-1]:
        assert parser.feed(character) == ("", [])
    assert parser.feed(text[-1]) == ("", [call("f", **NASTY)])


@pytest.mark.parametrize("name", PARSERS)
def test_content_comes_at_once(name):
    """Only white space and what may become a marker wait."""
    parser = PARSERS[name]()
    assert parser.feed("Hello") == ("Hello", [])
    assert parser.feed(" ") == ("", [])
    assert parser.feed("{you}") == (" {you}", [])
    marker = PARSERS[name].markers[0]
    assert parser.feed("! \n" + marker[:3]) == ("!", [])
    assert parser.feed("?") == (f" \n{marker[:3]}?", [])
    # What is clearly no call is let go long before the answer ends.
    assert parser.feed(marker + "no call, as can be seen") == (marker + "no call, as can be seen", [])
    content = "".join(parser.feed(character)[0] for character in marker + "{no JSON" + " at all" * 9)
    assert content.startswith(marker + "{no JSON at all at all")


@pytest.mark.parametrize(
    "value",
    [
        "-Infinity",
        "-1.5e+10",
        "[true, false, null]",
        '"\\ud83d\\ude00\\n\\\\"',
        '{"a" :  [ ]  ,  "b":{ } }',
        "1E5",
        "[-0.0,0]",
    ],
)
def test_no_beginning_of_json_is_taken_for_broken(value):
    """The decoder's messages differ between Python versions; what tells incomplete from broken must hold in each."""
    text = '<tool_call> { "name" : "f" , "arguments" : { "x" : ' + value + ' , "y" : 1 } , "z" : ' + value + " } "
    parser = PARSERS["hermes"]()
    outputs = [parser.feed(character) for character in text[: text.rindex("}")]]
    assert all(output == ("", []) for output in outputs)
    for end in range(len("<tool_call>"), text.rindex("}")):
        assert PARSERS["hermes"]().feed(text[:end]) == ("", []), text[:end]


def test_arguments_as_text():
    """Compact JSON that keeps characters as they are, unless they cannot be sent."""
    [found] = parse("hermes", ['<tool_call>{"name":"f","arguments":{"b":"\\u00e9\\ud83d\\ude00","a":[1,2.50]}}'])[1]
    assert found.arguments == '{"b": "é😀", "a": [1, 2.5]}'
    [found] = parse("hermes", ['<tool_call>{"name":"f","arguments":{"half":"\\ud83d"}}'])[1]
    assert found.arguments == '{"half": "\\ud83d"}'


@pytest.mark.parametrize("value", ["[" * 100_000, '"' + "[" * 100_000 + '"}}', "1" * 5000 + "}}"])
def test_what_the_decoder_refuses_is_content(value):
    text = '<tool_call>{"name": "f", "arguments": ' + ("" if value.startswith('"') else '{"x": ') + value
    assert parse("hermes", [text]) == parse("hermes", cut(text, range(0, len(text), 1000))) == (text, [])


def test_long_number():
    """The decoder refuses so many digits of an integer, but it may go on as a float."""
    text = '<tool_call>{"name": "f", "arguments": {"x": ' + "1" * 9000 + "e-9000}}"
    expected = parse("hermes", [text])
    assert len(expected[1]) == 1 and abs(json.loads(expected[1][0].arguments)["x"] - 1 / 9) < 1e-9
    for step in (1, 7, 1000):
        assert parse("hermes", cut(text, range(0, len(text), step))) == expected


@pytest.mark.parametrize("name", PARSERS)
def test_long_answers(name):
    """Work grows with the answer, not with its square: prose, arguments full of brackets, and broken JSON."""
    marker = PARSERS[name].markers[0]
    prose = "Some words < and [ more { of } them.\n" * 8000
    code = "if (x) { y[i] = 1; }\n" * 1500 + "x = y + 1; " * 20000
    broken = marker + '{"name": ' + "never JSON " * 20000
    begin = time.process_time()
    for text, content, calls in [
        (prose, prose, []),
        (
            marker + "[" * (name in ("mistral", "phi4_mini_json")) + js("f", code=code) + "]",
            None,
            [call("f", code=code)],
        ),
        (broken, broken, []),
    ]:
        found = parse(name, cut(text, range(4, len(text), 4)))
        assert found[1] == calls and (content is None or found[0] == content)
    assert time.process_time() - begin < 8  # a tenth of it; decoding at each piece would take more


TEMPLATES = [
    # Qwen2.5 and Qwen3
    ('within <tool_call></tool_call> XML tags:\\n<tool_call>\\n{\\"name\\": <function-name>, \\"arguments\\": '
     '<args-json-object>}\\n</tool_call><|im_end|>\\n" }}', "hermes"),
    ("{{- '<tool_call>\\n{\"name\": \"' }}{{- tool_call.name }}{{- '\", \"arguments\": ' }}", "hermes"),
    # SmolLM3
    ("For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML "
     'tags." -%}', "hermes"),
    # Qwen3-Coder
    ('{{- "\\n<tool_call>\\n<function=example_function_name>\\n<parameter=example_parameter_1>" }}', None),
    # Mistral 7B v0.3; Mistral Small 3.1; Ministral 3
    ('{%- elif message.tool_calls is defined %}{{- "[TOOL_CALLS][" }}{%- for tool_call in message.tool_calls %}',
     "mistral"),
    ('{{- "[TOOL_CALLS] [" }}{%- set out = tool_call.function|tojson %}{{- out[:-1] }}', "mistral"),
    ("{{- '[TOOL_CALLS]' + tool['function']['name'] + '[ARGS]' + arguments }}", "mistral"),
    # Llama 3.1; Llama 3.2 1B, and vLLM's for Llama 3.1
    ('{{- "<|python_tag|>" + tool_call.name + ".call(" }}', "llama3_json"),
    ("{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{{- '{\"name\": \"' + tool_call.name + '\", ' }}"
     "{{- '\"parameters\": ' }}{{- tool_call.arguments | tojson }}", "llama3_json"),
    # Llama 3
    ("{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] + '<|eot_id|>' }}",
     None),
    # Phi-4-mini; vLLM's for it; Phi-3
    ("{{ '<|' + message['role'] + '|>' + message['content'] + '<|tool|>' + message['tools'] + '<|/tool|>' }}",
     "phi4_mini_json"),
    ('formatted as functools[{"name": [function name], "arguments": [function arguments as JSON]}, ...]',
     "phi4_mini_json"),
    ("{{ '<|' + message['role'] + '|>' + '\\n' + message['content'] + '<|end|>\\n' }}", None),
    # Gemma 3; SmolLM2 135M
    ("{{ '<start_of_turn>' + role + '\\n' + (first_user_prefix if loop.first else '') }}", None),
    ("{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}", None),
    ("", None),
    (None, None),
]  # fmt: skip


@pytest.mark.parametrize("template, name", TEMPLATES)
def test_guess_parser(template, name):
    assert guess_parser(template) == name


def test_needs_special_tokens():
    assert needs_special_tokens("mistral") and needs_special_tokens("llama3_json")
    assert not needs_special_tokens("hermes")
