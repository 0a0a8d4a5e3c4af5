"""A temperature for each token, as every op that makes log-probs takes it."""

import pytest
import torch

import fastpg

LABELS = torch.tensor([[3, 0, -100], [7, 5, 1]])
HIDDEN, HEAD_WEIGHT = torch.randn(2, 3, 6), torch.randn(9, 6)
KEPT = torch.tensor([0, 3, 0, 7, 5, 8, 1]), torch.tensor([0, 2, 3, 3, 4, 6, 7])


def token_logprobs(hidden, labels, **options):
    return fastpg.token_logprobs(hidden @ HEAD_WEIGHT.t(), labels, **options)


def linear_token_logprobs(hidden, labels, **options):
    return fastpg.linear_token_logprobs(hidden, HEAD_WEIGHT, labels, **options)


def linear_token_loss(hidden, labels, **options):
    def token_loss(logp, entropy, rows):
        return -logp.sum(), torch.zeros(1)

    return fastpg.linear_token_loss(hidden, HEAD_WEIGHT, labels, token_loss, **options)[0]


def policy_loss_from_logits(hidden, labels, **options):
    logits, ones = hidden @ HEAD_WEIGHT.t(), torch.ones(labels.shape)
    return fastpg.policy_loss_from_logits(logits, labels, ones, ones, **options)[0]


OPS = token_logprobs, linear_token_logprobs, linear_token_loss, policy_loss_from_logits


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [(2, 3), (6,)], ids=str)
def test_a_trailing_axis_of_one_changes_no_bit(op, shape):
    hidden, labels = HIDDEN.view(*shape, 6), LABELS.view(shape)
    temperature = torch.linspace(0.5, 2.0, 6).view(shape)
    results = []
    for given in temperature, temperature[..., None], temperature[..., None].bfloat16().float():
        x = hidden.clone().requires_grad_()
        result = op(x, labels, temperature=given)
        results.append((result, *torch.autograd.grad(result.sum(), x)))
    assert all(torch.equal(a, b) for a, b in zip(*results[:2], strict=True))
    assert not torch.equal(results[0][1], results[2][1])  # another temperature shows


@pytest.mark.parametrize("op", [token_logprobs, linear_token_logprobs])
def test_a_trailing_axis_of_one_goes_with_kept_sets(op):
    temperature = torch.linspace(0.5, 2.0, 6).view(2, 3)
    plain, trailing = (
        op(HIDDEN, LABELS, temperature=t, support=KEPT)
        for t in (temperature, temperature[..., None])
    )
    assert torch.equal(plain, trailing) and plain[0, 0] != 0


@pytest.mark.parametrize("op", OPS)
def test_an_axis_of_the_wrong_length_raises(op):
    with pytest.raises(ValueError, match=r"temperature \(2, 3, 2\) does not broadcast to labels"):
        op(HIDDEN, LABELS, temperature=torch.ones(2, 3, 2))
