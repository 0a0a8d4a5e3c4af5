"""When a run is saved: at its start, every `save_steps`, when it is stopped, and at its end."""

import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from signal import SIGTERM
from typing import Any

from fastpg.trainer.report.logging import RunLog
from fastpg.trainer.rewards.episodes import Episodes
from fastpg.trainer.run.checkpoint import LATEST, Checkpoint, save_checkpoint
from fastpg.trainer.run.engine import on_any_process, on_main_process
from fastpg.trainer.run.files import StorageError, require_space, size_of, write_model
from fastpg.trainer.run.signals import Interrupted, StopSignals
from fastpg.trainer.run.state import TrainingState, random_state
from fastpg.trainer.settings.parsing import InputError


@dataclass
class Progress:
    """What a run remembers besides what it trains; checkpoints hold it too.

    Args:
        first_evaluation: The records of the evaluation of the starting model. None: it is to come.
        best_reward: The reward of the model in `best_model`. None: there is none yet.
        seconds: The seconds of each phase of training.
    """

    first_evaluation: list[dict[str, Any]] | None = None
    best_reward: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)


class Saver:
    """Saves a run.

    Args:
        state: What checkpoints hold.
        log: The record of the run, which tells what was saved.
        save_model: Writes the model into the directory of the run.
        model_writer: Gathers the weights, and returns what writes the files of the model into a
            directory that it makes.
        resumed: The checkpoint at which the run was taken up, if it was.
    """

    def __init__(
        self,
        state: TrainingState,
        log: RunLog,
        save_model: Callable[[], None],
        model_writer: Callable[[], Callable[[Path], None]],
        resumed: Checkpoint | None,
    ) -> None:
        self.state = state
        self.log = log
        self.save_model = save_model
        self.model_writer = model_writer
        self.accelerator = state.accelerator
        self.args = state.args
        self.saved_step = -1 if resumed is None else resumed.step
        self.progress = Progress()
        if resumed is not None:
            names = [member.name for member in fields(Progress)]
            self.progress = Progress(**{name: resumed.state[name] for name in names})
        # AdamW keeps two numbers for each weight. What else is written is seen at checkpoint 0.
        self._size = 3 * state.trainable_bytes()

    def begin(self, seconds: dict[str, float]) -> None:
        """Write checkpoint 0, unless the run was taken up at a later one.

        A model that cannot be saved is better known before the training.

        Args:
            seconds: The seconds of each phase; they run on, and each checkpoint has those of its
                time.

        Raises:
            StorageError: It cannot be written, or there is no room for what the run will write.
        """
        self.progress.seconds = seconds
        if self.saved_step >= 0:
            return
        self.log.doing("writing checkpoint 0, to see that the model can be saved")
        try:
            self._write(0, random_state())
        except InputError:
            raise
        except Exception as error:
            # What peft or transformers raise here, they would raise after the training too.
            reason = " ".join(str(error).split())
            raise InputError(f"The model cannot be saved: {reason}") from error
        on_main_process(self.accelerator, self._require_space_for_the_run)

    def _require_space_for_the_run(self) -> None:
        """Refuse a run for whose files there is no room, and take checkpoint 0 away again."""
        checkpoint = self.log.directory / "checkpoint-0"
        self._size = size_of(checkpoint) + 2 * self.state.trainable_bytes()
        steps, limit = self.args.num_steps, self.args.save_total_limit
        count = math.ceil(steps / (self.args.save_steps or steps))
        # A new checkpoint is whole before an old one is removed, so the limit is passed by one for
        # a while; checkpoint 0 is that one.
        models = 2 if self.args.save_best_model else 1
        needed = min(count, limit or count) * self._size + models * size_of(checkpoint / "model")
        what = f"what this run will keep (save_total_limit={limit or 'none'})"
        try:
            require_space(self.log.directory, needed, what)
        except StorageError:
            (self.log.directory / LATEST).unlink()
            shutil.rmtree(checkpoint)
            raise

    def first_evaluation(self, play: Callable[[], Episodes]) -> Episodes:
        """Return the evaluation of the starting model, made anew unless a checkpoint had it.

        Args:
            play: Makes it.
        """
        if self.progress.first_evaluation is None:
            self.log.doing("evaluating the starting model")
            self.progress.first_evaluation = list(play().records())
        return Episodes.from_records(self.progress.first_evaluation)

    def keep_best(self, metrics: dict[str, float]) -> None:
        """Save the model in `best_model` if no evaluation before was as good, and that is wanted.

        Args:
            metrics: Those of an evaluation of the model as it is now.
        """
        best, reward = self.progress.best_reward, metrics["reward/mean"]
        if not self.args.save_best_model or (best is not None and reward <= best):
            return
        directory, write = self.log.directory / "best_model", self.model_writer()
        try:
            on_main_process(self.accelerator, lambda: write_model(directory, write))
        except StorageError as error:
            # The next best one is then better than that which is there.
            self.log.say(f"The best model so far is not saved: {error}")
        else:
            self.progress.best_reward = reward

    def after(self, step: int, stop: StopSignals | None = None) -> None:
        """Save what is due after a step, and end the run if a signal has asked for it.

        Args:
            step: The step.
            stop: The signals. None: they end no loop of a user's own.

        Raises:
            Interrupted: A signal has come, on any process. Checkpoint and model are saved.
        """
        # All processes have to stop at the same step.
        if stop is not None and on_any_process(self.accelerator, stop.requested is not None):
            self._save_stopped(step, random_state())
            raise Interrupted(stop.requested or SIGTERM)
        every = self.args.save_steps
        if step == self.args.num_steps or (every is not None and step % every == 0):
            self.save(step)

    def save(self, step: int) -> None:
        """Write the checkpoint of a step, unless it is there or there is no room for it.

        Args:
            step: The step.
        """
        if step == self.saved_step:
            return
        try:
            self._write(step, random_state())
        except StorageError as error:
            # The next one may succeed, and the one before is whole.
            self.log.say(f"There is no checkpoint of step {step}: {error}")
        else:
            # Of an error in a callback, the model is to be there as for any other.
            with self.saving_if_stopped(step):
                self.log.saved(step, f"checkpoint-{step}")

    def end(self) -> None:
        """Save the model of a run that has made all its steps.

        Raises:
            StorageError: It cannot be written. The sentence says what is there instead.
        """
        try:
            self.save_model()
        except StorageError as error:
            raise StorageError(
                f"{error} The newest checkpoint is that of step {self.saved_step}, from which a "
                "run with more room can go on."
            ) from error
        self.log.saved(self.args.num_steps, "model")

    @contextmanager
    def saving_if_stopped(self, step: int) -> Iterator[None]:
        """Save the state after a step if the `with` block, which changes no weight, raises.

        Args:
            step: The last finished step.
        """
        drawn = random_state()
        try:
            yield
        except BaseException:
            # Several processes would have to gather their states, and only this one is here.
            if self.accelerator.num_processes == 1:
                self._save_stopped(step, drawn)
            raise

    def _how_to_go_on(self) -> str:
        # Only the settings of the command line name the model.
        if hasattr(self.args, "model"):
            return f"fastpg train --resume {self.args.output_dir}"
        return "train(resume_from_checkpoint=True), or resume() of a loop of your own"

    def _save_stopped(self, step: int, drawn: dict[str, Any]) -> None:
        """Save checkpoint and model of a run that ends early, and say so."""
        model, total = Path(self.args.output_dir, "model"), self.args.num_steps
        try:
            if step != self.saved_step:
                self._write(step, drawn)
            self.save_model()
        except StorageError as error:
            self.log.say(
                f"Stopped after step {step} of {total}, of which not everything is saved: {error}"
            )
        else:
            self.log.say(
                f"Stopped after step {step} of {total}. The model is in {model}; "
                f"to go on: {self._how_to_go_on()}"
            )

    def _write(self, step: int, drawn: dict[str, Any]) -> None:
        """Write a checkpoint; every process has to call this."""
        checkpoint = self.state.checkpoint(step, drawn, vars(self.progress))
        write = self.model_writer()

        def write_checkpoint() -> None:
            self.log.flush()
            require_space(self.log.directory, self._size, "a checkpoint")
            keep = self.args.save_total_limit
            save_checkpoint(self.log.directory, checkpoint, write, keep)

        on_main_process(self.accelerator, write_checkpoint)
        self.saved_step = step
