"""Records: NamedTuples that name the inputs, the outputs or the saved tensors of an op.

A record may hold another record, and a list of tensors. torch knows neither: it takes and keeps a
flat list of values. A `Layout` goes from one to the other.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, get_args, get_type_hints

from torch import Tensor


class Layout:
    """How the fields of a record, those of a record inside it in its place, make a flat list.

    Attributes:
        types: The type of each flat field, by its name.
        tensors: The places of the flat fields that are tensors, or lists of them.
        others: The places of all other flat fields.
        has_lists: Whether a field is a list of tensors.
        is_all_tensors: Whether every flat field is a tensor, and none a list of them.
    """

    def __init__(self, record: type[tuple]) -> None:
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
        if not self.nested:
            self.restore = record._make  # type: ignore[method-assign]  # a call less

    def flatten(self, record: tuple) -> Sequence:
        """Every value of the record, in the order of `types`."""
        if not self.nested:
            return record
        values: list = []
        for name, value in zip(self.record._fields, record, strict=True):
            if name in self.nested:
                values.extend(self.nested[name].flatten(value))
            else:
                values.append(value)
        return values

    def restore(self, values: Sequence) -> tuple:
        """The record that holds these values."""
        if not self.nested:
            return self.record._make(values)
        fields, start = [], 0
        for name in self.record._fields:
            if name in self.nested:
                stop = start + len(self.nested[name].types)
                fields.append(self.nested[name].restore(values[start:stop]))
            else:
                stop = start + 1
                fields.append(values[start])
            start = stop
        return self.record._make(fields)


def without_lists(values: Sequence) -> list:
    """The values, with every list among them replaced by its members."""
    flat: list = []
    for value in values:
        if isinstance(value, list):
            flat.extend(value)
        else:
            flat.append(value)
    return flat


def contiguous(record: tuple) -> Any:
    """The record with every tensor contiguous, as the kernels in Triton take them."""
    values = [x.contiguous() if isinstance(x, Tensor) else x for x in record]
    return record._make(values)
