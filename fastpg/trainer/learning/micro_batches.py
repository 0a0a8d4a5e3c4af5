"""How the episodes of an optimiser step are cut by tokens, so that each part fits in memory."""

import torch
from torch import Tensor

from fastpg.trainer.models.packing import Packing, packed_size
from fastpg.trainer.rollouts.rollout import Rollout


def cut_by_tokens(
    rollout: Rollout, rows: Tensor, budget: int, packing: Packing | None
) -> list[Tensor]:
    """Cut rows into parts whose forward sees no more tokens than a budget, if more than one row.

    Args:
        rollout: The episodes.
        rows: int64 [n], which of them, in the order that they keep.
        budget: The most tokens of a forward, padding included.
        packing: How the episodes are packed for the model. None: each is a row.

    Returns:
        The parts, of one row at least, as large as the order allows.
    """
    ids, mask = rollout.input_ids.cpu(), rollout.attention_mask.cpu()
    width = rollout.mask.shape[1]

    def size(rows: list[int]) -> int:
        """Return the tokens of a forward over these episodes, padding included."""
        if packing is None or not packing.holds(ids.shape[1]):
            return ids[rows].numel()
        return packed_size(ids[rows], mask[rows], width, packing)

    parts: list[list[int]] = []
    for row in rows.tolist():
        if parts and size([*parts[-1], row]) <= budget:
            parts[-1].append(row)
        else:
            parts.append([row])
    return [torch.tensor(part) for part in parts]


def split_into(parts: list[Tensor], count: int) -> list[Tensor]:
    """Halve the longest parts until there are enough of them.

    Args:
        parts: Parts of rows, which have `count` rows or more together.
        count: How many parts there shall be.

    Returns:
        The parts, in the same order of rows.
    """
    parts = list(parts)
    while len(parts) < count:
        longest = max(range(len(parts)), key=lambda i: len(parts[i]))
        parts[longest : longest + 1] = parts[longest].tensor_split(2)
    return parts
