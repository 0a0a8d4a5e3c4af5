"""`PPOTrainer`: sample, score, learn, over and over."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from safetensors.torch import save_file
from torch.utils.data import DataLoader, RandomSampler
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_linear_schedule_with_warmup,
)

from fastpg.trainer.config import InputError, PPOConfig
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
from fastpg.trainer.rewards import RewardFunction, name_of
from fastpg.trainer.rollout import Rollout, eos_ids, sample

Dataset = Sequence[dict[str, Any]]


def _is_prompt(prompt: Any) -> bool:
    """Text, or a chat of at least one message."""
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
        reason = " ".join(str(error).split())
        raise InputError(f"The model's generation_config could not be saved: {reason}") from None


class PPOTrainer:
    """Train a causal language model on rewards of its own completions.

    model: a directory or name for `from_pretrained`, or the module itself, trained in place.
    reward_funcs: one or several `reward(prompts, completions, **columns) -> list[float]`.
    train_dataset, eval_dataset: sequences of dicts with a "prompt", text or chat messages; the
        other columns go to the reward functions by name. Without an `eval_dataset`, evaluation
        takes the first training prompts.
    processing_class: the tokenizer, by default the one saved with the model.

    Raises `InputError` when a dataset is empty or lacks prompts, or the tokenizer has no EOS.
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
        self.reward_funcs = [reward_funcs] if callable(reward_funcs) else list(reward_funcs)
        self.train_dataset = train_dataset
        self.eval_dataset = train_dataset if eval_dataset is None else eval_dataset
        self._check()
        policy = load_policy(model)
        _check_generation_config(policy)
        self.tokenizer = processing_class or load_tokenizer(policy)
        eos_ids(policy, self.tokenizer)  # refused now rather than after the first rollout
        self.accelerator = Accelerator(
            mixed_precision=self.args.mixed_precision,
            log_with="tensorboard",
            project_dir=self.args.output_dir,
        )
        self.stopwatch = Stopwatch(self.accelerator.device)
        reference = None
        if self.args.row.kl_coef > 0:
            reference = frozen_copy(policy).to(self.accelerator.device)
        disable_dropout(policy)
        self._prepare(PolicyWithValue(policy, critic=self.args.row.critic), reference)

    def _check(self) -> None:
        """Refuse what would fail later, after work was done."""
        for name, dataset in (("train", self.train_dataset), ("eval", self.eval_dataset)):
            if len(dataset) == 0:
                raise InputError(f"The {name} dataset is empty.")
            rows = (dataset[i] for i in range(len(dataset)))
            if not all(isinstance(row, dict) and _is_prompt(row.get("prompt")) for row in rows):
                raise InputError(f"The rows of the {name} dataset must have a 'prompt'.")
        if not self.reward_funcs:
            raise InputError("There is no reward function.")
        names = [name_of(reward) for reward in self.reward_funcs]
        if len(set(names)) < len(names):
            raise InputError(f"The reward functions need different names, not {names}.")
        weights = self.args.reward_weights
        if weights is not None and len(weights) != len(names):
            raise InputError(
                f"reward_weights has {len(weights)} values for {len(names)} reward functions."
            )

    def _prepare(self, model: PolicyWithValue, reference: PreTrainedModel | None) -> None:
        args = self.args
        parameters = [{"params": model.policy.parameters(), "lr": args.learning_rate}]
        if model.value_head is not None:
            head = model.value_head.parameters()
            parameters.append({"params": head, "lr": args.value_learning_rate})
        # With torch's second beta, 0.999, one outlier in a rollout of otherwise equal rewards
        # moves every weight by several learning rates, for steps on end.
        optimizer = torch.optim.AdamW(
            parameters, betas=(0.9, 0.95), eps=args.adam_epsilon, weight_decay=0.0
        )
        # Left unprepared: a prepared scheduler moves on by the number of processes at each step.
        self.scheduler = get_linear_schedule_with_warmup(optimizer, 0, args.num_steps)
        model, optimizer, self.loader = self.accelerator.prepare(model, optimizer, self._prompts())
        self.model = model
        self.learner = Learner(self.accelerator, model, reference, optimizer, args)

    def _prompts(self) -> DataLoader:
        """One batch of rows per step and process: permutation after permutation of the dataset.

        A row comes `num_generations` times in a batch, one after the other.
        """
        args = self.args.resolved()
        num_prompts = args.rollout_batch_size // args.num_generations
        sampler = RandomSampler(
            self.train_dataset,
            num_samples=args.num_steps * num_prompts * self.accelerator.num_processes,
            generator=torch.Generator().manual_seed(args.seed),
        )

        def collate(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
            return [row for row in rows for _ in range(args.num_generations)]

        return DataLoader(self.train_dataset, num_prompts, sampler=sampler, collate_fn=collate)

    @property
    def policy(self) -> PreTrainedModel:
        """The language model being trained."""
        return self.accelerator.unwrap_model(self.model).policy

    def train(self) -> dict[str, float]:
        """Train for `num_steps` steps, evaluating before and after, and write the run's files.

        Returns the metrics of the last evaluation.
        """
        if self.scheduler.last_epoch > 0:
            raise InputError("This trainer has trained already; make a new one to train further.")
        set_seed(self.args.seed, device_specific=True)
        with RunLog(self.accelerator, self.args) as log:
            before = self._play_evaluation()
            for step, rows in enumerate(self.loader, start=1):
                episodes, metrics = self._step(rows)
                if self.args.eval_steps and step % self.args.eval_steps == 0:
                    metrics |= self.evaluate()
                log.step(step, episodes, metrics)
            self.save_model()  # first: a reward that fails must not lose the model
            after = self._play_evaluation()
        log.report(before, after, self.stopwatch.seconds)
        return after.metrics("eval/")

    def evaluate(self) -> dict[str, float]:
        """Sample and score the evaluation prompts. Returns `eval/...` metrics.

        Every evaluation draws the same random numbers and takes none from training, so that two
        of them differ by the policy alone.
        """
        return self._play_evaluation().metrics("eval/")

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Write a directory that `AutoModelForCausalLM` and `AutoTokenizer` load.

        It is `model` in the settings' `output_dir` by default. The value head, if any, goes beside
        the model as `value_head.safetensors`.
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
        count = min(self.args.num_eval_samples, len(self.eval_dataset))
        rows = [self.eval_dataset[i] for i in range(count)]
        device = self.accelerator.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self.args.seed + self.accelerator.process_index)
            with self.accelerator.split_between_processes(rows) as own:
                episodes = [self._score(own, self._sample(own))] if own else []
        return Episodes.concatenate(gather_object(episodes))

    def _step(self, rows: list[dict[str, Any]]) -> tuple[Episodes, dict[str, float]]:
        """One rollout and the optimisation on it. Returns the episodes of all processes."""
        with self.stopwatch("generate"):
            rollout = self._sample(rows)
        with self.stopwatch("score"):
            episodes = self._score(rows, rollout)
        with self.stopwatch("logprob"):
            experience, credit = self.learner.experience(rollout, episodes.scores)
        with self.stopwatch("train"):
            update = self.learner.update(experience)
        everyone = Episodes.concatenate(gather_object([episodes]))
        return everyone, everyone.metrics() | credit | update | self._pace(everyone)

    def _pace(self, episodes: Episodes) -> dict[str, float]:
        """End a step: its learning rate, and how long it took."""
        learning_rate = self.scheduler.get_last_lr()[0]
        self.scheduler.step()
        lap = self.stopwatch.lap()
        seconds = sum(lap.values())
        return {
            "learning_rate": learning_rate,
            "tokens_per_second": episodes.lengths.sum().item() / seconds,
            "time/step": seconds,
            **{f"time/{phase}": s for phase, s in lap.items()},
        }

    def _sample(self, rows: Dataset) -> Rollout:
        return sample(
            self.policy,
            self.tokenizer,
            [row["prompt"] for row in rows],
            max_prompt_length=self.args.max_prompt_length,
            max_new_tokens=self.args.max_new_tokens,
            temperature=self.args.temperature,
        )

    def _score(self, rows: Dataset, rollout: Rollout) -> Episodes:
        return score_rollout(rollout, rows, self.reward_funcs, self.tokenizer, self.args)
