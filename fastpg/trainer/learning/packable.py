"""Finding out whether rows that share prompts give a model the results that it gives without."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from fastpg.trainer.models.forward import (
    causal_lm,
    is_sharded,
    plain_inputs,
    predicting_states,
    takes_positions,
)
from fastpg.trainer.models.packing import Packing
from fastpg.trainer.rollouts.generation import Sampler, sampling

_WINDOWS = ("sliding_window", "attention_window", "attention_chunk_size", "window_size")
"""The names that configs give to the number of tokens that a layer sees."""

_TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-4}
"""How far states may be apart, as a share of their norm; in the coarser types it is 0.05.

Models of float64 compute their norms in float32."""

_PROMPT = 8  # tokens of a prompt on which packing is tried


class CannotPack(ValueError):
    """A model for which packed rows would not do. The message says why."""


def find_packing(policy: PreTrainedModel, samples: bool = True) -> Packing:
    """Find out how rows are packed for a model, and try it.

    Args:
        policy: The model.
        samples: Whether completions are sampled from it; a value model has no logits.

    Returns:
        The packing, with which the model computes the same states as without.

    Raises:
        CannotPack: It does not. The message says why.
    """
    model = causal_lm(policy)
    name = type(model).__name__
    if is_sharded(policy):
        raise CannotPack("the model's weights are sharded, and whole only within its own forward")
    if not takes_positions(policy):
        raise CannotPack(f"{name} takes no position_ids")
    implementation = model.config.get_text_config()._attn_implementation
    if implementation not in ("sdpa", "eager"):
        raise CannotPack(f"attention by {implementation!r} takes no mask of its own for each token")
    packing = Packing(implementation == "eager", _token_cost(model), _window(model))
    try:
        error = _difference(policy, packing, samples)
    except Exception as reason:
        # A model that was not made for such masks may fail in any way.
        first_line = (str(reason).strip() or type(reason).__name__).splitlines()[0]
        raise CannotPack(f"{name} refuses it: {first_line}") from reason
    tolerance = _TOLERANCES.get(model.dtype, 0.05)
    if not error <= tolerance:
        raise CannotPack(
            f"the states of {name} are then off by {error:.2g} of their norm (tolerance "
            f"{tolerance:.2g})"
        )
    return packing


def _window(model: PreTrainedModel) -> int | None:
    """Return how many tokens the layer that sees fewest sees; None: all of them."""
    config: Any = model.config.get_text_config()
    windows = [getattr(config, name, None) for name in _WINDOWS]
    window = min((size for size in windows if isinstance(size, int)), default=None)
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds and window is None:
        raise CannotPack(f"{type(model).__name__} has layers of {min(kinds)!r}")
    return window


def _token_cost(model: PreTrainedModel) -> float:
    """Estimate `Packing.token_cost`, from the operations of the trunk."""
    config: Any = model.config.get_text_config()
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    embeddings = {id(end.weight) for end in ends if end is not None}
    weights = sum(p.numel() for p in model.parameters() if id(p) not in embeddings)
    # Each weight is one multiplication per token; a pair of tokens is two per feature and layer.
    return weights / (2 * config.num_hidden_layers * config.hidden_size)


@torch.no_grad()
def _difference(policy: PreTrainedModel, packing: Packing, samples: bool) -> float:
    """Compare packed rows, and sampling in rows, with the plain forward, on tokens by chance.

    Returns:
        The larger difference, of states or of logits, as a share of their norm.
    """
    vocab = policy.config.get_text_config().vocab_size
    ids = torch.randint(vocab, (6, _PROMPT + 4), generator=torch.Generator().manual_seed(0))
    ids[1:3, :_PROMPT], ids[4:6, :_PROMPT] = ids[0, :_PROMPT], ids[3, :_PROMPT]
    mask = torch.ones_like(ids)
    for episode, length in enumerate((4, 2, 3, 1, 4, 3)):
        mask[episode, _PROMPT + length :] = 0
    ids, mask = ids.to(policy.device), mask.to(policy.device)
    # The question is what a model makes of the masks, so every row holds a whole family.
    whole = Packing(packing.additive, token_cost=float("inf"))
    packed = predicting_states(policy, ids, mask, 4, whole)
    plain = predicting_states(policy, ids, mask, 4, None)
    counts = mask[:, _PROMPT:].bool()
    error = _share(packed[counts], plain[counts])
    if not samples:
        return error
    prompts = ids[:, :_PROMPT]
    return max(error, _share(*_sampled_and_plain_logits(policy, prompts, whole)))


@dataclass
class _Recorder(Sampler):
    """A sampler that takes the most likely tokens and keeps the logits that it saw."""

    seen: list[Tensor] = field(default_factory=list)

    def draw(self, logits: Tensor) -> Tensor:
        self.seen.append(logits.flatten(0, 1))
        return logits.argmax(-1)


def _sampled_and_plain_logits(
    policy: PreTrainedModel, prompts: Tensor, packing: Packing
) -> tuple[Tensor, Tensor]:
    """Return logits [B, 3, V] of sampled tokens: as the sampler saw them, and by one forward."""
    config = GenerationConfig(max_new_tokens=3, temperature=1.0, eos_token_id=[-1], pad_token_id=0)
    recorder = _Recorder(policy, config, packing)
    # A model that checkpoints its layers has no cache in training mode.
    with sampling(policy, config):
        tokens = recorder.completions(prompts, torch.ones_like(prompts))
        sequences = torch.cat([prompts, tokens], dim=1)
        plain = policy(**plain_inputs(policy, sequences, torch.ones_like(sequences))).logits
    return torch.stack(recorder.seen, dim=1), plain[:, _PROMPT - 1 : -1]


def _share(actual: Tensor, expected: Tensor) -> float:
    return (actual - expected).double().norm().item() / expected.double().norm().item()
