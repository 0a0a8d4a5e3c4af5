"""The statistics of the losses: sums, counts, minima, maxima and moments in one fp64 tensor each.

They merge exactly over micro-batches and ranks; no mean is taken before `summary`. All kinds live
here, a floor below the pages, because the op that fills one and merge_stats both need it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .moments import Moments, merge_moments


class PolicyStats(NamedTuple):
    """What policy_loss counted over its unmasked tokens: values [16] in the order of FIELDS.

    count, weight          the tokens; Σ w
    loss, surrogate        Σ w·l; the part of it that is the surrogate
    ratio, ratio_sq        Σ r, Σ r²; r is that of the sequence if the level is
    k1, k3                 Σ −d, Σ (e^d − 1 − d), d = logp − old_logp: estimates of KL(old ‖ new)
    clipped_low            tokens whose ratio is held at 1 − low: A < 0 and r < 1 − low
    clipped_high           at 1 + high or dual_clip: A > 0, r > 1 + high; A < 0, r > dual_clip
    ref_kl, entropy        Σ of the KL to the reference as `kl` estimates it; Σ H
    ratio_min, has_ref_kl, has_entropy   minima; the flags are 1 where the sum above was computed
    ratio_max              a maximum
    """

    values: Tensor

    FIELDS = (
        *("count", "weight", "loss", "surrogate", "ratio", "ratio_sq", "k1", "k3"),
        *("clipped_low", "clipped_high", "ref_kl", "entropy"),
        *("ratio_min", "has_ref_kl", "has_entropy"),
        "ratio_max",
    )

    @staticmethod
    def tally(
        kept, weight, loss, surrogate, ratio, d, clipped_low, clipped_high, ref_kl, entropy
    ) -> Tensor:
        """values, from tensors of one shape; ref_kl and entropy may be None. Reads kept tokens."""
        sums = [kept, weight, loss, surrogate, torch.where(kept, ratio, 0.0)]
        sums += [sums[-1] ** 2, -d, torch.expm1(d) - d, clipped_low, clipped_high]
        sums += [torch.zeros_like(ratio) if x is None else x for x in (ref_kl, entropy)]
        flags = [ratio.new_full((), float(x is not None)) for x in (ref_kl, entropy)]
        bound = ratio.new_full((1,), math.inf)  # an empty tensor has no minimum
        least = torch.cat([ratio.masked_fill(~kept, math.inf).flatten(), bound]).amin()
        most = torch.cat([ratio.masked_fill(~kept, -math.inf).flatten(), -bound]).amax()
        fields = [*(x.sum(dtype=torch.float64) for x in sums), least, *flags, most]
        return torch.stack([field.double() for field in fields])

    @staticmethod
    def merge(rows: Tensor) -> Tensor:
        """[M, 16] -> [16]"""
        return torch.cat([rows[:, :12].sum(0), rows[:, 12:15].amin(0), rows[:, 15:].amax(0)])

    @staticmethod
    def summary(row: list[float]) -> dict[str, float]:
        s = dict(zip(PolicyStats.FIELDS, row, strict=True))
        n = max(s["count"], 1.0)
        out = {
            "loss": s["loss"],
            "clip_frac_low": s["clipped_low"] / n,
            "clip_frac_high": s["clipped_high"] / n,
            "approx_kl": s["k3"] / n,
            "kl": s["k1"] / n,
            "ratio_mean": s["ratio"] / n,
            "ratio_min": s["ratio_min"] if s["count"] else 1.0,
            "ratio_max": s["ratio_max"] if s["count"] else 1.0,
            "ess": s["ratio"] ** 2 / (n * s["ratio_sq"]) if s["count"] else 0.0,
            "count": s["count"],
        }
        means = {name: s[name] / n for name in ("ref_kl", "entropy") if s[f"has_{name}"]}
        return out | means


class ValueStats(NamedTuple):
    """What value_loss counted over its unmasked tokens: values [8] in the order of FIELDS.

    count, weight, loss    the tokens; Σ w; Σ w·l
    clipped                tokens where the clipped error is the larger one
    return_mean, return_m2        mean of the returns R, Σ (R − mean)²
    residual_mean, residual_m2    the same of R − V
    """

    values: Tensor

    FIELDS = (
        *("count", "weight", "loss", "clipped"),
        *("return_mean", "return_m2", "residual_mean", "residual_m2"),
    )

    @staticmethod
    def merge(rows: Tensor) -> Tensor:
        """[M, 8] -> [8]; the moments by Chan: M2 = Σ M2ᵢ + Σ nᵢ (meanᵢ − mean)²."""
        _, mean, m2 = merge_moments(Moments(rows[:, :1], rows[:, 4::2], rows[:, 5::2]))
        return torch.cat([rows[:, :4].sum(0), torch.stack([mean, m2], 1).flatten()])

    @staticmethod
    def summary(row: list[float]) -> dict[str, float]:
        s = dict(zip(ValueStats.FIELDS, row, strict=True))
        explained = 1 - s["residual_m2"] / s["return_m2"] if s["return_m2"] else 0.0
        return {
            "loss": s["loss"],
            "clip_frac": s["clipped"] / max(s["count"], 1.0),
            "mean": s["return_mean"] - s["residual_mean"],
            "return_mean": s["return_mean"],
            "explained_variance": explained,
            "count": s["count"],
        }


class ImportanceStats(NamedTuple):
    """What importance_weights counted over unmasked tokens: values [11] in the order of FIELDS.

    tokens, k1, k3         the tokens; Σ −d, Σ (e^d − 1 − d): two estimates of KL(behavior ‖ policy)
    count                  the weights: one a token, or one a sequence that has a token
    ratio                  Σ of the ratios, before the bounds
    weight, weight_sq      Σ w, Σ w², within the bounds
    low, high              ratios below low, above high
    ratio_min, ratio_max   a minimum and a maximum
    """

    values: Tensor

    FIELDS = (
        *("tokens", "k1", "k3", "count", "ratio", "weight", "weight_sq", "low", "high"),
        *("ratio_min", "ratio_max"),
    )

    @staticmethod
    def merge(rows: Tensor) -> Tensor:
        """[M, 11] -> [11]"""
        return torch.cat([rows[:, :9].sum(0), rows[:, 9:10].amin(0), rows[:, 10:].amax(0)])

    @staticmethod
    def summary(row: list[float]) -> dict[str, float]:
        s = dict(zip(ImportanceStats.FIELDS, row, strict=True))
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


class PreferenceStats(NamedTuple):
    """What preference_loss counted over its pairs of weight other than 0: values [7], all sums.

    count, weight, loss           the pairs; Σ w; Σ w·l
    correct                       pairs whose chosen score is the higher one
    margin, chosen, rejected      Σ (r_w − r_l), Σ r_w, Σ r_l
    """

    values: Tensor

    FIELDS = ("count", "weight", "loss", "correct", "margin", "chosen", "rejected")

    @staticmethod
    def merge(rows: Tensor) -> Tensor:
        """[M, 7] -> [7]"""
        return rows.sum(0)

    @staticmethod
    def summary(row: list[float]) -> dict[str, float]:
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


Stats = PolicyStats | ValueStats | ImportanceStats | PreferenceStats
