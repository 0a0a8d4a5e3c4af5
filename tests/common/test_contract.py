"""What every public op promises, asked of every op by the examples of the benchmarks."""

import contextlib
import importlib
import re

import kernels
import numpy
import pytest
import torch
from registration import check_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastpg
from bench._example import examples, tensors_of
from fastpg._op import OPS, Op
from fastpg.ops.common.stats import Values

EXAMPLES = list(examples())
NOT_OPS = {"check", "extension_status", "kernels_of", "merge_stats"}

every_example = pytest.mark.parametrize("example", EXAMPLES, ids=str)
with_gradient = pytest.mark.parametrize(
    "example", [e for e in EXAMPLES if e.differentiable], ids=str
)


def gradients(example, **changed):
    """The gradients of the sum of the results by every differentiable argument."""
    leaves = example.leaves() | changed
    total = sum(x.sum() for x in example.call(**leaves) if x.requires_grad)
    return torch.autograd.grad(total, [leaves[name] for name in example.differentiable])


def recorded_calls(example):
    """Every operator that an example runs, forward and backward, with its inputs."""
    calls = []
    run = Op.__call__

    def recorded(op, x):
        calls.append((op, x))
        return run(op, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Op, "__call__", recorded)
        example.call()
        if example.differentiable:
            gradients(example)
    return calls


def has_operators(example):
    """Whether the op has operators of its own; else nothing is hidden from autograd and vmap."""
    return bool(recorded_calls(example))


def test_every_public_op_has_an_example():
    public = {name for name in fastpg.__all__ if name.islower()} - NOT_OPS
    assert {example.op for example in EXAMPLES} == public


class Sharded(torch.Tensor):
    """What a check can tell a DTensor by."""

    def full_tensor(self):
        """Gathers the parts of all ranks."""
        raise AssertionError("no op asks for it")


@every_example
def test_a_dtensor_is_refused_by_its_name(example):
    """torch's own message is that DTensors and tensors are mixed, and then that neither will do.

    The head of the linear ops is taken: tests/vocabulary/test_sharded_head.py.
    """
    taken = ("weight", "bias") if example.op.startswith("linear_") else ()
    for name, value in example.arguments.items():
        if not isinstance(value, torch.Tensor) or name in taken:
            continue
        with pytest.raises(TypeError, match=rf"{name} is a DTensor: pass {name}\."):
            example.call(**{name: value.as_subclass(Sharded)})


@every_example
def test_inputs_are_not_modified(example):
    before = {
        name: value.clone()
        for name, value in example.arguments.items()
        if isinstance(value, torch.Tensor)
    }
    example.call()
    if example.differentiable:
        gradients(example)
    for name, value in before.items():
        assert torch.equal(example.arguments[name], value), name


@every_example
def test_results_are_contiguous_and_the_same_again(example):
    results = example.call()
    assert all(x.is_contiguous() for x in results)
    assert all(torch.equal(a, b) for a, b in zip(results, example.call(), strict=True))


def kernels_of_examples():
    for example in EXAMPLES:
        for kind in kernels.kinds_of(example.op) if kernels.ops_of(example.op) else []:
            if kind != "reference":
                yield pytest.param(example, kind, id=f"{example}-{kind}")


@pytest.mark.parametrize(("example", "kind"), list(kernels_of_examples()))
def test_every_kernel_agrees_with_the_reference(example, kind, monkeypatch, request):
    with monkeypatch.context() as patch:
        kernels.run_with(patch, "reference", example.op, request.config.cache)
        expected = example.call()
        expected += gradients(example) if example.differentiable else []
    kernels.run_with(monkeypatch, kind, example.op, request.config.cache)
    # Triton's interpreter computes with numpy, which warns of infinities.
    with kernels.instruction_set(kind), numpy.errstate(all="ignore"):
        results = example.call()
        results += gradients(example) if example.differentiable else []
    for ours, theirs in zip(results, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)


@with_gradient
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_gradient_that_is_to_be_differentiated_raises(example, checkpointed):
    """A penalty on it would be dropped in silence where torch.autograd.grad is given inputs."""
    if not has_operators(example):
        pytest.skip("its gradient is torch's own, which can be differentiated")
    leaves = example.leaves()

    def first_result(*inputs):
        return example.call(**dict(zip(leaves, inputs, strict=True)))[0]

    inputs = list(leaves.values())
    if checkpointed:
        out = checkpoint(first_result, *inputs, use_reentrant=False)
    else:
        out = first_result(*inputs)
    message = f"{example.op}: its gradient is not differentiable, double backward"
    with pytest.raises(RuntimeError, match=message):
        torch.autograd.grad(out.sum(), inputs, create_graph=True)


@with_gradient
def test_memory_exchanged_before_backward_raises(example):
    """By x.data = y, as ZeRO does: a kernel would read beyond it."""
    if not has_operators(example):
        pytest.skip("torch's own ops look at what they saved")
    leaves = example.leaves()
    shapes = [x.shape for x in leaves.values()]
    total = sum(x.sum() for x in example.call(**leaves) if x.requires_grad)
    for leaf in leaves.values():
        leaf.data = torch.cat([leaf.data, leaf.data])
    try:
        got = torch.autograd.grad(total, list(leaves.values()))
    except RuntimeError as error:
        assert re.match(rf"{example.op}: a tensor that was saved for backward was", str(error))
    else:  # it saved nothing of its inputs
        assert [x.shape for x in got] == shapes


@with_gradient
def test_statistics_have_no_gradient(example):
    results = example.function(**example.arguments | example.leaves())
    records = results if type(results) is tuple else (results,)
    statistics = [x.values for x in records if isinstance(x, Values)]
    if not statistics:
        pytest.skip("it returns none")
    assert not any(x.requires_grad for x in statistics)


@every_example
def test_vmap_raises(example):
    if not has_operators(example):
        pytest.skip("torch.vmap knows the ops that it is made of")
    name = (*example.differentiable, *example.arguments)[0]
    batch = torch.stack([example.arguments[name]] * 2)
    with pytest.raises(RuntimeError, match="vmap"):
        torch.vmap(lambda x: tuple(example.call(**{name: x})))(batch)


@every_example
def test_a_refused_transform_leaves_nothing_behind(example):
    """What it made must not be found by a later call: the same temperature, for instance."""
    before = example.call()
    name = (*example.differentiable, *example.arguments)[0]

    def total(x):
        return sum(result.sum() for result in example.call(**{name: x}))

    with contextlib.suppress(RuntimeError):
        torch.func.grad(total)(example.arguments[name].clone())
    assert all(torch.equal(a, b) for a, b in zip(before, example.call(), strict=True))


@every_example
def test_an_argument_of_the_wrong_type_is_named(example):
    for name, value in example.arguments.items():
        if not isinstance(value, bool):  # Any object is true or false.
            with pytest.raises((TypeError, ValueError), match=rf"^\w+: .*{re.escape(name)}"):
                example.function(**example.arguments | {name: object()})


def test_the_examples_run_every_operator():
    seen = {op.name for example in EXAMPLES for op, _ in recorded_calls(example)}
    assert seen >= set(OPS) - RUN_ELSEWHERE


# Operators of a path that takes several processes, or memory that is given away.
RUN_ELSEWHERE = {
    "linear_token_logprobs_part",
    "policy_loss_from_logits_scale",
    "whiten_moments",
}


class Seen(TorchDispatchMode):
    """Notes the operators of fastpg that torch's dispatcher is asked for."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastpg":
            self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:.*Profiler clears events:UserWarning")  # that of torch 2.12
@every_example
def test_an_op_that_goes_past_the_dispatcher_gives_the_same_bits(example):
    """A call takes a third less so; whoever listens to torch's dispatcher still hears of it."""
    if not has_operators(example):
        pytest.skip("it has no operator of its own")
    results = example.call()
    results += gradients(example) if example.differentiable else []
    with Seen() as seen:
        dispatched = example.call()
        dispatched += gradients(example) if example.differentiable else []
    assert all(torch.equal(a, b) for a, b in zip(results, dispatched, strict=True))
    with torch.profiler.profile() as profile:
        example.call()
    first = f"fastpg::{recorded_calls(example)[0][0].name}"
    assert first in seen.names
    assert first in {event.key for event in profile.key_averages()}


@every_example
def test_a_sign_that_is_still_to_be_applied_is_applied(example):
    """torch.Tensor.imag of a conjugate holds the numbers with the other sign, and a mark."""
    floats = {
        name: value
        for name, value in example.arguments.items()
        if isinstance(value, torch.Tensor) and value.dtype is torch.float32
    }
    if not floats:
        pytest.skip("no argument is a float")
    marked = {name: torch.complex(-x, -x).conj().imag for name, x in floats.items()}
    assert all(x.is_neg() for x in marked.values())
    for ours, plain in zip(example.call(**marked), example.call(), strict=True):
        assert torch.equal(ours, plain)


@every_example
def test_registration(example):
    for op, x in recorded_calls(example):
        check_registration(op, x, traced=True)


# Ops of torch that launch nothing.
NO_LAUNCH = ("empty", "view", "detach", "alias", "expand", "select", "squeeze", "reshape")


class Launches(TorchDispatchMode):
    """Counts the kernels of Triton and the ops of torch that would launch one."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.names, self.inside = [], False
        interpreter = importlib.import_module("triton.runtime.interpreter")
        run = interpreter.InterpretedFunction.run

        def counted(kernel, *args, **options):
            self.names.append(kernel.fn.__name__)
            self.inside = True  # The interpreter copies with ops of torch.
            run(kernel, *args, **options)
            self.inside = False

        monkeypatch.setattr(interpreter.InterpretedFunction, "run", counted)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removeprefix("aten.")
        if not self.inside and not any(part in name for part in NO_LAUNCH):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


counted = [e for e in EXAMPLES if e.forward_launches is not None]


@pytest.mark.skipif(
    not kernels.TRITON or kernels.GPU, reason="launches are counted in Triton's interpreter"
)
@pytest.mark.parametrize("example", counted, ids=str)
def test_an_op_takes_a_few_launches(example, monkeypatch, request):
    kernels.run_with(monkeypatch, "triton", example.op, request.config.cache)
    leaves = example.leaves()
    with Launches(monkeypatch) as seen:
        results = example.call(**leaves)
        assert len(seen.names) <= example.forward_launches, seen.names
        if not leaves:
            return
        upstream = torch.ones_like(results[0])
        seen.names.clear()
        torch.autograd.grad(results[0], list(leaves.values()), upstream)
        assert len(seen.names) <= example.backward_launches, seen.names


PRODUCTS_OF_KEPT_SETS = {"sampled_product", "sparse_product"}  # of PyTorch on a GPU: README says so


def test_every_op_has_a_kernel_that_needs_no_toolkit():
    """CUDA C++ needs an nvcc; so every op that it serves has a kernel in Triton as well."""
    for op in OPS.values():
        if fastpg.kernels_of()[op.name]["CUDA"] in ("CUDA C++", "Triton"):
            module = importlib.import_module(f"{op.page}_triton")
            assert hasattr(module, op.name), op.name
        elif op.name not in PRODUCTS_OF_KEPT_SETS:
            assert fastpg.kernels_of()[op.name]["CUDA"] in ("BLAS", "PyTorch"), op.name


def test_statistics_are_tensors_too():
    loss, stats = fastpg.value_loss(torch.ones(2), torch.zeros(2), torch.ones(2))
    assert len(tensors_of((loss, stats))) == 2
