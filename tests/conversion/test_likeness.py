"""A family that is not in the table converts by the row of one that is built alike, if that is proven, and not else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from nn.models import small_model
from torch import Tensor
from transformers import AutoModelForCausalLM

import flextron
from flextron import cli
from flextron.checkpoint import read_json
from flextron.conversion import convert
from flextron.exporting import export
from flextron.nn.proof import logits_of

FEW = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, sliding_window=None)


def tokens(*shape: int) -> Tensor:
    return torch.randint(3, 61, shape, generator=torch.Generator().manual_seed(0))


def other(model_type: str, **settings: Any) -> Any:
    """A small random model of a family that is not in the table."""
    return small_model(model_type, **(FEW | settings), listed=False)


@pytest.mark.parametrize(("model_type", "like"), [("seed_oss", "llama"), ("jais2", "arcee")])
def test_a_family_that_is_built_like_another_converts(
    tmp_path: Path, model_type: str, like: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint, and what is exported from it, remember whose layers they have."""
    parent, ids = other(model_type), tokens(1, 12)
    report = convert(parent, tmp_path / "elastic", calibration=tokens(4, 24), like=like)
    assert len(report["parity"]["sub_networks"]) == 3
    assert read_json(tmp_path / "elastic" / "flextron.json")["elastic"]["like"] == like
    assert cli.main(["info", str(tmp_path / "elastic"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["family"], said["like"]) == (model_type, like)
    model = flextron.from_pretrained(tmp_path / "elastic")
    torch.testing.assert_close(logits_of(model, ids), logits_of(parent, ids), rtol=1e-4, atol=1e-4)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "elastic")
    assert type(stock) is type(parent)
    for layout in ("uniform", "ragged"):
        found = export(model, tmp_path / layout, model.elastic.smallest(), layout=layout)
        plain = flextron.load_plain(tmp_path / layout)
        assert found["layout"] == layout and sum(p.numel() for p in plain.parameters()) == found["params"]
    again = convert(tmp_path / "uniform", tmp_path / "again", calibration=tokens(4, 24))
    assert again["parity"]["max_rel"] < 1e-4


@pytest.mark.parametrize(
    ("model_type", "settings", "like", "words"),
    [
        ("bloom", dict(hidden_size=64, n_head=4), "llama", "it has no model, model.layers, model.norm"),
        ("mamba", {}, "llama", "it has no model, model.layers, model.norm"),
        ("jais2", {}, "llama", r"it has no model.layers.0.mlp.gate_proj; nothing"),
        ("hyperclovax", {}, "llama", "not understood: model.layers.0.post_norm1.weight"),
        ("olmo_hybrid", {}, "olmo2", "layer_types are not understood: linear_attention"),
        ("gpt_bigcode", dict(hidden_size=64), "gpt2", r"other shapes .* transformer.h.0.attn.c_attn.weight"),
        ("seed_oss", {}, "cohere", "this fails: .*use_qk_norm"),
        (
            "ernie4_5",
            {},
            "llama",
            "this fails: logits must stay within 0.0001 of the parent's at its last positions, got 0",
        ),
        ("seed_oss", dict(sliding_window=200), "llama", "last positions, with a window of 6, got 1"),
        ("seed_oss", dict(attention_chunk_size=200), "llama", "attention_chunk_size is not understood"),
        ("seed_oss", {}, "bloom", "like must be one of llama, .*, got 'bloom'"),
        ("qwen2", {}, "llama", "like must be None for a qwen2"),
    ],
)
def test_what_is_built_otherwise_is_told_and_nothing_written(
    tmp_path: Path, model_type: str, settings: dict[str, Any], like: str, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        convert(other(model_type, **settings), tmp_path / "out", calibration=tokens(4, 24), like=like)
    assert not (tmp_path / "out").exists()


def test_what_begins_at_late_positions_is_found(tmp_path: Path) -> None:
    """Whose queries grow with the position, from one on that no proof of the first tokens has."""
    rope = dict(
        rope_type="default",
        rope_theta=1e4,
        original_max_position_embeddings=64,
        llama_4_scaling_beta=0.5,
        max_position_embeddings=64,
    )
    parent = other("ministral3", rope_parameters=rope)
    with pytest.raises(ValueError, match="last positions"):
        convert(parent, tmp_path / "out", calibration=tokens(4, 24), like="mistral")
