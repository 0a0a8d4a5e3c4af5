"""The statistics of an optimiser step, from those of its micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import get_args

import torch
import torch.distributed as dist

from .stats import Stats

KNOWN = " or ".join(kind.__name__ for kind in get_args(Stats))


def merge_stats(
    stats: Stats | Sequence[Stats],
    *,
    process_group: dist.ProcessGroup | None = None,
) -> dict[str, float]:
    """The means of an optimiser step, from the statistics of its micro-batches and ranks.

    The parts are merged in the order given, and then over ranks; no mean is taken before. With no
    unmasked token there are zeros, and ratio_min and ratio_max are 1.

    Args:
        stats: What an op returned beside its loss, or a non-empty list of one kind.
        process_group: Every rank of it must call, and gets the same numbers. None: this process
            alone.

    Returns:
        Plain floats by name; reading them synchronises the device once.

        From PolicyStats, with d = logp − old_logp and r = e^d:

            loss: the sum of the losses, KL and entropy terms included
            clip_frac_low, clip_frac_high: the fraction of tokens whose ratio is held at 1 − low,
                and at 1 + high; their sum is verl's pg_clipfrac
            clip_frac_dual: the fraction of tokens held at dual_clip; verl's pg_clipfrac_lower
            approx_kl, kl: KL(old ‖ new), as the mean of k3 = r − 1 − d and of k1 = −d
            ratio_mean, ratio_min, ratio_max: r, or the ratio of each token's sequence
            ess: the effective sample size (Σ r)² / (n Σ r²), a fraction
            ref_kl, entropy: means; absent unless every part had ref_logp, or entropy
            count: the unmasked tokens

        From ValueStats:

            loss, count: as above
            clip_frac: the fraction of tokens whose clipped error is the larger one
            mean, return_mean: means of V and of R
            explained_variance: 1 − Var(R − V) / Var(R); 0 where R does not vary

        From ImportanceStats, of tokens or sequences as the level says:

            outside_low, outside_high: the fraction of ratios below low, and above high
            weight_mean, ess: mean and effective sample size of the weights, within the bounds
            ratio_mean, ratio_min, ratio_max: the ratios, before the bounds
            approx_kl, kl: KL(behavior ‖ policy) per token, as the mean of k3 and of k1
            count: the unmasked tokens, or the sequences that have one

        From PreferenceStats:

            loss: as above
            accuracy: the fraction of pairs with chosen > rejected
            margin: the mean of chosen − rejected
            chosen_mean, rejected_mean: means of the scores
            count: the pairs of weight other than 0

        From DistillationStats:

            loss: as above
            divergence: the mean of D per token
            student_tail, teacher_tail: means of the probability that the kept tokens leave
            count: the tokens of weight other than 0

    Raises:
        TypeError: stats holds something else, or different kinds.
        ValueError: stats is empty.

    Example:
        >>> logp, weight = torch.tensor([-1.0, -2.0]), torch.tensor([0.5, 0.5])
        >>> parts = [fastpg.policy_loss(logp, logp, weight)[1] for _ in range(2)]
        >>> fastpg.merge_stats(parts)["count"]
        4.0

    Reference:
        Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance", for the merge
        of the moments in ValueStats.
    """
    if not isinstance(stats, Iterable):
        raise TypeError(f"merge_stats: stats is {type(stats).__name__}, must be {KNOWN}, or a list")
    parts = [stats] if isinstance(stats, Stats) else list(stats)
    kind = _kind(parts)
    # Sums add up, minima and maxima compare, moments merge: no mean of means is taken.
    row = kind.merge(torch.stack([part.values for part in parts]))
    if process_group is not None:
        # Every rank merges the same rows in the same order, and so gets the same bits.
        rows = row.new_empty(dist.get_world_size(process_group), row.numel())
        dist.all_gather(list(rows), row, group=process_group)
        row = kind.merge(rows)
    # This is the one place where the device is waited for.
    return kind.summary(row.tolist())


def _kind(parts: list[Stats]) -> type[Stats]:
    """The class that all parts have."""
    if not parts:
        raise ValueError("merge_stats: stats is empty, nothing to merge")
    kind = type(parts[0])
    for part in parts:
        if not isinstance(part, Stats):
            raise TypeError(f"merge_stats: stats holds {type(part).__name__}, must be {KNOWN}")
        if type(part) is not kind:
            raise TypeError(f"merge_stats: stats mixes {kind.__name__} and {type(part).__name__}")
    return kind
