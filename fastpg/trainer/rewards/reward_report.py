"""How well a reward model tells better answers from worse: numbers, a plot and a page."""

from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

import fastpg
from fastpg.trainer.run.files import write_text

NUM_BINS = 10


@dataclass(frozen=True)
class Judgement:
    """What a reward model says of N held-out pairs.

    Args:
        chosen: float32 [N], the scores of the preferred answers.
        rejected: float32 [N], the scores of the others.
    """

    chosen: Tensor
    rejected: Tensor

    def metrics(self) -> dict[str, float]:
        """Return loss, accuracy, margin, mean scores and the calibration error."""
        _, stats = fastpg.preference_loss(self.chosen, self.rejected)
        merged = fastpg.merge_stats([stats])
        confidence, right, count = self.calibration()
        gap = (count / count.sum() * (confidence - right).abs()).sum()
        return {**merged, "calibration_error": gap.item()}

    def calibration(self) -> tuple[Tensor, Tensor, Tensor]:
        """Compare how sure the model is with how often it is right.

        The model takes the answer of the higher score for the better one, with the probability
        sigmoid(|margin|) of Bradley and Terry, which is at least a half.

        Returns:
            For each of `NUM_BINS` equal bins of that probability its mean, the share of pairs in
            which the model is right, and the number of pairs; each [NUM_BINS], 0 where it is empty.
        """
        margin = (self.chosen - self.rejected).double()
        sure = margin.abs().sigmoid()
        bins = ((sure - 0.5) * 2 * NUM_BINS).long().clamp(max=NUM_BINS - 1)
        count = torch.bincount(bins, minlength=NUM_BINS)
        sums = [
            torch.bincount(bins, weights=x, minlength=NUM_BINS)
            for x in (sure, (margin > 0).double())
        ]
        confidence, right = (total / count.clamp(min=1) for total in sums)
        return confidence, right, count

    def plot(self) -> Figure:
        """Draw a histogram of the margins, and the calibration."""
        # A Figure of its own, without pyplot, needs no display and stays out of global state.
        figure = Figure(figsize=(9, 4), layout="tight")
        margins, reliability = figure.subplots(1, 2)
        margins.hist((self.chosen - self.rejected).tolist(), bins=40, color="tab:blue")
        margins.axvline(0, color="black", linewidth=0.8)
        margins.set(
            title="Margins of held-out pairs", xlabel="score of chosen - score of rejected",
            ylabel="pairs",
        )  # fmt: skip
        confidence, right, count = self.calibration()
        shown = count > 0
        reliability.plot([0.5, 1], [0.5, 1], color="black", linewidth=0.8, label="perfect")
        reliability.plot(confidence[shown], right[shown], "o-", color="tab:blue", label="model")
        reliability.set(
            title="Calibration", xlabel="probability that the model gives its choice",
            ylabel="share of pairs in which it is right",
        )  # fmt: skip
        reliability.legend()
        return figure

    def write(self, directory: Path, before: "Judgement") -> None:
        """Write `summary.md` and `reward_model.png`.

        Args:
            directory: Where they go.
            before: What the model said before training.
        """
        self.plot().savefig(directory / "reward_model.png", dpi=120)
        first, last = before.metrics(), self.metrics()
        lines = ["# Reward model", "", "| held-out pairs | before | after |", "| --- | --- | --- |"]
        lines += [f"| {name} | {first[name]:.3f} | {last[name]:.3f} |" for name in last]
        lines += ["", "![margins and calibration](reward_model.png)", ""]
        write_text(directory / "summary.md", "\n".join(lines))
