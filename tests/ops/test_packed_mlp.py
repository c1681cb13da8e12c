"""packed_mlp: one packed copy serves every width; the bits of a row depend on that row, its width and nothing else."""

import pytest
import torch

from flextron.testing.numerics import assert_no_worse
from flextron_ext import elastic_mlp, pack_linear, pack_mlp, packed_mlp, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
PACKED = [None, "int8", "w8a8", "int4"]
each_packing = pytest.mark.parametrize("packed", PACKED, ids=["same", *PACKED[1:]])
each_quantised = pytest.mark.parametrize("packed", PACKED[2:])
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


@each_quantised
@pytest.mark.parametrize("T", [1, 33])
@pytest.mark.parametrize("gated", [True, False])
def test_hidden_values_become_integers_too(T, gated, packed):
    """Inputs and weights are such that hidden values are exact in float32: all round as in the reference."""
    x = torch.randint(-127, 128, (T, K)).float()
    x[:, ::32] = 127.0  # of every group: scales of 1
    gate, up, down = (torch.randint(-7, 8, size).float() for size in ((F, K), (F, K), (N, F)))
    for weight in (gate, up):
        weight[:, ::32] = 127.0 if packed == "w8a8" else 8.0
        weight[:, 1::32] = -7.0  # of 16 values, the least
    arguments = (*pack_mlp(gate if gated else None, up, down, packed), None, None, None, 61, N, gated, "relu")
    extent = torch.randint(0, 62, (T,))
    plain = reference.packed_mlp(x, *arguments, extent=extent)
    exact = reference.packed_mlp(x.double(), *arguments, extent=extent)
    assert_no_worse(packed_mlp(x, *arguments, extent=extent), plain, exact, packed)


@each_quantised
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_integers_of_a_whole_mlp(dtype, packed):
    for d in (F, 61, 33, 5):
        x, *weights = draw(33, dtype)
        arguments = (*pack_mlp(*weights, packed), None, None, None, d, N)
        plain, exact = (reference.packed_mlp(t, *arguments) for t in (x, x.double()))
        assert_no_worse(packed_mlp(x, *arguments), plain, exact, f"width {d}", dtype)


@each_quantised
def test_neurons_that_fill_no_group_of_inputs(packed):
    """36 neurons are 3 panels of features and 2 groups of inputs."""
    x, gate, up, down = draw(3, torch.bfloat16)
    b_up, cut = torch.randn(36).bfloat16(), pack_mlp(gate[:36], up[:36], down[:, :36], packed)
    y = packed_mlp(x, *cut, None, b_up, None, 36, N)
    plain = reference.packed_mlp(x, *cut, None, b_up, None, 36, N)
    exact = reference.packed_mlp(x.double(), *cut, None, b_up.double(), None, 36, N)
    assert_no_worse(y, plain, exact, packed)
    for call, error in ((packed_mlp, ValueError), (torch.ops.flextron.packed_mlp, RuntimeError)):
        with pytest.raises(error, match=r"packed_mlp: width must lie in \[0, 48\], got 49"):
            call(x, *cut, None, None, None, 49, N)
        with pytest.raises(error, match=r"packed_mlp: down_panels must have shape"):
            call(
                x,
                *cut._replace(
                    down_panels=pack_mlp(gate, up, down, packed).down_panels,
                    down_scales=pack_mlp(gate, up, down, packed).down_scales,
                ),
                None,
                None,
                None,
                36,
                N,
            )


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
