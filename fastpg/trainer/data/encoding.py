"""Turns prompts into token ids that a model knows."""

from collections.abc import Sequence
from typing import TypeGuard, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastpg.trainer.models.forward import vocabulary_size
from fastpg.trainer.settings.parsing import InputError

Prompt = str | list[dict[str, str]] | list[int]
"""Text, chat messages, or token ids."""


def encode(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> tuple[Tensor, Tensor]:
    """Turn prompts into tokens.

    Args:
        prompts: B prompts. The tokenizer's template turns chat messages into text.
        tokenizer: The tokenizer.
        max_length: Most tokens of a prompt. Longer prompts lose their beginning. None: any number.

    Returns:
        Token ids and attention mask, int64 [B, P], padded on the left.

    Raises:
        InputError: A prompt cannot be encoded, or has no tokens.
    """
    start = None if max_length is None else -max_length
    encoded = [encode_one(prompt, tokenizer, "A prompt")[start:] for prompt in prompts]
    width = max(len(tokens) for tokens in encoded)
    pad = pad_id(tokenizer)
    # `generate` continues at the right end of its input, hence the padding on the left.
    ids = torch.tensor([[pad] * (width - len(tokens)) + tokens for tokens in encoded])
    mask = torch.tensor([[0] * (width - len(tokens)) + [1] * len(tokens) for tokens in encoded])
    return ids, mask


def encode_one(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, what: str) -> list[int]:
    """Turn a prompt into tokens; token ids are returned as they are.

    A text gets no EOS at its end, also where the tokenizer would append one. A chat that ends with
    a message of the assistant is continued there; any other gets the beginning of such a message.

    Args:
        prompt: The prompt.
        tokenizer: The tokenizer.
        what: How an error names the prompt: "The prompt of train example 3".

    Returns:
        At least one token.

    Raises:
        InputError: There is no chat template, or tokenizer or template refuse the prompt.
    """
    if _is_token_ids(prompt):
        return prompt
    if not isinstance(prompt, str) and tokenizer.chat_template is None:
        raise InputError("The prompts are chat messages, but the tokenizer has no chat template.")
    try:
        ids = (
            _text_ids(prompt, tokenizer)
            if isinstance(prompt, str)
            else _chat_ids(cast(list[dict[str, str]], prompt), tokenizer)
        )
    except Exception as error:
        # Templates raise errors of jinja, tokenizers plain exceptions of their own.
        reason = " ".join(str(error).split())
        raise InputError(f"{what} cannot be encoded: {reason}") from error
    if not ids:
        raise InputError(f"{what} has no tokens: {prompt!r}.")
    return ids


def _is_token_ids(prompt: Prompt) -> TypeGuard[list[int]]:
    return bool(prompt) and isinstance(prompt[0], int)


def _text_ids(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids: list[int] = tokenizer(prompt)["input_ids"]
    appended = (
        ids and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(tokenizer.eos_token)
    )
    return ids[:-1] if appended else ids


def _chat_ids(prompt: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    is_begun = prompt[-1].get("role") == "assistant" and bool(prompt[-1].get("content"))
    text = tokenizer.apply_chat_template(
        prompt,
        tokenize=False,
        add_generation_prompt=not is_begun,
        continue_final_message=is_begun,
    )
    # The template writes its own special tokens, so none are added here.
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Choose a token to pad with.

    Args:
        tokenizer: A tokenizer with an EOS token.

    Returns:
        The padding token, or EOS for want of one: padding is masked, so any token would do.
    """
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def known_pad_id(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Choose a token to pad with that a model knows, which it may not the tokenizer's."""
    pad = pad_id(tokenizer)
    return pad if pad < vocabulary_size(policy) else eos_ids(policy, tokenizer)[0]


def encode_for(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    max_length: int | None,
) -> tuple[Tensor, Tensor]:
    """Turn prompts into tokens that a model knows, padding included, on its device.

    Args:
        policy: The model.
        tokenizer: As in `encode`.
        prompts: As in `encode`.
        max_length: As in `encode`.

    Returns:
        As `encode`.

    Raises:
        InputError: As in `encode`.
    """
    ids, attention = encode(prompts, tokenizer, max_length)
    ids, attention = ids.to(policy.device), attention.to(policy.device)
    return ids.where(attention.bool(), known_pad_id(policy, tokenizer)), attention


def eos_ids(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """List every token that ends a completion.

    Args:
        policy: The model, whose generation config may name more of them.
        tokenizer: The tokenizer.

    Returns:
        The tokens, sorted.

    Raises:
        InputError: There is none that the model could produce.
    """
    if tokenizer.eos_token_id is None:
        raise InputError("The tokenizer has no EOS token, so no completion could ever end.")
    ends = {tokenizer.eos_token_id}
    # The config holds a token, a list of tokens, or None.
    more = policy.generation_config.eos_token_id
    if isinstance(more, list):
        ends.update(more)
    elif more is not None:
        ends.add(more)
    # transformers invents an EOS for some tokenizers that have none, and the model knows it not.
    size = vocabulary_size(policy)
    known = sorted(end for end in ends if end < size)
    if not known:
        raise InputError(
            f"The EOS token {tokenizer.eos_token!r} has id {tokenizer.eos_token_id}, outside the "
            f"model's {size} tokens, so no completion could ever end."
        )
    return known
