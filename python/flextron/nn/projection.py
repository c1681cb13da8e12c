"""What an elastic layer computes with instead of calling a projection: its weight, and LoRA adapters around it.

A layer keeps a prefix of a projection's features, so it reads the weight and never calls the projection. It must
therefore know everything that a call would do: `fault` names what it does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from flextron_ext import PanelFormat, elastic_linear, pack_linear, pack_mlp, packed_linear
from flextron_ext.ops.packed_linear import relaid

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of weights that can be packed
_LORA = ("peft.tuners.lora.layer", "Linear")  # PEFT's, which need not be installed
_ALIGN = ("accelerate.hooks", "AlignDevicesHook")
# what takes part in a layer by its weight: an nn.Linear, a PackedLinear, or PEFT's LoRA, which need not be installed
Projection = Any
_PLAIN = ("torch.nn.modules.", "transformers.", "flextron.nn.")
_FAKE = "torch._subclasses."  # what stands for a weight while a compiler looks
_SHARD = "torch.distributed.tensor.DTensor"  # what stands for a weight until FSDP gathers it for its layer's forward
RECORDER = "transformers.utils.output_capturing"
_LINEAR = (nn.Linear, Conv1D, FalconLinear)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class PackedLinear(nn.Module):
    """A linear layer in panels; with ``gate`` both halves of a gated one, panel by panel.

    Attributes:
        panels, scales, format: what `flextron_ext.pack_linear` returns.
        gate_bias: the bias of ``gate``.
    """

    panels: Tensor
    scales: Tensor | None
    format: PanelFormat

    def __init__(
        self,
        linear: nn.Linear,
        out_blocks: int = 1,
        format: PanelFormat | None = None,
        gate: nn.Linear | None = None,
        in_blocks: int = 1,
        products: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.in_blocks = in_blocks
        self.in_features, self.out_features = linear.in_features, linear.out_features
        if gate is None:
            panels, scales, self.format = pack_linear(linear.weight, out_blocks, format, in_blocks, products)
        else:
            both = pack_mlp(gate.weight, linear.weight, linear.weight[:0], format, products)
            panels, scales, self.format = both.up_panels, both.up_scales, both.format
        self.register_buffer("panels", panels, persistent=False)
        self.register_buffer("scales", scales, persistent=False)
        self.bias, self.gate_bias = linear.bias, None if gate is None else gate.bias

    @property
    def weight(self) -> NoReturn:
        raise NotImplementedError(
            "flextron: weights must be plain, got packed ones; do this before flextron.pack, or load the model again"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        """Panels without scales take the format of their new dtype; scales stay float32."""
        check_conversion(fn)
        scales = self.scales
        super()._apply(fn, recurse)
        if not self.format.scaled:
            self.format = PanelFormat.plain(self.panels.dtype)
            self.panels = relaid(self.panels, self.in_blocks, self.in_features, self.format)
        elif self.scales is not None and scales is not None and self.scales.dtype != scales.dtype:
            self.scales = scales
        return self

    def forward(self, x: Tensor) -> Tensor:
        sizes = self.in_features, self.out_features
        return packed_linear(x, self.panels, self.scales, self.format, self.bias, *sizes)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.format}"


class PackedRows(nn.Module):
    """A projection that has the outputs of several, each of them packed."""

    def __init__(
        self,
        linear: nn.Linear,
        rows: Sequence[slice],
        out_blocks: Sequence[int],
        format: Any,
        products: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.starts = [part.start for part in rows]
        self.parts: Any = nn.ModuleList()  # of PackedLinear
        for part, blocks in zip(rows, out_blocks, strict=True):
            self.parts.append(PackedLinear(view_of(linear, part), blocks, format, products=products))

    def part(self, rows: slice | None) -> PackedLinear:
        return self.parts[self.starts.index(0 if rows is None else rows.start)]


def view_of(linear: nn.Linear, rows: slice) -> nn.Linear:
    """A linear layer that has some outputs of another, without a copy."""
    view = nn.Linear(linear.in_features, rows.stop - rows.start, linear.bias is not None, device="meta")
    view.weight = nn.Parameter(linear.weight[rows], requires_grad=False)
    view.bias = None if linear.bias is None else nn.Parameter(linear.bias[rows], requires_grad=False)
    return view


def straight(proj: nn.Linear | Conv1D) -> nn.Linear:
    """A projection as a linear layer, whose weight is [outputs, inputs]."""
    if type(proj) is not Conv1D:
        return proj
    inputs, outputs = proj.weight.shape
    linear = nn.Linear(inputs, outputs, device="meta")
    linear.weight = nn.Parameter(proj.weight.T.contiguous(), requires_grad=False)
    linear.bias = proj.bias
    return linear


def check_conversion(fn: Callable[[Tensor], Tensor]) -> None:
    """Raise where ``fn`` would convert packed weights to a dtype or device that their kernels do not take."""
    found = fn(torch.empty(0))
    if found.dtype not in DTYPES or found.device.type != "cpu":
        raise NotImplementedError(
            "flextron: packed weights must stay float32, bfloat16 or float16 on cpu, got "
            f"{found.dtype} on {found.device}; do this before flextron.pack"
        )


def is_adapted(proj: Projection) -> bool:
    """Whether a projection is wrapped in PEFT's LoRA."""
    kind = type(proj)
    return (kind.__module__, kind.__name__) == _LORA


def is_alone(proj: Projection) -> bool:
    """Whether a projection consists of a weight and a bias, plain or packed, and nothing else."""
    if type(proj) is PackedLinear:
        return True
    return type(proj) in (nn.Linear, FalconLinear) and type(proj._parameters.get("weight")) in (
        nn.Parameter,
        Tensor,
    )


def linear(
    proj: Projection,
    x: Tensor,
    in_features: int,
    out_features: int,
    in_extent: Tensor | None = None,
    out_extent: Tensor | None = None,
    in_blocks: int = 1,
    out_blocks: int = 1,
    rows: slice | None = None,
) -> Tensor:
    """`flextron_ext.elastic_linear` with a projection: plain, packed, or with adapters.

    An adapter adds ``scaling * (x[:, :in] A[:, :in]^T) B[:out]^T``, in its own dtype, at a cost that falls with the
    width as the projection's does.

    Args:
        rows: the outputs that are meant where a projection has those of several; None: all are.
    """
    sizes = (in_features, out_features, in_extent, out_extent, in_blocks)
    if isinstance(proj, PackedRows):
        proj, rows = proj.part(rows), None
    if isinstance(proj, PackedLinear):
        return packed_linear(x, proj.panels, proj.scales, proj.format, proj.bias, *sizes)
    if type(proj) is Conv1D:
        return _transposed(proj, x, *sizes, out_blocks, rows)
    if not is_adapted(proj):
        return elastic_linear(x, rows_of(proj.weight, rows), rows_of(proj.bias, rows), *sizes, out_blocks)
    base, active = proj.base_layer, _active(proj)
    y = elastic_linear(x, rows_of(base.weight, rows), rows_of(base.bias, rows), *sizes, out_blocks)
    dtype = y.dtype
    for name in active:
        a, b = proj.lora_A[name].weight, proj.lora_B[name]
        low = proj.lora_dropout[name](x.to(a.dtype))
        low = elastic_linear(low, a, None, in_features, len(a), in_extent, None, in_blocks)
        weight, bias = rows_of(b.weight, rows), rows_of(b.bias, rows)
        low = elastic_linear(low, weight, bias, len(a), out_features, None, out_extent, 1, out_blocks)
        y = y + low * proj.scaling[name]
    return y.to(dtype)


def bias_of(proj: Projection) -> Tensor | None:
    """What a projection gives for zeros: its bias, and those of its adapters; None where it has none."""
    if not is_adapted(proj):
        return proj.bias
    parts = [proj.base_layer.bias]
    for name in _active(proj):
        bias = proj.lora_B[name].bias
        parts.append(None if bias is None else bias * proj.scaling[name])
    own = [part for part in parts if part is not None]
    return torch.stack(own).sum(0) if own else None


def rows_of(tensor: Any, rows: slice | None) -> Any:
    """What is meant of a projection's weight or bias; None of a bias that is not there."""
    return tensor if rows is None or tensor is None else tensor[rows]


def _transposed(
    proj: Conv1D,
    x: Tensor,
    in_features: int,
    out_features: int,
    in_extent: Tensor | None,
    out_extent: Tensor | None,
    in_blocks: int,
    out_blocks: int,
    rows: slice | None,
) -> Tensor:
    """The same with weights stored [inputs, outputs], by torch's GEMM: blocks are sliced, extents masked.

    Inputs beyond their extents are zeros, as every op of ours leaves them.
    """
    weight, bias = proj.weight, proj.bias
    if rows is not None:
        weight, bias = weight[:, rows], bias[rows]
    weight = weight.unflatten(1, (out_blocks, -1))[:, :, :out_features].flatten(1)
    bias = bias.unflatten(0, (out_blocks, -1))[:, :out_features].flatten()
    weight = weight.unflatten(0, (in_blocks, -1))[:, :in_features].flatten(0, 1)
    y = torch.nn.functional.linear(x, weight.T, bias)
    if out_extent is not None:
        kept = torch.arange(out_features, device=x.device) < out_extent.reshape(-1, 1, 1)  # [N, 1, out]
        y = (y.reshape(-1, out_blocks, out_features) * kept).view(y.shape)
    return y


def _active(proj: Projection) -> list[str]:
    """The adapters that a call would add now; like a call, it unmerges where adapters are disabled."""
    if proj.disable_adapters and proj.merged:
        proj.unmerge()
    if proj.disable_adapters or proj.merged:
        return []
    return [name for name in proj.active_adapters if name in proj.lora_A]


def check_parts(path: str, part: nn.Module, names: tuple[str, ...], others: tuple[str, ...] = ()) -> None:
    """Refuse a part of a layer, at ``path`` in its model, if its projections ``names`` do more than it would compute.

    Raises:
        NotImplementedError: the message names the module's path and class.
    """
    if (forward := part.__dict__.get("forward")) is not None and not goes_on(part):
        raise NotImplementedError(
            f"flextron: {path} must run the forward of its class, {named(part)}, which keeps to the budget, got "
            f"{getattr(forward, '__qualname__', forward)}"
        )
    for name, module in part._modules.items():
        if module is None:
            continue
        if name not in (*names, *others):
            raise NotImplementedError(
                f"flextron: {path} must have no modules but its own, which an elastic layer would pass over, got "
                f"{path}.{name}, {named(module)}"
            )
        if name in names and (wrong := fault(module)):
            raise NotImplementedError(
                f"flextron: {path}.{name} must be an nn.Linear or PEFT's LoRA of one, got {wrong}; an elastic layer "
                "reads its weight and never calls it"
            )


def check_plain(op: str, model: PreTrainedModel) -> None:
    """Raise NotImplementedError where a model has packed weights or adapters.

    Storing, packing or extracting a model reads plain weights, and would lose them.
    """
    if isinstance(model.lm_head, PackedLinear):
        raise NotImplementedError(
            f"{op}: weights must be plain, got packed ones; do this before flextron.pack"
        )
    for path, module in model.named_modules():
        if path and not type(module).__module__.startswith(_PLAIN):
            how = "; merge it first, by merge_and_unload()" if is_adapted(module) else ""
            raise NotImplementedError(f"{op}: weights must be plain, got {path}, {named(module)}{how}")
    for path, p in model.named_parameters():
        if type(p) is not nn.Parameter:
            raise NotImplementedError(f"{op}: weights must be plain, got {path}, {named(p)}")


def fault(proj: Projection) -> str | None:
    """What an elastic layer would ignore of a projection; None where there is nothing."""
    if not is_adapted(proj):
        return fault_of_call(proj) if type(proj) in (*_LINEAR, PackedLinear, PackedRows) else named(proj)
    for module in (proj.base_layer, *proj.lora_A.values(), *proj.lora_B.values()):
        if type(module) is not nn.Linear:
            return f"{named(proj)} of {named(module)}"
    for module in (proj, proj.base_layer, *proj.lora_A.values(), *proj.lora_B.values()):
        if found := fault_of_call(module):
            return found
    for name in _active(proj):
        if variant := proj.lora_variant.get(name):
            return f"{named(variant)} of adapter {name!r}; merge it first, by merge_and_unload()"
    return None


def fault_of_stock(module: nn.Module) -> str | None:
    """What is lost when a module of transformers is replaced by an elastic one; None where nothing is."""
    return fault_of_call(module) if type(module).__module__.startswith("transformers.") else named(module)


def fault_of_call(module: nn.Module) -> str | None:
    """What takes part in a call of the module: a hook, or a forward that replaces its own."""
    hook: Any = module.__dict__.get("_hf_hook")
    # a hook that only moves inputs to the module's device is not needed: the layer's own hook does the same
    if "forward" in module.__dict__ and not (goes_on(module) and not hook.offload):
        return f"{named(module)} with a forward of its own" + (f" ({named(hook)})" if hook else "")
    weight = module._parameters.get("weight")
    if (
        weight is not None
        and type(weight) not in (nn.Parameter, Tensor)
        and not named(weight).startswith((_FAKE, _SHARD))
    ):
        return f"{named(module)} with a weight that is a {named(weight)}"
    kind = next((kind for kind in _HOOKS if any(map(_acts, getattr(module, kind).values()))), None)
    return None if kind is None else f"{named(module)} with a hook in {kind}"


def _acts(hook: Any) -> bool:
    """Whether a hook may change something: transformers' recorders only record, and stay once installed."""
    return hook.__module__ != RECORDER


def goes_on(module: nn.Module) -> bool:
    """Whether a module's replaced forward is accelerate's, which only moves inputs and then calls the original."""
    kind, before = type(module.__dict__.get("_hf_hook")), module.__dict__.get("_old_forward")
    own = getattr(before, "__func__", None) is type(module).forward
    return own and (kind.__module__, kind.__name__) == _ALIGN


def named(thing: object) -> str:
    """Its class, with the module that defines it."""
    kind = type(thing)
    return f"{kind.__module__}.{kind.__qualname__}"
