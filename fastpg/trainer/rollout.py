"""Samples completions of prompts, as tensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StopStringCriteria,
)

from fastpg.trainer.forward import causal_lm
from fastpg.trainer.generation import generate, sampling
from fastpg.trainer.kept_sets import KeptSets, SetRecorder
from fastpg.trainer.packing import Packing
from fastpg.trainer.parsing import InputError
from fastpg.trainer.sampling import Sampling
from fastpg.trainer.stop_strings import StopRecorder

IGNORE_INDEX = -100

Prompt = str | list[dict[str, str]] | list[int]
"""Text, chat messages, or token ids."""


@dataclass(frozen=True)
class Rollout:
    """B episodes: prompts in the first P slots, padded left; completions in the last T, right.

    Tokens of a tool or an environment may stand in a completion, before, between and after those
    that the policy sampled. The policy sees them, and learns nothing about them: only the tokens of
    `mask` have log-probs, credit and a loss.

    Args:
        input_ids: int64 [B, P + T].
        attention_mask: int64 [B, P + T], 1 at the tokens of prompts and completions, which stand
            without a gap.
        mask: bool [B, T], the tokens of the completion that the policy sampled.
        finished: bool [B], whether the completion has come to its end.
        kept: The tokens that each completion token was drawn from. None: the whole vocabulary.
        behavior_logp: float32 [B, T], the log-probs of an engine that samples by other ones than
            training computes. At masked tokens they mean nothing. None: there is no such engine.
    """

    input_ids: Tensor
    attention_mask: Tensor
    mask: Tensor
    finished: Tensor
    kept: KeptSets | None = None
    behavior_logp: Tensor | None = None

    @property
    def completion_ids(self) -> Tensor:
        """int64 [B, T], whatever was sampled after the EOS included."""
        return self.input_ids[:, -self.mask.shape[1] :]

    @property
    def attended(self) -> Tensor:
        """bool [B, T]: all tokens of the completion, whoever wrote them."""
        return self.attention_mask[:, -self.mask.shape[1] :].bool()

    @property
    def labels(self) -> Tensor:
        """int64 [B, T]: the sampled tokens, `IGNORE_INDEX` elsewhere."""
        return self.completion_ids.where(self.mask, IGNORE_INDEX)

    def lengthened(self) -> "Rollout":
        """Return these episodes with one more token, of no meaning, behind each unfinished one.

        It stands in the slot `attended.sum(-1)` of the completion, and is not of `mask`. What an
        engine gave for log-probs is left out, for nothing but values is asked of them.
        """
        ends = self.input_ids.shape[1] - self.mask.shape[1] + self.attended.sum(-1)
        unmasked = torch.zeros_like(self.mask[:, :1])
        attention = torch.cat([self.attention_mask, unmasked.long()], dim=1)
        return Rollout(
            input_ids=torch.cat([self.input_ids, self.input_ids[:, -1:]], dim=1),
            attention_mask=attention.scatter(1, ends[:, None], (~self.finished[:, None]).long()),
            mask=torch.cat([self.mask, unmasked], dim=1),
            finished=self.finished,
            kept=None if self.kept is None else self.kept.lengthened(),
        )

    def __getitem__(self, rows: Tensor) -> "Rollout":
        """Return the episodes `rows`, int64 [n], in that order."""
        return Rollout(
            input_ids=self.input_ids[rows],
            attention_mask=self.attention_mask[rows],
            mask=self.mask[rows],
            finished=self.finished[rows],
            kept=None if self.kept is None else self.kept[rows],
            behavior_logp=None if self.behavior_logp is None else self.behavior_logp[rows],
        )


def completion_mask(ids: Tensor, eos_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Find where sampled completions end.

    Args:
        ids: int64 [B, T], sampled tokens.
        eos_ids: The tokens that end a completion.

    Returns:
        Which tokens belong to the completion, bool [B, T], its first EOS included; and which
        completions have an EOS, bool [B].
    """
    # The mask goes by position and not by `ids != pad`: where pad and EOS are one token that would
    # drop the EOS, and the reward with it.
    is_eos = torch.isin(ids, torch.tensor(eos_ids, device=ids.device))
    eos_before = is_eos.cumsum(-1) - is_eos.long()
    return eos_before == 0, is_eos.any(-1)


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


def vocabulary_size(policy: PreTrainedModel) -> int:
    """Return the number of tokens that a model knows, padding of its weights included."""
    embeddings = causal_lm(policy).get_input_embeddings()
    config: Any = policy.config.get_text_config()
    return getattr(embeddings, "num_embeddings", config.vocab_size)


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


def sample(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_prompt_length: int | None,
    max_new_tokens: int,
    temperature: float,
    packing: Packing | None,
    together: bool = False,
    top_k: int = 0,
    top_p: float = 1.0,
    stop: StopStringCriteria | None = None,
) -> Rollout:
    """Sample one completion for each prompt.

    Args:
        policy: The model.
        tokenizer: Its tokenizer.
        prompts: B prompts, text or chat messages.
        max_prompt_length: Most tokens of a prompt. Longer prompts lose their beginning. None: any
            number.
        max_new_tokens: Most tokens of a completion.
        temperature: Logits are divided by it.
        packing: How rows are packed for the model. None: its own `generate` samples.
        together: Whether all processes go on until the last of them has ended its completions, as
            they must where they share the weights.
        top_k: Only so many of the likeliest tokens are drawn; 0: all.
        top_p: Only the likeliest tokens are drawn whose probabilities reach this.
        stop: It finds the strings that end a completion besides EOS; the token that completes one
            is its last.

    Returns:
        B episodes in the order of the prompts, on the device of the model.

    Raises:
        InputError: A prompt cannot be encoded.
    """
    ids, attention = encode_for(policy, tokenizer, prompts, max_prompt_length)
    ends = eos_ids(policy, tokenizer)
    config = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        # What is cut off has to be known to the log-probabilities, so the recorder does it.
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends,
        pad_token_id=known_pad_id(policy, tokenizer),
    )
    cut = Sampling(temperature, top_k, top_p)
    recorder = None if cut.keeps_all else SetRecorder(cut)
    stops = None if stop is None else StopRecorder(stop, ids.new_zeros(len(ids)))
    with sampling(policy, config):
        sequences = generate(policy, ids, attention, config, packing, together, recorder, stops)
    mask, finished = completion_mask(sequences[:, ids.shape[1] :], ends)
    if stops is not None:
        mask, finished = stops.cut(mask, finished)
    kept = None if recorder is None else recorder.sets(mask)
    return Rollout(sequences, torch.cat([attention, mask.long()], dim=1), mask, finished, kept)
