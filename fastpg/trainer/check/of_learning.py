"""Checks of rewards, credit and optimiser steps, the credit by a loop in float64."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from accelerate.utils import gather_object
from torch import Tensor

import fastpg
from fastpg import algorithms
from fastpg.trainer.check.evidence import Evidence, Finding
from fastpg.trainer.run.engine import is_deepspeed
from fastpg.trainer.run.state import random_state, restore_random_state

_MOST_EQUAL_GROUPS = 0.5
_LEAST_EXPLAINED = -0.5


def rewards(evidence: Evidence) -> Finding:
    """Do rewards tell completions apart?"""
    scores = evidence.episodes.scores
    deviation = scores.std(correction=0).item()
    return Finding(
        "rewards",
        "pass" if deviation > 0 else "warn",
        f"mean {scores.mean().item():.3g}, standard deviation {deviation:.3g}",
        "all completions earned the same, so there is nothing to learn: look at the samples",
    )


def groups(evidence: Evidence) -> Finding | None:
    """Are completions compared with those of the same prompt, and do these differ?"""
    size = evidence.trainer.resolved.num_generations
    if size == 1:
        return None
    scores = evidence.episodes.scores.view(-1, size)
    equal = (scores.amax(1) == scores.amin(1)).float().mean().item()
    prompts = evidence.prompts
    mixed = sum(prompts[i] != prompts[i - i % size] for i in range(len(prompts)))
    return Finding(
        "groups",
        "fail" if mixed else "warn" if equal > _MOST_EQUAL_GROUPS else "pass",
        f"{equal:.0%} of groups of {size} with equal rewards, {mixed} completions astray",
        "completions of another prompt are in a group"
        if mixed
        else "groups of equal rewards teach nothing: prompts are too easy or too hard",
    )


def score_position(evidence: Evidence) -> Finding:
    """Is the score the reward of the last token of a completion, and of no other?"""
    mask = evidence.rollout.mask
    scores = torch.arange(1.0, len(mask) + 1, device=mask.device)
    given = algorithms.token_rewards(scores, mask)
    expected = torch.zeros_like(given)
    for row, length in enumerate(evidence.lengths):
        expected[row, length - 1] = scores[row]
    wrong = int((given != expected).any(-1).sum())
    return Finding(
        "score position",
        "fail" if wrong else "pass",
        f"{wrong} of {len(mask)} scores elsewhere than at the last token",
        "the score belongs to the EOS, or to the last token of what was cut short",
    )


def advantage_estimation(evidence: Evidence) -> Finding:
    """Are returns those of a loop over tokens in float64?"""
    expected = _returns(evidence)
    returns = evidence.experience.returns.double()
    error = (returns - expected).abs().max().item() / (1 + expected.abs().max().item())
    return Finding(
        "GAE",
        "pass" if error < 1e-4 else "fail",
        f"returns {error:.1e} from a float64 loop's",
        "credit is assigned otherwise than by the recursion of GAE",
    )


def _returns(evidence: Evidence) -> Tensor:
    """Return the targets of the values, float64 [B, T], by the definition of GAE."""
    learner, experience = evidence.learner, evidence.experience
    algorithm = learner.algorithm
    kl = None
    if experience.logp is not None and experience.ref_logp is not None:
        kl = (experience.logp - experience.ref_logp).double()
    scores = _centred_scores(evidence, kl)
    follows = torch.zeros(len(scores))
    if evidence.trainer.args.bootstrap_truncated:
        follows = learner.values_after(evidence.rollout)
    gamma, lam = algorithm.gae["gamma"], algorithm.gae["lam"]
    returns = torch.zeros(evidence.mask.shape, dtype=torch.float64)
    for row, length in enumerate(evidence.lengths):
        advantage, value_after = 0.0, follows[row].item()
        for t in reversed(range(length)):
            reward = scores[row].item() if t == length - 1 else 0.0
            if kl is not None and algorithm.kl == "reward":
                reward -= algorithm.kl_coef * kl[row, t].item()
            value = 0.0 if experience.values is None else experience.values[row, t].item()
            delta = reward + gamma * value_after - value
            advantage = delta + gamma * lam * advantage
            returns[row, t] = advantage + value
            value_after = value
    return returns.to(evidence.mask.device)


def _centred_scores(evidence: Evidence, kl: Tensor | None) -> Tensor:
    """Return what episodes are credited with, float64 [B]."""
    algorithm, device = evidence.learner.algorithm, evidence.mask.device
    scores = evidence.episodes.scores.to(device).double()
    if evidence.trainer.args.whiten_rewards:
        everyone = evidence.learner.process_group
        scores = fastpg.whiten(scores, torch.ones_like(scores), process_group=everyone)
    if kl is not None and algorithm.kl == "score":
        scores = scores - algorithm.kl_coef * (kl * evidence.mask).sum(-1)
    if algorithm.center is None:
        return scores
    size = evidence.trainer.resolved.num_generations
    group = torch.arange(len(scores), device=device) // size
    return fastpg.group_center(scores, group, **algorithm.center)


def advantages(evidence: Evidence) -> Finding:
    """Are advantages finite, 0 at padding, and of mean 0 and deviation 1 where whitened?"""
    given = evidence.experience.advantages.double()
    inside = given[evidence.mask]
    moments = torch.stack([torch.ones_like(inside).sum(), inside.sum(), inside.square().sum()])
    count, total, square = evidence.trainer.accelerator.reduce(moments, "sum").tolist()
    mean = total / count
    deviation = math.sqrt(max(square / count - mean**2, 0.0))
    is_wrong = not inside.isfinite().all() or bool((given * ~evidence.mask).any())
    if evidence.learner.algorithm.whiten and deviation > 0:
        is_wrong |= abs(mean) > 1e-3 or abs(deviation - 1) > 0.05
    return Finding(
        "advantages",
        "fail" if is_wrong else "pass" if deviation > 0 else "warn",
        f"mean {mean:.2g}, standard deviation {deviation:.3g}",
        "they are to be finite, 0 at padding and, where whitened, of mean 0 and deviation 1"
        if is_wrong
        else "all are equal: the step would teach nothing",
    )


def values(evidence: Evidence) -> Finding | None:
    """How well does the critic foresee the returns?"""
    explained = evidence.credit.get("value/explained_variance")
    if explained is None:
        return None
    return Finding(
        "values",
        "pass" if explained >= _LEAST_EXPLAINED else "warn",
        f"explained variance {explained:.2f}",
        "the critic begins worse than a constant: is it one for these rewards?",
    )


def learning_rate(evidence: Evidence) -> Finding:
    """Does the first step move the weights?"""
    rates = [float(group["lr"]) for group in evidence.learner.optimizer.param_groups]
    return Finding(
        "learning rate",
        "pass" if min(rates) > 0 else "fail",
        ", ".join(f"{rate:.3g}" for rate in dict.fromkeys(rates)) + " in the first step",
        "the first rollout would be wasted: begin the warm-up above 0",
    )


def trained_weights(evidence: Evidence) -> Finding:
    """Are there weights to train, all of them in the optimiser?"""
    weights = evidence.trained_weights
    groups = evidence.learner.optimizer.param_groups
    optimised = {id(weight) for group in groups for weight in group["params"]}
    forgotten = sum(id(weight) not in optimised for weight in weights)
    count = sum(weight.numel() for weight in weights)
    total = sum(weight.numel() for weight in evidence.trainer.model.parameters())
    return Finding(
        "weights",
        "pass" if weights and not forgotten else "fail",
        f"{count:,} of {total:,} are trained, {forgotten} tensors not in the optimiser",
        "what requires a gradient has to be in the optimiser, and something has to",
    )


def gradient(evidence: Evidence) -> Finding | None:
    """Is the gradient of the first step finite, not 0, and of all trained weights?"""
    if is_deepspeed(evidence.trainer.accelerator):
        return None
    parts = evidence.gradient.parts
    missing = sum(part is None for part in parts)
    norm = _norm(parts)
    is_whole = norm > 0 and not missing
    return Finding(
        "gradient",
        "fail" if not math.isfinite(norm) else "pass" if is_whole else "warn",
        f"norm {norm:.3g}, none for {missing} of {len(parts)} tensors",
        "see the rewards if it is 0; tensors without one take no part in the loss",
    )


def micro_batches(evidence: Evidence) -> Finding | None:
    """Is the gradient of a step the same however it is cut into micro-batches?"""
    if is_deepspeed(evidence.trainer.accelerator):
        return None
    first, second = evidence.gradient.parts, evidence.recut_gradient.parts
    pairs = zip(first, second, strict=True)
    difference = [a - b for a, b in pairs if a is not None and b is not None]
    error = _norm(difference) / max(_norm(first), 1e-12)
    return Finding(
        "micro-batches",
        "pass" if error <= (0.1 if evidence.is_half else 1e-3) else "fail",
        f"gradients {error:.1e} apart when cut otherwise, as a share of their norm",
        "divide losses by the tokens of the whole step, and not of a micro-batch",
    )


def _norm(parts: Sequence[Tensor | None]) -> float:
    """Return the norm of all parts together."""
    norms = [part.float().norm().item() for part in parts if part is not None]
    return math.sqrt(sum(norm**2 for norm in norms))


def seeds(evidence: Evidence) -> Finding:
    """Does each process draw numbers of its own?"""
    state = torch.get_rng_state()
    draws = gather_object([torch.rand(2, dtype=torch.float64).tolist()])
    torch.set_rng_state(state)
    distinct = len({tuple(draw) for draw in draws})
    return Finding(
        "seeds",
        "pass" if distinct == len(draws) else "fail",
        f"{distinct} different in {len(draws)} process{'es' if len(draws) > 1 else ''}",
        "processes sample the same completions: seed each with its number",
    )


def resuming(evidence: Evidence) -> Finding | None:
    """Does a step from a checkpoint end in the same weights as it did before?

    This trains; it has to be the last check.
    """
    trainer = evidence.trainer
    if is_deepspeed(trainer.accelerator):
        return None
    # The optimiser's state is empty before the first step, and nothing would be lost with it.
    trainer.learn(evidence.rollout, evidence.episodes)
    drawn = random_state()
    taken = trainer.state.checkpoint(1, drawn, {})
    # On a CPU it holds the very tensors that training changes.
    copies = {name: tensor.clone() for name, tensor in taken.tensors.items()}
    saved = replace(taken, tensors=copies, state=json.loads(json.dumps(taken.state)))
    ends = []
    for _ in range(2):
        trainer.learn(evidence.rollout, evidence.episodes)
        ends.append([weight.detach().clone() for weight in evidence.trained_weights])
        trainer.state.restore(saved)
        restore_random_state(drawn)
    gaps = [(a - b).abs().max().item() for a, b in zip(*ends, strict=True)]
    return Finding(
        "resuming",
        "pass" if max(gaps) == 0 else "fail",
        f"weights {max(gaps):.1e} apart after a step from a checkpoint",
        "a resumed run is another one: something that training changes is not in checkpoints",
    )
