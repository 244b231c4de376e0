"""The chat page, driven in headless Chromium against a server that is told what to answer."""

import json
import queue
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")

PAGE = Path(__file__).parents[1] / "minivllm" / "server" / "page.html"
USAGE = {
    "prompt_tokens": 40,
    "completion_tokens": 7,
    "total_tokens": 47,
    "prompt_tokens_details": {"cached_tokens": 32},
}
TIMEOUT = 5


def event(data):
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


def chunk(finish=None, **delta):
    return event({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})


def begin(*texts):
    return chunk(role="assistant", content="") + b"".join(chunk(content=text) for text in texts)


def end(*texts, finish="stop"):
    last = event({"choices": [], "usage": USAGE}) + b"data: [DONE]\n\n"
    return b"".join(chunk(content=text) for text in texts) + chunk(finish) + last


def answer(*texts, finish="stop"):
    return begin(*texts) + end(finish=finish)


class FakeServer(ThreadingHTTPServer):
    """Serves the page, and to each chat request the next item of `replies`: (status, error message), or a list that is
    sent piece by piece, in which an Event is waited for and None is "until the client hangs up"."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/"
        self.replies, self.requests, self.hung_up, self.api_key = queue.Queue(), [], threading.Event(), None

    def reply(self, *pieces):
        self.replies.put(list(pieces))

    def messages(self, i=-1):
        return [(message["role"], message["content"]) for message in self.requests[i]["messages"]]


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def start(self, status, content_type):
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.end_headers()

    def error(self, status, message):
        self.start(status, "application/json")
        self.wfile.write(json.dumps({"error": {"message": message}}).encode())

    def do_GET(self):
        if self.path == "/":
            self.start(200, "text/html; charset=utf-8")
            self.wfile.write(PAGE.read_bytes())
        elif self.is_allowed():
            self.start(200, "application/json")
            models = {"data": [{"id": "tiny/Llama-Nano", "max_model_len": 4096}]}
            self.wfile.write(json.dumps(models).encode())

    def is_allowed(self):
        key = self.server.api_key
        if key is None or self.headers.get("Authorization") == f"Bearer {key}":
            return True
        self.error(401, "a valid API key is needed")
        return False

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.is_allowed():
            return
        self.server.requests.append(body)
        reply = self.server.replies.get(timeout=TIMEOUT)
        if isinstance(reply, tuple):
            self.error(*reply)
            return
        self.start(200, "text/event-stream")
        for piece in reply:
            if isinstance(piece, bytes):
                self.wfile.write(piece)
            elif isinstance(piece, threading.Event):
                piece.wait(TIMEOUT)
            else:
                self.write_until_hang_up()

    def write_until_hang_up(self):
        try:
            for _ in range(100 * TIMEOUT):
                self.wfile.write(b": nothing\n\n")
                threading.Event().wait(0.01)
        except OSError:
            self.server.hung_up.set()


@pytest.fixture
def server():
    server = FakeServer()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, server):
    """A function that opens the page, in a browser with no past; its options are those of the browser's context."""
    contexts, wrong = [], []

    def open_page(**options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(1000 * TIMEOUT)
        page.on("pageerror", lambda error: wrong.append(error))
        page.on("console", lambda line: wrong.append(line.text) if "Content Security" in line.text else None)
        page.goto(server.url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong


def say(page, text):
    page.get_by_label("Message").fill(text)
    page.get_by_label("Message").press("Enter")


def last_answer(page):
    return page.locator(".answer").last


def is_scrolled_sideways(page):
    return page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")


def is_at_end(page):
    return page.evaluate("main.scrollHeight - main.scrollTop - main.clientHeight < 2")


def test_text_appears_while_it_streams_and_the_next_turn_sends_all(server, open_page):
    page, gate = open_page(), threading.Event()
    expect(page.locator("#model")).to_have_text("Llama-Nano · 4,096 tokens")
    whole = answer("Grüße ", "🌍", " und mehr")
    cut = whole.index("🌍".encode()) + 2  # inside a character, so inside an event too
    server.reply(whole[:cut], gate, *(whole[i : i + 1] for i in range(cut, len(whole))))
    say(page, "Hallo?")
    expect(last_answer(page)).to_have_text("Grüße ")
    expect(last_answer(page)).to_have_attribute("aria-busy", "true")
    gate.set()
    expect(last_answer(page)).to_have_text("Grüße 🌍 und mehr")
    stats = page.locator(".stats").last
    expect(stats).to_contain_text("7 tokens · ")
    expect(stats).to_contain_text("32 of 40 prompt tokens cached")
    expect(stats).to_contain_text("tokens/s")
    expect(stats).to_contain_text("first token in 0.")
    assert server.requests[0] == {
        "model": "tiny/Llama-Nano",
        "messages": [{"role": "user", "content": "Hallo?"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    server.reply(answer("Ja."))
    say(page, "Wirklich?")
    expect(last_answer(page)).to_have_text("Ja.")
    assert server.messages() == [("user", "Hallo?"), ("assistant", "Grüße 🌍 und mehr"), ("user", "Wirklich?")]


def test_regenerate_asks_the_last_question_again_and_new_chat_forgets(server, open_page):
    page = open_page()
    server.reply(answer("one", finish="length"))
    say(page, "a")
    expect(page.locator(".stats")).to_contain_text("cut at max_tokens")
    server.reply(answer("two"))
    page.get_by_role("button", name="Regenerate").click()
    expect(last_answer(page)).to_have_text("two")
    assert server.messages() == [("user", "a")]
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".turn")).to_have_count(0)
    server.reply(answer("three"))
    say(page, "b")
    expect(last_answer(page)).to_have_text("three")
    assert server.messages() == [("user", "b")]


def test_settings_are_sent_only_if_set_and_outlive_the_page(server, open_page):
    page = open_page()
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Max tokens").fill("12")
    page.get_by_role("button", name="Done").click()
    expect(page.get_by_role("dialog")).to_be_hidden()
    page.reload()
    server.reply(answer("ok"))
    say(page, "a")
    expect(last_answer(page)).to_have_text("ok")
    assert server.messages() == [("system", "Be brief."), ("user", "a")]
    sent = server.requests[-1]
    assert sent["temperature"] == 0 and sent["max_tokens"] == 12 and "top_p" not in sent


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_stop_hangs_up_and_keeps_what_came(server, open_page, how):
    page = open_page()
    server.reply(begin("As far as this"), None)
    say(page, "a")
    expect(last_answer(page)).to_have_text("As far as this")
    if how == "button":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press("Escape")
    assert server.hung_up.wait(TIMEOUT)
    expect(page.locator(".stats")).to_contain_text("stopped")
    server.reply(answer("ok"))
    say(page, "b")
    expect(last_answer(page)).to_have_text("ok")
    assert server.messages() == [("user", "a"), ("assistant", "As far as this"), ("user", "b")]


def test_new_chat_hangs_up_too(server, open_page):
    page = open_page()
    server.reply(begin("As far as this"), None)
    say(page, "a")
    expect(last_answer(page)).to_have_text("As far as this")
    page.get_by_role("button", name="New chat").click()
    assert server.hung_up.wait(TIMEOUT)
    server.reply(answer("ok"))
    say(page, "b")
    expect(page.locator(".answer")).to_have_text("ok")
    assert server.messages() == [("user", "b")]


def test_html_in_an_answer_is_text(server, open_page):
    page = open_page()
    bad = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    server.reply(answer(f"{bad}\n\n- {bad}\n\n**{bad}** `{bad}`\n```<b>\n{bad}\n```\n# {bad}"))
    say(page, bad)
    expect(page.locator(".answer pre")).to_have_text(bad)
    expect(page.locator(".answer p").first).to_have_text(bad)
    expect(page.locator(".question")).to_have_text(bad)
    assert page.locator("#log :is(img, script, b)").count() == 0
    assert page.title() == "Llama-Nano · minivllm"


def test_markdown(server, open_page):
    page, gate = open_page(permissions=["clipboard-read", "clipboard-write"]), threading.Event()
    code = "def f(*args):\n    return **args\n\n# not a heading"
    begun = begin(f"## Title\n\nSome **bold `x`** and `a*b*c`, 2 * 3 * 4.\n\n```python\n{code}")
    rest = end("\n```\n\n1. one\n   more\n   - deep **er**\n2. two\n\nAfter\nall")
    server.reply(begun, gate, rest)
    say(page, "a")
    expect(page.locator(".answer pre code")).to_have_text(code)  # the fence is open still
    expect(page.locator(".code span")).to_have_text("python")
    page.locator(".answer pre").evaluate("(node) => (node.id = 'kept')")
    gate.set()
    expect(page.locator(".answer p").last).to_have_text("After\nall")
    assert page.locator("#kept").count() == 1, "a finished block was made anew"
    texts = page.evaluate(
        """() => Object.fromEntries(["h3", "strong", "p > code", "strong > code", "ol > li", "ol > li > ul > li"].map(
            (name) => [name, [...document.querySelectorAll(".answer " + name)].map((node) => node.textContent)]))"""
    )
    assert texts == {
        "h3": ["Title"],
        "strong": ["bold x", "er"],
        "p > code": ["a*b*c"],
        "strong > code": ["x"],
        "ol > li": ["one\nmoredeep er", "two"],
        "ol > li > ul > li": ["deep er"],
    }
    page.locator(".code").get_by_role("button", name="Copy").click()
    expect(page.locator(".code button")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == code
    page.locator(".foot").get_by_role("button", name="Copy").click()
    expect(page.locator(".foot button").first).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()").startswith("## Title\n\nSome **bold `x`**")
    page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")  # as over plain http
    page.locator(".code").get_by_role("button", name="Cop").click()
    page.get_by_label("Message").press("Control+v")
    expect(page.get_by_label("Message")).to_have_value(code)


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("1. a\n\n   ```sh\n   ls\n     -l\n   ```\n\n2. b", "ol(li(p(a) pre(ls\n  -l)) li(p(b)))"),
        ("1. a\n```\nx\n```\n2. b", "ol(li(p(a))) pre(x) ol2(li(p(b)))"),
        ("* a\n  * b\n    * c\n* d\n\ne", "ul(li(p(a) ul(li(p(b) ul(li(p(c)))))) li(p(d))) p(e)"),
        ("a\n- b\n1) c", "p(a) ul(li(p(b))) ol(li(p(c)))"),
        ("~~~\n```\n~~~~\n#no\n# yes", "pre(```) p(#no) h3(yes)"),
        ("``a`b`` *c* d*e*f **g *h* i** ** j", "p(code(a`b) em(c) strong(em(h)))"),
        ("snake_case_name 2*3*4 `open **b", "p()"),
    ],
)
def test_markdown_shapes(open_page, text, html):
    page = open_page()
    shape = """(text) => {
        const show = (node) => {
            const name = node.tagName.toLowerCase() + (node.start > 1 ? node.start : "");
            if (name === "div") return show(node.querySelector("pre"));
            const inner = [...node.children].filter((child) => child.tagName !== "CODE" || name !== "pre").map(show);
            const leaf = inner.length ? inner.join(" ") : node.textContent;
            return `${name}(${leaf})`;
        };
        return [...renderMarkdown(document.createElement("div"), text).children].map(show).join(" ");
    }"""
    if html == "p()":
        html = f"p({text})"
    assert page.evaluate(shape, text) == html


def test_markdown_is_fast_on_text_made_to_be_slow(open_page):
    page = open_page()
    for text in ("`", "*", "**a ", "a**", "`a``b", "**a*", "*a ", "- ", " ", "```", "1. a\n  ", "\n> - "):
        milliseconds = page.evaluate(
            """(text) => {
                const start = performance.now();
                renderMarkdown(document.createElement("div"), text.repeat(20000 / text.length));
                return performance.now() - start;
            }""",
            text,
        )
        assert milliseconds < 1000, text


def test_errors_are_shown_and_retry_works(server, open_page):
    page = open_page()
    failures = [
        ((400, "the prompt is too long"), "the prompt is too long"),
        ([begin("half"), event({"error": {"message": "the engine broke"}})], "the engine broke"),
        ([begin("half")], "The connection ended before the answer did."),
    ]
    for reply, message in failures:
        server.replies.put(reply)
        say(page, f"a: {message}")
        expect(page.get_by_role("alert").last).to_contain_text(message)
        server.reply(answer("half", " and half"))
        page.get_by_role("button", name="Retry").click()
        expect(last_answer(page)).to_have_text("half and half")
        expect(page.get_by_role("alert").last).to_be_empty()
    assert len(server.messages()) == 5


def test_a_question_with_no_answer_is_left_out_of_the_next_request(server, open_page):
    page = open_page()
    server.replies.put((500, "out of memory"))
    say(page, "a")
    expect(page.get_by_role("alert").last).to_contain_text("out of memory")
    server.reply(answer("ok"))
    say(page, "b")
    expect(last_answer(page)).to_have_text("ok")
    assert server.messages() == [("user", "b")]


def test_a_server_that_is_gone(server, open_page):
    page = open_page()
    page.context.set_offline(True)
    say(page, "a")
    expect(page.get_by_role("alert").last).to_contain_text("No connection to the server")
    page.context.set_offline(False)
    server.reply(answer("back"))
    page.get_by_role("button", name="Retry").click()
    expect(last_answer(page)).to_have_text("back")


def test_the_api_key_is_asked_for_and_kept_for_the_session_only(server, open_page):
    page = open_page()
    expect(page.locator("#model")).to_contain_text("Llama-Nano")
    server.api_key = "sesame"
    say(page, "a")
    key = page.get_by_label("API key", exact=True)
    expect(key).to_be_focused()
    key.fill("wrong")
    key.press("Enter")
    expect(page.locator("#key-wanted")).to_have_text("a valid API key is needed")
    server.reply(answer("open"))
    key.fill("sesame")
    key.press("Enter")
    expect(last_answer(page)).to_have_text("open")
    page.reload()
    expect(page.locator("#model")).to_contain_text("Llama-Nano")
    expect(page.get_by_role("dialog")).to_be_hidden()
    assert "sesame" not in page.evaluate("JSON.stringify(localStorage)")


def test_the_api_key_is_asked_for_as_the_page_opens(server, open_page):
    server.api_key = "sesame"
    page = open_page()
    expect(page.locator("#model")).to_have_text("a valid API key is needed")
    page.get_by_label("API key", exact=True).fill("sesame")
    page.get_by_role("button", name="Done").click()
    expect(page.locator("#model")).to_contain_text("Llama-Nano")


def test_the_keyboard_is_enough(server, open_page):
    page = open_page()
    expect(page.get_by_label("Message")).to_be_focused()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    server.reply(answer("ok"))
    page.keyboard.press("Enter")
    expect(last_answer(page)).to_have_text("ok")
    assert server.messages() == [("user", "one\ntwo")]
    expect(page.get_by_label("Message")).to_be_focused()
    page.get_by_role("button", name="New chat").focus()
    for name in ("New chat", "Settings", "Light or dark", "Conversation", "Copy", "Regenerate", "Message"):
        focused = page.locator(":focus")
        expect(focused).to_have_accessible_name(name)
        if name != "Message":  # its frame shows the focus
            expect(focused).to_have_css("outline-style", "solid")
        page.keyboard.press("Tab")
    page.get_by_role("button", name="Settings").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_label("System prompt")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Settings")).to_be_focused()


def test_a_phone_has_no_sideways_scroll_and_sees_the_input(server, open_page):
    page = open_page(viewport={"width": 360, "height": 740})
    long = "w" * 300
    server.reply(answer(f"{long} `{long}`\n```\n{long}\n```\n- {long}\n\n" + "A paragraph.\n\n" * 40, finish="length"))
    say(page, long)
    expect(page.locator(".stats")).to_contain_text("cut at")
    assert not is_scrolled_sideways(page)
    assert is_at_end(page)
    expect(page.get_by_label("Message")).to_be_in_viewport(ratio=1)
    page.get_by_label("Message").fill("a line\n" * 60)
    expect(page.get_by_label("Message")).to_be_in_viewport(ratio=1)
    page.wait_for_function("isAtEnd()")  # though the input has grown
    page.get_by_role("button", name="Settings").click()
    assert not is_scrolled_sideways(page)


def test_on_a_touch_screen_enter_is_a_new_line(server, open_page):
    page = open_page(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    page.get_by_label("Message").tap()
    page.keyboard.type("one\ntwo")
    server.reply(answer("ok"))
    page.get_by_role("button", name="Send").tap()
    expect(last_answer(page)).to_have_text("ok")
    assert server.messages() == [("user", "one\ntwo")]


def test_a_reader_who_scrolled_up_is_left_there(server, open_page):
    page, gate = open_page(), threading.Event()
    server.reply(begin("A paragraph.\n\n" * 60), gate, end("The end."))
    say(page, "a")
    expect(page.locator(".answer p")).to_have_count(60)
    expect(page.get_by_role("button", name="To the end")).to_be_hidden()
    page.locator("main").evaluate("(main) => (main.scrollTop = 100)")
    gate.set()
    expect(page.locator(".answer p")).to_have_count(61)
    expect(page.locator(".stats")).not_to_be_empty()
    assert page.evaluate("main.scrollTop") == 100
    page.get_by_role("button", name="To the end").click()
    expect(page.get_by_role("button", name="To the end")).to_be_hidden()
    assert is_at_end(page)


def test_dark_and_light(open_page):
    def brightness(page):
        return page.evaluate("+getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]")

    page = open_page(color_scheme="light")
    assert brightness(page) > 200
    page.get_by_role("button", name="Light or dark").click()
    assert brightness(page) < 60
    page.reload()
    assert brightness(page) < 60
    assert brightness(open_page(color_scheme="dark")) < 60
