"""The forms in which a model is kept while others are trained, or while it is trained itself."""

import copy
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel


def frozen_copy(policy: PreTrainedModel) -> PreTrainedModel:
    """Copy a model as the reference of the KL penalty.

    Args:
        policy: The model. Copying it spares loading it twice.

    Returns:
        A copy in evaluation mode, whose parameters require no gradient.
    """
    reference = copy.deepcopy(policy)
    reference.requires_grad_(False)
    return reference.eval()


def enable_checkpointing(policy: PreTrainedModel) -> None:
    """Let the layers of a model be computed again in backward.

    Args:
        policy: The model, changed in place.
    """
    # transformers 5.23 has given the method another name, and warns of the first one.
    newer = getattr(policy, "activation_checkpointing_enable", None)
    enable = newer or policy.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def disable_dropout(policy: PreTrainedModel) -> None:
    """Put a model in evaluation mode but let gradient checkpointing work.

    With dropout the same weights give different log-probabilities, and the first ratio is no
    longer 1.

    Args:
        policy: The model, changed in place. The config that is saved with it stays as it is.
    """
    policy.eval()
    for module in policy.modules():
        # Layers recompute themselves in training mode only, so those that checkpoint stay in it.
        # Their dropout modules are in evaluation mode, but they also hand rates to functions.
        if getattr(module, "gradient_checkpointing", False):
            module.training = True
            _zero_rates(module)
            if isinstance(getattr(module, "config", None), PreTrainedConfig):
                module.config = copy.copy(module.config)
                _zero_rates(module.config)


def _zero_rates(holder: Any) -> None:
    """Set every rate of a dropout or of skipped layers to 0.

    They have names such as hidden_dropout, resid_pdrop, embd_pdrop and layerdrop.
    """
    for name, value in list(vars(holder).items()):
        if "drop" in name.lower() and isinstance(value, float):
            setattr(holder, name, 0.0)
