"""The statistics of an optimiser step, from those of its micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
import torch.distributed as dist

from .stats import Stats


def merge_stats(
    stats: Stats | Sequence[Stats],
    *,
    process_group: dist.ProcessGroup | None = None,
) -> dict[str, float]:
    """Merges what the losses counted, in the order given and then over ranks, into plain floats.

    stats: what an op returned, or a non-empty list of one kind.
    process_group: every rank of it must call, and gets the same numbers.

    From PolicyStats, d = logp − old_logp and r = e^d:
      loss                    sum of the losses, KL and entropy terms included
      clip_frac_low, _high    fraction of tokens whose ratio is held at a lower, an upper bound
      approx_kl, kl           KL(old ‖ new): mean of k3 = r − 1 − d, and of k1 = −d
      ratio_mean, _min, _max  of r, or of the ratio of each token's sequence
      ess                     effective sample size (Σ r)² / (n Σ r²), a fraction
      ref_kl, entropy         means; absent unless every part had ref_logp, entropy
      count                   unmasked tokens
    From ValueStats:
      loss, count             as above
      clip_frac               fraction of tokens whose clipped error is the larger one
      mean, return_mean       of V and of R
      explained_variance      1 − Var(R − V) / Var(R); 0 where R does not vary
    From ImportanceStats, of tokens or sequences as the level says:
      outside_low, _high      fraction of ratios below low, above high
      weight_mean, ess        mean and effective sample size of the weights, within the bounds
      ratio_mean, _min, _max  before the bounds
      approx_kl, kl           KL(behavior ‖ policy) per token: mean of k3 and of k1
      count                   unmasked tokens, or sequences that have one
    From PreferenceStats:
      loss                    as above
      accuracy                fraction of pairs with chosen > rejected
      margin                  mean of chosen − rejected
      chosen_mean, rejected_mean   of the scores
      count                   pairs of weight other than 0
    With no unmasked token: zeros, ratio_min and ratio_max 1. Synchronises the device once.
    """
    parts = [stats] if isinstance(stats, Stats) else list(stats)
    kind = _kind(parts)
    row = kind.merge(torch.stack([part.values for part in parts]))
    if process_group is not None:
        rows = row.new_empty(dist.get_world_size(process_group), row.numel())
        dist.all_gather(list(rows), row, group=process_group)
        row = kind.merge(rows)
    return kind.summary(row.tolist())


def _kind(parts: list) -> type[Stats]:
    if not parts:
        raise ValueError("merge_stats: stats is empty, nothing to merge")
    kind = type(parts[0])
    for part in parts:
        if not isinstance(part, Stats):
            known = " or ".join(k.__name__ for k in get_args(Stats))
            raise TypeError(f"merge_stats: stats holds {type(part).__name__}, must be {known}")
        if type(part) is not kind:
            raise TypeError(f"merge_stats: stats mixes {kind.__name__} and {type(part).__name__}")
    return kind
