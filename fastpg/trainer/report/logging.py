"""The record of a run: what is written and tracked of it, and shown while it goes on."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from fastpg.trainer.report.callbacks import TrainerCallback
from fastpg.trainer.report.display import Display
from fastpg.trainer.report.end_report import Report
from fastpg.trainer.report.trackers import checked_trackers, start_trackers, track_samples
from fastpg.trainer.rewards.episodes import Episodes
from fastpg.trainer.run.engine import on_main_process
from fastpg.trainer.run.run_files import RunFiles, word_of_moved
from fastpg.trainer.run.start import Start
from fastpg.trainer.settings.config import PPOConfig


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
        directory: The output directory, absolute. What is said of it names it as the settings do.
        callbacks: What is told of steps, evaluations and checkpoints.
        resumed_at: The step after which an earlier run in the same directory is taken up. None:
            this is a new run.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        args: PPOConfig,
        directory: Path,
        callbacks: Sequence[TrainerCallback],
        resumed_at: int | None,
    ) -> None:
        self.accelerator = accelerator
        self.args = args
        self.callbacks = callbacks
        self.resumed_at = resumed_at
        self.files = RunFiles(args, directory, resumed_at)
        self.directory = directory
        self.display = Display(args.num_steps, (resumed_at or 0) + 1)
        self.start = Start.now(accelerator.device, accelerator.num_processes, resumed_at or 0)

    def __enter__(self) -> "RunLog":
        with ExitStack() as opened:
            opened.callback(self.files.close)
            # Other processes must not find the directory half made.
            on_main_process(self.accelerator, lambda: self.files.open(self.start))
            if self.files.set_aside is not None:
                self.say(word_of_moved(self.args.output_dir, self.files.set_aside))
            steps = self.files.steps
            self.display.rewards += [x["reward/mean"] for x in steps if "reward/mean" in x]
            start_trackers(
                self.accelerator,
                checked_trackers(self.args.report_to),
                self.directory,
                asdict(self.args),
                self.files.begun,
                self.resumed_at,
            )
            if self.display.live and self.accelerator.is_main_process:
                opened.enter_context(self.display.live)
            self._opened = opened.pop_all()
        return self

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
                self.files.flush()

    def begin(self, before: Episodes) -> None:
        """Record the evaluation before training as step 0, unless that is recorded already.

        Args:
            before: The evaluation.
        """
        if any(row["step"] == 0 for row in self.files.steps):
            return
        metrics = self.evaluated(0, before)
        self._track(0, metrics)
        if self.accelerator.is_main_process:
            with self._enduring_a_full_disk(0):
                self.files.begin(metrics)
            self.display.step(0, metrics)
            self._tell(0, metrics)

    def evaluated(self, step: int, evaluation: Episodes) -> dict[str, float]:
        """Write and track samples of an evaluation.

        Args:
            step: The last step before it.
            evaluation: The evaluation.

        Returns:
            Its metrics, for the line of that step.
        """
        if self.accelerator.is_main_process:
            records = self._samples(evaluation)
            with self._enduring_a_full_disk(step):
                self.files.samples("evaluations", step, records)
            self._track_samples("evaluation", step, records)
        return evaluation.metrics("eval/")

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
        records = self._samples(episodes)
        with self._enduring_a_full_disk(step):
            self.files.step(step, records, metrics)
        self._track_samples("completions", step, records)
        self.display.step(step, metrics)
        self._tell(step, metrics)

    @contextmanager
    def recording(self, step: int, episodes: Episodes, metrics: dict[str, float]) -> Iterator[None]:
        """Record a step after the `with` block, which may add metrics, also if that raises.

        Args:
            step: As in `step`.
            episodes: As in `step`.
            metrics: As in `step`.
        """
        try:
            yield
        finally:
            self.step(step, episodes, metrics)

    def end(self, after: Episodes) -> None:
        """Record the evaluation after training, as metrics of the last step.

        Args:
            after: The evaluation.
        """
        step = self.args.num_steps
        metrics = self.evaluated(step, after)
        self._track(step, metrics)
        if self.accelerator.is_main_process:
            with self._enduring_a_full_disk(step):
                self.files.end(step, metrics)
            self.display.evaluated(step, metrics)
            self._tell(step, metrics)

    def saved(self, step: int, name: str) -> None:
        """Tell the callbacks of a checkpoint or model.

        Args:
            step: The last step before it.
            name: The name of its directory.
        """
        if self.accelerator.is_main_process:
            for callback in self.callbacks:
                callback.on_save(step, self.directory / name)

    def _tell(self, step: int, metrics: dict[str, float]) -> None:
        """Tell the callbacks of metrics, which may be those of a step, an evaluation or both."""
        evaluation = {name: x for name, x in metrics.items() if name.startswith("eval/")}
        for callback in self.callbacks:
            if len(metrics) > len(evaluation):
                callback.on_step(step, metrics)
            if evaluation:
                callback.on_evaluate(step, evaluation)

    def _samples(self, episodes: Episodes) -> list[dict[str, Any]]:
        """Return the records of the first `num_logged_completions` episodes."""
        return list(islice(episodes.records(), self.args.num_logged_completions))

    @contextmanager
    def _enduring_a_full_disk(self, step: int) -> Iterator[None]:
        """Say that the files of a step cannot be written, and go on."""
        # The disk may have room again when there is more to lose.
        try:
            yield
        except OSError as error:
            self.say(f"The files of step {step} are not written yet: {error}.")

    def _track(self, step: int, metrics: dict[str, float]) -> None:
        """Send metrics to the trackers."""
        # The accelerator itself writes on the main process only.
        with self._enduring_trackers(step):
            self.accelerator.log(metrics, step=step)

    def _track_samples(self, title: str, step: int, records: list[dict[str, Any]]) -> None:
        """Send samples to the trackers."""
        with self._enduring_trackers(step):
            track_samples(self.accelerator, title, step, records)

    @contextmanager
    def _enduring_trackers(self, step: int) -> Iterator[None]:
        """Say that a tracker does not take what it is sent, and go on without trackers."""
        try:
            yield
        except Exception as error:
            names = ", ".join(tracker.name for tracker in self.accelerator.trackers)
            self.say(f"Nothing is sent to {names} from step {step} on: {error}.")
            self.accelerator.trackers.clear()

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
            steps=self.files.steps,
            seconds=seconds,
            start=self.start,
            directory=self.directory,
            name=self.args.output_dir,
        )
        # The model is saved and the run is over: the report cannot take that back.
        try:
            report.write()
            report.show(self.display.console)
        except Exception as error:
            self.say(f"The report is not complete ({type(error).__name__}: {error}).")
