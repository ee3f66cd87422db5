"""Parity with the published implementations, array by array; `python -m tests.golden` prints the same as a table."""

from pathlib import Path

import pytest

from tests.golden.check import check_file

FILES = sorted((Path(__file__).parent / "golden").glob("*.npz"))


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=[f.stem for f in FILES])
def test_published_arrays(file: Path) -> None:
    rows = list(check_file(file))
    assert len(rows) >= 4
    assert not [row for row in rows if not row.ok]
