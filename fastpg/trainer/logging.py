"""What a run shows while it runs, and the files it writes as it goes."""

import json
import math
import shutil
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.live import Live
from rich.table import Table

from fastpg.trainer.config import InputError, PPOConfig
from fastpg.trainer.episodes import Episodes
from fastpg.trainer.report import FILES, Report

COLUMNS = {
    "reward": ("reward/mean", "{:+.3f}"),
    "KL": ("objective/kl", "{:.3f}"),
    "clipped": ("policy/clip_frac", "{:.1%}"),
    "exp. var": ("value/explained_variance", "{:+.2f}"),
    "tokens/s": ("tokens_per_second", "{:.0f}"),
}
"""Heading, metric and format of what is shown of a step, if the algorithm has it."""

VISIBLE_STEPS = 15


class Stopwatch:
    """Seconds of each phase of a run: `with stopwatch("generate"): ...`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self._at_last_lap: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)  # or the wait lands in the next phase
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def lap(self) -> dict[str, float]:
        """The seconds of each phase since the last lap."""
        lap = {phase: s - self._at_last_lap.get(phase, 0.0) for phase, s in self.seconds.items()}
        self._at_last_lap = dict(self.seconds)
        return lap


class Display:
    """Progress: a live table on a terminal, one plain line a step elsewhere."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self.console = Console(highlight=False)
        self.live = Live(console=self.console) if self.console.is_terminal else None
        self._rows: deque[dict[str, str]] = deque(maxlen=VISIBLE_STEPS)
        self._seconds = 0.0

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Show the metrics of `step`, counted from 1."""
        self._seconds += metrics["time/step"]
        minutes, seconds = divmod(round(self._seconds / step * (self.num_steps - step)), 60)
        shown = {
            heading: form.format(metrics[name])
            for heading, (name, form) in COLUMNS.items()
            if name in metrics
        }
        cells = {"step": f"{step}/{self.num_steps}", **shown, "left": f"{minutes}:{seconds:02}"}
        if self.live is None:
            print("  ".join(f"{name} {cell:>6}" for name, cell in cells.items()), flush=True)
        else:
            self._rows.append(cells)
            self.live.update(self._table(), refresh=True)

    def _table(self) -> Table:
        table = Table()
        for heading in self._rows[-1]:
            table.add_column(heading, justify="right", min_width=8)
        for cells in self._rows:
            table.add_row(*cells.values())
        return table


class RunLog:
    """The record of a run. Every file is complete up to the last step, whatever stops the run.

    Only the main process shows or writes anything.
    """

    def __init__(self, accelerator: Accelerator, args: PPOConfig) -> None:
        self.accelerator = accelerator
        self.args = args
        self.directory = Path(args.output_dir)
        self.display = Display(args.num_steps)
        self.rows: list[dict[str, Any]] = []

    def __enter__(self) -> "RunLog":
        if self.accelerator.is_main_process:
            self._open_files()
        self.accelerator.wait_for_everyone()
        self.accelerator.init_trackers("tensorboard")
        if self.display.live and self.accelerator.is_main_process:
            self.display.live.start()
        return self

    def _open_files(self) -> None:
        try:
            _set_earlier_run_aside(self.directory)
            (self.directory / "completions").mkdir(parents=True, exist_ok=True)
            self.args.save(self.directory / "config.yaml")
            self._metrics = (self.directory / "metrics.jsonl").open("w")
        except OSError as error:
            raise InputError(f"Cannot write to {error.filename}: {error.strerror}.") from error

    def __exit__(self, *_: object) -> None:
        for tracker in self.accelerator.trackers:
            tracker.finish()
        if self.accelerator.is_main_process:
            self._metrics.close()
        if self.display.live:
            self.display.live.stop()

    def step(self, step: int, episodes: Episodes, metrics: dict[str, float]) -> None:
        """Record the metrics and some episodes of `step`, counted from 1."""
        self.accelerator.log(metrics, step=step)
        if not self.accelerator.is_main_process:
            return
        self.rows.append({"step": step, **metrics})
        finite = {name: x if math.isfinite(x) else None for name, x in self.rows[-1].items()}
        print(json.dumps(finite), file=self._metrics, flush=True)  # JSON has no NaN
        with (self.directory / "completions" / f"step_{step:06d}.jsonl").open("w") as file:
            for record in islice(episodes.records(), self.args.num_logged_completions):
                print(json.dumps(record), file=file)
        self.display.step(step, metrics)

    def report(self, before: Episodes, after: Episodes, seconds: dict[str, float]) -> None:
        """Show and write the summary of a finished run."""
        if self.accelerator.is_main_process:
            device = self.accelerator.device.type.upper()
            title = self.args.row.title
            report = Report(title, before, after, self.rows, seconds, device, self.directory)
            report.write()
            report.show(self.display.console)


def _set_earlier_run_aside(directory: Path) -> None:
    """Move the files of a run that used `directory` before into `earlier-N` inside it."""
    if not (directory / "metrics.jsonl").exists():
        return
    aside = next(p for n in count(1) if not (p := directory / f"earlier-{n}").exists())
    aside.mkdir()
    for name in FILES:
        if (directory / name).exists():
            shutil.move(directory / name, aside / name)
