"""Generalised advantage estimation: one reverse affine scan.

    δ_t = ρ_t (r_t + γ_t (1 − terminated_t) V_next − V_t)
    A_t = δ_t + γ_t λ_t c_t (1 − done_t) A_next         done = terminated | truncated
    R_t = A_t + V_t

Terminated cuts the bootstrap, done cuts the trace. V_next and A_next belong to the next unmasked
token of the sequence. V_next of a truncated token is the bootstrap there; that of the last unmasked
token is the bootstrap of the sequence, or 0. ρ and c are 1, or clipped ratios, as for V-trace.

Backward is the adjoint, a forward scan, with p the unmasked token before t; a done p sends nothing:

    G_t = ∂A_t + ∂R_t + γ_p λ_p c_p G_p     ∂r_t = ρ_t G_t     ∂V_t = ∂R_t − ρ_t G_t + γ_p ρ_p G_p

and γ_t ρ_t G_t for the bootstrap that t read.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..._autograd import Differentiable
from ..._library import DTYPE_CODE, empty_like
from ..._op import Op
from ..common import checks
from . import gae_options

GROUP_TOKENS = 1024  # kGroupTokens of csrc/credit/gae.h


class Inputs(NamedTuple):
    rewards: Tensor  # [B, T], or packed [N] with cu_seqlens; fp32 or fp64
    values: Tensor | None  # like rewards; None: 0
    bootstrap: Tensor | None  # like rewards with `truncated`, else [B]; None: 0
    mask: Tensor | None  # bool, like rewards; None: every token counts
    gammas: Tensor | None  # like rewards, or [B]; None: `gamma` for all
    lams: Tensor | None  # like rewards, or [B]; None: `lam` for all
    rho: Tensor | None  # like rewards; None: 1
    c: Tensor | None  # like rewards; None: 1
    terminated: Tensor | None  # bool, like rewards; None: no token inside a sequence is
    truncated: Tensor | None  # bool, like rewards; None: no token is
    cu_seqlens: Tensor | None  # int32 [B + 1]; None: padded
    gamma: float
    lam: float


class Outputs(NamedTuple):
    advantages: Tensor  # like rewards
    returns: Tensor  # like rewards


class BackwardInputs(NamedTuple):
    inputs: Inputs
    grad_advantages: Tensor  # like rewards
    grad_returns: Tensor  # like rewards


class Gradients(NamedTuple):
    grad_rewards: Tensor  # like the input; empty, if there was none
    grad_values: Tensor
    grad_bootstrap: Tensor


class Tokens(NamedTuple):
    """What the scan knows of every token. All are [B, T] (packed: [1, N]), numbers in fp64."""

    kept: Tensor  # It is not masked.
    ends: Tensor  # It is the last of its sequence, masked or not.
    done: Tensor  # It is terminated or truncated: its trace is cut.
    reads: Tensor  # The value that follows it is a bootstrap.
    gamma: Tensor
    rho: Tensor
    trace: Tensor  # A_t = δ_t + trace_t A_{t+1}. A masked token hands on what follows it.


def as_grid(x: Tensor | None, default: float, inputs: Inputs) -> Tensor:
    """x as fp64 [B, T] (packed: [1, N]), whether it is given per token, per sequence or not."""
    tokens, cu_seqlens = inputs.rewards, inputs.cu_seqlens
    if x is None:
        x = torch.full(tokens.shape, default, dtype=torch.float64, device=tokens.device)
    elif x.shape != tokens.shape:
        x = checks.to_tokens(x, tokens, cu_seqlens)
    return x.double() if cu_seqlens is None else x.double()[None]


def tokens_of(x: Inputs) -> Tokens:
    """Brings every option into one form, per token."""
    # A masked token gets factors of 1, for it hands on what follows it; its own may hold NaN.
    kept = as_grid(x.mask, 1.0, x) != 0
    terminal = as_grid(x.terminated, 0.0, x) != 0
    cut = as_grid(x.truncated, 0.0, x) != 0
    gamma = torch.where(kept, as_grid(x.gammas, x.gamma, x), 1.0)
    lam = torch.where(kept, as_grid(x.lams, x.lam, x), 1.0)
    rho = torch.where(kept, as_grid(x.rho, 1.0, x), 1.0)
    c = torch.where(kept, as_grid(x.c, 1.0, x), 1.0)
    length = x.rewards.shape[-1]
    stop: int | Tensor = length  # where the sequence of a token ends
    if x.cu_seqlens is not None:
        stop = checks.to_tokens(x.cu_seqlens[1:], x.rewards, x.cu_seqlens)
    position = torch.arange(1, length + 1, device=x.rewards.device)
    ends = (position == stop).expand_as(kept)
    done = kept & (terminal | cut)
    reads = ends & ~done if x.truncated is None else done & ~terminal
    trace = torch.where(ends | done, 0.0, gamma * lam * c)
    return Tokens(kept, ends, done, reads, gamma, rho, trace)


def scan_back(a: Tensor, b: Tensor) -> Tensor:
    """x_t = b_t + a_t x_{t+1}, from the last token to the first."""
    out, x = torch.empty_like(b), b.new_zeros(len(b))
    for t in reversed(range(b.shape[1])):
        # A trace that is cut lets nothing through: 0 times an infinite x would be NaN.
        x = torch.where(a[:, t] == 0, b[:, t], b[:, t] + a[:, t] * x)
        out[:, t] = x
    return out


def scan_forward(a: Tensor, b: Tensor) -> Tensor:
    """x_t = b_t + a_t x_{t-1}, from the first token to the last."""
    return scan_back(a.flip(1), b.flip(1)).flip(1)


def reference(x: Inputs) -> Outputs:
    """The specification: the formulas at the top of this page, scanned token by token in fp64."""
    checks.check_cu_seqlens("gae", x.cu_seqlens, x.rewards)
    tokens = tokens_of(x)
    bootstrap = x.bootstrap
    if bootstrap is not None and x.truncated is None:
        bootstrap = checks.to_tokens(bootstrap, x.rewards, x.cu_seqlens)
    rewards = as_grid(x.rewards, 0.0, x)
    values = torch.where(tokens.kept, as_grid(x.values, 0.0, x), 0.0)
    follows = torch.where(tokens.reads, as_grid(bootstrap, 0.0, x), 0.0)
    # A masked token hands on the value of the next unmasked one.
    hands_on = (~(tokens.kept | tokens.ends)).double()
    value_from = scan_back(hands_on, torch.where(tokens.kept, values, follows))
    # What roll brings from the first token to the last is not read: the last token is an end.
    next_value = torch.where(tokens.ends | tokens.done, follows, value_from.roll(-1, 1))
    error = tokens.rho * (rewards + tokens.gamma * next_value - values)
    delta = torch.where(tokens.kept, error, 0.0)
    advantages = torch.where(tokens.kept, scan_back(tokens.trace, delta), 0.0)
    returns = advantages + values
    return Outputs(
        advantages.reshape(x.rewards.shape).to(x.rewards.dtype),
        returns.reshape(x.rewards.shape).to(x.rewards.dtype),
    )


def reference_backward(x: BackwardInputs) -> Gradients:
    """The adjoint: the second pair of formulas at the top of this page."""
    inputs, tokens = x.inputs, tokens_of(x.inputs)
    to_advantages = torch.where(tokens.kept, as_grid(x.grad_advantages, 0.0, inputs), 0.0)
    to_returns = torch.where(tokens.kept, as_grid(x.grad_returns, 0.0, inputs), 0.0)
    # A_t holds trace_t A_{t+1}, so a gradient arrives with the trace of the token before. The
    # first token gets that of the last, which is 0.
    grad = scan_forward(tokens.trace.roll(1, 1), to_advantages + to_returns)
    grad = torch.where(tokens.kept, tokens.rho * grad, 0.0)
    # What a token sends to the value that follows it, past masked tokens.
    hands_on = (~(tokens.kept | tokens.ends.roll(1, 1))).double()
    sent = scan_forward(hands_on, torch.where(tokens.done, 0.0, tokens.gamma * grad))
    received = torch.where(tokens.ends, 0.0, sent).roll(1, 1)  # The last token is an end.
    grad_values = torch.where(tokens.kept, to_returns - grad + received, 0.0)
    if inputs.truncated is not None:
        grad_bootstrap = torch.where(tokens.reads, tokens.gamma * grad, 0.0)
    else:
        final = torch.where(tokens.ends, sent, 0.0).reshape(inputs.rewards.shape)
        grad_bootstrap = checks.to_sequences(final, inputs.cu_seqlens)
    return Gradients(
        shaped_like(inputs.rewards, grad, inputs.rewards),
        shaped_like(inputs.values, grad_values, inputs.rewards),
        shaped_like(inputs.bootstrap, grad_bootstrap, inputs.rewards),
    )


def shaped_like(given: Tensor | None, gradient: Tensor, rewards: Tensor) -> Tensor:
    """The gradient in the shape and dtype of an input; empty for an input that was not given."""
    if given is None:
        return rewards.new_empty(0)
    return gradient.reshape(given.shape).to(given)


def allocate(x: Inputs) -> Outputs:
    """Empty advantages and returns."""
    return Outputs(empty_like(x.rewards), empty_like(x.rewards))


def allocate_gradients(x: BackwardInputs) -> Gradients:
    """An empty gradient for each differentiable input; one without elements if it is absent."""
    rewards, values, bootstrap = x.inputs.rewards, x.inputs.values, x.inputs.bootstrap
    return Gradients(
        empty_like(rewards),
        rewards.new_empty(0) if values is None else empty_like(values),
        rewards.new_empty(0) if bootstrap is None else empty_like(bootstrap),
    )


class Sizes(NamedTuple):
    """The integers that C++ takes first."""

    dtype: int
    sequence_count: int
    length: int  # of each sequence; of all together, where they are packed
    gamma_per_token: bool  # else gammas are per sequence
    lam_per_token: bool


def sizes(x: Inputs) -> Sizes:
    """The sizes of a padded or packed batch, and the form of gammas and lams."""
    shape = x.rewards.shape
    count = shape[0] if x.cu_seqlens is None else x.cu_seqlens.shape[0] - 1
    gamma_per_token = x.gammas is not None and x.gammas.shape == shape
    lam_per_token = x.lams is not None and x.lams.shape == shape
    return Sizes(DTYPE_CODE[x.rewards.dtype], count, shape[-1], gamma_per_token, lam_per_token)


def backward_sizes(x: BackwardInputs) -> Sizes:
    """The sizes for the backward op, those of its forward op."""
    return sizes(x.inputs)


class Scratch(NamedTuple):
    """What CUDA C++ takes besides: memory in which the blocks that share a sequence meet."""

    maps: Tensor | None = None  # fp64 [map_count, 2], a map for each group of tokens
    map_count: int = 0


def scratch(x: Inputs) -> Scratch:
    """The memory, where there are long sequences, and too few to give each to one block."""
    count, length = sizes(x)[1:3]
    if length <= 4 * GROUP_TOKENS or count > 256:
        return Scratch()
    map_count = x.rewards.numel() // GROUP_TOKENS + count
    return Scratch(x.rewards.new_empty(map_count, 2, dtype=torch.float64), map_count)


def backward_scratch(x: BackwardInputs) -> Scratch:
    """The memory for the backward op, as for its forward op."""
    return scratch(x.inputs)


gae_op = Op(
    "gae",
    Inputs,
    Outputs,
    page=__name__,
    reference=reference,
    allocate=allocate,
    sizes=sizes,
    scratch=scratch,
)
gae_backward_op = Op(
    "gae_backward",
    BackwardInputs,
    Gradients,
    page=__name__,
    reference=reference_backward,
    allocate=allocate_gradients,
    sizes=backward_sizes,
    scratch=backward_scratch,
)


def _forward(x: Inputs) -> tuple[Outputs, Inputs]:
    return gae_op(x), x


def _backward(x: Inputs, grad_advantages: Tensor | None, grad_returns: Tensor | None) -> Gradients:
    if grad_advantages is None:
        grad_advantages = torch.zeros_like(x.rewards)
    if grad_returns is None:
        grad_returns = torch.zeros_like(x.rewards)
    return gae_backward_op(BackwardInputs(x, grad_advantages, grad_returns))


_gae = Differentiable(
    "gae",
    inputs=Inputs,
    saved=Inputs,
    differentiable=("rewards", "values", "bootstrap"),
    forward=_forward,
    backward=_backward,
)


def _with_steps(x: Inputs, mask: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """The results where the masked tokens between unmasked ones are time steps of no reward."""
    inputs = x._replace(
        mask=steps,
        rewards=torch.where(mask, x.rewards, 0.0),
        values=None if x.values is None else torch.where(mask, x.values, 0.0),
        rho=None if x.rho is None else torch.where(mask, x.rho, 1.0),
        c=None if x.c is None else torch.where(mask, x.c, 1.0),
        terminated=None if x.terminated is None else x.terminated & mask,
        truncated=None if x.truncated is None else x.truncated & mask,
    )
    advantages, returns = _gae(inputs)
    return torch.where(mask, advantages, 0.0), torch.where(mask, returns, 0.0)


def gae(
    rewards: Tensor,
    values: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 1.0,
    terminated: Tensor | None = None,
    truncated: Tensor | None = None,
    bootstrap: Tensor | None = None,
    rho: Tensor | None = None,
    c: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    masked: Literal["skip", "step"] = "skip",
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: the advantage and the return of each token.

    A_t = δ_t + γ_t λ_t c_t (1 − done_t) A_next with δ_t = ρ_t (r_t + γ_t (1 − terminated_t) V_next
    − V_t), and R_t = A_t + V_t. The next token is the next unmasked one of the sequence.

    Args:
        rewards: [B, T], or packed [N] with cu_seqlens; any float dtype and strides; differentiable.
        values: V, like rewards; differentiable. None is 0: both results are then the reward-to-go.
        mask: Like rewards, bool or 0/1. A masked token is never read, and its results are 0.
        gamma: The discount in [0, 1]: a float, or a constant tensor [B] or like rewards.
        lam: λ in [0, 1]: a float, or a constant tensor [B] or like rewards.
        terminated: Where an episode ends for good: bool or 0/1, like rewards, or [B] for the last
            unmasked token of each sequence. None: that token is terminal, unless `truncated` marks
            it or, without `truncated`, a bootstrap is given.
        truncated: Where an episode was cut short; the same shapes. It needs a bootstrap of its
            shape. A token that is both is terminated.
        bootstrap: The value that follows: [B], after each sequence's last unmasked token, read
            where that is not terminated; or like rewards with such a `truncated`. Differentiable.
        rho: ρ, a constant like rewards that weighs the error of each token. None: 1.
        c: A constant like rewards that weighs the trace of each token. None: 1. With clipped
            importance ratios for rho and c the returns are the V-trace targets.
        cu_seqlens: int32 [B + 1], where packed sequences begin and end. If N = B, a tensor [N] is
            read per token; a bootstrap without `truncated` per sequence.
        masked: What a masked token is to those before it. "skip": nothing, they get what they would
            get without it, as in verl. "step": between unmasked tokens it is a time step of reward
            and value 0, ρ = c = 1, and the γ and λ that are given, as in OpenRLHF.

    Returns:
        (advantages, returns), each like rewards; fp32, or fp64 if rewards, values or bootstrap is.
        The scan itself is in fp64.

    Raises:
        TypeError: An argument is no tensor or number, or has a dtype that it cannot have.
        ValueError: A shape, a device or a value does not fit; the message names it.

    Example:
        >>> rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.5, 0.5]])
        >>> advantages, returns = fastpg.gae(rewards, values, gamma=1.0, lam=0.5)
        >>> advantages
        tensor([[0.1250, 0.2500, 0.5000]])

    Reference:
        Schulman et al. 2016, "High-dimensional continuous control using generalized advantage
        estimation", arXiv:1506.02438. V-trace: Espeholt et al. 2018, arXiv:1802.01561.
    """
    checks.check_choice("gae", "masked", masked, ("skip", "step"))
    dtype = checks.compute_dtype("gae", rewards=rewards, values=values, bootstrap=bootstrap)
    count = checks.sequence_count("gae", "rewards", rewards, cu_seqlens)
    checks.check_shape("gae", "values", values, rewards, rewards.shape)
    checks.check_shape("gae", "mask", mask, rewards, rewards.shape)
    mask = checks.as_bool("gae", "mask", mask)
    # The tokens whose gamma and lam are read.
    steps = mask if masked == "skip" else gae_options.steps(mask, rewards, cu_seqlens)
    gammas, gamma = gae_options.discount("gamma", gamma, rewards, steps, count, dtype)
    lams, lam = gae_options.discount("lam", lam, rewards, steps, count, dtype)
    if not (terminated is None and truncated is None and bootstrap is None):
        bootstrap, terminated, truncated = gae_options.endings(
            rewards,
            bootstrap=bootstrap,
            mask=mask,
            terminated=terminated,
            truncated=truncated,
            cu_seqlens=cu_seqlens,
            count=count,
        )
    inputs = Inputs(
        rewards=checks.cast(rewards, dtype),
        values=checks.cast(values, dtype),
        bootstrap=checks.cast(bootstrap, dtype),
        mask=mask,
        gammas=gammas,
        lams=lams,
        rho=gae_options.ratio("rho", rho, rewards, dtype),
        c=gae_options.ratio("c", c, rewards, dtype),
        terminated=terminated,
        truncated=truncated,
        cu_seqlens=cu_seqlens,
        gamma=gamma,
        lam=lam,
    )
    if masked == "step" and mask is not None and steps is not None:
        return _with_steps(inputs, mask, steps)
    return _gae(inputs)
