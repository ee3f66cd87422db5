"""Fixtures of the page and of what is behind it."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from demo.web.session import Example, Model, demo_examples
from model.predict.predictor import Predictor
from tests.make.scenes import ROOT, STAR


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def model(piclip: Path) -> Model:
    return Model(Predictor.from_checkpoint(piclip, "cpu"), "PI-CLIP of the demo")


@pytest.fixture(scope="module")
def example() -> Example:
    return next(demo_examples([STAR]))


@pytest.fixture
def query(example: Example, tmp_path: Path) -> str:
    return save(tmp_path / "query.png", example.query)


def save(path: Path, image: np.ndarray) -> str:
    Image.fromarray(image).save(path)
    return str(path)
