"""bench_model.py times what it says, of everyone who is there, and what it writes can be read."""

import csv
import importlib
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

FOLDER = Path(__file__).resolve().parents[1] / "python" / "benchmarks"


def loaded(name):
    """A script of the benchmarks as a module; those beside it are found while it is loaded."""
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture
def bench_model(monkeypatch):
    module = loaded("bench_model")
    shape = dict(
        vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    monkeypatch.setitem(module.MODELS, "smollm2", lambda _: LlamaConfig(**shape))
    monkeypatch.setattr(module, "read_bandwidth", lambda: 1e9)
    return module


def test_everyone_is_timed_at_every_width(bench_model, tmp_path):
    args = bench_model.parse(
        ["--prompt", "7", "--new", "3", "--rounds", "2", "--no-wait", "--csv", str(tmp_path / "rows.csv")]
    )
    rows = bench_model.measure(args)
    assert {(r.width, r.who) for r in rows} >= {
        (w, who) for w in bench_model.WIDTHS for who in ("flextron", "flextron, packed", "transformers")
    }
    assert all(r.prefill > 0 and r.decode > 0 and r.ideal_decode > 0 for r in rows)
    ideal = {r.width: r.ideal_decode for r in rows}
    assert ideal[0.25] > ideal[0.5] > ideal[0.75] > ideal[1.0]
    bench_model.show(rows)
    bench_model.write_csv(args.csv, rows)
    bench_model.write_csv(args.csv, rows)
    with args.csv.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * len(rows) and lines[0]["who"] == rows[0].who


def test_a_generation_is_clocked_token_by_token(bench_model):
    seen = []

    class Model:
        def generate(self, ids, stopping_criteria, max_new_tokens, **_):
            seen.append(max_new_tokens)
            for _ in range(max_new_tokens):
                stopping_criteria(ids, None)

    prompt, each = bench_model.generation(Model(), torch.ones(1, 4, dtype=torch.int64), 5)()
    assert seen == [6] and prompt >= 0 and each >= 0
