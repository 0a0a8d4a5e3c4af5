"""Samples completions of prompts, as tensors."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StopStringCriteria,
)

from fastpg.trainer.data.encoding import Prompt, encode_for, eos_ids, known_pad_id
from fastpg.trainer.models.packing import Packing
from fastpg.trainer.rollouts.generation import generate, sampling
from fastpg.trainer.rollouts.kept_sets import KeptSets, SetRecorder
from fastpg.trainer.rollouts.sampling import Sampling
from fastpg.trainer.rollouts.stop_strings import StopRecorder

IGNORE_INDEX = -100


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
