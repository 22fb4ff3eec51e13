"""The application: OpenAI's paths, in front of the text service."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from nmexport.errors import RequestError
from nmexport.serving import metrics as names
from nmexport.serving.openai import replies, requests
from nmexport.serving.openai.events import EventSink, Failure, Piece
from nmexport.serving.scheduler import SHUTTING_DOWN

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send

    from nmexport.serving.metrics import Metrics
    from nmexport.serving.openai.requests import Asked, Kind
    from nmexport.serving.service import TextService

_MOST_BYTES = 64 * 2**20
"""Largest body, as Triton's own; what a prompt may have the service knows."""
_TRY_AGAIN_SECONDS = "1"
_CLIENT_GONE = 499
_SERVER_FAULT = 500
_UNAVAILABLE = 503


def application(service: TextService, metrics: Metrics) -> Starlette:
    """Build the ASGI application.

    Args:
        service: What answers.
        metrics: Where refused requests are counted; the service counts all else.
    """
    api = _Api(service, metrics)
    return Starlette(
        routes=[
            Route("/v1/models", api.models),
            Route("/v1/models/{name:path}", api.model),
            Route("/v1/chat/completions", api.chat, methods=["POST"]),
            Route("/v1/completions", api.complete, methods=["POST"]),
        ],
        exception_handlers={
            RequestError: api.refuse,
            HTTPException: _http_error,
            Exception: _fault,
        },
    )


class _Api:
    """Handlers of the paths."""

    def __init__(self, service: TextService, metrics: Metrics) -> None:
        self._service = service
        self._metrics = metrics
        self._name = service.bundle.name
        self._began = int(time.time())

    async def models(self, _request: Request) -> Response:
        return JSONResponse(replies.models(self._name, self._began))

    async def model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return JSONResponse(replies.model(self._name, self._began))

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, "chat")

    async def complete(self, request: Request) -> Response:
        return await self._answer(request, "completion")

    async def refuse(self, _request: Request, problem: Exception) -> Response:
        if not isinstance(problem, RequestError):
            raise problem
        self._metrics.add(names.REJECTED)
        status, document = replies.error_of(problem)
        headers = {"Retry-After": _TRY_AGAIN_SECONDS} if status == _UNAVAILABLE else None
        return JSONResponse(document, status, headers)

    async def _answer(self, request: Request, kind: Kind) -> Response:
        asked = requests.read(await _body(request), kind)
        self._check_model(asked.model)
        sink = EventSink()
        # Tokenising a long prompt takes a while, and other streams go on meanwhile.
        await asyncio.to_thread(self._service.submit, asked.text, sink)
        reply = replies.Reply(
            kind=kind,
            model=asked.model,
            token_text=self._service.token_text,
            is_scored=asked.text.likeliest is not None,
        )
        if asked.stream:
            return _Stream(_events(asked, reply, sink), sink)
        async with _leaving(request, sink):
            return await _whole(reply, sink)

    def _check_model(self, name: str) -> None:
        if name != self._name:
            raise _ModelMissing(f"There is no model {name!r} here. Allowed: {self._name}")


class _ModelMissing(HTTPException):
    def __init__(self, message: str) -> None:
        super().__init__(404, message)


class _Stream(StreamingResponse):
    """A stream of events; at its end the scheduler learns that the client has gone."""

    def __init__(self, events: AsyncIterator[bytes], sink: EventSink) -> None:
        # Proxies keep nothing back.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._sink = sink

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._sink.leave()


@contextlib.asynccontextmanager
async def _leaving(request: Request, sink: EventSink) -> AsyncIterator[None]:
    """Watch the connection: its end cancels the request."""
    watch = asyncio.create_task(_watch(request, sink))
    try:
        yield
    finally:
        watch.cancel()
        sink.leave()


async def _watch(request: Request, sink: EventSink) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    sink.leave()


async def _whole(reply: replies.Reply, sink: EventSink) -> Response:
    pieces = []
    async for event in sink:
        if isinstance(event, Piece):
            pieces.append(event)
        elif isinstance(event, Failure):
            return _answer_failure(event, is_gone=sink.is_cancelled())
        else:
            return JSONResponse(reply.whole(pieces, event))
    raise RuntimeError("a request has an end")


def _answer_failure(failure: Failure, *, is_gone: bool) -> Response:
    if is_gone:  # nobody reads it
        return Response(status_code=_CLIENT_GONE)
    status = _UNAVAILABLE if failure.problem == SHUTTING_DOWN else _SERVER_FAULT
    return JSONResponse(replies.error(failure.problem, kind="server_error"), status)


async def _events(asked: Asked, reply: replies.Reply, sink: EventSink) -> AsyncIterator[bytes]:
    first = reply.begin()
    if first is not None:
        yield replies.event(first)
    async for event in sink:
        if isinstance(event, Piece):
            yield replies.event(reply.piece(event))
        elif isinstance(event, Failure):
            yield replies.event(replies.error(event.problem, kind="server_error"))
            return
        else:
            yield replies.event(reply.end(event))
            if asked.include_usage:
                yield replies.event(reply.counts(event))
    yield replies.END


async def _body(request: Request) -> bytes:
    """Read the body, up to the allowed length."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > _MOST_BYTES:
            raise HTTPException(413, f"The body has more than {_MOST_BYTES} bytes.")
        parts.append(part)
    return b"".join(parts)


async def _http_error(request: Request, problem: Exception) -> Response:
    if not isinstance(problem, HTTPException):
        raise problem
    message, code = problem.detail, None
    if isinstance(problem, _ModelMissing):
        code = "model_not_found"
    elif problem.status_code in {404, 405}:
        message = f"There is no {request.method} {request.url.path} here."
    document: dict[str, object] = replies.error(message, code=code)
    return JSONResponse(document, problem.status_code, problem.headers)


async def _fault(_request: Request, _problem: Exception) -> Response:
    """Answer an internal error; Starlette raises it again for the log."""
    message = "the server failed on this request; its log says why"
    return JSONResponse(replies.error(message, kind="server_error"), _SERVER_FAULT)
