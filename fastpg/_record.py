"""Records: NamedTuples that name the inputs, the outputs or the saved tensors of an op.

A record may hold another record, and a list of tensors. torch knows neither: it takes and keeps a
flat list of values. A `Layout` goes from one to the other.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar, get_args, get_type_hints

from torch import Tensor

RecordT = TypeVar("RecordT", bound=NamedTuple)


class Layout(Generic[RecordT]):
    """How the fields of a record, those of a record inside it in its place, make a flat list.

    Attributes:
        types: The type of each flat field, by its name.
        tensors: The places of the flat fields that are tensors, or lists of them.
        others: The places of all other flat fields.
        has_lists: Whether a field is a list of tensors.
        is_all_tensors: Whether every flat field is a tensor, and none a list of them.
        flatten: Gives every value of a record, in the order of `types`.
        restore: Gives the record that holds these values.
    """

    def __init__(self, record: type[RecordT]) -> None:
        self.record = record
        self.nested: dict[str, Layout] = {}
        self.types: dict[str, Any] = {}
        for name, kind in get_type_hints(record).items():
            if inspect.isclass(kind) and issubclass(kind, tuple):
                self.nested[name] = Layout(kind)
                self.types |= self.nested[name].types
            else:
                self.types[name] = kind
        kinds = list(self.types.values())
        self.tensors = [i for i, kind in enumerate(kinds) if Tensor in (kind, *get_args(kind))]
        self.others = [i for i in range(len(kinds)) if i not in self.tensors]
        self.has_lists = any(kind == list[Tensor] for kind in kinds)
        self.is_all_tensors = not self.others and not self.has_lists
        makers: list[Callable] = []
        made, _ = _record_source(self, 0, makers)
        names = ", ".join(f"make_{i}" for i in range(len(makers)))
        # Both are called with every op, and loops would cost microseconds: as namedtuple does, they
        # are compiled from an expression, such as (record[0], record[1][0], record[1][1]).
        flatten = f"lambda record: ({_values_source(self)})"
        restore = f"lambda {names}: lambda values: {made}"
        self.flatten: Callable[[RecordT], Sequence] = eval(flatten)
        self.restore: Callable[[Sequence], RecordT] = eval(restore)(*makers)
        if not self.nested:
            self.flatten, self.restore = lambda record: record, record._make


def _values_source(layout: Layout, record: str = "record") -> str:
    """An expression for the values of a record, in the order of `types`, a comma after each."""
    source = ""
    for place, name in enumerate(layout.record._fields):
        value = f"{record}[{place}]"
        source += (
            _values_source(layout.nested[name], value) if name in layout.nested else f"{value},"
        )
    return source


def _record_source(layout: Layout, start: int, makers: list[Callable]) -> tuple[str, int]:
    """An expression for the record of the values from the start on, and where those after it begin.

    `makers` receives the functions that the expression calls make_0, make_1 and so on.
    """
    source = ""
    for name in layout.record._fields:
        if name in layout.nested:
            inner, start = _record_source(layout.nested[name], start, makers)
            source += f"{inner},"
        else:
            source, start = f"{source}values[{start}],", start + 1
    makers.append(layout.record._make)
    return f"make_{len(makers) - 1}(({source}))", start


def without_lists(values: Sequence) -> list:
    """The values, with every list among them replaced by its members."""
    flat: list = []
    for value in values:
        if isinstance(value, list):
            flat.extend(value)
        else:
            flat.append(value)
    return flat


def contiguous(record: RecordT) -> RecordT:
    """The record with every tensor contiguous, as the kernels in Triton take them."""
    values = [x.contiguous() if isinstance(x, Tensor) else x for x in record]
    return record._make(values)
