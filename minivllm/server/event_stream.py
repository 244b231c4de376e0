"""Answers while they are made: server-sent events, and clients that hang up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from minivllm.async_llm import EngineDeadError
from minivllm.server.errors import ApiError, shutting_down
from minivllm.server.service import Work


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, Any]) -> Any:
    """Do `work`, but cancel it when the client hangs up; None then."""

    async def hang_up() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(hang_up())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """Server-sent events: a JSON object each, and [DONE]."""

    def __init__(self, work: Work) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await until_disconnect(receive, self._write(send))
        except asyncio.CancelledError:
            await self._end(send, shutting_down())
        finally:
            await self._work.close()

    async def _write(self, send: Send) -> None:
        try:
            async with aclosing(self._work.events()) as events:
                async for content in events:
                    await send(_event(json.dumps(content, ensure_ascii=False, separators=(",", ":"))))
        except (EngineDeadError, ApiError) as error:
            await self._end(send, error if isinstance(error, ApiError) else ApiError(500, str(error)))
        except Exception as error:
            await self._end(send, ApiError(500, f"{type(error).__name__}: {error}"))
            raise
        else:
            await self._end(send)

    async def _end(self, send: Send, failure: ApiError | None = None) -> None:
        if failure is not None:  # the status has been sent already
            await send(_event(json.dumps(failure.body())))
        await send(_event("[DONE]"))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _event(content: str) -> Message:
    return {"type": "http.response.body", "body": f"data: {content}\n\n".encode(), "more_body": True}
