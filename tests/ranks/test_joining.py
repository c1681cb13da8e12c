"""Several processes join, agree, share and average; what goes wrong is one sentence."""

import json
import re
import socket

import pytest
import torch
from processes import free_port

from flextron import ranks

EXCHANGE = """
import json, torch
from flextron import ranks

with ranks.joined("train") as me:
    found = {"now": me[:3], "device": str(me.device), "part": [ranks.part(7).start, ranks.part(7).stop]}
    found["shared"] = ranks.shared({"seed": 0.1, "name": "é"} if ranks.is_first() else None)
    found["tensor"] = ranks.shared(torch.full((2,), float(me.rank + 3))).tolist()
    found["mean"] = ranks.mean(torch.tensor([1.0, me.rank]), weight=me.rank).tolist()
    with ranks.joined("again") as same:
        found["again"] = same is me
    ranks.agree("train", {"steps": 3, "data": "a" * (me.rank == me.rank)})
    try:
        ranks.agree("train", {"steps": 3, "length": 7 + (me.rank == 2)})
    except ValueError as error:
        found["error"] = str(error)
found["after"] = ranks.now() is ranks.ALONE
print(json.dumps(found))
"""


def test_three_processes_agree_share_and_average(processes):
    found = [json.loads(e.out) for e in processes.run(3, ["-c", EXCHANGE])]
    assert [f["now"] for f in found] == [[0, 3, 0], [1, 3, 1], [2, 3, 2]]
    assert [f["part"] for f in found] == [[0, 2], [2, 4], [4, 7]]
    for f in found:
        assert f["device"] == "cpu" and f["again"] and f["after"]
        assert f["shared"] == {"seed": 0.1, "name": "é"} and f["tensor"] == [3.0, 3.0]
        assert f["mean"] == pytest.approx([1.0, 5 / 3])
        assert (
            f["error"] == "train: length must be the same on all 3 processes, got 7 on rank 0 and 8 on rank 2"
        )


def test_a_process_that_torchrun_did_not_start_is_alone():
    with ranks.joined("train") as me:
        assert me is ranks.ALONE and ranks.is_first() and ranks.part(5) == slice(0, 5)
        x = torch.ones(2)
        assert ranks.mean(x, 3.0) is x and ranks.shared(x) is x
        ranks.agree("train", {"steps": 3})


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"LOCAL_RANK": ""}, "torchrun must set RANK, .* got no LOCAL_RANK"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a whole number of at least 0, got two"),
        ({"RANK": "2"}, r"RANK must be below WORLD_SIZE \(2\), got 2"),
        (
            {"FLEXTRON_RANKS_TIMEOUT": "soon"},
            "FLEXTRON_RANKS_TIMEOUT must be a number of seconds, got soon",
        ),
    ],
)
def test_what_cannot_join_is_one_sentence(monkeypatch, environment, sentence):
    given = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    for name, value in {**given, **environment}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ValueError, match=f"^train: {sentence}"), ranks.joined("train"):
        pass


DEVICES = """
import os, sys
import torch
from flextron import ranks

torch.distributed.is_nccl_available = lambda: False

def choose():
    if os.environ["RANK"] == "1" and sys.argv[2] == "none":
        raise ValueError("train: device must be there")
    return torch.device(sys.argv[3])

try:
    with ranks.joined("train", choose):
        pass
except ValueError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
"""


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (("none", "cpu"), "device must be there"),
        (("some", "cuda:0"), "torch must have NCCL for GPUs in several processes"),
    ],
)
def test_every_process_must_have_a_device(processes, given, sentence):
    ended = processes.run(2, ["-c", DEVICES, *given])
    assert [e.rc for e in ended] == [2, 2]
    said = "".join(e.err for e in ended)
    assert re.fullmatch(f"train: {sentence}.*\n", said)


def test_a_busy_port_and_a_master_that_is_not_there_are_one_sentence(monkeypatch):
    def refused(rank, port, sentence):
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(ranks.LostError, match=f"^train: {sentence}"), ranks.joined("train"):
            pass

    for name, value in {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "FLEXTRON_RANKS_TIMEOUT": 1}.items():
        monkeypatch.setenv(name, str(value))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused(0, port, f"port {port} must be free")
    port = free_port()
    refused(1, port, f"all 2 processes must reach 127.0.0.1:{port} within 1 s")
    assert not torch.distributed.is_initialized()
