"""What is wrong on a command line is said before torch is imported, which takes seconds, on a busy machine a minute.

Everything here reads text alone: names of systems and of their options come from the source of `model`, unexecuted. The same
checks run again, and completely, when the system's own classes are there (`model.configure`).
"""

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path

from util import cli
from util.config import Method, load_config
from util.data.folds import fold_of, has_folds
from util.errors import UserError, nearest

HERE = Path(__file__).parent


def answer(description: str, after: str, episodes: bool = False, plan: bool = False) -> None:
    """End the program here for --help, or with a message for a wrong command line; arguments as for `util.cli.parse`."""
    cli.run(lambda: check(description, episodes, plan), after)


def check(description: str, episodes: bool, plan: bool) -> None:
    """Raise UserError for an unknown system or key, a wrong value of a key that all systems share, an unknown fold."""
    given = cli.parse(description, episodes, plan)
    unknown("system ARCH", given.arch, systems())
    for text in given.overrides:
        section, _, key = text.partition("=")[0].partition(".")
        if section == "Method" and key:
            unknown("key Method.", key, options())
    config = load_config(given.config, given.arch, given.overrides, options=None)
    if has_folds(config):  # which systems need them is only known to their classes
        fold_of(config)


def unknown(what: str, name: str, known: list[str]) -> None:
    if name not in known:
        near, joint = nearest(name, known), "" if what.endswith(".") else " "
        hint = f"did you mean {near}?" if near else f"there are {', '.join(known)}"
        raise UserError(f"unknown {what}{joint}{name}; {hint}")


def systems() -> list[str]:
    """Return the names of the table SYSTEMS."""
    for node in ast.walk(ast.parse((HERE / "build.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "SYSTEMS":
            return [key.value for key in node.value.keys]
    raise AssertionError("model/build.py has no table SYSTEMS")


def options() -> list[str]:
    """Return the keys of section Method of any system: those of all, and the fields of each class named ...Options."""
    return sorted({*(field.name for field in dataclasses.fields(Method)), *_options()})


def _options() -> Iterator[str]:
    for file in HERE.rglob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith("Options"):
                yield from (field.target.id for field in node.body if isinstance(field, ast.AnnAssign))
