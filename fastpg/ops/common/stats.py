"""The statistics of the losses: sums, counts, minima, maxima and moments in one fp64 tensor each.

They merge exactly over micro-batches and ranks; no mean is taken before `summary`. The names of the
statistics stand here once, as FIELDS: what merges them, the kernels in Triton and those in C++,
which name them too (csrc/common/statistics.h), all have their order from it.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import ClassVar, NamedTuple, get_args

import torch
from torch import Tensor

from ..._library import _C, _cuda
from .moments import Moments, merge_moments

Names = tuple[str, ...]

# A mean in fp64 may be off by so much of itself: by more than its last bit, as its sum is rounded.
ROUNDING = 2.0**-50


class Values(NamedTuple):
    """What every kind of statistics holds. A kind adds the names of the values, as class variables.

    The kinds are derived from this, since typing knows no class variables in a NamedTuple itself.
    """

    values: Tensor


class PolicyStats(Values):
    """What `policy_loss` counted over its unmasked tokens; `merge_stats` makes means of it.

    r is the ratio that the surrogate took: the token's own, or that of its sequence. d is
    logp − old_logp.

    Attributes:
        values: fp64 [16], in the order of FIELDS:

            count: the tokens
            loss, surrogate: Σ w·l; the part of it that is the surrogate
            ratio, ratio_sq: Σ r, Σ r²
            k1, k3: Σ −d, Σ (e^d − 1 − d), two estimates of KL(old ‖ new)
            clipped_low: tokens whose ratio is held at 1 − low: A < 0 and r < 1 − low
            clipped_high: tokens held at 1 + high: A > 0 and r > 1 + high
            clipped_dual: tokens held at dual_clip: A < 0 and r > dual_clip
            ref_kl, entropy: Σ of the KL to the reference as `kl` estimates it; Σ H
            ratio_min, ratio_max: the least and the greatest r
            has_ref_kl, has_entropy: 1 where the sum of that name was computed, else 0; minima

    Example:
        >>> logp = torch.tensor([-1.0, -2.0])
        >>> loss, stats = fastpg.policy_loss(logp, torch.ones(2), torch.tensor([0.5, 0.5]))
        >>> dict(zip(stats.FIELDS, stats.values.tolist()))["count"]
        2.0
    """

    __slots__ = ()

    SUMS: ClassVar[Names] = (
        *("count", "loss", "surrogate", "ratio", "ratio_sq", "k1", "k3"),
        *("clipped_low", "clipped_high", "clipped_dual", "ref_kl", "entropy"),
    )
    MINIMA: ClassVar[Names] = ("ratio_min", "has_ref_kl", "has_entropy")
    MAXIMA: ClassVar[Names] = ("ratio_max",)
    FIELDS: ClassVar[Names] = SUMS + MINIMA + MAXIMA

    @staticmethod
    def merge(rows: Tensor) -> Tensor:
        """The statistics [16] of all tokens, from those [M, 16] of their parts."""
        return merge_bounds(PolicyStats, rows)

    @staticmethod
    def summary(row: list[float]) -> dict[str, float]:
        """The means that `merge_stats` returns, from the values as floats."""
        s = dict(zip(PolicyStats.FIELDS, row, strict=True))
        n = max(s["count"], 1.0)  # Of no tokens all sums are 0, and so are their means.
        out = {
            "loss": s["loss"],
            "clip_frac_low": s["clipped_low"] / n,
            "clip_frac_high": s["clipped_high"] / n,
            "clip_frac_dual": s["clipped_dual"] / n,
            "approx_kl": s["k3"] / n,
            "kl": s["k1"] / n,
            "ratio_mean": s["ratio"] / n,
            "ratio_min": s["ratio_min"] if s["count"] else 1.0,
            "ratio_max": s["ratio_max"] if s["count"] else 1.0,
            "ess": s["ratio"] ** 2 / (n * s["ratio_sq"]) if s["count"] else 0.0,
            "count": s["count"],
        }
        # A part without the term would count as 0 in the mean, so the mean is left out then.
        means = {name: s[name] / n for name in ("ref_kl", "entropy") if s[f"has_{name}"]}
        return out | means


class ValueStats(Values):
    """What `value_loss` counted over its unmasked tokens; `merge_stats` makes means of it.

    Attributes:
        values: fp64 [8], in the order of FIELDS:

            count, weight, loss: the tokens; Σ w; Σ w·l
            clipped: tokens where the clipped error is the larger one
            return_mean, return_m2: the mean of the returns R; Σ (R − mean)²
            residual_mean, residual_m2: the same of R − V

    Example:
        >>> values, returns = torch.tensor([1.0, 2.0]), torch.tensor([1.5, 2.5])
        >>> loss, stats = fastpg.value_loss(values, returns, torch.tensor([0.5, 0.5]))
        >>> dict(zip(stats.FIELDS, stats.values.tolist()))["return_mean"]
        2.0
    """

    __slots__ = ()

    SUMS: ClassVar[Names] = ("count", "weight", "loss", "clipped")
    # Each mean has its m2 behind it.
    MOMENTS: ClassVar[Names] = ("return_mean", "return_m2", "residual_mean", "residual_m2")
    FIELDS: ClassVar[Names] = SUMS + MOMENTS

    @staticmethod
    def merge(rows: Tensor) -> Tensor:
        """The statistics [8] of all tokens, from those [M, 8] of their parts."""
        sums, moments = rows.split([len(ValueStats.SUMS), len(ValueStats.MOMENTS)], dim=1)
        count = sums[:, ValueStats.SUMS.index("count"), None]
        # Every mean is followed by its M2; both kinds of values share the count.
        _, mean, m2 = merge_moments(Moments(count, moments[:, 0::2], moments[:, 1::2]))
        return torch.cat([sums.sum(0), torch.stack([mean, m2], 1).flatten()])

    @staticmethod
    def summary(row: list[float]) -> dict[str, float]:
        """The means that `merge_stats` returns, from the values as floats."""
        s = dict(zip(ValueStats.FIELDS, row, strict=True))
        # Returns that do not vary leave nothing to explain. Of equal ones m2 is 0, or what rounding
        # makes of their mean. A NaN is neither more nor less than that, and shows.
        rounded = ROUNDING * s["return_mean"]
        vary = not s["return_m2"] <= s["count"] * rounded * rounded
        explained = 1 - s["residual_m2"] / s["return_m2"] if vary else 0.0
        return {
            "loss": s["loss"],
            "clip_frac": s["clipped"] / max(s["count"], 1.0),
            "mean": s["return_mean"] - s["residual_mean"],
            "return_mean": s["return_mean"],
            "explained_variance": explained,
            "count": s["count"],
        }


class ImportanceStats(Values):
    """What `importance_weights` counted over its unmasked tokens; `merge_stats` makes means of it.

    d is logp − behavior_logp.

    Attributes:
        values: fp64 [11], in the order of FIELDS:

            tokens: the tokens
            k1, k3: Σ −d, Σ (e^d − 1 − d), two estimates of KL(behavior ‖ policy)
            count: the weights: one a token, or one a sequence that has a token
            ratio: Σ of the ratios, before the bounds
            weight, weight_sq: Σ w, Σ w², within the bounds
            low, high: ratios below low, above high
            ratio_min, ratio_max: the least and the greatest ratio

    Example:
        >>> logp, behavior_logp = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.0, -2.0]])
        >>> mask = torch.ones(1, 2, dtype=torch.bool)
        >>> weights, stats = fastpg.importance_weights(logp, behavior_logp, mask)
        >>> dict(zip(stats.FIELDS, stats.values.tolist()))["ratio"]
        2.0
    """

    __slots__ = ()

    SUMS: ClassVar[Names] = (
        "tokens",
        "k1",
        "k3",
        "count",
        "ratio",
        "weight",
        "weight_sq",
        "low",
        "high",
    )
    MINIMA: ClassVar[Names] = ("ratio_min",)
    MAXIMA: ClassVar[Names] = ("ratio_max",)
    FIELDS: ClassVar[Names] = SUMS + MINIMA + MAXIMA

    @staticmethod
    def merge(rows: Tensor) -> Tensor:
        """The statistics [11] of all tokens, from those [M, 11] of their parts."""
        return merge_bounds(ImportanceStats, rows)

    @staticmethod
    def summary(row: list[float]) -> dict[str, float]:
        """The means that `merge_stats` returns, from the values as floats."""
        s = dict(zip(ImportanceStats.FIELDS, row, strict=True))
        # The KL is per token at every level, the rest is per weight.
        tokens, n = max(s["tokens"], 1.0), max(s["count"], 1.0)
        return {
            "outside_low": s["low"] / n,
            "outside_high": s["high"] / n,
            "weight_mean": s["weight"] / n,
            "ratio_mean": s["ratio"] / n,
            "ratio_min": s["ratio_min"] if s["count"] else 1.0,
            "ratio_max": s["ratio_max"] if s["count"] else 1.0,
            "ess": s["weight"] ** 2 / (n * s["weight_sq"]) if s["weight_sq"] else 0.0,
            "approx_kl": s["k3"] / tokens,
            "kl": s["k1"] / tokens,
            "count": s["count"],
        }


class PreferenceStats(Values):
    """What `preference_loss` counted over its pairs of weight other than 0.

    Attributes:
        values: fp64 [7], in the order of FIELDS, all of them sums:

            count, weight, loss: the pairs; Σ w; Σ w·l
            correct: pairs whose chosen score is the higher one
            margin, chosen, rejected: Σ (r_w − r_l), Σ r_w, Σ r_l

    Example:
        >>> chosen, rejected = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 3.0])
        >>> loss, stats = fastpg.preference_loss(chosen, rejected)
        >>> dict(zip(stats.FIELDS, stats.values.tolist()))["correct"]
        1.0
    """

    __slots__ = ()

    FIELDS: ClassVar[Names] = ("count", "weight", "loss", "correct", "margin", "chosen", "rejected")

    @staticmethod
    def merge(rows: Tensor) -> Tensor:
        """The statistics [7] of all pairs, from those [M, 7] of their parts."""
        # All of them are sums.
        return rows.sum(0)

    @staticmethod
    def summary(row: list[float]) -> dict[str, float]:
        """The means that `merge_stats` returns, from the values as floats."""
        s = dict(zip(PreferenceStats.FIELDS, row, strict=True))
        n = max(s["count"], 1.0)
        return {
            "loss": s["loss"],
            "accuracy": s["correct"] / n,
            "margin": s["margin"] / n,
            "chosen_mean": s["chosen"] / n,
            "rejected_mean": s["rejected"] / n,
            "count": s["count"],
        }


class DistillationStats(Values):
    """What `distillation_loss` counted over its tokens of weight other than 0.

    Attributes:
        values: fp64 [5], in the order of FIELDS, all of them sums:

            count, loss: the tokens; Σ w·D
            divergence: Σ D
            student_tail, teacher_tail: Σ of the probability that the kept tokens leave

    Example:
        >>> logp = torch.tensor([[0.5, 0.25]]).log()
        >>> loss, stats = fastpg.distillation_loss(logp, logp, torch.ones(1))
        >>> dict(zip(stats.FIELDS, stats.values.tolist()))["divergence"]
        0.0
    """

    __slots__ = ()

    FIELDS: ClassVar[Names] = ("count", "loss", "divergence", "student_tail", "teacher_tail")

    @staticmethod
    def merge(rows: Tensor) -> Tensor:
        """The statistics [5] of all tokens, from those [M, 5] of their parts."""
        # All of them are sums.
        return rows.sum(0)

    @staticmethod
    def summary(row: list[float]) -> dict[str, float]:
        """The means that `merge_stats` returns, from the values as floats."""
        s = dict(zip(DistillationStats.FIELDS, row, strict=True))
        n = max(s["count"], 1.0)
        means = {name: s[name] / n for name in ("divergence", "student_tail", "teacher_tail")}
        return {"loss": s["loss"], **means, "count": s["count"]}


Stats = PolicyStats | ValueStats | ImportanceStats | PreferenceStats | DistillationStats


def merge_bounds(kind: type[PolicyStats | ImportanceStats], rows: Tensor) -> Tensor:
    """One row of statistics that are sums, minima or maxima, from a row for each part."""
    # FIELDS is these three in this order, and so is a row.
    lengths = [len(kind.SUMS), len(kind.MINIMA), len(kind.MAXIMA)]
    sums, minima, maxima = rows.split(lengths, dim=1)
    return torch.cat([sums.sum(0), minima.amin(0), maxima.amax(0)])


def tally(kind: type[PolicyStats | ImportanceStats], fields: dict[str, Tensor]) -> Tensor:
    """The statistics of a kind, each made of the elements of the tensor that has its name.

    An infinity stands beside the elements of a minimum or maximum, since there may be none.
    """
    values = []
    for name in kind.FIELDS:
        x = fields[name]
        if name in kind.SUMS:
            values.append(x.sum(dtype=torch.float64))
        elif name in kind.MINIMA:
            values.append(torch.cat([x.flatten(), x.new_full((1,), math.inf)]).amin().double())
        else:
            values.append(torch.cat([x.flatten(), x.new_full((1,), -math.inf)]).amax().double())
    return torch.stack(values)


def check_names(module: ModuleType) -> None:
    """Raises ImportError unless an extension names the statistics as the classes here do."""
    kinds = {kind.__name__: kind for kind in get_args(Stats)}
    for name, theirs in getattr(module, "statistics", {}).items():
        ours = list(kinds[name].FIELDS)
        if ours != theirs:
            raise ImportError(
                f"fastpg: {module.__name__} was built for other statistics than those of {name}; "
                f"build the extension again\n"
                f"  Python: {', '.join(ours)}\n  C++:    {', '.join(theirs)}"
            )


for extension in (_C, _cuda):
    if extension is not None:
        check_names(extension)
