"""What transformers' Trainer and `save_pretrained` leave is a whole elastic checkpoint of the weights in memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from nn.models import small_model
from nn.test_elastic_model import elastic, mixed, relative, tokens
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import flextron
from flextron.artefacts.elastic_model import save_elastic
from flextron.checkpoint import CheckpointError, Origin
from flextron.nn.proof import in_dtype

UNTIED = dict(tie_word_embeddings=False)


def made(**overrides: Any) -> Any:
    return flextron.make_elastic(small_model("qwen2", **overrides))


def trained(model: Any, directory: Path, **settings: Any) -> Trainer:
    """Three steps, each stored, the best one loaded at the end."""
    rows = [{"input_ids": row, "labels": row} for row in tokens(8, 6)]
    arguments = dict(
        output_dir=directory,
        max_steps=3,
        save_steps=1,
        eval_steps=1,
        eval_strategy="steps",
        load_best_model_at_end=True,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    arguments = TrainingArguments(**arguments | settings)
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:2])
    trainer.train()
    return trainer


@torch.no_grad()
def assert_is(directory: Path, model: Any) -> None:
    """Both loaders read the weights of the model, at full width, and ours any other too."""
    ids, full = tokens(), model.elastic.full()
    again, stock = flextron.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory)
    for widths in (full, mixed(model.elastic)):
        model.set_widths(widths)
        again.set_widths(widths)
        assert torch.equal(again(ids).logits, model(ids).logits)
        if widths is full:
            assert relative(stock(ids).logits, model(ids).logits) < 1e-5
    assert again.elastic == model.elastic


@pytest.mark.parametrize("overrides", [{}, UNTIED], ids=["tied", "untied"])
def test_trainer_leaves_elastic_checkpoints_and_loads_its_best(overrides, tmp_path):
    model = made(**overrides)
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    trainer = trained(model, tmp_path)
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-3" and relative(model.model.layers[0].mlp.up_proj.weight, before) > 1e-3
    assert_is(best, model)
    earlier = flextron.from_pretrained(tmp_path / "checkpoint-1")
    assert (
        relative(earlier.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight) > 1e-4
    )
    trainer.save_model(tmp_path / "last")
    assert_is(tmp_path / "last", model)
    trainer.args.max_steps = 4
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.state.global_step == 4
    assert_is(tmp_path / "checkpoint-4", model)


def test_trainer_and_peft_store_the_adapter_alone(tmp_path):
    model = get_peft_model(made(), LoraConfig(target_modules=["q_proj", "down_proj"]))
    trained(model, tmp_path, max_steps=2, load_best_model_at_end=False)
    files = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert "adapter_model.safetensors" in files and "flextron.json" not in files
    again = PeftModel.from_pretrained(made(), tmp_path / "checkpoint-2")
    ids = tokens()
    with torch.no_grad():
        assert relative(again(ids).logits, made()(ids).logits) > 1e-3
        assert relative(again(ids).logits, model(ids).logits) < 1e-6
    with pytest.raises(
        NotImplementedError, match=r"save_pretrained: weights must be plain, got .*merge it first"
    ):
        model.base_model.model.save_pretrained(tmp_path / "inner")
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert_is(tmp_path / "merged", merged)


def test_saving_over_a_checkpoint_tells_what_was_made_for_the_old_weights(tmp_path):
    model = made()
    model.save_pretrained(tmp_path)
    before = Origin.read(tmp_path)
    model.save_pretrained(tmp_path)
    assert Origin.read(tmp_path) == before
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    model.save_pretrained(tmp_path)
    after = Origin.read(tmp_path)
    assert after.elastic == before.elastic and after.weights != before.weights
    assert_is(tmp_path, model)


def test_weights_are_stored_in_the_dtype_they_have_in_memory(tmp_path):
    """Those of a bfloat16 parent are float32 when trained: rounding them would undo small steps."""
    save_elastic(made().bfloat16(), tmp_path / "parent")
    model = flextron.from_pretrained(tmp_path / "parent")
    with torch.no_grad():
        model.model.norm.weight.add_(1e-4)
    model.save_pretrained(tmp_path / "saved")
    again = flextron.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.model.norm.weight, model.model.norm.weight)
    model.bfloat16().save_pretrained(tmp_path / "half")
    assert os.path.getsize(tmp_path / "half" / "model.safetensors") < 0.6 * os.path.getsize(
        tmp_path / "saved" / "model.safetensors"
    )
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


def test_a_state_dict_that_was_gathered_elsewhere_is_what_is_stored(tmp_path):
    model, other = made(), made(seed=3)
    model.save_pretrained(tmp_path, state_dict=other.state_dict())  # the tied head comes twice
    assert_is(tmp_path, other)
    state = other.state_dict()
    for wrong, message in (
        ({}, "got nothing for model.embed_tokens.weight and"),
        (state | {"model.extra": torch.ones(1)}, "got unknown model.extra$"),
        (state | {"model.norm.weight": torch.ones(3)}, "got another shape of model.norm.weight$"),
    ):
        with pytest.raises(ValueError, match=rf"save_pretrained: state_dict must have .* {message}"):
            model.save_pretrained(tmp_path / "wrong", state_dict=wrong)
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"push_to_hub": True}, "push_to_hub must be False"),
        ({"variant": "fp16"}, "variant must be None"),
        ({"distributed_checkpoint": True}, "distributed_checkpoint must be False"),
        ({"safe_serialization": False}, "safe_serialization must be True"),
        ({"nonsense": 1}, "nonsense must be None"),
    ],
)
def test_options_that_would_have_no_effect_are_refused(options, message, tmp_path):
    with pytest.raises(NotImplementedError, match=f"^save_pretrained: {message}"):
        made().save_pretrained(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", ["0KB", -1, "2 gigabytes", 1.5])
def test_a_file_of_weights_has_a_size(size, tmp_path):
    with pytest.raises(ValueError, match=r"^save_pretrained: max_shard_size must be a number of bytes"):
        made().save_pretrained(tmp_path / "out", max_shard_size=size)
    assert not (tmp_path / "out").exists()


def test_options_that_change_nothing_pass(tmp_path):
    model = made()
    model.save_pretrained(tmp_path / "no", is_main_process=False)
    assert not (tmp_path / "no").exists()
    model.save_pretrained(tmp_path / "out", max_shard_size="1GB", safe_serialization=True, token=None)
    assert_is(tmp_path / "out", model)


def test_a_model_without_a_writer_says_where_there_is_one(tmp_path):
    with pytest.raises(NotImplementedError, match=r"model must be one of flextron.from_pretrained or"):
        elastic().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"got no flextron.json"):
        flextron.from_pretrained(tmp_path)


@pytest.mark.parametrize("change", ["more tokens", "untied"])
def test_embeddings_that_changed_since_are_stored_and_taken_out(tmp_path: Path, change: str) -> None:
    model, ids = made(), torch.arange(12)[None]
    if change == "untied":
        model.lm_head.weight = torch.nn.Parameter(1.5 * model.lm_head.weight.detach())
    else:
        model.resize_token_embeddings(70, mean_resizing=False)
        ids = ids + 58
    with torch.no_grad():
        exact = model(ids).logits
        model.save_pretrained(tmp_path / "saved")
        again = flextron.from_pretrained(tmp_path / "saved")
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        for other in (again, stock, flextron.extract(model), in_dtype(model, torch.float64)):
            torch.testing.assert_close(other(ids).logits.float(), exact, rtol=1e-4, atol=1e-5)
    assert again.elastic.tied == (change != "untied") and again.elastic.vocab_size == exact.shape[-1]
