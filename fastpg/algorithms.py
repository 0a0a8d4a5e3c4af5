"""The algorithms of the field as rows of options: the calls of the ops that each of them is.

    credit       scores → group_center → token_rewards → gae → whiten → advantages
    weight       token_weights
    surrogate    policy_loss (and value_loss, for a row with a critic)

A row holds keyword arguments of these ops; what a row does not mention, it does not do. There is no
registry to extend: an algorithm of one's own is a row like these, or the same calls in a loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .ops.common.checks import as_bool, check_shape
from .ops.common.stats import PolicyStats
from .ops.credit.gae import gae
from .ops.credit.group_center import group_center
from .ops.credit.token_rewards import token_rewards
from .ops.credit.whiten import whiten
from .ops.loss.policy_loss import policy_loss
from .ops.weight.token_weights import token_weights

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Algorithm:
    """One row. All its tensors are [B, T], or [B] for what belongs to an episode.

    title: as its authors write it.
    center: options of group_center; None: scores are not compared within groups.
    kl: where the penalty kl_coef · KL(policy ‖ reference) goes, if kl_coef is not 0. "reward":
        k1 off the reward of every token; "score": its sum off the score, before the groups are
        compared; "loss": a term of policy_loss.
    critic: values are the baseline of gae, and value_loss fits them to the returns.
    gae: options of gae. Without a critic, gamma = lam = 1 is the score at every token.
    whiten: the advantages of the whole batch are whitened.
    reduce: of token_weights.
    per_length: weights are divided by the longest length there could be as well (Dr.GRPO).
    surrogate: options of policy_loss.
    """

    title: str
    center: Options | None = None
    kl: str = "loss"
    kl_coef: float = 0.0
    critic: bool = False
    gae: Options = field(default_factory=lambda: {"gamma": 1.0, "lam": 1.0})
    whiten: bool = False
    reduce: str = "token"
    per_length: bool = False
    surrogate: Options = field(default_factory=dict)

    def advantages(
        self,
        scores: Tensor,
        mask: Tensor,
        *,
        group: Tensor | None = None,
        values: Tensor | None = None,
        kl: Tensor | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Advantages and returns of a batch whose episodes earned `scores`.

        mask: bool or 0/1.
        group: whose completions belong together; for rows with a center.
        values: for rows with a critic.
        kl: k1 of every token, for rows that take the penalty off rewards or scores.
        process_group: whitening is over all its ranks.
        """
        if self.critic and values is None:
            raise ValueError(f"{self.title} needs values, got None")
        if self.kl != "loss" and self.kl_coef and kl is None:
            raise ValueError(f"{self.title} needs kl, got None")
        mask = as_bool(mask)
        check_shape(self.title, "kl", kl, mask, mask.shape)
        penalty = {}
        if self.kl == "reward" and self.kl_coef:
            penalty = {"kl": kl, "kl_coef": self.kl_coef}
        if self.kl == "score" and self.kl_coef:
            scores = scores - self.kl_coef * torch.where(mask, kl, 0.0).sum(-1)
        if self.center is not None:
            scores = group_center(scores, group, **self.center)
        rewards = token_rewards(scores, mask, **penalty)
        advantages, returns = gae(rewards, values if self.critic else None, mask, **self.gae)
        if self.whiten:
            advantages = whiten(advantages, mask, process_group=process_group)
        return advantages, returns

    def denom(self, mask: Tensor, max_length: int) -> Tensor:
        """What these episodes add to the denominator of an optimiser step.

        max_length: of any completion; T may be less where all of them ended early.
        """
        mask = as_bool(mask)
        if self.reduce == "token":
            return mask.sum()
        return mask.any(-1).sum() * (max_length if self.per_length else 1)

    def weights(self, mask: Tensor, denom: Tensor) -> Tensor:
        """The weight of every token; denom: the sum of those of all parts of the step."""
        return token_weights(mask, reduce=self.reduce, denom=denom)

    def loss(
        self,
        logp: Tensor,
        advantages: Tensor,
        weight: Tensor,
        *,
        old_logp: Tensor | None = None,
        ref_logp: Tensor | None = None,
        entropy: Tensor | None = None,
        entropy_coef: float = 0.0,
    ) -> tuple[Tensor, PolicyStats]:
        """The share of a part of the step in its policy loss, and what was counted.

        ref_logp: of the reference, for rows that have the penalty in the loss.
        """
        penalty = {}
        if self.kl == "loss" and self.kl_coef:
            penalty = {"ref_logp": ref_logp, "kl_coef": self.kl_coef}
        return policy_loss(
            logp, advantages, weight, old_logp=old_logp, entropy=entropy,
            entropy_coef=entropy_coef, **penalty, **self.surrogate,
        )  # fmt: skip


_MEAN = {"baseline": "mean"}
_MEAN_STD = {"baseline": "mean", "scale": "std"}

ALGORITHMS = {
    "reinforce": Algorithm(  # Williams 1992
        "REINFORCE", kl="reward", surrogate={"surrogate": "reinforce"}
    ),
    "vpg": Algorithm(  # Sutton et al. 2000: the baseline is a learned value
        "vanilla policy gradient", kl="reward", critic=True, surrogate={"surrogate": "reinforce"}
    ),
    "ppo": Algorithm(  # Schulman et al. 2017, Ouyang et al. 2022
        "PPO", kl="reward", kl_coef=0.05, critic=True, gae={"gamma": 1.0, "lam": 0.95},
        whiten=True, surrogate={"surrogate": "ppo", "clip": (0.2, 0.2)},
    ),
    "grpo": Algorithm(  # Shao et al. 2024
        "GRPO", center=_MEAN_STD, kl_coef=0.04, reduce="sequence",
        surrogate={"surrogate": "ppo", "clip": (0.2, 0.2), "kl": "k3"},
    ),
    "dr_grpo": Algorithm(  # Liu et al. 2025
        "Dr.GRPO", center=_MEAN, reduce="sequence_sum", per_length=True,
        surrogate={"surrogate": "ppo", "clip": (0.2, 0.2)},
    ),
    "dapo": Algorithm(  # Yu et al. 2025
        "DAPO", center=_MEAN_STD, surrogate={"surrogate": "ppo", "clip": (0.2, 0.28)}
    ),
    "rloo": Algorithm(  # Ahmadian et al. 2024
        "RLOO", center={"baseline": "loo"}, kl="score", kl_coef=0.05, reduce="sequence_sum",
        surrogate={"surrogate": "reinforce"},
    ),
    "reinforce++": Algorithm(  # Hu et al. 2025
        "REINFORCE++", kl="reward", kl_coef=0.01, whiten=True,
        surrogate={"surrogate": "ppo", "clip": (0.2, 0.2)},
    ),
    "gspo": Algorithm(  # Zheng et al. 2025
        "GSPO", center=_MEAN_STD, reduce="sequence",
        surrogate={"surrogate": "ppo", "level": "sequence", "clip": (3e-4, 4e-4)},
    ),
    "cispo": Algorithm(  # MiniMax 2025; a ratio of 5 at most: Khatri et al. 2025 (ScaleRL)
        "CISPO", center=_MEAN_STD, surrogate={"surrogate": "cispo", "clip": (None, 4.0)}
    ),
    "sapo": Algorithm(  # Gao et al. 2025
        "SAPO", center=_MEAN_STD, surrogate={"surrogate": "sapo", "tau": (1.0, 1.05)}
    ),
}  # fmt: skip
"""By the name that `fastpg train --algorithm` takes. Penalties and clips as published."""
