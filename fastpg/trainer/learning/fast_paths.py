"""The fast paths of completions through a model, where it allows them."""

from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from accelerate.logging import get_logger
from transformers import PreTrainedModel

from fastpg.integrations.peft import UnknownHead
from fastpg.trainer.learning.packable import CannotPack, find_packing
from fastpg.trainer.models.head import HeadTransform, find_head
from fastpg.trainer.models.packing import Packing
from fastpg.trainer.run.engine import is_zero3, shares_weights

logger = get_logger(__name__)


@dataclass(frozen=True)
class FastPaths:
    """How completions go through a model.

    Args:
        head: How the model makes logits from its last hidden states. None: log-probs come from the
            logits that it makes itself.
        packing: How episodes are packed into rows. None: each is a row.
        value_packing: The same for the value model, if there is one.
    """

    head: HeadTransform | None
    packing: Packing | None
    value_packing: Packing | None = None

    def common_packing(self, has_value_model: bool) -> Packing | None:
        """Return how episodes are packed for every model that they go through."""
        return None if has_value_model and self.value_packing is None else self.packing


def find_fast_paths(
    policy: PreTrainedModel,
    accelerator: Accelerator,
    value_model: PreTrainedModel | None = None,
) -> FastPaths:
    """Try the fast paths on a model; a warning says why one is not taken.

    Args:
        policy: The model, all of whose weights are here: before processes share them out.
        accelerator: The accelerator of the run.
        value_model: The model that computes values, if there is one.
    """
    head = None
    models = [policy] if value_model is None else [policy, value_model]
    # Where processes will share the weights, all of them may not fit on its device.
    if not shares_weights(accelerator):
        device: Any = accelerator.device
        for model in models:
            model.to(device)
    try:
        if is_zero3(accelerator):
            raise UnknownHead("ZeRO-3 keeps a weight whole only while its own module runs")
        head = find_head(policy, accelerator.autocast)
    except UnknownHead as reason:
        logger.warning(f"Log-probs come from the model's logits, for {reason}.")
    return FastPaths(head, *(_packing_of(model, samples=model is policy) for model in models))


def _packing_of(model: PreTrainedModel, samples: bool) -> Packing | None:
    try:
        return find_packing(model, samples)
    except CannotPack as reason:
        logger.warning(f"Every completion goes through the model with its prompt, for {reason}.")
        return None
