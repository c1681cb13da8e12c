"""Budgets are plain fields of a request and of the list of models, and nothing else of a server changes."""

from __future__ import annotations

import asyncio
import json

import pytest

from flextron.serving.middleware import ARRIVED, Budgets, completed, moved
from flextron.serving.pace import clock


def called(app, method="POST", path="/v1/completions", body=b"{}", parts=1, gone=False):
    """What an application sends to a client, and what it got."""
    size = -(-len(body) // parts)
    pieces = [body[i : i + size] for i in range(0, len(body), size)]
    coming = [
        {"type": "http.request", "body": piece, "more_body": i + 1 < len(pieces) or gone}
        for i, piece in enumerate(pieces)
    ] + [{"type": "http.disconnect"}]
    sent: list[dict] = []

    async def receive():
        return coming.pop(0)

    async def send(message):
        sent.append(message)

    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    scope = {"type": "http", "method": method, "path": path, "headers": headers}
    asyncio.run(Budgets(app, lambda: [{"budget": 0.5}])(scope, receive, send))
    return sent


def echo(seen: list):
    async def app(scope, receive, send):
        seen.extend([scope, await receive(), await receive()])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"data: 1\n", "more_body": True})
        await send({"type": "http.response.body", "body": b"data: 2\n"})

    return app


def test_a_budget_moves_to_where_the_host_hands_it_on():
    seen: list = []
    body = json.dumps({"model": "m", "budget": 0.6, "vllm_xargs": {"session_id": "a"}}).encode()
    sent = called(echo(seen), body=body, parts=3)
    scope, given, after = seen
    assert json.loads(given["body"]) == {"model": "m", "vllm_xargs": {"session_id": "a", "budget": 0.6}}
    assert not given["more_body"] and after["type"] == "http.disconnect"
    assert dict(scope["headers"])[b"content-length"] == str(len(given["body"])).encode()
    assert dict(scope["headers"])[b"content-type"] == b"application/json"
    assert [m.get("body") for m in sent] == [None, b"data: 1\n", b"data: 2\n"]  # as it comes: a stream


def test_a_deadline_counts_from_its_arrival():
    before = clock()
    given = json.loads(moved(b'{"deadline_ms": 500}'))["vllm_xargs"]
    assert given.pop(ARRIVED) == pytest.approx(before, abs=60) and given == {"deadline_ms": 500}


def test_what_has_no_budget_stays_as_it_was():
    for body in (b"not json", b"[1]", b'{"model": "m"}', b'{"budget": 1, "vllm_xargs": 3}'):
        assert moved(body) == body
    assert json.loads(moved(b'{"budget": null}')) == {"vllm_xargs": {}}
    seen: list = []
    called(echo(seen), path="/tokenize", body=b'{"budget": 1}')
    assert seen[1]["body"] == b'{"budget": 1}'


def test_a_client_that_goes_while_it_sends_is_the_applications_matter():
    seen: list = []
    called(echo(seen), body=b'{"budget": 0.5', gone=True)
    assert [m["type"] for m in seen[1:]] == ["http.disconnect"] * 2


def test_models_say_their_budgets():
    models = {"object": "list", "data": [{"id": "m"}, {"id": "n"}]}

    def answering(status):
        async def app(scope, receive, send):
            body = json.dumps(models).encode()
            headers = [(b"content-length", str(len(body)).encode()), (b"x-request-id", b"7")]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": body[:9], "more_body": True})
            await send({"type": "http.response.body", "body": body[9:]})

        return app

    start, body = called(answering(200), "GET", "/v1/models")
    assert json.loads(body["body"])["data"] == [{"id": i, "budgets": [{"budget": 0.5}]} for i in "mn"]
    headers = dict(start["headers"])
    assert headers[b"content-length"] == str(len(body["body"])).encode() and headers[b"x-request-id"] == b"7"
    _, body = called(answering(401), "GET", "/v1/models")
    assert json.loads(body["body"]) == models
    assert completed(b"{}", []) == b"{}"
