"""The tokens that top-k, top-p and min-p sampling keeps, of which a rollout engine samples."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpg.trainer.rollouts.sampling import Sampling, is_kept


def kept_tokens(logits: Tensor, sampled: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The sets that sampling keeps.

    Args:
        logits: [N, V], before the temperature; fp32.
        sampled: [N], the tokens that were sampled. They are in their sets, also where rounding at
            the edge of a set says otherwise.
        sampling: How.

    Returns:
        (token_ids, offsets), as `fastpg.linear_token_logprobs(support=)` takes them.
    """
    kept = is_kept(logits, sampling).scatter(-1, sampled[:, None], True)
    offsets = torch.cat([kept.new_zeros(1, dtype=torch.long), kept.sum(-1).cumsum(0)])
    return kept.nonzero()[:, 1], offsets
