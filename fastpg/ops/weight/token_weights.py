"""How much each token counts in `loss = Σ_t weight_t · loss_t`, the only reduction there is.

With L_i the unmasked tokens of sequence i, and D = denom or what is counted here:

    token          m / D           D: unmasked tokens
    sequence       m / (D · L_i)   D: sequences with an unmasked token
    sequence_sum   m / D           D: sequences with an unmasked token
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..._library import _C, address, contiguous, cpu_kernel, define, scalar, triton_kernels
from ..common import checks

_REDUCTIONS = {"token": 0, "sequence": 1, "sequence_sum": 2}


def reference(mask, denom, cu_seqlens, reduce):
    """fp32, of the shape of mask; denom is fp64 []."""
    checks.check_cu_seqlens("token_weights", cu_seqlens, mask)
    lengths = checks.to_sequences(mask.double(), cu_seqlens)
    if denom is None:
        denom = lengths.sum() if reduce == 0 else (lengths > 0).sum().double()
    lengths = lengths if reduce == 1 else torch.ones_like(lengths)
    weight = torch.where(denom == 0, 0.0, 1 / (denom * lengths)).float()
    return torch.where(mask, checks.to_tokens(weight, mask, cu_seqlens), 0.0)


_weights = define(
    "token_weights(Tensor mask, Tensor? denom, Tensor? cu_seqlens, int reduce) -> Tensor",
    fake=lambda mask, *_: mask.new_empty(mask.shape, dtype=torch.float32),
    reference=reference,
)


@cpu_kernel(_weights)
def _weights_cpu(mask, denom, cu_seqlens, reduce):
    mask, cu_seqlens = contiguous(mask, cu_seqlens)
    out = mask.new_empty(mask.shape, dtype=torch.float32)
    count = len(mask) if cu_seqlens is None else len(cu_seqlens) - 1
    _C.token_weights(
        count, mask.shape[-1], address(cu_seqlens), mask.data_ptr(), address(denom), reduce,
        out.data_ptr(),
    )  # fmt: skip
    return out


triton_kernels(__name__, _weights)


def token_weights(
    mask: Tensor,
    *,
    reduce: str = "token",
    denom: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Weights that make a sum of per-token losses the wanted mean.

    mask: [B, T], or packed [N] with cu_seqlens (int32 [B + 1]); bool or 0/1.
    reduce: "token" | "sequence" | "sequence_sum", the rows of the table above.
    denom: float or 0-d tensor, the count of the whole optimiser step, so that the losses of any
    micro-batches or ranks add up; None: the count of this mask. With 0 every weight is 0.
    Returns weight like mask, fp32, 0 where masked.
    """
    checks.check_choice("token_weights", "reduce", reduce, _REDUCTIONS)
    checks.sequence_count("token_weights", "mask", mask, cu_seqlens)
    if isinstance(denom, Tensor):
        checks.check_shape("token_weights", "denom", denom, mask, ())
        denom = denom.detach().double()
    elif denom is not None:
        checks.check_number("token_weights", "denom", denom)
        if not 0 <= denom < math.inf:
            raise ValueError(f"token_weights: denom must be finite and >= 0, got {denom}")
        denom = scalar(denom, torch.float64, mask.device)
    return _weights(checks.as_bool(mask), denom, cu_seqlens, _REDUCTIONS[reduce])
