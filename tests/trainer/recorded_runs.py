"""Runs of the trainer with settings away from the defaults, and what shows of them from outside."""

import contextlib
from dataclasses import dataclass, field
from unittest import mock

import torch
from tiny_trainer import make_trainer, share_of_praise, tiny_model
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fastpg.trainer.models.policy import LossRequest, PolicyRequest
from fastpg.trainer.rollouts.generation import generate
from fastpg.trainer.run.engine import reshard, shared_like, whole

ENDS = {1, 5, 9, 20, 21, 22}
"""The tokenizer's EOS and more of the model, so that most completions end, after few tokens."""

SETTINGS = {
    "num_steps": 2,
    "rollout_batch_size": 12,
    "max_new_tokens": 14,
    "num_ppo_epochs": 2,
    "num_mini_batches": 2,
    "micro_batch_size": 4,  # does not divide the 6 episodes of a minibatch
    "temperature": 1.3,
    "learning_rate": 3e-3,
    "adam_epsilon": 1e-3,
    "max_grad_norm": 1.5,
    "kl_coef": 0.3,
    "entropy_coef": 0.02,
    "vf_coef": 0.3,
    "missing_eos_penalty": 0.3,
    "reward_weights": [0.7, -0.4],
}
OF_CRITIC = {
    "value_learning_rate": 0.1,
    "gamma": 0.9,
    "lam": 0.8,
    "cliprange_value": 0.1,
}
OF_CLIP = {"cliprange": 0.1, "cliprange_high": 0.15}
OF_ALGORITHM = {
    "ppo": {**OF_CRITIC, **OF_CLIP},
    "reinforce++": {"gamma": 0.9, **OF_CLIP},
    "grpo": {"gamma": 1.0, "num_generations": 4, **OF_CLIP},
    "dr_grpo": {"gamma": 1.0, "num_generations": 4, **OF_CLIP},
    "rloo": {"gamma": 1.0, "num_generations": 4},
    "gspo": {"gamma": 1.0, "num_generations": 4, "cliprange": 0.01, "cliprange_high": 0.02},
}
"""Away from the defaults, so that none of them can be left out unseen."""


def share_of_long_words(prompts, completions):
    counts = [[len(word) > 5 for word in c.split()] for c in completions]
    return [sum(count) / max(len(count), 1) for count in counts]


REWARDS = [share_of_praise, share_of_long_words]


def moved_trainer(folder, algorithm, **changes):
    """A trainer whose policy is no longer its reference, and the settings that it was given."""
    settings = {"algorithm": algorithm, **SETTINGS, **OF_ALGORITHM[algorithm], **changes}
    model = tiny_model()
    model.generation_config.eos_token_id = sorted(ENDS - {1})
    trainer = make_trainer(folder, REWARDS, model=model, **settings)
    move(trainer)
    return trainer, settings


def move(trainer):
    """Let the policy differ from the reference, and the value head from 0."""
    reshard(trainer.model)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.accelerator.unwrap_model(trainer.model).parameters():
            parameter += shared_like(0.1 * torch.randn(parameter.shape, generator=g), parameter)


def trained_parameters(trainer):
    model = trainer.accelerator.unwrap_model(trainer.model)
    reshard(trainer.model)
    return torch.cat([whole(parameter).flatten() for parameter in model.parameters()])


@dataclass
class Round:
    """One call of `generation.generate`, and what the trainer did until the next one."""

    input_ids: Tensor
    attention_mask: Tensor
    sequences: Tensor
    is_quiet: bool
    """Whether the model was in evaluation mode and no gradient was recorded."""
    looks: list[Tensor] = field(default_factory=list)
    """The sequences of each forward of the policy without a gradient."""
    parts: list[list[Tensor]] = field(default_factory=lambda: [[]])
    """For each optimiser step, the sequences of each of its forwards; the last entry is empty."""
    groups: list[list[dict]] = field(default_factory=list)
    """For each optimiser step, the settings of the optimiser's parameter groups."""

    def minibatches(self) -> list[list[int]]:
        """For each optimiser step, the episodes that it was shown, by their number."""
        batches, free = [], set()
        for parts in self.parts[:-1]:
            batches.append([])
            for row in torch.cat(parts):
                free = free or set(range(len(self.sequences)))
                numbers = [i for i in sorted(free) if torch.equal(self.sequences[i], row)]
                assert numbers, "a pass over the rollout shows an episode twice, or a strange one"
                free.remove(numbers[0])
                batches[-1].append(numbers[0])
        return batches

    def episodes(self, ends: set[int]) -> list["Episode"]:
        """The prompts and completions by themselves, without padding."""
        columns = self.input_ids, self.attention_mask, self.sequences
        out = []
        for ids, kept, sequence in zip(*columns, strict=True):
            completion = sequence[len(ids) :].tolist()
            ended = [i + 1 for i, token in enumerate(completion) if token in ends]
            length = ended[0] if ended else len(completion)
            out.append(Episode(ids[kept.bool()].tolist(), completion[:length], bool(ended)))
        return out


@dataclass
class Episode:
    """A prompt and its completion, as token ids."""

    prompt: list[int]
    completion: list[int]
    finished: bool
    sampled: list[bool] | None = None
    """Which tokens of the completion the policy sampled. None: all."""


@contextlib.contextmanager
def recording(trainer):
    """Yields a list that gets a `Round` at every call of `generation.generate`."""
    rounds = []

    def recorded_generate(policy, input_ids, attention_mask, *options):
        in_training_mode = any(module.training for module in policy.modules())
        is_quiet = not in_training_mode and not torch.is_grad_enabled()
        sequences = generate(policy, input_ids, attention_mask, *options)
        rounds.append(Round(input_ids, attention_mask, sequences, is_quiet))
        return sequences

    def before_forward(_, args):
        (request,) = args
        if isinstance(request, PolicyRequest):
            return  # It samples.
        batch = request.batch if isinstance(request, LossRequest) else request
        ids = batch.input_ids.clone()
        (rounds[-1].parts[-1] if torch.is_grad_enabled() else rounds[-1].looks).append(ids)

    def before_step(optimizer, *_):
        settings = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        rounds[-1].groups.append(settings)
        rounds[-1].parts.append([])

    model = trainer.accelerator.unwrap_model(trainer.model)
    hooks = [
        model.register_forward_pre_hook(before_forward),
        register_optimizer_step_pre_hook(before_step),
    ]
    try:
        # The plot at the end of a run would take as long as a training step.
        with (
            mock.patch("matplotlib.figure.Figure.savefig"),
            mock.patch("fastpg.trainer.rollouts.rollout.generate", recorded_generate),
        ):
            yield rounds
    finally:
        for hook in hooks:
            hook.remove()


def text_of(episode, tokenizer):
    """The words of a completion, by hand."""
    words = tokenizer.convert_ids_to_tokens(episode.completion)
    return " ".join(word for word in words if word not in tokenizer.all_special_tokens)


def score_by_hand(episodes, rewards, weights, missing_eos_penalty, tokenizer):
    """The scores of the episodes, and what the log says of them."""
    texts = [text_of(episode, tokenizer) for episode in episodes]
    prompts = [" ".join(tokenizer.convert_ids_to_tokens(e.prompt)) for e in episodes]
    scores, metrics = [0.0 if e.finished else -missing_eos_penalty for e in episodes], {}
    for reward, weight in zip(rewards, weights, strict=True):
        values = reward(prompts, texts)
        scores = [score + weight * value for score, value in zip(scores, values, strict=True)]
        metrics[f"rewards/{reward.__name__}/mean"] = sum(values) / len(values)
    mean = sum(scores) / len(scores)
    variance = sum((score - mean) ** 2 for score in scores) / len(scores)
    metrics |= {
        "reward/mean": mean,
        "reward/std": variance**0.5,
        "completions/mean_length": sum(len(e.completion) for e in episodes) / len(episodes),
        "completions/finished": sum(e.finished for e in episodes) / len(episodes),
        "completions/distinct": len(set(texts)) / len(texts),
    }
    return torch.tensor(scores, dtype=torch.float64), metrics
