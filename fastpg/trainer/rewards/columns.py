"""What a reward function may ask for by name: columns of the dataset, and what was sampled."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase

from fastpg.trainer.rollouts.rollout import Rollout

SAMPLED = ("prompts", "completions", "completion_ids", "prompt_texts", "texts")
"""The columns that every reward can have, whatever the dataset holds."""


def dataset_columns(examples: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Turn rows of a dataset into columns.

    Args:
        examples: B dicts. A column that one of them lacks is None there.

    Returns:
        B values by the name of the column, but for "prompt". Where verl's "reward_model" holds a
        ground truth, "ground_truth" is a column of its own.
    """
    # A dict and not a set: the order of the columns is then that of the dataset.
    names = dict.fromkeys(name for example in examples for name in example if name != "prompt")
    columns: dict[str, list[Any]] = {
        name: [example.get(name) for example in examples] for name in names
    }
    if "ground_truth" not in columns and "reward_model" in columns:
        rules = columns["reward_model"]
        if all(isinstance(rule, dict) and "ground_truth" in rule for rule in rules):
            columns["ground_truth"] = [rule["ground_truth"] for rule in rules]
    return columns


def reward_columns(
    examples: Sequence[dict[str, Any]],
    rollout: Rollout,
    completions: Sequence[Any],
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, list[Any]]:
    """Return everything that a reward may ask for.

    Args:
        examples: B dicts of the dataset.
        rollout: The B episodes that began with them.
        completions: B texts, or lists of chat messages.
        tokenizer: The tokenizer of the policy.

    Returns:
        B values by name: the columns of the dataset, and those of `SAMPLED`. A text is what its
        tokens say, the special ones of a chat template included.
    """
    columns = dataset_columns(examples)
    columns["prompts"] = [example["prompt"] for example in examples]
    columns["completions"] = list(completions)
    columns["completion_ids"] = [
        ids[kept].tolist()
        for ids, kept in zip(rollout.completion_ids, rollout.attended, strict=True)
    ]
    pairs = [
        _texts(prompt, ids[kept.bool()], length, tokenizer)
        for prompt, ids, kept, length in zip(
            columns["prompts"],
            rollout.input_ids,
            rollout.attention_mask,
            rollout.attended.sum(-1).tolist(),
            strict=True,
        )
    ]
    columns["prompt_texts"] = [prompt for prompt, _ in pairs]
    columns["texts"] = [text for _, text in pairs]
    return columns


def _texts(
    prompt: Any, ids: torch.Tensor, length: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, str]:
    """Return the text of a prompt, and that of the prompt with its completion.

    The completion, `ids[-length:]`, is not decoded by itself: some tokenizers would leave out the
    space before its first word.
    """
    is_text = isinstance(prompt, str)
    # `decode` is typed for batches too; the tokens of one episode give one text.
    start, whole = (
        cast(str, tokenizer.decode(tokens, skip_special_tokens=is_text))
        for tokens in (ids[: len(ids) - length], ids)
    )
    # `max_prompt_length` may have cut the tokens of the prompt, but not its text.
    return (prompt, prompt + whole[len(start) :]) if is_text else (start, whole)
