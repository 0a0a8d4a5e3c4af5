"""The loss of a reward model that learns from comparisons (Bradley and Terry 1952).

    P(chosen ≻ rejected) = σ(r_w − r_l)        L = Σ_i w_i · −log σ(r_w − r_l)

−log σ(m) is softplus(−m), which neither overflows nor cancels at any margin m.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..common.checks import alike
from ..common.stats import PreferenceStats


def preference_loss(
    chosen_scores: Tensor, rejected_scores: Tensor, *, weight: Tensor | None = None
) -> tuple[Tensor, PreferenceStats]:
    """Σ weight · −log σ(chosen − rejected), and what was counted.

    chosen_scores, rejected_scores: of one shape, usually [B]; any float dtype; differentiable.
    weight: of the same shape, a constant. Weight 0 masks a pair: not read, no gradient, not
    counted. None: 1/B for each of the B pairs, so that the sum is their mean; pass 1 over the pairs
    of the whole optimiser step where micro-batches or ranks share one.
    Returns (loss, stats): a scalar, fp32 (fp64 if an input is fp64), and PreferenceStats.
    """
    chosen, rejected, weight = alike(
        "preference_loss",
        ("weight",),
        chosen_scores=chosen_scores,
        rejected_scores=rejected_scores,
        weight=weight,
    )
    if weight is None:
        weight = torch.full_like(chosen, 1 / max(chosen.numel(), 1))
    weight = weight.detach()
    kept = weight != 0
    chosen, rejected = (torch.where(kept, x, 0.0) for x in (chosen, rejected))
    margin = chosen - rejected
    loss = (weight * softplus(-margin)).sum(dtype=torch.float64)
    counted = kept, weight, loss, kept & (margin > 0), margin, chosen, rejected
    values = torch.stack([x.detach().sum(dtype=torch.float64) for x in counted])
    return loss.to(chosen.dtype), PreferenceStats(values)
