"""hubconf.py from a foreign folder: torch.hub finds the entry points, and they need nothing of the working folder."""

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
"""


def test_entry_points_work_elsewhere(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM.format(root=str(ROOT))]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-2:] == ["(60, 80)", "(1, 768, 8, 10)"]
    assert not [*tmp_path.iterdir()]
