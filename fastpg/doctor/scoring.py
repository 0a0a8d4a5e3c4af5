"""Log-probs of rollouts by a model, in each of the ways in which trainers and engines make them."""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

import fastpg
from fastpg.integrations.peft import UnknownHead, head_products
from fastpg.ops.vocabulary.head import Head
from fastpg.trainer.models.forward import causal_lm, predicting_states
from fastpg.trainer.models.head import find_head
from fastpg.trainer.rollouts.sampling import Sampling
from fastpg.trainer.settings.parsing import InputError

from .rollouts import Rollout
from .sampling import kept_tokens

BATCH = 8  # sequences of a padded batch
ROWS = 128  # tokens whose logits are in memory at a time, where sets are made

AS_GIVEN = "as given"

Sets = tuple[Tensor, Tensor]  # token_ids and offsets, as support= takes them


class Way(NamedTuple):
    """A way to make log-probs. The defaults are a plain trainer's, before any correction."""

    prompts: str = AS_GIVEN  # a key of the scorer's prompts
    temperature: float = 1.0  # that the logits are divided by
    kept: bool = False  # whether the softmax is over the tokens that sampling kept
    vocab: int | None = None  # so many tokens count; None: every row of the head
    fp32_logits: bool = False  # whether logits are kept in fp32, not rounded to the model's dtype
    alone: bool = False  # whether each sequence is in a forward of its own, not in a padded batch


class Scorer:
    """Scores the same completions in one way after another.

    Args:
        policy: The model.
        rollouts: The completions.
        prompts: The prompts of the rollouts, by the name of a form of them; `AS_GIVEN` is one.
        sampling: How the engine sampled.

    Raises:
        InputError: The model makes its logits in a way that is not understood, or a token is not
            in its vocabulary.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        rollouts: list[Rollout],
        prompts: dict[str, list[list[int]]],
        sampling: Sampling,
    ) -> None:
        self.policy, self.rollouts = policy, rollouts
        self.prompts, self.sampling = prompts, sampling
        try:
            self.transform = find_head(policy, nullcontext)
        except UnknownHead as error:
            raise InputError(f"Cannot score with this model: {error}.") from None
        self.vocab = causal_lm(policy).get_output_embeddings().weight.shape[0]
        for rollout in rollouts:
            for token in (*rollout.prompt, *rollout.completion):
                if token >= self.vocab:
                    raise InputError(
                        f"{rollout.where}: token {token} is not in the model's vocabulary of "
                        f"{self.vocab}."
                    )
        self.labels = torch.tensor([x for each in rollouts for x in each.completion])
        self._states: dict[tuple[str, bool], Tensor] = {}
        self._sets: dict[tuple[str, bool, int | None], list[Sets]] = {}
        self._found: dict[Way, Tensor] = {}

    @torch.no_grad()
    def logp(self, way: Way) -> Tensor:
        """The log-probs [N], fp32, of all completion tokens in turn.

        Raises:
            InputError: The model gives some that are not finite.
        """
        if way not in self._found:
            parts = self._in_parts(way) if way.kept else [self._logprobs(way, slice(None), None)]
            found = torch.cat(parts).cpu()
            if not found.isfinite().all():
                token = self.labels[~found.isfinite()][0]
                raise InputError(f"The model gives token {token} of a completion no log-prob.")
            self._found[way] = found
        return self._found[way]

    def _in_parts(self, way: Way) -> list[Tensor]:
        key = (way.prompts, way.alone, way.vocab)
        parts = [slice(i, i + ROWS) for i in range(0, len(self.labels), ROWS)]
        if key not in self._sets:
            self._sets[key] = [self._kept(way, part) for part in parts]
        sets = self._sets[key]
        return [self._logprobs(way, part, kept) for part, kept in zip(parts, sets, strict=True)]

    def _logprobs(self, way: Way, rows: slice, support: Sets | None) -> Tensor:
        """The log-probs of some of the tokens."""
        head = self._head(way, rows)
        return fastpg.linear_token_logprobs(
            head.hidden,
            head.head_weight,
            self.labels[rows].to(head.hidden[0].device),
            bias=head.bias,
            temperature=way.temperature,
            softcap=self.transform.softcap,
            logit_scale=self.transform.scale,
            logits_dtype=torch.float32 if way.fp32_logits else None,
            support=support,
        )

    def _kept(self, way: Way, rows: slice) -> Sets:
        """The sets that the engine kept, by logits in fp32."""
        head = self._head(way, rows)
        products = zip(head.hidden, head.head_weight, strict=True)
        logits = torch.stack([h.float() @ w.float().T for h, w in products]).sum(0)
        if head.bias is not None:
            logits += head.bias
        logits *= self.transform.scale
        if (cap := self.transform.softcap) is not None:
            logits = cap * (logits / cap).tanh()
        token_ids, offsets = kept_tokens(logits, self.labels[rows].to(logits.device), self.sampling)
        return token_ids.int(), offsets.int()

    def _head(self, way: Way, rows: slice) -> Head:
        """What is multiplied for some of the tokens."""
        layer = causal_lm(self.policy).get_output_embeddings()
        head = head_products(layer, self._hidden(way.prompts, way.alone)[rows])
        bias = None if head.bias is None else head.bias[: way.vocab]
        return Head(head.hidden, [w[: way.vocab] for w in head.head_weight], bias)

    def _hidden(self, prompts: str, alone: bool) -> Tensor:
        """The last hidden states [N, H] that predict the tokens."""
        key = (prompts, alone)
        if key not in self._states:
            size = 1 if alone else BATCH
            self._states[key] = torch.cat(
                [
                    self._hidden_of_batch(prompts, slice(i, i + size))
                    for i in range(0, len(self.rollouts), size)
                ]
            )
        return self._states[key]

    def _hidden_of_batch(self, prompts: str, batch: slice) -> Tensor:
        """Those of some rollouts in one forward, prompts padded on the left."""
        before = [torch.tensor(ids, dtype=torch.long) for ids in self.prompts[prompts][batch]]
        after = [torch.tensor(each.completion, dtype=torch.long) for each in self.rollouts[batch]]
        left, right = (max(map(len, parts)) for parts in (before, after))
        ids = [
            pad(torch.cat([p, c]), (left - len(p), right - len(c)), value=-1)
            for p, c in zip(before, after, strict=True)
        ]
        device = self.policy.device
        input_ids = torch.stack(ids).to(device)
        is_token = input_ids >= 0
        states = predicting_states(
            self.policy, input_ids.clamp(min=0), is_token.long(), right, None
        )
        return states[is_token[:, left:]]
