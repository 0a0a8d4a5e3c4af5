"""The end of a run: what changed, where the time went, which kernels ran, what was written."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import fastpg
from fastpg.trainer.episodes import Episodes

# The files that a run leaves in its output directory, as the report describes them.
FILES = {
    "model": "the policy and its tokenizer, for `from_pretrained`; the value head",
    "best_model": "likewise, as it was at its best evaluation",
    "checkpoint-*": "what `fastpg train --resume` goes on from",
    "metrics.jsonl": "the metrics of each step, one line a step",
    "completions": "samples of every step",
    "tensorboard": "the metrics, for TensorBoard",
    "config.yaml": "the settings as given, for `fastpg train --config`",
    "summary.md": "this report",
    "reward_and_kl.png": "reward and KL over the steps",
}

NUM_SAMPLES = 6
SAMPLE_WIDTH = 160  # characters of a prompt or completion


@dataclass(frozen=True)
class Section:
    """A titled table, for Markdown and the terminal alike.

    Args:
        title: The title.
        header: The heading of each column.
        lines: The cells of each line.
    """

    title: str
    header: tuple[str, ...]
    lines: Sequence[tuple[str, ...]]

    def markdown(self) -> str:
        """Return the section as Markdown."""
        rule = ("---",) * len(self.header)
        text = [f"## {self.title}", ""]
        for line in (self.header, rule, *self.lines):
            # A bar in a cell would begin another cell.
            cells = [cell.replace("|", r"\|") for cell in line]
            text.append(f"| {' | '.join(cells)} |")
        return "\n".join([*text, ""])

    def table(self) -> Table:
        """Return the section for a rich console."""
        table = Table(
            # rich reads [brackets] as markup, and directories and completions may hold them.
            title=escape(self.title),
            title_justify="left",
            title_style="bold",
            box=box.SIMPLE_HEAD,
        )
        for heading in self.header:
            table.add_column(heading)
        for cells in self.lines:
            table.add_row(*map(escape, cells))
        return table


@dataclass(frozen=True)
class Report:
    """The summary of a finished run.

    Args:
        title: The name of the algorithm.
        before: The evaluation before training.
        after: The evaluation after training.
        steps: The metrics of each step, and its number as "step".
        seconds: The seconds of each phase of training.
        device: The type of the device, as `fastpg.kernels_of` writes it: "CPU", "CUDA".
        directory: Where the files of the run are.
    """

    title: str
    before: Episodes
    after: Episodes
    steps: list[dict[str, Any]]
    seconds: dict[str, float]
    device: str
    directory: Path

    def write(self) -> None:
        """Write `summary.md` and its plot."""
        self._plot().savefig(self.directory / "reward_and_kl.png", dpi=120)
        text = [f"# {self.title} run", ""]
        text += [section.markdown() for section in self._sections()]
        text += ["![reward and KL](reward_and_kl.png)", ""]
        (self.directory / "summary.md").write_text("\n".join(text), encoding="utf-8")

    def show(self, console: Console) -> None:
        """Print the report.

        Args:
            console: Where to print it.
        """
        for section in self._sections():
            console.print(section.table())

    def _sections(self) -> list[Section]:
        lines = [
            (name, what)
            for name, what in FILES.items()
            if name != "best_model" or (self.directory / name).exists()
        ]
        files = Section(f"Written to {self.directory}", ("file", "what it is"), lines)
        return [self._samples(), self._evaluation(), self._times(), self._kernels(), files]

    def _samples(self) -> Section:
        # Both evaluations have the same prompts, in the same order.
        samples = zip(
            self.before.prompts, self.before.completions, self.after.completions, strict=True
        )
        lines = [
            (_shortened(prompt), _shortened(before), _shortened(after))
            for prompt, before, after in samples
        ]
        return Section("Samples", ("prompt", "before", "after"), lines[:NUM_SAMPLES])

    def _evaluation(self) -> Section:
        # Both evaluations drew the same random numbers, so they differ by the policy alone.
        before, after = self.before.metrics(), self.after.metrics()
        lines = [(name, f"{before[name]:.3f}", f"{after[name]:.3f}") for name in before]
        return Section("Evaluation", ("metric", "before", "after"), lines)

    def _times(self) -> Section:
        # Evaluation is no phase of training, so the shares are of the steps alone.
        total = sum(self.seconds.values())
        lines = [(phase, f"{s:.1f}", f"{s / total:.0%}") for phase, s in self.seconds.items()]
        return Section("Where the time went", ("phase", "seconds", "share"), lines)

    def _kernels(self) -> Section:
        kernels = fastpg.kernels_of().items()
        # An op without a kernel for this device is served by its reference.
        lines = [(op, devices.get(self.device, "reference")) for op, devices in kernels]
        return Section(f"Kernels on {self.device}", ("op", "kernel"), lines)

    def _plot(self) -> Figure:
        # A Figure of its own, without pyplot, needs no display and stays out of global state.
        figure = Figure(figsize=(7, 4), layout="tight")
        steps = [metrics["step"] for metrics in self.steps]
        reward = figure.subplots()
        reward.plot(steps, [metrics["reward/mean"] for metrics in self.steps], color="tab:blue")
        reward.set_xlabel("step")
        reward.set_ylabel("mean reward", color="tab:blue")
        # Without a reference model there is no KL.
        if "objective/kl" in self.steps[0]:
            kl = reward.twinx()
            kl.plot(steps, [metrics["objective/kl"] for metrics in self.steps], color="tab:orange")
            kl.set_ylabel("KL to the starting model, nats per episode", color="tab:orange")
        return figure


def _shortened(content: Any) -> str:
    """Return the beginning of a text, or of the last of some chat messages, on one line."""
    text = content if isinstance(content, str) else _text_of(content[-1].get("content"))
    return textwrap.shorten(text, SAMPLE_WIDTH, placeholder=" ...")


def _text_of(content: Any) -> str:
    """Return the text in the content of a message: a string, a list of parts, or nothing."""
    if isinstance(content, list):
        return " ".join(_text_of(part.get("text")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""
