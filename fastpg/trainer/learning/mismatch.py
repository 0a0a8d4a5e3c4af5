"""The correction of rollouts whose engine has other log-probs than training."""

import math

import torch
from accelerate import Accelerator
from torch import Tensor

import fastpg
from fastpg.trainer.rollouts.rollout import Rollout
from fastpg.trainer.settings.config import PPOConfig


def correct(
    rollout: Rollout, logp: Tensor | None, args: PPOConfig, accelerator: Accelerator
) -> tuple[Tensor | None, dict[str, float]]:
    """Weigh the tokens of a rollout by truncated importance sampling.

    Args:
        rollout: The episodes.
        logp: Log-probs of their tokens under the policy, float32 [B, T]; needed where an engine
            gave those that it sampled by.
        args: The settings, for the largest weight of a token.
        accelerator: The accelerator of the run.

    Returns:
        The weights, min(e^(logp − behavior_logp), the largest), float32 [B, T]; None where no
        engine gave log-probs. And how far the two are apart over all processes, as metrics:
        "sampling/logp_difference/mean" and ".../max", nats; "sampling/kl", k3 of the engine to the
        policy, nats a token; "sampling/weight_clipped", the share of weights that were held.
    """
    if rollout.behavior_logp is None or logp is None:
        return None, {}
    weight, stats = fastpg.importance_weights(
        logp,
        rollout.behavior_logp,
        rollout.mask,
        high=args.vllm_importance_sampling_clip_max,
    )
    group = torch.distributed.group.WORLD if accelerator.num_processes > 1 else None
    found = fastpg.merge_stats([stats], process_group=group)
    differences = (logp - rollout.behavior_logp)[rollout.mask].abs().double()
    total = accelerator.reduce(differences.sum(), "sum").item()
    return weight, {
        "sampling/logp_difference/mean": total / found["count"],
        "sampling/logp_difference/max": max(
            math.log(found["ratio_max"]), -math.log(found["ratio_min"])
        ),
        "sampling/kl": found["approx_kl"],
        "sampling/weight_clipped": found["outside_high"],
    }
