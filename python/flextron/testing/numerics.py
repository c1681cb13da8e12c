"""assert_no_worse: the one tolerance of the project, a rule and not a number."""

from __future__ import annotations

import torch
from torch import Tensor

# Relative Frobenius error that no result may exceed, unless plain PyTorch comes as close to it or exceeds it.
FROBENIUS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 5e-3}


def assert_no_worse(
    ours: Tensor, plain: Tensor, exact: Tensor, what: str = "result", computed_in: torch.dtype | None = None
) -> None:
    """Fail unless our error is at most twice plain PyTorch's in the same dtype, and small in itself.

    Args:
        ours: the result under test.
        plain: the same computation in plain PyTorch, in the dtype of ours.
        exact: the same computation in float64 from the same inputs.
        what: the name the message gives the result.
        computed_in: the dtype of the computation, where the result has a finer one.
    """
    assert ours.dtype == plain.dtype, f"{what}: dtype is {ours.dtype}, plain PyTorch gives {plain.dtype}"
    assert ours.shape == exact.shape, f"{what}: shape is {list(ours.shape)}, should be {list(exact.shape)}"
    dtype = max((ours.dtype, computed_in or ours.dtype), key=lambda dtype: torch.finfo(dtype).eps)
    wide, reference = ours.double(), exact.double()
    finite = reference.isfinite()
    assert torch.equal(wide[~finite], reference[~finite]), f"{what}: infinities differ"
    assert wide[finite].isfinite().all(), f"{what}: not finite where the exact result is"
    if not finite.any():
        return
    error = _norm((wide - reference)[finite])
    size = _norm(reference[finite])
    plain_error = _norm((plain.double() - reference)[finite])
    limit = max(FROBENIUS[dtype] * size, 1.25 * plain_error)
    assert error <= limit, f"{what}: error is {error:.3e}, must be below {limit:.3e}, of {size:.3e}"
    if dtype == torch.float64:  # nothing more exact to measure plain PyTorch against
        return
    # One unit in the last place, spread over the elements: with few of them plain PyTorch may be lucky.
    tiny = torch.finfo(dtype).eps * size / finite.sum().item() ** 0.5
    assert error <= 2 * plain_error + tiny, (
        f"{what}: error is {error:.3e}, plain PyTorch's {plain_error:.3e}, of {size:.3e}"
    )


def _norm(x: Tensor) -> float:
    return torch.linalg.vector_norm(x).item()
