"""`PPOTrainer` samples, scores and learns, over and over."""

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import skip_first_batches
from accelerate.utils import gather_object, set_seed
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastpg.trainer.checks import (
    check_dataset,
    check_forwards,
    check_packages,
    check_policy,
    check_prompts,
    checked_rewards,
)
from fastpg.trainer.data.encoding import encode_one
from fastpg.trainer.data.prompts import Example, prompt_loader
from fastpg.trainer.learning.fast_paths import find_fast_paths
from fastpg.trainer.learning.learner import Learner
from fastpg.trainer.learning.optimizer import make_optimizer, make_schedule
from fastpg.trainer.models.assembly import assemble, write_models
from fastpg.trainer.models.forward import most_positions, vocabulary_size
from fastpg.trainer.models.loading import load_policy, load_tokenizer
from fastpg.trainer.models.memory import Aside
from fastpg.trainer.models.value_model import load_value_model
from fastpg.trainer.own_loop import OwnLoop
from fastpg.trainer.report.callbacks import TrainerCallback
from fastpg.trainer.report.logging import RunLog, Stopwatch
from fastpg.trainer.rewards.episodes import Episodes, score_rollout
from fastpg.trainer.rewards.functions import RewardFunction, name_of
from fastpg.trainer.rewards.reward_model import RewardModel
from fastpg.trainer.rollouts.rollout import Rollout
from fastpg.trainer.rollouts.rollout_engine import make_engine
from fastpg.trainer.run.checkpoint import Checkpoint
from fastpg.trainer.run.engine import (
    make_accelerator,
    naming_lost_processes,
    on_main_process,
    whole_state,
)
from fastpg.trainer.run.files import write_model
from fastpg.trainer.run.signals import StopSignals
from fastpg.trainer.run.state import TrainingState, origin_of_run
from fastpg.trainer.saver import Saver
from fastpg.trainer.settings.config import PPOConfig
from fastpg.trainer.settings.parsing import InputError

Dataset = Sequence[Example]
"""Dicts with a "prompt", text or chat messages, and any other columns."""


class PPOTrainer(OwnLoop):
    """Trains a causal language model on rewards of its own completions.

    It trains any algorithm of `fastpg.algorithms`; PPO is only the default. With a dataset and
    reward functions, `train` does it all; a loop of your own calls `step`, and needs neither.

    Args:
        model: A directory or name for `from_pretrained`, or the module itself, trained in place.
        reward_funcs: One or several functions `reward(prompts, completions, **columns)` that
            return a list of floats, one for each completion, or None where they do not apply; each
            may be async, a `RewardModel`, a text that `load_reward` understands, or written for
            verl or OpenRLHF. None: `step` is given scores.
        args: The settings. None: those of `PPOConfig()`.
        train_dataset: A sequence of dicts with a "prompt", text or chat messages. The other
            columns go to the reward functions by name. None: `step` is given episodes.
        eval_dataset: The same for evaluation. None: the first training prompts.
        processing_class: The tokenizer. None: the one saved with the model.
        callbacks: What is told of steps, evaluations and checkpoints.

    Raises:
        InputError: A dataset is empty, lacks prompts or a column that a reward needs, or a prompt
            cannot be sampled from; there is no reward function, or two have the same name; the
            tokenizer has no EOS token; or the model cannot be loaded, trained or saved.

    Example:
        >>> from fastpg.trainer import PPOConfig, PPOTrainer
        >>> def short(prompts, completions):
        ...     return [-float(len(text)) for text in completions]
        >>> trainer = PPOTrainer(
        ...     "Qwen/Qwen3-0.6B",
        ...     short,
        ...     PPOConfig(algorithm="grpo", output_dir="out"),
        ...     train_dataset=[{"prompt": "Name a color."}],
        ... )  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: RewardFunction | str | Sequence[RewardFunction | str] | None = None,
        args: PPOConfig | None = None,
        *,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.args = args or PPOConfig()
        # A reward or callback may change the working directory, which must not move the run.
        self.directory = Path(self.args.output_dir).absolute()
        self.callbacks = callbacks
        self.resolved = self.args.resolved()
        self.train_dataset: Dataset = [] if train_dataset is None else train_dataset
        self.eval_dataset = self.train_dataset if eval_dataset is None else eval_dataset
        # Cheap checks come before the model is loaded.
        check_packages(self.args)
        self.reward_funcs = checked_rewards(reward_funcs, self.args)
        given = {"train": train_dataset, "eval": eval_dataset}
        datasets = {name: dataset for name, dataset in given.items() if dataset is not None}
        for name, dataset in datasets.items():
            check_dataset(name, dataset, self.reward_funcs)
        loaded = load_policy(model, self.args.trust_remote_code, self.args.dtype)
        policy = loaded.model
        check_policy(policy)
        self.tokenizer = processing_class or load_tokenizer(policy, self.args.trust_remote_code)
        value_model = load_value_model(self.args, self.tokenizer)
        readers = [policy] if value_model is None else [policy, value_model.model]
        for name, dataset in datasets.items():
            check_prompts(name, dataset, readers, self.tokenizer, self.args)
        self.accelerator = make_accelerator(self.args)
        self.stopwatch = Stopwatch(self.accelerator.device)
        for reward in self.reward_funcs:
            if isinstance(reward, RewardModel):
                reward.to(self.accelerator.device)
        self.assembled = assemble(loaded, value_model, self.args, self.accelerator.device)
        self._prepare()
        ids = list(range(min(most_positions(readers) or 64, vocabulary_size(policy))))
        if len(self.train_dataset):
            ids = encode_one(self.train_dataset[0]["prompt"], self.tokenizer, "A prompt")
        check_forwards(self.learner, ids)

    def _prepare(self) -> None:
        """Make the optimiser, its schedule, the loader of prompts and the learner."""
        args, device = self.args, self.accelerator.device
        model, reference = self.assembled.model, self.assembled.reference
        optimizer: torch.optim.Optimizer = make_optimizer(model, args, device)
        # The scheduler is left unprepared: a prepared one moves on by the number of processes.
        self.scheduler = make_schedule(optimizer, args)
        loader = prompt_loader(self.train_dataset, args, self.accelerator.num_processes)
        # What has to read whole weights comes before processes share them out.
        self.paths = find_fast_paths(model.policy, self.accelerator, model.value_model)
        origin = origin_of_run(
            map(name_of, self.reward_funcs),
            self.train_dataset,
            model.policy,
            model.value_model,
            has_copy=isinstance(reference, PreTrainedModel),
        )
        self.model, optimizer, self.loader = self.accelerator.prepare(model, optimizer, loader)
        self.learner = Learner(self.accelerator, self.model, reference, optimizer, args, self.paths)
        self.aside = Aside(reference, self.directory)
        self.engine = make_engine(
            self.model, self.tokenizer, args, self.accelerator, self.paths.packing
        )
        kl_controller = self.learner.kl_controller
        self.state = TrainingState(
            self.accelerator, self.model, optimizer, self.scheduler, args, origin, kl_controller
        )

    @property
    def policy(self) -> PreTrainedModel:
        """The language model being trained."""
        return self.accelerator.unwrap_model(self.model).policy

    def train(self, resume_from_checkpoint: bool | str | Path = False) -> dict[str, float]:
        """Train for `num_steps` steps, evaluating before and after, and write the run's files.

        Ctrl-C, SIGTERM or a reward that raises does not cost a finished step: checkpoint and
        model are saved first. A run that was killed goes on from its newest checkpoint.

        Args:
            resume_from_checkpoint: Whether to take up the run in `output_dir` at its newest
                checkpoint, or the checkpoint to take it up at. On one process everything is then
                as if the run had never stopped, to the last bit.

        Returns:
            The metrics of the last evaluation, as `evaluate` returns them.

        Raises:
            InputError: There is no dataset or no reward function, this trainer has trained already,
                a reward is no list of finite numbers, a prompt cannot be encoded, weights are no
                longer finite, `output_dir` cannot be written to, or there is no checkpoint of this
                run.
            Interrupted: A signal has stopped the run; this is a `KeyboardInterrupt`.
        """
        self._require_data("train", train_dataset=self.train_dataset)
        if self.scheduler.last_epoch > 0:
            raise InputError("This trainer has trained already; make a new one to train further.")
        place = self.directory if resume_from_checkpoint is True else resume_from_checkpoint
        saved = self._load(Path(place)) if place else None
        self.seed()
        log = self._record(saved)
        lost = naming_lost_processes(self.directory)
        with lost, log, StopSignals(immediate=self.accelerator.num_processes == 1) as stop:
            self.stopwatch.announce = log.doing
            saver = Saver(self.state, log, self.save_model, self._model_writer, saved)
            saver.begin(self.stopwatch.seconds)
            with stop.at_once():
                before = saver.first_evaluation(self._play_evaluation)
            done = saved.step if saved else 0
            with saver.saving_if_stopped(done):
                log.begin(before)
            saver.keep_best(before.metrics())
            batches = self._batches(saved)
            for step in range(done + 1, self.args.num_steps + 1):
                # A dataset may be code of the user's, as rewards are.
                with saver.saving_if_stopped(step - 1), stop.at_once():
                    rollout, episodes = self.roll_out(next(batches))
                everyone, metrics = self.learn(rollout, episodes)
                with saver.saving_if_stopped(step), log.recording(step, everyone, metrics):
                    if self.args.eval_steps and step % self.args.eval_steps == 0:
                        metrics |= self._evaluate_after(step, log, saver)
                saver.after(step, stop)
            if saved is not None and done == self.args.num_steps:
                # The reward of the last evaluation may draw from Python's or NumPy's generator.
                self.state.restore_random(saved)
                log.say(f"All {done} steps are made; model, last evaluation and report are left.")
            after = self._end(log, saver, stop)
        log.report(before, after, self.stopwatch.seconds)
        return after.metrics("eval/")

    def _end(self, log: RunLog, saver: Saver, stop: StopSignals) -> Episodes:
        """Write and evaluate the model of a run that has made all its steps."""
        # The model is saved first: a reward that fails in the evaluation must not lose it.
        log.doing("writing the model")
        saver.end()
        log.doing("evaluating the trained model")
        with saver.saving_if_stopped(self.args.num_steps), stop.at_once():
            after = self._play_evaluation()
        saver.keep_best(after.metrics())
        log.end(after)
        return after

    def _evaluate_after(self, step: int, log: RunLog, saver: Saver) -> dict[str, float]:
        """Evaluate in the midst of a run; returns the metrics of it that belong to the step."""
        log.doing(f"step {step}: evaluating")
        evaluation = self._play_evaluation()
        saver.keep_best(evaluation.metrics())
        return log.evaluated(step, evaluation)

    def _require_data(self, name: str, **dataset: Dataset) -> None:
        """Refuse what needs a dataset and reward functions, if one of them was not given."""
        data: dict[str, Sequence[Any]] = {**dataset, "reward_funcs": self.reward_funcs}
        missing = [argument for argument, given in data.items() if len(given) == 0]
        if missing:
            raise InputError(
                f"{name}() needs {' and '.join(missing)}, which this trainer was not given; step() "
                "does without."
            )

    def seed(self) -> None:
        """Set every generator to where a run begins."""
        # Each process draws its own numbers: the same ones would sample the same completions.
        set_seed(self.args.seed, device_specific=True)

    def _batches(self, saved: Checkpoint | None) -> Iterator[list[Example]]:
        """Yield the examples of each step to come."""
        done = saved.step if saved else 0
        loader = skip_first_batches(self.loader, done) if done else self.loader
        for number, examples in enumerate(loader):
            # Making a loader draws a number, so the generators are set only after that. A run that
            # is taken up at step 0 has drawn what any new run draws.
            if saved is not None and done > 0 and number == 0:
                self.state.restore_random(saved)
            yield list(examples)

    def evaluate(self) -> dict[str, float]:
        """Sample completions of the evaluation prompts and score them.

        Every evaluation draws the same random numbers and takes none from training, so that two
        of them differ by the policy alone.

        Returns:
            Means over the episodes of all processes: "eval/reward/mean", "eval/reward/std",
            "eval/rewards/<function>/mean", "eval/completions/mean_length" (tokens),
            "eval/completions/finished" and "eval/completions/distinct" (fractions).

        Raises:
            InputError: There is no dataset or no reward function, a reward is no list of finite
                numbers, or a prompt cannot be encoded.
        """
        self._require_data("evaluate", eval_dataset=self.eval_dataset)
        return self._play_evaluation().metrics("eval/")

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Write a directory that `AutoModelForCausalLM` and `AutoTokenizer` load.

        A value head goes beside the model as `value_head.safetensors`, a value model into the
        directory `value_model`, for `AutoModelForSequenceClassification`. Every process has to call
        this; the main process writes.

        Args:
            output_dir: The directory. None: `model` in the `output_dir` of the settings.

        Raises:
            StorageError: It cannot be written; a model that was there before is whole.
        """
        directory = Path(output_dir or self.directory / "model")
        write = self._model_writer()
        on_main_process(self.accelerator, lambda: write_model(directory, write))

    def _model_writer(self) -> Callable[[Path], None]:
        """Gather the weights; every process has to. Returns what writes them into a directory."""
        return functools.partial(self._write_model, whole_state(self.accelerator, self.model))

    def _write_model(self, state: dict[str, Tensor], directory: Path) -> None:
        model = self.accelerator.unwrap_model(self.model)
        write_models(self.assembled._replace(model=model), state, self.tokenizer, directory)

    def _play_evaluation(self) -> Episodes:
        """Return the evaluation episodes of all processes."""
        count = min(self.args.num_eval_samples, len(self.eval_dataset))
        examples = [self.eval_dataset[i] for i in range(count)]
        device = self.accelerator.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            # Processes have different prompts, and must not draw the same numbers for them.
            torch.manual_seed(self.args.seed + self.accelerator.process_index)
            with self.accelerator.split_between_processes(examples) as own:
                # Some processes have no prompt if there are fewer prompts than processes. Where
                # weights are shared they sample all the same, for the others could not without.
                rollout = self._sample(own or examples[:1])
                episodes = [self._score(own, rollout)] if own else []
        return Episodes.concatenate(gather_object(episodes))

    def roll_out(self, examples: list[Example]) -> tuple[Rollout, Episodes]:
        """Return a rollout of this process and its scores. This changes no weight."""
        with self.stopwatch("generate"):
            rollout = self._sample(examples)
        with self.stopwatch("score"):
            return rollout, self._score(examples, rollout)

    def _sample(self, examples: Dataset) -> Rollout:
        return self.engine.sample([example["prompt"] for example in examples])

    def _score(self, examples: Dataset, rollout: Rollout) -> Episodes:
        return score_rollout(rollout, examples, self.reward_funcs, self.tokenizer, self.args)
