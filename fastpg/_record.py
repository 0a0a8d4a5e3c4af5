"""Records: NamedTuples that name the inputs, the outputs or the saved tensors of an op.

A record may hold another record, and a list of tensors. torch knows neither: it takes and keeps a
flat list of values. A `Layout` goes from one to the other. Of these two records

    class Inputs(NamedTuple):         class BackwardInputs(NamedTuple):
        logp: Tensor                      inputs: Inputs
        kind: str                         grad_kl: Tensor

the `Layout` of the second has the flat fields logp, kind and grad_kl, and the functions

    flatten   lambda record: (record[0][0], record[0][1], record[1])
    restore   lambda values: BackwardInputs(Inputs(values[0], values[1]), values[2])
    split     lambda record: ((record[0][0], record[1]), (record[0][1],))
    join      lambda tensors, others: BackwardInputs(Inputs(tensors[0], others[0]), tensors[1])

They are written and compiled when an op is made, as namedtuple does with its own. Every call of the
op goes through them: loops over the fields would cost a tenth of it. torch.compile traces them,
which it does not do with operator.itemgetter.
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
        self.names: list[str] = []
        self.kinds: list[Any] = []
        for name, kind in get_type_hints(record).items():
            if inspect.isclass(kind) and issubclass(kind, tuple):
                self.nested[name] = Layout(kind)
                self.names += self.nested[name].names
                self.kinds += self.nested[name].kinds
            else:
                self.names.append(name)
                self.kinds.append(kind)
        self.types: dict[str, Any] = dict(zip(self.names, self.kinds, strict=True))
        flat = zip(self.names, self.kinds, strict=True)
        self.tensors = [name for name, kind in flat if _holds_tensors(kind)]
        self.has_lists = list[Tensor] in self.kinds
        self.flatten: Callable[[RecordT], Sequence]
        self.restore: Callable[[Sequence], RecordT]
        self.split: Callable[[RecordT], tuple[Sequence, Sequence]]
        self.join: Callable[[Sequence, Sequence], RecordT]
        self._write_functions()

    def _write_functions(self) -> None:
        """Makes the four functions, as the top of this page shows them."""
        places = _places(self)
        parts: dict[str, list[str]] = {"tensors": [], "others": []}
        in_parts: list[str] = []  # for each flat field, as in "tensors[1]"
        for place, kind in zip(places, self.kinds, strict=True):
            part = "tensors" if _holds_tensors(kind) else "others"
            in_parts.append(f"{part}[{len(parts[part])}]")
            parts[part].append(place)
        tensors, others = _tuple(parts["tensors"]), _tuple(parts["others"])
        self.flatten = _function("record", _tuple(places), {})
        if not self.nested:
            self.flatten = lambda record: record  # it is a tuple of its flat fields already
        self.split = _function("record", f"({tensors}, {others})", {})
        known: dict[str, Any] = {"new": tuple.__new__}
        in_values = [f"values[{i}]" for i in range(len(places))]
        self.restore = _function("values", _construction(self, iter(in_values), known), known)
        self.join = _function("tensors, others", _construction(self, iter(in_parts), known), known)

    def chosen(self, names: Sequence[str]) -> Callable[[RecordT], Sequence]:
        """The function that gives these flat fields of a record; the first of two with one name."""
        places = _places(self)
        return _function("record", _tuple([places[self.names.index(name)] for name in names]), {})

    def flatten_coded(self, tables: Mapping[int, Mapping]) -> Callable[[RecordT], Sequence]:
        """`flatten`, but a field that has a table gives what the table has for its value.

        Args:
            tables: The tables, each by the place of its field among the flat ones.
        """
        if not tables:
            return self.flatten
        members = _places(self)
        for place in tables:
            members[place] = f"table_{place}[{members[place]}]"
        known = {f"table_{place}": table for place, table in tables.items()}
        return _function("record", _tuple(members), known)


def _function(arguments: str, expression: str, known: Mapping[str, Any]) -> Callable:
    """The function that returns an expression of its arguments and of what is known by name."""
    return eval(f"lambda {arguments}: {expression}", dict(known))


def _holds_tensors(kind: Any) -> bool:
    """Whether this is the type of a tensor, of a list of them, or of a tensor or None."""
    return Tensor in (kind, *get_args(kind))


def _tuple(members: Sequence[str]) -> str:
    """An expression for the tuple of these."""
    return f"({', '.join(members)},)" if members else "()"


def _places(layout: Layout, record: str = "record") -> list[str]:
    """An expression for each flat field of a record, as "record[0][1]"."""
    places: list[str] = []
    for place, name in enumerate(layout.record._fields):
        field = f"{record}[{place}]"
        places += _places(layout.nested[name], field) if name in layout.nested else [field]
    return places


def _construction(layout: Layout, values: Iterator[str], known: dict[str, Any]) -> str:
    """An expression for the record that has the values of these expressions.

    `known` receives the records by the names that they have in it.
    """
    fields = [
        _construction(layout.nested[name], values, known) if name in layout.nested else next(values)
        for name in layout.record._fields
    ]
    name = f"{layout.record.__name__}_{len(known)}"  # two records may have one name
    known[name] = layout.record
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
