"""Read users' YAML safely, and its values into typed dataclasses. Nothing here imports torch, so that a wrong key is reported
before torch is loaded."""

import dataclasses
import math
import types
import typing
from reprlib import Repr
from typing import Any, Literal

import yaml

from util.errors import UnknownKey, UserError, nearest


class _Loader(yaml.SafeLoader):
    """Refuse what YAML permits: a repeated key (the first value would be lost), and values of absurd length."""

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict:
        names = [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
        for key, _ in node.value if names else []:
            if names.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(problem=f"{key.value!r} is there twice", problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.Node) -> Any:
        value = super().construct_scalar(node)
        if len(value) > 2000:
            raise yaml.constructor.ConstructorError(problem=f"a value of {len(value)} characters", problem_mark=node.start_mark)
        return value


def parse_yaml(text: str, where: str) -> Any:
    """Parse a user's YAML. Raises UserError, beginning with `where`, for any mistake in it."""
    try:
        return yaml.load(text, _Loader)
    except Exception as error:  # PyYAML raises many kinds: on 2024-13-45, on a thousand brackets
        raise UserError(f"{where} is no valid YAML: {error}") from error


def short(value: Any) -> str:
    """Return a shortened repr. (YAML's aliases of aliases can make it endless.)"""
    view = Repr()
    view.maxlevel, view.maxstring = 2, 100
    return view.repr(value)


def set_key(config: Any, section: str, key: str, value: Any, source: str) -> None:
    """Set a key of a section, two levels of dataclasses, from a YAML value, which is converted to the type of the field.

    Raises:
        UnknownKey: no such section or key. UserError: another type of value. The message begins with `source`.
    """
    target = _named(config, section, f"{source}: unknown section {section!r}")
    _named(target, key, f"{source}: unknown key {section}.{key}")
    expected = typing.get_type_hints(type(target))[key]
    setattr(target, key, _convert(value, expected, f"{source}: {section}.{key}"))


def _named(owner: Any, name: str, complaint: str) -> Any:
    names = [f.name for f in dataclasses.fields(owner)]
    if name in names:
        return getattr(owner, name)
    near = nearest(name, names)
    raise UnknownKey(f"{complaint}; " + (f"did you mean {near!r}?" if near else f"there are {', '.join(names)}"), name)


def _convert(value: Any, expected: Any, where: str) -> Any:
    """Check a YAML value against a type hint; an integer may stand for a float, '1e-4' (a string in YAML 1.1) too."""
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin is Literal:
        if value in arguments:
            return value
        near = nearest(short(value).strip("'"), map(str, arguments))
        hint = f"did you mean {near!r}? " if near else ""
        raise UserError(f"{where} = {short(value)}: {hint}choose one of {', '.join(map(str, arguments))}")
    if origin is types.UnionType:
        if value is None:
            return None
        expected = next(a for a in arguments if a is not type(None))
        return _convert(value, expected, where)
    if origin is list:
        if isinstance(value, list):
            return [_convert(v, arguments[0], where) for v in value]
    elif expected is float:
        if isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:
                if math.isfinite(number := float(value)):
                    return number
            except (ValueError, OverflowError):
                pass
    elif expected is str:
        if value is None:
            return ""
        if isinstance(value, str):
            return value
    elif isinstance(value, expected) and (expected is bool or not isinstance(value, bool)):
        return value
    name = "a finite number" if expected is float else str(expected) if origin else expected.__name__
    raise UserError(f"{where} = {short(value)}: expected {name}")
