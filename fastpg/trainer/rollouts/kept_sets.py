"""The sets of tokens that top-k and top-p left to be sampled, recorded for the log-probs.

A token y that was drawn from a set K has the log-prob log p(y) − log Σ_K p. With the same set in
every log-prob of it, a ratio of policies is one of the distributions that tokens are drawn from.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import LogitsProcessor

from fastpg.trainer.rollouts.sampling import Sampling, is_kept


@dataclass(frozen=True)
class KeptSets:
    """The sets of the completion tokens of B episodes.

    Args:
        token_ids: int32 [E], the tokens of all sets, one set after the other, in the order of the
            completion tokens. They rise within a set.
        counts: int64 [B, T], how many tokens each set has. 0 stands for the whole vocabulary.
    """

    token_ids: Tensor
    counts: Tensor

    @property
    def support(self) -> tuple[Tensor, Tensor]:
        """The sets as `fastpg.token_logprobs(support=)` takes them: tokens and offsets."""
        return self.token_ids, pad(self.counts.flatten().cumsum(0), (1, 0))

    def __getitem__(self, rows: Tensor) -> "KeptSets":
        """Return the sets of the episodes `rows`, int64 [n], in that order."""
        places = torch.arange(self.counts.numel(), device=self.counts.device)
        places = places.view_as(self.counts)[rows]
        return KeptSets(
            _segments(self.token_ids, self.counts.flatten(), places.flatten()), self.counts[rows]
        )

    def lengthened(self) -> "KeptSets":
        """Return these sets with the whole vocabulary for one more token of each episode."""
        return KeptSets(self.token_ids, pad(self.counts, (0, 1)))


def _segments(values: Tensor, counts: Tensor, order: Tensor) -> Tensor:
    """Return some of the segments that lie in `values`, one after the other, in another order.

    Args:
        values: [E].
        counts: int64 [N], how long each segment is.
        order: int64 [n], the numbers of the segments.
    """
    begins, lengths = counts.cumsum(0) - counts, counts[order]
    new_begins = lengths.cumsum(0) - lengths
    shift = (begins[order] - new_begins).repeat_interleave(lengths)
    return values[shift + torch.arange(len(shift), device=values.device)]


class _Step(NamedTuple):
    """The sets of one token of some episodes."""

    episodes: Tensor  # int64 [n]
    token_ids: Tensor  # int32 [E]
    counts: Tensor  # int64 [n]


@dataclass
class SetRecorder:
    """Cuts logits to what sampling keeps, step by step, and remembers the sets.

    Args:
        sampling: What is kept.
    """

    sampling: Sampling
    steps: list[_Step] = field(default_factory=list)

    def cut(self, logits: Tensor, episodes: Tensor, grows: Tensor) -> Tensor:
        """Cut the logits of the next token.

        Args:
            logits: [..., V], before the temperature.
            episodes: int64 [...], whose token it is.
            grows: bool [...], whether that episode has not ended; otherwise no set is recorded.

        Returns:
            The logits, −inf at all tokens that are not kept.
        """
        kept = is_kept(logits.float(), self.sampling)
        recorded = kept[grows]
        token_ids = recorded.nonzero()[:, 1].int()
        self.steps.append(_Step(episodes[grows], token_ids, recorded.sum(-1)))
        return logits.masked_fill(~kept, -torch.inf)

    def sets(self, mask: Tensor) -> KeptSets:
        """Return the sets of all steps.

        Args:
            mask: bool [B, T], the tokens that belong to completions.
        """
        steps = [step.episodes * len(self.steps) + i for i, step in enumerate(self.steps)]
        places = torch.cat(steps)
        order = places.argsort()
        order = order[mask.flatten()[places[order]]]
        found = torch.cat([step.counts for step in self.steps])
        counts = found.new_zeros(mask.numel())
        counts[places[order]] = found[order]
        token_ids = torch.cat([step.token_ids for step in self.steps])
        return KeptSets(_segments(token_ids, found, order), counts.view(mask.shape))


class CutLogits(LogitsProcessor):
    """Lets a `SetRecorder` cut the logits of the model's own `generate`.

    Args:
        recorder: The recorder.
        ends: The tokens that end a completion.
        prompt: The tokens of a prompt, padding included.
    """

    def __init__(self, recorder: SetRecorder, ends: list[int], prompt: int) -> None:
        self.recorder, self.ends, self.prompt = recorder, ends, prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Cut the scores [B, V] of the tokens after `input_ids`, int64 [B, L]."""
        ends = torch.tensor(self.ends, device=input_ids.device)
        grows = ~torch.isin(input_ids[:, self.prompt :], ends).any(-1)
        return self.recorder.cut(scores, torch.arange(len(scores), device=scores.device), grows)
