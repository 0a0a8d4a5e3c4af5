"""fastpg: fused kernels for policy-gradient training of language models."""

from ._flags import check
from ._library import extension_status, kernels_of
from .ops._stats import ImportanceStats, PolicyStats, PreferenceStats, ValueStats
from .ops.adaptive_kl import AdaptiveKL
from .ops.gae import gae
from .ops.group_center import group_center
from .ops.importance_weights import importance_weights
from .ops.kl_estimate import kl_estimate
from .ops.linear_token_logprobs import linear_token_logprobs
from .ops.linear_token_loss import linear_token_loss
from .ops.merge_stats import merge_stats
from .ops.policy_loss import policy_loss
from .ops.policy_loss_from_logits import policy_loss_from_logits
from .ops.preference_loss import preference_loss
from .ops.token_logprobs import token_logprobs
from .ops.token_rewards import token_rewards
from .ops.token_weights import token_weights
from .ops.value_loss import value_loss
from .ops.whiten import whiten

__version__ = "0.1.0"
__all__ = [
    "AdaptiveKL",
    "ImportanceStats",
    "PolicyStats",
    "PreferenceStats",
    "ValueStats",
    "check",
    "extension_status",
    "gae",
    "group_center",
    "importance_weights",
    "kernels_of",
    "kl_estimate",
    "linear_token_logprobs",
    "linear_token_loss",
    "merge_stats",
    "policy_loss",
    "policy_loss_from_logits",
    "preference_loss",
    "token_logprobs",
    "token_rewards",
    "token_weights",
    "value_loss",
    "whiten",
]
