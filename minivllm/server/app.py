"""The server: its endpoints, and how it starts and ends."""

from __future__ import annotations

import asyncio
import errno
import gc
import hmac
import json
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import uvicorn
from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

import minivllm
from minivllm.async_llm import AsyncLLM, EngineDeadError
from minivllm.process_state import allow_open_files
from minivllm.server.chat import ChatCompletion
from minivllm.server.chat_protocol import ChatBody, TokenizeBody
from minivllm.server.completions import Completion
from minivllm.server.errors import ApiError, from_validation, shutting_down
from minivllm.server.event_stream import EventStream, until_disconnect
from minivllm.server.metrics import ServerMetrics
from minivllm.server.protocol import CompletionBody, DetokenizeBody
from minivllm.server.service import ServerOptions, Service, Work

BACKLOG = 2048  # connections that wait to be taken
PAGE = Path(__file__).with_name("page.html")
OPEN_PATHS = ("/", "/health", "/ping", "/version", "/metrics")  # need no key: they show nothing of anybody's requests
AnyBody = TypeVar("AnyBody", bound=BaseModel)


def make_app(llm: AsyncLLM, options: ServerOptions) -> ASGIApp:
    """The ASGI application."""
    endpoints = _Endpoints(Service(llm, options, ServerMetrics(llm, options.model_names[0])))
    routes = [
        Route("/v1/models", endpoints.models),
        Route("/v1/models/{name:path}", endpoints.model),
        _post("/v1/completions", endpoints.generate(CompletionBody, Completion)),
        _post("/v1/chat/completions", endpoints.generate(ChatBody, ChatCompletion)),
        _post("/tokenize", endpoints.tokenize),
        _post("/detokenize", endpoints.detokenize),
        Route("/health", endpoints.health),
        Route("/ping", endpoints.health, methods=["GET", "POST"]),  # SageMaker's name
        Route("/version", endpoints.version),
        Route("/metrics", endpoints.metrics),
        Route("/", endpoints.page),
    ]
    middleware = []
    if options.allowed_origins:
        middleware.append(
            Middleware(
                CORSMiddleware, allow_origins=list(options.allowed_origins), allow_methods=["*"], allow_headers=["*"]
            )
        )
    if options.api_keys:
        middleware.append(Middleware(_RequireKey, keys=options.api_keys))
    errors = dict.fromkeys((ApiError, EngineDeadError, HTTPException, Exception), _error_response)
    return Starlette(routes=routes, middleware=middleware, exception_handlers=errors)


async def _error_response(_: Request, error: Exception) -> Response:
    """What a request hears of an error; async, as others are run in a thread, which a cancelled task cannot have."""
    if isinstance(error, HTTPException):
        error = ApiError(error.status_code, error.detail, headers=error.headers)
    elif isinstance(error, EngineDeadError):
        error = ApiError(500, str(error))
    elif not isinstance(error, ApiError):
        error = ApiError(500, "something went wrong in the server")
    return error.response()


def _post(path: str, endpoint: Callable[[Request], Awaitable[Response]]) -> Route:
    """A route whose requests, if they outlast the grace period, hear why they end."""

    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except asyncio.CancelledError:
            raise shutting_down() from None

    return Route(path, answer, methods=["POST"])


class _RequireKey:
    """Lets through what brings one of the keys: Authorization: Bearer KEY."""

    def __init__(self, app: ASGIApp, keys: Any) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS and scope["method"] != "OPTIONS":
            kind, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
            right = [hmac.compare_digest(given.strip(), key) for key in self._keys]  # all of them, in equal time
            if kind.lower() != b"bearer" or not any(right):
                error = ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
                return await error.response()(scope, receive, send)
        await self._app(scope, receive, send)


class _Endpoints:
    def __init__(self, service: Service) -> None:
        self._service = service
        self._llm = service.llm

    def generate(self, body_class: type[BaseModel], kind: Callable[[Service, Any], Work]) -> Any:
        """The endpoint that answers bodies of this class by what `kind` makes of them."""

        async def endpoint(request: Request) -> Response:
            body = await self._body(request, body_class)
            work = kind(self._service, body)
            await work.start()
            if body.stream:  # type: ignore[attr-defined]
                return EventStream(work)
            try:
                answer = await until_disconnect(request.receive, work.answer())
            finally:
                await work.close()
            return Response(status_code=499) if answer is None else JSONResponse(answer)

        return endpoint

    async def models(self, _: Request) -> Response:
        names = self._service.options.model_names
        return JSONResponse({"object": "list", "data": [self._model_json(name) for name in names]})

    async def model(self, request: Request) -> Response:
        return JSONResponse(self._model_json(self._service.check_model(request.path_params["name"])))

    def _model_json(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._service.started,
            "owned_by": "minivllm",
            "root": self._llm.model,
            "parent": None,
            "max_model_len": self._llm.facts.max_model_len,
        }

    async def tokenize(self, request: Request) -> Response:
        body = await self._body(request, TokenizeBody)
        self._service.check_model(body.model)
        try:
            tokenizer = self._llm.get_tokenizer()
            if body.messages is not None:
                prompt: Any = await self._service.render(body.messages, body)
                tokens = prompt["prompt_token_ids"]
            elif body.prompt is not None:
                tokenize = partial(tokenizer, body.prompt, add_special_tokens=body.add_special_tokens)
                tokens = (await self._llm.with_tokenizer(tokenize)).input_ids
            else:
                raise ValueError("prompt or messages must be given")
        except ValueError as error:
            raise ApiError(400, str(error)) from None
        strings = {}
        if body.return_token_strs:
            strings["token_strs"] = await self._llm.with_tokenizer(tokenizer.convert_ids_to_tokens, tokens)
        limit = self._llm.facts.max_model_len
        return JSONResponse({"count": len(tokens), "max_model_len": limit, "tokens": tokens} | strings)

    async def detokenize(self, request: Request) -> Response:
        body = await self._body(request, DetokenizeBody)
        self._service.check_model(body.model)
        try:
            text = await self._llm.with_tokenizer(self._llm.get_tokenizer().decode, body.tokens)
            return JSONResponse({"prompt": text})
        except (ValueError, OverflowError, IndexError) as error:
            raise ApiError(400, f"tokens: {error}", "tokens") from None

    async def health(self, _: Request) -> Response:
        return Response(status_code=503 if self._llm.errored else 200)

    async def version(self, _: Request) -> Response:
        return JSONResponse({"version": minivllm.__version__})

    async def metrics(self, _: Request) -> Response:
        return Response(self._service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def page(self, _: Request) -> Response:
        return FileResponse(PAGE, media_type="text/html")

    async def _body(self, request: Request, body_class: type[AnyBody]) -> AnyBody:
        """The body, checked; what is wrong with it as an ApiError."""
        # Browsers send other types to any server without asking first, on behalf of any page.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "the Content-Type must be application/json")
        limit, content = self._service.options.max_body_bytes, bytearray()
        size = int(request.headers.get("content-length") or 0)
        if size <= limit:
            async for part in request.stream():
                content += part
                if (size := len(content)) > limit:
                    break
        if size > limit:
            raise ApiError(413, f"the body has more than {limit} bytes", headers={"Connection": "close"})
        try:
            value = json.loads(content.decode())
            if b"\\ud" in content.lower():  # half a character is none, and cannot be written
                json.dumps(value, ensure_ascii=False).encode()
            return body_class.model_validate(value)
        except ValidationError as error:
            raise from_validation(error) from None
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"the body is not JSON: {error}") from None


def bind(host: str, port: int) -> socket.socket:
    """A socket to serve on; before anything is loaded, so that a port that somebody listens on shows at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        option = "--port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "--host"
        raise OSError(f"cannot serve on {host} port {port}: {error.strerror}; use another {option}") from None
    return listener


def serve(
    listener: socket.socket,
    load: Callable[[], AsyncLLM],
    make_options: Callable[[AsyncLLM], ServerOptions],
    grace_seconds: int,
    access_log: bool = False,
) -> None:
    """Load the model and serve it until SIGTERM or Ctrl-C; then what runs has `grace_seconds` to come to its end."""

    def end(*_: object) -> None:
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, end)  # while loading; uvicorn has its own meanwhile, and then calls this one
    with listener, load() as llm:
        try:
            listener.listen(BACKLOG)
        except OSError as error:  # another server that was loading too was first
            host, port = listener.getsockname()[:2]
            raise OSError(f"cannot serve on {host} port {port}: {error.strerror}; use another --port") from None
        options = make_options(llm)
        allow_open_files(llm.facts.max_num_seqs + options.max_queued_requests)
        config = uvicorn.Config(
            make_app(llm, options),
            log_level="warning" if not access_log else "info",
            access_log=access_log,
            timeout_graceful_shutdown=grace_seconds,
            lifespan="off",
            server_header=False,
            backlog=BACKLOG,
        )
        _Server(config, options.model_names[0]).run(sockets=[listener])


class _Server(uvicorn.Server):
    """Says where it is once it listens, and what it waits for when it is told to end."""

    def __init__(self, config: uvicorn.Config, model_name: str) -> None:
        super().__init__(config)
        self._model_name = model_name

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.server_state.tasks and not self.should_exit:
            seconds = self.config.timeout_graceful_shutdown
            print(f"minivllm: requests that run have {seconds} s to end (Ctrl-C: at once)", file=sys.stderr)
        super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        gc.collect()
        gc.freeze()  # what is there stays, and a collection that goes through it would stop all streams
        assert sockets is not None
        host, port = sockets[0].getsockname()[:2]
        place = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        print(f"minivllm: serving {self._model_name} on {place} (chat page /, OpenAI API /v1)", file=sys.stderr)
