"""torch.hub from a foreign folder, in a process of its own; and names that the caller has taken."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from model.predict.predictor import Predictor
from tests.make import ROOT, upright

LOAD = f"""
import sys, numpy as np, torch
torch.set_num_threads(1)
load = lambda entry, *given, **more: torch.hub.load({str(ROOT)!r}, entry, *given, source="local", **more)
"""


def run(folder: Path, program: str) -> subprocess.CompletedProcess:
    """Run a program in a folder, which is on its path as the folder of a script is, and without this repository's."""
    file = folder / "program.py"
    file.write_text(LOAD + program)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([sys.executable, file], cwd=folder, text=True, capture_output=True, timeout=300, env=environment)


def test_from_a_foreign_folder(tmp_path: Path) -> None:
    Image.fromarray(upright(np.random.default_rng(0), (90, 120))).save(tmp_path / "a.png")
    done = run(tmp_path, """
predictor = load("predictor", device="cpu")
predictor.set_support("a.png", boxes=[20, 20, 80, 70])
np.save("score.npy", predictor.predict("a.png").score)
system = load("build", "PI_CLIP", "config/demo/demo_split0_resnet50.yaml", "Train.shot=2")
assert type(system).__name__ == "PICLIP" and system.shot == 2
try:
    load("predictor", "nothing.pth")
except Exception as error:
    assert "no such checkpoint: nothing.pth" in str(error)
print("done")
""")  # fmt: skip
    assert done.stdout.endswith("done\n") and "not a package" not in done.stderr, done.stderr
    here = Predictor.from_checkpoint(device="cpu")
    here.set_support(tmp_path / "a.png", boxes=[20, 20, 80, 70])
    np.testing.assert_allclose(np.load(tmp_path / "score.npy"), here.predict(tmp_path / "a.png").score, atol=1e-5)


def test_names_that_the_caller_has(tmp_path: Path) -> None:
    """One that is loaded is an error and stays what it is; one that could be loaded later is a warning."""
    (tmp_path / "util.py").write_text("mine = 5\n")
    done = run(tmp_path, """
import util
try:
    load("predictor")
except ImportError as error:
    print(error)
assert util.mine == 5 and sys.modules["util"] is util and "model" not in sys.modules
del sys.modules["util"]
load("build", "HDMNet", "config/demo/demo_split0_resnet50.yaml")
""")  # fmt: skip
    assert done.returncode == 0 and "another 'util'" in done.stdout and str(tmp_path / "util.py") in done.stdout, done.stderr
    assert "from now on `import util` is" in done.stderr, done.stderr
