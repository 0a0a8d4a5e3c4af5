"""Turns what a user wrote into typed values, or into one plain sentence about what is wrong."""

import difflib
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple, NewType, get_args, get_origin, get_type_hints

import yaml

Verbatim = NewType("Verbatim", str)
"""A text of a list that is taken as it is; commas do not part it, and no spaces are taken off."""


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one plain sentence."""


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """End a sentence about an unknown name.

    Args:
        name: The unknown name.
        names: The known names.

    Returns:
        The nearest known name as a question, or a full stop if none is near.
    """
    nearest = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else "."


class _Loader(yaml.SafeLoader):
    """Reads YAML, and refuses a name that stands twice, of which only the last would count."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the values by name."""
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = [name for i, name in enumerate(names) if name in names[:i]]
        if twice:
            raise InputError(f"The config file gives {twice[0]} twice.")
        return super().construct_mapping(node, deep)


def load_yaml(path: str) -> dict[str, Any]:
    """Read the settings of a YAML file.

    Args:
        path: The file, UTF-8 text of `name: value` lines.

    Returns:
        The values by name, as YAML reads them; none for an empty file.

    Raises:
        InputError: The file cannot be read or holds anything else.
    """
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except UnicodeDecodeError:
        raise InputError(f"The config file {path} is not UTF-8 text.") from None
    except OSError as error:
        raise InputError(f"Cannot read the config file {path}: {error.strerror}.") from None
    except yaml.YAMLError as error:
        # Errors of the syntax know their line; an unreadable character has only a position.
        mark = getattr(error, "problem_mark", None)
        line = 1 if mark is None else mark.line + 1
        raise InputError(f"The config file {path} is not valid YAML at line {line}.") from None
    except RecursionError:
        raise InputError(f"The config file {path} has too many brackets in brackets.") from None
    # An empty file is read as None, and means no settings.
    if not isinstance(values or {}, dict):
        raise InputError(f"The config file {path} must hold `name: value` lines.")
    return values or {}


def convert(name: str, value: Any, hint: Any) -> Any:
    """Convert the value of a setting to the type of its dataclass field.

    Args:
        name: The name of the setting, for the error.
        value: A value of any type; text is parsed.
        hint: int, float, bool, str, a list of floats, texts or `Verbatim`, a Literal of strings,
            or one of these `| None`.

    Returns:
        The value as `hint` says. Whether a string is one of a Literal is not checked here.

    Raises:
        InputError: The value cannot be converted.
    """
    optional = type(None) in get_args(hint)
    # The command line gives the values of a list one by one, and Python writes None.
    word = value[0] if isinstance(value, list) and len(value) == 1 else value
    if optional and (word is None or word in ("none", "null", "None")):
        return None
    kind = get_args(hint)[0] if optional else hint
    # An unknown word gets a better sentence from the check of its setting than from a parser.
    if get_origin(kind) is Literal:
        kind = str
    parser = _PARSERS[kind]
    try:
        return parser.parse(value)
    except (TypeError, ValueError, OverflowError, yaml.YAMLError):
        raise InputError(f"{name} must be {parser.words}, not {value!r}.") from None


def convert_all(config: Any) -> None:
    """Convert the value of every setting to the type of its field.

    Args:
        config: A dataclass of settings, changed in place.

    Raises:
        InputError: A value cannot be converted.
    """
    # The type is that of the instance: a subclass may have settings of its own.
    for name, hint in get_type_hints(type(config)).items():
        setattr(config, name, convert(name, getattr(config, name), hint))


def _integer(value: Any) -> int:
    # A bool is an int to Python, but `num_steps: true` is a mistake.
    if isinstance(value, bool) or int(value) != float(value):
        raise ValueError
    return int(value)


def _number(value: Any) -> float:
    # YAML 1.1 reads `1e-5` as text, so numbers are parsed and not checked by type.
    if isinstance(value, bool) or not math.isfinite(float(value)):
        raise ValueError
    return float(value)


def _text(value: Any) -> str:
    # YAML 1.1 reads a bare `no` as False, and "no" is a value of mixed_precision.
    if value is False:
        return "no"
    # An empty path would be the working directory, and no path can hold a zero byte.
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise ValueError
    # A shell leaves the tilde of --output_dir=~/run alone, and YAML that of any path.
    return os.path.expanduser(value) if value.startswith("~/") else value


def _truth(value: Any) -> bool:
    words = {"true": True, "yes": True, "false": False, "no": False}
    if isinstance(value, bool):
        return value
    if str(value).lower() not in words:
        raise ValueError
    return words[str(value).lower()]


def _numbers(value: Any) -> list[float]:
    # Text may hold several numbers, as may each element of a list: `--reward_weights 1,0.5`.
    if isinstance(value, str):
        pieces = value.strip().removeprefix("[").removesuffix("]").replace(",", " ").split()
        return [_number(piece) for piece in pieces]
    if isinstance(value, list | tuple):
        return [number for element in value for number in _numbers(element)]
    return [_number(value)]


def _verbatim(value: Any) -> list[str]:
    elements = value if isinstance(value, list | tuple) else [value]
    if not elements or not all(isinstance(text, str) and text for text in elements):
        raise ValueError
    return list(elements)


def _texts(value: Any) -> list[str]:
    elements = value if isinstance(value, list | tuple) else [value]
    # None of these texts has a comma of its own: `--lora_target_modules q_proj,v_proj`.
    return [text.strip() for element in elements for text in _text(element).split(",")]


class _Parser(NamedTuple):
    """The words for values of one type, and the function that makes them."""

    words: str
    parse: Callable[[Any], Any]


# A field of another type needs a parser here.
_PARSERS: dict[Any, _Parser] = {
    int: _Parser("a whole number", _integer),
    float: _Parser("a number", _number),
    bool: _Parser("true or false", _truth),
    str: _Parser("text", _text),
    list[float]: _Parser("a list of numbers such as 1,0.5", _numbers),
    list[str]: _Parser("text or a list of texts", _texts),
    list[Verbatim]: _Parser("text or a list of texts, none of them empty", _verbatim),
}
