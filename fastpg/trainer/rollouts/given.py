"""Episodes that a user's own loop hands in: refused where they cannot be meant, and as tensors."""

import operator
import reprlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastpg.trainer.data.encoding import eos_ids, known_pad_id
from fastpg.trainer.models.forward import most_positions, vocabulary_size
from fastpg.trainer.rollouts.rollout import Rollout
from fastpg.trainer.settings.config import PPOConfig
from fastpg.trainer.settings.parsing import InputError

Tokens = Tensor | Sequence[int]
"""Token ids, or a mask of them: a 1-D tensor or a list of integers."""


def given_queries(
    queries: Sequence[Tokens], policy: PreTrainedModel, args: PPOConfig
) -> list[list[int]]:
    """Return the token ids of queries.

    Args:
        queries: Token ids, at least one for each query.
        policy: The model that reads them.
        args: The settings, for `max_prompt_length`.

    Raises:
        InputError: One is no list of token ids of the model, or too long. The sentence names it.
    """
    size = vocabulary_size(policy)
    given = _listed("queries", queries)
    lists = [_token_ids(f"queries[{i}]", query, size) for i, query in enumerate(given)]
    if not lists:
        raise InputError("There are no queries.")
    for i, query in enumerate(lists):
        if args.max_prompt_length is not None and len(query) > args.max_prompt_length:
            raise InputError(
                f"queries[{i}] has {len(query)} tokens, more than max_prompt_length="
                f"{args.max_prompt_length}; a loop of one's own cuts its queries itself."
            )
    return lists


def given_scores(scores: Tensor | Sequence[Any]) -> Tensor:
    """Return scores as float32 [B] on the CPU.

    Args:
        scores: A 1-D tensor, or a list of numbers or 0-d tensors.

    Raises:
        InputError: One is no finite number. The sentence names it.
    """
    numbers = []
    for i, score in enumerate(_listed("scores", scores)):
        try:
            numbers.append(float(score))
        except (TypeError, ValueError, OverflowError):
            raise InputError(f"scores[{i}] must be a number, not {_described(score)}.") from None
        # What float32 cannot hold would be infinite too.
        if not torch.tensor(numbers[-1]).isfinite():
            raise InputError(f"scores[{i}] must be finite, not {numbers[-1]:g}.")
    return torch.tensor(numbers)


def given_rollout(
    queries: Sequence[Tokens],
    responses: Sequence[Tokens],
    response_masks: Sequence[Tokens] | None,
    readers: Sequence[PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    args: PPOConfig,
) -> Rollout:
    """Turn queries and responses into a rollout.

    Args:
        queries: Token ids of B queries; those of a group are equal, one after the other.
        responses: Token ids of the response to each.
        response_masks: 1 at the tokens of each response that the policy sampled, 0 at others.
            None: it sampled all of them.
        readers: The policy, and a value model if there is one.
        tokenizer: The tokenizer of the policy.
        args: The settings.

    Returns:
        The rollout, on the device of the policy. An episode has come to its end if the last token
        that the policy sampled in it is an EOS, or completes one of `stop_strings`.

    Raises:
        InputError: There are too few episodes or no whole groups, one is no list of token ids or
            too long for a model, or a mask does not fit. The sentence names it.
    """
    if args.top_k > 0 or args.top_p < 1:
        raise InputError(
            f"step() takes log-probs over the whole vocabulary, so top_k has to be 0 and top_p 1, "
            f"not {args.top_k} and {args.top_p:g}."
        )
    if args.use_vllm:
        raise InputError("step() gets no log-probs of vLLM to correct by: turn use_vllm off.")
    policy = readers[0]
    size, ends = vocabulary_size(policy), set(eos_ids(policy, tokenizer))
    before = given_queries(queries, policy, args)
    behind = [_token_ids(f"responses[{i}]", x, size) for i, x in enumerate(responses)]
    if response_masks is None:
        masks = [_all_sampled(i, response, ends) for i, response in enumerate(behind)]
    else:
        pairs = zip(behind, response_masks, strict=True)
        masks = [_given_mask(i, response, mask) for i, (response, mask) in enumerate(pairs)]
    _check_steps(before, args)
    check_room(before, [len(response) for response in behind], readers, args)
    ids, attention = _padded(before, behind, known_pad_id(policy, tokenizer))
    width = max(map(len, behind))
    sampled = [
        [token for token, is_sampled in zip(response, mask, strict=True) if is_sampled]
        for response, mask in zip(behind, masks, strict=True)
    ]
    strings = args.stop_strings or []
    finished = [
        tokens[-1] in ends or _completes_one_of(strings, tokens, tokenizer) for tokens in sampled
    ]
    device = policy.device
    return Rollout(
        input_ids=torch.tensor(ids, device=device),
        attention_mask=torch.tensor(attention, device=device),
        mask=torch.tensor([mask + [False] * (width - len(mask)) for mask in masks], device=device),
        finished=torch.tensor(finished, device=device),
    )


def _completes_one_of(
    strings: Sequence[str], tokens: list[int], tokenizer: PreTrainedTokenizerBase
) -> bool:
    """Return whether the last of these tokens completes a string; an earlier turn may have one."""
    text, before = str(tokenizer.decode(tokens)), str(tokenizer.decode(tokens[:-1]))
    return any(text.count(string) > before.count(string) for string in strings)


def check_counts(**given: Any) -> None:
    """Refuse what is no list, and lists of different lengths.

    Args:
        given: The lists by name.

    Raises:
        InputError: The sentence has the name of the one, or the length of each.
    """
    lengths = {name: len(_listed(name, x)) for name, x in given.items()}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{count} {name}" for name, count in lengths.items())
        raise InputError(f"There must be one of each for every episode, not {counts}.")


def check_room(
    queries: list[list[int]],
    lengths: list[int],
    readers: Sequence[PreTrainedModel],
    args: PPOConfig,
) -> None:
    """Refuse an episode with more tokens than a model has positions.

    Args:
        queries: Token ids of B queries.
        lengths: B numbers, the tokens of their responses.
        readers: The models that read them.
        args: The settings, for `bootstrap_truncated`.

    Raises:
        InputError: The sentence names the episode.
    """
    positions = most_positions(readers)
    # The value of what would follow an unfinished completion takes one more position.
    more = 1 if args.bootstrap_truncated else 0
    for i, (query, length) in enumerate(zip(queries, lengths, strict=True)):
        if positions is not None and len(query) + length + more > positions:
            raise InputError(
                f"queries[{i}] and its response have {len(query)} and {length} tokens, but the "
                f"model has {positions} positions."
            )


def _listed(name: str, given: Any) -> list[Any]:
    try:
        return list(given.tolist() if isinstance(given, Tensor) else given)
    except TypeError:
        raise InputError(
            f"{name} must be a 1-D tensor or a list, not {_described(given)}."
        ) from None


def _token_ids(name: str, given: Tokens, size: int) -> list[int]:
    """Return at least one token id below `size`."""
    ids = _integers(name, given, "token ids")
    if not ids:
        raise InputError(f"{name} is empty.")
    wrong = [token for token in ids if not 0 <= token < size]
    if wrong:
        raise InputError(f"{name} has the token id {wrong[0]}, but the model has {size} tokens.")
    return ids


def _integers(name: str, given: Tokens, what: str) -> list[int]:
    try:
        return [operator.index(x) for x in _listed(name, given)]
    except TypeError:
        raise InputError(
            f"{name} must be a 1-D tensor or a list of {what}, not {_described(given)}."
        ) from None


def _all_sampled(i: int, response: list[int], ends: set[int]) -> list[bool]:
    """Return the mask of a response that the policy sampled at once, which ends with its EOS."""
    first = next((place for place, token in enumerate(response) if token in ends), None)
    if first is not None and first + 1 < len(response):
        raise InputError(
            f"responses[{i}] goes on after the EOS at its place {first}: padding has to be cut "
            "off, and response_masks has to say what the policy sampled in several turns."
        )
    return [True] * len(response)


def _given_mask(i: int, response: list[int], given: Tokens) -> list[bool]:
    name = f"response_masks[{i}]"
    mask = _integers(name, given, "zeros and ones")
    if len(mask) != len(response):
        raise InputError(f"{name} has {len(mask)} values for {len(response)} tokens.")
    if not set(mask) <= {0, 1}:
        raise InputError(f"{name} must hold zeros and ones, not {(set(mask) - {0, 1}).pop()}.")
    if not any(mask):
        raise InputError(f"{name} is 0 everywhere: there is nothing that the policy sampled.")
    return [value == 1 for value in mask]


def _padded(
    queries: list[list[int]], responses: list[list[int]], pad: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Return tokens and attention mask of rows, with padding before queries and after responses."""
    left, right = max(map(len, queries)), max(map(len, responses))
    ids, attention = [], []
    for query, response in zip(queries, responses, strict=True):
        before, behind = left - len(query), right - len(response)
        ids.append([pad] * before + query + response + [pad] * behind)
        attention.append([0] * before + [1] * (len(query) + len(response)) + [0] * behind)
    return ids, attention


def _check_steps(queries: list[list[int]], args: PPOConfig) -> None:
    """Refuse episodes of which the optimiser steps, or the groups, cannot be made."""
    count, resolved = len(queries), args.resolved()
    if count < resolved.num_mini_batches:
        raise InputError(
            f"{count} episodes are too few for num_mini_batches={resolved.num_mini_batches}."
        )
    if resolved.algorithm.center is None:
        return
    size = resolved.num_generations
    if count % size:
        raise InputError(
            f"algorithm={args.algorithm} compares num_generations={size} responses to a query, of "
            f"which {count} episodes are no multiple."
        )
    for i, query in enumerate(queries):
        if query != queries[i - i % size]:
            raise InputError(
                f"queries[{i}] differs from queries[{i - i % size}], with which it is compared: "
                f"num_generations={size} responses to a query stand one after the other."
            )


def _described(given: Any) -> str:
    if isinstance(given, Tensor):
        return f"a tensor of {given.dtype} and shape {tuple(given.shape)}"
    return reprlib.repr(given)


def check_equal(counts: Sequence[int]) -> None:
    """Refuse processes that give different numbers of episodes to a step.

    Args:
        counts: The number of episodes of each process.

    Raises:
        InputError: They differ; some processes would wait for forwards that others do not make.
    """
    if len(set(counts)) > 1:
        given = ", ".join(map(str, counts))
        raise InputError(f"step() needs as many episodes from each process, and got {given}.")
