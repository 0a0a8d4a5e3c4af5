"""A rollout with the credit of its tokens: what the optimiser steps on it read."""

from dataclasses import dataclass

from torch import Tensor

from fastpg.trainer.rollouts.rollout import Rollout


@dataclass(frozen=True)
class Experience:
    """A rollout with the data of its updates: a number for each token, float32 [B, T].

    Args:
        rollout: The B episodes.
        logp: Log-probs before the first update. None: that of the update itself, whose ratio is 1.
        values: Values before the first update, if there is a critic.
        ref_logp: Log-probs under the reference, if there is one.
        advantages: The credit of each token.
        returns: The targets of the values.
        importance: The weight of each token where another engine has sampled it. None: 1.
    """

    rollout: Rollout
    logp: Tensor | None
    values: Tensor | None
    ref_logp: Tensor | None
    advantages: Tensor
    returns: Tensor
    importance: Tensor | None = None

    def __getitem__(self, rows: Tensor) -> "Experience":
        """Return the episodes `rows`, int64 [n], in that order."""
        return Experience(
            rollout=self.rollout[rows],
            logp=None if self.logp is None else self.logp[rows],
            values=None if self.values is None else self.values[rows],
            ref_logp=None if self.ref_logp is None else self.ref_logp[rows],
            advantages=self.advantages[rows],
            returns=self.returns[rows],
            importance=None if self.importance is None else self.importance[rows],
        )
