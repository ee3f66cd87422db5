"""The rooms of the house and the direction of imports between them (docs/extending.md); no file grows past 400 lines."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
GROUND = ("errors", "config", "protocol", "files", "cache", "cli", "pool", "yaml_text", "layers")
FLOORS = [  # each may import from its own row's room and from all rows before
    {"util"}, {"util.data"}, {"util.run", "util.prepare"}, {"util.score"}, {"util.report"}, {"util.photos"},
    {"model"}, {"model.clip"}, {"model.backbone"}, {"model.few_shot", "model.weak", "model.zero_shot"}, {"model.build"},
    {"model.predict", "model.verify"}, {"demo", "bench"}, {"programs", "tests"},
]  # fmt: skip
FLOOR = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
NAMES = {"demo", "PI_CLIP", "HDMNet", "BAM", "PFENet", "HSNet", "IMR_HSNet", "PSPNet", "WeCLIP", "CLIP_ES", "CLIP_RC", "ZegCLIP",
         "CONTRAST", "INSID3", "MASKCLIP", "SCLIP", "NACLIP", "CLEARCLIP", "PROXYCLIP"}
LONGEST = 400


def modules() -> dict[str, Path]:
    """Module -> file, of everything but tests."""
    files = [*ROOT.glob("*.py"), *(p for top in ("util", "model", "demo", "bench") for p in (ROOT / top).rglob("*.py"))]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in files}


MODULES = modules()
TREES = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in MODULES.items()}


def imported(module: str) -> set[str]:
    """Modules of ours that a module imports anywhere, also inside functions; `from a import b` is a.b where that is a module."""
    found = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return {name for name in found if name in MODULES or name.split(".")[0] == "tests"} - {module}


def room(module: str) -> str:
    """The room of a module; `model` itself is the door that shows what model.build makes."""
    first, *rest = module.split(".")
    if module == "model":
        return "model.build"
    two = ".".join([first, *rest[:1]])
    return two if two in FLOOR else first if first in ("util", "model", "demo", "bench", "tests") else "programs"


def test_imports_go_one_way() -> None:
    wrong = [f"{module} imports {name}" for module in MODULES for name in imported(module)
             if room(name) != room(module) and FLOOR[room(name)] >= FLOOR[room(module)]]  # fmt: skip
    assert len(MODULES) > 80 and not wrong, "\n".join(wrong)


def test_there_is_no_circle() -> None:
    """Also none within a room. (Raises CycleError, which names the circle.)"""
    order = [*TopologicalSorter({module: imported(module) for module in MODULES}).static_order()]
    assert order.index("util.errors") < order.index("model.system") < order.index("train")


def test_the_ground_floor_is_small() -> None:
    assert {p.stem for p in (ROOT / "util").glob("*.py")} - {"__init__"} == set(GROUND)


def test_util_names_no_system_and_runs_no_module() -> None:
    wrong = []
    for module in (m for m in MODULES if room(m).startswith("util")):
        values = [node.value for node in ast.walk(TREES[module]) if isinstance(node, ast.Constant)]
        wrong += [f"{module} names {value!r}" for value in values if isinstance(value, str) and value in NAMES]
        wrong += [f"{module} uses runpy"] if "runpy" in MODULES[module].read_text(encoding="utf-8") else []
    assert not wrong, "\n".join(wrong)


def test_no_file_is_two_files() -> None:
    files = [*MODULES.values(), *(ROOT / "tests").rglob("*.py")]
    assert not {str(p.relative_to(ROOT)): n for p in files if (n := len(p.read_text(encoding="utf-8").splitlines())) > LONGEST}


def test_no_test_imports_another() -> None:
    """What several need is in tests/make; what is about golden files in tests/golden."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "tests").rglob("*.py")}
    wrong = [f"{path.name} imports {node.module}" for path, tree in trees.items() for node in ast.walk(tree)
             if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tests.test_")]  # fmt: skip
    assert not wrong, "\n".join(wrong)
