"""What a user's own loop calls of a trainer, and what it shares with the loop of `train`."""

import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastpg.trainer.learning.learner import Learner
from fastpg.trainer.learning.steps import pace_metrics
from fastpg.trainer.models.assembly import Assembled
from fastpg.trainer.models.forward import causal_lm
from fastpg.trainer.models.memory import Aside, give_back_freed
from fastpg.trainer.report.callbacks import TrainerCallback
from fastpg.trainer.report.logging import RunLog, Stopwatch
from fastpg.trainer.rewards.episodes import Episodes, episodes_as_given
from fastpg.trainer.rollouts.given import (
    Tokens,
    check_counts,
    check_equal,
    check_room,
    given_queries,
    given_rollout,
    given_scores,
)
from fastpg.trainer.rollouts.rollout import Rollout
from fastpg.trainer.rollouts.rollout_engine import RolloutEngine
from fastpg.trainer.run.checkpoint import Checkpoint, load_checkpoint, run_of
from fastpg.trainer.run.engine import check_trained, on_main_process
from fastpg.trainer.run.run_files import check_apart, check_taken_up
from fastpg.trainer.run.state import TrainingState
from fastpg.trainer.saver import Saver
from fastpg.trainer.settings.config import PPOConfig
from fastpg.trainer.settings.parsing import InputError


class OwnLoop(ABC):
    """The part of `PPOTrainer` that needs neither a dataset nor reward functions."""

    args: PPOConfig
    directory: Path  # output_dir, absolute
    callbacks: Sequence[TrainerCallback]
    tokenizer: PreTrainedTokenizerBase
    accelerator: Accelerator
    assembled: Assembled
    learner: Learner
    aside: Aside  # the reference, while the policy learns
    engine: RolloutEngine
    scheduler: LambdaLR
    state: TrainingState
    stopwatch: Stopwatch
    _resumed: Checkpoint | None = None
    _saver: Saver | None = None  # of a loop that has begun
    _is_finished = False
    _close: weakref.finalize  # closes its files

    @property
    @abstractmethod
    def policy(self) -> PreTrainedModel:
        """The language model being trained."""

    @abstractmethod
    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Write the model; see `PPOTrainer`."""

    @abstractmethod
    def _model_writer(self) -> Any:
        """Gather the weights; see `PPOTrainer`."""

    @abstractmethod
    def _sample(self, examples: Sequence[dict[str, Any]]) -> Rollout:
        """Sample a completion for each example; see `PPOTrainer`."""

    def generate(self, queries: Sequence[Tokens]) -> list[Tensor]:
        """Sample a response to each query from the policy, as `train` samples completions.

        Args:
            queries: Token ids, 1-D tensors or lists of integers. Where equal queries stand one
                after the other, the model reads them once for all.

        Returns:
            Token ids of the responses, each int64 [T] on the CPU, of `max_new_tokens` at most and
            with the EOS at their end.

        Raises:
            InputError: A query is empty, too long, or no list of token ids of the model.
        """
        prompts = given_queries(queries, self.policy, self.args)
        check_room(prompts, [self.args.max_new_tokens] * len(prompts), [self.policy], self.args)
        with self.stopwatch("generate"):
            rollout = self._sample([{"prompt": prompt} for prompt in prompts])
        pairs = zip(rollout.completion_ids.cpu(), rollout.mask.cpu(), strict=True)
        return [ids[mask] for ids, mask in pairs]

    def step(
        self,
        queries: Sequence[Tokens],
        responses: Sequence[Tokens],
        scores: Tensor | Sequence[Any],
        response_masks: Sequence[Tokens] | None = None,
    ) -> dict[str, float]:
        """Learn from episodes that a loop of your own has played: one step of `num_steps`.

        It makes the optimiser steps of the settings, and writes metrics, samples, checkpoints and,
        after the last step, the model into `output_dir`. It draws from torch's generators, which
        `seed` sets. Of several processes each gives its own episodes, as many as the others.

        Args:
            queries: Token ids of B prompts, 1-D tensors or lists of integers. Any number of
                episodes goes; algorithms that compare responses need `num_generations` of each
                query, one after the other.
            responses: Token ids of what followed each query, in all turns. They count as sampled at
                the `temperature` of the settings, from the whole vocabulary.
            scores: What each episode earned, a tensor [B] or numbers. `reward_clip` and
                `missing_eos_penalty` apply; the last token that the policy sampled is credited.
            response_masks: For each response 1 at the tokens that the policy sampled, and 0 at
                those of a tool or an environment, which it sees and learns nothing about. None: it
                sampled all of them, in one turn.

        Returns:
            The metrics of the step, as `metrics.jsonl` has them.

        Raises:
            InputError: The arguments do not fit together, the processes of a run give different
                numbers of episodes, `num_steps` steps are made already, weights are no longer
                finite, or `output_dir` cannot be written to.
        """
        numbers = given_scores(scores)
        masks = {} if response_masks is None else {"response_masks": response_masks}
        check_counts(queries=queries, responses=responses, scores=numbers, **masks)
        value_model = self.accelerator.unwrap_model(self.learner.model).value_model
        readers = [model for model in (self.policy, value_model) if model is not None]
        rollout = given_rollout(
            queries, responses, response_masks, readers, self.tokenizer, self.args
        )
        check_equal(gather_object([len(numbers)]))
        number = self.scheduler.last_epoch + 1
        if number > self.args.num_steps:
            raise InputError(
                f"All num_steps={self.args.num_steps} steps are made, by which the learning rate "
                "was planned; a longer loop needs a larger num_steps."
            )
        if self._is_finished:
            raise InputError("This loop is finished; resume() of a new trainer goes on from it.")
        saver = self._saver or self._open()
        episodes = episodes_as_given(rollout, numbers, self.tokenizer, self.args)
        everyone, metrics = self.learn(rollout, episodes)
        with saver.saving_if_stopped(number):
            saver.log.step(number, everyone, metrics)
        saver.after(number)
        if number == self.args.num_steps:
            self.finish()
        return metrics

    def _open(self) -> Saver:
        """Begin or continue the files of the loop."""
        resumed = self._resumed
        log = self._record(resumed)
        log.__enter__()
        # The files are closed when the trainer is gone, at the latest at the end of the process.
        self._close = weakref.finalize(self, log.__exit__, None, None, None)
        self.stopwatch.announce = log.doing
        # A saver that held the trainer would keep it there.
        this = weakref.proxy(self)
        saver = Saver(
            self.state, log, lambda: this.save_model(), lambda: this._model_writer(), resumed
        )
        try:
            saver.begin(self.stopwatch.seconds)
        except BaseException:
            self._close()
            raise
        self._saver, self._resumed = saver, None
        return saver

    def _record(self, resumed: Checkpoint | None) -> RunLog:
        """Return the record of a run, which must not lose the models that it starts from."""
        model = self.assembled.model
        for start in filter(None, (model.policy, model.value_model)):
            if resumed is None:
                check_apart(causal_lm(start).name_or_path, self.directory)
        step = None if resumed is None else resumed.step
        return RunLog(self.accelerator, self.args, self.directory, self.callbacks, step)

    def finish(self) -> None:
        """End a loop of `step`: write its last checkpoint and the model, and close its files.

        After `num_steps` steps that is done by itself. A loop that `resume` has taken up may be
        ended without another step: one that was stopped before its model was written, say.

        Raises:
            InputError: No loop of `step` has begun, or the model cannot be written.
        """
        if self._saver is None and self._resumed is None:
            raise InputError("There is no loop of step() to finish.")
        saver = self._saver or self._open()
        self._saver, self._is_finished = None, True
        try:
            saver.save(self.scheduler.last_epoch)
            saver.end()
            saver.log.say(f"The model is in {Path(self.args.output_dir, 'model')}.")
        finally:
            self.stopwatch.announce = lambda phase: None
            self._close()

    def resume(self, checkpoint: str | Path | None = None) -> int:
        """Take up a loop of `step` where a checkpoint of it was written.

        Weights, optimiser, learning rate and every generator of random numbers are as they were
        after that step; what else the loop keeps is its own to restore.

        Args:
            checkpoint: The checkpoint. None: the newest one in `output_dir`.

        Returns:
            The number of steps that are made.

        Raises:
            InputError: There is no such checkpoint, or it is of another run; or `output_dir` holds
                another run.
        """
        if self.scheduler.last_epoch > 0:
            raise InputError("resume() has to come before the first step().")
        self._resumed = self._load(Path(checkpoint or self.directory))
        self.state.restore_random(self._resumed)
        return self._resumed.step

    def _load(self, place: Path) -> Checkpoint:
        """Read a checkpoint of this run and take up what it holds."""
        # Another process must not find there what this one writes next.
        on_main_process(self.accelerator, lambda: check_taken_up(run_of(place), self.directory))
        saved = load_checkpoint(place)
        self.state.check(saved)
        self.state.restore(saved)
        self.engine.update_weights()
        self.stopwatch.resume(saved.state["seconds"])
        return saved

    def learn(self, rollout: Rollout, episodes: Episodes) -> tuple[Episodes, dict[str, float]]:
        """Learn from a rollout. Returns the episodes of all processes, and the step's metrics."""
        with self.stopwatch("logprob"):
            experience, credit = self.learner.experience(rollout, episodes.scores)
        with self.stopwatch("train"):
            self.aside.put()
            give_back_freed()
            update = self.learner.update(experience)
            check_trained(self.accelerator, self.learner.model, self.scheduler.last_epoch + 1)
        with self.stopwatch("generate"):
            self.engine.update_weights()
        # Metrics and samples are those of all processes; learning needed only its own episodes.
        everyone = Episodes.concatenate(gather_object([episodes]))
        # The rate is read before the schedule moves on: it is that of the step that ends.
        rate = {"learning_rate": float(self.scheduler.get_last_lr()[0])}
        self.scheduler.step()
        pace = pace_metrics(self.stopwatch.lap(), everyone)
        return everyone, everyone.metrics() | credit | update | rate | pace
