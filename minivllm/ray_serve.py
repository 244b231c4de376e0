"""The OpenAI server on Ray Serve: replicas of an engine behind one address, each request where its prefix is cached.

Two deployments.  `Ingress` reads a request and works out a key, the head of its prompt; `Engine` is the application of
`minivllm serve` as it is, with an engine, in as many replicas as there are.  `PrefixRouter` sends equal keys to the
same replica as long as that has room: rendezvous hashing (Thaler & Ravishankar 1998), so that a replica more or less
moves few of the others' keys.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import xxhash
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
from starlette.requests import Request
from starlette.responses import StreamingResponse

from minivllm.async_llm import AsyncLLM
from minivllm.server.app import make_app
from minivllm.server.service import ServerOptions
from minivllm.validation import check_int

HEAD_CHARACTERS = 512  # of a prompt, that decide where it goes
HEAD_TOKENS = 128
Message = dict[str, Any]  # of ASGI


def application(
    model: str | None = None,
    *,
    num_replicas: int | None = None,
    autoscaling: tuple[int, int] | None = None,
    served_model_name: str | None = None,
    num_cpus: float | None = None,
    num_gpus: float | None = None,
    max_ongoing_requests: int = 256,
    engine_arguments: dict[str, Any] | None = None,
) -> serve.Application:
    """What `serve.run` takes.

    num_replicas: engines (1).  autoscaling: the fewest and the most in its place; Ray adds one when more than half of
    max_ongoing_requests run on each.  num_cpus, num_gpus: of an engine; default: tensor_parallel_size GPUs.
    max_ongoing_requests: on a replica; more go to the next one, or wait.  engine_arguments: those of AsyncLLM.
    """
    engine_arguments = engine_arguments or {}
    if num_replicas is not None and autoscaling is not None:
        raise ValueError("num_replicas and autoscaling exclude each other; give one")
    if num_replicas is not None:
        check_int("num_replicas", num_replicas, 1)
    if autoscaling is not None and not 0 <= autoscaling[0] <= autoscaling[1] != 0:
        raise ValueError(f"autoscaling must be the fewest and the most engines, got {autoscaling}")
    if num_cpus is None and num_gpus is None:
        num_gpus = engine_arguments.get("tensor_parallel_size", 1)
    scale: dict[str, Any] = {"num_replicas": num_replicas or 1}
    if autoscaling is not None:
        fewest, most = autoscaling
        target = max(1, max_ongoing_requests // 2)
        scale = {"autoscaling_config": dict(min_replicas=fewest, max_replicas=most, target_ongoing_requests=target)}
    engine = Engine.options(  # type: ignore[attr-defined]
        **scale,
        max_ongoing_requests=max_ongoing_requests,
        ray_actor_options={"num_cpus": num_cpus or 0, "num_gpus": num_gpus or 0},
        request_router_config=RequestRouterConfig(
            request_router_class="minivllm.ray_serve:PrefixRouter"  # type: ignore[arg-type]
        ),
    )
    return Ingress.bind(engine.bind(model, served_model_name, engine_arguments))  # type: ignore[attr-defined]


class PrefixRouter(RequestRouter):
    """Prefers, for each key, the replicas in an order of its own."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """One replica a rank: Serve goes on to the next rank where a replica has no room."""
        key = pending_request.args[0] if pending_request is not None and pending_request.args else ""

        def rank(replica: RunningReplica) -> int:
            return xxhash.xxh64_intdigest(f"{replica.replica_id.unique_id} {key}".encode())

        return [[replica] for replica in sorted(candidate_replicas, key=rank)]


def prefix_key(content: bytes) -> str:
    """The head of the prompt in a request's body; "" where there is none."""
    try:
        body = json.loads(content)
        if messages := body.get("messages"):
            roles = [message.get("role") for message in messages]
            num_first = roles.index("user") + 1 if "user" in roles else len(roles)  # later turns keep the key
            return json.dumps(messages[:num_first])[:HEAD_CHARACTERS]
        prompt = body.get("prompt")
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            prompt = prompt[0]  # the prompts of one body stay together
        return json.dumps(prompt[:HEAD_TOKENS] if isinstance(prompt, list) else prompt)[:HEAD_CHARACTERS]
    except (ValueError, TypeError, AttributeError, RecursionError):
        return ""  # the application will say what is wrong with it


@serve.deployment(max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 0})
class Ingress:
    def __init__(self, engine: DeploymentHandle) -> None:
        self._engine = engine.options(stream=True)

    async def __call__(self, request: Request) -> StreamingResponse:
        content = await request.body()
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": request.method,
            "scheme": "http",
            "path": request.url.path,
            "raw_path": request.url.path.encode(),
            "query_string": request.url.query.encode(),
            "root_path": "",
            "headers": request.headers.raw,
            "client": None,
            "server": None,
        }
        messages = self._messages(self._engine.remote(prefix_key(content), scope, content))
        start = await anext(messages)
        response = StreamingResponse((message.get("body", b"") async for message in messages), start["status"])
        response.raw_headers = [(bytes(name), bytes(value)) for name, value in start["headers"]]
        return response

    async def _messages(self, answer: Any) -> AsyncGenerator[Message, None]:
        try:
            async for message in answer:
                yield message
        finally:
            answer.cancel()  # Serve passes a hang-up on by itself, but not always


@serve.deployment
class Engine:
    def __init__(self, model: str | None, served_model_name: str | None, engine_arguments: dict[str, Any]) -> None:
        self._llm = AsyncLLM(model, **engine_arguments)
        name = served_model_name or model or self._llm.model
        # Serve holds requests back by itself, so that the queue here stays short.
        self._app = make_app(self._llm, ServerOptions(model_names=[name], max_queued_requests=100_000))

    async def __call__(self, key: str, scope: dict[str, Any], content: bytes) -> AsyncGenerator[Message, None]:
        """Run the application on one request; yields its ASGI messages.  `key` is for the router."""
        received = iter([{"type": "http.request", "body": content, "more_body": False}])
        sent: asyncio.Queue[Message | None] = asyncio.Queue()

        async def receive() -> Message:
            for message in received:
                return message
            await asyncio.Event().wait()  # a client that hangs up cancels this call
            raise AssertionError

        async def run() -> None:
            try:
                await self._app(scope, receive, sent.put)  # type: ignore[arg-type]
            finally:
                sent.put_nowait(None)

        task = asyncio.ensure_future(run())
        try:
            while (message := await sent.get()) is not None:
                yield message
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def check_health(self) -> None:
        """Serve replaces a replica whose engine has failed."""
        if self._llm.errored:
            raise self._llm.dead_error()

    def __del__(self) -> None:
        if hasattr(self, "_llm"):
            self._llm.shutdown()
