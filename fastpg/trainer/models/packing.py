"""Episodes packed into rows, so that the completions of a prompt share one pass over it.

A row holds one or more families: a prompt, and then its completions, one after the other. A token
sees the prompt of its family and what comes before it in its own completion, at the positions that
it would have by itself. So its states, and their gradients, are those of a copy of the prompt
before every completion. There is no padding but at the ends of rows, and the last token of a
completion, which predicts nothing, is left out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

PROMPT = 0
"""The number of the prompt's segment in a family; those of its completions are 1, 2, ..."""


@dataclass(frozen=True)
class Packing:
    """How rows are made for a model.

    Args:
        additive: If True, the model adds its attention mask to the scores; else it takes booleans.
        token_cost: The cost of a token in all but attention, in units of the cost of one token's
            attention to one other.
        window: The most tokens of an episode; beyond it, some layers no longer see its beginning.
            None: any number.
    """

    additive: bool
    token_cost: float
    window: int | None = None

    def holds(self, tokens: int) -> bool:
        """Return whether episodes of this many tokens can be packed."""
        return self.window is None or tokens <= self.window

    def room(self, prompt: int) -> float:
        """Return how many tokens of completions are best put behind one prompt.

        With n of them, a row costs token_cost · (P + n) + (P + n)². Per token of a completion that
        is least at n = sqrt(P (P + token_cost)): with fewer, the prompt is paid for more often;
        with more, completions are paid for that see nothing of one another.

        Args:
            prompt: P, the tokens of the prompt.
        """
        return math.sqrt(prompt * (prompt + self.token_cost))

    def mask(self, seen: Tensor, dtype: torch.dtype) -> Tensor:
        """Return an attention mask for the model.

        Args:
            seen: bool [R, 1, L, S], which of S tokens each of L tokens sees.
            dtype: The dtype of the model.
        """
        if not self.additive:
            return seen
        return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


class Family(NamedTuple):
    """A prompt with some of its completions."""

    prompt: int  # tokens
    first: int  # the number of the first episode with this prompt, here or in an earlier family
    episodes: list[int]  # numbers of its episodes
    lengths: list[int]  # tokens of their completions that go into the row

    @property
    def length(self) -> int:
        """The tokens of the family in a row."""
        return self.prompt + sum(self.lengths)


@dataclass(frozen=True)
class PackedRows:
    """The rows [R, L] of a batch of episodes.

    Args:
        source: int64 [R, L], where each token stands in the flattened `input_ids` of the batch.
        position_ids: int64 [R, L], its position in its own episode.
        family: int64 [R, L], the number of its family in the row; -1 at padding.
        segment: int64 [R, L], the number of its segment in the family.
        predictors: int64 [B, T], for each token of a completion the place of the token before it in
            the flattened rows; 0 at tokens that do not count.
    """

    source: Tensor
    position_ids: Tensor
    family: Tensor
    segment: Tensor
    predictors: Tensor

    def seen(self) -> Tensor:
        """Return which tokens of its row each token sees, bool [R, 1, L, L]."""
        family, segment = self.family, self.segment
        seen = family[:, :, None] == family[:, None, :]
        seen &= (segment[:, None, :] == PROMPT) | (segment[:, :, None] == segment[:, None, :])
        # A row holds the tokens of an episode in their order. Padding sees itself and what is
        # before it, since a token that sees nothing at all would be NaN.
        return seen.tril().unsqueeze(1)


def pack(input_ids: Tensor, attention_mask: Tensor, width: int, packing: Packing) -> PackedRows:
    """Lay out a batch of episodes in rows.

    Args:
        input_ids: int64 [B, P + T], prompts padded on the left, completions in the last T slots.
            Equal prompts that stand next to each other are shared.
        attention_mask: int64 [B, P + T], 1 at real tokens.
        width: T.
        packing: How rows are made.

    Returns:
        The rows, on the device of the batch.
    """
    families = find_families(input_ids, attention_mask, width, packing)
    rows = _fill_rows(families)
    slots = input_ids.shape[1]
    shape = len(rows), max(sum(family.length for family in row) for row in rows)
    packed = PackedRows(
        source=torch.zeros(shape, dtype=torch.int64),
        position_ids=torch.zeros(shape, dtype=torch.int64),
        family=torch.full(shape, -1),
        segment=torch.zeros(shape, dtype=torch.int64),
        predictors=torch.zeros(len(input_ids), width, dtype=torch.int64),
    )
    for number, row in enumerate(rows):
        start = 0
        for index, family in enumerate(row):
            _write_family(packed, family, number, start, index, slots)
            start += family.length
    tensors = {name: tensor.to(input_ids.device) for name, tensor in vars(packed).items()}
    return replace(packed, **tensors)


def packed_size(input_ids: Tensor, attention_mask: Tensor, width: int, packing: Packing) -> int:
    """Count the tokens of the rows that `pack` makes of the same arguments, padding included."""
    families = find_families(input_ids, attention_mask, width, packing)
    return len(_fill_rows(families)) * max(family.length for family in families)


def find_families(
    input_ids: Tensor, attention_mask: Tensor, width: int, packing: Packing
) -> list[Family]:
    """Find the prompts that episodes share, and how many completions go behind one of them.

    Args:
        input_ids: As in `pack`.
        attention_mask: As in `pack`.
        width: As in `pack`.
        packing: As in `pack`.

    Returns:
        The families, whose episodes are in the order of the batch.
    """
    prompts, masks = input_ids[:, :-width], attention_mask[:, :-width]
    equal = (prompts[1:] == prompts[:-1]) & (masks[1:] == masks[:-1])
    repeats = [False, *equal.all(-1).tolist()]
    lengths = masks.sum(-1).tolist()
    # The last token of a completion predicts nothing.
    completions = (attention_mask[:, -width:].sum(-1) - 1).clamp(min=0).tolist()
    families: list[Family] = []
    for episode, (prompt, completion) in enumerate(zip(lengths, completions, strict=True)):
        first = families[-1].first if repeats[episode] else episode
        if repeats[episode]:
            last = families[-1]
            if sum(last.lengths) + completion <= packing.room(prompt):
                last.episodes.append(episode)
                last.lengths.append(completion)
                continue
        families.append(Family(prompt, first, [episode], [completion]))
    return families


def _fill_rows(families: Sequence[Family]) -> list[list[Family]]:
    """Put families into rows no longer than the longest family: each into the first with room."""
    capacity = max(family.length for family in families)
    rows: list[list[Family]] = []
    free: list[int] = []
    for family in sorted(families, key=lambda family: family.length, reverse=True):
        fitting = [i for i, room in enumerate(free) if room >= family.length]
        if fitting:
            rows[fitting[0]].append(family)
            free[fitting[0]] -= family.length
        else:
            rows.append([family])
            free.append(capacity - family.length)
    return rows


def _write_family(
    packed: PackedRows, family: Family, row: int, start: int, index: int, slots: int
) -> None:
    """Write a family into a row, from the place `start` on. A batch has `slots` tokens a row."""
    width, length = packed.predictors.shape[1], packed.source.shape[1]
    end = start + family.prompt
    packed.family[row, start : start + family.length] = index
    # The prompt is taken from the first episode that has it, where it ends before the completion.
    first = family.first * slots + slots - width - family.prompt
    packed.source[row, start:end] = torch.arange(first, first + family.prompt)
    packed.position_ids[row, start:end] = torch.arange(family.prompt)
    last_of_prompt = row * length + end - 1
    for segment, (episode, tokens) in enumerate(
        zip(family.episodes, family.lengths, strict=True), start=1
    ):
        place = slice(end, end + tokens)
        first = episode * slots + slots - width
        packed.source[row, place] = torch.arange(first, first + tokens)
        packed.position_ids[row, place] = torch.arange(family.prompt, family.prompt + tokens)
        packed.segment[row, place] = segment
        packed.predictors[episode, 0] = last_of_prompt
        # A width of 1 leaves no place for a second token.
        packed.predictors[episode, 1 : tokens + 1] = torch.arange(tokens) + row * length + end
        end += tokens
