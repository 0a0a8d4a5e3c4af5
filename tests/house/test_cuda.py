"""What only a GPU can show: streams, graphs, a second device, and that no call waits."""

import pytest
import torch

import fastpg

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def gradients(function, x):
    """Outputs of function(x), and the gradient of their sum."""
    x = x.detach().requires_grad_()
    out = function(x)
    out = [y for y in (out if isinstance(out, tuple) else [out]) if isinstance(y, torch.Tensor)]
    return [*out, *torch.autograd.grad(sum(y.sum() for y in out), x)]


CALLS = {
    "gae": lambda x: fastpg.gae(x, x.detach() + 1, x.detach() > 0.2, gamma=0.9, lam=0.8),
    "kl_estimate": lambda x: fastpg.kl_estimate(x, 1 - x.detach(), kind="k2"),
    "policy_loss": lambda x: fastpg.policy_loss(x, x.detach() - 0.5, 0.3 + x.detach()),
    "policy_loss, sequence": lambda x: fastpg.policy_loss(
        x, x.detach() - 0.5, 0.3 + x.detach(), old_logp=x.detach() + 0.1, level="sequence"
    ),
    "token_logprobs": lambda x: fastpg.token_logprobs(
        x, torch.zeros(len(x), dtype=torch.int64, device=x.device), return_entropy=True
    ),
    "value_loss": lambda x: fastpg.value_loss(x, 1 - x.detach(), 0.3 + x.detach()),
    "whiten": lambda x: fastpg.whiten(x, x.detach() > 0.2),
}

every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def sample(device="cuda"):
    return torch.rand(5, 1300, device=device)


def assert_same(ours, expected):
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@every_call
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_no_call_waits_for_the_gpu(call):
    x = sample()
    gradients(call, x)  # compiles, and makes what later calls find
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(call, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_call
def test_a_graph_replays_it(call):
    x = sample()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gradients(call, x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(call, x)
    x.copy_(sample())
    for _ in range(2):  # the second finds what the first has left
        graph.replay()
        assert_same(captured, gradients(call, x))


@every_call
def test_it_runs_on_the_current_stream(call):
    x = sample()
    expected = gradients(call, x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # so that the input comes late
        ours = gradients(call, x + 0.0)
    torch.cuda.current_stream().wait_stream(stream)
    assert_same(ours, expected)


@every_call
def test_it_runs_on_the_device_of_its_tensors(call):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs a second GPU")
    x = sample("cuda:1")
    ours = gradients(call, x)
    with torch.cuda.device(1):
        assert_same(ours, gradients(call, x))
    assert torch.cuda.current_device() == 0
