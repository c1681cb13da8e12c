"""What a GGUF file of a sub-network holds, and what is refused; `test_llama_cpp.py` runs such files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from nn.models import small_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flextron import convert, from_pretrained
from flextron.artefacts.elastic_model import save_elastic
from flextron.artefacts.ladder import Ladder, uniform_ladder
from flextron.artefacts.planner import Planner
from flextron.checkpoint import CheckpointError
from flextron.config import Widths
from flextron.conversion.gguf import read_gguf
from flextron.exporting import TYPES, export_gguf
from flextron.nn import elastic_config, make_elastic

MLP, HEADS = (0, 20, 32, 40), (0, 1, 2, 4)
RAGGED = Widths((20, 0, 32), (1, 2, 4))


def elastic(family: str = "llama", mlp: Any = MLP, heads: Any = HEADS, **overrides: Any) -> Any:
    model = small_model(family, **overrides)
    return make_elastic(model, elastic_config(model, "kv_group", mlp, heads))


def field(path: Path, name: str) -> Any:
    return gguf.GGUFReader(path).fields[name].contents()


def test_a_width_for_each_layer_and_zeros_where_llama_cpp_needs_them(tmp_path: Path) -> None:
    model, path = elastic(), tmp_path / "x.gguf"
    report = export_gguf(model, path, Widths((20, 0, 32), (0, 2, 4)), kind="f32")
    assert report["architecture"] == "deci" and report["layout"] == "ragged" and "note" not in report
    assert field(path, "deci.feed_forward_length") == [20, 32, 32]  # 32 zero neurons behind an attention
    assert field(path, "deci.attention.head_count") == [1, 4, 8]  # a zero head in the first layer
    assert field(path, "deci.attention.head_count_kv") == [1, 2, 4]
    stored = {t.name: t for t in gguf.GGUFReader(path).tensors}
    assert not stored["blk.0.attn_q.weight"].data.any() and not stored["blk.1.ffn_down.weight"].data.any()
    assert (
        report["params"]
        == sum(t.n_elements for t in stored.values())
        > model.elastic.params(Widths((20, 0, 32), (0, 2, 4)))
    )
    assert report["bytes"] == path.stat().st_size


def test_an_untied_qwen3_is_padded_in_one_sentence(tmp_path: Path) -> None:
    model = elastic("qwen3", tie_word_embeddings=False)
    report = export_gguf(model, tmp_path / "x.gguf", RAGGED)
    assert report["layout"] == "padded" and "openelm, ties the embeddings." in report["note"]
    with pytest.raises(ValueError, match=r"must be padded, got ragged: .*openelm, ties the embeddings"):
        export_gguf(model, tmp_path / "y.gguf", RAGGED, layout="ragged")


def test_rows_that_do_not_divide_into_blocks_take_a_wider_type(tmp_path: Path) -> None:
    model = elastic(mlp=(32, 40), heads=(1, 2, 4), hidden_size=64, head_dim=16)
    path = tmp_path / "x.gguf"
    report = export_gguf(model, path, Widths((32, 40, 40), (1, 2, 4)), kind="q4_0")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert kinds["blk.0.ffn_down.weight"] == "Q4_0" and kinds["blk.1.ffn_down.weight"] == "F16"
    assert kinds["token_embd.weight"] == "Q8_0"  # the head is tied to it
    assert report["types"] == {"q8_0": 1, "f32": 7, "q4_0": 19, "f16": 2}


def test_the_full_network_says_that_it_is_elastic(tmp_path: Path) -> None:
    model = elastic()
    export_gguf(model, tmp_path / "full.gguf", model.elastic.full())
    assert json.loads(field(tmp_path / "full.gguf", "flextron.elastic")) == json.loads(
        json.dumps(model.elastic.to_dict())
    )
    assert json.loads(field(tmp_path / "full.gguf", "flextron.ladder"))["origin"] == "uniform"
    export_gguf(model, tmp_path / "small.gguf", RAGGED)
    assert not [name for name in gguf.GGUFReader(tmp_path / "small.gguf").fields if "flextron." in name]


@pytest.mark.parametrize(
    ("family", "overrides", "options", "error", "message"),
    [
        ("llama", {}, {"kind": "q3"}, ValueError, f"type must be one of {', '.join(TYPES)}, got 'q3'"),
        ("llama", {}, {"layout": "zip"}, ValueError, "layout must be one of auto, .*, got 'zip'"),
        (
            "llama",
            {},
            {"layout": "uniform"},
            ValueError,
            "must be padded or ragged, got uniform: layers differ",
        ),
        (
            "gemma",
            {"mlp": (20, 40), "heads": (1, 2, 4)},
            {},
            NotImplementedError,
            "family must be one of .*, got gemma",
        ),
        (
            "llama",
            {"hidden_act": "gelu"},
            {},
            NotImplementedError,
            "hidden_act of a llama must be silu or swish",
        ),
        (
            "qwen3",
            {"attention_bias": True},
            {},
            NotImplementedError,
            "attention_bias of a qwen3 must be False",
        ),
        (
            "qwen2",
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            {},
            NotImplementedError,
            "rope_type of a qwen2 must be default .*, got linear",
        ),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(
    tmp_path: Path, family: str, overrides: Any, options: Any, error: Any, message: str
) -> None:
    model = elastic(family, **overrides)
    widths = Widths((20, 40, 20), (1, 2, 4))
    with pytest.raises(error, match=message):
        export_gguf(model, tmp_path / "x.gguf", widths, **options)
    assert not [*tmp_path.iterdir()]


def test_files_that_are_there_stay(tmp_path: Path) -> None:
    model, path = elastic(), tmp_path / "x.gguf"
    with pytest.raises(ValueError, match=r"out must end in \.gguf, got"):
        export_gguf(model, tmp_path / "x.bin", RAGGED)
    path.write_text("mine")
    with pytest.raises(ValueError, match="must not be there yet, got a file; --force"):
        export_gguf(model, path, RAGGED)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = 1e5
    with pytest.raises(ValueError, match="type must hold every weight, got f16"):
        export_gguf(model, path, RAGGED, force=True)
    assert path.read_text() == "mine" and len([*tmp_path.iterdir()]) == 1
    export_gguf(model, path, RAGGED, kind="f32", force=True)
    assert path.read_bytes()[:4] == b"GGUF"


def test_without_llama_cpp_a_type_that_only_it_writes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    model = elastic(mlp=(20, 256), heads=(1, 4), intermediate_size=256, hidden_size=256, head_dim=16)
    with pytest.raises(ValueError, match=r"type must be one of f32, f16, bf16, q8_0, q4_0 where .*got q4_k"):
        export_gguf(model, tmp_path / "x.gguf", Widths((256, 20, 20), (1, 4, 4)), kind="q4_k")
    assert not [*tmp_path.iterdir()]


def test_a_file_of_the_full_network_becomes_the_elastic_checkpoint_again(tmp_path: Path) -> None:
    """Menus, order of neurons, and the ladder that routers chose: the file's."""
    model = elastic(heads=(1, 2, 4), hidden_size=64)
    upgrades = tuple(reversed(uniform_ladder(model.elastic).upgrades))
    ladder = Ladder(*model.elastic.menus, 3, upgrades, "router")
    model.planner = Planner(model.elastic, (), ladder)
    file, out = tmp_path / "full.gguf", tmp_path / "elastic"
    export_gguf(model, file, model.elastic.full(), kind="f32", tokenizer=toy())
    text = [" ".join(f"{c}ab" for c in "cdefghijklmnop") * 20] * 40
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in text))
    options: dict[str, Any] = {"data": str(tmp_path / "text.jsonl"), "samples": 4, "length": 16}
    with pytest.raises(ValueError, match="mlp_choices must be the file's own where it is elastic already"):
        convert(file, out, mlp_choices=(8, 40), **options)
    convert(file, out, **options)
    again = from_pretrained(out, torch.float32, device="cpu")
    assert again.elastic.menus == model.elastic.menus and again.planner.ladder == ladder
    x, half = torch.randint(1, 35, (2, 8)), ladder.rungs[len(ladder.rungs) // 2]
    with torch.no_grad(), model.budget(widths=half), again.budget(widths=half):
        torch.testing.assert_close(again(x).logits, model(x).logits, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        again.model.norm.weight.mul_(1.5)
    save_elastic(again, out)  # other weights
    assert from_pretrained(out, torch.float32, device="cpu").planner.ladder.origin == "uniform"


def test_factors_of_rotations_are_refused_where_transformers_would_drop_them(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    model = elastic(heads=(1, 2, 4), hidden_size=64, rope_parameters=rope)
    export_gguf(model, tmp_path / "full.gguf", model.elastic.full(), kind="f32", tokenizer=toy())
    with pytest.raises(CheckpointError, match=r"got factors of rotations \(rope_freqs.weight\)"):
        read_gguf(tmp_path / "full.gguf")


def toy() -> Any:
    """A tokenizer of letters and one pair."""
    known = ["<u>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "Ġ", "ab"]
    backend = Tokenizer(models.BPE({text: i for i, text in enumerate(known)}, [("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<u>"
    )
