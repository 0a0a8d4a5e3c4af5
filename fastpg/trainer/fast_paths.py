"""The fast paths of completions through a model, where it allows them."""

from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from accelerate.logging import get_logger
from transformers import PreTrainedModel

from fastpg.integrations.peft import UnknownHead
from fastpg.trainer.engine import is_zero3, shares_weights
from fastpg.trainer.head import HeadTransform, find_head
from fastpg.trainer.packable import CannotPack, find_packing
from fastpg.trainer.packing import Packing

logger = get_logger(__name__)


@dataclass(frozen=True)
class FastPaths:
    """How completions go through a model.

    Args:
        head: How the model makes logits from its last hidden states. None: log-probs come from the
            logits that it makes itself.
        packing: How episodes are packed into rows. None: each is a row.
    """

    head: HeadTransform | None
    packing: Packing | None


def find_fast_paths(policy: PreTrainedModel, accelerator: Accelerator) -> FastPaths:
    """Try the fast paths on a model; a warning says why one is not taken.

    Args:
        policy: The model, all of whose weights are here: before processes share them out.
        accelerator: The accelerator of the run.
    """
    head, packing = None, None
    # Where processes will share the weights, all of them may not fit on its device.
    if not shares_weights(accelerator):
        device: Any = accelerator.device
        policy.to(device)
    try:
        if is_zero3(accelerator):
            raise UnknownHead("ZeRO-3 keeps a weight whole only while its own module runs")
        head = find_head(policy, accelerator.autocast)
    except UnknownHead as reason:
        logger.warning(f"Log-probs come from the model's logits, for {reason}.")
    try:
        packing = find_packing(policy)
    except CannotPack as reason:
        logger.warning(f"Every completion goes through the model with its prompt, for {reason}.")
    return FastPaths(head, packing)
