"""OpenAI's chat completions over a module of linattn: a sample of what `TextGenerator` is for, not a product.

    pip install tokenizers jinja2 starlette uvicorn
    python samples/serve.py model.vmfb --port 8000

`POST /v1/chat/completions` (streamed or not) and `GET /v1/models`. Conversations run side by side on one program, each
with states of its own; what their prompts begin with in common is read once. A client that goes away ends its answer
with the token under way. Errors are OpenAI's JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import uvicorn
from linattn import LinattnError, Program, Sampling, TextGenerator
from linattn.runtime import InputError, TextStream
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

_MOST_BYTES = 4 << 20
_NUMBERS = ("temperature", "top_p", "seed", "max_tokens", "max_completion_tokens")


class ApiError(Exception):
    """What a client is told, as OpenAI's JSON."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Server:
    """Conversations on one program.

    Args:
        program: A model with a tokenizer and a chat template.
        name: What clients call it.
        parallel: How many answers are generated at a time; more wait for their turn.
        keep: Snapshots of what was read and answered, to go on from.
    """

    def __init__(self, program: Program, name: str, parallel: int, keep: int = 64) -> None:
        self.name = name
        self.limit = program.manifest.token_limit
        first = TextGenerator(program, keep=keep)
        if not first.can_chat:
            raise InputError("the model has no chat template", where=name)
        self.free: asyncio.Queue[TextGenerator] = asyncio.Queue()
        self.slots = [first, *(first.fork() for _ in range(parallel - 1))]
        for slot in self.slots:
            self.free.put_nowait(slot)

    def app(self) -> Starlette:
        """The routes."""
        routes = [
            Route("/v1/chat/completions", self.complete, methods=["POST"]),
            Route("/v1/models", self.models, methods=["GET"]),
        ]
        return Starlette(routes=routes, exception_handlers={ApiError: _told, LinattnError: _told, 404: _no_route})

    async def models(self, request: Request) -> Response:
        """The one model there is."""
        model = {"id": self.name, "object": "model", "created": 0, "owned_by": "linattn"}
        return JSONResponse({"object": "list", "data": [model]})

    async def complete(self, request: Request) -> Response:
        """An answer to a conversation."""
        asked = await _read(request)
        if asked.get("model") != self.name:
            raise ApiError(404, f"no such model: {asked.get('model')}", param="model", code="model_not_found")
        if asked.get("stream"):
            pieces = self._events(asked)
            first = await anext(pieces)  # what is refused is refused with its own status

            async def rest() -> AsyncIterator[str]:
                async with _closing(pieces):
                    yield first
                    async for event in pieces:
                        yield event

            return StreamingResponse(rest(), media_type="text/event-stream")
        text = list[str]()
        async with self._answer(asked) as stream:
            while (piece := await run_in_threadpool(next, stream, None)) is not None:
                text.append(piece)
                if await request.is_disconnected():
                    return Response(status_code=499)
        message = {"role": "assistant", "content": "".join(text)}
        choice = {"index": 0, "message": message, "finish_reason": stream.finish_reason, "logprobs": None}
        return JSONResponse({**self._head("chat.completion"), "choices": [choice], "usage": _usage(stream)})

    async def _events(self, asked: dict[str, Any]) -> AsyncIterator[str]:
        head = self._head("chat.completion.chunk")

        def event(delta: dict[str, str], reason: str | None = None) -> str:
            choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
            return f"data: {json.dumps({**head, 'choices': [choice]})}\n\n"

        async with self._answer(asked) as stream:
            yield event({"role": "assistant", "content": ""})
            try:
                while (piece := await run_in_threadpool(next, stream, None)) is not None:
                    yield event({"content": piece})
            except LinattnError as error:
                yield f"data: {json.dumps(ApiError(500, str(error)).body)}\n\n"
                return
            yield event({}, stream.finish_reason)
            if (asked.get("stream_options") or {}).get("include_usage"):
                yield f"data: {json.dumps({**head, 'choices': [], 'usage': _usage(stream)})}\n\n"
        yield "data: [DONE]\n\n"

    @asynccontextmanager
    async def _answer(self, asked: dict[str, Any]) -> AsyncIterator[TextStream]:
        """A generator's answer, which ends when the block does; the generator is free again then."""
        messages, options = _messages(asked), _options(asked)
        slot = await self.free.get()
        try:
            stream = slot.chat(messages, sampling=_sampling(asked, slot.sampling), **options)
            if self.limit is not None and stream.prompt_tokens > self.limit:
                message = f"{stream.prompt_tokens} tokens in the messages, the context has {self.limit}"
                raise ApiError(400, message, param="messages", code="context_length_exceeded")
            try:
                yield stream
            finally:
                stream.close()
        finally:
            self.free.put_nowait(slot)

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": self.name}


@asynccontextmanager
async def _closing(pieces: AsyncIterator[str]) -> AsyncIterator[None]:
    try:
        yield
    finally:
        await pieces.aclose()  # type: ignore[attr-defined]


async def _read(request: Request) -> dict[str, Any]:
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > _MOST_BYTES:
            raise ApiError(413, f"more than {_MOST_BYTES} bytes")
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"not JSON: {error}") from error
    if not isinstance(asked, dict):
        raise ApiError(400, "not a JSON object")
    if asked.get("n") not in (None, 1):
        raise ApiError(400, "one answer at a time", param="n")
    for key in _NUMBERS:
        value = asked.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float, type(None))):
            raise ApiError(400, f"not a number: {key}", param=key)
    return asked


def _messages(asked: dict[str, Any]) -> list[dict[str, Any]]:
    """The conversation, with contents as plain text."""
    found = asked.get("messages")
    if not isinstance(found, list) or not found or not all(isinstance(message, dict) for message in found):
        raise ApiError(400, "messages is a list of at least one", param="messages")
    messages = list[dict[str, Any]]()
    for message in found:
        content = message.get("content")
        if isinstance(content, list):
            if any(not isinstance(part, dict) or part.get("type") != "text" for part in content):
                raise ApiError(400, "only text is understood", param="messages")
            content = "".join(str(part.get("text", "")) for part in content)
        if not isinstance(content, str) or not isinstance(message.get("role"), str):
            raise ApiError(400, "a message has a role and text", param="messages")
        messages.append({**message, "content": content})
    return messages


def _options(asked: dict[str, Any]) -> dict[str, Any]:
    stop = asked.get("stop") or ()
    stop = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stop, (list, tuple)) or not all(isinstance(text, str) and text for text in stop):
        raise ApiError(400, "stop is a text or a list of texts", param="stop")
    most = asked.get("max_completion_tokens") or asked.get("max_tokens")
    return {"stop": tuple(stop)} | ({} if most is None else {"max_tokens": int(most)})


def _sampling(asked: dict[str, Any], own: Sampling) -> Sampling:
    """How tokens are drawn: the model's own settings where the client does not say."""
    given = {key: asked[key] for key in ("temperature", "top_p", "seed") if asked.get(key) is not None}
    if "seed" in given:
        given["seed"] = int(given["seed"]) % (1 << 64)
    settings = {key: getattr(own, key) for key in ("temperature", "top_k", "top_p", "min_p", "repeat_penalty", "seed")}
    return Sampling(**{**settings, **given})


def _usage(stream: TextStream) -> dict[str, Any]:
    prompt, answer = stream.prompt_tokens, len(stream.ids)
    details = {"cached_tokens": stream.reused_tokens}
    total = {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
    return {**total, "prompt_tokens_details": details}


async def _told(request: Request, error: Exception) -> Response:
    if not isinstance(error, ApiError):
        error = ApiError(400 if isinstance(error, InputError) else 500, str(error))
    return JSONResponse(error.body, status_code=error.status)


async def _no_route(request: Request, error: Exception) -> Response:
    return JSONResponse(ApiError(404, f"no such address: {request.url.path}").body, status_code=404)


def main() -> None:
    """Loads the model and serves it until Ctrl-C."""
    parser = argparse.ArgumentParser(description="OpenAI's chat completions over a module of linattn")
    parser.add_argument("module", type=Path, help="a .vmfb or a bundle, with a tokenizer and a chat template")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--name", help="what clients call the model (default: the file's name)")
    parser.add_argument("--parallel", type=int, default=4, help="answers at a time; more wait (default 4)")
    parser.add_argument("--keep", type=int, default=64, help="snapshots of conversations to go on from (default 64)")
    options = parser.parse_args()
    with Program.load(options.module) as program:
        server = Server(program, options.name or options.module.stem, options.parallel, options.keep)
        uvicorn.run(server.app(), host=options.host, port=options.port)


if __name__ == "__main__":
    main()
