"""A CPU whose matrix unit takes 16-bit inputs by 32 (AMX): what lies behind the last one never gets into a result."""

from __future__ import annotations

import pytest
import torch
from emulator import build as emulator
from torch import Tensor

from flextron_ext import elastic_linear, elastic_mlp

pytestmark = pytest.mark.skipif(emulator.loaded(), reason="the vendor's GEMMs on a CPU")
INPUTS = 32
DTYPES = [torch.bfloat16, torch.float16]
WIDEST = 45  # no multiple of 32


class MatrixUnit:
    """The vendor's GEMMs, which in 16-bit types add 0 times the memory behind an operand's last inputs, up to 32."""

    calls = 0

    def __enter__(self) -> MatrixUnit:
        self.library = torch.library.Library("aten", "IMPL")
        for name, kernel in (("mm.out", self.mm), ("linear.out", self.linear)):
            self.library.impl(name, kernel, "CPU", allow_override=True)
        return self

    def __exit__(self, *_) -> None:
        self.library._destroy()

    def mm(self, a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
        self.calls += 1
        return out.copy_(a.float() @ b.float() + behind(a, 1)[:, None] + behind(b, 0))

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor) -> Tensor:
        return (
            self.mm(x, weight.T, out=out)
            if bias is None
            else out.copy_(
                x.float() @ weight.float().T + behind(x, 1)[:, None] + behind(weight, 1) + bias.float()
            )
        )


def behind(t: Tensor, dim: int) -> Tensor:
    """0 times the sum of what is behind each row's (dim 1) or column's last input, as far as there is memory."""
    rows, inputs = torch.arange(t.shape[1 - dim]), torch.arange(-t.shape[dim] % INPUTS) + t.shape[dim]
    places = t.storage_offset() + rows[:, None] * t.stride(1 - dim) + inputs * t.stride(dim)
    memory = t.as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0)
    there = places < memory.numel()
    return torch.where(there, memory[places.clamp(max=memory.numel() - 1)].float() * 0, 0).sum(1)


def leaves(*values: Tensor | None) -> list[Tensor | None]:
    return [
        None if v is None else v.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        for v in values
    ]


def results(run, values: list[Tensor | None]) -> list[Tensor]:
    """The result without a gradient, the one with, and the gradients."""
    with torch.no_grad():
        plain = run(*values)
    given = leaves(*values)
    y = run(*given)
    wanted = [v for v in given if v is not None]
    return [
        plain,
        y.detach(),
        *torch.autograd.grad(y, wanted, torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype)),
    ]


def apart(weight: Tensor) -> Tensor:
    """The same values, whose rows' elements are not adjacent."""
    return weight.T.contiguous().T


def assert_clean(run, values: list[Tensor | None], spoil) -> None:
    """With a matrix unit and NaN where nothing is used the results are those without either."""
    clean = results(run, values)
    spoiled = [None if v is None else v.clone(memory_format=torch.preserve_format) for v in values]
    spoil(spoiled)
    with MatrixUnit() as unit:
        ours = results(run, spoiled)
    assert unit.calls > 0
    for mine, theirs in zip(ours, clean, strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)


def test_the_unit_shows_what_lies_behind():
    x, w = torch.randn(3, 64, dtype=torch.bfloat16), torch.randn(5, 64, dtype=torch.bfloat16)
    x[1, 50] = torch.nan
    with MatrixUnit():
        out = torch.mm(x[:, :45], w[:, :45].T, out=torch.empty(3, 5, dtype=x.dtype))
    assert out[1].isnan().all() and out[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("side", ["in", "out", "blocks", "asked"])
def test_elastic_linear(side, dtype, monkeypatch):
    T, K, N = 37, 70, 50
    x, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((T, K), (N, K), (N,)))
    extent = torch.randint(0, WIDEST + 1, (T,))
    extent[3] = WIDEST
    if side == "asked":
        monkeypatch.setenv("FLEXTRON_KERNEL", "vendor")
    else:
        weight = apart(weight)
    options = {
        "in": dict(in_features=WIDEST, out_features=N, in_extent=extent),
        "asked": dict(in_features=WIDEST, out_features=N, in_extent=extent),
        "out": dict(in_features=WIDEST, out_features=WIDEST, out_extent=extent),
        "blocks": dict(in_features=13, out_features=9, in_blocks=2, out_blocks=2),
    }[side]

    def spoil(values):
        x, weight, _ = values
        if side == "blocks":
            for part in (x.view(T, 2, -1)[..., 13:], weight.unflatten(1, (2, -1))[..., 13:]):
                part.fill_(torch.nan)
            return
        x[:, WIDEST:] = weight[:, WIDEST:] = torch.nan
        if "in_extent" in options:
            x[torch.arange(K) >= extent[:, None]] = torch.nan

    assert_clean(lambda x, w, b: elastic_linear(x, w, b, **options), [x, weight, bias], spoil)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "why, mode",
    [*((why, mode) for why in ("apart", "strides", "asked") for mode in ("width", "extent")), ("gate", None)],
)
def test_elastic_mlp(why, mode, dtype, monkeypatch):
    """Whatever leaves an MLP to the vendor: rows apart, gate and up of different strides, a soft gate, being asked."""
    T, K, F, N = 37, 50, 70, 30
    values = [
        (torch.randn(*shape) * 0.3).to(dtype) for shape in ((T, K), (F, K), (F, K), (N, F), (F,), (F,), (N,))
    ]
    if why in ("apart", "gate"):
        values[1:4] = [apart(w) for w in values[1:4]]
    if why == "strides":
        values[1] = torch.randn(F, K + 6).to(dtype)[:, :K]
    if why == "asked":
        monkeypatch.setenv("FLEXTRON_KERNEL", "vendor")
    extent = torch.randint(0, WIDEST + 1, (T,))
    extent[3] = WIDEST
    options = dict(width=WIDEST, extent=extent) if mode == "extent" else dict(width=WIDEST)
    if why == "gate":
        options = dict(width=F, gate=torch.rand(T, 2), choices=[20, WIDEST])

    def run(*values):
        values = list(values)
        if why == "strides":  # as a leaf has none
            values[1] = torch.cat((values[1], torch.full((F, 6), torch.nan, dtype=dtype)), 1)[:, :K]
        return elastic_mlp(*values, **options)

    def spoil(values):
        for weight in values[1:6]:
            (weight if weight.shape[0] == F else weight.T)[WIDEST:] = torch.nan

    assert_clean(run, values, spoil)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_soft_gate_on_ordinary_weights(dtype):
    T, K, F, N = 5, 50, 70, 30
    x, gate, up, down = ((torch.randn(*shape) * 0.3).to(dtype) for shape in ((T, K), (F, K), (F, K), (N, F)))
    soft = torch.rand(T, 2)

    def run(*values):
        with torch.no_grad():
            return elastic_mlp(*values, None, None, None, F, gate=soft, choices=[20, WIDEST])

    clean = run(x, gate, up, down)
    gate[WIDEST:] = up[WIDEST:] = down[:, WIDEST:] = torch.nan
    with MatrixUnit() as unit:
        ours = run(x, gate, up, down)
    assert unit.calls > 0 and torch.equal(ours, clean)
