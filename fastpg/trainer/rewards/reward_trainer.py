"""Training of a reward model on preference pairs (Bradley and Terry 1952)."""

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGTERM
from typing import Any, NamedTuple, cast

import torch
from accelerate.utils import gather_object, set_seed
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_linear_schedule_with_warmup,
)

import fastpg
from fastpg.trainer.models.loading import load_scorer, load_tokenizer
from fastpg.trainer.models.modes import disable_dropout
from fastpg.trainer.rewards.pairs import Pair, read_pairs
from fastpg.trainer.rewards.reward_model import RewardModel
from fastpg.trainer.rewards.reward_report import Judgement
from fastpg.trainer.run.engine import (
    check_trained,
    make_accelerator,
    on_any_process,
    on_main_process,
    shares_weights,
    synchronized_if,
)
from fastpg.trainer.run.files import only_writer, require_space, write_model, write_text
from fastpg.trainer.run.run_files import (
    check_apart,
    save_config,
    set_earlier_run_aside,
    word_of_moved,
)
from fastpg.trainer.run.signals import Interrupted, StopSignals
from fastpg.trainer.settings.groups import option
from fastpg.trainer.settings.parsing import InputError, convert_all
from fastpg.trainer.settings.ranges import MixedPrecision, check_ranges

LINES = 20  # that are shown of a training


@dataclass
class RewardConfig:
    """Settings of `RewardTrainer`.

    Args:
        model: Directory or name of a causal language model, or of a reward model to train further.
        dataset: File of preference pairs.
        eval_dataset: The same for evaluation. None: a part of `dataset`.
        output_dir: Directory for metrics, summary, plot and model.
        seed: Seed of the head and of the order of the pairs, below 2**31.
        num_epochs: Passes over the pairs.
        batch_size: Pairs per optimiser step and process.
        micro_batch_size: Pairs per forward and backward. It changes no result beyond rounding.
        learning_rate: Learning rate at the first step; it decays linearly to 0.
        max_grad_norm: The gradient is clipped to this norm.
        eval_fraction: Share of the pairs that are held out where there is no `eval_dataset`.
        mixed_precision: Autocast dtype of the forward: "no", "bf16" or "fp16".
        trust_remote_code: Whether code that comes with the model may run.

    Raises:
        InputError: A value has the wrong type or is out of range.
    """

    model: str | None = option(None, "directory or name of a causal language model")
    dataset: str | None = option(None, "preference pairs: rows with 'chosen' and 'rejected'")
    eval_dataset: str | None = option(None, "likewise; by default a part of dataset")
    output_dir: str = option("out/reward_model", "directory for metrics, summary, plot and model")
    seed: int = option(0, "seed of the head and of the order of the pairs")
    num_epochs: int = option(1, "passes over the pairs")
    batch_size: int = option(64, "pairs per optimiser step and process")
    micro_batch_size: int = option(8, "pairs per forward and backward")
    learning_rate: float = option(1e-5, "at the first step; decays linearly to 0")
    max_grad_norm: float = option(1.0, "the gradient is clipped to this norm")
    eval_fraction: float = option(0.1, "share of the pairs held out if there is no eval_dataset")
    mixed_precision: MixedPrecision = field(
        default="no", metadata={"help": "no, bf16 or fp16: the autocast dtype of the forward"}
    )
    trust_remote_code: bool = option(False, "run the code that comes with the model")

    def __post_init__(self) -> None:
        convert_all(self)
        check_ranges(self)


class EncodedPair(NamedTuple):
    """The token ids of a pair."""

    chosen: list[int]
    rejected: list[int]


class RewardTrainer:
    """Trains a linear head on the last token of a language model, and the model with it.

    The loss is `fastpg.preference_loss`. There is no dropout.

    Args:
        model: A directory or name, or the module itself, trained in place: with one output, as
            `AutoModelForSequenceClassification` makes it.
        args: The settings.
        train_dataset: Dicts with "chosen" and "rejected", and if not in them a "prompt": texts or
            lists of chat messages.
        eval_dataset: The same for evaluation. None: `eval_fraction` of the training pairs.
        processing_class: The tokenizer. None: the one saved with the model.

    Raises:
        InputError: The pairs or the model cannot be used.

    Example:
        >>> from fastpg.trainer import RewardConfig, RewardTrainer
        >>> pairs = [{"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}, ...]
        >>> trainer = RewardTrainer(
        ...     "my-model", RewardConfig(), train_dataset=pairs
        ... )  # doctest: +SKIP
        >>> trainer.train()["accuracy"]  # doctest: +SKIP
        0.93
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: RewardConfig,
        *,
        train_dataset: Sequence[dict[str, Any]],
        eval_dataset: Sequence[dict[str, Any]] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.args = args
        self.directory = Path(args.output_dir).absolute()
        train_pairs, eval_pairs = self._split(train_dataset, eval_dataset)
        # A new head is random.
        set_seed(args.seed)
        if isinstance(model, str):
            model, _ = load_scorer(model, args.trust_remote_code, new_head=True)
        tokenizer = processing_class or load_tokenizer(model, args.trust_remote_code)
        self.reward = RewardModel(model, tokenizer, batch_size=2 * args.micro_batch_size)
        self.train_pairs, self.eval_pairs = self._encoded(train_pairs), self._encoded(eval_pairs)
        disable_dropout(model)
        self.accelerator = make_accelerator(args)
        if shares_weights(self.accelerator):
            raise InputError("A reward model is trained by DDP or ZeRO-2, not by FSDP or ZeRO-3.")
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.0
        )
        loader = DataLoader(
            cast(Dataset[int], range(len(self.train_pairs))),
            args.batch_size,
            shuffle=True,
            generator=torch.Generator().manual_seed(args.seed),
            collate_fn=list,
        )
        self.model, self.optimizer, self.loader = self.accelerator.prepare(model, optimizer, loader)
        self.total = len(self.loader) * args.num_epochs
        # The scheduler is left unprepared: a prepared one moves on by the number of processes.
        self.scheduler = get_linear_schedule_with_warmup(optimizer, 0, self.total)
        self.console = Console(highlight=False, quiet=not self.accelerator.is_main_process)

    def _split(
        self, train: Sequence[dict[str, Any]], held_out: Sequence[dict[str, Any]] | None
    ) -> tuple[list[Pair], list[Pair]]:
        """Return the pairs to train on and those to evaluate on."""
        pairs = read_pairs(train)
        if held_out is not None:
            return pairs, read_pairs(held_out)
        if len(pairs) < 2:
            raise InputError(f"{len(pairs)} pairs are too few to hold one out for evaluation.")
        generator = torch.Generator().manual_seed(self.args.seed)
        order = torch.randperm(len(pairs), generator=generator).tolist()
        count = min(math.ceil(self.args.eval_fraction * len(pairs)), len(pairs) - 1)
        return [pairs[i] for i in order[count:]], [pairs[i] for i in order[:count]]

    def _encoded(self, pairs: list[Pair]) -> list[EncodedPair]:
        encode = self.reward.encode
        return [EncodedPair(encode(pair.chosen), encode(pair.rejected)) for pair in pairs]

    def train(self) -> dict[str, float]:
        """Train, and write metrics, summary, plot and model to `output_dir`.

        Returns:
            What `evaluate` returns at the end.

        Raises:
            InputError: `output_dir` cannot be written to, has no room for the model, holds the one
                that is trained, or another run is writing to it; or weights are no longer finite.
            Interrupted: A signal has stopped the training; model and metrics are saved as they were
                then.
        """
        with self._own_directory(), StopSignals(immediate=False) as stop:
            self.console.print(f"Scoring {len(self.eval_pairs)} held-out pairs ...")
            before = self._judge()
            rows: list[str] = []
            for epoch in range(self.args.num_epochs):
                for step, batch in enumerate(self.loader, start=epoch * len(self.loader) + 1):
                    metrics = self._step([self.train_pairs[i] for i in batch])
                    check_trained(self.accelerator, self.model, step)
                    rows.append(json.dumps({"step": step, **metrics}) + "\n")
                    self._show(step, metrics)
                    # All processes have to stop at the same step.
                    if on_any_process(self.accelerator, stop.requested is not None):
                        self._save(rows)
                        raise Interrupted(stop.requested or SIGTERM)
            after = self._judge()
            self._save(rows)
            if self.accelerator.is_main_process:
                after.write(self.directory, before)
        metrics = after.metrics()
        self._say(
            f"Of {len(self.eval_pairs)} held-out pairs, {metrics['accuracy']:.1%} are ordered "
            f"rightly; calibration error {metrics['calibration_error']:.3f}. "
            f"The reward model is in {Path(self.args.output_dir, 'model')}."
        )
        return metrics

    @contextlib.contextmanager
    def _own_directory(self) -> Iterator[None]:
        """Make the output directory, which no other run may write to inside the `with` block."""
        with contextlib.ExitStack() as opened:
            on_main_process(self.accelerator, lambda: self._open_directory(opened))
            yield

    def _open_directory(self, opened: contextlib.ExitStack) -> None:
        model = self.accelerator.unwrap_model(self.model)
        check_apart(model.name_or_path, self.directory)
        size = sum(p.numel() * p.element_size() for p in self.model.parameters())
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            opened.enter_context(only_writer(self.directory))
            require_space(self.directory, size, "the reward model")
            aside = set_earlier_run_aside(self.directory)
            save_config(self.args, self.directory / "config.yaml")
        except OSError as error:
            raise InputError(f"Cannot write to {error.filename}: {error.strerror}.") from error
        if aside is not None:
            self._say(word_of_moved(self.args.output_dir, aside))

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def evaluate(self) -> dict[str, float]:
        """Score the held-out pairs.

        Returns:
            "loss", "accuracy", "margin" (chosen - rejected), "chosen_mean", "rejected_mean",
            "count" and "calibration_error": by how much the probability that the model gives its
            choice differs from how often it is right, on average.
        """
        return self._judge().metrics()

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Write a directory that `AutoModelForSequenceClassification` and `RewardModel` load.

        Args:
            output_dir: The directory. None: `model` in the `output_dir` of the settings.
        """
        if self.accelerator.is_main_process:
            write_model(Path(output_dir or self.directory / "model"), self._write_model)

    def _save(self, rows: list[str]) -> None:
        """Write the model, and the lines of its metrics."""
        self.save_model()
        if self.accelerator.is_main_process:
            write_text(self.directory / "metrics.jsonl", "".join(rows))

    def _write_model(self, directory: Path) -> None:
        self.accelerator.unwrap_model(self.model).save_pretrained(directory)
        self.reward.tokenizer.save_pretrained(directory)

    def _step(self, pairs: list[EncodedPair]) -> dict[str, float]:
        """Make one optimiser step, whose micro-batches add up exactly."""
        size = self.args.micro_batch_size
        all_stats = []
        for start in range(0, len(pairs), size):
            part = pairs[start : start + size]
            is_last = start + size >= len(pairs)
            with synchronized_if(self.accelerator, self.model, is_last):
                chosen, rejected = self._scores(part)
                # The mean is over the pairs of the whole step.
                weight = torch.full_like(chosen, 1 / len(pairs))
                loss, stats = fastpg.preference_loss(chosen, rejected, weight=weight)
                self.accelerator.backward(loss)
            all_stats.append(stats)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
        learning_rate = self.scheduler.get_last_lr()[0]
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        merged = fastpg.merge_stats(all_stats)
        return {**merged, "grad_norm": norm.item(), "learning_rate": learning_rate}

    def _scores(self, pairs: list[EncodedPair]) -> tuple[Tensor, Tensor]:
        """Return the scores of chosen and rejected, made in one forward: float32 [B] each."""
        ids = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
        with self.accelerator.autocast():
            scores = self.reward.scores_of(self.model, ids)
        chosen, rejected = scores.chunk(2)
        return chosen, rejected

    @torch.no_grad()
    def _judge(self) -> Judgement:
        """Return the scores of the held-out pairs, which the processes share out."""
        size = self.args.micro_batch_size
        scores = []
        with self.accelerator.split_between_processes(self.eval_pairs) as own:
            for start in range(0, len(own), size):
                chosen, rejected = self._scores(own[start : start + size])
                scores += list(zip(chosen.tolist(), rejected.tolist(), strict=True))
        everyone = torch.tensor(gather_object(scores))
        return Judgement(everyone[:, 0], everyone[:, 1])

    def _show(self, step: int, metrics: dict[str, float]) -> None:
        """Show one of the first and the last step, and some between."""
        if step not in (1, self.total) and step % max(1, self.total // LINES) != 0:
            return
        self.console.print(
            f"step {step}/{self.total}  loss {metrics['loss']:.3f}  "
            f"accuracy {metrics['accuracy']:.1%}  margin {metrics['margin']:+.2f}"
        )
