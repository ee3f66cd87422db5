"""Many experiments, one table: folds x shots x systems x seeds.

    python sweep.py pascal --systems HDMNet BAM BAM:vtp,vvp PI_CLIP --folds 0 1 2 3 --shots 1 5 --gpus 4
    python sweep.py demo Test_Finetune.protocol=strict --systems HDMNet PI_CLIP --folds 0 1
    python sweep.py coco --slurm slurm_partition=gpu gpus_per_node=1 timeout_min=2880

Each cell is `train.sh` and `test.sh` on one GPU (or on the CPU), as many at a time as there are GPUs (`--gpus`, `--jobs`), or
a SLURM job each (through submitit). Base learners that the cells need come first (of the overrides they take those of data,
network, protocol and machine). What is finished is not done again, what was
interrupted continues. The table lands in OUT/table.md, .csv and .tex, with the layout of the papers.
"""

import argparse
import itertools
import json
import os
import queue
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from model import system_class
from util import cli
from util.errors import UserError
from util.files import atomic, save_json

ROOT = Path(__file__).parent


@dataclass(frozen=True)
class Cell:
    """One training and its test."""

    arch: str
    priors: str  # comma-separated, "" for the system's own
    fold: int
    shot: int
    seed: int

    @property
    def label(self) -> str:
        return f"{self.arch} with {self.priors.replace(',', ' + ')}" if self.priors else self.arch


@dataclass(frozen=True)
class Sweep:
    """What all cells share."""

    data_set: str
    net: str
    out: str
    overrides: tuple[str, ...]

    def folder(self, cell: Cell) -> Path:
        """Runtime.output of a cell; base learners of all cells of a fold lie in OUT/base."""
        priors = cell.priors.replace("+", "-with-").replace(",", "+")  # a joined one, A+B, is not two, A,B
        kind = "base" if cell.arch == "PSPNet" else f"{priors or 'own'}/shot{cell.shot}/seed{cell.seed}"
        return Path(self.out) / kind

    def experiment(self, cell: Cell) -> Path:
        return self.folder(cell) / self.data_set / cell.arch / f"split{cell.fold}" / self.net

    def report(self, cell: Cell) -> Path:
        return self.experiment(cell) / "result/report.json"

    def arguments(self, cell: Cell) -> list[str]:
        own = [f"Runtime.output={self.folder(cell)}", f"Train.manual_seed={cell.seed}"]
        if cell.arch != "PSPNet":
            own.append(f"Train.shot={cell.shot}")
            if system_class(cell.arch).facts.before:
                base = self.experiment(Cell("PSPNet", "", cell.fold, 1, cell.seed)) / "snapshot/best.safetensors"
                own.append(f"Method.pre_weight={base}")
            if cell.priors:
                own.append(f"Method.priors=[{cell.priors}]")
        shared = ("Data.", "Method.backbone", "Method.width", "Runtime.", "Test_Finetune.", "Train.workers", "Train.use_split")
        return [*(o for o in self.overrides if cell.arch != "PSPNet" or o.startswith(shared)), *own]


def run(sweep: Sweep, cell: Cell, gpus: int, device: str | None) -> str:
    """Trains and tests a cell; returns "" or what went wrong. Picklable: SLURM runs it on another machine."""
    if sweep.report(cell).is_file():
        return ""
    folder = sweep.experiment(cell)
    folder.mkdir(parents=True, exist_ok=True)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"ARCH": cell.arch, "NET": sweep.net, "PATH": path}
    if device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = device
    with (folder / "sweep.log").open("a") as log:
        for script in ("train.sh", "test.sh") if system_class(cell.arch).facts.trained else ("test.sh",):
            command = ["sh", script, f"split{cell.fold}", sweep.data_set, str(gpus), *sweep.arguments(cell)]
            code = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode
            if code:
                last = (folder / "sweep.log").read_text().strip().splitlines()[-1:]
                return f"{script} ended with code {code}: {' '.join(last)} (see {folder / 'sweep.log'})"
    return ""


def on_this_machine(sweep: Sweep, cells: Sequence[Cell], gpus: int, jobs: int) -> list[str]:
    """All cells, `jobs` at a time on the CPU or one for each GPU; messages in the order of the cells."""
    free: queue.Queue[str | None] = queue.Queue()
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name] or [str(i) for i in range(gpus)]
    if len(visible) < gpus:
        raise UserError(f"--gpus {gpus}: CUDA_VISIBLE_DEVICES names {len(visible)}")
    for slot in visible[:gpus] or [None] * jobs:
        free.put(slot)

    def work(cell: Cell) -> str:
        device = free.get()
        try:
            return announce(sweep, cell, run(sweep, cell, min(gpus, 1), device))
        finally:
            free.put(device)

    with ThreadPoolExecutor(gpus or jobs) as pool:
        return list(pool.map(work, cells))


def on_slurm(sweep: Sweep, cells: Sequence[Cell], parameters: dict[str, str | int]) -> list[str]:
    """All cells as SLURM jobs."""
    try:
        import submitit
    except ImportError as error:
        raise UserError("--slurm needs the package submitit: pip install submitit") from error
    executor = submitit.AutoExecutor(folder=str(Path(sweep.out) / "slurm"))
    executor.update_parameters(**parameters)
    jobs = executor.map_array(run, *zip(*[(sweep, cell, 1, None) for cell in cells], strict=True)) if cells else []
    messages = []
    for cell, job in zip(cells, jobs, strict=True):
        error = job.exception()
        messages.append(announce(sweep, cell, f"the SLURM job failed: {error}" if error else job.result()))
    return messages


def announce(sweep: Sweep, cell: Cell, message: str) -> str:
    score = "" if message else f"mIoU {100 * json.loads(sweep.report(cell).read_text())['mean']['miou']:.2f}"
    print(f"{cell.label}, split{cell.fold}, {cell.shot}-shot, seed {cell.seed}: {message or score}", flush=True)
    return message


def table(sweep: Sweep, cells: Sequence[Cell]) -> list[list[str]]:
    """Rows of text: a row per system and shot; folds, their mean, FB-IoU. Several seeds: mean ± sd of each fold."""
    folds = sorted({cell.fold for cell in cells})
    rows = [["system", "shot", *(f"fold {fold}" for fold in folds), "mean", "FB-IoU"]]
    for (label, shot), group in itertools.groupby(
        sorted(cells, key=lambda c: (order(cells, c), c.shot)), key=lambda c: (c.label, c.shot)
    ):
        by_fold: dict[int, list[dict]] = {fold: [] for fold in folds}
        for cell in group:
            if sweep.report(cell).is_file():
                by_fold[cell.fold].append(json.loads(sweep.report(cell).read_text())["mean"])
        complete = all(by_fold.values())
        means = {key: [statistics.mean(m[key] for m in found) for found in by_fold.values()] if complete else []
                 for key in ("miou", "fb_iou")}
        rows.append([label, str(shot), *(spread([m["miou"] for m in by_fold[fold]]) for fold in folds),
                     *(f"{100 * statistics.mean(values):.2f}" if values else "–" for values in means.values())])
    return rows


def order(cells: Sequence[Cell], cell: Cell) -> int:
    """Systems stand in the table as they were asked for."""
    return next(i for i, other in enumerate(cells) if other.label == cell.label)


def spread(values: Sequence[float]) -> str:
    """Mean, with the sample deviation where there are several; percent."""
    if not values:
        return "–"
    deviation = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.2f}{deviation}"


def write_table(out: Path, rows: Sequence[Sequence[str]]) -> None:
    """table.md, table.csv and table.tex."""
    head, *body = rows
    line = lambda row: "| " + " | ".join(row) + " |"  # noqa: E731
    latex = lambda row: " & ".join(row).replace("±", r"$\pm$").replace("–", "--").replace("_", r"\_") + r" \\"  # noqa: E731
    texts = {
        "md": [line(head), "|" + "---|" * len(head), *map(line, body)],
        "csv": [",".join(row) for row in rows],
        "tex": [r"\begin{tabular}{l" + "c" * (len(head) - 1) + "}", r"\toprule", latex(head), r"\midrule", *map(latex, body),
                r"\bottomrule", r"\end{tabular}"],
    }  # fmt: skip
    for suffix, lines in texts.items():
        with atomic(out / f"table.{suffix}") as path:
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_set", help="a folder of config/")
    parser.add_argument("overrides", nargs="*", metavar="Section.key=value")
    parser.add_argument("--systems", nargs="+", default=["PI_CLIP"], metavar="ARCH[:PRIORS]", help="e.g. HDMNet BAM:vtp,vvp")
    parser.add_argument("--folds", nargs="+", type=int, default=[0, 1, 2, 3])
    parser.add_argument("--shots", nargs="+", type=int, default=[1])
    parser.add_argument("--seeds", nargs="+", type=int, default=[321], help="of the training (Train.manual_seed)")
    parser.add_argument("--net", default="resnet50")
    parser.add_argument("--gpus", type=int, default=0, help="of this machine; a cell runs on one")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time on the CPU")
    parser.add_argument("--slurm", nargs="+", metavar="key=value", help="parameters of submitit's AutoExecutor")
    parser.add_argument("--out", help="default exp/sweep/DATASET")
    return parser.parse_intermixed_args()


def main() -> None:
    given = parse()
    os.chdir(ROOT)  # folders are relative to the repository, as in train.sh
    if wrong := [o for o in given.overrides if "=" not in o or "." not in o.partition("=")[0]]:
        raise UserError(f"{wrong[0]!r} is not of the form Section.key=value")
    if mine := [o for o in given.overrides if o.partition("=")[0] in ("Train.shot", "Train.manual_seed", "Runtime.output")]:
        raise UserError(f"{mine[0]}: the sweep sets this itself (--shots, --seeds, --out)")
    out = given.out or f"exp/sweep/{given.data_set}"
    sweep = Sweep(given.data_set, given.net, out, tuple(given.overrides))
    cells = []
    for system, fold, shot, seed in itertools.product(given.systems, given.folds, given.shots, given.seeds):
        arch, _, priors = system.partition(":")
        system_class(arch)
        config = ROOT / f"config/{given.data_set}/{given.data_set}_split{fold}_{given.net}.yaml"
        if not config.is_file():
            raise UserError(f"no {config.relative_to(ROOT)} (data set, --folds, --net)")
        cells.append(Cell(arch, priors, fold, shot, seed))
    settings, file = json.loads(json.dumps(asdict(sweep))), Path(out) / "sweep.json"
    if file.is_file() and json.loads(file.read_text()) != settings:
        raise UserError(f"{file} is of a sweep with other settings; choose another --out, or delete that folder")
    save_json(file, settings)

    work: Callable[[Sequence[Cell]], list[str]]
    if given.slurm:
        pairs = dict(pair.partition("=")[::2] for pair in given.slurm)
        work = lambda some: on_slurm(sweep, some, {k: int(v) if v.isdigit() else v for k, v in pairs.items()})  # noqa: E731
    else:
        work = lambda some: on_this_machine(sweep, some, given.gpus, given.jobs)  # noqa: E731
    on_base = any(system_class(cell.arch).facts.before for cell in cells)
    bases = [Cell("PSPNet", "", fold, 1, given.seeds[0]) for fold in given.folds if on_base]
    failed = [m for m in work(bases) if m]
    if not failed:
        failed = [m for m in work(cells) if m]
    rows = table(sweep, cells)
    write_table(Path(out), rows)
    print("\n" + (Path(out) / "table.md").read_text() + f"{out}/table.md, .csv, .tex")
    if failed:
        raise UserError(f"{len(failed)} of {len(bases) + len(cells)} runs failed; the same command continues with them")


if __name__ == "__main__":
    cli.run(main)
