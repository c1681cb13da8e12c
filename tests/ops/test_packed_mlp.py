"""packed_mlp: one packed copy serves every width; the bits of a row depend on that row, its width and nothing else."""

import pytest
import torch

from flextron.testing.numerics import assert_no_worse
from flextron_ext import elastic_mlp, pack_linear, pack_mlp, packed_mlp, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_packing = pytest.mark.parametrize("packed", [None, "int8"], ids=["same", "int8"])
K, F, N = 300, 88, 50


def draw(T, dtype, gated=True):
    x = torch.randn(T, K).to(dtype)
    gate, up = ((torch.randn(F, K) * K**-0.5).to(dtype) for _ in range(2))
    return x, gate if gated else None, up, (torch.randn(N, F) * F**-0.5).to(dtype)


def run(x, packed, width=F, **more):
    return packed_mlp(x, *packed, None, None, None, width, N, **more)


@each_dtype
@pytest.mark.parametrize("gated", [True, False])
def test_a_width_has_the_bits_of_the_sliced_weights(dtype, gated):
    x, gate, up, down = draw(9, dtype, gated)
    for d in (0, 1, 16, 37, F):
        sliced = pack_mlp(None if gate is None else gate[:d], up[:d], down[:, :d])
        ours = run(x, pack_mlp(gate, up, down), d, gated=gated)
        assert torch.equal(ours, run(x, sliced, d, gated=gated))


@each_dtype
@each_packing
def test_a_row_has_the_same_bits_in_any_batch(dtype, packed):
    x, *weights = draw(130, dtype)
    panels, extent, order = pack_mlp(*weights, packed), torch.randint(0, F + 1, (130,)), torch.randperm(130)
    y, mixed = run(x, panels), run(x, panels, extent=extent)
    for T in (1, 2, 5, 7, 8, 13, 64):
        assert torch.equal(run(x[-T:], panels), y[-T:])
    assert torch.equal(run(x[order], panels, extent=extent[order]), mixed[order])
    for t in (0, 5, 129):
        assert torch.equal(run(x[t : t + 1], panels, int(extent[t]))[0], mixed[t])


@each_dtype
@pytest.mark.parametrize("T", [1, 7, 40])
def test_nothing_beyond_the_widest_is_used(T, dtype):
    x, gate, up, down = draw(T, dtype)
    extent = torch.randint(0, 38, (T,))
    extent[0] = 37
    clean = run(x, pack_mlp(gate, up, down), extent=extent)
    gate[37:], up[37:], down[:, 37:] = torch.nan, torch.nan, torch.nan
    assert torch.equal(run(x, pack_mlp(gate, up, down), extent=extent), clean)


@each_packing
def test_threads_do_not_change_a_bit(packed, set_threads):
    x, *weights = draw(70, torch.bfloat16)
    panels, extent = pack_mlp(*weights, packed), torch.randint(0, F + 1, (70,))
    several = run(x, panels, extent=extent)
    for threads in (1, 5):
        set_threads(threads)
        assert torch.equal(run(x, panels, extent=extent), several)


@each_dtype
def test_it_is_elastic_mlp(dtype):
    x, gate, up, down = draw(33, dtype)
    arguments = (None, None, None, 61)
    exact = reference.elastic_mlp(x.double(), gate.double(), up.double(), down.double(), *arguments)
    ours = run(x, pack_mlp(gate, up, down), 61)
    assert_no_worse(ours, elastic_mlp(x, gate, up, down, *arguments), exact, "packed", dtype)


@pytest.mark.parametrize("T", [1, 33])
def test_int8_is_the_mlp_of_the_rounded_weights(T):
    x, *weights = draw(T, torch.float32)
    weights[1] *= 7  # no two weights have the same scales
    packed, rounded = pack_mlp(*weights, "int8"), []
    for weight in weights:
        panels, scales, _ = pack_linear(weight, format="int8")
        rounded.append(
            (panels.transpose(2, 3).flatten(3).float() * scales[..., None]).flatten(0, 2)[: len(weight)]
        )
    plain, exact = (
        reference.elastic_mlp(*(t.to(dtype) for t in (x, *rounded)), None, None, None, 61)
        for dtype in (torch.float32, torch.float64)
    )
    assert_no_worse(run(x, packed, 61), plain, exact, "int8")


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu", "relu2"])
def test_activations_at_large_and_small_values(activation):
    """One neuron, one input: act(z) itself, from far below to far above 0."""
    z = torch.cat((torch.linspace(-80, 80, 401), torch.tensor([0.0, 1e-6, -1e-6, torch.nan])))[:, None]
    panels = pack_mlp(None, torch.ones(1, 1), torch.ones(1, 1))
    y = packed_mlp(z, *panels, None, None, None, 1, 1, False, activation)
    exact = reference.ACTIVATIONS[activation](z.double())
    torch.testing.assert_close(y.double(), exact, rtol=2e-6, atol=2e-7, equal_nan=True)


BAD = [
    (dict(width=89), r"width must lie in \[0, 88\], got 89"),
    (dict(out_features=65), r"out_features must lie in \[0, 64\], got 65"),
    (dict(activation="tanh"), "activation must be one of relu, relu2, gelu, gelu_tanh, silu, got tanh"),
    (dict(gated=False), r"up_panels must have shape \[1, 6, 300, 16, 1\], got \[1, 12, 300, 16, 1\]"),
]


@pytest.mark.parametrize("change, message", BAD, ids=[message[:20] for _, message in BAD])
def test_bad_arguments_get_one_sentence(change, message):
    x, *weights = draw(3, torch.float32)
    arguments = dict(x=x, **pack_mlp(*weights)._asdict(), b_gate=None, b_up=None)
    arguments |= dict(b_down=None, width=F, out_features=N) | change
    with pytest.raises(ValueError, match=f"packed_mlp: {message}"):
        packed_mlp(**arguments)
    with pytest.raises(RuntimeError, match=f"packed_mlp: {message}"):
        torch.ops.flextron.packed_mlp(**arguments)
