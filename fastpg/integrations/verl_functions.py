"""verl's functions by their own signatures, computed by fastpg's ops.

Where the two differ:

    verl                                        here
    masked slots of advantages and returns      0; verl leaves numbers there, which nobody reads
    one unmasked token in all, or none          0; verl's whitening raises
    bf16 logits                                 log-probs and entropies are fp32; verl's are bf16
    a -inf logit                                entropy as in the limit; verl's is NaN
    a label of -100                             0; verl reads out of range
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

import fastpg
from fastpg.ops.common.stats import ValueStats

Metrics = dict[str, float]
PolicyLoss = Callable[..., tuple[Tensor, Metrics]]

# verl's name of an aggregation, and that of token_weights.
REDUCTIONS: dict[str, Literal["token", "sequence", "sequence_sum"]] = {
    "token-mean": "token",
    "token-sum": "token",
    "seq-mean-token-sum": "sequence_sum",
    "seq-mean-token-sum-norm": "sequence_sum",
    "seq-mean-token-mean": "sequence",
}


def compute_gae_advantage_return(
    token_level_rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """Whitened advantages, and returns, both [B, T]."""
    with torch.no_grad():
        advantages, returns = fastpg.gae(
            token_level_rewards, values, response_mask, gamma=gamma, lam=lam
        )
        return fastpg.whiten(advantages, response_mask), returns


def aggregation_weights(
    mask: Tensor,
    loss_agg_mode: str,
    dp_size: int = 1,
    batch_num_tokens: float | Tensor | None = None,
    global_batch_size: float | Tensor | None = None,
    loss_scale_factor: float | None = None,
) -> Tensor:
    """The weight of each token [B, T] with which a sum is verl's `agg_loss`."""
    if loss_agg_mode not in REDUCTIONS:
        raise ValueError(f"Invalid loss_agg_mode: {loss_agg_mode}")
    denom: float | Tensor | None
    if loss_agg_mode == "token-sum":
        name, denom = "", 1.0
    elif loss_agg_mode == "token-mean":
        name, denom = "batch_num_tokens", batch_num_tokens
    else:
        name, denom = "global_batch_size", global_batch_size
    if denom is None and dp_size > 1:
        raise ValueError(f"{name} is required when dp_size > 1, got dp_size={dp_size}")
    if isinstance(denom, Tensor):
        denom = denom.reshape(()).to(mask.device)
    weight = fastpg.token_weights(mask, reduce=REDUCTIONS[loss_agg_mode], denom=denom)
    if loss_agg_mode == "seq-mean-token-sum-norm":
        weight = weight / (loss_scale_factor or mask.shape[-1])
    return weight * dp_size


# The arguments of fastpg.policy_loss that are each loss of verl.
LOSSES: dict[str, dict[str, Any]] = {
    "vanilla": {"surrogate": "ppo"},
    "gspo": {"surrogate": "ppo", "level": "sequence", "max_log_ratio": 10.0},
    "sapo": {"surrogate": "sapo"},
    "cispo": {"surrogate": "cispo"},
    "gpg": {"surrogate": "reinforce"},
}


def policy_loss(name: str) -> PolicyLoss:
    """A function for verl's registry that computes its loss of this name, a key of LOSSES."""

    def loss(
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, Metrics]:
        # verl's SAPO knows one aggregation, whatever is asked for.
        mode = "seq-mean-token-mean" if name == "sapo" else loss_agg_mode
        weight = aggregation_weights(response_mask, mode, **config.global_batch_info)
        # A loss is linear in the advantage, for a factor >= 0. In the weight a factor of 0 would
        # take its token out of the metrics, and out of the ratio of its sequence.
        if rollout_is_weights is not None:
            advantages = advantages * rollout_is_weights
        value, stats = fastpg.policy_loss(
            log_prob,
            advantages,
            weight,
            old_logp=None if name == "gpg" else old_log_prob,
            clip=clip_of(config),
            dual_clip=config.get("clip_ratio_c", 3.0) if name == "vanilla" else None,
            tau=(config.tau_pos, config.tau_neg),
            **LOSSES[name],
        )
        return value, {} if name == "gpg" else metrics(stats)

    loss.__name__ = "fastpg" if name == "vanilla" else f"fastpg_{name}"
    return loss


POLICY_LOSSES = [policy_loss(name) for name in LOSSES]


def clip_of(config: Any) -> tuple[float, float]:
    """How far below and above 1 a ratio may be."""
    low, high = config.clip_ratio_low, config.clip_ratio_high
    return (
        config.clip_ratio if low is None else low,
        config.clip_ratio if high is None else high,
    )


def metrics(stats: fastpg.PolicyStats) -> Metrics:
    """What verl logs, with one synchronisation of the device in place of three.

    A token of advantage 0 does not count as clipped; in verl's CISPO it does.
    """
    means = fastpg.merge_stats(stats)
    return {
        "actor/pg_clipfrac": means["clip_frac_low"] + means["clip_frac_high"],
        "actor/ppo_kl": means["kl"],
        "actor/pg_clipfrac_lower": means["clip_frac_dual"],
    }


def compute_value_loss(
    vpreds: Tensor,
    returns: Tensor,
    values: Tensor,
    response_mask: Tensor,
    cliprange_value: float,
    loss_agg_mode: str = "token-mean",
    dp_size: int = 1,
    batch_num_tokens: float | Tensor | None = None,
    global_batch_size: float | Tensor | None = None,
    loss_scale_factor: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The value loss, and the fraction of tokens where it is clipped; scalars on the device."""
    weight = aggregation_weights(
        response_mask,
        loss_agg_mode,
        dp_size,
        batch_num_tokens,
        global_batch_size,
        loss_scale_factor,
    )
    loss, stats = fastpg.value_loss(
        vpreds, returns, weight, old_values=values, clip=cliprange_value
    )
    count, clipped = (stats.values[ValueStats.FIELDS.index(name)] for name in ("count", "clipped"))
    return loss, clipped / count.clamp(min=1)


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """Log-probs of labels [...]; the gradient goes over the logits, where that can be."""
    inplace = inplace_backward and not is_wanted_elsewhere(logits)
    return fastpg.token_logprobs(logits, labels, inplace_backward=inplace)


def chunked_topk_log_probs(logits: Tensor, topk_ids: Tensor, chunk_size: int = 4096) -> Tensor:
    """Log-probs [..., K], fp32, of K tokens of each row, from one pass."""
    return fastpg.token_logprobs(logits, topk_ids)


def is_wanted_elsewhere(logits: Tensor) -> bool:
    """Whether a gradient cannot go over the logits: they are a leaf of the graph, or a part."""
    base = logits if logits._base is None else logits._base
    is_leaf = logits.is_leaf or (base.is_leaf and base.requires_grad)
    return is_leaf or not logits.is_contiguous()


def entropy_from_logits(logits: Tensor, chunk_size: int = 0) -> Tensor:
    """Entropies [...]. Nothing is held that would be less of in chunks."""
    return _entropy(logits, None)


def _entropy(logits: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    labels = _any_labels(logits)
    return fastpg.token_logprobs(logits, labels, return_entropy=True, process_group=group)[1]


def calculate_sum_pi_squared_from_logits(logits: Tensor) -> Tensor:
    """Sums of squared probabilities [...], without a gradient: verl asks for them without one."""
    statistics = fastpg.token_logprobs(
        logits, _any_labels(logits), row_statistics=["sum_p_squared"]
    )
    assert statistics.sum_p_squared is not None
    return statistics.sum_p_squared


def _any_labels(logits: Tensor) -> Tensor:
    return torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)


def fused_linear(logits_dtype: torch.dtype | None) -> Callable[..., tuple[Tensor, Tensor]]:
    """The forward of verl's FusedLinearForPPO."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        vocab_weights: Tensor,
        input_ids: Tensor,
        temperature: float | Tensor = 1.0,
    ) -> tuple[Tensor, Tensor]:
        return fastpg.linear_token_logprobs(
            hidden_states,
            vocab_weights,
            input_ids,
            temperature=temperature,
            return_entropy=True,
            logits_dtype=logits_dtype,
        )

    return forward


def linear_cross_entropy(
    stock: Callable[..., Any], logits_dtype: torch.dtype | None
) -> Callable[..., Any]:
    """verl's function of this name; a reduction other than "none" is the stock one's."""

    def linear_cross_entropy(
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        temperature: float = 1.0,
        reduction: str = "none",
        dist_process_group: dist.ProcessGroup | None = None,
    ) -> Any:
        if reduction.lower() != "none":
            return stock(hidden, weight, labels, temperature, reduction, dist_process_group)
        return fastpg.linear_token_logprobs(
            _as_part(hidden.reshape(-1, hidden.shape[-1]), dist_process_group),
            weight,
            labels.reshape(-1),
            temperature=temperature,
            return_entropy=True,
            logits_dtype=logits_dtype,
            process_group=dist_process_group,
        )

    return linear_cross_entropy


def _as_part(hidden: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The same hidden, whose gradients on the ranks are parts of a sum.

    The op gives each rank the whole gradient. Megatron sums what the ranks give, where it gathered
    the hidden states of sequence parallelism.
    """
    if group is None or not hidden.requires_grad:
        return hidden
    ranks = dist.get_world_size(group)
    part = hidden.view_as(hidden)
    part.register_hook(lambda grad: grad / ranks)
    return part


def _tensor_parallel_group() -> dist.ProcessGroup:
    from megatron.core import parallel_state

    return parallel_state.get_tensor_model_parallel_group()


def vocab_parallel_log_probs_from_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probs of labels [...], from this rank's shard [..., V / ranks] of the logits."""
    return fastpg.token_logprobs(logits, labels, process_group=_tensor_parallel_group())


def vocab_parallel_entropy(vocab_parallel_logits: Tensor, chunk_size: int = 0) -> Tensor:
    """Entropies [...], from this rank's shard [..., V / ranks] of the logits."""
    return _entropy(vocab_parallel_logits, _tensor_parallel_group())
