"""Who is right on hard inputs: fastpg, the lines people write, and every package that is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from . import baselines, hard_inputs, peers
from .problem import OURS, PLAIN, Solution, evaluated
from .problems import (
    Settings,
    fused_cross_entropy,
    fused_gae,
    fused_surrogate,
    log_probs_of,
)
from .running import Row

RIGHT = "right"


class Hard(NamedTuple):
    """A hard input.

    Attributes:
        name: What is hard about it.
        make: Makes the inputs, on the default device.
        leaves: Which of them get a gradient.
        exact: Makes values and gradients of the inputs in fp64; None: those of the family.
        tolerance: Of every single element, relative to itself, and to the largest.
    """

    name: str
    make: Callable[[], tuple[Tensor, ...]]
    leaves: tuple[int, ...] = (0,)
    exact: Solution | None = None
    tolerance: tuple[float, float] = (1e-4, 1e-5)


class Family(NamedTuple):
    """Hard inputs of one calculation.

    Attributes:
        op: What is computed.
        exact: Plain PyTorch, which is given the inputs in fp64.
        solutions: By name.
        inputs: The hard inputs.
    """

    op: str
    exact: Solution
    solutions: Mapping[str, Solution]
    inputs: list[Hard]


def ignoring(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probs where labels of -100 give 0."""
    usual = labels != hard_inputs.IGNORED
    logits = logits.masked_fill(~usual[:, None], 0.0)
    return baselines.log_probs(logits, labels.clamp(min=0)) * usual


def entropy_of_possible(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Where p = 0, p log p is 0."""
    logp = logits.log_softmax(-1)
    terms = torch.where(
        logp == -torch.inf, 0.0, logp.exp() * logp.masked_fill(logp == -torch.inf, 0.0)
    )
    return logp.gather(-1, labels[:, None])[:, 0], -terms.sum(-1)


def log_probs_family(settings: Settings) -> Family:
    """Log-probs from logits."""
    return Family(
        "token_logprobs",
        baselines.log_probs,
        {
            OURS: log_probs_of,
            PLAIN: baselines.log_probs,
            "PyTorch, cross_entropy": baselines.log_probs_by_cross_entropy,
            "PyTorch, logsumexp": baselines.log_probs_by_logsumexp,
            **settings.peers(peers.LOG_PROBS),
        },
        [
            Hard("the first 4096 logits -inf", hard_inputs.first_block_impossible),
            Hard("a padded vocabulary", hard_inputs.padded_vocabulary),
            Hard("one token possible", hard_inputs.one_token_possible),
            Hard(
                "p -> 1",
                hard_inputs.nearly_certain,
                exact=baselines.log_probs_of_the_likely,
                tolerance=(1e-3, 0.0),
            ),
            Hard("logits about 1000", hard_inputs.far_from_zero),
            Hard("strided", hard_inputs.shifted_view),
            Hard("expanded", hard_inputs.one_row_expanded),
            Hard("labels 0 and V - 1", hard_inputs.labels_at_the_edge),
            Hard("offsets past 2^31", hard_inputs.beyond_int32, tolerance=(1e-2, 1e-2)),
            Hard("empty", hard_inputs.no_rows),
            Hard("all masked, one of them NaN", hard_inputs.all_rows_masked, exact=ignoring),
        ],
    )


def entropy_family(settings: Settings) -> Family:
    """Log-probs and entropies from logits."""
    return Family(
        "token_logprobs with entropy",
        entropy_of_possible,
        {
            OURS: partial(log_probs_of, return_entropy=True),
            PLAIN: baselines.log_probs_and_entropy,
            **settings.peers(peers.LOG_PROBS_AND_ENTROPY),
        },
        [
            Hard("entropy, the first 4096 logits -inf", hard_inputs.first_block_impossible),
            Hard("entropy, a padded vocabulary", hard_inputs.padded_vocabulary),
            Hard("entropy, one token possible", hard_inputs.one_token_possible),
            Hard("entropy, logits about 1000", hard_inputs.far_from_zero),
            Hard("entropy, empty", hard_inputs.no_rows),
        ],
    )


def head_family(settings: Settings) -> Family:
    """A head's cross entropy from hidden states."""
    return Family(
        "linear_token_loss",
        baselines.head_cross_entropy,
        {
            OURS: fused_cross_entropy,
            PLAIN: baselines.head_cross_entropy,
            **settings.peers(peers.HEAD_CROSS_ENTROPY),
        },
        [
            Hard("a head, p -> 1", hard_inputs.head_nearly_certain, (0, 1), tolerance=(1e-3, 1e-3)),
            Hard("a head, strided", hard_inputs.head_strided, (0, 1)),
            Hard("a head, empty", hard_inputs.head_without_rows, (0, 1)),
            Hard("a head, all masked", hard_inputs.head_all_masked, (0, 1)),
        ],
    )


def gae_family(settings: Settings) -> Family:
    """Advantages."""
    loop = partial(baselines.gae_by_loop, gamma=1.0, lam=0.95)
    adapters = {
        "torchrl": peers.torchrl_gae(1.0, 0.95),
        "torchaudio's lfilter": peers.torchaudio_gae(1.0, 0.95),
        "scipy's lfilter": peers.scipy_gae(1.0, 0.95),
    }
    return Family(
        "gae",
        loop,
        {
            OURS: fused_gae(1.0, 0.95),
            PLAIN: loop,
            "PyTorch, doubling": partial(baselines.gae_by_doubling, gamma=1.0, lam=0.95),
            **settings.peers(adapters),
        },
        [
            Hard("one step", lambda: hard_inputs.gae_inputs(1), ()),
            Hard(
                "an expanded reward",
                lambda: (torch.randn(3, 1).expand(3, 33), hard_inputs.gae_inputs(33)[1]),
                (),
            ),
            Hard(
                "rewards of 1e30",
                lambda: (hard_inputs.gae_inputs(33)[0] * 1e30, hard_inputs.gae_inputs(33)[1]),
                (),
            ),
            Hard("no sequences", lambda: (torch.zeros(0, 7), torch.zeros(0, 7)), ()),
        ],
    )


def selecting_surrogate(
    logp: Tensor, advantages: Tensor, weight: Tensor, old_logp: Tensor
) -> Tensor:
    """PPO's loss of the tokens that have a weight."""
    kept = weight != 0
    return baselines.clipped_surrogate(logp[kept], advantages[kept], weight[kept], old_logp[kept])


def losses_family(settings: Settings) -> Family:
    """PPO's loss."""
    return Family(
        "policy_loss",
        selecting_surrogate,
        {OURS: fused_surrogate, PLAIN: baselines.clipped_surrogate},
        [
            Hard("all masked", hard_inputs.loss_all_masked),
            Hard("NaN and inf where masked", hard_inputs.loss_with_garbage),
            Hard("a ratio of e^100, clipped", hard_inputs.loss_far_off_policy),
            Hard("no tokens", lambda: tuple(x[:0] for x in hard_inputs.loss_inputs())),
        ],
    )


FAMILIES = (log_probs_family, entropy_family, head_family, gae_family, losses_family)


def verdict(family: Family, hard: Hard, solution: Solution) -> str:
    """RIGHT, or what is wrong."""
    inputs = made(hard)
    doubles = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    want, want_gradients = evaluated(hard.exact or family.exact, doubles, hard.leaves)
    try:
        got, got_gradients = evaluated(solution, inputs, hard.leaves)
    except Exception as error:  # That is what the table is about.
        return f"raises {type(error).__name__}"
    if len(got) == 1 and got[0].dim() == 0:
        want = [torch.stack([x.sum() for x in want]).sum()]
    for name, theirs, right in (
        ("value", got, want),
        ("gradient", got_gradients, want_gradients),
    ):
        for pair in zip(theirs, right, strict=True):
            if fault := difference(*pair, hard.tolerance):
                return f"{name} {fault}"
    return RIGHT


def made(hard: Hard) -> tuple[Tensor, ...]:
    """The inputs, always the same, anew for each solution: some write over them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return hard.make()


def difference(got: Tensor, want: Tensor, tolerance: tuple[float, float]) -> str:
    """What is wrong with a tensor, or nothing."""
    if got.shape != want.shape:
        return f"of shape {list(got.shape)}"
    if got.numel() == 0:
        return ""
    got = got.double()
    if got.isnan().any() and not want.isnan().any():
        return "NaN"
    relative, to_largest = tolerance
    scale = want[want.isfinite()].abs().max().item() if want.isfinite().any() else 0.0
    allowed = relative * want.abs() + to_largest * scale
    bad = ~((got == want) | ((got - want).abs() <= allowed))
    if not bad.any():
        return ""
    error = ((got - want).abs() / want.abs().clamp(min=1e-300))[bad].max().item()
    return "off by a factor" if error > 1e3 else f"off by {100 * error:.3g} %"


def rows(settings: Settings) -> Iterator[list[Row]]:
    """A row for each hard input and each solution."""
    for make in FAMILIES:
        family = make(settings)
        for hard in family.inputs:
            yield judged(settings, family, hard)


def judged(settings: Settings, family: Family, hard: Hard) -> list[Row]:
    """The verdicts on one hard input; none, with a reason, where it cannot be made."""
    with torch.device(settings.device):
        try:
            made(hard)
        except (peers.LeftOutError, RuntimeError) as error:  # no memory
            settings.left_out[f"torture, {hard.name}"] = str(error).splitlines()[0]
            return []
        return [
            {
                "op": family.op,
                "case": hard.name,
                "candidate": name,
                "verdict": verdict(family, hard, solution),
            }
            for name, solution in family.solutions.items()
        ]
