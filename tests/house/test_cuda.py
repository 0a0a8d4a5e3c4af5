"""What only a GPU can show: streams, graphs, a second device, and that no call waits."""

from dataclasses import replace

import pytest
import torch

from bench._example import examples

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


# The linear ops wait for the number of rows that are left.
EXAMPLES = [e for e in examples() if not e.op.startswith("linear_")]
every_example = pytest.mark.parametrize("number", range(len(EXAMPLES)), ids=map(str, EXAMPLES))


def example_on(number, device="cuda"):
    """An example with its tensors on a device."""
    example = EXAMPLES[number]
    arguments = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in example.arguments.items()
    }
    return replace(example, arguments=arguments)


def changed(example, change):
    """The example with every tensor of numbers changed."""
    arguments = {
        name: change(value) if name in floats_of(example) else value
        for name, value in example.arguments.items()
    }
    return replace(example, arguments=arguments)


def floats_of(example):
    """The arguments that are tensors of numbers."""
    return [
        name
        for name, value in example.arguments.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    ]


def outputs(example):
    """What a call returns, and the gradients of its sum."""
    leaves = example.leaves()
    results = example.call(**leaves)
    if not leaves:
        return results
    total = sum(x.sum() for x in results if x.requires_grad)
    return [*results, *torch.autograd.grad(total, list(leaves.values()))]


def assert_same(ours, expected):
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@every_example
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_no_call_waits_for_the_gpu(number):
    example = example_on(number)
    outputs(example)  # compiles, and makes what later calls find
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs(example)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_example
def test_a_graph_replays_it(number):
    example = example_on(number)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        outputs(example)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = outputs(example)
    for name in floats_of(example):
        example.arguments[name].copy_(example.arguments[name].flip(0))
    for _ in range(2):  # the second finds what the first has left
        graph.replay()
        assert_same(captured, outputs(example))


@every_example
def test_it_runs_on_the_current_stream(number):
    example = example_on(number)
    expected = outputs(example)
    late = example_on(number)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # so that the inputs come late
        ours = outputs(changed(late, lambda x: x + 0))
    torch.cuda.current_stream().wait_stream(stream)
    assert_same(ours, expected)


@every_example
def test_it_runs_on_the_device_of_its_tensors(number):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs a second GPU")
    example = example_on(number, "cuda:1")
    ours = outputs(example)
    with torch.cuda.device(1):
        assert_same(ours, outputs(example))
    assert torch.cuda.current_device() == 0
