"""Narrow weights compute in float32 as wide ones would, a part at a time, and are what they were afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nn.models import FAMILIES, small_model

from flextron.config import Widths
from flextron.nn import make_elastic
from flextron.nn.proof import logits_of
from flextron.nn.widened import is_narrow, widened

IDS = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(1))


def held_in(dtype: torch.dtype, family: str = "llama", **overrides: Any) -> tuple[Any, Any]:
    """A model with its parameters in a dtype, and one with the same values in float32."""
    narrow, wide = small_model(family, **overrides), small_model(family, **overrides)
    for p, other in zip(narrow.parameters(), wide.parameters(), strict=True):
        p.data = p.data.to(dtype)
        other.data = p.data.float()
    return narrow, wide


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_narrow_weights_compute_as_wide_ones(family: str, tied: bool) -> None:
    narrow, wide = held_in(torch.bfloat16, family, tie_word_embeddings=tied)
    before = {name: (p.data_ptr(), p.clone()) for name, p in narrow.named_parameters()}
    assert is_narrow(narrow) and not is_narrow(wide)
    assert torch.allclose(logits_of(narrow, IDS, torch.float32), logits_of(wide, IDS), rtol=0, atol=1e-5)
    assert not torch.allclose(logits_of(narrow, IDS).float(), logits_of(wide, IDS), rtol=0, atol=1e-5)
    for model in (narrow, wide):
        make_elastic(model).set_widths(Widths((10, 40, 20), (1, 4, 2)))
    assert torch.allclose(logits_of(narrow, IDS, torch.float32), logits_of(wide, IDS), rtol=0, atol=1e-5)
    for name, p in narrow.named_parameters():
        assert p.data_ptr() == before[name][0] and torch.equal(p, before[name][1]), name


def test_a_forward_that_fails_leaves_the_weights_as_they_were() -> None:
    model, _ = held_in(torch.bfloat16)
    handle = model.model.layers[1].mlp.act_fn.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), widened(model):
        assert model(IDS).logits.dtype == torch.float32
    handle.remove()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert "forward" not in model.lm_head.__dict__ and model(IDS).logits.dtype == torch.bfloat16


def test_a_wider_dtype_may_be_asked_for() -> None:
    narrow, wide = held_in(torch.float16)
    found = logits_of(narrow, IDS, torch.float64)
    assert found.dtype == torch.float64
    for p in wide.parameters():
        p.data = p.data.double()
    assert torch.allclose(found, logits_of(wide, IDS), rtol=0, atol=1e-6)
