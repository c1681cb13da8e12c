"""What is peculiar to prefix_gate, the worked example: nothing beyond a width is used, and widths stay in range."""

import pytest
import torch

from flextron_ext import prefix_gate


def test_what_is_beyond_a_width_is_never_used(device):
    x = torch.randn(3, 200, device=device)
    width = torch.tensor([0, 64, 130], device=device)
    beyond = torch.arange(200, device=device) >= width[:, None]
    x[beyond] = torch.nan
    x.requires_grad_()
    gate = torch.rand(3, device=device, requires_grad=True)
    y = prefix_gate(x, gate, width)
    dx, dgate = torch.autograd.grad(y, (x, gate), torch.where(beyond, torch.nan, torch.ones_like(y)))
    assert not y[beyond].any() and not dx[beyond].any()
    assert y.isfinite().all() and dx.isfinite().all() and dgate.isfinite().all() and dgate[0] == 0


def test_a_width_out_of_range_is_its_nearest_bound(device):
    x, gate = torch.randn(2, 5, device=device), torch.ones(2, device=device, requires_grad=True)
    y = prefix_gate(x, gate, torch.tensor([-3, 9], device=device))
    assert not y[0].any() and torch.equal(y[1], x[1])
    dgate = torch.autograd.grad(y.sum(), gate)[0]
    torch.testing.assert_close(dgate, torch.stack([x.new_zeros(()), x[1].sum()]))


GOOD = dict(x=torch.zeros(3, 4), gate=torch.zeros(3), width=torch.zeros(3, dtype=torch.int64))
BAD = [
    (dict(x=torch.zeros(3)), ValueError, "x must have 2 dimensions, got 1"),
    (dict(x=torch.zeros(3, 4, dtype=torch.int32)), TypeError, "x must be float32, .*got int32"),
    (dict(gate=torch.zeros(2)), ValueError, r"gate must have shape \[3\], got \[2\]"),
    (dict(gate=torch.zeros(3).double()), TypeError, "gate must be float32, got float64"),
    (dict(width=torch.zeros(3)), TypeError, "width must be int64, got float32"),
]


@pytest.mark.parametrize("change, error, message", BAD, ids=[message for _, _, message in BAD])
def test_bad_arguments_get_one_sentence(change, error, message):
    with pytest.raises(error, match=f"^prefix_gate: {message}"):
        prefix_gate(**GOOD | change)


RAW = [
    (dict(x=torch.zeros(3)), "x must have 2 dimensions, got 1"),
    (dict(gate=torch.zeros(2)), r"gate must have shape \[3\], got \[2\]"),
    (dict(width=torch.zeros(3)), "width must have dtype Long, got Float"),
]


@pytest.mark.parametrize("change, message", RAW, ids=[message for _, message in RAW])
def test_the_op_alone_says_the_same(change, message):
    with pytest.raises(RuntimeError, match=f"^prefix_gate: {message}"):
        torch.ops.flextron.prefix_gate(**GOOD | change)
