"""The command `minivllm`: serve | chat | generate | bench.  What needs torch is imported once arguments are right."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from minivllm import __version__
from minivllm.argument_types import at_least, json_object, json_texts
from minivllm.command import exit_status, print_any_text
from minivllm.config import EngineConfig
from minivllm.vllm_flags import ENGINE_FLAGS, SERVER_FLAGS, add_hidden, check_server_flags, option_strings, with_dashes

MODEL_HELP = "folder, hub id or .gguf file; default: the embedded SmolLM2-135M-Instruct"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status.  A user's mistakes are one line on stderr."""
    arguments = with_dashes(sys.argv[1:] if argv is None else argv)
    print_any_text()
    warnings.formatwarning = _line
    if arguments[:1] == ["bench"]:
        from minivllm.bench import cli as bench

        return bench.main(arguments[1:], prog="minivllm bench")
    args = _parser().parse_args(arguments)

    def run() -> None:
        args.model = _the_model(args.model, args.model_option)
        args.run(args)

    return exit_status("minivllm", run)


def _line(message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
    """A warning of ours without the place in the code."""
    if Path(filename).parent == Path(__file__).parent:
        return f"minivllm: {message}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="minivllm",
        description="A minimal LLM inference engine.",
        epilog="`minivllm COMMAND --help` explains a command.",
    )
    parser.add_argument("--version", action="version", version=f"minivllm {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], None], help: str) -> argparse.ArgumentParser:
        description, usage = help[0].upper() + help[1:] + ".", "%(prog)s [MODEL] [options]"
        one = commands.add_parser(name, help=help, description=description, usage=usage)
        one.set_defaults(run=run)
        one.add_argument("model", nargs="?", metavar="MODEL", help=MODEL_HELP)
        one.add_argument("--model", dest="model_option", help=argparse.SUPPRESS)  # the same, as vLLM's
        return one

    _add_serve(command("serve", _serve, "serve a model to OpenAI's clients and to browsers"))
    _add_chat(command("chat", _chat, "talk to a model, in this process or on a server"))
    _add_generate(command("generate", _generate, "complete prompts and print what comes"))
    commands.add_parser("bench", help="measure: throughput, latency, serve or kernels", add_help=False)
    return parser


def _the_model(place: str | None, option: str | None) -> str | None:
    if None not in (place, option) and place != option:
        raise ValueError(f"which model is it, {place} or --model {option}? Give one")
    return option if place is None else place


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """An option for each field of EngineConfig, and for what names the model's parts."""
    group = parser.add_argument_group("engine")
    group.add_argument("--tokenizer", metavar="PLACE", help="where the tokenizer comes from; default: the model")
    group.add_argument("--skip-tokenizer-init", action="store_const", const=True, help="prompts are token ids only")
    group.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub model")
    group.add_argument("--chat-template", metavar="FILE", help="Jinja template in place of the model's own")
    group.add_argument("--hf-overrides", type=json_object, metavar="JSON", help="entries of config.json to change")
    for one in fields(EngineConfig):
        flags, kind = option_strings(one.name), str(one.type).removesuffix(" | None")
        help = one.metadata["help"].replace("%", "%%")
        if kind == "bool":
            group.add_argument(*flags, action=argparse.BooleanOptionalAction, default=None, help=help)
        else:
            types: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "str": str}
            shown = f" ({one.default})" if one.default not in (None, "auto") else ""
            group.add_argument(*flags, type=types.get(kind, json_object), metavar="X", help=help + shown)
    add_hidden(parser, ENGINE_FLAGS)


def engine_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The given ones, as LLM and AsyncLLM take them."""
    parts = ("tokenizer", "skip_tokenizer_init", "revision", "chat_template", "hf_overrides")
    names = [*parts, *(one.name for one in fields(EngineConfig)), *ENGINE_FLAGS]
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _add_serve(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("server").add_argument
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all (%(default)s)")
    add("--port", type=at_least(0, 65535), default=8000, help="0: any free one (%(default)s)")
    add("--api-key", action="append", default=[], metavar="KEY",
        help="clients must send it; default: $MINIVLLM_API_KEY, or $VLLM_API_KEY")  # fmt: skip
    add("--served-model-name", nargs="+", metavar="NAME", help="what clients call the model; default: MODEL")
    add("--max-queued-requests", type=at_least(0), default=1024, metavar="N",
        help="that wait beyond those that run; more get status 429 (%(default)s)")  # fmt: skip
    add("--max-body-mib", type=at_least(1), default=32, metavar="N", help="largest request body (%(default)s)")
    add("--tool-call-parser", metavar="NAME", help="how the model writes tool calls; default: by its chat template")
    add(
        "--trust-request-chat-template", action="store_true", help="take chat templates from clients, who may be anyone"
    )
    add("--chat-template-content-format", choices=("auto", "string", "openai"), default="auto",
        help="contents go to the template as texts, as lists of parts, or as it is made for (%(default)s)")  # fmt: skip
    add("--allowed-origins", type=json_texts, default=[], metavar="JSON", help="of web pages that may call: a list")
    add("--grace-period", type=at_least(0), default=30, metavar="SECONDS",
        help="that running requests have after SIGTERM (%(default)s)")  # fmt: skip
    add("--access-log", action="store_true", help="a line for each request")
    add_hidden(parser, SERVER_FLAGS)
    add_engine_arguments(parser)


def _serve(args: argparse.Namespace) -> None:
    try:
        from minivllm.server.app import bind, serve
        from minivllm.server.service import ServerOptions
        from minivllm.server.tool_parsers import PARSERS
    except ImportError as error:
        raise ImportError(f"{error}; the server needs more: pip install 'minivllm[server]'") from None
    if args.tool_call_parser is not None and args.tool_call_parser not in PARSERS:
        raise ValueError(f"--tool-call-parser must be one of {', '.join(PARSERS)}; got {args.tool_call_parser!r}")
    if "" in args.api_key:
        raise ValueError("--api-key must not be empty")
    check_server_flags(args)
    listener = bind(args.host, args.port)
    from minivllm.async_llm import AsyncLLM

    environment = os.environ.get("MINIVLLM_API_KEY") or os.environ.get("VLLM_API_KEY")
    serve(
        listener,
        lambda: AsyncLLM(args.model, **engine_arguments(args)),
        lambda llm: ServerOptions(
            model_names=args.served_model_name or [args.model or llm.model],
            api_keys=args.api_key or ([environment] if environment else []),
            max_queued_requests=args.max_queued_requests,
            max_body_bytes=args.max_body_mib << 20,
            tool_call_parser=args.tool_call_parser,
            allowed_origins=args.allowed_origins,
            trust_request_chat_template=args.trust_request_chat_template,
            chat_template_content_format=args.chat_template_content_format,
        ),
        args.grace_period,
        args.access_log,
    )


def _add_sampling_arguments(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    add = parser.add_argument_group("sampling").add_argument
    add("--max-tokens", type=int, default=max_tokens, metavar="N", help="in an answer (%(default)s)")
    add("--temperature", type=float, metavar="T", help="0 is greedy; default: the model's own")
    add("--top-p", type=float, metavar="P", help="default: the model's own")


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="may be given more than once; default: stdin")
    _add_sampling_arguments(parser, 128)
    add_engine_arguments(parser)


def _generate(args: argparse.Namespace) -> None:
    from minivllm.sampling_params import SamplingParams

    SamplingParams(**_sampling_options(args))  # mistakes show before anything is loaded
    if not args.prompt and sys.stdin is None:
        raise ValueError("there is no standard input; give --prompt")
    if args.skip_tokenizer_init:
        raise ValueError("generate needs a tokenizer; leave --skip-tokenizer-init out")
    prompts = args.prompt or [_standard_input()]
    from minivllm import LLM

    with LLM(args.model, **engine_arguments(args)) as llm:
        options = llm.inputs.default_options() | _sampling_options(args)
        for output in llm.generate(prompts, SamplingParams(**options), use_tqdm=False):
            if len(prompts) > 1:
                print(f"--- {output.prompt}")
            print(output.outputs[0].text)


def _standard_input() -> str:
    """What comes on it, without the line break at its end."""
    if sys.stdin.isatty():
        print("minivllm: reading the prompt, up to Ctrl-D", file=sys.stderr)
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not UTF-8 (byte {error.start})") from None


def _sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    given = dict(max_tokens=args.max_tokens, temperature=args.temperature, top_p=args.top_p)
    return {name: value for name, value in given.items() if value is not None}


def _add_chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--url", help="of any OpenAI-compatible server, such as http://127.0.0.1:8000; default: no server"
    )
    parser.add_argument("--api-key", metavar="KEY", help="for the server; default: $OPENAI_API_KEY")
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    _add_sampling_arguments(parser, 512)
    add_engine_arguments(parser)


def _chat(args: argparse.Namespace) -> None:
    from minivllm import chat
    from minivllm.sampling_params import SamplingParams

    SamplingParams(**_sampling_options(args))
    if args.skip_tokenizer_init:
        raise ValueError("--skip-tokenizer-init: a chat needs a tokenizer; leave it out")
    if args.url is not None:
        if given := engine_arguments(args):
            raise ValueError(
                f"--{next(iter(given)).replace('_', '-')} is the server's to choose; leave it out with --url"
            )
        model = chat.RemoteModel(args.url, args.model, args.api_key or os.environ.get("OPENAI_API_KEY"))
        return chat.run(model, args.system, _sampling_options(args))
    from minivllm import LLM

    # Small blocks: only full ones are cached, so more of a short conversation is.
    with LLM(args.model, **{"block_size": 16} | engine_arguments(args)) as llm:
        chat.run(chat.LocalModel(llm), args.system, llm.inputs.default_options() | _sampling_options(args))
