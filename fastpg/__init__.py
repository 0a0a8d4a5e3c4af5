"""fastpg: fused kernels for policy-gradient training of language models."""

from ._library import extension_status, kernels_of
from .ops.gae import gae
from .ops.token_logprobs import token_logprobs
from .ops.token_rewards import token_rewards
from .ops.token_weights import token_weights
from .ops.whiten import whiten

__version__ = "0.1.0"
__all__ = [
    "extension_status",
    "gae",
    "kernels_of",
    "token_logprobs",
    "token_rewards",
    "token_weights",
    "whiten",
]
