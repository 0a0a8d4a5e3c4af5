"""fastpg: fused kernels for policy-gradient training of language models."""

from ._flags import check
from ._library import extension_status, kernels_of
from .ops.common.merge_stats import merge_stats
from .ops.common.stats import (
    DistillationStats,
    ImportanceStats,
    PolicyStats,
    PreferenceStats,
    ValueStats,
)
from .ops.credit.gae import gae
from .ops.credit.group_center import group_center
from .ops.credit.token_rewards import token_rewards
from .ops.credit.whiten import whiten
from .ops.loss.adaptive_kl import AdaptiveKL
from .ops.loss.distillation_loss import distillation_loss
from .ops.loss.kl_estimate import kl_estimate
from .ops.loss.policy_loss import policy_loss
from .ops.loss.policy_loss_from_logits import policy_loss_from_logits
from .ops.loss.preference_loss import preference_loss
from .ops.loss.value_loss import value_loss
from .ops.vocabulary.linear_token_logprobs import linear_token_logprobs
from .ops.vocabulary.linear_token_loss import linear_token_loss
from .ops.vocabulary.row_softmax import TokenLogprobs
from .ops.vocabulary.token_logprobs import token_logprobs
from .ops.weight.importance_weights import importance_weights
from .ops.weight.token_weights import token_weights

__version__ = "0.1.0"
__all__ = [
    "AdaptiveKL",
    "DistillationStats",
    "ImportanceStats",
    "PolicyStats",
    "PreferenceStats",
    "TokenLogprobs",
    "ValueStats",
    "check",
    "distillation_loss",
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
