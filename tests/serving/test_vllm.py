"""`flextron serve` as its clients see it; `make hosts` runs this where vLLM is installed.

FLEXTRON_REFERENCE is the Python that builds the checkpoint and runs `generate`, which wants a newer transformers.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM")

SLOW = 900  # seconds for a server to come up: a busy machine with two cores takes minutes to import vLLM
OPTIONS = "--max-model-len 256 --max-num-seqs 32 --max-num-batched-tokens 512 --served-model-name tiny"
SMALLEST = 0.571  # of the full latency, by the tables of `checkpoint.build`
BUDGETS = (None, 1.0, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)
TOKENS = 16
TESTS = Path(__file__).resolve().parents[1]


def reference(command: str, directory: Path, stdin: str = "") -> str:
    """What serving/checkpoint.py prints in the environment of flextron itself."""
    root = TESTS.parent
    env = os.environ | {"PYTHONPATH": ":".join(map(str, (root, root / "python", TESTS)))}
    program = [os.environ.get("FLEXTRON_REFERENCE", sys.executable), TESTS / "serving" / "checkpoint.py"]
    done = subprocess.run(
        [*program, command, directory], input=stdin, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def expected(server: Server, requests: list[tuple[list[int], float | None, int]]) -> list[list[int]]:
    """The tokens of `generate` for prompts, budgets and numbers of new tokens."""
    whole = [(ids, budget or 1.0, new) for ids, budget, new in requests]
    return json.loads(reference("tokens", server.directory, json.dumps(whole)))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    """A running `flextron serve`."""

    def __init__(self, directory: Path, log: Path, *options: str) -> None:
        self.directory, self.log, port = directory, log, free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "flextron", "serve", str(directory), "--port", str(port), *options]
        env = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
        with log.open("w") as out:
            self.process = subprocess.Popen(
                [*command, "--vllm", *OPTIONS.split()],
                stdout=out,
                stderr=out,
                env=env,
                start_new_session=True,
            )
        end = time.monotonic() + SLOW
        while not self.is_healthy():
            assert self.process.poll() is None and time.monotonic() < end, log.read_text()[-4000:]
            time.sleep(1)

    def is_healthy(self) -> bool:
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(f"{self.url}/health", timeout=60).status == 200
        return False

    def get(self, path: str) -> str:
        return urllib.request.urlopen(self.url + path, timeout=60).read().decode()

    def metric(self, name: str) -> float:
        return sum(float(v) for v in re.findall(rf"^{name}{{.*}} (\S+)$", self.get("/metrics"), re.MULTILINE))

    def memory(self) -> int:
        """Bytes that its processes hold in memory, as the kernel counts them."""
        pages = 0
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.getsid(int(folder.name)) == self.process.pid:
                    pages += int((folder / "statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    reference("build", folder / "elastic")
    found = Server(folder / "elastic", folder / "log")
    yield found
    found.close()


@pytest.fixture(scope="module")
def client(server):
    from openai import OpenAI

    return OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=600, max_retries=0)


def prompt(draw: random.Random) -> list[int]:
    return [draw.randrange(2, 258) for _ in range(draw.randrange(1, 60))]


def asked(budget: float | None, i: int) -> dict:
    """The extra fields of a request, its budget in one of two places."""
    own = {} if budget is None else {"budget": budget} if i % 2 else {"vllm_xargs": {"budget": budget}}
    return {"ignore_eos": True, "return_token_ids": True, **own}


def complete(client, ids: list[int], extra: dict, tokens: int = TOKENS) -> list[int]:
    answer = client.completions.create(
        model="tiny", prompt=ids, max_tokens=tokens, temperature=0, extra_body=extra
    )
    return answer.choices[0].token_ids


def test_200_requests_at_mixed_budgets_get_the_tokens_of_generate(server, client):
    draw = random.Random(0)
    requests = [(prompt(draw), draw.choice(BUDGETS)) for _ in range(200)]
    with ThreadPoolExecutor(32) as pool:
        got = list(pool.map(lambda i: complete(client, requests[i][0], asked(requests[i][1], i)), range(200)))
    assert got == expected(server, [(*request, TOKENS) for request in requests])
    assert (
        len({tuple(complete(client, requests[0][0], asked(b, 1))) for b in BUDGETS}) > 3
    )  # budgets do differ


def test_a_server_says_what_it_offers(server, client):
    (model,) = client.models.list().data
    assert model.id == "tiny" and model.budgets[-1]["budget"] == 1 and len(model.budgets) > 4
    assert server.metric("vllm:num_requests_running") == 0
    for extra, said in (
        ({"budget": 3}, r"budget must be in \(0, 1\], got 3"),
        ({"budget": 0.1}, "fraction must be at least"),
        ({"budget": 0.9, "latency_ms": 3}, "at most one of"),
        ({"vllm_xargs": {"budget": "half"}}, "budget must be a number, got 'half'"),
    ):
        from openai import BadRequestError

        with pytest.raises(BadRequestError, match=said):
            complete(client, [5], extra)


def test_answers_stream_to_any_client(server, client):
    with client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Once"}],
        max_tokens=8,
        stream=True,
        extra_body={"budget": 0.7, "ignore_eos": True},
    ) as parts:
        assert len([part for part in parts if part.choices]) >= 8
    body = {
        "model": "tiny",
        "prompt": "Once",
        "max_tokens": 5,
        "latency_ms": 6,
        "stream": True,
        "ignore_eos": True,
    }
    command = ["curl", "-sN", f"{server.url}/v1/completions", "-H", "Content-Type: application/json"]
    said = subprocess.run(
        [*command, "-d", json.dumps(body)], capture_output=True, text=True, timeout=300
    ).stdout
    lines = [line for line in said.splitlines() if line.startswith("data: ")]
    assert len(lines) >= 6 and lines[-1] == "data: [DONE]", said
    body = {"model": "tiny", "prompt": "Once", "max_tokens": 5, "deadline_ms": 20}
    said = subprocess.run(
        [*command, "-d", json.dumps(body)], capture_output=True, text=True, timeout=300
    ).stdout
    assert json.loads(said)["usage"]["completion_tokens"] == 5, said


def test_requests_with_deadlines_leave_the_others_as_they_are(server, client):
    """Their widths move from step to step, some from the first on; beside them are budgets that stay."""
    draw = random.Random(7)
    requests = [(prompt(draw), draw.choice(BUDGETS)) for _ in range(40)]
    deadlines = [draw.choice((1, 200, 2000, 60_000)) if i % 2 else None for i in range(40)]

    def one(i: int) -> list[int]:
        (ids, budget), deadline = requests[i], deadlines[i]
        extra = asked(budget, i)
        if deadline is not None:
            extra = {"ignore_eos": True, "return_token_ids": True, "deadline_ms": deadline}
        return complete(client, ids, extra)

    with ThreadPoolExecutor(32) as pool:
        got = list(pool.map(one, range(40)))
    assert all(len(tokens) == TOKENS for tokens in got)
    still = range(0, 40, 2)
    assert [got[i] for i in still] == expected(server, [(*requests[i], TOKENS) for i in still])
    late = complete(client, requests[0][0], {"ignore_eos": True, "return_token_ids": True, "deadline_ms": 1})
    assert late == expected(server, [(requests[0][0], SMALLEST, TOKENS)])[0]  # nothing is fast enough


KILLED = """
import sys
from openai import OpenAI

client = OpenAI(base_url=sys.argv[1] + "/v1", api_key="none")
extra = {"budget": 0.7, "ignore_eos": True}
parts = client.completions.create(model="tiny", prompt=[7] * 40, max_tokens=180, stream=True, extra_body=extra)
for part in parts:
    print("going", flush=True)
"""


def test_nothing_accepted_is_lost_where_clients_go_away(server, client):
    """100 requests at once: a third of the clients hang up while they read; and processes are killed meanwhile."""
    from openai import AsyncOpenAI

    async def one(i: int, going: AsyncOpenAI) -> list[int] | None:
        draw = random.Random(i)
        parts = await going.completions.create(
            model="tiny",
            prompt=prompt(draw),
            max_tokens=40,
            temperature=0,
            stream=True,
            extra_body=asked(draw.choice(BUDGETS), i),
        )
        found: list[int] = []
        async for part in parts:
            found += part.choices[0].token_ids or []
            if i % 3 == 0 and len(found) > 3:
                await parts.close()
                return None
        return found

    async def all_of_them() -> list[list[int] | None]:
        async with AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", timeout=900, max_retries=0
        ) as going:
            return await asyncio.gather(*(one(i, going) for i in range(100)))

    killed = [
        subprocess.Popen([sys.executable, "-c", KILLED, server.url], stdout=subprocess.PIPE) for _ in range(4)
    ]
    for process in killed:
        assert process.stdout is not None and process.stdout.readline() == b"going\n"
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(asyncio.run, all_of_them())
        for process in killed:
            process.kill()
            process.wait()
        got = running.result()
    stayed = [i for i in range(100) if i % 3]
    requests = []
    for i in stayed:
        draw = random.Random(i)
        requests.append((prompt(draw), draw.choice(BUDGETS), 40))
    assert [got[i] for i in stayed] == expected(server, requests)
    end = time.monotonic() + 60
    while server.metric("vllm:num_requests_running") + server.metric("vllm:num_requests_waiting"):
        assert time.monotonic() < end, "requests of clients that went away still run"
        time.sleep(0.5)
    assert server.metric("vllm:kv_cache_usage_perc") == 0


def test_memory_stays_flat_over_2000_requests(server, client):
    draw = random.Random(5)

    def some(count: int) -> None:
        requests = [(prompt(draw), asked(draw.choice(BUDGETS), i)) for i in range(count)]
        with ThreadPoolExecutor(32) as pool:
            found = list(pool.map(lambda r: complete(client, *r, 4), requests))
        assert all(len(tokens) == 4 for tokens in found)

    some(500)
    before = server.memory()
    held = []
    for _ in range(4):
        some(500)
        held.append(server.memory() / before - 1)
    print("growth after each 500 requests:", [f"{more:.2%}" for more in held])
    assert max(held) < 0.03, held


def test_a_server_of_one_budget_has_a_smaller_cache(server, tmp_path):
    """And caches prefixes, which requests of one budget share."""
    own = Server(server.directory, tmp_path / "log", "--budget", "0.65")
    try:
        from openai import BadRequestError, OpenAI

        client = OpenAI(base_url=f"{own.url}/v1", api_key="none", timeout=600, max_retries=0)
        draw, start = random.Random(9), prompt(random.Random(3)) * 3
        prompts = [start[: draw.randrange(1, len(start))] if i % 2 else prompt(draw) for i in range(12)]
        got = [complete(client, ids, asked(None if i % 3 else 0.65, i)) for i, ids in enumerate(prompts)]
        assert got == expected(server, [(ids, 0.65, TOKENS) for ids in prompts])
        with pytest.raises(BadRequestError, match=r"must be the server's own, budget 0\.65"):
            complete(client, [5], asked(0.9, 1))
        (only,) = client.models.list().data[0].budgets
        assert only["budget"] == 0.65
        sizes = [re.search(r"KV cache size: ([\d,]+) tokens", s.log.read_text()) for s in (own, server)]
        small, full = (int(size[1].replace(",", "")) for size in sizes if size)
        assert small > full
    finally:
        own.close()
