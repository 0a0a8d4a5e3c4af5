"""Checks and conversions of tokens, sequences, labels and temperatures, for several pages.

Tokens are [B, T], or packed [N] with cu_seqlens. A check raises with the op, the argument and the
value that it saw.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from numbers import Real
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

from ..._flags import record_labels
from ..._library import DTYPE_CODE, scalar
from ..._op import PLAIN_TENSORS, refuse_dtensor

# A function from this to this gives a tensor for a tensor, and None for None.
MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)


def check_tensors(op: str, **values: object) -> None:
    """Raises TypeError unless each of the values is a tensor."""
    for name, value in values.items():
        check_tensor(op, name, value)


def check_tensor(op: str, name: str, value: object) -> None:
    """Raises TypeError unless the value is a tensor, and no DTensor."""
    # This is nearly every value: it passes after one comparison.
    if type(value) in PLAIN_TENSORS:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    refuse_dtensor(op, name, value)


def check_number(op: str, name: str, value: object) -> None:
    """Raises TypeError unless the value is a real number."""
    # NumPy's scalars are found by the slower second question.
    if not isinstance(value, (float, int)) and not isinstance(value, Real):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")


def integer(op: str, name: str, value: object) -> int:
    """The value as an int that a tensor of int64 can hold: NumPy's integers are some too."""
    # operator.index takes whatever it is given, and raises for what is no integer.
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{op}: {name} must be an integer, got {type(value).__name__}") from None
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{op}: {name} must fit into int64, got {number}")
    return number


def check_choice(op: str, name: str, value: object, known: Collection[str]) -> None:
    """Raises ValueError unless the value is one of the strings that are known."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{op}: {name} must be one of {', '.join(known)}, got {value!r}")


def compute_dtype(op: str, **tensors: Tensor | None) -> torch.dtype:
    """fp64 if any tensor is fp64, else fp32. Raises TypeError for one that is not floating."""
    dtype = torch.float32
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        check_tensor(op, name, tensor)
        # This is nearly every tensor of nearly every call: it passes after one comparison.
        if tensor.dtype is torch.float32:
            continue
        if not tensor.is_floating_point():
            raise TypeError(f"{op}: {name} must be floating point, got {tensor.dtype}")
        if tensor.dtype not in DTYPE_CODE:
            raise TypeError(f"{op}: {name} must be bf16, fp16, fp32 or fp64, got {tensor.dtype}")
        if tensor.dtype is torch.float64:
            dtype = torch.float64
    return dtype


def cast(tensor: MaybeTensor, dtype: torch.dtype) -> MaybeTensor:
    """tensor.to(dtype), without the microsecond that torch takes to do nothing."""
    return tensor if tensor is None or tensor.dtype is dtype else tensor.to(dtype)


@overload
def alike(op: str, /, **tensors: Tensor) -> list[Tensor]: ...


# The optional tensors may be None, and the others are none: no type of a list can tell them apart.
@overload
def alike(op: str, optional: tuple[str, ...], /, **tensors: Tensor | None) -> list[Any]: ...


def alike(op: str, optional: tuple[str, ...] = (), /, **tensors: Any) -> list:
    """The tensors in the dtype to compute in; each must match the first in shape and device.

    Args:
        op: The op's name, for messages.
        optional: The names of the tensors that may be None.
        tensors: The tensors by their names.

    Returns:
        The tensors in their order.
    """
    # One loop looks at all tensors; only where some differ are they asked again, for the message.
    items = iter(tensors.items())
    beside, first = next(items)
    check_tensor(op, beside, first)
    shape, device, dtype = first.shape, first.device, first.dtype
    others = []
    for name, x in items:
        if x is None and name in optional:
            continue
        if type(x) not in PLAIN_TENSORS:
            check_tensor(op, name, x)
        if x.dtype is not dtype or x.shape != shape or x.device != device:
            others.append(name)
    # bf16 and fp16 tensors that are all alike still have to be converted to fp32.
    if not others and (dtype is torch.float32 or dtype is torch.float64):
        return list(tensors.values())
    dtype = compute_dtype(op, **tensors)
    for name in others:
        if tensors[name].device != device:
            raise ValueError(f"{op}: {name} on {tensors[name].device}, {beside} on {device}")
        if tensors[name].shape != shape:
            raise ValueError(
                f"{op}: {name} {tuple(tensors[name].shape)} must have the shape of {beside} "
                f"{tuple(shape)}"
            )
    return [cast(tensor, dtype) for tensor in tensors.values()]


def sequence_count(op: str, name: str, tokens: Tensor, cu_seqlens: Tensor | None) -> int:
    """B, from tokens [B, T], or from cu_seqlens [B + 1] if tokens are packed [N]."""
    check_tensor(op, name, tokens)
    if tokens.dim() != (2 if cu_seqlens is None else 1):
        raise ValueError(
            f"{op}: {name} must be [B, T], or [N] with cu_seqlens, got {tuple(tokens.shape)}"
        )
    if cu_seqlens is None:
        return tokens.shape[0]
    check_tensor(op, "cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype is not torch.int32:
        raise TypeError(f"{op}: cu_seqlens must be int32, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) == 0:
        raise ValueError(f"{op}: cu_seqlens must be [B + 1], got {tuple(cu_seqlens.shape)}")
    check_device(op, "cu_seqlens", cu_seqlens, tokens)
    return len(cu_seqlens) - 1


def check_device(op: str, name: str, tensor: Tensor, like: Tensor) -> None:
    """Raises ValueError unless the tensor is on the device of `like`."""
    if tensor.device != like.device:
        raise ValueError(f"{op}: {name} on {tensor.device}, expected {like.device}")


def check_shape(op: str, name: str, tensor: Tensor | None, like: Tensor, *shapes: tuple) -> None:
    """Raises unless a tensor has one of the shapes and the device of `like`; None passes."""
    if tensor is None:
        return
    check_tensor(op, name, tensor)
    check_shape_of_tensor(op, name, tensor, like, *shapes)


def check_shape_of_tensor(op: str, name: str, tensor: Tensor, like: Tensor, *shapes: tuple) -> None:
    """Raises ValueError unless a tensor, be it a DTensor, has such a shape and this device."""
    if tensor.shape not in shapes:
        allowed = " or ".join(str(tuple(shape)) for shape in shapes)
        raise ValueError(f"{op}: {name} {tuple(tensor.shape)} must be {allowed}")
    check_device(op, name, tensor, like)


def fractions(op: str, name: str, x: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x as a constant, which must be in [0, 1] where it is not masked.

    Its values are looked at on the CPU only: elsewhere that would synchronise.
    """
    if x.is_complex():
        raise TypeError(f"{op}: {name} must be real, got {x.dtype}")
    x = cast(x.detach(), dtype)
    if x.device.type != "cpu" or torch.compiler.is_compiling() or x.numel() == 0:
        return x
    least, most = (bound.item() for bound in x.aminmax())  # A mask would cost three times as much.
    # `not` takes NaN in. What is out of bounds may be masked, so the slow question comes second.
    if not (least >= 0 and most <= 1):
        bad = ~((x >= 0) & (x <= 1))
        bad = bad & mask if mask is not None and mask.shape == x.shape else bad
        if bad.any():
            raise ValueError(f"{op}: {name} must be in [0, 1], holds {x[bad][0].item()}")
    return x


def where_kept(x: MaybeTensor, kept: Tensor) -> MaybeTensor:
    """x, contiguous, and 0 where a token is not kept: what x holds there may be NaN."""
    return None if x is None else torch.where(kept, x, 0.0).contiguous()


def as_bool(op: str, name: str, flags: MaybeTensor) -> MaybeTensor:
    """A 0/1 tensor of any dtype as bool.

    The values of floats are looked at on the CPU only: elsewhere that would synchronise. A mask
    that is added to scores of attention, 0 and -inf, would keep what it is to leave out.
    """
    if flags is None or flags.dtype is torch.bool:
        return flags
    kept = flags != 0
    if not flags.is_floating_point() or flags.device.type != "cpu" or torch.compiler.is_compiling():
        return kept
    if not torch.equal(kept.to(flags.dtype), flags):
        bad = flags[kept & (flags != 1)][0].item()
        raise ValueError(f"{op}: {name} must be bool or 0/1, holds {bad}")
    return kept


def check_cu_seqlens(op: str, cu_seqlens: Tensor | None, tokens: Tensor) -> None:
    """Raises ValueError unless cu_seqlens rises from 0 to N. The C++ kernels do the same.

    Its values are looked at on the CPU only: elsewhere that would synchronise.
    """
    if cu_seqlens is None or cu_seqlens.device.type != "cpu":
        return
    # The zero in front gives a difference for each entry, so that a place in `bad` is its index.
    bad = torch.diff(cu_seqlens, prepend=cu_seqlens.new_zeros(1)) < 0
    bad[0] |= cu_seqlens[0] != 0
    bad[-1] |= cu_seqlens[-1] != len(tokens)
    if bad.any():
        place = int(bad.int().argmax())
        raise ValueError(
            f"{op}: cu_seqlens must rise from 0 to N = {len(tokens)}, "
            f"got {cu_seqlens[place].item()} at index {place}"
        )


def segments(cu_seqlens: Tensor, tokens: Tensor) -> Tensor:
    """The sequence of each packed token, int64 [N]."""
    positions = torch.arange(len(tokens), device=tokens.device, dtype=cu_seqlens.dtype)
    # A position that equals the end of a sequence belongs to the next one: hence right=True.
    return torch.searchsorted(cu_seqlens[1:].contiguous(), positions, right=True)


def to_tokens(x: Tensor, tokens: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """x [B] at every token of its sequence."""
    if cu_seqlens is None:
        return x[:, None].expand(tokens.shape)
    return x[segments(cu_seqlens, tokens)]


def to_sequences(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The sum [B] of x over the tokens of each sequence."""
    if cu_seqlens is None:
        return x.sum(-1)
    return x.new_zeros(len(cu_seqlens) - 1).index_add(0, segments(cu_seqlens, x), x)


def unmasked_from(mask: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """How many tokens are unmasked from each token on, to the end of its sequence."""
    left = mask.flip(-1).cumsum(-1).flip(-1)
    if cu_seqlens is not None:
        # The sum runs to the end of the batch: the tokens of later sequences are taken off again.
        beyond = torch.nn.functional.pad(left, (0, 1))[cu_seqlens[1:].long()]
        left = left - to_tokens(beyond, mask, cu_seqlens)
    return left


def is_last(mask: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Marks the last unmasked token of each sequence."""
    return mask & (unmasked_from(mask, cu_seqlens) == 1)


INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_labels(op: str, labels: Tensor, rows: Tensor) -> None:
    """Raises unless labels are integers [...], for rows [..., V] or [..., H].

    The kernels check their values.
    """
    if labels.dtype not in INTEGERS:
        raise TypeError(f"{op}: labels must be integers, got {labels.dtype}")
    check_shape(op, "labels", labels, rows, rows.shape[:-1])


def first_labels(op: str, labels: Tensor, rows: Tensor) -> Tensor:
    """The first label of each row [...], of labels [..., K] for rows [..., V] or [..., H]."""
    shape, wanted = tuple(labels.shape), tuple(rows.shape[:-1])
    if shape[:-1] != wanted or shape[-1] == 0:
        needs = f"must be {wanted}, or {wanted} and K labels for each"
        raise ValueError(f"{op}: labels {shape} {needs}")
    return labels[..., 0]


def check_label_values(
    op: str,
    labels: Tensor,
    legal: Tensor,
    kept: Tensor,
    vocab: int | Tensor,
    ignore_index: int,
    temperature: Tensor,
) -> None:
    """Raises IndexError for a label that is kept and not legal, ValueError for its temperature.

    The kernels do the same. On other devices than the CPU that would synchronise: there bad labels
    are recorded.
    """
    if labels.device.type != "cpu":
        record_labels(op, labels, kept & ~legal)
        return
    bad = labels[kept & ~legal]
    if len(bad):
        where = f"outside [0, {vocab}) and not ignore_index={ignore_index}"
        raise IndexError(f"{op}: labels holds {bad[0].item()}, {where}")
    check_temperature(op, temperature, kept)


def check_temperature(op: str, temperature: Tensor, kept: Tensor) -> None:
    """Raises ValueError unless the temperature, and its inverse, is legal where a row is kept."""
    legal = (temperature > 0) & temperature.isfinite() & temperature.reciprocal().isfinite()
    bad = temperature.expand(kept.shape)[kept & ~legal]
    if len(bad):
        needs = "it and its inverse must be finite and > 0"
        raise ValueError(f"{op}: temperature holds {bad[0]:g}, {needs}")


def positive(op: str, name: str, value: float, dtype: torch.dtype) -> float:
    """The value, by which kernels divide, or with whose inverse they multiply, in this dtype."""
    check_number(op, name, value)
    most = torch.finfo(dtype).max  # The inverse of anything below 1 / most is infinite.
    if not 1 / most < value < most:
        needs = f"and its inverse must be finite and > 0 in {dtype}"
        raise ValueError(f"{op}: {name} {needs}, got {value}")
    return value


def label_temperature(
    op: str, temperature: float | Tensor, dtype: torch.dtype, labels: Tensor
) -> Tensor:
    """The temperature as a tensor, 0-d or one per label: a new value compiles nothing anew.

    A tensor broadcasts to labels [...], or is [..., 1], as whoever divides the logits has it.
    """
    if not isinstance(temperature, Tensor):
        return scalar(positive(op, "temperature", temperature, dtype), dtype, labels.device)
    check_device(op, "temperature", temperature, labels)
    if temperature.is_complex():
        raise TypeError(f"{op}: temperature must be real, got {temperature.dtype}")
    of_tokens = temperature.detach().to(dtype)
    if of_tokens.dim() == labels.dim() + 1 and of_tokens.shape[-1] == 1:
        of_tokens = of_tokens.squeeze(-1)  # it has the axes of the logits
    # Only expand knows which shapes broadcast, so its refusal is what the message is made of.
    try:
        return of_tokens.expand(labels.shape)
    except RuntimeError:
        raise ValueError(
            f"{op}: temperature {tuple(temperature.shape)} does not broadcast to labels "
            f"{tuple(labels.shape)}"
        ) from None
