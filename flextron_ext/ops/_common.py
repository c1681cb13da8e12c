"""Shared by the op files: checks of arguments before the call, autocast, gradients, and refusals by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int32, torch.int64)
_INTEGER = (int, torch.SymInt)

_library = torch.library.Library("flextron", "IMPL")


def check_tensor(op: str, name: str, value: object, dtypes: Sequence[torch.dtype]) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    if value.layout is not torch.strided:
        raise TypeError(f"{op}: {name} must be a dense tensor, got {value.layout}")
    if value.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{op}: {name} must be {names}, got {str(value.dtype).removeprefix('torch.')}")
    return value


def check_finite(op: str, name: str, value: float | None) -> None:
    """Raise unless a setting, which the kernels take as float32, is a finite number or None."""
    if value is None:
        return
    try:
        finite = math.isfinite(value)
    except TypeError:
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}") from None
    if not finite:
        raise ValueError(f"{op}: {name} must be finite, got {value}")


def check_shape(op: str, name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if value.shape != shape:
        raise ValueError(f"{op}: {name} must have shape {list(shape)}, got {list(value.shape)}")


def check_range(op: str, name: str, value: int, low: int, high: int) -> None:
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, _INTEGER)):
        raise TypeError(f"{op}: {name} must be an integer, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{op}: {name} must lie in [{low}, {high}], got {value}")


def check_extent(op: str, name: str, value: Tensor | None, rows: int) -> Tensor | None:
    """Flatten an extent, which has one value or one per row (in any dimensions). Its values are not read."""
    if value is None:
        return None
    check_tensor(op, name, value, INTEGERS)
    if value.numel() not in (1, rows):
        raise ValueError(f"{op}: {name} must have shape [1] or [{rows}], got {list(value.shape)}")
    return value.reshape(-1)


def will_cast(x: Tensor) -> bool:
    """Whether autocast will cast the arguments that come with x."""
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def check_same(op: str, x: Tensor, **others: Tensor | None) -> None:
    """Raise unless the others have the dtype and device of x. Under autocast, which casts later, dtypes may differ."""
    dtype, device = x.dtype, x.device
    for name, value in others.items():
        if value is None:
            continue
        check_tensor(op, name, value, FLOATING)
        if value.dtype != dtype and not will_cast(x):
            raise TypeError(f"{op}: {name} must have the dtype of x, {dtype}, got {value.dtype}")
        if value.device != device:
            raise ValueError(f"{op}: {name} must be on {device}, got {value.device}")


def as_rows(x: Tensor, rows: int) -> Tensor:
    """x [..., K] as [rows, K]. A matrix is returned as it is, since a view would be one more node in the backward."""
    return x if x.dim() == 2 else x.reshape(rows, x.shape[-1])


def shaped_as(x: Tensor, y: Tensor) -> Tensor:
    """y [rows, N] as [..., N], with the leading dimensions of x [..., K]."""
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


def call(op: Callable[..., Any], *args: object) -> Any:
    """op(*args). If no gradient is recorded, the call skips the op's autograd kernel, which is written in Python."""
    if torch.is_grad_enabled() or forward_ad._current_level >= 0 or torch.compiler.is_compiling():
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def call_writing(written: Sequence[Tensor], op: Callable[..., Any], *args: object) -> Any:
    """call() for an op that writes into tensors: their versions are bumped even if the autograd kernel is skipped."""
    output = call(op, *args)
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(written)
    return output


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
            if isinstance(value, Tensor) and value.dtype in FLOATING and value.dtype != torch.float64:
                return value.to(torch.get_autocast_dtype(device))
            return value

        def kernel(*args: object) -> object:
            with torch._C._ExcludeDispatchKeyGuard(excluded):
                return overload(*(cast(a) if i in positions else a for i, a in enumerate(args)))

        _library.impl(op, kernel, key)

    under("cpu", "AutocastCPU")
    under("cuda", "AutocastCUDA")


def named_tensors(op: str, inputs: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """(name, value) for each input that the schema declares as a tensor; the members of a list come one by one."""
    for argument, value in zip(
        getattr(torch.ops.flextron, op).default._schema.arguments, inputs, strict=False
    ):
        if "Tensor" not in str(argument.type) or (value is None and "Optional" in str(argument.type)):
            continue
        yield from (
            ((argument.name, v) for v in value) if isinstance(value, list) else [(argument.name, value)]
        )


def refuse_duals(op: str, inputs: Sequence[object]) -> None:
    """Raise on dual tensors, whose forward-mode gradients would silently be zeros."""
    for name, value in named_tensors(op, inputs):
        if forward_ad.unpack_dual(value).tangent is not None:
            raise NotImplementedError(
                f"{op}: {name} must not be a dual tensor: it has no forward-mode gradient"
            )


def register_autograd_kernel(op: str, recorded: Callable[..., object], is_constant: bool = False) -> None:
    """Register the op's autograd kernel: recorded(*inputs) if an input needs a gradient, else the op itself.

    Tangents are refused, unless the op is constant and so their gradient is zero. Tensors that the op writes into get a
    new version.
    """
    overload = getattr(torch.ops.flextron, op).default
    arguments = overload._schema.arguments
    defaults = tuple(argument.default_value for argument in arguments)
    written = [i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]

    def kernel(*inputs: Any) -> object:
        if forward_ad._current_level >= 0 and not is_constant:
            refuse_duals(op, inputs)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            return recorded(*inputs, *defaults[len(inputs) :])
        with torch._C._AutoDispatchBelowAutograd():
            output = overload(*inputs)
        for i in written:
            torch.autograd.graph.increment_version(inputs[i])
        return output

    _library.impl(op, kernel, "Autograd")


def register_gradient(
    op: str, setup_context: Callable[..., None], backward: Callable[..., object], is_constant: bool = False
) -> Callable[..., Any]:
    """Give the op a gradient, and return the function that records it, which takes all inputs.

    Replaces torch.library.register_autograd, whose overhead is twice as large and which torch.func does not support. An
    output without a gradient gives None to ``backward``, not zeros.
    """
    overload = getattr(torch.ops.flextron, op).default

    def on_next_level(*inputs: object) -> object:
        """Turn on the gradient modes that a Function's forward turns off: torch.func's outer levels need them."""
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            return overload(*inputs)

    def forward(ctx, *inputs: object) -> object:
        ctx.set_materialize_grads(False)
        with torch._C._AutoDispatchBelowAutograd():
            output = (
                on_next_level(*inputs) if torch._C._are_functorch_transforms_active() else overload(*inputs)
            )
        setup_context(ctx, inputs, output)
        return output

    def of_any(ctx, *gradients: Tensor | None) -> object:
        if all(gradient is None for gradient in gradients):
            return (None,) * len(ctx.needs_input_grad)
        return backward(ctx, *gradients)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(of_any)}
    function: Any = type(f"{op}_function", (torch.autograd.Function,), methods)
    direct = super(
        torch.autograd.Function, function
    ).apply  # Function.apply inspects each input, and refuses torch.func

    def apply(*inputs: object) -> object:
        if torch._C._are_functorch_transforms_active():
            with enable_single_level_autograd_function():  # a kernel sees only one of the levels
                return direct(*inputs)
        return direct(*inputs)

    register_autograd_kernel(op, apply, is_constant)
    return apply


def refuse_gradient(op: str) -> None:
    """Let an op without a gradient raise in the backward, instead of returning a wrong zero."""

    def refuse(ctx, *gradients: Tensor) -> None:
        raise NotImplementedError(f"{op}: inputs must not need a gradient through it: it has none")

    register_gradient(op, lambda ctx, inputs, output: None, refuse)


def refuse_gradient_of_mutating(op: str) -> None:
    """The same for an op that writes into its arguments, to which torch gives no backward: it raises when called."""

    def refuse(*inputs: object) -> None:
        raise NotImplementedError(f"{op}: inputs must not need a gradient through it: it has none")

    register_autograd_kernel(op, refuse)


def register_fake(op: str) -> Callable[[Callable[..., object]], Callable[..., object]]:
    """Register the function that gives shapes without computing; tensors on several devices are refused."""

    def register(shapes: Callable[..., object]) -> Callable[..., object]:
        def fake(*inputs: object, **named: object) -> object:
            check_one_device(op, inputs)
            return shapes(*inputs, **named)

        torch.library.register_fake(f"flextron::{op}", fake)
        return shapes

    return register


def check_one_device(op: str, inputs: Sequence[object]) -> None:
    devices = [(name, value.device) for name, value in named_tensors(op, inputs)]
    expected = next((device for _, device in devices if device.type != "meta"), devices[0][1])
    for name, device in devices:
        if device != expected:
            raise ValueError(f"{op}: {name} must be on {expected}, got {device}")


def refuse_other_tensors(op: str) -> None:
    """If torch has no kernel for a device or a layout, raise one sentence that names the argument."""

    def refuse(*inputs: object) -> None:
        for name, value in named_tensors(op, inputs):
            if value is None:
                raise TypeError(f"{op}: {name} must be a tensor, got None")
            if value.layout is not torch.strided or value.is_quantized or value.is_nested:
                kind = "quantized" if value.is_quantized else "nested" if value.is_nested else value.layout
                raise TypeError(f"{op}: {name} must be a dense tensor, got {kind}")
        devices = {str(value.device) for _, value in named_tensors(op, inputs)}
        raise NotImplementedError(
            f"{op}: tensors must be on a device that this build has kernels for, got {', '.join(sorted(devices))}"
        )

    for key in ("CompositeExplicitAutograd", "NestedTensorCPU", "NestedTensorCUDA"):
        _library.impl(op, refuse, key)
