"""What `flextron serve` adds to vLLM's server: budgets as plain fields of a request, and in the list of models.

ASGI and JSON alone: vLLM puts the class around its application by ``--middleware``.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from flextron.serving.budgets import FIELDS
from flextron.serving.pace import clock

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

GENERATING = ("/v1/completions", "/v1/chat/completions", "/v1/responses")
MODELS = "/v1/models"
XARGS = "vllm_xargs"  # where vLLM takes what its own fields do not say
ARRIVED = "flextron_arrived"  # there, of a request with a deadline: seconds of `flextron.serving.pace.clock`


class Budgets:
    """Moves `FIELDS` of a request's body to where vLLM hands them on, and adds the budgets to the list of models.

    Args:
        app: vLLM's application.
        listed: gives the budgets to list; by default those of this process's server.
    """

    def __init__(self, app: App, listed: Callable[[], list[dict[str, float]]] | None = None) -> None:
        self.app, self.listed = app, listed or _listed

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        path, method = scope.get("path"), scope.get("method")
        if scope["type"] == "http" and method == "POST" and path in GENERATING:
            await self._moved(scope, receive, send)
        elif scope["type"] == "http" and method == "GET" and path == MODELS:
            await self._completed(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _moved(self, scope: Message, receive: Receive, send: Send) -> None:
        body, last = await _read(receive)
        if last is not None:  # the client went away, which the application is to see

            async def gone() -> Message:
                return last

            return await self.app(scope, gone, send)
        body = moved(body)
        sent = False

        async def given() -> Message:
            nonlocal sent
            if sent:
                return await receive()  # that the client went away
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(_of_length(scope, len(body)), given, send)

    async def _completed(self, scope: Message, receive: Receive, send: Send) -> None:
        start: Message = {}
        parts: list[bytes] = []

        async def held(message: Message) -> None:
            if message["type"] == "http.response.start":
                start.update(message)
                return
            parts.append(message.get("body", b""))
            if not message.get("more_body"):
                body = b"".join(parts)
                if start["status"] == 200:
                    body = completed(body, self.listed())
                await send(_of_length(start, len(body)))
                await send({"type": "http.response.body", "body": body})

        await self.app(scope, receive, held)


def moved(body: bytes) -> bytes:
    """A request's body with its budget where vLLM hands it on; as it was where it has none, or is no JSON object.

    A deadline counts from now on: its request may have to wait until it joins the batch.
    """
    try:
        request = json.loads(body)
    except ValueError:
        return body
    if not isinstance(request, dict) or not any(name in request for name in FIELDS):
        return body
    given = {name: request.pop(name) for name in FIELDS if name in request}
    others = request.get(XARGS)
    if others is not None and not isinstance(others, dict):
        return body  # which vLLM refuses
    request[XARGS] = {**(others or {}), **{name: value for name, value in given.items() if value is not None}}
    if "deadline_ms" in request[XARGS]:
        request[XARGS][ARRIVED] = clock()
    return json.dumps(request).encode()


def completed(body: bytes, budgets: list[dict[str, float]]) -> bytes:
    """The list of models with the budgets of each."""
    models = json.loads(body)
    for model in models.get("data", []):
        model["budgets"] = budgets
    return json.dumps(models).encode()


async def _read(receive: Receive) -> tuple[bytes, Message | None]:
    """A request's body; or the message that came in its place."""
    parts = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return b"", message
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts), None


def _of_length(message: Message, length: int) -> Message:
    """A scope or a start of a response whose body has another length."""
    others = [(name, value) for name, value in message["headers"] if name.lower() != b"content-length"]
    return {**message, "headers": [*others, (b"content-length", str(length).encode())]}


def _listed() -> list[dict[str, float]]:
    from flextron.serving.served import offer

    return offer().listed()
