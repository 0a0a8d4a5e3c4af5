"""The loss of a reward model that learns from comparisons (Bradley and Terry 1952).

    P(chosen ≻ rejected) = σ(r_w − r_l)        L = Σ_i w_i · −log σ(r_w − r_l)

−log σ(m) by torch's logsigmoid neither overflows nor cancels at any margin m; by its softplus(−m),
margins below −20 would be rounded to a straight line.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..common.checks import alike
from ..common.stats import PreferenceStats


def preference_loss(
    chosen_scores: Tensor, rejected_scores: Tensor, *, weight: Tensor | None = None
) -> tuple[Tensor, PreferenceStats]:
    """The loss of a reward model over pairs of scores, weighted and summed.

    L = Σ weight · −log σ(chosen − rejected).

    Args:
        chosen_scores: Scores of the preferred answers, of any shape, usually [B], and any float
            dtype; differentiable.
        rejected_scores: Scores of the others, of the same shape; differentiable.
        weight: How much each pair counts, of the same shape; a constant. Weight 0 masks a pair: it
            is not read, gets no gradient and is not counted. None: 1/B for each of the B pairs, so
            that the sum is their mean; pass 1 over the pairs of the whole optimiser step where
            micro-batches or ranks share one.

    Returns:
        (loss, stats): a scalar, fp32, or fp64 if an input is fp64; and `PreferenceStats`.

    Raises:
        TypeError: An argument is no tensor, or not of a floating dtype.
        ValueError: A shape or device differs from that of chosen_scores.

    Example:
        >>> chosen, rejected = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0])
        >>> loss, stats = fastpg.preference_loss(chosen, rejected)
        >>> loss
        tensor(0.5032)

    Reference:
        Bradley and Terry 1952; Christiano et al. 2017, "Deep reinforcement learning from human
        preferences", arXiv:1706.03741.
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
    # Masked pairs are selected away, not multiplied by 0: their scores may be NaN.
    weight = weight.detach()
    kept = weight != 0
    chosen, rejected = torch.where(kept, chosen, 0.0), torch.where(kept, rejected, 0.0)
    margin = chosen - rejected
    loss = (weight * -logsigmoid(margin)).sum(dtype=torch.float64)
    fields = {
        "count": kept,
        "weight": weight,
        "loss": loss,
        "correct": kept & (margin > 0),
        "margin": margin,
        "chosen": chosen,
        "rejected": rejected,
    }
    values = [fields[name].detach().sum(dtype=torch.float64) for name in PreferenceStats.FIELDS]
    return loss.to(chosen.dtype), PreferenceStats(torch.stack(values))
