"""What a run trains, made of the models that are loaded, and its files."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastpg.trainer.models.adapters import WithoutAdapter, with_adapter
from fastpg.trainer.models.loading import Loaded, part_of, save_model
from fastpg.trainer.models.modes import disable_dropout, enable_checkpointing, frozen_copy
from fastpg.trainer.models.policy import VALUE_HEAD, VALUE_MODEL, PolicyWithValue
from fastpg.trainer.settings.config import PPOConfig

Reference = PreTrainedModel | WithoutAdapter


class Assembled(NamedTuple):
    """The models of a run, and the dtypes that they are to be saved in."""

    model: PolicyWithValue
    reference: Reference | None
    policy_dtype: torch.dtype | None
    value_dtype: torch.dtype | None


def assemble(
    policy: Loaded, value_model: Loaded | None, args: PPOConfig, device: torch.device
) -> Assembled:
    """Make what is trained, in place, and the reference that it is held to.

    Args:
        policy: The language model.
        value_model: The critic, if it has a trunk of its own.
        args: The settings, for adapters, checkpointing and the algorithm.
        device: The device of the reference.

    Returns:
        The models. Where adapters are trained, their files are in the dtype of the adapters.

    Raises:
        InputError: A model cannot be given an adapter.
    """
    algorithm = args.resolved().algorithm
    # Without a penalty nothing reads the reference, and its memory is saved.
    has_reference = algorithm.kl_coef > 0
    reference: Reference | None = None
    if args.lora_rank is not None:
        policy = Loaded(with_adapter(policy.model, args, "CAUSAL_LM"), None)
        reference = WithoutAdapter() if has_reference else None
        if value_model is not None:
            value_model = Loaded(with_adapter(value_model.model, args, "SEQ_CLS"), None)
    elif has_reference:
        # The type of `to` wants a module for self, which transformers' decorators hide.
        copied: Any = frozen_copy(policy.model)
        reference = copied.to(device)
    for loaded in filter(None, (policy, value_model)):
        if args.gradient_checkpointing:
            enable_checkpointing(loaded.model)
        disable_dropout(loaded.model)
    critic = None if value_model is None else value_model.model
    return Assembled(
        PolicyWithValue(policy.model, algorithm.critic, critic),
        reference,
        policy.saved_dtype,
        None if value_model is None else value_model.saved_dtype,
    )


def write_models(
    assembled: Assembled,
    state: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
) -> None:
    """Write a directory that `AutoModelForCausalLM` and `AutoTokenizer` load.

    A value head on the trunk of the policy goes beside it as `value_head.safetensors`, and a value
    model into `value_model/`, for `AutoModelForSequenceClassification`.

    Args:
        assembled: The models.
        state: The weights of all of them by name, whole.
        tokenizer: The tokenizer.
        directory: Where the files go.
    """
    model = assembled.model
    save_model(model.policy, directory, assembled.policy_dtype, part_of(state, "policy"))
    tokenizer.save_pretrained(directory)
    if model.value_head is not None:
        save_file(part_of(state, "value_head"), directory / VALUE_HEAD)
    if model.value_model is not None:
        weights = part_of(state, "value_model")
        save_model(model.value_model, directory / VALUE_MODEL, assembled.value_dtype, weights)
        tokenizer.save_pretrained(directory / VALUE_MODEL)
