"""The algorithms of the field as data: each names the ops that it calls and their options.

    credit       scores → group_center → token_rewards → gae → whiten → advantages
    weight       token_weights
    surrogate    policy_loss (and value_loss, for an algorithm with a critic)

An `Algorithm` holds keyword arguments of these ops. An op or option that it does not mention is not
used. There is no registry to extend: a new algorithm is another `Algorithm`, or the same calls in a
loop of your own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor

from .ops.common.checks import check_shape
from .ops.common.stats import PolicyStats
from .ops.credit.gae import gae
from .ops.credit.group_center import group_center
from .ops.credit.token_rewards import token_rewards
from .ops.credit.whiten import whiten
from .ops.loss.policy_loss import policy_loss
from .ops.weight.token_weights import token_weights

AlgorithmName = Literal[
    "reinforce",
    "vpg",
    "ppo",
    "grpo",
    "dr_grpo",
    "dapo",
    "rloo",
    "reinforce++",
    "gspo",
    "cispo",
    "sapo",
]
Baseline = Literal["mean", "loo", "none"]
Scale = Literal["none", "std"]
KLPlacement = Literal["reward", "score", "loss"]
Reduce = Literal["token", "sequence", "sequence_sum"]
Surrogate = Literal["ppo", "reinforce", "cispo", "sapo"]
Level = Literal["token", "sequence"]
KLKind = Literal["k2", "k3", "k3_naive"]


class CenterOptions(TypedDict, total=False):
    """Options of `group_center`."""

    baseline: Baseline
    scale: Scale
    eps: float


class GaeOptions(TypedDict, total=False):
    """Options of `gae`: discount and trace decay, numbers between 0 and 1."""

    gamma: float
    lam: float


class SurrogateOptions(TypedDict, total=False):
    """Options of `policy_loss`. `surrogate` is always given."""

    surrogate: Surrogate
    clip: tuple[float | None, float | None]
    dual_clip: float | None
    tau: tuple[float, float]
    level: Level
    kl: KLKind


@dataclass(frozen=True)
class Algorithm:
    """One algorithm: which ops turn scores into a loss, and with which options.

    All tensors of its methods are [B, T], or [B] for a number per episode.

    Args:
        title: The name as its authors write it.
        center: Options of `group_center`. None: scores are not compared within groups.
        kl: Where the penalty kl_coef · KL(policy ‖ reference) goes, if kl_coef is not 0.
            "reward": k1 is taken off the reward of every token. "score": the sum of k1 over an
            episode is taken off its score before groups are compared. "loss": the KL is a term of
            `policy_loss`.
        kl_coef: Weight of that penalty, in score per nat.
        critic: If True, values are the baseline of `gae`, and `value_loss` fits them to the
            returns.
        gae: Options of `gae`. With gamma = lam = 1 and no critic, the score is the advantage of
            every token.
        whiten: If True, the advantages of the whole batch are whitened.
        reduce: How `token_weights` weighs tokens: "token", "sequence" or "sequence_sum".
        per_length: If True, weights are also divided by the longest length that a completion
            could have (Dr.GRPO).
        surrogate: Options of `policy_loss`, the name of the surrogate among them.

    Example:
        >>> import torch
        >>> from fastpg.algorithms import ALGORITHMS
        >>> grpo = ALGORITHMS["grpo"]
        >>> mask = torch.tensor([[True, True], [True, False]])
        >>> scores, group = torch.tensor([1.0, 0.0]), torch.tensor([0, 0])
        >>> advantages, _ = grpo.advantages(scores, mask, group=group)
        >>> weight = grpo.weights(mask, grpo.denom(mask, max_length=2))
        >>> logp = torch.zeros(2, 2, requires_grad=True)
        >>> loss, stats = grpo.loss(logp, advantages, weight, ref_logp=logp.detach())
    """

    title: str
    center: CenterOptions | None = None
    kl: KLPlacement = "loss"
    kl_coef: float = 0.0
    critic: bool = False
    gae: GaeOptions = field(default_factory=lambda: GaeOptions(gamma=1.0, lam=1.0))
    whiten: bool = False
    reduce: Reduce = "token"
    per_length: bool = False
    surrogate: SurrogateOptions = field(default_factory=lambda: SurrogateOptions(surrogate="ppo"))

    def advantages(
        self,
        scores: Tensor,
        mask: Tensor,
        *,
        group: Tensor | None = None,
        values: Tensor | None = None,
        kl: Tensor | None = None,
        bootstrap: Tensor | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Turn the scores of a batch of episodes into credit for each token.

        Args:
            scores: [B], what each episode earned.
            mask: [B, T], bool or 0/1: the tokens of the completions.
            group: [B] integers, equal for completions of the same prompt. Algorithms with a
                `center` need it.
            values: [B, T], the values of a critic. Algorithms with a critic need them.
            kl: [B, T], k1 in nats. Needed where the penalty comes off rewards or scores.
            bootstrap: [B], the value of what would follow an episode that was cut short, 0 of
                others. None: 0.
            process_group: Whitening is over all ranks of this group.

        Returns:
            Advantages and returns, each [B, T] and 0 where masked.

        Raises:
            ValueError: `group`, `values` or `kl` is needed and missing, or `kl` has a wrong shape.
        """
        self._check_inputs(group, values, kl)
        mask = mask != 0
        check_shape(self.title, "kl", kl, mask, mask.shape)
        # The narrowings to "not None" repeat what _check_inputs has refused.
        if kl is not None and self._penalty_in("score"):
            scores = scores - self.kl_coef * torch.where(mask, kl, 0.0).sum(-1)
        if self.center is not None and group is not None:
            scores = group_center(scores, group, **self.center)
        if self._penalty_in("reward"):
            rewards = token_rewards(scores, mask, kl=kl, kl_coef=self.kl_coef)
        else:
            rewards = token_rewards(scores, mask)
        advantages, returns = gae(
            rewards, values if self.critic else None, mask, bootstrap=bootstrap, **self.gae
        )
        if self.whiten:
            advantages = whiten(advantages, mask, process_group=process_group)
        return advantages, returns

    def _penalty_in(self, place: KLPlacement) -> bool:
        """Whether there is a KL penalty and it goes there."""
        return self.kl == place and self.kl_coef != 0

    def _check_inputs(self, group: Tensor | None, values: Tensor | None, kl: Tensor | None) -> None:
        """Raise ValueError for an input that this algorithm needs and did not get."""
        if self.center is not None and group is None:
            raise ValueError(f"{self.title} needs group, got None")
        if self.critic and values is None:
            raise ValueError(f"{self.title} needs values, got None")
        if kl is None and (self._penalty_in("reward") or self._penalty_in("score")):
            raise ValueError(f"{self.title} needs kl, got None")

    def denom(self, mask: Tensor, max_length: int) -> Tensor:
        """Count what these episodes add to the denominator of an optimiser step.

        The denominator is the sum of these counts over all micro-batches and ranks of the step.

        Args:
            mask: [B, T], bool or 0/1.
            max_length: The most tokens that any completion could have. T may be less, where all
                completions ended early.

        Returns:
            A 0-d integer tensor: the tokens, the non-empty episodes, or these times `max_length`.
        """
        mask = mask != 0
        if self.reduce == "token":
            return mask.sum()
        episodes = mask.any(-1).sum()
        return episodes * max_length if self.per_length else episodes

    def weights(self, mask: Tensor, denom: Tensor) -> Tensor:
        """Weigh the tokens of a part of an optimiser step.

        Args:
            mask: [B, T], bool or 0/1.
            denom: 0-d, the denominator of the whole step (see `denom`).

        Returns:
            The weight of every token, float32 [B, T], 0 where masked.
        """
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
        """Compute the policy loss of a part of an optimiser step.

        Args:
            logp: [B, T] or [N], log-probs under the policy; differentiable.
            advantages: Like `logp`.
            weight: Like `logp`: the token weights of `weights`.
            old_logp: Like `logp`: log-probs before the update. None: the ratio is 1.
            ref_logp: Like `logp`: log-probs under the reference, needed where the KL penalty is
                in the loss.
            entropy: Like `logp`, in nats; differentiable.
            entropy_coef: Weight of the entropy bonus.

        Returns:
            The 0-d share of these tokens in the loss of the step, and the statistics.
        """
        in_loss = self._penalty_in("loss")
        return policy_loss(
            logp,
            advantages,
            weight,
            old_logp=old_logp,
            ref_logp=ref_logp if in_loss else None,
            kl_coef=self.kl_coef if in_loss else 0.0,
            entropy=entropy,
            entropy_coef=entropy_coef,
            **self.surrogate,
        )


_MEAN: CenterOptions = {"baseline": "mean"}
_MEAN_STD: CenterOptions = {"baseline": "mean", "scale": "std"}

# Penalties and clip ranges are those of the papers named beside each algorithm.
ALGORITHMS: Mapping[AlgorithmName, Algorithm] = {
    # Williams 1992.
    "reinforce": Algorithm("REINFORCE", kl="reward", surrogate={"surrogate": "reinforce"}),
    # Sutton et al. 2000: the baseline is a learned value.
    "vpg": Algorithm(
        "vanilla policy gradient", kl="reward", critic=True, surrogate={"surrogate": "reinforce"}
    ),
    # Schulman et al. 2017; Ouyang et al. 2022 put the KL in the reward.
    "ppo": Algorithm(
        "PPO",
        kl="reward",
        kl_coef=0.05,
        critic=True,
        gae={"gamma": 1.0, "lam": 0.95},
        whiten=True,
        surrogate={"surrogate": "ppo", "clip": (0.2, 0.2)},
    ),
    # Shao et al. 2024.
    "grpo": Algorithm(
        "GRPO",
        center=_MEAN_STD,
        kl_coef=0.04,
        reduce="sequence",
        surrogate={"surrogate": "ppo", "clip": (0.2, 0.2), "kl": "k3"},
    ),
    # Liu et al. 2025.
    "dr_grpo": Algorithm(
        "Dr.GRPO",
        center=_MEAN,
        reduce="sequence_sum",
        per_length=True,
        surrogate={"surrogate": "ppo", "clip": (0.2, 0.2)},
    ),
    # Yu et al. 2025.
    "dapo": Algorithm(
        "DAPO", center=_MEAN_STD, surrogate={"surrogate": "ppo", "clip": (0.2, 0.28)}
    ),
    # Ahmadian et al. 2024.
    "rloo": Algorithm(
        "RLOO",
        center={"baseline": "loo"},
        kl="score",
        kl_coef=0.05,
        reduce="sequence_sum",
        surrogate={"surrogate": "reinforce"},
    ),
    # Hu et al. 2025.
    "reinforce++": Algorithm(
        "REINFORCE++",
        kl="reward",
        kl_coef=0.01,
        whiten=True,
        surrogate={"surrogate": "ppo", "clip": (0.2, 0.2)},
    ),
    # Zheng et al. 2025.
    "gspo": Algorithm(
        "GSPO",
        center=_MEAN_STD,
        reduce="sequence",
        surrogate={"surrogate": "ppo", "level": "sequence", "clip": (3e-4, 4e-4)},
    ),
    # MiniMax 2025. Khatri et al. 2025 (ScaleRL) bound the ratio by 5, as here.
    "cispo": Algorithm(
        "CISPO", center=_MEAN_STD, surrogate={"surrogate": "cispo", "clip": (None, 4.0)}
    ),
    # Gao et al. 2025.
    "sapo": Algorithm(
        "SAPO", center=_MEAN_STD, surrogate={"surrogate": "sapo", "tau": (1.0, 1.05)}
    ),
}
"""The algorithms by the names that `fastpg train --algorithm` takes."""
