"""Scored completions: what evaluation reports and what the sample files hold."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastpg.trainer.rewards.columns import reward_columns
from fastpg.trainer.rewards.functions import RewardFunction, score
from fastpg.trainer.rollouts.rollout import Rollout
from fastpg.trainer.settings.config import PPOConfig


@dataclass(frozen=True)
class Episodes:
    """B prompts with one completion each. Tensors are float32 [B], on the CPU.

    Args:
        prompts: Text or chat messages.
        completions: The text of the completions.
        rewards: What each reward function gave, by its name, before weights; NaN where it does not
            apply.
        scores: What the policy is trained on.
        lengths: Tokens of the completions that the policy sampled, the EOS included.
        finished: 1 where the completion has come to its end, else 0.
    """

    prompts: list[Any]
    completions: list[str]
    rewards: dict[str, Tensor]
    scores: Tensor
    lengths: Tensor
    finished: Tensor

    def metrics(self, prefix: str = "") -> dict[str, float]:
        """Average over the episodes.

        Args:
            prefix: What the names of the metrics begin with, for example "eval/".

        Returns:
            Reward, length, share of finished and share of distinct completions, by name.
        """
        # A single episode has no sample deviation; that of the population is 0.
        values: dict[str, Tensor | float] = {
            "reward/mean": self.scores.mean(),
            "reward/std": self.scores.std(correction=0),
        }
        for name, reward in self.rewards.items():
            values[f"rewards/{name}/mean"] = reward.nanmean()
        values["completions/mean_length"] = self.lengths.mean()
        values["completions/finished"] = self.finished.mean()
        # A fall of this share is the first sign of a policy that collapses on one answer.
        values["completions/distinct"] = len(set(self.completions)) / len(self.completions)
        return {prefix + name: float(value) for name, value in values.items()}

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield one JSON object per episode."""
        for i, (prompt, completion) in enumerate(zip(self.prompts, self.completions, strict=True)):
            yield {
                "prompt": prompt,
                "completion": completion,
                "score": self.scores[i].item(),
                # JSON has no NaN.
                "rewards": {
                    name: None if reward[i].isnan() else reward[i].item()
                    for name, reward in self.rewards.items()
                },
                "length": int(self.lengths[i]),
                "finished": bool(self.finished[i]),
            }

    @staticmethod
    def from_records(records: Sequence[dict[str, Any]]) -> "Episodes":
        """Return the episodes whose `records` these are.

        Args:
            records: At least one record, also after a journey through JSON.
        """
        names = records[0]["rewards"]
        return Episodes(
            prompts=[record["prompt"] for record in records],
            completions=[record["completion"] for record in records],
            rewards={
                name: torch.tensor(
                    [
                        math.nan if r["rewards"][name] is None else r["rewards"][name]
                        for r in records
                    ]
                )
                for name in names
            },
            scores=torch.tensor([record["score"] for record in records]),
            lengths=torch.tensor([float(record["length"]) for record in records]),
            finished=torch.tensor([float(record["finished"]) for record in records]),
        )

    @staticmethod
    def concatenate(parts: Iterable["Episodes"]) -> "Episodes":
        """Join the episodes of several processes.

        Args:
            parts: At least one part, all with the same reward functions.

        Returns:
            All episodes, in the order of the parts.
        """
        parts = list(parts)
        return Episodes(
            prompts=[prompt for part in parts for prompt in part.prompts],
            completions=[completion for part in parts for completion in part.completions],
            rewards={
                name: torch.cat([part.rewards[name] for part in parts]) for name in parts[0].rewards
            },
            scores=torch.cat([part.scores for part in parts]),
            lengths=torch.cat([part.lengths for part in parts]),
            finished=torch.cat([part.finished for part in parts]),
        )


def score_rollout(
    rollout: Rollout,
    examples: Sequence[dict[str, Any]],
    reward_funcs: Sequence[RewardFunction],
    tokenizer: PreTrainedTokenizerBase,
    args: PPOConfig,
) -> Episodes:
    """Decode the completions of a rollout and score them with every reward function.

    Chat prompts get chat completions, `[{"role": "assistant", "content": ...}]`, as in TRL.

    Args:
        rollout: B episodes.
        examples: The B dicts of the dataset that they began with.
        reward_funcs: The reward functions.
        tokenizer: The tokenizer that decodes the completions.
        args: The settings, for `reward_weights`, `reward_clip` and `missing_eos_penalty`.

    Returns:
        The scored episodes.

    Raises:
        InputError: A reward is no list of B values that are finite numbers or None.
    """
    texts = _decoded(rollout, tokenizer)
    # A reward function sees completions in the form of the prompts it sees.
    completions = [
        text if isinstance(example["prompt"], str) else [{"role": "assistant", "content": text}]
        for example, text in zip(examples, texts, strict=True)
    ]
    columns = reward_columns(examples, rollout, completions, tokenizer)
    rewards = score(reward_funcs, columns)
    # Everything about rewards is on the CPU: they come from Python and go to files.
    weights = torch.tensor(args.reward_weights or [1.0] * len(rewards))
    # A reward that does not apply to a completion adds nothing to its score.
    weighted = weights @ torch.stack(list(rewards.values())).nan_to_num(nan=0.0)
    prompts = [example["prompt"] for example in examples]
    return _scored(rollout, prompts, texts, rewards, weighted, args)


def episodes_as_given(
    rollout: Rollout, scores: Tensor, tokenizer: PreTrainedTokenizerBase, args: PPOConfig
) -> Episodes:
    """Return episodes that were scored elsewhere, with the texts of their tokens.

    Args:
        rollout: B episodes.
        scores: float32 [B], on the CPU.
        tokenizer: The tokenizer that decodes prompts and completions.
        args: The settings, for `reward_clip` and `missing_eos_penalty`.
    """
    behind = rollout.mask.shape[1]
    ids, kept = rollout.input_ids[:, :-behind], rollout.attention_mask[:, :-behind].bool()
    prompts = _texts(ids, kept, tokenizer)
    return _scored(rollout, prompts, _decoded(rollout, tokenizer), {}, scores, args)


def _scored(
    rollout: Rollout,
    prompts: list[Any],
    completions: list[str],
    rewards: dict[str, Tensor],
    scores: Tensor,
    args: PPOConfig,
) -> Episodes:
    """Return the episodes, with what the settings make of their scores."""
    finished = rollout.finished.float().cpu()
    if args.reward_clip is not None:
        scores = scores.clamp(-args.reward_clip, args.reward_clip)
    return Episodes(
        prompts=prompts,
        completions=completions,
        rewards=rewards,
        scores=scores - args.missing_eos_penalty * (1 - finished),
        lengths=rollout.mask.sum(-1).float().cpu(),
        finished=finished,
    )


def _decoded(rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the text of each completion, without special tokens."""
    return _texts(rollout.completion_ids, rollout.attended, tokenizer)


def _texts(ids: Tensor, kept: Tensor, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    # `decode` is typed for batches too; the tokens of one row give one text.
    return [
        cast(str, tokenizer.decode(row[mask], skip_special_tokens=True))
        for row, mask in zip(ids, kept, strict=True)
    ]
