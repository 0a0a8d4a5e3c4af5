"""The trunk of a language model: what it takes, and the states that predict tokens."""

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from fastpg.trainer.models.packing import Packing, pack


def causal_lm(policy: nn.Module) -> PreTrainedModel:
    """The Hugging Face model itself: inside of what peft wraps around it."""
    model: Any = policy
    return model.get_base_model() if hasattr(policy, "get_base_model") else model


def is_sharded(policy: PreTrainedModel) -> bool:
    """Return whether the weights of a model are whole only within its own forward."""
    weight: Any = causal_lm(policy).get_input_embeddings().weight
    return hasattr(weight, "full_tensor") or weight.dim() != 2 or weight.numel() == 0


def predicting_states(
    policy: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    width: int,
    packing: Packing | None,
) -> Tensor:
    """Compute the last hidden states that predict the tokens of completions.

    Args:
        policy: The model.
        input_ids: int64 [B, P + T], prompts padded on the left, completions in the last T slots.
        attention_mask: int64 [B, P + T], 1 at real tokens.
        width: T.
        packing: How rows are packed for the model. None: each episode is a row.

    Returns:
        The states [B, T, H]. At masked tokens they mean nothing.
    """
    decoder = causal_lm(policy).get_decoder()
    if packing is None or not packing.holds(input_ids.shape[1]):
        inputs = plain_inputs(policy, input_ids, attention_mask)
        return decoder(**inputs).last_hidden_state[:, -width - 1 : -1]
    rows = pack(input_ids, attention_mask, width, packing)
    states = decoder(
        input_ids=input_ids.flatten()[rows.source],
        attention_mask=packing.mask(rows.seen(), causal_lm(policy).dtype),
        position_ids=rows.position_ids,
        use_cache=False,
        return_dict=True,
    ).last_hidden_state
    return states.flatten(0, 1)[rows.predictors]


def plain_inputs(policy: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> dict:
    """Return the arguments of a forward over padded rows, a row for each episode.

    Args:
        policy: The model.
        input_ids: int64 [B, L].
        attention_mask: int64 [B, L], 1 at real tokens.
    """
    inputs: dict[str, Tensor | bool] = {"input_ids": input_ids, "attention_mask": attention_mask}
    inputs |= {"use_cache": False, "return_dict": True}  # whatever the config says
    if takes_positions(policy):
        # generate() counts positions from the first real token; so must every other forward.
        inputs["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    return inputs


def takes_positions(policy: PreTrainedModel) -> bool:
    """Return whether the forward of a model is told the position of each token."""
    return "position_ids" in inspect.signature(causal_lm(policy).forward).parameters


def vocabulary_size(policy: PreTrainedModel) -> int:
    """Return the number of tokens that a model knows, padding of its weights included."""
    embeddings = causal_lm(policy).get_input_embeddings()
    config: Any = policy.config.get_text_config()
    return getattr(embeddings, "num_embeddings", config.vocab_size)


def most_positions(readers: Sequence[PreTrainedModel]) -> int | None:
    """Return how many tokens of an episode every model can read. None: any number."""
    known = [getattr(m.config.get_text_config(), "max_position_embeddings", None) for m in readers]
    return min((count for count in known if count is not None), default=None)
