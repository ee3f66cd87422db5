"""The docs say what is there: files, functions, keys, values, links; their code runs; the site builds without a warning."""

import ast
import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from model import SYSTEMS, configure
from model.build import FAMILIES
from model.system import Frozen
from util.config import Config

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
TEXTS = [*PAGES, ROOT / "README.md", ROOT / "bench/RESULTS.md", ROOT / "demo/README.md", ROOT / "lists/README.md"]
ABOUT_CODE = [*sorted((DOCS / "systems").glob("*.md")), DOCS / "extending.md"]

FENCE = re.compile(r"^```(\w*)(?: title=\"[^\"]+\")?\n(.*?)^```", re.MULTILINE | re.DOTALL)
TITLED = re.compile(r"^```\w* title=\"([^\"]+)\"\n(.*?)^```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
KEY = re.compile(r"(?<![\w./])(Data|CLIP|Train|Method|System|Test_Finetune|Runtime)\.([A-Za-z_]\w*)(=\[[^\]]*\]|=[^\s`|,;)\"]+)?")
SCORE = re.compile(r"\d+\.\d+ ± +\d+\.\d+")

ids = lambda page: str(page.relative_to(ROOT))  # noqa: E731


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return FENCE.sub("", page.read_text())


def defines(file: Path, name: str) -> bool:
    """Whether a file defines NAME, or a class with it: Class.method."""
    body = ast.parse(file.read_text()).body
    for part in name.split("."):
        for node in body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            if part in [getattr(node, "name", None), *(getattr(target, "id", None) for target in targets)]:
                body = getattr(node, "body", [])
                break
        else:
            return False
    return True


def wrong_spans(text: str, folder: Path, paths_too: bool = True) -> list[str]:
    """Code spans that name a file, or FILE.py::NAME, which is not there; with `paths_too` also those of any other file."""
    wrong = []
    for span in SPAN.findall(text):
        path, _, name = span.partition("::")
        is_code = re.fullmatch(r"[\w/-]+\.py", path)
        is_path = paths_too and re.fullmatch(r"(bench|config|demo|docs|lists|model|tests|util)/[\w./-]+", path)
        if not (is_code or is_path) or re.search(r"[A-Z]{3,}", path):  # NAME stands for anything
            continue
        file = next((f for f in (ROOT / path, ROOT / "tests" / path, folder / path) if f.exists()), None)
        if file is None or (name and not defines(file, name)):
            wrong.append(span)
    return wrong


def anchors(page: Path) -> set[str]:
    """The ids that the headings of a page get."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def wrong_links(text: str, page: Path) -> list[str]:
    """Relative links to nothing."""
    wrong = []
    for link in LINK.findall(FENCE.sub("", text)):
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        if re.match(r"[a-z]+:", link):
            continue
        if not file.exists() or (anchor and anchor not in anchors(file)):
            wrong.append(link)
    return wrong


def names_of_fields(options: type) -> set[str]:
    return {f.name for f in dataclasses.fields(options)}


def wrong_commands(text: str) -> list[str]:
    """`python -m MODULE [COMMAND]` of ours where there is no such module, or no such word in it."""
    wrong = []
    for module, word in re.findall(r"python -m ((?:bench|demo|model|tests|util)[\w.]*)(?: ([a-z]\w+))?", text):
        path = ROOT.joinpath(*module.split("."))
        file = next((f for f in (path.with_suffix(".py"), path / "__main__.py") if f.exists()), None)
        commands = "" if file is None else file.read_text()
        if file is None or (word and "add_parser" in commands and f'"{word}"' not in commands):
            wrong.append(f"{module} {word}".strip())
    return wrong


def wrong_keys(text: str) -> list[str]:
    """`Section.key` or `Section.key=value` that the config has not or refuses. Values in capitals or ... stand for anything."""
    wrong = []
    for section, key, value in KEY.findall(text):
        owners = {arch: cls.Options if section == "Method" else type(getattr(Config(), section)) for arch, cls in SYSTEMS.items()}
        archs = [arch for arch, owner in owners.items() if key in {f.name for f in dataclasses.fields(owner)}]
        if section == "Method" and re.search(rf"^    {key}: ", text, re.MULTILINE):  # an option that the page defines
            continue
        if not archs:
            wrong.append(f"{section}.{key}")
        elif value and not re.fullmatch(r"=[A-Z_.]+", value):
            try:
                configure(ROOT / "config/demo/demo_split0_resnet50.yaml", archs[0], [f"{section}.{key}{value}"])
            except ValueError:
                wrong.append(f"{section}.{key}{value}")
    return wrong


def test_the_checks_find_mistakes() -> None:
    good = "`train.py` `model/build.py::SYSTEMS` `model/few_shot/matcher.py::Match.forward` `config/NAME/base.yaml` `config/demo`"
    bad = "`trian.py` `model/build.py::SYSTEM` `model/few_shot/matcher.py::Match.backward` `config/dmeo`"
    assert not wrong_spans(good, DOCS) and len(wrong_spans(bad, DOCS)) == 4
    good, bad = "[a](data.md) [b](protocols.md#leaks) [c](../README.md)", "[a](date.md) [b](protocols.md#leeks) [c](README.md)"
    assert not wrong_links(good, DOCS / "index.md") and len(wrong_links(bad, DOCS / "index.md")) == 3
    good = "Train.shot Train.shot=5 Train.selection=RULE Method.stages=3"
    bad = "Train.short Train.shot=five Train.selection=lst Method.stage Method.stages=0"
    assert not wrong_keys(good) and len(wrong_keys(bad)) == 5
    good = "`python -m util.data index`, `python -m demo.web --clip`"
    bad = "`python -m util.episodes`, `python -m util.prepare custom`"
    assert not wrong_commands(good) and len(wrong_commands(bad)) == 2


@pytest.mark.parametrize("page", TEXTS, ids=ids)
def test_named_files_functions_and_keys_exist(page: Path) -> None:
    written = {file for file, _ in TITLED.findall(page.read_text())}  # by the page itself
    assert not {*wrong_spans(prose(page), page.parent, page in ABOUT_CODE)} - written
    assert not wrong_keys(page.read_text())
    assert not wrong_commands(page.read_text())


@pytest.mark.parametrize("page", TEXTS, ids=ids)
def test_links_lead_somewhere(page: Path) -> None:
    assert not wrong_links(page.read_text(), page)


def test_recipes_are_those_of_the_configs() -> None:
    """Tables whose head is | `ARCH=NAME` | data set | ... | give keys and their values."""
    cells = 0
    for page in ABOUT_CODE:
        for arch, heads, body in re.findall(r"^\| `ARCH=(\w+)` \|(.+)\|\n\|[-|]+\n((?:\|.+\n)+)", page.read_text(), re.MULTILINE):
            sets = [head.strip() for head in heads.split("|")]
            configs = [configure(ROOT / f"config/{name}/{name}_split0_resnet50.yaml", arch) for name in sets]
            for row in body.splitlines():
                key, *values = [cell.strip(" `") for cell in row.strip("|").split("|")]
                section, name = key.split(".")
                found = [getattr(getattr(config, section), name) for config in configs]
                assert [yaml.safe_load(value) for value in values] == found, f"{page}: {arch} {key}"
                cells += len(values)
    assert cells > 60


def test_measured_numbers_stand_in_the_results() -> None:
    readme, results = (ROOT / "README.md").read_text(), (DOCS / "results.md").read_text()
    output = next(text for _, text in FENCE.findall((DOCS / "getting-started.md").read_text()) if "mIoU" in text)
    assert output in readme
    told = [*ABOUT_CODE, ROOT / "README.md"]
    found = [(page.name, score) for page in told for score in SCORE.findall(page.read_text().replace(output, ""))]
    assert len(found) > 10 and not [score for score in found if score[1] not in re.sub(" +", " ", results + output)]


def test_extending_runs(small_clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's files are written, its blocks run in order; both systems learn, predict and take part in a whole evaluation."""
    monkeypatch.chdir(small_clone)
    monkeypatch.setattr("model.build.FAMILIES", dict(FAMILIES))
    for name in ("Tiny", "LinearProbe"):
        monkeypatch.setitem(SYSTEMS, name, None)  # taken out again afterwards
    page = (DOCS / "extending.md").read_text()
    for file, text in TITLED.findall(page):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text(text)
    names: dict = {}
    for language, block in FENCE.findall(page):
        if language == "python":
            exec(compile(block, "docs/extending.md", "exec"), names)
    assert isinstance(names["system"].priors[0], names["PrototypePrior"])
    assert 0.3 < float(names["loss"].detach()) < 3  # of two classes, untrained
    assert names["prediction"].final.shape == (1, 2, 129, 129) and names["mask"].shape == names["episode"].original_mask[0].shape
    assert 0.5 < float(names["dense_loss"].detach()) < 3  # of three
    assert names["dense"].final.shape == (1, 3, 129, 129) and names["wide"].final.shape == (1, 3, 97, 129)
    assert names["labels"].shape == names["image"].original_label[0].shape
    rates = [(group["lr"], group["weight_decay"]) for group in names["optimizer"].param_groups]
    assert rates == [(0.0003, 0.01), (0.0006, 0)]
    for system in (names["system"], names["probe"]):
        assert all(p.grad is not None for p in system.trained.parameters())
        frozen = [p for child in system.children() if isinstance(child, Frozen) for p in child.parameters()]
        assert frozen and all(p.grad is None for p in frozen)
    values = {int(value) for data in (names["data"], names["scenes"].validation().data) for i in range(20)
              for value in data[i].label.unique()}  # fmt: skip
    assert values == {0, 1, 2, 255}  # the table of the page: background, post, shed, all else


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="the docs group of pyproject.toml is not installed: pip install mkdocs-material")
    shutil.copytree(DOCS, tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}  # Material's notice of its end of life, May 2027
    built = subprocess.run(command, cwd=tmp_path, env=quiet, capture_output=True, text=True)
    assert built.returncode == 0 and "WARNING" not in built.stderr, built.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(PAGES)
    for page in pages:
        assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=\"(https?:)?//", page.read_text()), page
    assert not (tmp_path / "site/hooks.py").exists()
