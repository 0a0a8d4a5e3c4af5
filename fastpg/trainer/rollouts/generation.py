"""Sampling, by a loop in which the completions of a prompt share its keys and values.

A row holds a prompt and the completions that grow behind it, at every step one token of each. A
token sees the prompt and what its own completion has so far. So a prompt goes through the model
once, its cache is kept once, and a completion that has ended costs nothing any more.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)

from fastpg.trainer.models.forward import causal_lm
from fastpg.trainer.models.packing import Family, Packing, find_families
from fastpg.trainer.rollouts.kept_sets import CutLogits, SetRecorder
from fastpg.trainer.rollouts.stop_strings import EndAtStrings, StopRecorder


@contextmanager
def sampling(policy: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Let a model sample as one generation config says, and restore it afterwards.

    Inside, the model is in evaluation mode and makes no gradients.

    Args:
        policy: The model.
        config: The only generation config that counts inside.
    """
    modes = [(module, module.training) for module in policy.modules()]
    # `generate` fills what a passed config leaves open from the model's own (a
    # `repetition_penalty`, say), and then samples from another distribution than that of the
    # log-probabilities. So the model's own config is set aside.
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
        # Not policy.train(): some modules may have been in evaluation mode before.
        for module, training in modes:
            module.training = training


def generate(
    policy: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    config: GenerationConfig,
    packing: Packing | None,
    together: bool = False,
    recorder: SetRecorder | None = None,
    stops: StopRecorder | None = None,
) -> Tensor:
    """Sample a completion of each prompt.

    Args:
        policy: The model, in evaluation mode, with `config` for its own generation config.
        input_ids: int64 [B, P], padded on the left. Equal prompts that stand next to each other
            are shared.
        attention_mask: int64 [B, P], 1 at real tokens.
        config: Temperature, most new tokens, ends and padding.
        packing: How rows are packed for the model. None: the model's own `generate` samples.
        together: Whether `generate` goes on until those of all processes have ended.
        recorder: It cuts the logits, and remembers to which sets. None: nothing is cut off.
        stops: It ends completions at strings, and remembers where. None: only tokens end them.

    Returns:
        Prompts and completions, int64 [B, P + T]. What follows the end of a completion is padding.
    """
    if packing is None or not packing.holds(input_ids.shape[1] + config.max_new_tokens):
        # Every causal language model has `generate`, but the type PreTrainedModel does not say so.
        model: Any = policy
        width = input_ids.shape[1]
        # `generate` calls these before it divides by the temperature of the config.
        cuts = [] if recorder is None else [CutLogits(recorder, config.eos_token_id, width)]
        strings = [] if stops is None else [EndAtStrings(stops, width)]
        return model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            synced_gpus=together,
            logits_processor=LogitsProcessorList(cuts),
            stopping_criteria=StoppingCriteriaList(strings),
        )
    sampler = Sampler(policy, config, packing, recorder, stops)
    completions = sampler.completions(input_ids, attention_mask)
    return torch.cat([input_ids, completions], dim=1)


@dataclass
class _Rows:
    """R rows with some completion that has not ended. Each has C completions.

    Args:
        number: int64 [R], the number of each row among those that began.
        episode: int64 [R], the number of the first completion of each row among all.
        length: int64 [R], the tokens of the prompt.
        seen: bool [R, P], the real tokens of the prompt.
        owner: int64 [R, S], the completion of each token behind the prompt.
        last: int64 [R, C], the last token of each completion.
        grows: bool [R, C], whether the completion has not ended.
    """

    number: Tensor
    episode: Tensor
    length: Tensor
    seen: Tensor
    owner: Tensor
    last: Tensor
    grows: Tensor

    def select(self, rows: Tensor) -> "_Rows":
        """Return the rows of these indices, int64 [n]."""
        return _Rows(**{name: tensor[rows] for name, tensor in vars(self).items()})


@dataclass
class Sampler:
    """Samples completions in rows.

    Args:
        policy: The model, in evaluation mode.
        config: Temperature, most new tokens, ends and padding.
        packing: How rows are packed for the model.
        recorder: It cuts the logits, and remembers to which sets. None: nothing is cut off.
        stops: It ends completions at strings, and remembers where. None: only tokens end them.
    """

    policy: PreTrainedModel
    config: GenerationConfig
    packing: Packing
    recorder: SetRecorder | None = None
    stops: StopRecorder | None = None

    @torch.no_grad()
    def completions(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Sample a completion of each of B prompts.

        Args:
            input_ids: int64 [B, P], padded on the left.
            attention_mask: int64 [B, P].

        Returns:
            int64 [B, T], where T is the length of the longest completion.
        """
        families = self._families(input_ids, attention_mask)
        cache, logits = self._read_prompts(families, input_ids, attention_mask)
        rows = self._first_rows(families, attention_mask)
        shape = *rows.grows.shape, self.config.max_new_tokens
        tokens = input_ids.new_full(shape, self.config.pad_token_id)
        ends = torch.tensor(self.config.eos_token_id, device=input_ids.device)
        columns = torch.arange(shape[1], device=input_ids.device).expand(shape[:2])
        for step in range(self.config.max_new_tokens):
            grows, episodes = rows.grows.gather(1, columns), rows.episode[:, None] + columns
            drawn = self.draw(self._cut(logits, episodes, grows))
            kept = drawn.where(grows, self.config.pad_token_id)
            tokens[rows.number[:, None], columns, step] = kept
            rows.last = rows.last.scatter(1, columns, kept)
            grows = grows & ~torch.isin(drawn, ends)
            if self.stops is not None:
                texts = tokens[rows.number[:, None], columns, : step + 1]
                grows &= ~self.stops.ended(texts, episodes, grows)
            rows.grows = rows.grows.scatter(1, columns, grows)
            # This is the only place where a GPU is waited for.
            counts = rows.grows.sum(1).tolist()
            if step + 1 == self.config.max_new_tokens or not any(counts):
                break
            rows = _without_ended(rows, counts, cache)
            # Completions that grow come first; a row with fewer of them than another adds ended
            # ones, whose tokens nobody reads.
            columns = rows.grows.long().argsort(dim=1, descending=True, stable=True)
            columns = columns[:, : max(counts)]
            rows.owner = torch.cat([rows.owner, columns], dim=1)
            logits = self._next_logits(rows, columns, step, cache)
        row = [number for number, family in enumerate(families) for _ in family.episodes]
        column = [index for family in families for index in range(len(family.episodes))]
        return tokens[row, column, : step + 1]

    def _cut(self, logits: Tensor, episodes: Tensor, grows: Tensor) -> Tensor:
        """Leave in logits [R, n, V] what is kept of them, if anything is cut off."""
        if self.recorder is None:
            return logits
        return self.recorder.cut(logits, episodes, grows)

    def draw(self, logits: Tensor) -> Tensor:
        """Draw a token from each distribution.

        Args:
            logits: [R, C, V].

        Returns:
            int64 [R, C].
        """
        probabilities = (logits.float() / self.config.temperature).softmax(-1)
        return torch.multinomial(probabilities.flatten(0, 1), 1).view(logits.shape[:2])

    def _families(self, input_ids: Tensor, attention_mask: Tensor) -> list[Family]:
        """Put completions of the greatest length that they may have behind their prompts."""
        completions = input_ids.new_ones(len(input_ids), self.config.max_new_tokens)
        return find_families(
            torch.cat([input_ids, completions], dim=1),
            torch.cat([attention_mask, completions], dim=1),
            self.config.max_new_tokens,
            self.packing,
        )

    def _read_prompts(
        self, families: list[Family], input_ids: Tensor, attention_mask: Tensor
    ) -> tuple[DynamicCache, Tensor]:
        """Return the cache [R, ...] of the prompts of the rows, and their logits [R, C, V]."""
        # A prompt with more completions than a row holds has several rows.
        firsts = sorted({family.first for family in families})
        mask = attention_mask[firsts]
        # Without a config the cache forgets nothing, whatever kinds of layers there are.
        cache = DynamicCache()
        out = self._forward(
            input_ids[firsts], mask, (mask.cumsum(-1) - 1).clamp(min=0), cache, logits_to_keep=1
        )
        prompts = [firsts.index(family.first) for family in families]
        if prompts != list(range(len(firsts))):
            cache.batch_select_indices(torch.tensor(prompts, device=input_ids.device))
        return cache, out[prompts].expand(-1, _width(families), -1)

    def _first_rows(self, families: list[Family], attention_mask: Tensor) -> _Rows:
        device, width = attention_mask.device, _width(families)
        counts = torch.tensor([len(family.episodes) for family in families], device=device)
        seen = attention_mask[[family.first for family in families]]
        return _Rows(
            number=torch.arange(len(families), device=device),
            episode=torch.tensor([family.episodes[0] for family in families], device=device),
            length=seen.sum(-1),
            seen=seen.bool(),
            owner=seen.new_empty(len(families), 0),
            last=seen.new_zeros(len(families), width),
            grows=torch.arange(width, device=device) < counts[:, None],
        )

    def _next_logits(self, rows: _Rows, columns: Tensor, step: int, cache: DynamicCache) -> Tensor:
        """Return the logits [R, n, V] of the tokens after the last ones of `columns` [R, n]."""
        if rows.grows.shape[1] == 1:
            # A row of one completion sees all of it, and models are fastest with a mask like this.
            mask = torch.cat([rows.seen, torch.ones_like(rows.owner, dtype=torch.bool)], dim=1)
        else:
            prompt = rows.seen[:, None, None, :].expand(-1, 1, columns.shape[1], -1)
            own = (columns[:, :, None] == rows.owner[:, None, :])[:, None]
            mask = self.packing.mask(torch.cat([prompt, own], dim=-1), self.policy.dtype)
        positions = (rows.length[:, None] + step).expand_as(columns)
        return self._forward(rows.last.gather(1, columns), mask, positions, cache)

    def _forward(
        self, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache, **options: int
    ) -> Tensor:
        return self.policy(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
            **options,
        ).logits


def _width(families: list[Family]) -> int:
    return max(len(family.episodes) for family in families)


def _without_ended(rows: _Rows, counts: list[int], cache: DynamicCache) -> _Rows:
    """Leave out rows of which nothing grows, in the cache too."""
    if all(counts):
        return rows
    growing = [i for i, count in enumerate(counts) if count]
    indices = torch.tensor(growing, device=rows.number.device)
    cache.batch_select_indices(indices)
    return rows.select(indices)
