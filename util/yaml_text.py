"""Read users' YAML safely. Nothing here imports torch, so that a wrong key is reported before torch is loaded."""

from reprlib import Repr
from typing import Any

import yaml

from util.errors import UserError


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
