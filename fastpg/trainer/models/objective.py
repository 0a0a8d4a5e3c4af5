"""The loss of one optimiser step, as data: the algorithm, its coefficients and its targets."""

from dataclasses import dataclass

from torch import Tensor

import fastpg
from fastpg.algorithms import Algorithm, Level
from fastpg.trainer.models.head import TokenLoss


@dataclass(frozen=True)
class Targets:
    """The constants in the losses of B completions. Tensors are float32 [B, T].

    Args:
        token_weight: The weight of every token, 0 where masked.
        advantages: The credit of every token.
        returns: The targets of the values.
        old_logp: Log-probs before the first update on this rollout. None: the ratio is 1.
        ref_logp: Log-probs under the reference, if there is one.
        old_values: Values before the first update, if there is a critic.
        new_logp: The loss writes the log-probs here that it is made of; 0 where masked.
        importance: What the weight of every token is multiplied with in the policy loss, where
            another engine has sampled it. The value loss does without.
    """

    # The name is not "weight": that is the matrix of the LM head, on the same way to the loss.
    token_weight: Tensor
    advantages: Tensor
    returns: Tensor
    old_logp: Tensor | None
    ref_logp: Tensor | None
    old_values: Tensor | None
    new_logp: Tensor
    importance: Tensor | None = None


@dataclass(frozen=True)
class Objective:
    """The loss that a step minimises: policy loss + vf_coef · value loss − entropy_coef · entropy.

    Args:
        algorithm: The algorithm, with the settings of the run in place of its own.
        entropy_coef: Weight of the entropy bonus.
        vf_coef: Weight of the value loss.
        cliprange_value: Clip range of the values. None: they are not clipped.
    """

    algorithm: Algorithm
    entropy_coef: float
    vf_coef: float
    cliprange_value: float | None

    @property
    def level(self) -> Level:
        """The level of the ratio: "token", or "sequence" where a loss needs whole completions."""
        return self.algorithm.surrogate.get("level", "token")

    def token_loss(self, targets: Targets) -> TokenLoss:
        """Bind the policy loss to its targets, for `linear_token_loss`.

        Args:
            targets: The targets of all B completions.

        Returns:
            The function (logp, entropy, rows) -> (loss, stats). `rows` are int64 indices of
            tokens in the flattened batch. At level "sequence" they must be all tokens, in order.
        """
        weight = targets.token_weight
        if targets.importance is not None:
            weight = weight * targets.importance
        # A ratio of a whole completion needs to know where completions begin; the chunks of
        # tokens that `linear_token_loss` makes at level "token" have no such shape.
        shape = weight.shape if self.level == "sequence" else (-1,)

        def chosen(tokens: Tensor, rows: Tensor) -> Tensor:
            return tokens.flatten()[rows].view(shape)

        def chosen_if_any(tokens: Tensor | None, rows: Tensor) -> Tensor | None:
            return None if tokens is None else chosen(tokens, rows)

        # `linear_token_loss` differentiates this function chunk by chunk while the logits of the
        # chunk exist, so it has to be a function and cannot be a loss computed beforehand.
        def token_loss(
            logp: Tensor, entropy: Tensor, rows: Tensor
        ) -> tuple[Tensor, fastpg.PolicyStats]:
            targets.new_logp.view(-1)[rows] = logp.detach().to(targets.new_logp.dtype)
            return self.algorithm.loss(
                logp.view(shape),
                chosen(targets.advantages, rows),
                chosen(weight, rows),
                old_logp=chosen_if_any(targets.old_logp, rows),
                ref_logp=chosen_if_any(targets.ref_logp, rows),
                entropy=entropy.view(shape),
                entropy_coef=self.entropy_coef,
            )

        return token_loss

    def value_loss(self, values: Tensor, targets: Targets) -> tuple[Tensor, fastpg.ValueStats]:
        """Compare the values of a critic with the returns.

        Args:
            values: float32 [B, T]; differentiable.
            targets: The targets of the same completions.

        Returns:
            The 0-d value loss, weighed by `vf_coef`, and its statistics.
        """
        loss, stats = fastpg.value_loss(
            values,
            targets.returns,
            targets.token_weight,
            # Old values are of no use to a loss that does not clip, and `value_loss` refuses them.
            old_values=None if self.cliprange_value is None else targets.old_values,
            clip=self.cliprange_value,
        )
        return self.vf_coef * loss, stats
