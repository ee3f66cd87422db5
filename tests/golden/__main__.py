"""`python -m tests.golden [FILE or DIR ...]`: prints a table of errors, exits 1 on any miss.

Files of systems that this code base does not have yet are named and left out; checking no file at all is a miss.
"""

import sys
from pathlib import Path

import torch

from tests.golden.check import CHECKS, check_file, system_of


def main(arguments: list[str]) -> int:
    torch.backends.cuda.matmul.allow_tf32 = False
    places = [Path(a) for a in arguments] or [Path(__file__).parent]
    files = [f for place in places for f in (sorted(place.glob("*.npz")) if place.is_dir() else [place])]
    checked, missed = 0, 0
    for file in files:
        if not file.is_file():
            print(f"{file}: no such file")
            missed += 1
            continue
        if system_of(file) not in CHECKS:
            print(f"{file.name}: of a system that is not built yet, left out")
            continue
        print(f"{file.name}")
        for row in check_file(file):
            print(f"  {row.name:<34} {row.error:10.2e}  tolerance {row.tolerance:.0e}  {'ok' if row.ok else 'MISS'}")
            missed += not row.ok
        checked += 1
    print(f"{checked} files checked, {missed} misses")
    return 1 if missed or not checked else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
