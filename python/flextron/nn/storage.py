"""The dtype that each tensor of a model is stored in, and the one dtype that stock transformers loads them all in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import reduce

import torch
from torch import Tensor
from transformers import PreTrainedModel

DTYPES = ("auto", "float32", "bfloat16", "float16")
STORABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
Dtype = str | torch.dtype  # one of DTYPES, or the torch dtype of that name


def storage(who: str, model: PreTrainedModel, dtype: Dtype = "auto") -> dict[str, torch.dtype]:
    """The dtype to store each parameter of a model in, by name.

    ``"auto"`` is the dtype that the parameter has in the file it was read from (``model.stored``), or its dtype in
    memory where there was no file or where memory holds less than the file did.
    """
    chosen = named(who, dtype)
    known: Mapping[str, torch.dtype] = getattr(model, "stored", None) or {}
    found = {}
    for name, p in model.named_parameters():
        if p.dtype not in STORABLE:
            raise ValueError(f"{who}: weights must be floating point to be stored, got {p.dtype} in {name}")
        own = known.get(name, p.dtype)
        found[name] = chosen or (own if torch.promote_types(own, p.dtype) == p.dtype else p.dtype)
    return found


def common(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The narrowest dtype that holds the values of all of these.

    Stock transformers loads a model in one dtype, the configuration's. This one rounds nothing in a mixed file.
    """
    return reduce(torch.promote_types, dtypes)


def rounded(who: str, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A parameter in the dtype that it is stored in; it is not copied where it has that dtype.

    Raises:
        ValueError: a finite value is too large for the dtype.
    """
    found = tensor.detach().to(dtype)
    if dtype != tensor.dtype and found.isinf().any() and tensor.isfinite().all():
        raise ValueError(
            f"{who}: dtype must hold every weight, got {name_of(dtype)}, whose largest number is "
            f"{torch.finfo(dtype).max:.4g}, for {name} with {tensor.abs().max().item():.4g}"
        )
    return found


@torch.no_grad()
def round_in_place(who: str, model: PreTrainedModel, dtypes: Mapping[str, torch.dtype]) -> bool:
    """Round a model's parameters as storing them would, in the dtypes they have; returns whether one changed."""
    parameters = dict(model.named_parameters())
    lossy = {
        name: p
        for name, p in parameters.items()
        if torch.promote_types(dtypes[name], p.dtype) != dtypes[name]
    }
    # one at a time, and those that round to themselves are not looked at again
    lossy = {name: p for name, p in lossy.items() if not torch.equal(p.to(dtypes[name]).to(p.dtype), p)}
    for name, p in lossy.items():
        p.copy_(rounded(who, name, p, dtypes[name]))
    return bool(lossy)


def name_of(dtype: torch.dtype) -> str:
    """``bfloat16``: a dtype as configurations write it."""
    return str(dtype).removeprefix("torch.")


def counted(dtypes: Mapping[str, torch.dtype]) -> dict[str, int]:
    """How many tensors there are of each dtype, the most frequent first: what ``flextron.json`` says of a file."""
    return {name_of(dtype): count for dtype, count in Counter(dtypes.values()).most_common()}


def named(who: str, dtype: Dtype, names: tuple[str, ...] = DTYPES) -> torch.dtype | None:
    """The dtype that a user names, one of ``names``; None for ``"auto"``."""
    name = name_of(dtype) if isinstance(dtype, torch.dtype) else dtype
    if name not in names:
        raise ValueError(f"{who}: dtype must be one of {', '.join(names)}, got {name!r}")
    return None if name == "auto" else getattr(torch, name)
