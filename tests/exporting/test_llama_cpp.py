"""llama.cpp runs what `export_gguf` writes, with our logits; each trap of its architectures is a case."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from nn.models import small_model
from torch import Tensor

from flextron.config import Widths
from flextron.exporting import export_gguf
from flextron.exporting import gguf as writing
from flextron.nn import elastic_config, make_elastic

pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: `make hosts` installs it and runs this")
sys.path.append(str(Path(__file__).resolve().parents[2] / "python" / "benchmarks"))
from llama_cpp_rival import LlamaCpp

MLP, HEADS = (0, 7, 20, 30, 40), (0, 1, 2, 3, 4)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
# what each family brings, and the architecture of layers that are alike and of those that are not
PARENTS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "llama": ("llama", dict(tie_word_embeddings=False), "llama", "deci"),
    "llama, tied": ("llama", {}, "llama", "deci"),
    "llama 3": ("llama", dict(rope_parameters=LLAMA3), "llama", "deci"),
    "llama, positions stretched": ("llama", dict(rope_parameters=LINEAR), "llama", "deci"),
    "llama, biases": ("llama", dict(attention_bias=True, mlp_bias=True), "llama", "deci"),
    "mistral": ("mistral", dict(tie_word_embeddings=False), "llama", "deci"),
    "qwen2": ("qwen2", dict(hidden_size=128), "qwen2", "deci"),
    "qwen2, untied": ("qwen2", dict(tie_word_embeddings=False), "deci", "deci"),
    "qwen3": ("qwen3", {}, "qwen3", "openelm"),
    "qwen3, untied": ("qwen3", dict(tie_word_embeddings=False), "qwen3", "qwen3"),
}
WIDTHS = {
    "full": ((40, 40, 40), (4, 4, 4)),
    "uniform": ((20, 20, 20), (2, 2, 2)),
    "ragged": ((20, 40, 30), (2, 1, 4)),
    "odd": ((7, 20, 30), (3, 1, 4)),
    "no heads behind the first layer": ((20, 30, 7), (2, 0, 4)),
    "no heads in the first layer": ((20, 30, 7), (0, 2, 4)),
    "heads without an MLP": ((20, 0, 7), (2, 3, 4)),
    "a layer left out": ((20, 0, 7), (2, 0, 4)),
    "the last layer left out": ((20, 7, 0), (2, 1, 0)),
    "the first layer left out": ((0, 20, 7), (0, 2, 1)),
    "all layers but one left out": ((0, 20, 0), (0, 2, 0)),
    "layers left out, the rest alike": ((20, 0, 20), (2, 0, 2)),
    "no heads at all": ((20, 20, 20), (0, 0, 0)),
    "no MLP at all": ((0, 0, 0), (2, 2, 2)),
    "nothing but embeddings": ((0, 0, 0), (0, 0, 0)),
}
ALIKE = {"full", "uniform"} | {name for name in WIDTHS if "alike" in name or " all" in name or "but" in name}


def elastic(family: str, unit: str = "kv_group", mlp: Any = MLP, heads: Any = HEADS, **overrides: Any) -> Any:
    gqa = "4:1" if unit == "query" else "2:1"
    model = small_model(family, gqa, **overrides)
    return make_elastic(model, elastic_config(model, unit, mlp, heads))


def tokens(T: int = 12) -> Tensor:
    return torch.randint(1, 61, (T,), generator=torch.Generator().manual_seed(1))


def theirs(path: Path, exact: bool = True) -> Tensor:
    """[T, V]: llama.cpp's logits, token by token behind each other."""
    host = LlamaCpp(path, 1, 64, exact)
    found = [torch.from_numpy(host.step([token]).copy()) for token in tokens().tolist()]
    host.close()
    return torch.stack(found)


@torch.no_grad()
def apart(model: Any, widths: Widths, path: Path, exact: bool = True) -> float:
    """How far llama.cpp's logits are from ours, relative to the largest."""
    with model.budget(widths=widths):
        ours = model(tokens()[None]).logits[0]
    return float((theirs(path, exact) - ours).abs().max() / ours.abs().max())


@pytest.mark.parametrize("which", WIDTHS)
@pytest.mark.parametrize("parent", PARENTS)
def test_logits_are_ours(tmp_path: Path, parent: str, which: str) -> None:
    family, overrides, alike, ragged = PARENTS[parent]
    model, widths = elastic(family, **overrides), Widths(*WIDTHS[which])
    report = export_gguf(model, tmp_path / "x.gguf", widths, kind="f32")
    narrow = (
        parent == "qwen2" and which != "full"
    )  # its architecture has as many features of heads as of the stream
    assert report["architecture"] == ("deci" if narrow else alike if which in ALIKE else ragged)
    assert apart(model, widths, tmp_path / "x.gguf") < 5e-6


@pytest.mark.parametrize("parent", ["llama 3", "qwen2", "qwen3"])
def test_logits_are_ours_to_half_precision_as_llama_cpp_computes_by_default(
    tmp_path: Path, parent: str
) -> None:
    model, widths = elastic(PARENTS[parent][0], **PARENTS[parent][1]), Widths(*WIDTHS["ragged"])
    export_gguf(model, tmp_path / "x.gguf", widths, kind="f16")
    assert apart(model, widths, tmp_path / "x.gguf", exact=False) < 4e-3


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_query_heads_of_every_group(tmp_path: Path, family: str) -> None:
    model, widths = elastic(family, "query", heads=(0, 1, 3, 4)), Widths((20, 7, 40), (3, 0, 1))
    export_gguf(model, tmp_path / "x.gguf", widths, kind="f32")
    assert apart(model, widths, tmp_path / "x.gguf") < 5e-6


@pytest.mark.parametrize(
    "kind, bound", [("f16", 3e-3), ("bf16", 3e-2), ("q8_0", 8e-2), ("q4_0", 0.8), ("q4_k", 0.8)]
)
@torch.no_grad()
def test_types(tmp_path: Path, kind: str, bound: float) -> None:
    """llama.cpp computes with what is in the file: as far from the elastic model as the report says, and no further."""
    model = elastic("llama", mlp=(64, 300, 512), intermediate_size=512, hidden_size=256, head_dim=64)
    widths = Widths((64, 300, 512), (2, 1, 4))
    report = export_gguf(model, tmp_path / "x.gguf", widths, kind=kind)
    assert kind in report["types"] and report["parity"]["max_rel"] < bound
    assert report["types"].get("f16", 0) == (
        1 if kind[0] == "q" else 22 if kind == "f16" else 0
    )  # rows of 300
    assert apart(model, widths, tmp_path / "x.gguf") < 1.5 * report["parity"]["max_rel"] + 0.02


def test_the_factors_of_rotations_are_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without them llama.cpp loads a Llama 3 and computes something else."""
    model, widths = elastic("llama", rope_parameters=LLAMA3), Widths(*WIDTHS["ragged"])
    monkeypatch.setattr(writing, "_rope_factors", lambda _: None)
    export_gguf(model, tmp_path / "x.gguf", widths, kind="f32")
    assert apart(model, widths, tmp_path / "x.gguf") > 0.05


def test_a_window_becomes_the_context(tmp_path: Path) -> None:
    model = elastic("mistral", sliding_window=32)
    report = export_gguf(model, tmp_path / "x.gguf", model.elastic.full(), kind="f32")
    assert "the context is the window's 32 tokens" in report["note"]
    assert apart(model, model.elastic.full(), tmp_path / "x.gguf") < 5e-6
