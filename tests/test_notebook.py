"""The notebook runs from its first cell to its last, without Jupyter, trained weights or network."""

import ast
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

NOTEBOOK = Path(__file__).parents[1] / "notebooks/demo.ipynb"


def run(cells: list[str]) -> tuple[dict, list]:
    """What the cells define, and the values that they show (their last lines)."""
    names: dict = {}
    shown = []
    for source in cells:
        body = ast.parse(source).body
        last = body.pop() if isinstance(body[-1], ast.Expr) else None
        exec(compile(ast.Module(body, []), str(NOTEBOOK), "exec"), names)
        if last is not None:
            shown.append(eval(compile(ast.Expression(last.value), str(NOTEBOOK), "eval"), names))
    return names, shown


@pytest.mark.slow
def test_the_notebook_runs(small_clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(small_clone / "notebooks")
    monkeypatch.setattr(sys, "path", sys.path[:])
    cells = json.loads((small_clone / "notebooks/demo.ipynb").read_text())["cells"]
    names, shown = run(["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"])
    pictures = [np.asarray(value) for value in shown if isinstance(value, Image.Image)]
    assert len(pictures) == 4 and all(picture.std() > 20 for picture in pictures)
    scores = names["scores"]
    assert "PI-CLIP, untrained" in scores  # the folder has no trained weights
    assert scores["text prior (VTP) > 0.5"] > scores["everything foreground"] > 0  # as the text says


def test_nothing_but_the_source_is_stored() -> None:
    content = json.loads(NOTEBOOK.read_text())
    assert content["nbformat"] == 4 and NOTEBOOK.stat().st_size < 20_000
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert code and not any(cell["outputs"] or cell["execution_count"] for cell in code)
