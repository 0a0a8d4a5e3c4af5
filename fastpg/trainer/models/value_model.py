"""A critic with a trunk of its own: a language model or a reward model, with a head for values."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastpg.trainer.models.forward import vocabulary_size
from fastpg.trainer.models.loading import (
    Loaded,
    check_finite,
    dtype_of_files,
    load_scorer,
    load_tokenizer,
)
from fastpg.trainer.models.policy import score_head
from fastpg.trainer.settings.config import PPOConfig
from fastpg.trainer.settings.parsing import InputError


def load_value_model(args: PPOConfig, tokenizer: PreTrainedTokenizerBase) -> Loaded | None:
    """Load the value model that the settings name.

    The head of a reward model is where its values begin. A language model gets a head of zeros, so
    that the first advantages are those of no baseline.

    Args:
        args: The settings, for `value_model`, `dtype` and `trust_remote_code`.
        tokenizer: The tokenizer of the policy.

    Returns:
        The model, whose head is in float32. None: the settings name none.

    Raises:
        InputError: It cannot be loaded, or reads other tokens than the policy writes.
    """
    name = args.value_model
    if name is None:
        return None
    model, has_new_head = load_scorer(
        name, args.trust_remote_code, new_head=True, what="a value model"
    )
    what = f"value_model={name!r}"
    check_finite(model, what)
    _check_vocabulary(what, model, tokenizer, args.trust_remote_code)
    if args.dtype is not None:
        model.to(getattr(torch, args.dtype))
    # bf16 is too coarse for values.
    head = score_head(model).float()
    if has_new_head:
        for weight in head.parameters():
            torch.nn.init.zeros_(weight)
    return Loaded(model, None if args.dtype else dtype_of_files(name))


def _check_vocabulary(
    what: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    trust_remote_code: bool,
) -> None:
    """Refuse a model that knows a token of the policy under another number, or not at all."""
    ours = tokenizer.get_vocab()
    theirs = load_tokenizer(model, trust_remote_code).get_vocab()
    for token, number in sorted(ours.items(), key=lambda entry: entry[1]):
        if theirs.get(token) != number:
            other = f"number {theirs[token]}" if token in theirs else "unknown"
            raise InputError(
                f"{what} has another vocabulary than the policy: token {token!r} is number {number}"
                f" of the policy, and {other} there."
            )
    size, last = vocabulary_size(model), max(ours.values())
    if last >= size:
        raise InputError(
            f"{what} has {size} tokens, but the tokenizer of the policy makes one of id {last}."
        )
