"""What a run shows while it goes on: what it is doing, and its steps."""

import math
from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

VISIBLE_STEPS = 15


class Column(NamedTuple):
    """A column of the table: its heading, the metric that it shows, its format and its meaning."""

    heading: str
    metric: str
    form: str
    meaning: str


# A column whose metric the algorithm does not have is left out.
COLUMNS = (
    Column("reward", "reward/mean", "{:+.3f}", "mean score of the step's completions"),
    Column("eval", "eval/reward/mean", "{:+.3f}", "the same of an evaluation"),
    Column("KL", "objective/kl", "{:.3f}", "to the starting model, nats per completion"),
    Column("clipped", "policy/clip_frac", "{:.1%}", "tokens held at the clip range"),
    Column(
        "exp. var", "value/explained_variance", "{:+.2f}",
        "share of the returns' variance that the critic foresees",
    ),
    Column("tokens/s", "tokens_per_second", "{:.0f}", "tokens of completions a second, all told"),
)  # fmt: skip
UNCLEAR = ("KL", "clipped", "exp. var")
"""The columns that are explained under the table."""

BLOCKS = "▁▂▃▄▅▆▇█"
SPARKLINE_WIDTH = 50  # characters

PHASES = {
    "generate": "sampling completions",
    "score": "scoring them",
    "logprob": "computing log-probs",
    "train": "learning",
}
"""What a run says that it is doing in each of the phases that are timed."""


class Display:
    """Shows progress: a live table on a terminal, one plain line a step elsewhere.

    Args:
        num_steps: The steps of the run.
        first: The number of the first step.
    """

    def __init__(self, num_steps: int, first: int = 1) -> None:
        self.num_steps = num_steps
        self.console = Console(highlight=False)
        self.live: Live | None = None
        if self.console.is_terminal:
            self.live = Live(console=self.console, auto_refresh=False)
        # A longer table would not fit on the screen, so the oldest lines drop out.
        self._lines: deque[dict[str, str]] = deque(maxlen=VISIBLE_STEPS)
        self.rewards: list[float] = []
        """The mean rewards of all steps, those before the run was taken up included."""
        self._doing = ""
        self._next = first
        self._steps = 0
        self._seconds = 0.0

    def doing(self, what: str) -> None:
        """Say what the run is about to do. In a file or a pipe, steps after the first do not.

        Args:
            what: A phase of `PHASES`, or words.
        """
        if what in PHASES:
            what = f"step {self._next}/{self.num_steps}: {PHASES[what]}"
            if self.live is None and self._steps > 0:
                return
        if self.live is None:
            print(f"{what} ...", flush=True)
            return
        self._doing = f"{what} ..."
        self.live.update(self._screen(), refresh=True)

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Show a step.

        Args:
            step: Its number; 0 for the evaluation before the first step.
            metrics: Its metrics.
        """
        cells = self._cells(step, metrics)
        if step > 0:
            cells["left"] = self._left(step, metrics["time/step"])
            self.rewards.append(metrics["reward/mean"])
        self._lines.append(cells)
        self._doing = ""
        self._next = step + 1
        if self.live is not None:
            self.live.update(self._screen(), refresh=True)
            return
        _print_line(cells)
        if self._steps == 1:
            print(self._legend(), flush=True)

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """Show the evaluation after the last step.

        Args:
            step: The last step.
            metrics: Those of the evaluation.
        """
        cells = self._cells(step, metrics)
        if self.live is None:
            _print_line(cells)
        elif self._lines and self._lines[-1]["step"] == cells["step"]:
            self._lines[-1] |= cells
        else:
            # A run that is taken up at its end has shown no step.
            self._lines.append(cells)

    def _cells(self, step: int, metrics: dict[str, float]) -> dict[str, str]:
        """Return the cells of a line by the headings of their columns."""
        cells = {"step": f"{step}/{self.num_steps}"}
        for column in COLUMNS:
            if column.metric in metrics:
                cells[column.heading] = column.form.format(metrics[column.metric])
        return cells

    def _left(self, step: int, seconds: float) -> str:
        """Return the time left, taking steps to come to be as fast as those before, on average."""
        self._seconds += seconds
        self._steps += 1
        minutes, rest = divmod(round(self._seconds / self._steps * (self.num_steps - step)), 60)
        return f"{minutes}:{rest:02}"

    def end(self) -> None:
        """Leave the table on the screen, without what the run was doing."""
        self._doing = ""
        if self.live is not None:
            self.live.update(self._screen(), refresh=True)

    def _legend(self) -> str:
        """Explain the columns that there are."""
        shown = {heading for cells in self._lines for heading in cells}
        return "; ".join(
            f"{column.heading}: {column.meaning}"
            for column in COLUMNS
            if column.heading in shown and column.heading in UNCLEAR
        )

    def _screen(self) -> RenderableType:
        """Return the table, what its columns mean, and what the run is doing."""
        doing = Text(self._doing, style="italic", no_wrap=True, overflow="ellipsis")
        if not self._lines:
            return doing
        legend = Text(self._legend(), style="dim")
        rewards = Text(self._sparkline(), no_wrap=True, overflow="crop")
        # The borders and the heading of the table take four lines; the last one is the prompt's.
        others = len(self.console.render_lines(legend)) + 7
        room = max(3, self.console.height - others)
        return Group(self._table(list(self._lines)[-room:]), rewards, legend, doing)

    def _sparkline(self) -> str:
        """Return the rewards of all steps as a line; nothing where a terminal cannot show it."""
        known = [reward for reward in self.rewards if math.isfinite(reward)]
        if len(known) < 2 or self.console.options.ascii_only:
            return ""
        return f"reward {sparkline(known, SPARKLINE_WIDTH)} {min(known):+.3f} to {max(known):+.3f}"

    def _table(self, lines: list[dict[str, str]]) -> Table:
        headings = ("step", *(column.heading for column in COLUMNS), "left")
        shown = [h for h in headings if any(h in cells for cells in self._lines)]
        table = Table()
        for heading in shown:
            table.add_column(heading, justify="right", min_width=5, no_wrap=True)
        for cells in lines:
            table.add_row(*(cells.get(heading, "") for heading in shown))
        return table


def sparkline(values: Sequence[float], width: int) -> str:
    """Draw numbers as a line of blocks, the lowest as the lowest block.

    Args:
        values: Finite numbers. Where there are more than `width`, a block is the mean of several.
        width: The most blocks.
    """
    count = min(width, len(values))
    edges = [len(values) * i // count for i in range(count + 1)]
    parts = [values[i:j] for i, j in pairwise(edges)]
    means = [sum(part) / len(part) for part in parts]
    low, size = min(means), max(means) - min(means)
    top = len(BLOCKS) - 1
    # Equal values are a line in the middle.
    return "".join(BLOCKS[round((mean - low) / size * top) if size else top // 2] for mean in means)


def _print_line(cells: dict[str, str]) -> None:
    # A file or a pipe gets whole lines at once, so that `tail -f` shows them.
    print("  ".join(f"{name} {cell:>6}" for name, cell in cells.items()), flush=True)
