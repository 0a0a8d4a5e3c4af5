"""`PPOTrainer` samples, scores and learns, over and over."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from safetensors.torch import save_file
from torch.utils.data import DataLoader, RandomSampler
from torch.utils.data import Dataset as TorchDataset
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_linear_schedule_with_warmup,
)

from fastpg.trainer.config import PPOConfig
from fastpg.trainer.episodes import Episodes, score_rollout
from fastpg.trainer.learner import Learner
from fastpg.trainer.logging import RunLog, Stopwatch
from fastpg.trainer.models import (
    PolicyWithValue,
    disable_dropout,
    frozen_copy,
    load_policy,
    load_tokenizer,
)
from fastpg.trainer.parsing import InputError
from fastpg.trainer.rewards import RewardFunction, name_of
from fastpg.trainer.rollout import Rollout, eos_ids, sample

Example = dict[str, Any]
Dataset = Sequence[Example]
"""Dicts with a "prompt", text or chat messages, and any other columns."""


class PPOTrainer:
    """Trains a causal language model on rewards of its own completions.

    It trains any algorithm of `fastpg.algorithms`; PPO is only the default.

    Args:
        model: A directory or name for `from_pretrained`, or the module itself, trained in place.
        reward_funcs: One or several functions `reward(prompts, completions, **columns)` that
            return a list of floats, one for each completion.
        args: The settings. None: those of `PPOConfig()`.
        train_dataset: A sequence of dicts with a "prompt", text or chat messages. The other
            columns go to the reward functions by name.
        eval_dataset: The same for evaluation. None: the first training prompts.
        processing_class: The tokenizer. None: the one saved with the model.

    Raises:
        InputError: A dataset is empty or lacks prompts, there is no reward function or two have
            the same name, the tokenizer has no EOS token, or the model cannot be loaded or saved.

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
        reward_funcs: RewardFunction | Sequence[RewardFunction],
        args: PPOConfig | None = None,
        *,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.args = args or PPOConfig()
        self.resolved = self.args.resolved()
        self.reward_funcs = [reward_funcs] if callable(reward_funcs) else list(reward_funcs)
        self.train_dataset = train_dataset
        self.eval_dataset = train_dataset if eval_dataset is None else eval_dataset
        # Cheap checks come before the model is loaded.
        self._check()
        policy = load_policy(model)
        _check_generation_config(policy)
        self.tokenizer = processing_class or load_tokenizer(policy)
        # A tokenizer without EOS is refused here rather than after the first rollout.
        eos_ids(policy, self.tokenizer)
        self.accelerator = Accelerator(
            mixed_precision=self.args.mixed_precision,
            log_with="tensorboard",
            project_dir=self.args.output_dir,
        )
        self.stopwatch = Stopwatch(self.accelerator.device)
        # Without a penalty nothing reads the reference, and its memory is saved.
        algorithm = self.resolved.algorithm
        reference = None
        if algorithm.kl_coef > 0:
            reference = frozen_copy(policy).to(self.accelerator.device)
        disable_dropout(policy)
        self._prepare(PolicyWithValue(policy, critic=algorithm.critic), reference)

    def _check(self) -> None:
        """Refuse what would fail later, after work was done."""
        _check_dataset("train", self.train_dataset)
        _check_dataset("eval", self.eval_dataset)
        if not self.reward_funcs:
            raise InputError("There is no reward function.")
        names = [name_of(reward) for reward in self.reward_funcs]
        # Rewards are logged by name, and one would hide the other.
        if len(set(names)) < len(names):
            raise InputError(f"The reward functions need different names, not {names}.")
        weights = self.args.reward_weights
        if weights is not None and len(weights) != len(names):
            raise InputError(
                f"reward_weights has {len(weights)} values for {len(names)} reward functions."
            )

    def _prepare(self, model: PolicyWithValue, reference: PreTrainedModel | None) -> None:
        """Make the optimiser, its schedule, the loader of prompts and the learner."""
        args = self.args
        parameters = [{"params": model.policy.parameters(), "lr": args.learning_rate}]
        # The value head starts from nothing, so it takes a larger rate than the trained policy.
        if model.value_head is not None:
            head = model.value_head.parameters()
            parameters.append({"params": head, "lr": args.value_learning_rate})
        # With torch's second beta, 0.999, one outlier in a rollout of otherwise equal rewards
        # moves every weight by several learning rates, for steps on end.
        optimizer = torch.optim.AdamW(
            parameters, betas=(0.9, 0.95), eps=args.adam_epsilon, weight_decay=0.0
        )
        # The scheduler is left unprepared: a prepared one moves on by the number of processes.
        self.scheduler = get_linear_schedule_with_warmup(optimizer, 0, args.num_steps)
        self.model, optimizer, self.loader = self.accelerator.prepare(
            model, optimizer, self._prompts()
        )
        self.learner = Learner(self.accelerator, self.model, reference, optimizer, args)

    def _prompts(self) -> DataLoader:
        """Return a loader of one batch per step and process: permutations of the dataset.

        An example comes `num_generations` times in a batch, one after the other.
        """
        copies = self.resolved.num_generations
        num_prompts = self.args.rollout_batch_size // copies
        # A DataLoader needs only `len` and indices, which any sequence has; its type asks for more.
        dataset = cast(TorchDataset[Example], self.train_dataset)
        # The sampler starts another permutation when one is used up, so a dataset may be smaller
        # than a rollout.
        sampler = RandomSampler(
            self.train_dataset,
            num_samples=self.args.num_steps * num_prompts * self.accelerator.num_processes,
            generator=torch.Generator().manual_seed(self.args.seed),
        )

        def collate(examples: list[Example]) -> list[Example]:
            return [example for example in examples for _ in range(copies)]

        return DataLoader(dataset, num_prompts, sampler=sampler, collate_fn=collate)

    @property
    def policy(self) -> PreTrainedModel:
        """The language model being trained."""
        return self.accelerator.unwrap_model(self.model).policy

    def train(self) -> dict[str, float]:
        """Train for `num_steps` steps, evaluating before and after, and write the run's files.

        Returns:
            The metrics of the last evaluation, as `evaluate` returns them.

        Raises:
            InputError: This trainer has trained already, a reward is no list of finite numbers,
                a prompt cannot be encoded, or `output_dir` cannot be written to.
        """
        if self.scheduler.last_epoch > 0:
            raise InputError("This trainer has trained already; make a new one to train further.")
        # Each process draws its own numbers: the same ones would sample the same completions.
        set_seed(self.args.seed, device_specific=True)
        with RunLog(self.accelerator, self.args) as log:
            before = self._play_evaluation()
            for step, examples in enumerate(self.loader, start=1):
                episodes, metrics = self._step(examples)
                if self.args.eval_steps and step % self.args.eval_steps == 0:
                    metrics |= self.evaluate()
                log.step(step, episodes, metrics)
            # The model is saved first: a reward that fails in the evaluation must not lose it.
            self.save_model()
            after = self._play_evaluation()
        log.report(before, after, self.stopwatch.seconds)
        return after.metrics("eval/")

    def evaluate(self) -> dict[str, float]:
        """Sample completions of the evaluation prompts and score them.

        Every evaluation draws the same random numbers and takes none from training, so that two
        of them differ by the policy alone.

        Returns:
            Means over the episodes of all processes: "eval/reward/mean", "eval/reward/std",
            "eval/rewards/<function>/mean", "eval/completions/mean_length" (tokens),
            "eval/completions/finished" and "eval/completions/distinct" (fractions).

        Raises:
            InputError: A reward is no list of finite numbers, or a prompt cannot be encoded.
        """
        return self._play_evaluation().metrics("eval/")

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Write a directory that `AutoModelForCausalLM` and `AutoTokenizer` load.

        The value head, if any, goes beside the model as `value_head.safetensors`.

        Args:
            output_dir: The directory. None: `model` in the `output_dir` of the settings.
        """
        if not self.accelerator.is_main_process:
            return
        directory = Path(output_dir or Path(self.args.output_dir, "model"))
        model = self.accelerator.unwrap_model(self.model)
        model.policy.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)
        if model.value_head is not None:
            save_file(model.value_head.state_dict(), directory / "value_head.safetensors")

    def _play_evaluation(self) -> Episodes:
        """Return the evaluation episodes of all processes."""
        count = min(self.args.num_eval_samples, len(self.eval_dataset))
        examples = [self.eval_dataset[i] for i in range(count)]
        device = self.accelerator.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            # Processes have different prompts, and must not draw the same numbers for them.
            torch.manual_seed(self.args.seed + self.accelerator.process_index)
            with self.accelerator.split_between_processes(examples) as own:
                # Some processes have no prompt if there are fewer prompts than processes.
                episodes = [self._score(own, self._sample(own))] if own else []
        return Episodes.concatenate(gather_object(episodes))

    def _step(self, examples: list[Example]) -> tuple[Episodes, dict[str, float]]:
        """Return the episodes of one rollout by all processes, and metrics of learning from it."""
        with self.stopwatch("generate"):
            rollout = self._sample(examples)
        with self.stopwatch("score"):
            episodes = self._score(examples, rollout)
        with self.stopwatch("logprob"):
            experience, credit = self.learner.experience(rollout, episodes.scores)
        with self.stopwatch("train"):
            update = self.learner.update(experience)
        # Metrics and samples are those of all processes; learning needed only its own episodes.
        everyone = Episodes.concatenate(gather_object([episodes]))
        return everyone, everyone.metrics() | credit | update | self._pace(everyone)

    def _pace(self, episodes: Episodes) -> dict[str, float]:
        """End a step. Returns its learning rate and how long it took, in seconds."""
        # The rate is read before the schedule moves on: it is that of the step that ends.
        learning_rate = self.scheduler.get_last_lr()[0]
        self.scheduler.step()
        lap = self.stopwatch.lap()
        seconds = sum(lap.values())
        metrics = {
            "learning_rate": learning_rate,
            "tokens_per_second": episodes.lengths.sum().item() / seconds,
            "time/step": seconds,
        }
        for phase, phase_seconds in lap.items():
            metrics[f"time/{phase}"] = phase_seconds
        return metrics

    def _sample(self, examples: Dataset) -> Rollout:
        return sample(
            self.policy,
            self.tokenizer,
            [example["prompt"] for example in examples],
            max_prompt_length=self.args.max_prompt_length,
            max_new_tokens=self.args.max_new_tokens,
            temperature=self.args.temperature,
        )

    def _score(self, examples: Dataset, rollout: Rollout) -> Episodes:
        return score_rollout(rollout, examples, self.reward_funcs, self.tokenizer, self.args)


def _check_dataset(name: str, dataset: Dataset) -> None:
    """Refuse a dataset without examples, or with one that has no prompt."""
    if len(dataset) == 0:
        raise InputError(f"The {name} dataset is empty.")
    # Indices and not iteration: only these are what a sequence promises and a loader uses.
    for i in range(len(dataset)):
        example = dataset[i]
        if not isinstance(example, dict) or not _is_prompt(example.get("prompt")):
            raise InputError(f"Every example of the {name} dataset must have a 'prompt'.")


def _is_prompt(prompt: Any) -> bool:
    """Whether this is text, or a chat of at least one message."""
    if isinstance(prompt, list):
        return bool(prompt) and all(isinstance(message, dict) for message in prompt)
    return isinstance(prompt, str)


def _check_generation_config(policy: PreTrainedModel) -> None:
    """Refuse now what `save_pretrained` would refuse after the training."""
    if policy.generation_config is None:
        return
    try:
        policy.generation_config.validate(strict=True)
    except ValueError as error:
        # The reason has several lines, and the message is one sentence.
        reason = " ".join(str(error).split())
        raise InputError(f"The model's generation_config could not be saved: {reason}") from None
