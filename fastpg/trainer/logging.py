"""The display of a run while it goes on, and the files that it writes."""

import json
import math
import shutil
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.live import Live
from rich.table import Table

from fastpg.trainer.config import PPOConfig
from fastpg.trainer.episodes import Episodes
from fastpg.trainer.parsing import InputError
from fastpg.trainer.report import FILES, Report

VISIBLE_STEPS = 15


class Column(NamedTuple):
    """One column of the live table: its heading, the metric that it shows, and its format."""

    heading: str
    metric: str
    form: str


# A column whose metric the algorithm does not have is left out.
COLUMNS = (
    Column("reward", "reward/mean", "{:+.3f}"),
    Column("KL", "objective/kl", "{:.3f}"),
    Column("clipped", "policy/clip_frac", "{:.1%}"),
    Column("exp. var", "value/explained_variance", "{:+.2f}"),
    Column("tokens/s", "tokens_per_second", "{:.0f}"),
)


class Stopwatch:
    """Measures the seconds of each phase of a run: `with stopwatch("generate"): ...`.

    Args:
        device: The device whose work is waited for at the end of a phase.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self._at_last_lap: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the seconds of the `with` block to those of `phase`."""
        start = time.perf_counter()
        yield
        # Kernels run asynchronously: without this, the next phase would pay for waiting.
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def lap(self) -> dict[str, float]:
        """Return the seconds of each phase since the last lap."""
        lap = {
            phase: seconds - self._at_last_lap.get(phase, 0.0)
            for phase, seconds in self.seconds.items()
        }
        self._at_last_lap = dict(self.seconds)
        return lap


class Display:
    """Shows progress: a live table on a terminal, one plain line a step elsewhere.

    Args:
        num_steps: The steps of the run.
    """

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self.console = Console(highlight=False)
        self.live = Live(console=self.console) if self.console.is_terminal else None
        # A longer table would not fit on the screen, so the oldest lines drop out.
        self._lines: deque[dict[str, str]] = deque(maxlen=VISIBLE_STEPS)
        self._seconds = 0.0

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Show a step.

        Args:
            step: Its number, from 1.
            metrics: Its metrics.
        """
        self._seconds += metrics["time/step"]
        # The steps to come are taken to be as fast as those before, on average.
        seconds_left = round(self._seconds / step * (self.num_steps - step))
        minutes, seconds = divmod(seconds_left, 60)
        cells = {"step": f"{step}/{self.num_steps}"}
        for column in COLUMNS:
            if column.metric in metrics:
                cells[column.heading] = column.form.format(metrics[column.metric])
        cells["left"] = f"{minutes}:{seconds:02}"
        # A file or a pipe gets whole lines at once, so that `tail -f` shows them.
        if self.live is None:
            print("  ".join(f"{name} {cell:>6}" for name, cell in cells.items()), flush=True)
        else:
            self._lines.append(cells)
            self.live.update(self._table(), refresh=True)

    def _table(self) -> Table:
        # The columns are those of the last step: every step of a run has the same.
        table = Table()
        for heading in self._lines[-1]:
            table.add_column(heading, justify="right", min_width=8)
        for cells in self._lines:
            table.add_row(*cells.values())
        return table


class RunLog:
    """The record of a run. Every file is complete up to the last step, whatever stops the run.

    Only the main process shows or writes anything.

    Args:
        accelerator: The accelerator of the run.
        args: The settings of the run.
    """

    def __init__(self, accelerator: Accelerator, args: PPOConfig) -> None:
        self.accelerator = accelerator
        self.args = args
        self.directory = Path(args.output_dir)
        self.display = Display(args.num_steps)
        self.steps: list[dict[str, Any]] = []

    def __enter__(self) -> "RunLog":
        if self.accelerator.is_main_process:
            self._open_files()
        # Other processes must not find the directory half made.
        self.accelerator.wait_for_everyone()
        self.accelerator.init_trackers("tensorboard")
        if self.display.live and self.accelerator.is_main_process:
            self.display.live.start()
        return self

    def _open_files(self) -> None:
        """Make the output directory and begin its files."""
        try:
            _set_earlier_run_aside(self.directory)
            (self.directory / "completions").mkdir(parents=True, exist_ok=True)
            # The settings are written first: they say what a run was that failed in its first step.
            self.args.save(self.directory / "config.yaml")
            self._metrics = (self.directory / "metrics.jsonl").open("w")
        except OSError as error:
            raise InputError(f"Cannot write to {error.filename}: {error.strerror}.") from error

    def __exit__(self, *_: object) -> None:
        # This runs after an error too, and what was written up to then stays.
        for tracker in self.accelerator.trackers:
            tracker.finish()
        if self.accelerator.is_main_process:
            self._metrics.close()
        if self.display.live:
            self.display.live.stop()

    def step(self, step: int, episodes: Episodes, metrics: dict[str, float]) -> None:
        """Record a step.

        Args:
            step: Its number, from 1.
            episodes: Its episodes, of which `num_logged_completions` are written.
            metrics: Its metrics.
        """
        # The accelerator itself writes on the main process only.
        self.accelerator.log(metrics, step=step)
        if not self.accelerator.is_main_process:
            return
        record = {"step": step, **metrics}
        self.steps.append(record)
        # JSON has no NaN and no infinity.
        finite = {name: x if math.isfinite(x) else None for name, x in record.items()}
        print(json.dumps(finite), file=self._metrics, flush=True)
        # Each step has a file of its own: a run that is killed leaves no half of an older one.
        with (self.directory / "completions" / f"step_{step:06d}.jsonl").open("w") as file:
            for sample in islice(episodes.records(), self.args.num_logged_completions):
                print(json.dumps(sample), file=file)
        self.display.step(step, metrics)

    def report(self, before: Episodes, after: Episodes, seconds: dict[str, float]) -> None:
        """Show and write the summary of a finished run.

        Args:
            before: The evaluation before training.
            after: The evaluation after training.
            seconds: The seconds of each phase of training.
        """
        if not self.accelerator.is_main_process:
            return
        report = Report(
            title=self.args.resolved().algorithm.title,
            before=before,
            after=after,
            steps=self.steps,
            seconds=seconds,
            device=self.accelerator.device.type.upper(),
            directory=self.directory,
        )
        report.write()
        report.show(self.display.console)


def _set_earlier_run_aside(directory: Path) -> None:
    """Move the files of a run that used `directory` before into `earlier-N` inside it."""
    if not (directory / "metrics.jsonl").exists():
        return
    numbers = count(1)
    aside = directory / f"earlier-{next(numbers)}"
    while aside.exists():
        aside = directory / f"earlier-{next(numbers)}"
    aside.mkdir()
    # Only the files of a run are moved: the directory may hold others.
    for name in FILES:
        if (directory / name).exists():
            shutil.move(directory / name, aside / name)
