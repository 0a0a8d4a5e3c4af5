"""Scored completions: what evaluation reports and what the sample files hold."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastpg.trainer.config import PPOConfig
from fastpg.trainer.rewards import RewardFunction, name_of, score
from fastpg.trainer.rollout import Rollout


@dataclass(frozen=True)
class Episodes:
    """B prompts with one completion each. Tensors are float32 [B], on the CPU."""

    prompts: list[Any]
    completions: list[str]
    rewards: dict[str, Tensor]
    """By reward function, before weights."""
    scores: Tensor
    """What the policy is trained on."""
    lengths: Tensor
    """Tokens, the EOS included."""
    finished: Tensor
    """1 where the completion has an EOS."""

    def metrics(self, prefix: str = "") -> dict[str, float]:
        """Means over the episodes."""
        values = {
            "reward/mean": self.scores.mean(),
            "reward/std": self.scores.std(correction=0),
            **{f"rewards/{name}/mean": reward.mean() for name, reward in self.rewards.items()},
            "completions/mean_length": self.lengths.mean(),
            "completions/finished": self.finished.mean(),
            "completions/distinct": len(set(self.completions)) / len(self.completions),
        }
        return {prefix + name: float(value) for name, value in values.items()}

    def records(self) -> Iterator[dict[str, Any]]:
        """One JSON object per episode."""
        for i, (prompt, completion) in enumerate(zip(self.prompts, self.completions, strict=True)):
            yield {
                "prompt": prompt,
                "completion": completion,
                "score": self.scores[i].item(),
                "rewards": {name: reward[i].item() for name, reward in self.rewards.items()},
                "length": int(self.lengths[i]),
                "finished": bool(self.finished[i]),
            }

    @staticmethod
    def concatenate(parts: Iterable["Episodes"]) -> "Episodes":
        """The episodes of several processes as one."""
        parts = list(parts)
        return Episodes(
            prompts=[p for part in parts for p in part.prompts],
            completions=[c for part in parts for c in part.completions],
            rewards={n: torch.cat([part.rewards[n] for part in parts]) for n in parts[0].rewards},
            scores=torch.cat([part.scores for part in parts]),
            lengths=torch.cat([part.lengths for part in parts]),
            finished=torch.cat([part.finished for part in parts]),
        )


def score_rollout(
    rollout: Rollout,
    rows: Sequence[dict[str, Any]],
    reward_funcs: Sequence[RewardFunction],
    tokenizer: PreTrainedTokenizerBase,
    args: PPOConfig,
) -> Episodes:
    """Decode the completions of `rollout` and score them with every reward function.

    Chat prompts get chat completions, `[{"role": "assistant", "content": ...}]`, as in TRL.
    Raises `InputError` for a reward that is no list of B finite numbers.
    """
    texts = [
        tokenizer.decode(ids[mask], skip_special_tokens=True)
        for ids, mask in zip(rollout.completion_ids, rollout.mask, strict=True)
    ]
    completions = [
        text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]
        for row, text in zip(rows, texts, strict=True)
    ]
    rewards = {name_of(reward): score(reward, rows, completions) for reward in reward_funcs}
    weights = torch.tensor(args.reward_weights or [1.0] * len(rewards))
    finished = rollout.finished.float().cpu()
    return Episodes(
        prompts=[row["prompt"] for row in rows],
        completions=texts,
        rewards=rewards,
        scores=weights @ torch.stack([*rewards.values()])
        - args.missing_eos_penalty * (1 - finished),
        lengths=rollout.mask.sum(-1).float().cpu(),
        finished=finished,
    )
