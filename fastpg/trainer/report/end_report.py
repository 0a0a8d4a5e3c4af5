"""The end of a run: what changed, where the time went, which kernels ran, what was written."""

import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastpg.trainer.report.plot import training_plot
from fastpg.trainer.rewards.episodes import Episodes
from fastpg.trainer.run.files import write_text
from fastpg.trainer.run.run_files import FILES
from fastpg.trainer.run.start import Start

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

    def table(self, width: int) -> Table:
        """Return the section for a console: a line of the screen for each of its lines.

        Args:
            width: The columns of the screen.
        """
        table = Table(box=box.SIMPLE_HEAD, show_edge=False)
        # What is too long is cut, but every column has its share of the screen.
        share = width // len(self.header) - 3
        for i, heading in enumerate((self.title, *self.header[1:])):
            longest = max(len(cells[i]) for cells in [self.header, *self.lines])
            # rich reads [brackets] as markup, and directories and completions may hold them.
            table.add_column(
                escape(heading),
                no_wrap=True,
                overflow="ellipsis",
                min_width=min(longest, share),
            )
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
        start: What the run was started with, for the last time.
        directory: Where the files of the run are, config.yaml among them.
        name: How the settings name that directory.
    """

    title: str
    before: Episodes
    after: Episodes
    steps: list[dict[str, Any]]
    seconds: dict[str, float]
    start: Start
    directory: Path
    name: str

    def write(self) -> None:
        """Write `summary.md` and its plot."""
        rewards = [(row["step"], row.get("eval/reward/mean")) for row in self.steps]
        evaluations = [(step, reward) for step, reward in rewards if reward is not None]
        title = f"{self.title}, {self.name}"
        plot = training_plot(title, self.steps, evaluations)
        plot.savefig(self.directory / "reward.png", dpi=120)
        text = [f"# {self.title} run", ""]
        text += [section.markdown() for section in (self._run(), self._evaluation())]
        text += ["![reward over the steps](reward.png)", ""]
        rest = (self._samples(), self._times(), self._kernels(), self._files())
        text += [section.markdown() for section in rest]
        settings = (self.directory / "config.yaml").read_text(encoding="utf-8")
        text += ["## Settings", "", "```yaml", settings.rstrip(), "```", ""]
        write_text(self.directory / "summary.md", "\n".join(text))

    def show(self, console: Console) -> None:
        """Print the report, in as many lines as the screen has.

        Args:
            console: Where to print it.
        """
        written = ", ".join(name for name, _ in self._files().lines)
        shares = ", ".join(f"{phase} {share}" for phase, _, share in self._times().lines)
        kinds = Counter(kernel for _, kernel in self._kernels().lines).most_common()
        kernels = ", ".join(f"{count} {kernel}" for kernel, count in kinds)
        for line in (
            f"Written to {self.name}: {written}.",
            f"Time of the steps: {sum(self.seconds.values()):.0f} s ({shares}).",
            f"Kernels on {self.start.device}: {kernels}; `fastpg` lists them.",
        ):
            console.print(line, markup=False, style="dim")
        console.print()
        evaluation, samples = self._evaluation().table(console.width), self._samples()
        console.print(evaluation)
        console.print()
        # The evaluation has seven lines with one reward; what is above it has five to seven.
        above = len(console.render_lines(evaluation)) + 11
        room = max(2, console.height - above) if console.is_terminal else NUM_SAMPLES
        shown = Section(samples.title, samples.header, samples.lines[:room])
        console.print(shown.table(console.width))

    def _run(self) -> Section:
        versions = ", ".join(f"{name} {number}" for name, number in self.start.versions.items())
        lines = [
            ("date", self.start.date),
            ("command", f"`{self.start.command}`"),
            ("versions", versions),
            ("machine", self.start.machine),
        ]
        return Section("Run", ("what", "which"), lines)

    def _files(self) -> Section:
        lines = [
            (name, what)
            for name, what in FILES.items()
            if name == "summary.md" or any(self.directory.glob(name))
        ]
        return Section(f"Written to {self.name}", ("file", "what it is"), lines)

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
        lines = list(self.start.kernels.items())
        return Section(f"Kernels on {self.start.device}", ("op", "kernel"), lines)


def _shortened(content: Any) -> str:
    """Return the beginning of a text, or of the last of some chat messages, on one line."""
    text = content if isinstance(content, str) else _text_of(content[-1].get("content"))
    return textwrap.shorten(text, SAMPLE_WIDTH, placeholder=" ...")


def _text_of(content: Any) -> str:
    """Return the text in the content of a message: a string, a list of parts, or nothing."""
    if isinstance(content, list):
        return " ".join(_text_of(part.get("text")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""
