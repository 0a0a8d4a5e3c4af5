"""LoRA through peft: what is trained, and the reference that it leaves untouched."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastpg.trainer.models.forward import causal_lm
from fastpg.trainer.settings.config import PPOConfig
from fastpg.trainer.settings.parsing import InputError


class WithoutAdapter:
    """The reference of a policy whose adapter is new: the policy itself, without the adapter."""


def with_adapter(
    model: PreTrainedModel, args: PPOConfig, task: Literal["CAUSAL_LM", "SEQ_CLS"]
) -> PreTrainedModel:
    """Wrap a model in a new LoRA adapter, which is all that is trained then.

    Args:
        model: The model, changed in place.
        args: The settings, for `lora_rank` and what belongs to it, and the seed.
        task: What the model is, in peft's words. The linear head of a "SEQ_CLS" is trained whole.

    Returns:
        What peft makes of the model. At first it computes what the model did.

    Raises:
        InputError: peft is not installed, or the model lacks the layers.
    """
    try:
        from peft import LoraConfig, PeftModel, get_peft_model
    except ImportError:
        raise InputError("lora_rank needs peft: pip install peft.") from None
    if isinstance(model, PeftModel):
        raise InputError("lora_rank makes a new adapter, but the model has one already.")
    if Path(model.name_or_path or "", "adapter_config.json").is_file() and model.name_or_path:
        # Whoever loads the new adapter would look for a whole model there.
        raise InputError(
            f"lora_rank makes a new adapter, but {model.name_or_path!r} holds one, not a model."
        )
    assert args.lora_rank is not None
    # peft divides the one by the other, so any number will do.
    alpha: Any = 2 * args.lora_rank if args.lora_alpha is None else args.lora_alpha
    config = LoraConfig(
        r=args.lora_rank,
        lora_alpha=alpha,
        target_modules=args.lora_target_modules or "all-linear",
        # With dropout the first ratio would not be 1.
        lora_dropout=0.0,
        task_type=task,
    )
    try:
        # Half of an adapter is random. Nothing else shall draw other numbers for that.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(args.seed)
            # It passes on what the model has, which its type does not say.
            adapted: Any = get_peft_model(model, config)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"The model cannot be given an adapter: {reason}") from None
    # What loads the adapter looks for its base by this name, from whatever directory.
    if model.name_or_path and Path(model.name_or_path).is_dir():
        base = str(Path(model.name_or_path).resolve())
        adapted.peft_config["default"].base_model_name_or_path = base
    return adapted


@torch.no_grad()
def merged_weights(policy: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a language model as if it had no adapter but its own weights.

    Args:
        policy: The model, with or without an adapter. It is not changed, to the bit.

    Yields:
        The name of each weight in the model without an adapter, and the weight.
    """
    model = causal_lm(policy)
    # Layers with an adapter hold the layer without it as this.
    adapted = {name for name, module in model.named_modules() if hasattr(module, "base_layer")}
    for name, weight in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        layer = owner.removesuffix(".base_layer")
        if owner != layer and layer in adapted:
            yield f"{layer}.{leaf}", _merged(model.get_submodule(layer), leaf)
        # peft keeps the original beside a module that is trained whole.
        elif ".original_module." not in name and not _is_part(name, adapted):
            yield name.replace(".modules_to_save.default.", "."), weight.detach()


def _is_part(name: str, layers: set[str]) -> bool:
    """Return whether a weight of this name is inside one of these layers."""
    return any(name.startswith(f"{layer}.") for layer in layers)


def _merged(layer: Any, leaf: str) -> Tensor:
    """Return a weight of peft's layer with the active adapter in it."""
    base = layer.get_base_layer()
    before = {name: weight.detach().clone() for name, weight in base.named_parameters()}
    layer.merge()
    merged = base.get_parameter(leaf).detach().clone()
    layer.unmerge()
    # Subtracting what was added does not give the same bits.
    for name, weight in base.named_parameters():
        weight.copy_(before[name])
    return merged
