"""A model that is copied, pickled, moved or cast is whole afterwards, and shares no state with the one before."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from nn.test_elastic_model import elastic, mixed, relative, tokens
from nn.test_policy import routed, three, turned

import flextron
from flextron.nn.policy import PerRequest


def through_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def through_torch(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {"deepcopy": copy.deepcopy, "pickle": through_pickle, "torch.save": through_torch}


class Planner:
    """What `flextron.from_pretrained` hangs in, as far as a copy knows."""

    def __init__(self) -> None:
        self.tables = {"prefill": [1.0]}


@torch.no_grad()
@pytest.mark.parametrize("packed", [None, "float", "int8", "int4"])
@pytest.mark.parametrize("way", WAYS)
def test_a_copy_is_the_model_and_shares_nothing_with_it(way, packed):
    model, ids = routed(elastic()), tokens()
    if packed:
        flextron.pack(model, None if packed == "float" else packed)
    model.planner = Planner()
    turned(model, 0.4, 0.6)
    logits = model(ids).logits  # weights are held from here
    other = WAYS[way](model)
    assert type(other) is type(model) and other.dial == model.dial
    assert torch.equal(other(ids).logits, logits)
    assert other.planner is not model.planner and other.planner.tables == model.planner.tables
    assert other.adaptive is not model.adaptive
    assert other.settings.now().policy.router is other.adaptive
    assert not {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in model.parameters()}
    other.set_widths(mixed(other.elastic))
    other.model.embed_tokens.weight.mul_(2)
    assert relative(other(ids).logits, logits) > 1e-2
    assert torch.equal(model(ids).logits, logits)
    assert other.generate(ids, max_new_tokens=2, pad_token_id=0).shape == (2, 14)


def test_a_process_that_has_not_seen_the_model_reads_it(tmp_path, processes):
    model, ids = elastic(), tokens()
    model.set_widths(mixed(model.elastic))
    (tmp_path / "model.pkl").write_bytes(pickle.dumps((model, ids)))
    code = (
        "import pickle, sys, torch; model, ids = pickle.load(open(sys.argv[2], 'rb'));"
        "print(float(torch.no_grad()(lambda: model(ids).logits.double().sum())()))"
    )
    done = processes.alone(["-c", code, tmp_path / "model.pkl"])
    assert done.rc == 0, done.err
    with torch.no_grad():
        assert float(done.out) == pytest.approx(float(model(ids).logits.double().sum()), rel=1e-4)


def test_a_shallow_copy_is_refused():
    with pytest.raises(TypeError, match=r"copy.copy: an elastic model must be copied by copy.deepcopy, got"):
        copy.copy(elastic())


@torch.no_grad()
@pytest.mark.parametrize("packed", [None, "float", "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_casting_gives_the_model_in_that_dtype(dtype, packed):
    model, ids = elastic("qwen2", unit="query"), tokens()
    model.set_widths(mixed(model.elastic))
    if packed:
        flextron.pack(model, None if packed == "float" else packed)
    before = model(ids).logits
    exact = copy.deepcopy(model) if packed in ("int8", "int4") else elastic("qwen2", unit="query").to(dtype)
    exact.set_widths(mixed(model.elastic))
    integers = (torch.int8, torch.uint8)
    panels = [b.dtype for b in model.buffers() if b.dtype in integers]
    scales = [b for name, b in model.named_buffers() if name.endswith("scales")]
    model.to(dtype)
    assert model(ids).logits.dtype == dtype
    error = relative(model(ids).logits.float(), exact(ids).logits.float())
    # int4: an input beside the middle of two integers becomes the other one
    assert error < {"int8": 0.02, "int4": 0.03}.get(packed, 1e-5)
    assert [b.dtype for b in model.buffers() if b.dtype in integers] == panels
    kept = [b for name, b in model.named_buffers() if name.endswith("scales")]
    assert all(a is b for a, b in zip(kept, scales, strict=True))
    model.float()
    assert relative(model(ids).logits, before) < (0.03 if packed == "int4" else 0.02)


@torch.no_grad()
@pytest.mark.parametrize("packed", ["float", "int8"])
def test_what_packed_weights_cannot_be_cast_to_changes_nothing(packed):
    model, ids = elastic(), tokens()
    flextron.pack(model, None if packed == "float" else packed)
    before = model(ids).logits
    for cast in (model.double, lambda: model.to("meta"), model.model.layers[0].double):
        with pytest.raises(
            NotImplementedError, match=r"^flextron: packed weights must stay float32, bfloat16 or"
        ):
            cast()
    model.model.layers.float()
    assert {t.dtype for t in model.parameters()} == {torch.float32}
    assert torch.equal(model(ids).logits, before)


def test_what_decides_moves_with_the_model():
    model = elastic()
    model.set_widths(three(model.elastic))
    model.to("meta")
    policy = model.settings.now().policy
    assert isinstance(policy, PerRequest)
    assert all(extents.is_meta for layers in policy.rows for extents in layers)
