"""The gradient of an LM head that is in parts."""

from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import fastpg
from fastpg.integrations.gathering import gathered, gathered_again


def logp_sum(hidden, weight, labels):
    """A loss of one rank's rows."""
    return fastpg.linear_token_logprobs(hidden, weight, labels).sum()


def on_each_rank(rank, folder):
    """Two ranks with rows of their own, and a half of the head each."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 4, generator=generator)
    hidden = torch.randn(2, 6, 4, generator=generator)
    labels = torch.randint(8, (2, 6), generator=generator)
    whole = weight.clone().requires_grad_()
    (logp_sum(hidden, whole, labels) / 2).backward()
    parts = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
    logp_sum(hidden[rank], gathered(parts), labels[rank]).backward()
    torch.testing.assert_close(parts.grad.full_tensor(), whole.grad)
    dist.destroy_process_group()


@pytest.mark.slow
def test_the_gradient_of_a_dtensor_is_the_mean_over_the_ranks(tmp_path):
    mp.spawn(on_each_rank, (tmp_path,), nprocs=2)


def test_another_tensor_is_as_it_is():
    x = torch.randn(2)
    assert gathered(x) is x


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
