"""The gradient of an LM head whose memory is taken away between forward and backward."""

from contextlib import contextmanager

import pytest
import torch

import fastpg
from fastpg.integrations.gathering import gathered_again


@contextmanager
def whole_again(values, parameter):
    """Does to a parameter what DeepSpeed's GatheredParameters does."""
    parameter.data = values[id(parameter)].clone()
    yield
    parameter.data = torch.empty(0)


@pytest.mark.parametrize("with_entropy", [False, True])
def test_a_parameter_whose_memory_is_taken_away_is_gathered_again_in_backward(with_entropy):
    weight, bias = torch.nn.Parameter(torch.randn(9, 4)), torch.nn.Parameter(torch.randn(9))
    hidden, labels = torch.randn(5, 4, requires_grad=True), torch.randint(9, (5,))
    parameters = (weight, bias)
    values = {id(x): x.detach().clone() for x in parameters}

    def loss():
        result = fastpg.linear_token_logprobs(
            hidden, weight, labels, bias=bias, return_entropy=with_entropy
        )
        return sum(x.sum() for x in result) if with_entropy else result.sum()

    expected = torch.autograd.grad(loss(), (hidden, *parameters))
    with gathered_again(parameters, lambda parameter: whole_again(values, parameter)):
        total = loss()
    for x in parameters:
        x.data = torch.empty(0)
    found = torch.autograd.grad(total, (hidden, *parameters))
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
