"""Options of command lines for vLLM that `minivllm --help` does not show: they change nothing, or are refused."""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from minivllm.config import NO_MEANING_HERE, NOT_SUPPORTED
from minivllm.validation import NotSupported, take_options

ENGINE_FLAGS = ("trust_remote_code", *NO_MEANING_HERE, *NOT_SUPPORTED)  # which the constructor of LLM answers

LOGGING = "requests are not logged; --access-log writes a line for each"
TLS = "let a proxy in front of the server do it"

# Of the server alone: those that change nothing, and those that ask for something there is not.
SERVER_NO_MEANING_HERE = {
    "disable_access_log_for_endpoints": LOGGING,
    "disable_fastapi_docs": "there are no such pages",
    "disable_frontend_multiprocessing": "the engine always has a process of its own",
    "disable_log_requests": LOGGING,
    "disable_uvicorn_access_log": LOGGING,
    "enable_auto_tool_choice": "calls are read out of the answers to all requests that have tools",
    "enable_log_deltas": LOGGING,
    "enable_log_outputs": LOGGING,
    "enable_log_requests": LOGGING,
    "enable_prompt_tokens_details": "usage always has them",
    "max_log_len": LOGGING,
    "uvicorn_log_level": LOGGING,
}
SERVER_NOT_SUPPORTED: NotSupported = {
    "allow_credentials": ((False,), "leave it out"),
    "allowed_headers": ((["*"],), "all are allowed to --allowed-origins"),
    "allowed_methods": ((["*"],), "all are allowed to --allowed-origins"),
    "api_server_count": ((1,), "start several servers, or examples/ray_serve.py --replicas N"),
    "config": ((), "give its options one by one"),
    "default_chat_template_kwargs": (({},), "send chat_template_kwargs with each request"),
    "enable_force_include_usage": ((False,), "send stream_options with each request"),
    "enable_request_id_headers": ((False,), "send request_id; the answer's id has it"),
    "enable_server_load_tracking": ((False,), "see /metrics"),
    "enable_ssl_refresh": ((False,), TLS),
    "exclude_tools_when_tool_choice_none": ((False,), "leave tools out of such requests"),
    "log_config_file": ((), LOGGING),
    "lora_modules": (([],), "merge the adapter into its base model"),
    "middleware": (([],), "let a proxy in front of the server do it"),
    "reasoning_parser": (("",), "reasoning is part of the text"),
    "response_role": (("assistant",), "answers are the assistant's"),
    "return_tokens_as_token_ids": ((False,), "/tokenize has the ids of a text"),
    "root_path": (("",), "let the proxy take it off"),
    "ssl_ca_certs": ((), TLS),
    "ssl_cert_reqs": ((0,), TLS),
    "ssl_certfile": ((), TLS),
    "ssl_ciphers": ((), TLS),
    "ssl_keyfile": ((), TLS),
    "tool_parser_plugin": (("",), "see --tool-call-parser"),
    "tool_server": ((), "calls are the client's to answer"),
    "uds": ((), "take --host and --port"),
}
SERVER_FLAGS = {*SERVER_NO_MEANING_HERE, *SERVER_NOT_SUPPORTED} - {*ENGINE_FLAGS}

SHORT = {
    "attention_config": "-ac",
    "compilation_config": "-cc",
    "data_parallel_size": "-dp",
    "enable_expert_parallel": "-ep",
    "optimization_level": "-O",
    "pipeline_parallel_size": "-pp",
    "quantization": "-q",
    "speculative_config": "-sc",
    "tensor_parallel_size": "-tp",
}
# Which of these options are switches, and come without a value.
SWITCH_BEGINNINGS = ("allow_", "calculate_", "disable_", "enable_", "exclude_", "return_", "skip_", "trust_", "use_")
LISTS = ("cuda_graph_sizes", "cudagraph_capture_sizes", "logits_processors", "lora_modules", "middleware")


def with_dashes(arguments: Sequence[str]) -> list[str]:
    """Command-line arguments whose options are written as --this-one and not as --this_one."""

    def rewrite(argument: str) -> str:
        name, equals, value = argument.partition("=")
        return name.replace("_", "-") + equals + value if name.startswith("--") else argument

    return [rewrite(argument) for argument in arguments]


def option_strings(name: str) -> list[str]:
    """How the option is written."""
    return ["--" + name.replace("_", "-"), *([SHORT[name]] if name in SHORT else [])]


def add_hidden(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """Take these options, None where they are not given, without a word in the help."""
    for name in names:
        options: dict[str, Any] = dict(dest=name, default=None, help=argparse.SUPPRESS)
        if name.startswith(SWITCH_BEGINNINGS):
            options["action"] = argparse.BooleanOptionalAction
        elif name == "hf_token":
            options |= dict(nargs="?", const=True)
        else:
            options |= dict(type=_value, nargs="+" if name in LISTS else None)
        parser.add_argument(*option_strings(name), **options)


def check_server_flags(args: argparse.Namespace) -> None:
    """Answer those of SERVER_FLAGS that are given: by a warning, or a ValueError."""
    given = {name: getattr(args, name) for name in SERVER_FLAGS if getattr(args, name) is not None}
    for name in take_options(given, "serve", SERVER_NOT_SUPPORTED, SERVER_NO_MEANING_HERE):
        warnings.warn(f"{name} has no effect: {SERVER_NO_MEANING_HERE[name]}", stacklevel=2)


def _value(text: str) -> Any:
    """What a text on the command line stands for, as far as it is not known what it should be."""
    if text == "None":
        return None
    try:
        return json.loads(text)
    except ValueError:
        return text
