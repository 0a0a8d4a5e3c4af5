"""What the checks look at: a rollout, and the same quantities computed in the plainest way."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

import fastpg
from fastpg.trainer.data.encoding import encode_one, eos_ids
from fastpg.trainer.data.prompts import Example
from fastpg.trainer.learning.experience import Experience
from fastpg.trainer.learning.learner import Learner
from fastpg.trainer.models.head import HeadTransform
from fastpg.trainer.models.packing import Packing
from fastpg.trainer.models.policy import logprobs_through, policy_through
from fastpg.trainer.rewards.episodes import Episodes
from fastpg.trainer.rollouts.rollout import Rollout
from fastpg.trainer.run.engine import shares_weights

if TYPE_CHECKING:
    from fastpg.trainer.trainer import PPOTrainer

Verdict = Literal["pass", "warn", "fail"]


class Finding(NamedTuple):
    """The outcome of one check."""

    name: str
    verdict: Verdict
    measured: str
    advice: str  # what to do if the verdict is not "pass"


class Plain(NamedTuple):
    """Statistics of each completion token from forwards without padding, float64 [B, T].

    They are 0 behind the end of a completion.
    """

    logp: dict[float, Tensor]  # by temperature
    entropy: Tensor  # of the distribution that the token was sampled from, in nats
    variance: Tensor  # of the log-prob of a token of that distribution
    end: Tensor  # the probability of ending here


class Gradient(NamedTuple):
    """The gradient of one optimiser step, and the statistics of its policy loss."""

    parts: list[Tensor | None]  # of every trained weight; None where there is none
    stats: dict[str, float]


@dataclass
class Evidence:
    """A rollout of a trainer with its credit, before any optimiser step.

    Args:
        trainer: The trainer.
        examples: The B examples of the rollout.
        rollout: The B episodes.
        episodes: Their scores.
        experience: Their credit.
        credit: The metrics that came with the credit.
        other_modes: The modules that sampling left in another mode, training or evaluation.
    """

    trainer: "PPOTrainer"
    examples: Sequence[Example]
    rollout: Rollout
    episodes: Episodes
    experience: Experience
    credit: dict[str, float]
    other_modes: list[str]

    @property
    def learner(self) -> Learner:
        """The learner of the trainer."""
        return self.trainer.learner

    @property
    def is_half(self) -> bool:
        """Whether the model computes in 16 bits."""
        halves = (torch.bfloat16, torch.float16)
        return self.trainer.args.mixed_precision != "no" or self.trainer.policy.dtype in halves

    @property
    def tolerance(self) -> float:
        """How far two ways to the same log-prob may be apart, in nats: that of rounding."""
        return 0.3 if self.is_half else 1e-3

    @cached_property
    def ends(self) -> set[int]:
        """The tokens that end a completion."""
        return set(eos_ids(self.trainer.policy, self.trainer.tokenizer))

    @cached_property
    def lengths(self) -> list[int]:
        """The tokens of each completion up to its first end, counted one by one."""
        lengths = []
        for tokens in self.rollout.completion_ids.tolist():
            length = 0
            for token in tokens:
                length += 1
                if token in self.ends or self._has_stop_string(tokens[:length]):
                    break
            lengths.append(length)
        return lengths

    def _has_stop_string(self, tokens: list[int]) -> bool:
        strings = self.trainer.args.stop_strings or []
        text = self.trainer.tokenizer.decode(tokens) if strings else ""
        return any(string in text for string in strings)

    @cached_property
    def mask(self) -> Tensor:
        """Which tokens belong to the completions by `lengths`, bool [B, T]."""
        width = self.rollout.completion_ids.shape[1]
        rows = [[place < length for place in range(width)] for length in self.lengths]
        return torch.tensor(rows, device=self.rollout.mask.device)

    @cached_property
    def prompts(self) -> list[list[int]]:
        """The tokens of each prompt."""
        most = self.trainer.args.max_prompt_length
        start = None if most is None else -most
        return [
            encode_one(example["prompt"], self.trainer.tokenizer, "A prompt")[start:]
            for example in self.examples
        ]

    @cached_property
    def logp(self) -> Tensor:
        """Log-probs as the learner computes them before an update, float32 [B, T]."""
        if self.experience.logp is not None:
            return self.experience.logp
        return self.logp_with(self.trainer.paths.head, self.trainer.paths.packing)

    @torch.no_grad()
    def logp_with(self, head: HeadTransform | None, packing: Packing | None) -> Tensor:
        """Return log-probs from training's forward by the ways that are given, float32 [B, T]."""
        parts = []
        for rows in torch.arange(len(self.rollout.mask)).split(self.rows_of_a_forward):
            # The temperature is the setting, whatever the learner makes of it.
            batch = replace(
                self.learner.batch(self.rollout[rows]),
                temperature=self.trainer.args.temperature,
                head=head,
                packing=packing,
            )
            parts.append(logprobs_through(self.trainer.model, batch).logp)
        return torch.cat(parts)

    @property
    def rows_of_a_forward(self) -> int:
        """The episodes of a forward: what the settings say, or one where they count tokens."""
        return self.trainer.resolved.micro_batch_size or 1

    @cached_property
    def temperatures(self) -> list[float]:
        """The temperature of the settings first; what it is if it is left out, or used twice."""
        own = self.trainer.args.temperature
        return list(dict.fromkeys([own, 1.0, own * own]))

    @cached_property
    def plain(self) -> Plain:
        """Statistics from one forward for each episode, alone and without padding."""
        trainer = self.trainer
        if shares_weights(trainer.accelerator):
            return policy_through(trainer.model, self._plain_statistics)
        with trainer.accelerator.autocast():
            return self._plain_statistics(trainer.policy)

    @torch.no_grad()
    def _plain_statistics(self, policy: PreTrainedModel) -> Plain:
        shape, device = self.rollout.mask.shape, self.rollout.mask.device
        empty = [torch.zeros(shape, dtype=torch.float64, device=device) for _ in range(6)]
        logp = dict(zip(self.temperatures, empty, strict=False))
        plain = Plain(logp, *empty[3:])
        model: Any = policy
        with _evaluating(policy):
            for row, (prompt, length) in enumerate(zip(self.prompts, self.lengths, strict=True)):
                tokens = self.rollout.completion_ids[row, :length]
                ids = torch.cat([torch.tensor(prompt, device=device), tokens])[None]
                # Without padding there is no mask to forget, and positions begin at 0.
                logits = model(input_ids=ids, use_cache=False).logits[0, -length - 1 : -1].double()
                logits = logits.masked_fill(~self._drawn_from(row, logits), -torch.inf)
                for temperature, table in plain.logp.items():
                    table[row, :length] = _chosen(logits / temperature, tokens)
                logps = (logits / self.temperatures[0]).log_softmax(-1)
                # A token of probability 0 adds nothing.
                finite = logps.where(logps > -torch.inf, 0.0)
                entropy = -(logps.exp() * finite).sum(-1)
                plain.entropy[row, :length] = entropy
                square = (logps.exp() * finite.square()).sum(-1)
                plain.variance[row, :length] = square - entropy.square()
                plain.end[row, :length] = logps.exp()[:, sorted(self.ends)].sum(-1)
        return plain

    def _drawn_from(self, row: int, logits: Tensor) -> Tensor:
        """Mark the tokens that those of episode `row` were drawn from, bool like logits [n, V]."""
        if self.rollout.kept is None:
            return torch.ones_like(logits, dtype=torch.bool)
        marked = torch.zeros_like(logits, dtype=torch.bool)
        token_ids, offsets = self.rollout.kept[torch.tensor([row])].support
        for place, (begin, end) in enumerate(pairwise(offsets[: len(logits) + 1].tolist())):
            # An empty set is the whole vocabulary.
            marked[place, token_ids[begin:end].long() if end > begin else slice(None)] = True
        return marked

    @cached_property
    def gradient(self) -> Gradient:
        """The gradient of the first optimiser step, in the micro-batches of the settings."""
        return self._gradient(self.learner)

    @cached_property
    def recut_gradient(self) -> Gradient:
        """The same in micro-batches of one episode, or of two where the settings say one."""
        size = 2 if self.rows_of_a_forward == 1 else 1
        args = replace(self.trainer.args, micro_batch_size=size, micro_batch_tokens=None)
        return self._gradient(replace(self.learner, args=args))

    def _gradient(self, learner: Learner) -> Gradient:
        rows = learner.minibatches(torch.arange(len(self.rollout.mask)))[0]
        self.learner.optimizer.zero_grad()
        step = learner.accumulate(self.experience, rows)
        gradients = [weight.grad for weight in self.trained_weights]
        parts = [None if part is None else part.detach().clone() for part in gradients]
        self.learner.optimizer.zero_grad()
        return Gradient(parts, fastpg.merge_stats(step.policy_stats))

    @property
    def trained_weights(self) -> list[Tensor]:
        """The weights that require a gradient."""
        return [weight for weight in self.trainer.model.parameters() if weight.requires_grad]


def _chosen(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the log-probs of tokens [n] by logits [n, V]."""
    return logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]


@contextmanager
def _evaluating(policy: PreTrainedModel) -> Iterator[None]:
    """Let all modules be in evaluation mode; afterwards each is as it was."""
    modes = modes_of(policy)
    policy.eval()
    try:
        yield
    finally:
        for name, module in policy.named_modules():
            module.training = modes[name]


def modes_of(model: torch.nn.Module) -> dict[str, bool]:
    """Return which modules are in training mode, by name."""
    return {name: module.training for name, module in model.named_modules()}
