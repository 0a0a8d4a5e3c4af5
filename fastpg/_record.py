"""Records: NamedTuples that name the inputs, the outputs or the saved tensors of an op.

A record may hold another record, and a list of tensors. torch knows neither: it takes and keeps a
flat list of values. A `Layout` goes from one to the other.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar, get_args, get_type_hints

from torch import Tensor

RecordT = TypeVar("RecordT", bound=NamedTuple)


class Layout(Generic[RecordT]):
    """How the fields of a record, those of a record inside it in its place, make a flat list.

    Attributes:
        types: The type of each flat field, by its name. The record of an op's inputs or outputs has
            a name once; only a saved record may hold two records with a name in common.
        names: The name of each flat field.
        kinds: The type of each flat field.
        tensors: The names of the flat fields that hold tensors, lists of them included.
        has_lists: Whether a field is a list of tensors.
        flatten: Gives every value of a record, in the order of `types`.
        restore: Gives the record that holds these values.
        split: Gives the tensors of a record, lists of them included, and all its other values.
        join: Gives the record that holds these tensors and others.
    """

    def __init__(self, record: type[RecordT]) -> None:
        self.record = record
        self.nested: dict[str, Layout] = {}
        self.types: dict[str, Any] = {}
        self.names: list[str] = []
        self.kinds: list[Any] = []
        for name, kind in get_type_hints(record).items():
            if inspect.isclass(kind) and issubclass(kind, tuple):
                self.nested[name] = Layout(kind)
                self.types |= self.nested[name].types
                self.names += self.nested[name].names
                self.kinds += self.nested[name].kinds
            else:
                self.types[name] = kind
                self.names.append(name)
                self.kinds.append(kind)
        flat = zip(self.names, self.kinds, strict=True)
        self.tensors = [name for name, kind in flat if _holds_tensors(kind)]
        self.has_lists = list[Tensor] in self.kinds
        self.flatten: Callable[[RecordT], Sequence]
        self.restore: Callable[[Sequence], RecordT]
        self.split: Callable[[RecordT], tuple[Sequence, Sequence]]
        self.join: Callable[[Sequence, Sequence], RecordT]
        self._compile()

    def _compile(self) -> None:
        """Makes the four functions. They are called with every op, and loops would cost a tenth.

        As namedtuple does, they are compiled, from an expression for each flat field: its place in
        the record, as in record[1][0], in the flat values, or in one of the two parts of a split.
        """
        in_record = _places(self)
        in_values = [f"values[{i}]" for i in range(len(in_record))]
        parts: dict[str, list[str]] = {"tensors": [], "others": []}
        in_parts = []
        for place, kind in zip(in_record, self.kinds, strict=True):
            part = "tensors" if _holds_tensors(kind) else "others"
            in_parts.append(f"{part}[{len(parts[part])}]")
            parts[part].append(place)
        types: dict[str, type] = {}
        restored = _construction(self, iter(in_values), types)
        joined = _construction(self, iter(in_parts), types)
        names = {"new": tuple.__new__, **types}
        self.flatten = eval(f"lambda record: {_tuple(in_record)}")
        self.restore = eval(f"lambda values: {restored}", names)
        self.split = eval(f"lambda record: ({_tuple(parts['tensors'])}, {_tuple(parts['others'])})")
        self.join = eval(f"lambda tensors, others: {joined}", names)
        if not self.nested:
            self.flatten = lambda record: record

    def chosen(self, names: Sequence[str]) -> Callable[[RecordT], Sequence]:
        """The function that gives these flat fields of a record; the first of two with one name."""
        in_record = _places(self)
        members = [in_record[self.names.index(name)] for name in names]
        return eval(f"lambda record: {_tuple(members)}")

    def flatten_coded(self, tables: Mapping[int, Mapping]) -> Callable[[RecordT], Sequence]:
        """`flatten`, but of the flat fields that have a table, by their places, what it has for
        their values."""
        names = {f"table_{i}": table for i, table in tables.items()}
        members = [
            f"table_{i}[{place}]" if i in tables else place for i, place in enumerate(_places(self))
        ]
        return eval(f"lambda record: {_tuple(members)}", names) if tables else self.flatten


def _holds_tensors(kind: Any) -> bool:
    """Whether this is the type of a tensor, of a list of them, or of a tensor or None."""
    return Tensor in (kind, *get_args(kind))


def _tuple(members: Sequence[str]) -> str:
    """An expression for the tuple of these."""
    return f"({', '.join(members)},)" if members else "()"


def _places(layout: Layout, record: str = "record") -> list[str]:
    """An expression for each flat field of a record."""
    places: list[str] = []
    for place, name in enumerate(layout.record._fields):
        field = f"{record}[{place}]"
        places += _places(layout.nested[name], field) if name in layout.nested else [field]
    return places


def _construction(layout: Layout, values: Iterator[str], types: dict[str, type]) -> str:
    """An expression for the record of these values.

    `types` receives the records by the names that they have in the expression.
    """
    fields = [
        _construction(layout.nested[name], values, types) if name in layout.nested else next(values)
        for name in layout.record._fields
    ]
    name = f"{layout.record.__name__}_{len(types)}"
    types[name] = layout.record
    return f"new({name}, {_tuple(fields)})"


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
