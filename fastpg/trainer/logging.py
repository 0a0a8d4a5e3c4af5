"""The record of a run: its files, and what is shown of them while it goes on."""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from fastpg.trainer.checkpoint import LATEST
from fastpg.trainer.config import PPOConfig, save_config
from fastpg.trainer.display import Display
from fastpg.trainer.engine import on_main_process
from fastpg.trainer.episodes import Episodes
from fastpg.trainer.files import only_writer, write_text
from fastpg.trainer.parsing import InputError
from fastpg.trainer.report import FILES, Report


class Stopwatch:
    """Measures the seconds of each phase of a run: `with stopwatch("generate"): ...`.

    Args:
        device: The device whose work is waited for at the end of a phase.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.announce: Callable[[str], None] = lambda phase: None
        self.seconds: dict[str, float] = {}
        self._at_last_lap: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Announce a phase, and add the seconds of the `with` block to those of it."""
        self.announce(phase)
        start = time.perf_counter()
        yield
        # Kernels run asynchronously: without this, the next phase would pay for waiting.
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def resume(self, seconds: dict[str, float]) -> None:
        """Begin with the seconds of an earlier part of the run.

        Args:
            seconds: The seconds of each phase.
        """
        self.seconds.update(seconds)
        self._at_last_lap = dict(self.seconds)

    def lap(self) -> dict[str, float]:
        """Return the seconds of each phase since the last lap."""
        lap = {
            phase: seconds - self._at_last_lap.get(phase, 0.0)
            for phase, seconds in self.seconds.items()
        }
        self._at_last_lap = dict(self.seconds)
        return lap


class RunLog:
    """The record of a run. Every file is complete up to the last step, whatever stops the run.

    Only the main process shows or writes anything.

    Args:
        accelerator: The accelerator of the run.
        args: The settings of the run.
        resumed_at: The step after which an earlier run in the same directory is taken up. None:
            this is a new run.
    """

    def __init__(
        self, accelerator: Accelerator, args: PPOConfig, resumed_at: int | None = None
    ) -> None:
        self.accelerator = accelerator
        self.args = args
        self.resumed_at = resumed_at
        self.directory = Path(args.output_dir)
        self.display = Display(args.num_steps, (resumed_at or 0) + 1)
        self.steps: list[dict[str, Any]] = []
        # Whether metrics.jsonl lacks some of them, for want of room.
        self._is_behind = False

    def __enter__(self) -> "RunLog":
        with ExitStack() as opened:
            # Other processes must not find the directory half made.
            on_main_process(self.accelerator, lambda: self._open_files(opened))
            # What TensorBoard has of later steps would be shown beside what comes now.
            purge = {} if self.resumed_at is None else {"purge_step": self.resumed_at + 1}
            self.accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": purge})
            if self.display.live and self.accelerator.is_main_process:
                opened.enter_context(self.display.live)
            self._opened = opened.pop_all()
        return self

    def _open_files(self, opened: ExitStack) -> None:
        """Make the output directory and begin or continue its files."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            opened.enter_context(only_writer(self.directory))
            if self.resumed_at is None:
                self._set_earlier_run_aside()
            (self.directory / "completions").mkdir(exist_ok=True)
            # The settings are written first: they say what a run was that failed in its first step.
            save_config(self.args, self.directory / "config.yaml")
            self._keep_until(self.resumed_at or 0)
            self._open_metrics(opened)
        except OSError as error:
            raise InputError(f"Cannot write to {error.filename}: {error.strerror}.") from error

    def _set_earlier_run_aside(self) -> None:
        """Move the files of a run that used the directory before into `earlier-N` inside it."""
        if not (self.directory / "metrics.jsonl").exists():
            return
        numbers = count(1)
        aside = self.directory / f"earlier-{next(numbers)}"
        while aside.exists():
            aside = self.directory / f"earlier-{next(numbers)}"
        aside.mkdir()
        # Only the files of a run are moved: the directory may hold others.
        for name in (*FILES, LATEST):
            for path in self.directory.glob(name):
                shutil.move(path, aside / path.name)
        self.say(f"The files of an earlier run in {self.directory} are now in {aside}.")

    def _keep_until(self, step: int) -> None:
        """Forget what was written of later steps."""
        path = self.directory / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        # A run that was killed may have left half a line.
        self.steps = [row for row in map(_parsed, lines) if row is not None and row["step"] <= step]
        for samples in (self.directory / "completions").glob("step_*.jsonl"):
            if samples.stem > f"step_{step:06d}":
                samples.unlink()

    def _open_metrics(self, opened: ExitStack) -> None:
        """Write all metrics so far to their file, and open it for those to come."""
        path = self.directory / "metrics.jsonl"
        write_text(path, "".join(f"{_as_json(row)}\n" for row in self.steps))
        self._metrics = opened.enter_context(path.open("a", encoding="utf-8"))

    def __exit__(self, *_: object) -> None:
        # This runs after an error too, and what was written up to then stays.
        if self.accelerator.is_main_process:
            self.display.end()
        with suppress(OSError):
            for tracker in self.accelerator.trackers:
                tracker.finish()
        self._opened.close()

    def say(self, text: str) -> None:
        """Show a sentence, on the main process only.

        Args:
            text: The sentence.
        """
        if self.accelerator.is_main_process:
            # The terminal may be gone: that is what SIGHUP says.
            with suppress(OSError):
                self.display.console.print(text, markup=False, soft_wrap=True)

    def doing(self, what: str) -> None:
        """Show what the run is about to do, on the main process only.

        Args:
            what: As `Display.doing` takes it.
        """
        if self.accelerator.is_main_process:
            with suppress(OSError):
                self.display.doing(what)

    def flush(self) -> None:
        """Wait until the metrics are on the disk."""
        if self.accelerator.is_main_process:
            with suppress(OSError):
                os.fsync(self._metrics.fileno())

    def begin(self, before: Episodes) -> None:
        """Record the evaluation before training as step 0, unless that is recorded already.

        Args:
            before: The evaluation.
        """
        if any(row["step"] == 0 for row in self.steps):
            return
        metrics = before.metrics("eval/")
        self._track(0, metrics)
        if not self.accelerator.is_main_process:
            return
        self.steps.insert(0, {"step": 0, **metrics})
        try:
            self._open_metrics(self._opened)
        except OSError:
            self._is_behind = True
        self.display.step(0, metrics)

    def step(self, step: int, episodes: Episodes, metrics: dict[str, float]) -> None:
        """Record a step.

        Args:
            step: Its number, from 1.
            episodes: Its episodes, of which `num_logged_completions` are written.
            metrics: Its metrics.
        """
        self._track(step, metrics)
        if not self.accelerator.is_main_process:
            return
        self.steps.append({"step": step, **metrics})
        # A full disk must not end the run: it may have room again when there is more to lose.
        try:
            self._write(step, episodes)
        except OSError as error:
            self.say(f"The metrics of step {step} are not written yet: {error}.")
            self._is_behind = True
        self.display.step(step, metrics)

    def _track(self, step: int, metrics: dict[str, float]) -> None:
        """Send metrics to TensorBoard."""
        # The accelerator itself writes on the main process only.
        try:
            self.accelerator.log(metrics, step=step)
        except OSError as error:
            self.say(f"TensorBoard has nothing from step {step} on: {error}.")
            self.accelerator.trackers.clear()

    def _write(self, step: int, episodes: Episodes) -> None:
        """Write the last metrics and samples, and first those that could not be written before."""
        if self._is_behind:
            self._open_metrics(self._opened)
            self._is_behind = False
        else:
            print(_as_json(self.steps[-1]), file=self._metrics, flush=True)
        # Each step has a file of its own: a run that is killed leaves no half of an older one.
        samples = islice(episodes.records(), self.args.num_logged_completions)
        lines = [f"{json.dumps(sample)}\n" for sample in samples]
        path = self.directory / "completions" / f"step_{step:06d}.jsonl"
        path.write_text("".join(lines), encoding="utf-8")

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
        # The model is saved and the run is over: the report cannot take that back.
        try:
            report.write()
            report.show(self.display.console)
        except Exception as error:
            self.say(f"The report is not complete ({type(error).__name__}: {error}).")


def _as_json(row: dict[str, Any]) -> str:
    # JSON has no NaN and no infinity.
    return json.dumps({name: x if math.isfinite(x) else None for name, x in row.items()})


def _parsed(line: str) -> dict[str, Any] | None:
    """Return a line of metrics; None if it is not whole."""
    try:
        row = json.loads(line)
        return {name: math.nan if x is None else x for name, x in row.items()}
    except (ValueError, AttributeError):
        return None
