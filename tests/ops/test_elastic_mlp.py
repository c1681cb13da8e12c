"""What is peculiar to elastic_mlp: widths per token, the soft gate, and what lies beyond a width."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from emulator import build as emulator
from hypothesis import given, settings
from hypothesis import strategies as st

from flextron.testing.numerics import assert_no_worse
from flextron_ext import elastic_mlp, reference

T, K, NEURONS, N = 11, 8, 24, 6
KERNELS = emulator.loaded()  # our own compute for CPU tensors, not the vendor's GEMM on views
NAMES = ("x", "w_gate", "w_up", "w_down", "b_gate", "b_up", "b_down")


def inputs(gated=True, dtype=torch.float32, T=T):
    shapes = ((T, K), (NEURONS, K), (NEURONS, K), (N, NEURONS), (NEURONS,), (NEURONS,), (N,))
    values = [torch.randn(*shape, dtype=dtype) * 0.5 for shape in shapes]
    return [
        None if not gated and name in ("w_gate", "b_gate") else v
        for name, v in zip(NAMES, values, strict=True)
    ]


def grown(values):
    return [None if value is None else value.clone().requires_grad_() for value in values]


def grads(y, leaves, dy):
    return torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], dy)


def test_slices_equal_the_op():
    x, wg, wu, wd, bg, bu, bd = inputs()
    h = F.silu(F.linear(x, wg[:13], bg[:13])) * F.linear(x, wu[:13], bu[:13])
    torch.testing.assert_close(elastic_mlp(x, wg, wu, wd, bg, bu, bd, 13), F.linear(h, wd[:, :13], bd))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("per_token", [True, False])
def test_nothing_beyond_a_width_is_used(gated, per_token):
    """NaN in all weights beyond the widest token: no NaN comes back, and those gradients are zero."""
    values = inputs(gated)
    extent = torch.randint(0, 14, (T,)) if per_token else torch.tensor([9])
    live = torch.arange(NEURONS) < extent.max()
    keep = {"w_gate": live[:, None], "w_up": live[:, None], "w_down": live, "b_gate": live, "b_up": live}
    poisoned = [
        v if v is None or name not in keep else torch.where(keep[name], v, torch.nan)
        for name, v in zip(NAMES, values, strict=True)
    ]
    dy = torch.randn(T, N)
    results = []
    for case in (poisoned, values):
        leaves = grown(case)
        y = elastic_mlp(*leaves, 20, extent=extent)
        results.append([y, *grads(y, leaves, dy)])
    for ours, clean in zip(*results, strict=True):
        assert torch.equal(ours, clean)
    names = [name for name, value in zip(NAMES, values, strict=True) if value is not None]
    for name, gradient in zip(names, results[0][1:], strict=True):
        if name in keep:
            dead = ~keep[name].expand(gradient.shape)
            assert not gradient[dead].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("mode", ["width", "extent", "gate"])
def test_our_own_gradients(mode, gated, dtype, monkeypatch):
    """Across chains of 256 tokens and neurons, panels of 16, blocks of 256 rows; NaN beyond the widest stays there."""
    monkeypatch.setenv("FLEXTRON_KERNEL", "tile")
    T, K, F, N, widest = 300, 20, 310, 24, 283
    shapes = ((T, K), (F, K), (F, K), (N, F), (F,), (F,), (N,))
    values = [(torch.randn(*shape) * 0.3).to(dtype) for shape in shapes]
    for value in values[1:6]:
        (value if value.shape[0] == F else value.T)[widest:] = torch.nan
    if not gated:
        values[1] = values[4] = None
    dy = torch.randn(T, N).to(dtype)
    extent = torch.randint(0, widest + 1, (T,))
    extent[7] = widest
    gate = torch.rand(T, 2) if mode == "gate" else None
    arguments = dict(
        width=dict(width=widest),
        extent=dict(width=widest, extent=extent),
        gate=dict(width=F, choices=[100, widest]),
    )[mode]

    def gradients(run, values, gate, dy):
        leaves = grown([*values, gate])
        return grads(run(*leaves[:-1], gate=leaves[-1], **arguments), leaves, dy)

    clean = [None if v is None else torch.nan_to_num(v) for v in values]
    wide = [None if v is None else v.double() for v in (*clean, gate, dy)]
    for i, (ours, plain, exact) in enumerate(
        zip(
            gradients(elastic_mlp, values, gate, dy),
            gradients(reference.elastic_mlp, clean, gate, dy),
            gradients(reference.elastic_mlp, wide[:7], *wide[7:]),
            strict=True,
        )
    ):
        assert_no_worse(ours, plain, exact, f"gradient {i}", dtype)


def test_neurons_beyond_the_largest_choice_are_not_used():
    values = inputs()
    live = torch.arange(NEURONS) < 16
    poisoned = list(values)
    poisoned[2] = torch.where(live[:, None], values[2], torch.nan)
    poisoned[3] = torch.where(live, values[3], torch.nan)
    gate = torch.rand(T, 2)
    arguments = dict(width=24, gate=gate, choices=[8, 16])
    assert torch.equal(elastic_mlp(*poisoned, **arguments), elastic_mlp(*values, **arguments))


def test_a_token_ignores_poison_that_only_wider_tokens_read():
    values = inputs()
    values[2][10:] = torch.nan
    extent = torch.tensor([10, 24, 4, 0, 10, 24, 1, 2, 3, 4, 5])
    y = elastic_mlp(*values, 24, extent=extent)
    assert y[extent <= 10].isfinite().all() and y[extent > 10].isnan().all()


def test_permuting_tokens_permutes_outputs():
    x, *weights = inputs()
    extent, order = torch.randint(0, 25, (T,)), torch.randperm(T)
    y = elastic_mlp(x, *weights, 24, extent=extent)
    torch.testing.assert_close(elastic_mlp(x[order], *weights, 24, extent=extent[order]), y[order])


def test_width_zero_keeps_only_the_bias():
    values = inputs()
    for arguments in (dict(width=0), dict(width=24, extent=torch.zeros(T, dtype=torch.int32))):
        assert torch.equal(elastic_mlp(*values, **arguments), values[-1].expand(T, N))
    assert not elastic_mlp(*values[:-1], None, 0).any()


def test_a_soft_gate_is_the_mixture_of_widths():
    values = inputs(dtype=torch.float64)
    gate, choices = torch.rand(T, 3, dtype=torch.float64), [4, 13, 24]
    values[-1] = None  # the mixture adds the bias once, not once per choice
    mixture = sum(gate[:, c : c + 1] * elastic_mlp(*values, d) for c, d in enumerate(choices))
    torch.testing.assert_close(elastic_mlp(*values, 24, gate=gate, choices=choices), mixture)


def test_a_hard_gate_is_that_width():
    values, choices = inputs(), [4, 13, 24]
    for c, d in enumerate(choices):
        gate = F.one_hot(torch.tensor([c]), 3).float()
        torch.testing.assert_close(
            elastic_mlp(*values, 24, gate=gate, choices=choices), elastic_mlp(*values, d)
        )


def test_rows_of_several_tiles():
    values = inputs(T=1200)
    extent, gate = torch.randint(0, 25, (1200,)), torch.rand(1200, 2)
    for arguments in (dict(), dict(extent=extent), dict(gate=gate, choices=[7, 24])):
        torch.testing.assert_close(
            elastic_mlp(*values, 24, **arguments), reference.elastic_mlp(*values, 24, **arguments)
        )


def test_expanded_and_transposed_gradients():
    leaves, gate = (
        grown(inputs(dtype=torch.float64)),
        torch.rand(1, 2, dtype=torch.float64, requires_grad=True),
    )
    for spread in (lambda y: y.sum(), lambda y: (y.T @ torch.ones(T, 3, dtype=y.dtype)).sum()):
        ours, theirs = (
            torch.autograd.grad(spread(run(*leaves, 24, gate=gate, choices=[5, 20])), [*leaves, gate])
            for run in (elastic_mlp, reference.elastic_mlp)
        )
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
def test_gradcheck(activation, gated):
    leaves = grown(inputs(gated, torch.float64, T=3))
    given_leaves = [leaf for leaf in leaves if leaf is not None]
    gate = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)

    def soft(gate, *given):
        return elastic_mlp(*rebuilt(leaves, given), 20, activation, gate=gate, choices=[5, 17])

    def per_token(*given):
        return elastic_mlp(*rebuilt(leaves, given), 20, activation, extent=torch.tensor([0, 13, 20]))

    # Thousands of launches otherwise.
    assert torch.autograd.gradcheck(soft, (gate, *given_leaves), fast_mode=KERNELS)
    assert torch.autograd.gradcheck(per_token, given_leaves, fast_mode=KERNELS)


def rebuilt(leaves, given):
    given = iter(given)
    return [None if leaf is None else next(given) for leaf in leaves]


@pytest.mark.parametrize("asks", [asks for asks in product([False, True], repeat=4) if any(asks)])
def test_every_combination_of_gradients(asks):
    """Of x, the gated branch, the rest of the weights, and the gate."""
    ask = dict(zip(("x", "w_gate", "w_up", "gate"), asks, strict=True))
    ask |= {
        "b_gate": ask["w_gate"],
        "b_up": ask["w_up"],
        "w_down": ask["x"] != ask["w_up"],
        "b_down": ask["w_gate"],
    }
    leaves = [
        v.clone().requires_grad_(ask[name])
        for name, v in zip(NAMES, inputs(dtype=torch.float64), strict=True)
    ]
    leaves.append(torch.rand(T, 2, dtype=torch.float64).requires_grad_(ask["gate"]))
    results = []
    for run in (elastic_mlp, reference.elastic_mlp):
        y = run(*leaves[:-1], 20, gate=leaves[-1], choices=[5, 17])
        y.square().sum().backward()
        results.append([leaf.grad for leaf in leaves])
        for leaf in leaves:
            leaf.grad = None
    for ours, theirs in zip(*results, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_fuzz(data):
    draw = data.draw
    T, gated = draw(st.integers(0, 257)), draw(st.booleans())
    width = draw(st.integers(1, NEURONS))
    activation = draw(st.sampled_from(list(reference.ACTIVATIONS)))
    kind = draw(st.sampled_from(["static", "one", "token", "same", "gate"]))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    arguments = {
        "static": lambda: {},
        "one": lambda: dict(extent=torch.tensor([draw(st.integers(0, width))])),
        "token": lambda: dict(extent=torch.randint(0, width + 1, (T,))),
        "same": lambda: dict(extent=torch.full((T,), draw(st.integers(0, width)))),
        "gate": lambda: dict(
            gate=torch.rand(T, 2, dtype=torch.float64).requires_grad_(), choices=[width // 2, width]
        ),
    }[kind]()
    leaves = grown(inputs(gated, torch.float64, T))
    wanted = [leaf for leaf in (*leaves, arguments.get("gate")) if leaf is not None]
    ours = elastic_mlp(*leaves, width, activation, **arguments)
    theirs = reference.elastic_mlp(*leaves, width, activation, **arguments)
    torch.testing.assert_close(ours, theirs)
    dy = torch.randn_like(ours)
    for mine, other in zip(
        torch.autograd.grad(ours, wanted, dy),
        torch.autograd.grad(theirs, wanted, dy, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(mine, torch.zeros_like(mine) if other is None else other)


GATE = torch.rand(T, 2)
BAD = [
    (dict(width=25), ValueError, r"width must lie in \[0, 24\], got 25"),
    (
        dict(activation="tanh"),
        ValueError,
        "activation must be one of relu, relu2, gelu, gelu_tanh, silu, got tanh",
    ),
    (dict(w_down=torch.randn(6, 23)), ValueError, r"w_down must have shape \[6, 24\], got \[6, 23\]"),
    (dict(w_gate=torch.randn(24, 7)), ValueError, r"w_gate must have shape \[24, 8\], got \[24, 7\]"),
    (dict(w_gate=None), ValueError, "b_gate must be None without w_gate, got a tensor"),
    (dict(b_up=torch.randn(24).double()), TypeError, "b_up must have the dtype of x"),
    (
        dict(extent=torch.ones(3, dtype=torch.int64)),
        ValueError,
        r"extent must have shape \[1\] or \[11\], got \[3\]",
    ),
    (dict(gate=GATE), ValueError, "choices must be given with gate, got None"),
    (dict(choices=[1]), ValueError, "gate must be given with choices, got None"),
    (dict(gate=GATE, choices=[9, 4]), ValueError, r"choices must be ascending and not empty, got \[9, 4\]"),
    (dict(gate=GATE, choices=[4, 25]), ValueError, r"choices must lie in \[0, 24\], got 25"),
    (
        dict(gate=GATE[:3], choices=[4, 9]),
        ValueError,
        r"gate must have shape \[1, 2\] or \[11, 2\], got \[3, 2\]",
    ),
    (
        dict(gate=GATE, choices=[4, 9], extent=torch.tensor([1])),
        ValueError,
        "extent must be None when gate is given",
    ),
]


@pytest.mark.parametrize("extent, allowed", [(25, 24), (-1, 0)])
def test_a_wrong_extent_is_refused_where_the_host_reads_it(extent, allowed):
    """And moved into its range where it does not: a kernel never reads or writes beside its tensors."""
    values = inputs()
    for count in (1, T):
        if KERNELS:
            ours, expected = (
                elastic_mlp(*values, 24, extent=torch.tensor([e] * count)) for e in (extent, allowed)
            )
            assert torch.equal(ours, expected)
        else:
            with pytest.raises(
                RuntimeError, match=rf"elastic_mlp: extent must lie in \[0, 24\], got {extent}"
            ):
                elastic_mlp(*values, 24, extent=torch.tensor([extent] * count))


@pytest.mark.parametrize("change, error, message", BAD, ids=[message[:30] for _, _, message in BAD])
def test_bad_arguments_get_one_sentence(change, error, message):
    arguments = dict(zip(NAMES, inputs(), strict=True)) | dict(width=24) | change
    with pytest.raises(error, match=f"elastic_mlp: {message}"):
        elastic_mlp(**arguments)
    with pytest.raises(RuntimeError, match="elastic_mlp: "):  # the op itself checks too
        torch.ops.flextron.elastic_mlp(**arguments)


CURVES = {
    "relu": torch.relu,
    "relu2": lambda x: torch.relu(x) ** 2,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "silu": torch.nn.functional.silu,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", CURVES)
def test_an_activation_has_its_limits(activation, dtype):
    """From -inf to inf; where plain PyTorch has NaN (infinity times 0) the limit stands."""
    great = [9999.0, 1e5, 1e10, 1e37, 3e38, torch.inf]
    some = [20.0, 50.0, 86.0, 88.2, 88.5, 89.0, 104.0, *great]
    x = torch.tensor([*(-value for value in some), *some, *torch.linspace(-12, 12, 97).tolist()]).to(dtype)
    one = torch.ones(1, 1, dtype=dtype)

    def curve(x):
        return elastic_mlp(x[:, None], None, one, one, None, None, None, 1, activation)[:, 0]

    near = x.double().clamp(-1e4, 1e4).requires_grad_()
    value = CURVES[activation](near)
    slope = torch.autograd.grad(value.sum(), near)[0]
    beyond = x.double() > 1e4
    value = torch.where(beyond, x.double() ** (2 if activation == "relu2" else 1), value.detach())
    slope = torch.where(beyond & torch.tensor(activation == "relu2"), 2 * x.double(), slope)
    leaf = x.clone().requires_grad_()
    recorded = curve(leaf)
    found = dict(
        value=curve(x), recorded=recorded.detach(), slope=torch.autograd.grad(recorded.sum(), leaf)[0]
    )
    bound = dict(rtol={torch.float32: 1e-5, torch.float64: 1e-12}.get(dtype, 1e-2), atol=2e-6)
    for name, exact in (("value", value), ("recorded", value), ("slope", slope)):
        torch.testing.assert_close(
            found[name].double(), exact.to(dtype).double(), **bound, msg=lambda m, name=name: f"{name}: {m}"
        )
        assert not found[name][x <= -9999].any()
    spoiled = torch.full((1,), torch.nan, dtype=dtype)
    assert curve(spoiled).isnan().all()
