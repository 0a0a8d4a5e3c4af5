"""What is refused before any work is done, since it would fail or mislead after it."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastpg.trainer.data.encoding import encode_one, eos_ids
from fastpg.trainer.learning.learner import Learner
from fastpg.trainer.models.forward import most_positions, vocabulary_size
from fastpg.trainer.models.loading import check_finite
from fastpg.trainer.report.trackers import checked_trackers
from fastpg.trainer.rewards.columns import SAMPLED, dataset_columns
from fastpg.trainer.rewards.functions import RewardFunction, accepted, load_reward, name_of
from fastpg.trainer.rewards.reward_adapters import adapted
from fastpg.trainer.rollouts.rollout_engine import check_engine
from fastpg.trainer.settings.config import PPOConfig
from fastpg.trainer.settings.parsing import InputError

logger = logging.getLogger(__name__)

Examples = Sequence[dict[str, Any]]

_LOOKED_AT = 64  # tokens of a prompt
_LARGEST_GAP = 1e-3  # nats, above the rounding of what is computed twice
_LARGEST_GAP_IN_16_BITS = 0.5  # nats, where not all of it is computed alike


def check_packages(args: PPOConfig) -> None:
    """Refuse settings that name an unknown tracker, or need a package that is not installed.

    Raises:
        InputError: They do.
    """
    checked_trackers(args.report_to)
    check_engine(args)


def check_dataset(name: str, dataset: Examples, reward_funcs: Sequence[RewardFunction]) -> None:
    """Refuse a dataset without examples, without prompts, or without what a reward needs.

    Args:
        name: "train" or "eval", for the error.
        dataset: The dataset.
        reward_funcs: The rewards that see its columns.

    Raises:
        InputError: The sentence names the example or the column.
    """
    try:
        # Indices and not iteration: only these are what a sequence promises and a loader uses.
        examples = [dataset[i] for i in range(len(dataset))]
    except (TypeError, KeyError, IndexError):
        raise InputError(
            f"The {name} dataset must be a sequence of dicts, not {type(dataset).__name__}."
        ) from None
    if not examples:
        raise InputError(f"The {name} dataset is empty.")
    for i, example in enumerate(examples):
        if not isinstance(example, dict) or not _is_prompt(example.get("prompt")):
            raise InputError(
                f"Every example of the {name} dataset must have a 'prompt', text or messages with "
                f"'role' and 'content'; example {i} has not."
            )
    columns = dataset_columns(examples)
    for column in SAMPLED:
        if column in columns:
            logger.warning(
                "Rewards do not see the column %r of the %s dataset: by that name they get what "
                "was sampled.",
                column,
                name,
            )
    columns |= {column: [] for column in SAMPLED}
    for reward in reward_funcs:
        accepted(reward, columns)


def _is_prompt(prompt: Any) -> bool:
    """Whether this is text, or a chat of at least one message, each of which has a role."""
    if isinstance(prompt, list):
        return bool(prompt) and all(
            isinstance(message, dict) and isinstance(message.get("role"), str) for message in prompt
        )
    return isinstance(prompt, str)


def checked_rewards(given: Any, args: PPOConfig) -> list[RewardFunction]:
    """Load the rewards that are named; refuse those that cannot be called, or not be told apart.

    Args:
        given: A reward or a list of them: functions, or what `load_reward` loads. None: there is
            none.
        args: The settings, for `reward_weights` and `trust_remote_code`.

    Returns:
        The reward functions.

    Raises:
        InputError: The sentence names the reward.
    """
    several = given if isinstance(given, list | tuple) else [given]
    if given is None:
        several = []
    elif not several:
        raise InputError("There is no reward function.")
    loaded = [
        load_reward(reward, args.trust_remote_code) if isinstance(reward, str) else reward
        for reward in several
    ]
    for reward in loaded:
        if isinstance(reward, torch.nn.Module):
            raise InputError(
                f"A reward is a function of prompts and completions; {type(reward).__name__} is a "
                "module, which fastpg.trainer.RewardModel(model, tokenizer) makes one of."
            )
        if not callable(reward):
            raise InputError(f"A reward is a function of prompts and completions, not {reward!r}.")
    reward_funcs = [adapted(reward) for reward in loaded]
    names = [name_of(reward) for reward in reward_funcs]
    # Rewards are logged by name, and one would hide the other.
    if len(set(names)) < len(names):
        raise InputError(f"The reward functions need different names, not {names}.")
    weights = args.reward_weights
    if weights is not None and len(weights) != len(names):
        raise InputError(
            f"reward_weights has {len(weights)} values for {len(names)} reward functions."
        )
    return reward_funcs


def check_policy(policy: PreTrainedModel) -> None:
    """Refuse a model that cannot be trained or not be saved.

    Args:
        policy: The model.

    Raises:
        InputError: A weight is NaN or infinite, none can be trained, or `save_pretrained` would
            refuse the generation config.
    """
    check_finite(policy, "the model")
    if not any(weight.requires_grad for weight in policy.parameters()):
        raise InputError(
            "No weight of the model can be trained: all of them are frozen, as those of an adapter "
            "are that was loaded for inference."
        )
    if policy.generation_config is None:
        return
    try:
        policy.generation_config.validate(strict=True)
    except ValueError as error:
        # The reason has several lines, and the message is one sentence.
        reason = " ".join(str(error).split())
        raise InputError(f"The model's generation_config could not be saved: {reason}") from None


def check_prompts(
    name: str,
    dataset: Examples,
    readers: Sequence[PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    args: PPOConfig,
) -> None:
    """Encode every prompt once, and refuse the first that could not be sampled from.

    A warning counts those that `max_prompt_length` cuts.

    Args:
        name: "train" or "eval", for the error.
        dataset: The dataset.
        readers: The policy, and a value model if there is one.
        tokenizer: The tokenizer of the policy.
        args: The settings, for lengths.

    Raises:
        InputError: The sentence names the example.
    """
    policy = readers[0]
    # A tokenizer without a usable EOS is refused here too.
    eos_ids(policy, tokenizer)
    size = vocabulary_size(policy)
    positions = most_positions(readers)
    # The value of what would follow an unfinished completion takes one more position.
    new_tokens = args.max_new_tokens + (1 if args.bootstrap_truncated else 0)
    room = None if positions is None else positions - new_tokens
    cut = 0
    for i in range(len(dataset)):
        ids = encode_one(dataset[i]["prompt"], tokenizer, f"The prompt of {name} example {i}")
        if args.max_prompt_length is not None and len(ids) > args.max_prompt_length:
            ids, cut = ids[-args.max_prompt_length :], cut + 1
        if max(ids) >= size:
            token = tokenizer.convert_ids_to_tokens(max(ids))
            raise InputError(
                f"The prompt of {name} example {i} has the token {token!r} of id {max(ids)}, but "
                f"the model has {size} tokens; resize_token_embeddings adds more."
            )
        if room is not None and len(ids) > room:
            raise InputError(
                f"The model has {positions} positions: too few for the {len(ids)} tokens in the "
                f"prompt of {name} example {i} and max_new_tokens={args.max_new_tokens}; "
                "max_prompt_length cuts prompts."
            )
    if cut:
        logger.warning(
            "%d of %d %s prompts have more than max_prompt_length=%d tokens and lose their "
            "beginning; in a chat that is where the system prompt is.",
            cut,
            len(dataset),
            name,
            args.max_prompt_length,
        )


def check_forwards(learner: Learner, ids: list[int]) -> None:
    """Refuse a model whose log-probs are random, or depend on the tokens that follow.

    Args:
        learner: The learner, whose model is ready for training.
        ids: The tokens to look at, such as those of a prompt.

    Raises:
        InputError: The sentence says by how much two forwards differ.
    """
    longest = min(learner.args.max_prompt_length or _LOOKED_AT, _LOOKED_AT)
    ids = ids[-longest:]
    # Behind a single token there would be nothing to predict.
    if len(ids) == 1:
        ids = ids * 2
    first = learner.logprobs_of(ids)
    second = learner.logprobs_of(ids)
    gap = (first - second).abs().max().item()
    if not gap < _LARGEST_GAP:
        raise InputError(
            f"Two forwards of the model on the same prompt differ by {gap:.2g} nats. Something in "
            "it is random while it trains, such as a dropout; the ratios of a policy gradient "
            "would begin anywhere."
        )
    # Only the log-prob of the last token may change with it.
    other = learner.logprobs_of([*ids[:-1], int(ids[-1] == 0)])
    changes = (first - other).abs()[:, :-1]
    seen = changes.max().item() if changes.numel() else 0.0
    # In 16 bits rounding may send a token of a mixture of experts to another expert.
    weights = next(learner.model.parameters())
    is_exact = weights.dtype == torch.float32 and learner.args.mixed_precision == "no"
    if seen > (_LARGEST_GAP if is_exact else _LARGEST_GAP_IN_16_BITS):
        raise InputError(
            f"The log-probs of tokens change by {seen:.2g} nats with the token that follows them, "
            "so this is no causal language model, whatever its files say."
        )
