"""YAML as users write it, read safely. It imports no torch: a wrong key is answered before torch is loaded."""

from reprlib import Repr
from typing import Any

import yaml

from util.errors import UserError


class _Loader(yaml.SafeLoader):
    """Refuses what YAML lets pass: a key that is there twice (the first would be lost), and values of absurd length."""

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
    """What a user's YAML holds. Raises UserError, beginning with `where`, for whatever is wrong with it."""
    try:
        return yaml.load(text, _Loader)
    except Exception as error:  # PyYAML raises many kinds: on 2024-13-45, on a thousand brackets
        raise UserError(f"{where} is no valid YAML: {error}") from error


def short(value: Any) -> str:
    """repr, cut: YAML's aliases of aliases make it endless."""
    view = Repr()
    view.maxlevel, view.maxstring = 2, 100
    return view.repr(value)
