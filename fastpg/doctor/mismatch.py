"""Where the log-ratios of a trainer to a rollout engine come from, on tokens that both scored.

A plain trainer scores the completions first: whole vocabulary, temperature 1, logits in the model's
dtype, padded batches. Then corrections are made in turn, at each turn the one that takes most off
the mean |log-ratio|, until none helps. What a correction takes off is the share of its cause.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpg.trainer.rollouts.sampling import Sampling

from .scoring import AS_GIVEN, Scorer, Way

# A correction helps if it takes this part off the mean |log-ratio|, by so many standard errors, and
# more than rounding in fp32 makes.
PART, ERRORS, ROUNDING = 0.05, 3.0, 1e-5

LOW, HIGH = math.log(0.9), math.log(1.1)

AGREE = 1e-3  # log-ratios this small on average are of no consequence


class Correction(NamedTuple):
    """A way in which an engine may have made its log-probs otherwise than a plain trainer."""

    name: str
    cause: str  # the sentence, if it is the largest
    field: str  # of `Way`
    value: Any


class Gap(NamedTuple):
    """How far log-ratios are from 0."""

    mean: float  # |log-ratio|
    outside: float  # part of the tokens whose ratio is outside [0.9, 1.1]
    largest: float  # |log-ratio|


class Row(NamedTuple):
    """A line of the table."""

    name: str
    gap: Gap
    correction: Correction | None  # None: the first line


class MismatchReport(NamedTuple):
    """What each correction takes off, the largest cause, and what could not be tried."""

    sequences: int
    tokens: int
    taken: list[Row]  # the first is the plain trainer's, each other one on top of those before it
    others: list[Row]  # corrections that do not help, each on top of all that were taken
    not_tried: list[str]

    @property
    def left(self) -> Gap:
        """What is left after all corrections."""
        return self.taken[-1].gap

    @property
    def shares(self) -> dict[Correction, float]:
        """How much each cause adds to the mean |log-ratio|.

        Trainers divide by the temperature that they know. If the engine's log-probs are those
        before, it is this that sets them apart.
        """
        shares = {
            row.correction: before.gap.mean - row.gap.mean
            for before, row in zip(self.taken, self.taken[1:], strict=False)
            if row.correction is not None
        }
        for row in self.others:
            if row.correction is not None and row.correction.field == "temperature":
                raw = row.correction._replace(cause=RAW.format(row.correction.value))
                if (share := row.gap.mean - self.left.mean) > AGREE:
                    shares[raw] = share
        return shares

    @property
    def largest(self) -> Correction | None:
        """The largest cause; None if there is none of those that were tried."""
        shares = self.shares
        return max(shares, key=lambda cause: shares[cause]) if shares else None

    @property
    def sentence(self) -> str:
        """One sentence that names the largest cause."""
        cause = self.largest
        if cause is None and self.left.mean < AGREE and self.left.outside == 0:
            return "The log-probs agree."
        if cause is None:
            return f"It is none of the causes that were tried: {UNKNOWN}."
        share, left = self.shares[cause], self.left.mean
        sentence = (
            f"The largest cause is {cause.cause} (worth {share:.2g} of mean |log-ratio|; "
            f"{left:.2g} is left after all corrections)"
        )
        unknown = f", but there are larger ones: {UNKNOWN}" if left > share else ""
        return f"{sentence}{unknown}."

    def __str__(self) -> str:
        lines = [("", "mean |log-ratio|", "ratio outside [0.9, 1.1]", "max |log-ratio|")]
        lines += [cells(row.name, row.gap) for row in self.taken]
        if self.others:
            lines += [("on top of these, without help:", "", "", "")]
            lines += [cells(f"  {row.name}", row.gap) for row in self.others]
        widths = [max(len(line[i]) for line in lines) for i in range(4)]
        table = [
            "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
            for line in lines
        ]
        head = f"{self.tokens} tokens of {self.sequences} completions"
        not_tried = [f"not tried: {reason}" for reason in self.not_tried]
        return "\n".join([head, "", *table, "", *not_tried, self.sentence])


def cells(name: str, gap: Gap) -> tuple[str, str, str, str]:
    """A line of the table as text."""
    return name, f"{gap.mean:.5f}", f"{100 * gap.outside:.2f} %", f"{gap.largest:.4f}"


UNKNOWN = (
    "the engine may have other weights (an update that came late, quantisation), another prompt, "
    "or kernels that round otherwise"
)
RAW = (
    "temperature: the engine's log-probs are those of temperature 1 (vLLM's raw_logprobs), while a "
    "trainer divides logits by the {} at which tokens were sampled"
)


def diagnose(
    scorer: Scorer, corrections: Sequence[Correction], not_tried: Sequence[str] = ()
) -> MismatchReport:
    """Makes corrections in turn, as long as one helps.

    Args:
        scorer: The model and the rollouts.
        corrections: What to try.
        not_tried: Reasons why others are not among them.

    Returns:
        The report.
    """
    rollouts = scorer.rollouts
    engine = torch.tensor([x for each in rollouts for x in each.logp], dtype=torch.float64)
    way = Way()
    log_ratio = scorer.logp(way) - engine
    taken, others = [Row("a plain trainer", gap_of(log_ratio), None)], []
    left = list(corrections)
    while left:
        tried = [(each, scorer.logp(changed(way, each)) - engine) for each in left]
        best, found = min(tried, key=lambda pair: pair[1].abs().mean().item())
        if not helps(log_ratio, found):
            others = [Row(each.name, gap_of(ratio), each) for each, ratio in tried]
            break
        way, log_ratio = changed(way, best), found
        taken.append(Row(f"+ {best.name}", gap_of(log_ratio), best))
        left = [each for each in left if each.field != best.field]
    return MismatchReport(len(rollouts), len(engine), taken, others, list(not_tried))


def changed(way: Way, correction: Correction) -> Way:
    """A way with one correction more."""
    return way._replace(**{correction.field: correction.value})


def helps(before: Tensor, after: Tensor) -> bool:
    """Whether log-ratios are closer to 0, by more than chance."""
    gain = before.abs() - after.abs()
    error = gain.std(unbiased=False) / len(gain) ** 0.5
    return bool(gain.mean() > max(PART * before.abs().mean(), ERRORS * error, ROUNDING))


def gap_of(log_ratio: Tensor) -> Gap:
    """How far log-ratios are from 0."""
    outside = (log_ratio < LOW) | (log_ratio > HIGH)
    size = log_ratio.abs()
    return Gap(size.mean().item(), outside.double().mean().item(), size.max().item())


def corrections_of(scorer: Scorer, known_tokens: int | None) -> tuple[list[Correction], list[str]]:
    """What can be corrected of a model and its rollouts.

    Args:
        scorer: The model and the rollouts.
        known_tokens: How many tokens the tokenizer knows; None: there is no tokenizer.

    Returns:
        The corrections, and why others are not among them.
    """
    found = [*_of_prompts(scorer), *_of_sampling(scorer.sampling), *_of_rounding(scorer)]
    if known_tokens is None:
        return found, ["chat template, BOS, padded vocabulary: the model has no tokenizer"]
    if scorer.labels.max() < known_tokens < scorer.vocab:
        cause = (
            f"the padded vocabulary: the head has {scorer.vocab} rows, and the engine's softmax is "
            f"over the {known_tokens} tokens of the tokenizer"
        )
        name = f"vocabulary of {known_tokens}, not {scorer.vocab}"
        found.append(Correction(name, cause, "vocab", known_tokens))
    return found, []


def _of_prompts(scorer: Scorer) -> Iterator[Correction]:
    for form in scorer.prompts:
        if form != AS_GIVEN:
            cause = f"the prompts: the engine saw them {form}"
            yield Correction(f"prompts {form}", cause, "prompts", form)


def _of_sampling(sampling: Sampling) -> Iterator[Correction]:
    if sampling.temperature != 1:
        cause = (
            f"temperature: the engine's log-probs are those of logits / {sampling.temperature}, "
            "which the trainer must divide too"
        )
        name = f"temperature {sampling.temperature}"
        yield Correction(name, cause, "temperature", sampling.temperature)
    if not sampling.keeps_all:
        cause = (
            f"the kept mass: the engine's softmax is over the tokens that {sampling} kept; pass "
            "those sets as support="
        )
        yield Correction(f"kept sets of {sampling}", cause, "kept", True)


def _of_rounding(scorer: Scorer) -> Iterator[Correction]:
    dtype = str(scorer.policy.dtype).removeprefix("torch.")
    if dtype in ("bfloat16", "float16"):
        cause = (
            f"{dtype} logits: the engine's are in fp32, and rounding them to {dtype} is what "
            "logits_dtype=torch.float32 avoids"
        )
        yield Correction("logits in fp32", cause, "fp32_logits", True)
    if len(scorer.rollouts) > 1:
        cause = (
            "the batch shape: the engine's log-probs are those of each sequence by itself, and the "
            "same tokens in a padded batch are rounded otherwise"
        )
        yield Correction("each sequence alone", cause, "alone", True)
