"""The measuring in tests/bench notices wrong files, and what another version of main.py stages."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from sandbox import MAIN, ROOT

pytestmark = pytest.mark.ci
BENCH = ROOT / "tests" / "bench"
ROWS = 1_000


def compare(folder: Path, *more: str | Path) -> subprocess.CompletedProcess[str]:
    """Measures the contenders that need nothing installed, once."""
    options = ["--sizes", str(ROWS), "--contenders", "pandas", "floor", "--repeats", "1"]
    program = sys.executable, BENCH / "compare.py"
    command: list[str | Path] = [*program, *options, "--folder", folder, *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_refuses_to_measure_when_a_row_is_missing(tmp_path: Path) -> None:
    path = tmp_path / f"launches-{ROWS}.json"
    subprocess.run([sys.executable, BENCH / "generate.py", str(ROWS - 1), path], check=True)
    done = compare(tmp_path)
    assert done.returncode == 1
    assert f"wrong files, {ROWS} rows expected" in done.stderr


OTHER = """
import pathlib, runpy, sys
source = pathlib.Path(sys.argv.pop())
sys.argv.append(str(source.with_name("read.json")))
pathlib.Path(sys.argv[-1]).write_text(source.read_text().replace("Falcon", {!r}, 1))
runpy.run_path({!r}, run_name="__main__")
"""


def test_compares_with_another_version(tmp_path: Path) -> None:
    other = tmp_path / "other.py"
    other.write_text(OTHER.format("Falcon", str(MAIN)))
    done = compare(tmp_path, "--against", other)
    assert re.search(r"beside other\.py, .* times the memory\. The CSV is the same", done.stdout)
    other.write_text(OTHER.format("Eagle", str(MAIN)))
    done = compare(tmp_path, "--against", other)
    assert done.returncode == 1
    assert re.search(r"public.launches, line \d+, byte \d+: .*Falcon.*, not .*Eagle", done.stderr)
