"""Every family goes through the whole of a conversion: scored, sorted, stored, read back, certified."""

from __future__ import annotations

import pytest
import torch
from nn.models import EVERY, row_model

import flextron
from flextron.conversion import convert
from flextron.conversion.importance import score
from flextron.nn.proof import logits_of


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(3, 61, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("row", EVERY)
def test_a_family_converts(row, tmp_path):
    parent = row_model(row)
    report = convert(parent, tmp_path / "elastic", calibration=tokens(4, 24))
    assert report["parity"]["max_rel"] < 1e-4 and len(report["parity"]["sub_networks"]) == 2
    model = flextron.from_pretrained(tmp_path / "elastic")
    ids = tokens(1, 12)
    torch.testing.assert_close(logits_of(model, ids), logits_of(parent, ids), rtol=1e-4, atol=1e-4)
    prompt = dict(input_ids=ids[:, :4], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(**prompt), parent.generate(**prompt))


@pytest.mark.parametrize("row", ["gemma2", "opt", "gpt_neox", "mixtral"])
def test_a_family_converts_in_a_narrow_dtype(row, tmp_path):
    """Whose layers are widened one after another."""
    report = convert(row_model(row).bfloat16(), tmp_path / "elastic", calibration=tokens(4, 24))
    assert report["dtypes"].keys() == {"bfloat16"} and report["parity"]["max_rel"] < 1e-4


def test_dropout_is_set_to_zero_and_said(tmp_path):
    parent = row_model("gpt2", resid_pdrop=0.1)
    assert convert(parent, tmp_path / "elastic", calibration=tokens(4, 24))["dropped"] == {"resid_pdrop": 0.1}
    assert parent.config.resid_pdrop == 0.1
    assert flextron.from_pretrained(tmp_path / "elastic").config.resid_pdrop == 0


@pytest.mark.parametrize("row", ["mixtral", "gpt_oss"])
def test_each_expert_is_scored_on_the_tokens_that_reach_it(row):
    """What an expert computes decides the scores of its own neurons alone."""
    model, ids = row_model(row), tokens(2, 16)
    before = score(model, ids).neurons[0]
    layer = model.model.layers[0].mlp
    chosen: list[torch.Tensor] = []
    router = layer.gate if row == "mixtral" else layer.router
    router.register_forward_hook(lambda _, __, out: chosen.append(out[2]))
    with torch.no_grad():
        layer.experts.gate_up_proj[1] *= 0
    after = score(model, ids).neurons[0]
    assert before.shape == (4, 40) and torch.equal(before[[0, 2, 3]], after[[0, 2, 3]])
    reached = torch.cat(chosen).unique()
    assert (before.sum(1) > 0).tolist() == [e in reached for e in range(4)]
    assert not torch.equal(before[1], after[1])
