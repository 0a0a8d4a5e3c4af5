"""An op from one record of its inputs.

The inputs of an op are named once, in a NamedTuple on the op's page, a tensor first:

    class Inputs(NamedTuple):
        logp: Tensor  # any shape
        ref_logp: Tensor  # like logp
        kind: str  # a key of KINDS

    class Outputs(NamedTuple):
        kl: Tensor

    kl_estimate_op = Op(
        "kl_estimate", Inputs, Outputs,
        page=__name__,          # the module; kernels in Triton are in `<page>_triton.py`
        reference=reference,    # Inputs -> Outputs in plain PyTorch: the specification
        allocate=allocate,      # Inputs -> Outputs, empty: their shapes and dtypes
        sizes=sizes,            # Inputs -> the integers that C++ needs besides: a NamedTuple
        codes={"kind": KINDS},  # the integer that stands for a string in C++
    )

`kl_estimate_op(Inputs(...)).kl` runs torch's operator `fastpg::kl_estimate`. Its schema comes from
the records, and the first of these that exists for the device serves it:

    C++, CUDA C++   The function of this name in fastpg._C or fastpg._cuda. It takes the fields of
                    sizes, inputs and outputs in this order (csrc/common/bind.h). The names that it
                    exports are compared with those of the records when the page is imported.
    Triton          The function of this name in `<page>_triton.py`, from Inputs to Outputs.
    reference       The specification itself.

A kernel is a function from Inputs to Outputs, however it is written. torch's dispatcher finds it
for whoever calls the operator; where the dispatcher would do nothing besides, it is called at once.

A record may hold another: the inputs of a backward op hold the `Inputs` of its forward op.
`_autograd.Differentiable` makes the public function's gradient from two such ops.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import GenericAlias, ModuleType
from typing import Any, Generic, NamedTuple, TypeVar, get_type_hints

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn import Parameter

from ._library import _C, LIBRARY, _cuda, kernels, nothing_listens, reduction_scratch
from ._record import Layout

InputsT = TypeVar("InputsT", bound=NamedTuple)
OutputsT = TypeVar("OutputsT", bound=NamedTuple)

OPS: dict[str, Op] = {}  # every op by its name

# What C++ takes after the outputs: the scratch memory of an op that reduces tokens to statistics
# (csrc/common/stream.h), and the CUDA stream. On a CPU they are 0.
REDUCTION = ("parts", "blocks", "ticket")
NO_SCRATCH = (None, 0, None)
STREAM = "stream"

PLAIN_TENSORS = (Tensor, Parameter)  # other subclasses of Tensor are torch's dispatcher's business


class Op(Generic[InputsT, OutputsT]):
    """One operator of torch, made from the records of its inputs and outputs.

    Args:
        name: The operator's name in torch.ops.fastpg, and that of its kernels.
        inputs: The NamedTuple of its inputs. The first is a tensor.
        outputs: The NamedTuple of its outputs, tensors or lists of tensors.
        page: The module that defines the op.
        reference: The specification; it serves every device that has no kernel.
        allocate: Makes empty, contiguous outputs. torch.compile takes shapes and dtypes from it.
        sizes: Takes the inputs; returns the NamedTuple of integers that C++ takes first.
        codes: For each input that is a string, the integer that C++ knows each value by.
        statistics: How many statistics of all tokens the op reduces to; 0 if it does not reduce.
        scratch: Takes the inputs; returns the NamedTuple of what CUDA C++ takes besides: memory,
            and its size. Its defaults are for a CPU.
        mutates: The name of an input that the op writes to.
    """

    def __init__(
        self,
        name: str,
        inputs: type[InputsT],
        outputs: type[OutputsT],
        *,
        page: str,
        reference: Callable[[InputsT], OutputsT],
        allocate: Callable[[InputsT], OutputsT],
        sizes: Callable[[InputsT], tuple] | None = None,
        codes: Mapping[str, Mapping[str, int]] | None = None,
        statistics: int = 0,
        scratch: Callable[[InputsT], tuple] | None = None,
        mutates: str | None = None,
    ) -> None:
        self.name, self.page = name, page
        self.inputs, self.outputs = Layout(inputs), Layout(outputs)
        self.tensors = self.inputs.chosen(self.inputs.tensors)
        self.reference, self.allocate = reference, allocate
        self.sizes, self.statistics, self.scratch = sizes, statistics, scratch
        names = list(self.inputs.types)
        self.codes = {names.index(field): table for field, table in (codes or {}).items()}
        self.single = len(self.outputs.types) == 1  # torch returns a lone output without a tuple
        self.mutates = mutates
        self.kernels: dict[str, Callable[[InputsT], OutputsT]] = {}  # by the type of the device
        OPS[name] = self
        self.overload = self._define()
        if sizes is not None:
            self._attach_cpp()
        self._attach_triton()

    def __call__(self, x: InputsT) -> OutputsT:
        """Runs the fastest kernel that there is for the device of the inputs."""
        if self.kernels and not is_dynamo_compiling():
            tensors = self.tensors(x)
            first = tensors[0]
            kernel = self.kernels.get("cpu" if first.is_cpu else first.device.type)
            if kernel is not None and are_plain(tensors):
                return kernel(x)
        values = self.inputs.flatten(x)
        for name, value in zip(self.inputs.types, values, strict=True):
            for member in value if isinstance(value, list) else [value]:
                refuse_dtensor(self.name, name, member)
        result = self.overload(*values)
        if self.single:
            result = (result,)
        return self.outputs.record._make(result or ())  # torch returns None for no outputs

    def flat(self, run: Callable[[InputsT], OutputsT]) -> Callable:
        """The function from record to record, as torch calls it: from values to values."""
        restore, single = self.inputs.restore, self.single

        def call(*values: Any) -> Any:
            outputs = run(restore(values))
            if single:
                return outputs[0]
            return outputs or None  # An op without outputs returns None, not an empty record.

        return call

    def attach(self, device: str, label: str, kernel: Callable[[InputsT], OutputsT]) -> None:
        """Makes a function the kernel of "CPU" or "CUDA"; kernels_of() shows it by its label."""
        if self.mutates is not None:
            kernel = self.marking_as_changed(kernel)
        LIBRARY.impl(self.name, self.flat(kernel), device)
        kernels[self.name][device] = label
        if not self.inputs.has_lists:  # a list is left to torch's dispatcher
            self.kernels[device.lower()] = kernel

    def attach_everywhere(self, label: str, kernel: Callable[[InputsT], OutputsT]) -> None:
        """Makes a function that is made of torch's own ops the kernel on every device."""
        self.attach("CPU", label, kernel)
        self.attach("CUDA", label, kernel)

    def marking_as_changed(
        self, kernel: Callable[[InputsT], OutputsT]
    ) -> Callable[[InputsT], OutputsT]:
        """The kernel, with the tensor that it writes to marked as changed.

        torch counts what its own ops write: whoever saved the tensor for backward then raises.
        """
        assert self.mutates is not None
        flatten, place = self.inputs.flatten, list(self.inputs.types).index(self.mutates)

        def run(x: InputsT) -> OutputsT:
            outputs = kernel(x)
            torch.autograd.graph.increment_version(flatten(x)[place])
            return outputs

        return run

    def cpp_kernel(self, module: ModuleType, *, on_gpu: bool) -> Callable[[InputsT], OutputsT]:
        """The function of this op in an extension, from record to record.

        A call costs microseconds, and so do the lookups in it: they are made here, once.
        """
        function = getattr(module, self.name)
        flatten = self.inputs.flatten_coded(self.codes)
        allocate, sizes, statistics = self.allocate, self.sizes, self.statistics
        assert sizes is not None  # an op without sizes has no kernel in C++
        scratch_of = self.scratch
        no_scratch = NO_SCRATCH if statistics else self._scratch_type()()

        def kernel(x: InputsT) -> OutputsT:
            outputs = allocate(x)
            values = flatten(x)
            first = values[0]
            scratch: tuple = no_scratch  # it lives until the launch is made
            if on_gpu and statistics:
                scratch = reduction_scratch(first, statistics)
            elif on_gpu and scratch_of is not None:
                scratch = scratch_of(x)
            stream = current_stream(first) if on_gpu else 0
            function(*sizes(x), *values, *outputs, *scratch, stream)
            return outputs

        return kernel

    def _define(self) -> torch._ops.OpOverload:
        kinds = list(self.outputs.types.values())
        result = kinds[0] if self.single else GenericAlias(tuple, tuple(kinds))
        signature = inspect.Signature(
            [
                inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind)
                for name, kind in self.inputs.types.items()
            ],
            return_annotation=result if kinds else None,
        )

        def prototype() -> None:
            """Carries the signature that torch infers the schema from."""

        prototype.__signature__ = signature  # type: ignore[attr-defined]
        mutated = () if self.mutates is None else (self.mutates,)
        schema = torch.library.infer_schema(prototype, op_name=self.name, mutates_args=mutated)
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(self.name, self.flat(self.reference), "CompositeExplicitAutograd")
        LIBRARY.impl(self.name, self._refuse_vmap, "FuncTorchBatched")
        torch.library.register_fake(f"fastpg::{self.name}", self.flat(self.allocate), lib=LIBRARY)
        kernels[self.name] = {"CPU": "reference", "CUDA": "reference"}
        return getattr(torch.ops.fastpg, self.name).default

    def _refuse_vmap(self, *_: object) -> None:
        raise RuntimeError(f"{self.name}: torch.vmap is not supported")  # torch would loop

    def _attach_cpp(self) -> None:
        """Attaches the kernels in C++ and CUDA C++, where there are any."""
        if _C is not None and hasattr(_C, self.name):
            self.check_fields(_C)
            self.attach("CPU", "C++", self.cpp_kernel(_C, on_gpu=False))
        if _cuda is not None and hasattr(_cuda, self.name):
            self.check_fields(_cuda)
            kernel = self.cpp_kernel(_cuda, on_gpu=True)
            self.attach("CUDA", "CUDA C++", on_device_of_first(kernel))

    def fields(self) -> list[str]:
        """The names of what C++ takes, in their order."""
        sizes = get_type_hints(self.sizes)["return"]._fields
        scratch = REDUCTION if self.statistics else getattr(self._scratch_type(), "_fields", ())
        return [*sizes, *self.inputs.types, *self.outputs.types, *scratch, STREAM]

    def _scratch_type(self) -> type[tuple]:
        """The record that `scratch` returns; without one, an empty tuple."""
        return tuple if self.scratch is None else get_type_hints(self.scratch)["return"]

    def check_fields(self, module: ModuleType) -> None:
        """Raises ImportError unless C++ names the arguments as the records do, in their order."""
        ours = self.fields()
        theirs = module.fields(self.name) if hasattr(module, "fields") else []
        if ours != theirs:
            raise ImportError(
                f"fastpg: {module.__name__}.{self.name} was built for other arguments than those "
                f"of {self.page}; build the extension again\n"
                f"  Python: {', '.join(ours)}\n  C++:    {', '.join(theirs)}"
            )

    def _attach_triton(self) -> None:
        """Attaches the kernel in Triton, to be imported with the first tensor on a GPU."""
        module = f"{self.page}_triton"
        if kernels[self.name]["CUDA"] == "CUDA C++":
            return
        if find_spec("triton") is None or find_spec(module) is None:
            return

        @cache
        def launcher() -> Callable[[InputsT], OutputsT]:
            return getattr(import_module(module), self.name)

        self.attach("CUDA", "Triton", on_device_of_first(lambda x: launcher()(x)))


def are_plain(tensors: Sequence) -> bool:
    """Whether torch's dispatcher would do nothing but call the kernel: it takes 5 of 15 us.

    It has more to do where something listens to it, for a subclass of Tensor, and for a tensor
    whose sign is still to be applied. A kernel that someone else registers for an operator of
    fastpg serves torch.ops and torch.compile, not the public functions in eager mode.
    """
    if not nothing_listens():
        return False
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in PLAIN_TENSORS or tensor.is_neg()):
            return False
    return True


def is_dtensor(x: object) -> bool:
    """Whether this is a tensor of which other ranks may hold a part."""
    # torch.compile cannot ask a number for attributes: that it is a tensor comes first.
    if not isinstance(x, Tensor) or type(x) in PLAIN_TENSORS:
        return False
    # Dynamo does not see the method by which a DTensor is known otherwise.
    if is_dynamo_compiling():
        from torch.distributed.tensor import DTensor

        return isinstance(x, DTensor)
    return hasattr(x, "full_tensor")


def refuse_dtensor(op: str, name: str, x: object) -> None:
    """Raises for a DTensor: no op says which parts of its results each rank would have."""
    if is_dtensor(x):
        needs = f"pass {name}.to_local()"
        if name == "logits":
            needs += ", and process_group if the vocabulary is sharded"
        raise TypeError(f"{op}: {name} is a DTensor: {needs}")


def current_stream(tensor: Tensor) -> int:
    """The address of the CUDA stream that launches on the tensor's device go to."""
    return torch._C._cuda_getCurrentRawStream(tensor.get_device()) if tensor.is_cuda else 0


def on_device_of_first(kernel: Callable[[InputsT], OutputsT]) -> Callable[[InputsT], OutputsT]:
    """The same kernel, with the device of its first tensor as the current one."""

    def on_device(x: InputsT) -> OutputsT:
        first: Any = x
        while isinstance(first, tuple):  # a record may begin with another
            first = first[0]
        if first.get_device() == torch.cuda.current_device():
            return kernel(x)
        with torch.cuda.device_of(first):
            return kernel(x)

    return on_device
