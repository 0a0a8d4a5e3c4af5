"""How much each token counts in `loss = Σ_t weight_t · loss_t`, the only reduction there is.

m is the mask, L_i is the number of unmasked tokens of sequence i, and D is denom, or counted here:

    reduce         weight          D, where it is counted
    token          m / D           the unmasked tokens
    sequence       m / (D · L_i)   the sequences with an unmasked token
    sequence_sum   m / D           the sequences with an unmasked token
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..._library import empty_like, scalar
from ..._op import Op
from ..common import checks

REDUCTIONS = {"token": 0, "sequence": 1, "sequence_sum": 2}  # the codes of token_weights.h


class Inputs(NamedTuple):
    mask: Tensor  # bool [B, T], or packed [N] with cu_seqlens
    denom: Tensor | None  # fp64 []; None: what this mask counts
    cu_seqlens: Tensor | None  # int32 [B + 1]; None: padded
    reduce: str  # a key of REDUCTIONS


class Outputs(NamedTuple):
    weight: Tensor  # fp32, like mask


class Sizes(NamedTuple):
    """The integers that C++ takes first."""

    sequence_count: int
    length: int  # of each sequence; of all together, where they are packed


def reference(x: Inputs) -> Outputs:
    """The specification: the table at the top of this page."""
    checks.check_cu_seqlens("token_weights", x.cu_seqlens, x.mask)
    lengths = checks.to_sequences(x.mask.double(), x.cu_seqlens)
    # A sequence of which every token is masked does not count in any mean.
    denom = x.denom
    if denom is None and x.reduce == "token":
        denom = lengths.sum()
    elif denom is None:
        denom = (lengths > 0).sum().double()
    divisor = denom * (lengths if x.reduce == "sequence" else torch.ones_like(lengths))
    # An empty step, denom 0, gives its tokens no weight rather than an infinite one.
    weight = torch.where(denom == 0, 0.0, 1 / divisor).float()
    weight = checks.to_tokens(weight, x.mask, x.cu_seqlens)
    return Outputs(torch.where(x.mask, weight, 0.0).contiguous())


def allocate(x: Inputs) -> Outputs:
    """Makes empty weights."""
    return Outputs(empty_like(x.mask, torch.float32))


def sizes(x: Inputs) -> Sizes:
    """Tells C++ how many sequences there are, and their length."""
    if x.cu_seqlens is None:
        return Sizes._make(x.mask.shape)
    return Sizes(x.cu_seqlens.shape[0] - 1, x.mask.shape[0])


token_weights_op = Op(
    "token_weights",
    Inputs,
    Outputs,
    page=__name__,
    reference=reference,
    allocate=allocate,
    sizes=sizes,
    codes={"reduce": REDUCTIONS},
)


def checked_denom(denom: float | Tensor | None, mask: Tensor) -> Tensor | None:
    """D as a constant in fp64. One on a GPU is not looked at: that would synchronise."""
    if denom is None:
        return None
    if not isinstance(denom, Tensor):
        checks.check_number("token_weights", "denom", denom)
        check_divisor(denom)
        return scalar(denom, torch.float64, mask.device)
    checks.check_shape("token_weights", "denom", denom, mask, ())
    if denom.is_complex():
        raise TypeError(f"token_weights: denom must be real, got {denom.dtype}")
    denom = denom.detach().double()
    if denom.device.type == "cpu" and not torch.compiler.is_compiling():
        check_divisor(denom.item())
    return denom


def check_divisor(denom: float) -> None:
    """Raises ValueError unless D is finite, and not below 0."""
    if not 0 <= denom < math.inf:
        raise ValueError(f"token_weights: denom must be finite and >= 0, got {denom}")


def token_weights(
    mask: Tensor,
    *,
    reduce: Literal["token", "sequence", "sequence_sum"] = "token",
    denom: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Weights that make a sum of per-token losses the wanted mean.

    With the mask m, the L_i unmasked tokens of sequence i and D = denom: "token" is m / D,
    "sequence" is m / (D · L_i), "sequence_sum" is m / D.

    Args:
        mask: [B, T], or packed [N] with cu_seqlens; bool or 0/1. 1 marks a token that counts.
        reduce: "token" averages over tokens; "sequence" averages over the tokens of each sequence,
            then over sequences; "sequence_sum" sums over the tokens of each sequence and averages
            over sequences.
        denom: D, a float or a tensor []: the count of the whole optimiser step, so that the losses
            of all its micro-batches and ranks add up; or any constant. None: what this mask counts,
            tokens for "token", else sequences that have an unmasked token. At 0 all weights are 0.
        cu_seqlens: int32 [B + 1], where packed sequences begin and end.

    Returns:
        The weight of each token, fp32, like mask; 0 where masked. It has no gradient.

    Raises:
        TypeError: An argument is no tensor or number, or cu_seqlens is not int32.
        ValueError: A shape or device does not fit, reduce is unknown, or denom is negative or not
            finite; a tensor on a GPU is not looked at.

    Example:
        >>> mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
        >>> fastpg.token_weights(mask, reduce="sequence")
        tensor([[0.2500, 0.2500, 0.0000],
                [0.5000, 0.0000, 0.0000]])

    Reference:
        "token": Yu et al. 2025 (DAPO), arXiv:2503.14476. "sequence": Shao et al. 2024 (GRPO),
        arXiv:2402.03300. "sequence_sum" with a constant denom: Liu et al. 2025 (Dr. GRPO),
        arXiv:2503.20783.
    """
    checks.check_choice("token_weights", "reduce", reduce, REDUCTIONS)
    checks.sequence_count("token_weights", "mask", mask, cu_seqlens)
    divisor = checked_denom(denom, mask)
    kept = checks.as_bool("token_weights", "mask", mask)
    return token_weights_op(Inputs(kept, divisor, cu_seqlens, reduce)).weight
