"""What the op files share: argument checks before the call, autocast, and the refusal of second gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int32, torch.int64)
_INTEGER = (int, torch.SymInt)

_library = torch.library.Library("flextron", "IMPL")


def check_tensor(op: str, name: str, value: object, dtypes: Sequence[torch.dtype]) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{op}: {name} must be {names}, got {str(value.dtype).removeprefix('torch.')}")


def check_shape(op: str, name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if value.shape != shape:
        raise ValueError(f"{op}: {name} must have shape {list(shape)}, got {list(value.shape)}")


def check_range(op: str, name: str, value: int, low: int, high: int) -> None:
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, _INTEGER)):
        raise TypeError(f"{op}: {name} must be an integer, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{op}: {name} must lie in [{low}, {high}], got {value}")


def check_extent(op: str, name: str, value: Tensor | None, rows: int) -> Tensor | None:
    """An extent as one dimension: one value, or one per row (any leading dimensions). Its values stay on its device."""
    if value is None:
        return None
    check_tensor(op, name, value, INTEGERS)
    if value.numel() not in (1, rows):
        raise ValueError(f"{op}: {name} must have shape [1] or [{rows}], got {list(value.shape)}")
    return value.reshape(-1)


def check_same(op: str, x: Tensor, **others: Tensor | None) -> None:
    """The dtype and the device of x for every other tensor; autocast, which casts later, excuses the dtype."""
    dtype, device = x.dtype, x.device
    for name, value in others.items():
        if value is None:
            continue
        check_tensor(op, name, value, FLOATING)
        if value.dtype != dtype and not torch.is_autocast_enabled(device.type):
            raise TypeError(f"{op}: {name} must have the dtype of x, {dtype}, got {value.dtype}")
        if value.device != device:
            raise ValueError(f"{op}: {name} must be on {device}, got {value.device}")


def as_rows(x: Tensor, rows: int) -> Tensor:
    """x [..., K] as [rows, K]; itself where it is that, since a view is one more gradient to go through."""
    return x if x.dim() == 2 else x.reshape(rows, x.shape[-1])


def shaped_as(x: Tensor, y: Tensor) -> Tensor:
    """y [rows, N] as [..., N], where x is [..., K]."""
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


def call(op: Callable[..., object], *args: object) -> object:
    """op(*args). Where no gradient is recorded the op goes past its own kernels for autograd, which are Python's."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def wanted(ctx, *positions: int) -> int:
    """output_mask: bit i is set when the input at positions[i] needs its gradient."""
    return sum(1 << i for i, position in enumerate(positions) if ctx.needs_input_grad[position])


def per_input(mask: int, gradients: Sequence[Tensor]) -> list[Tensor | None]:
    return [gradient if mask >> i & 1 else None for i, gradient in enumerate(gradients)]


def register_autocast(op: str, *positions: int) -> None:
    """Cast the floating arguments at these positions to the autocast dtype, on the CPU and on CUDA."""
    overload = getattr(torch.ops.flextron, op).default

    def under(device: str, key: str) -> None:
        excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def cast(value: object) -> object:
            eligible = isinstance(value, Tensor) and value.dtype in FLOATING and value.dtype != torch.float64
            return value.to(torch.get_autocast_dtype(device)) if eligible else value

        def kernel(*args: object) -> object:
            with torch._C._ExcludeDispatchKeyGuard(excluded):
                return overload(*(cast(a) if i in positions else a for i, a in enumerate(args)))

        _library.impl(op, kernel, key)

    under("cpu", "AutocastCPU")
    under("cuda", "AutocastCUDA")


def register_autograd_kernel(op: str, recorded: Callable[..., object]) -> None:
    """What the op is where autograd sees it: recorded(*inputs) where one needs a gradient, itself elsewhere."""
    overload = getattr(torch.ops.flextron, op).default
    defaults = tuple(argument.default_value for argument in overload._schema.arguments)

    def kernel(*inputs: object) -> object:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            return recorded(*inputs, *defaults[len(inputs) :])
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*inputs)

    _library.impl(op, kernel, "Autograd")


def register_gradient(
    op: str, setup_context: Callable[..., None], backward: Callable[..., object]
) -> Callable[..., object]:
    """Give the op a formula, and return what records it, which takes all inputs.

    As torch.library.register_autograd, which takes twice as long beyond the op, and without zeros for the gradients of
    outputs that have none: those are None.
    """
    overload = getattr(torch.ops.flextron, op).default

    def forward(ctx, *inputs: object) -> object:
        ctx.set_materialize_grads(False)
        with torch._C._AutoDispatchBelowAutograd():
            output = overload(*inputs)
        setup_context(ctx, inputs, output)
        return output

    def of_any(ctx, *gradients: Tensor | None) -> object:
        if all(gradient is None for gradient in gradients):
            return (None,) * len(ctx.needs_input_grad)
        return backward(ctx, *gradients)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(of_any)}
    function = type(f"{op}_function", (torch.autograd.Function,), methods)

    def apply(*inputs: object) -> object:
        if torch._C._are_functorch_transforms_active():
            return function.apply(*inputs)
        return direct(*inputs)  # what that does then, without a look at each input

    direct = super(torch.autograd.Function, function).apply
    register_autograd_kernel(op, apply)
    return apply


def refuse_gradient(op: str) -> None:
    """An op without a gradient says so, instead of handing out a wrong zero."""

    def refuse(ctx, *gradients: Tensor) -> None:
        raise NotImplementedError(f"{op}: inputs must not need a gradient through it: it has none")

    torch.library.register_autograd(f"flextron::{op}", refuse)


def refuse_gradient_of_mutating(op: str) -> None:
    """The same for an op that writes into its arguments, for which torch takes no formula: it never runs."""

    def refuse(*inputs: object) -> None:
        raise NotImplementedError(f"{op}: inputs must not need a gradient through it: it has none")

    register_autograd_kernel(op, refuse)
