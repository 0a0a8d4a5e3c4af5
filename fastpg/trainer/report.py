"""The end of a run: what changed, where the time went, which kernels ran, what was written."""

import textwrap
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

FILES = {
    "model": "the policy and its tokenizer, for `from_pretrained`; the value head",
    "metrics.jsonl": "one row of metrics a step",
    "completions": "samples of every step",
    "tensorboard": "the metrics, for TensorBoard",
    "config.yaml": "the settings as given, for `fastpg train --config`",
    "summary.md": "this report",
    "reward_and_kl.png": "reward and KL over the steps",
}
"""What a run leaves in its output directory."""

NUM_SAMPLES = 6


@dataclass(frozen=True)
class Section:
    """A titled table, for Markdown and the terminal alike."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def markdown(self) -> str:
        """The section as Markdown."""
        lines = [self.header, ("---",) * len(self.header), *self.rows]
        cells = [[cell.replace("|", r"\|") for cell in line] for line in lines]
        return "\n".join([f"## {self.title}", "", *(f"| {' | '.join(c)} |" for c in cells), ""])

    def table(self) -> Table:
        """The section for a rich console."""
        table = Table(
            *self.header,
            title=self.title,
            title_justify="left",
            title_style="bold",
            box=box.SIMPLE_HEAD,
        )
        for row in self.rows:
            table.add_row(*map(escape, row))
        return table


@dataclass(frozen=True)
class Report:
    """A finished run. `title`: of the algorithm; `before`, `after`: the evaluations; `seconds`: of
    each phase of training."""

    title: str
    before: Episodes
    after: Episodes
    rows: list[dict[str, Any]]
    seconds: dict[str, float]
    device: str
    directory: Path

    def write(self) -> None:
        """Write `summary.md` and its plot."""
        self._plot().savefig(self.directory / "reward_and_kl.png", dpi=120)
        sections = [section.markdown() for section in self._sections()]
        text = "\n".join(
            [f"# {self.title} run", "", *sections, "![reward and KL](reward_and_kl.png)", ""]
        )
        (self.directory / "summary.md").write_text(text)

    def show(self, console: Console) -> None:
        """Print the report on `console`."""
        for section in self._sections():
            console.print(section.table())

    def _sections(self) -> list[Section]:
        return [
            self._samples(),
            self._evaluation(),
            self._times(),
            self._kernels(),
            Section(
                f"Written to {self.directory}",
                ("file", "what it is"),
                list(FILES.items()),
            ),
        ]

    def _samples(self) -> Section:
        columns = (self.before.prompts, self.before.completions, self.after.completions)
        rows = [tuple(map(_text, row)) for row in zip(*columns, strict=True)]
        return Section("Samples", ("prompt", "before", "after"), rows[:NUM_SAMPLES])

    def _evaluation(self) -> Section:
        before, after = self.before.metrics(), self.after.metrics()
        rows = [(name, f"{before[name]:.3f}", f"{after[name]:.3f}") for name in before]
        return Section("Evaluation", ("metric", "before", "after"), rows)

    def _times(self) -> Section:
        total = sum(self.seconds.values())
        rows = [(phase, f"{s:.1f}", f"{s / total:.0%}") for phase, s in self.seconds.items()]
        return Section("Where the time went", ("phase", "seconds", "share"), rows)

    def _kernels(self) -> Section:
        kernels = fastpg.kernels_of().items()
        rows = [(op, devices.get(self.device, "reference")) for op, devices in kernels]
        return Section(f"Kernels on {self.device}", ("op", "kernel"), rows)

    def _plot(self) -> Figure:
        figure = Figure(figsize=(7, 4), layout="tight")
        steps = [row["step"] for row in self.rows]
        reward = figure.subplots()
        reward.plot(steps, [row["reward/mean"] for row in self.rows], color="tab:blue")
        reward.set_xlabel("step")
        reward.set_ylabel("mean reward", color="tab:blue")
        if "objective/kl" in self.rows[0]:  # not without a reference model
            kl = reward.twinx()
            kl.plot(steps, [row["objective/kl"] for row in self.rows], color="tab:orange")
            kl.set_ylabel("KL to the starting model, nats per episode", color="tab:orange")
        return figure


def _text(content: Any) -> str:
    """The beginning of a prompt or completion on one line: of chat messages, the last one."""
    text = content if isinstance(content, str) else content[-1]["content"]
    return textwrap.shorten(text, 160, placeholder=" ...")
