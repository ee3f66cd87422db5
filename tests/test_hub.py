"""hubconf.py from a foreign folder: torch.hub finds the entry points, and they need nothing of the working folder."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROGRAM = """
import sys, torch
sys.path = [path for path in sys.path if path not in ("", {root!r})]
segmenter = torch.hub.load({root!r}, "few_shot", source="local", device="cpu")
image = (255 * torch.rand(3, 60, 80)).byte()
segmenter.set_support(image, boxes=(20, 10, 60, 50))
print(segmenter.predict(image).mask.shape)
cells = torch.hub.load({root!r}, "encoder", "timm:resnet18", source="local").cells(image[None].float())
print(tuple(cells.shape))
system = torch.hub.load({root!r}, "build", "PI_CLIP", "config/demo/demo_split0_resnet50.yaml", "Train.shot=2", source="local")
print(type(torch.hub.load({root!r}, "predictor", source="local", device="cpu")).__name__, type(system).__name__, system.shot)
"""
TAKEN = """
import sys, torch, util
try:
    torch.hub.load({root!r}, "few_shot", source="local")
except ImportError as error:
    print(error)
assert util.mine == 5 and sys.modules["util"] is util and "model" not in sys.modules
del sys.modules["util"]
torch.hub.load({root!r}, "encoder", "timm:resnet18", source="local")
"""


def test_entry_points_work_elsewhere(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM.format(root=str(ROOT))]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-3:] == ["(60, 80)", "(1, 768, 8, 10)", "Predictor PICLIP 2"]
    assert not [*tmp_path.iterdir()]


def test_names_that_the_caller_has(tmp_path: Path) -> None:
    """One that is loaded is an error and stays what it is; one that could be loaded later is a warning."""
    (tmp_path / "util.py").write_text("mine = 5\n")
    (tmp_path / "program.py").write_text(TAKEN.format(root=str(ROOT)))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run([sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert run.returncode == 0 and "another 'util'" in run.stdout and str(tmp_path / "util.py") in run.stdout, run.stderr
    assert "from now on `import util` is" in run.stderr
