"""What people hand in: each way in is taken, or is refused with a command that mends it, which is run here."""

from __future__ import annotations

import copy
import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from conversion.test_elastify import toy_tokenizer
from folders import digest
from nn.models import small_model
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPVisionConfig,
    SiglipVisionConfig,
)

import flextron
from flextron import cli, pipeline
from flextron.checkpoint import CheckpointError
from flextron.conversion import convert
from flextron.conversion.gguf import read_gguf
from flextron.conversion.source import source_of
from flextron.nn.proof import logits_of


def tokens(*shape: int) -> Tensor:
    return torch.randint(3, 61, shape, generator=torch.Generator().manual_seed(0))


def run_remedy(message: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run the command that a message ends in, in this process; the folder that it writes."""
    words = shlex.split(message[message.index("python -c") :])
    assert words[:2] == ["python", "-c"] and len(words) == 5
    monkeypatch.setattr(sys, "argv", ["-c", *words[3:]])
    exec(words[2], {})
    return Path(words[4])


@pytest.mark.parametrize("sharded", [False, True])
def test_pickled_weights_are_refused_with_the_command_that_rewrites_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], sharded: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    parent, source = small_model(), tmp_path / "it's pickled"
    parent.config.save_pretrained(source)
    toy_tokenizer().save_pretrained(source)
    weights = parent.state_dict()
    if sharded:
        names = sorted(weights)
        halves = {
            "pytorch_model-00001-of-00002.bin": names[::2],
            "pytorch_model-00002-of-00002.bin": names[1::2],
        }
        for file, own in halves.items():
            torch.save({name: weights[name] for name in own}, source / file)
        where = {name: file for file, own in halves.items() for name in own}
        index = {"metadata": {}, "weight_map": where}
        (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        torch.save(weights, source / "pytorch_model.bin")
    assert cli.main(["convert", str(source), "out"]) == 2
    said = capsys.readouterr().err
    assert "got pytorch_model" in said and len(said.splitlines()) == 1 and not Path("out").exists()
    mended = run_remedy(said, monkeypatch)
    convert(mended, "out", calibration=tokens(4, 16))
    stock = AutoModelForCausalLM.from_pretrained("out")
    torch.testing.assert_close(logits_of(stock, tokens(1, 8)), logits_of(parent, tokens(1, 8)))
    assert AutoTokenizer.from_pretrained(mended)("w5")["input_ids"] == [5]


TEXT = dict(
    vocab_size=61,
    hidden_size=64,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
SEES = dict(
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=8,
    patch_size=4,
)


def multimodal(family: str) -> Any:
    torch.manual_seed(0)
    kind = CONFIG_MAPPING[family]
    if family == "gemma3":
        text = CONFIG_MAPPING["gemma3_text"](**TEXT)
        config = kind(text_config=text, vision_config=SiglipVisionConfig(**SEES), mm_tokens_per_image=4)
    else:
        text = CONFIG_MAPPING["llama"](**TEXT)
        config = kind(text_config=text, vision_config=CLIPVisionConfig(**SEES), image_token_index=60)
    return AutoModelForImageTextToText.from_config(config).eval()


@pytest.mark.parametrize(("family", "inner"), [("gemma3", "gemma3_text"), ("llava", "llama")])
def test_the_language_model_in_a_multimodal_one_is_named_and_taken_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, inner: str
) -> None:
    monkeypatch.chdir(tmp_path)
    whole = multimodal(family)
    whole.save_pretrained("whole")
    toy_tokenizer().save_pretrained("whole")
    with pytest.raises(
        CheckpointError, match=f"alone, got a '{family}' with a {inner} inside; this"
    ) as refused:
        source_of("whole")
    text = run_remedy(str(refused.value), monkeypatch)
    convert(text, "out", calibration=tokens(4, 16))
    ids = tokens(1, 8)
    with torch.no_grad():
        expected = whole(input_ids=ids).logits[0]
    found = logits_of(AutoModelForCausalLM.from_pretrained("out"), ids)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_language_model_that_is_not_in_the_table_is_said_to_be_so(tmp_path: Path) -> None:
    CONFIG_MAPPING["qwen2_vl"]().save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match="'qwen2_vl_text' inside, which is not in the table of families and"
    ):
        source_of(tmp_path)


def adapter_of(parent: Any, where: Path, **settings: Any) -> Any:
    """Save a random adapter of a copy of the parent; the logits of the two together."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **settings)
    adapted = get_peft_model(copy.deepcopy(parent), config)
    adapted.save_pretrained(where)
    return logits_of(adapted, tokens(2, 12))


def test_an_adapter_is_merged_before_the_conversion(tmp_path: Path) -> None:
    parent = small_model()
    parent.save_pretrained(tmp_path / "parent")
    expected = adapter_of(parent, tmp_path / "adapter")
    before = digest(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"got an adapter .* convert BASE DIR --merge-adapter \S+adapter$"
    ):
        source_of(tmp_path / "adapter")
    for source in (tmp_path / "parent", parent):
        convert(source, tmp_path / "out", calibration=tokens(4, 16), adapter=tmp_path / "adapter", force=True)
        found = logits_of(flextron.from_pretrained(tmp_path / "out"), tokens(2, 12))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    shutil.rmtree(tmp_path / "out")
    assert digest(tmp_path) == before
    shutil.copytree(tmp_path / "adapter", tmp_path / "parent", dirs_exist_ok=True)
    with pytest.raises(CheckpointError, match=r"beside it; move its .* by --merge-adapter"):
        source_of(tmp_path / "parent")


def test_an_adapter_that_does_not_fit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(parent: Any = None) -> str:
        with pytest.raises(ValueError) as error:
            convert(
                parent or small_model(),
                tmp_path / "out",
                calibration=tokens(4, 16),
                adapter=tmp_path / "adapter",
            )
        assert not (tmp_path / "out").exists() and "\n" not in str(error.value)
        return str(error.value)

    adapter_of(small_model(), tmp_path / "adapter")
    assert "must be an adapter of this model" in refused(small_model(hidden_size=64))  # another shape
    assert "got a difference in base_model.model.model.layers.3" in refused(small_model(num_hidden_layers=4))
    adapter_of(small_model(), tmp_path / "adapter", modules_to_save=["lm_head"])
    assert "must not adapt embeddings or head" in refused()
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    assert "got no adapter_model.safetensors" in refused()
    monkeypatch.setitem(sys.modules, "peft", None)
    small_model().save_pretrained(tmp_path / "parent")
    toy_tokenizer().save_pretrained(tmp_path / "parent")
    paths = [str(tmp_path / name) for name in ("parent", "out", "adapter")]
    assert (
        cli.main(["convert", *paths[:2], "--merge-adapter", paths[2], "--samples", "2", "--length", "8"]) == 2
    )
    assert "convert needs peft; pip install" in capsys.readouterr().err and not (tmp_path / "out").exists()


def write_gguf(path: Path, parent: Any) -> None:
    """A Llama as llama.cpp stores it, with a tokenizer of single letters; the halves of rotated heads interleave."""
    c, writer = parent.config, gguf.GGUFWriter(str(path), "llama")
    for name, value in dict(
        context_length=c.max_position_embeddings,
        embedding_length=c.hidden_size,
        block_count=c.num_hidden_layers,
        feed_forward_length=c.intermediate_size,
        head_count=c.num_attention_heads,
        head_count_kv=c.num_key_value_heads,
        key_length=c.head_dim,
        value_length=c.head_dim,
        rope_dimension_count=c.head_dim,
        layer_norm_rms_eps=c.rms_norm_eps,
        rope_freq_base=c.rope_parameters["rope_theta"],
        vocab_size=c.vocab_size,
        tokenizer_model="gpt2",
        tokenizer_pre="default",
        bos_token_id=1,
        eos_token_id=2,
        token_merges=["a b"],
    ).items():
        getattr(writer, f"add_{name}")(value)
    known = ["<u>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "Ġ", "ab"]
    writer.add_token_list(known + [f"<{i}>" for i in range(len(known), c.vocab_size)])
    writer.add_token_types([1] * c.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, c.num_hidden_layers)
    for name, p in parent.named_parameters():
        t = p.detach().numpy()
        heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}.get(name.split(".")[-2])
        if heads:
            t = t.reshape(heads, 2, -1, t.shape[1]).swapaxes(1, 2).reshape(t.shape).copy()
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), t)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_converts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    parent = small_model(hidden_size=64)
    write_gguf(Path("model.gguf"), parent)
    seen: list[Any] = []
    monkeypatch.setattr(pipeline, "read_gguf", lambda *args: seen.append(read_gguf(*args)) or seen[-1])
    Path("text.jsonl").write_text(
        "\n".join(json.dumps({"text": f"{c}ab " * 60}) for c in "cdefghijklmnop" * 3)
    )
    command = ["--data", "text.jsonl", "--samples", "4", "--length", "16", "--device", "cpu"]
    assert cli.main(["convert", "model.gguf", "out", *command, "--dtype", "bfloat16"]) == 0
    assert "stored in bfloat16" in capsys.readouterr().out
    assert all(p.is_meta for model, _ in seen for p in model.parameters())  # its memory was the conversion's
    assert cli.main(["convert", "model.gguf", "out", *command, "--force"]) == 0
    stock = AutoModelForCausalLM.from_pretrained("out")
    assert stock.dtype == torch.float32 and not hasattr(stock.config, "quantization_config")
    torch.testing.assert_close(
        logits_of(stock, tokens(1, 8)), logits_of(parent, tokens(1, 8)), rtol=1e-4, atol=1e-4
    )
    assert AutoTokenizer.from_pretrained("out")("cab")["input_ids"] == [5, 30]

    def refused(name: str) -> str:
        capsys.readouterr()
        assert cli.main(["convert", name, "other", *command]) == 2 and not Path("other").exists()
        said = capsys.readouterr().err
        assert len(said.splitlines()) == 1
        return said

    assert "must be a GGUF file, got nothing there" in refused("none.gguf")
    Path("cut.gguf").write_bytes(Path("model.gguf").read_bytes()[:3000])
    assert "must be a GGUF file that transformers reads" in refused("cut.gguf")
    Path("text.gguf").write_text("hello")
    assert "begins with b'hell'" in refused("text.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "convert needs gguf; pip install" in refused("model.gguf")
