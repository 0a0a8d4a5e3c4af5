"""fastpg: fused kernels for policy-gradient training of language models."""

from ._library import extension_status, kernels_of
from .ops._stats import PolicyStats, ValueStats
from .ops.kl_estimate import kl_estimate
from .ops.merge_stats import merge_stats
from .ops.policy_loss import policy_loss
from .ops.token_logprobs import token_logprobs
from .ops.value_loss import value_loss

__version__ = "0.1.0"
__all__ = [
    "PolicyStats",
    "ValueStats",
    "extension_status",
    "kernels_of",
    "kl_estimate",
    "merge_stats",
    "policy_loss",
    "token_logprobs",
    "value_loss",
]
