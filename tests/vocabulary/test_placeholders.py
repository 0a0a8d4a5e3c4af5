"""A head of ZeRO-3, which has no memory but when it is gathered: as a head that has."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from bench.inputs import head_and_labels
from fastpg import linear_token_logprobs, linear_token_loss
from tests.zero3 import parameter_of_zero3, stand_for_deepspeed

VOCAB, WIDTH = 37, 8


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def gathering(monkeypatch):
    return stand_for_deepspeed(monkeypatch)


@pytest.fixture(params=[True, False], ids=["in parts", "whole"])
def placed(request):
    """Makes a parameter that can be read in parts, or one that cannot."""
    return partial(parameter_of_zero3, in_plain_parts=request.param)


def total_loss(logp, _entropy, _rows):
    return logp.sum(), None


def plain(hidden, weight, labels, **options):
    return linear_token_logprobs(hidden, weight, labels, **options).sum()


def with_entropy(hidden, weight, labels, **options):
    logp, entropy = linear_token_logprobs(hidden, weight, labels, return_entropy=True, **options)
    return (logp + entropy.square()).sum()


def several(hidden, weight, labels, **options):
    labels = torch.stack([labels, labels.flip(0)], -1)
    found = linear_token_logprobs(
        hidden, weight, labels, row_statistics=("sum_p_squared",), **options
    )
    return found.logp.sum() + found.sum_p_squared.sum()


def over_sets(hidden, weight, labels, **options):
    kept = torch.stack([labels, torch.full_like(labels, VOCAB - 1)], -1)
    support = kept.flatten(), 2 * torch.arange(len(labels) + 1)
    return linear_token_logprobs(hidden, weight, labels, support=support, **options).sum()


def loss(hidden, weight, labels, **options):
    return linear_token_loss(hidden, weight, labels, total_loss, **options)[0]


def loss_at_once(hidden, weight, labels, **options):
    return loss(hidden, weight, labels, level="sequence", **options)


def adapted(hidden, weight, labels, **options):
    """A head with an adapter that ZeRO-3 leaves alone, as it does with what is small."""
    low = torch.linspace(-1, 1, VOCAB)[:, None].requires_grad_()
    pairs = (hidden, hidden[:, :1]), (weight, low)
    return linear_token_logprobs(*pairs, labels, **options).sum()


CALLS = [plain, with_entropy, several, over_sets, loss, loss_at_once, adapted]


def inputs():
    hidden, weight, bias, labels = head_and_labels((6,), VOCAB, WIDTH)
    return hidden.requires_grad_(), weight, bias, labels.clamp(max=VOCAB - 2)


@pytest.mark.parametrize("call", CALLS)
def test_it_has_the_results_and_gradients_of_a_whole_head(call, placed):
    hidden, weight, bias, labels = inputs()
    leaves = [x.clone().requires_grad_() for x in (weight, bias)]
    expected = call(hidden, leaves[0], labels, bias=leaves[1])
    gradients = torch.autograd.grad(expected, (hidden, *leaves))
    parameters = [placed(x) for x in (weight, bias)]
    found = call(hidden, parameters[0], labels, bias=parameters[1])
    assert torch.equal(found, expected) and all(x.shape == (0,) for x in parameters)
    found.backward()
    for ours, want in zip([hidden, *parameters], gradients, strict=True):
        torch.testing.assert_close(ours.grad, want, rtol=1e-6, atol=1e-6)
    assert all(x.shape == (0,) for x in parameters)


@pytest.mark.parametrize("call", [plain, with_entropy, several, over_sets, loss_at_once, adapted])
def test_the_graph_keeps_no_memory_of_it(call, gathering):
    hidden, weight, _, labels = inputs()
    parameter = parameter_of_zero3(weight, in_plain_parts=False)
    found = call(hidden, parameter, labels)
    assert gathering.gathered == 1
    found.backward()
    assert gathering.gathered > 1 and parameter.grad is not None


def test_it_may_be_used_twice_in_a_graph_and_by_a_second_backward(placed):
    hidden, weight, bias, labels = inputs()
    parameters = [placed(x) for x in (weight, bias)]
    leaves = [x.clone().requires_grad_() for x in (weight, bias)]

    def twice(weight, bias):
        first = with_entropy(hidden, weight, labels, bias=bias)
        return first + 2 * several(hidden[:4], weight, labels[:4], bias=bias)

    found, expected = twice(*parameters), twice(*leaves)
    for keep in (True, False):
        found.backward(retain_graph=keep)
        expected.backward(retain_graph=keep)
    for ours, want in zip(parameters, leaves, strict=True):
        torch.testing.assert_close(ours.grad, want.grad)
        assert ours.shape == (0,)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_needs_no_graph(mode):
    hidden, weight, _, labels = inputs()
    parameter, expected = parameter_of_zero3(weight), plain(hidden, weight, labels)
    with mode():
        assert torch.equal(plain(hidden, parameter, labels), expected)
    assert parameter.shape == (0,)


def test_torch_autograd_grad_leaves_it_empty(placed):
    hidden, weight, _, labels = inputs()
    parameter = placed(weight)
    (found,) = torch.autograd.grad(with_entropy(hidden, parameter, labels), parameter)
    assert found.shape == weight.shape and parameter.shape == (0,)


def test_it_may_be_gathered_around_the_call(gathering):
    hidden, weight, _, labels = inputs()
    parameter = parameter_of_zero3(weight)
    with gathering([parameter]):
        found = with_entropy(hidden, parameter, labels)
    assert torch.equal(found, with_entropy(hidden, weight, labels))
    found.backward()
    assert parameter.grad.shape == weight.shape and parameter.shape == (0,)
    with gathering([parameter]):
        with_entropy(hidden, parameter, labels).backward()
        assert torch.equal(parameter, weight)


def test_a_frozen_one_is_gathered_once(gathering):
    hidden, weight, _, labels = inputs()
    parameter = parameter_of_zero3(weight, in_plain_parts=False).requires_grad_(False)
    plain(hidden, parameter, labels).backward()
    assert gathering.gathered == 1 and hidden.grad.abs().sum() > 0


def test_it_follows_autocast():
    hidden, weight, _, labels = inputs()
    parameter, leaf = parameter_of_zero3(weight), weight.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = plain(hidden, parameter, labels), plain(hidden, leaf, labels)
    torch.autograd.backward([found, expected])
    assert torch.equal(found, expected) and torch.equal(parameter.grad, leaf.grad)


def test_it_recomputes_in_a_checkpoint(placed):
    hidden, weight, _, labels = inputs()
    parameter, leaf = placed(weight), weight.clone().requires_grad_()
    for x in (parameter, leaf):
        checkpoint(with_entropy, hidden, x, labels, use_reentrant=False).backward()
    assert torch.equal(parameter.grad, leaf.grad)


def test_bad_arguments_raise_and_leave_it_empty():
    hidden, weight, _, labels = inputs()
    parameter = parameter_of_zero3(weight)
    with pytest.raises(ValueError, match=r"weight \[V, H\], got \(6, 7\) and \(37, 8\)"):
        linear_token_logprobs(hidden[:, 1:], parameter, labels)
    with pytest.raises(IndexError, match="labels holds 40"):
        linear_token_logprobs(hidden, parameter, torch.full_like(labels, 40))
    with pytest.raises(TypeError, match=r"weight is torch.float64, must be of hidden's"):
        linear_token_logprobs(hidden, parameter_of_zero3(weight.double()), labels)
    assert parameter.shape == (0,)


def test_the_default_device_does_not_show():
    hidden, weight, _, labels = inputs()
    here, _ = linear_token_loss(hidden, parameter_of_zero3(weight), labels, total_loss)
    with torch.device("meta"):
        elsewhere, _ = linear_token_loss(hidden, parameter_of_zero3(weight), labels, total_loss)
    assert torch.equal(here, elsewhere)


def test_torch_compile_says_to_gather_it():
    hidden, weight, _, labels = inputs()
    compiled = torch.compile(linear_token_logprobs, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"ZeRO-3 placeholder: under torch.compile, call within"):
        compiled(hidden, parameter_of_zero3(weight), labels)
