"""What --dry-run prints, and where: pipes that close, terminals of ASCII, too little memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers import launches
from sandbox import Sandbox


def test_a_pipe_that_is_closed_is_no_error(sandbox: Sandbox, tmp_path: Path) -> None:
    head = ("bash", "-c", '"$0" "$@" | true; exit ${PIPESTATUS[0]}')  # has seen enough at once
    done = sandbox.run("--dry-run", wrapper=head, TMPDIR=str(tmp_path))
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "roken" not in done.stderr


def test_a_terminal_of_ascii_gets_escapes(sandbox: Sandbox, tmp_path: Path) -> None:
    source = tmp_path / "launches.json"
    source.write_text(json.dumps([launches()[0] | {"name": "🚀"}]))
    environment = {"TMPDIR": str(tmp_path), "PYTHONIOENCODING": "ascii"}
    done = sandbox.run("--dry-run", "--source", source, plainly=True, **environment)
    assert done.returncode == 0, done.stderr
    assert r"\U0001f680" in done.stdout


def test_too_little_memory_gets_a_sentence(sandbox: Sandbox, tmp_path: Path) -> None:
    source = tmp_path / "launches.json"
    source.write_text(json.dumps([launches()[0] | {"crew": ["x" * 60_000] * 5_000}]))
    environment = {"TMPDIR": str(tmp_path), "OPENBLAS_NUM_THREADS": "1"}
    limit = ("sh", "-c", 'ulimit -v 1048576; exec "$@"', "sh")  # a GiB
    done = sandbox.run("--dry-run", "--source", source, wrapper=limit, **environment)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "transform: not enough memory" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("size", [70, 69], ids=["over", "under"])
def test_a_row_that_copy_may_refuse_is_warned_of(
    sandbox: Sandbox, tmp_path: Path, size: int
) -> None:
    records = launches()
    records[3]["crew"] = ["x" * 60_000] * size
    source = tmp_path / "launches.json"
    source.write_text(json.dumps(records))
    done = sandbox.run("--dry-run", "--source", source, TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    warning = f'public.launches, id="{records[3]["id"]}": the row has 4.2 MB of CSV'
    assert (warning in done.stderr) == (size == 70), done.stderr
