"""A packed model computes what the plain one does, at every width; what needs plain weights says so."""

import copy

import pytest
import torch
from models import small_model

import flextron
from flextron.config import Widths
from flextron.nn import PackedLinear
from flextron_ext import pack_linear, reference

UNITS = ["kv_group", "query"]


def models(family="llama", unit="kv_group", dtype=torch.float32, packed=None, **overrides):
    """The plain model, the packed one, and what packing said."""
    hf = small_model(family, **overrides).to(dtype)
    plain = flextron.make_elastic(hf, flextron.elastic_config(hf.config, unit))
    ours = flextron.make_elastic(copy.deepcopy(small_model(family, **overrides)).to(dtype), plain.elastic)
    return plain, ours, flextron.pack(ours, packed)


def every_width(config):
    for mlp, heads in zip(config.mlp_choices[::-1], [*config.head_choices[::-1]] * 9, strict=False):
        yield Widths(mlp=(mlp,) * config.num_layers, heads=(heads,) * config.num_layers)


@torch.no_grad()
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_logits_at_every_width(family, unit):
    plain, ours, _ = models(family, unit)
    ids = torch.randint(0, 61, (2, 12))
    for widths in every_width(plain.elastic):
        plain.set_widths(widths), ours.set_widths(widths)
        torch.testing.assert_close(ours(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("packed", [None, "int8", "w8a8", "int4"])
def test_generate_takes_the_decoder_op_and_agrees_with_the_modules(unit, packed, monkeypatch):
    _, ours, _ = models("llama", unit, packed=packed, attention_bias=True, mlp_bias=True)
    ids = torch.randint(0, 61, (2, 5))
    settings = dict(max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True)
    taken, step = [], flextron.nn.forward.ElasticForward.__call__
    counted = lambda *arguments: taken.append(1) or step(*arguments)  # noqa: E731
    for widths in every_width(ours.elastic):
        ours.set_widths(widths)
        taken.clear()
        with monkeypatch.context() as patch:
            patch.setattr(flextron.nn.forward.ElasticForward, "__call__", counted)
            by_step = ours.generate(ids, **settings)
        assert len(taken) == 8  # the prompt's, and one for each token but the last
        with monkeypatch.context() as patch:
            patch.setattr(flextron.nn.model, "try_forward", lambda *_: None)
            patch.setattr(flextron.nn.model, "is_plain", lambda *_: False)
            by_modules = ours.generate(ids, **settings)
        torch.testing.assert_close(by_step.logits[-1], by_modules.logits[-1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_is_near_and_a_quarter_of_the_bytes(dtype):
    plain, ours, packing = models(dtype=dtype, packed=torch.int8, tie_word_embeddings=False)
    ids = torch.randint(0, 61, (2, 12))
    exact, near = plain(ids).logits.float(), ours(ids).logits.float()
    assert (near - exact).norm() < 0.05 * exact.norm()
    # rows that fill up the last panel, and scales, come on top
    assert packing.bytes_after < packing.bytes_before / dtype.itemsize * 1.5


@torch.no_grad()
@pytest.mark.parametrize("packed, share", [("w8a8", 1), ("int4", 0.625)])
def test_integers_throughout_are_near_the_rounded_weights_at_every_width(packed, share):
    """Widths end inside groups of 32 inputs. What is left is that inputs become integers too."""
    plain, ours, packing = models(dtype=torch.bfloat16, packed=packed, tie_word_embeddings=False)
    ids = torch.randint(0, 61, (2, 12))
    for linear in (m for m in plain.modules() if isinstance(m, torch.nn.Linear)):
        rounded = reference._unpacked(*pack_linear(linear.weight, format=packed), torch.float32)
        linear.weight.copy_(rounded[: linear.out_features, : linear.in_features])
    for widths in every_width(plain.elastic):
        plain.set_widths(widths), ours.set_widths(widths)
        exact, near = plain(ids).logits.float(), ours(ids).logits.float()
        assert 0 < (near - exact).norm() < 0.05 * exact.norm()
    assert packing.bytes_after < packing.bytes_before / 2 * share * 1.6  # filled up to groups and panels


@torch.no_grad()
@pytest.mark.parametrize("family, unit", [("llama", "kv_group"), ("phi3", "query"), ("gpt2", "kv_group")])
def test_calibration_makes_four_bits_nearer_at_every_width(family, unit, monkeypatch):
    plain, ours, _ = models(family, unit, packed="int4")
    fitted = copy.deepcopy(plain)
    monkeypatch.setattr(flextron.nn.packed, "_ROOM", 30_000)  # several passes over the text
    text = torch.randint(0, 61, (8, 40))
    flextron.pack(fitted, "int4", calibration=text[:6])
    errors = []
    for widths in every_width(plain.elastic):
        for model in (plain, ours, fitted):
            model.set_widths(widths)
        exact = plain(text[6:]).logits
        errors.append([(model(text[6:]).logits - exact).norm().item() for model in (ours, fitted)])
    alone, together = torch.tensor(errors).T
    assert (together < 1.1 * alone).all() and together.sum() < 0.95 * alone.sum(), errors


@pytest.mark.parametrize(
    "dtype, text, message",
    [
        (
            "int8",
            torch.ones(2, 3).long(),
            "calibration must be None unless dtype is int4, got tokens for int8",
        ),
        ("int4", torch.ones(3).long(), r"calibration must be int64 tokens \[n, length\], got torch.int64 of"),
        ("int4", torch.ones(2, 3), r"calibration must be int64 tokens \[n, length\], got torch.float32 of"),
        ("int4", torch.full((2, 3), 61), r"calibration must have tokens in \[0, 61\), got 61"),
    ],
)
def test_bad_calibration_changes_nothing(dtype, text, message):
    _, ours, _ = models()
    plain = flextron.make_elastic(small_model(), ours.elastic)
    with pytest.raises(ValueError, match=f"pack: {message}"):
        flextron.pack(plain, dtype, text)
    assert not any(isinstance(m, PackedLinear) for m in plain.modules())


@pytest.mark.parametrize("packed", [None, "int4"])
def test_memory_is_that_of_the_tensors(packed):
    plain, ours, packing = models(packed=packed, tie_word_embeddings=False)
    linears = [m for m in plain.modules() if isinstance(m, torch.nn.Linear)]
    layers = [m for m in ours.modules() if isinstance(m, PackedLinear)]
    assert packing.bytes_before == sum(m.weight.nbytes for m in linears)
    scales = sum(m.scales.nbytes for m in layers if m.scales is not None)
    assert packing.bytes_after == sum(m.panels.nbytes for m in layers) + scales
    assert not any(isinstance(m, torch.nn.Linear) for m in ours.modules())
    assert len(layers) == 6 * plain.elastic.num_layers + 1


def test_what_needs_plain_weights_says_so(tmp_path):
    _, ours, _ = models()
    for needs in (
        ours.state_dict,
        lambda: ours.save_pretrained(tmp_path / "saved"),
        lambda: flextron.extract(ours),
        lambda: flextron.export(ours, tmp_path / "exported"),
    ):
        with pytest.raises(NotImplementedError, match="weights must be plain, got packed ones"):
            needs()
    assert not list(tmp_path.rglob("*.safetensors"))
    with pytest.raises(NotImplementedError, match="packed_linear: inputs must not need a gradient"):
        ours(torch.randint(0, 61, (1, 4))).logits.sum().backward()


def test_what_cannot_be_packed_is_left_as_it_is():
    plain, ours, _ = models()
    with pytest.raises(ValueError, match="pack: model must have plain weights, got packed ones"):
        flextron.pack(ours)
    with pytest.raises(ValueError, match="pack: dtype must be None, int8, w8a8 or int4, got int3"):
        flextron.pack(plain, "int3")
    with pytest.raises(TypeError, match="pack: model must be elastic, got LlamaForCausalLM"):
        flextron.pack(small_model())
    with pytest.raises(ValueError, match="pack: model must be float32, bfloat16 or float16"):
        flextron.pack(plain.double())
    assert not any(isinstance(m, PackedLinear) for m in plain.modules())
