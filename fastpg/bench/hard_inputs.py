"""Inputs that are hard to get right, on the default device."""

from __future__ import annotations

import torch
from torch import Tensor

from .inputs import head_and_labels, logits_and_labels
from .peers import LeftOutError

ROWS, VOCAB, FIRST_BLOCK = 6, 9001, 4096
IGNORED = -100
INF, NAN = float("inf"), float("nan")
BEYOND = 2**31  # elements: an int32 offset ends before


def plain_logits() -> tuple[Tensor, Tensor]:
    """Logits that are not hard yet."""
    return logits_and_labels(ROWS, VOCAB)


def first_block_impossible() -> tuple[Tensor, Tensor]:
    """A running maximum over blocks begins at -inf."""
    logits, labels = plain_logits()
    logits[:, :FIRST_BLOCK] = -INF
    return logits, labels.clamp(min=FIRST_BLOCK)


def padded_vocabulary() -> tuple[Tensor, Tensor]:
    """The last columns belong to no token."""
    logits, labels = plain_logits()
    logits[:, -512:] = -INF
    return logits, labels.clamp(max=VOCAB - 513)


def one_token_possible() -> tuple[Tensor, Tensor]:
    """Top-k sampling with k = 1."""
    logits, labels = plain_logits()
    logits = torch.full_like(logits, -INF).scatter(1, labels[:, None], 2.5)
    return logits, labels


def nearly_certain() -> tuple[Tensor, Tensor]:
    """1 - p is about e^-18, which fp32 does not see beside 1."""
    logits, labels = plain_logits()
    largest = logits.amax(-1, keepdim=True)
    return logits.scatter(1, labels[:, None], largest + 27.0), labels


def far_from_zero() -> tuple[Tensor, Tensor]:
    """exp of any logit is infinite."""
    logits, labels = plain_logits()
    return logits + 1000.0, labels


def shifted_view() -> tuple[Tensor, Tensor]:
    """logits[:, :-1] of a batch, transposed: no stride is usual."""
    logits, labels = logits_and_labels((2, 4), VOCAB)
    view = logits.permute(2, 1, 0)[:, :-1].permute(2, 1, 0)
    return view[1], labels[1, :-1]


def one_row_expanded() -> tuple[Tensor, Tensor]:
    """A stride of 0."""
    logits, labels = plain_logits()
    return logits[:1].expand(ROWS, VOCAB), labels


def labels_at_the_edge() -> tuple[Tensor, Tensor]:
    """The first and the last token."""
    logits, _ = plain_logits()
    return logits, torch.tensor([0, VOCAB - 1]).repeat(ROWS // 2)


def beyond_int32() -> tuple[Tensor, Tensor]:
    """Rows that begin more than 2^31 elements apart; a CPU only touches the few that are read."""
    needed = 2 * (BEYOND + VOCAB)
    if torch.get_default_device().type == "cuda" and torch.cuda.mem_get_info()[0] < 2 * needed:
        raise LeftOutError("it takes 4 GiB")
    logits, labels = logits_and_labels(2, VOCAB, torch.bfloat16)
    memory = torch.empty(BEYOND + VOCAB, dtype=torch.bfloat16)
    view = memory.as_strided((2, VOCAB), (BEYOND, 1))
    view.copy_(logits)
    return view, labels


def no_rows() -> tuple[Tensor, Tensor]:
    """An empty micro-batch."""
    logits, labels = plain_logits()
    return logits[:0], labels[:0]


def all_rows_masked() -> tuple[Tensor, Tensor]:
    """Labels of -100 count as 0, and nothing of their rows is read."""
    logits, labels = plain_logits()
    logits[0, 5] = NAN
    return logits, torch.full_like(labels, IGNORED)


def head_inputs() -> tuple[Tensor, Tensor, Tensor]:
    """A head that is not hard yet."""
    hidden, weight, _, labels = head_and_labels((ROWS,), VOCAB, 32)
    return hidden, weight, labels


def head_nearly_certain() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states that are the head's own rows, large."""
    _, weight, labels = head_inputs()
    return weight[labels] * 6.0, weight, labels


def head_without_rows() -> tuple[Tensor, Tensor, Tensor]:
    """An empty micro-batch."""
    hidden, weight, labels = head_inputs()
    return hidden[:0], weight, labels[:0]


def head_all_masked() -> tuple[Tensor, Tensor, Tensor]:
    """Labels of -100: the loss and its gradients are 0."""
    hidden, weight, labels = head_inputs()
    return hidden, weight, torch.full_like(labels, IGNORED)


def head_strided() -> tuple[Tensor, Tensor, Tensor]:
    """Every other hidden state, and a head that lies transposed."""
    hidden, weight, labels = head_inputs()
    return hidden.repeat_interleave(2, 0)[::2], weight.t().contiguous().t(), labels


def gae_inputs(length: int) -> tuple[Tensor, Tensor]:
    """Rewards and values."""
    rewards, values = torch.randn(2, 3, length)
    return rewards, values


def loss_inputs() -> list[Tensor]:
    """Log-probs, advantages, weights and old log-probs."""
    logp, advantages, noise = torch.randn(3, 64)
    logp = -logp.abs()
    return [logp, advantages, torch.full_like(logp, 1 / 64), logp + 0.1 * noise]


def loss_all_masked() -> tuple[Tensor, ...]:
    """Weights of 0 everywhere."""
    logp, advantages, weight, old_logp = loss_inputs()
    return logp, advantages, torch.zeros_like(weight), old_logp


def loss_with_garbage() -> tuple[Tensor, ...]:
    """NaN and inf in padding, where the weight is 0."""
    inputs = loss_inputs()
    inputs[2][40:] = 0.0
    for x, value in zip((inputs[0], inputs[1], inputs[3]), (NAN, INF, -INF), strict=True):
        x[50:] = value
    return tuple(inputs)


def loss_far_off_policy() -> tuple[Tensor, ...]:
    """A token whose probability grew by e^100, with a positive advantage: it is clipped."""
    logp, advantages, weight, old_logp = loss_inputs()
    old_logp[3], advantages[3] = logp[3] - 100.0, 1.0
    return logp, advantages, weight, old_logp
