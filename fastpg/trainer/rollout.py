"""From prompts to sampled completions, as tensors."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from fastpg.trainer.config import InputError
from fastpg.trainer.head import causal_lm

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Rollout:
    """B episodes: prompts in the first P slots, padded left; completions in the last T, right."""

    input_ids: Tensor
    """int64 [B, P + T]"""
    attention_mask: Tensor
    """int64 [B, P + T]: 1 at prompt tokens and at the completion tokens of `mask`."""
    mask: Tensor
    """bool [B, T]: the completion up to and including its first EOS."""
    finished: Tensor
    """bool [B]: the completion has an EOS."""

    @property
    def completion_ids(self) -> Tensor:
        """int64 [B, T], whatever was sampled after the EOS included."""
        return self.input_ids[:, -self.mask.shape[1] :]

    @property
    def labels(self) -> Tensor:
        """int64 [B, T]: the completion tokens, `IGNORE_INDEX` where masked."""
        return self.completion_ids.where(self.mask, IGNORE_INDEX)

    def __getitem__(self, rows: Tensor) -> "Rollout":
        """The episodes `rows`, int64 [n], in that order."""
        return Rollout(*(getattr(self, f.name)[rows] for f in fields(self)))


def completion_mask(ids: Tensor, eos_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Which of the sampled `ids` [B, T] belong to the completion, and which rows have an EOS.

    By position, never by `ids != pad`: where pad and EOS are one token that would drop the EOS
    and with it the reward.
    """
    is_eos = torch.isin(ids, torch.tensor(eos_ids, device=ids.device))
    eos_before = is_eos.cumsum(-1) - is_eos.long()
    return eos_before == 0, is_eos.any(-1)


def eos_ids(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a completion. Raises `InputError` if the tokenizer names none."""
    if tokenizer.eos_token_id is None:
        raise InputError("The tokenizer has no EOS token, so no completion could ever end.")
    more = policy.generation_config.eos_token_id
    more = more if isinstance(more, list) else [more]
    return sorted({tokenizer.eos_token_id, *(i for i in more if i is not None)})


def encode(
    prompts: Sequence[str | list[dict[str, str]]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, int64 [B, P], padded on the left.

    A prompt is text, or chat messages that the tokenizer's template turns into text. The template
    writes its own special tokens, so none are added to it. Raises `InputError` for no template or
    no tokens.
    """
    rows = [_encode_one(prompt, tokenizer)[-max_length:] for prompt in prompts]
    width = max(map(len, rows))
    pad = pad_id(tokenizer)
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def _encode_one(prompt: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    is_chat = not isinstance(prompt, str)
    if is_chat and tokenizer.chat_template is None:
        raise InputError("The prompts are chat messages, but the tokenizer has no chat template.")
    text = prompt
    if is_chat:
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=not is_chat)["input_ids"]
    if not ids:
        raise InputError(f"The prompt {prompt!r} has no tokens.")
    return ids


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding token, or EOS for want of one: the masks do not care."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


@contextmanager
def sampling(policy: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Evaluation mode, no gradient, and `config` alone: everything is as before afterwards.

    The model's own generation config is set aside, because `generate` fills what a passed one
    leaves open from it (a `repetition_penalty`, say), and then samples from another distribution
    than the one the log-probabilities are of.
    """
    modes = [(module, module.training) for module in policy.modules()]
    own_configs = {model: model.generation_config for model in (policy, causal_lm(policy))}
    policy.eval()
    for model in own_configs:
        model.generation_config = config
    try:
        with torch.no_grad():
            yield
    finally:
        for model, own_config in own_configs.items():
            model.generation_config = own_config
        for module, training in modes:
            module.training = training


def sample(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | list[dict[str, str]]],
    *,
    max_prompt_length: int,
    max_new_tokens: int,
    temperature: float,
) -> Rollout:
    """Sample one completion for each of the B prompts, from the whole distribution.

    Raises `InputError` when a prompt cannot be encoded or leaves too few positions.
    """
    ids, attention = encode(prompts, tokenizer, max_prompt_length)
    _check_positions(policy, ids.shape[1], max_new_tokens)
    ids, attention = ids.to(policy.device), attention.to(policy.device)
    ends = eos_ids(policy, tokenizer)
    config = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends,
        pad_token_id=pad_id(tokenizer),
    )
    with sampling(policy, config):
        sequences = policy.generate(input_ids=ids, attention_mask=attention)
    mask, finished = completion_mask(sequences[:, ids.shape[1] :], ends)
    return Rollout(sequences, torch.cat([attention, mask.long()], dim=1), mask, finished)


def _check_positions(policy: PreTrainedModel, prompt_length: int, max_new_tokens: int) -> None:
    positions = getattr(policy.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and prompt_length + max_new_tokens > positions:
        raise InputError(
            f"The model has {positions} positions: too few for a prompt of {prompt_length} tokens "
            f"and max_new_tokens={max_new_tokens}."
        )
