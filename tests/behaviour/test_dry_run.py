"""What --dry-run prints, and where: pipes that close, terminals of ASCII, too little memory."""

from __future__ import annotations

import json
import os
import resource
import subprocess
from pathlib import Path

import pytest

from sandbox import PIPELINE, SAMPLE, Sandbox


def test_a_pipe_that_is_closed_is_no_error(sandbox: Sandbox, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)  # as head does when it has seen enough
    done = subprocess.run(
        sandbox.command("--dry-run", "--source", SAMPLE),
        env=sandbox.child_environment(TMPDIR=str(tmp_path)),
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert done.returncode == 0, done.stderr
    assert "roken" not in done.stderr


def test_a_terminal_of_ascii_gets_escapes(sandbox: Sandbox, tmp_path: Path) -> None:
    source = tmp_path / "launches.json"
    (record,) = json.loads(SAMPLE.read_bytes())[:1]
    source.write_text(json.dumps([record | {"name": "🚀"}]))
    environment = {"TMPDIR": str(tmp_path), "PYTHONIOENCODING": "ascii"}
    done = sandbox.run("--dry-run", "--source", source, plainly=True, **environment)
    assert done.returncode == 0, done.stderr
    assert r"\U0001f680" in done.stdout


def test_too_little_memory_gets_a_sentence(sandbox: Sandbox, tmp_path: Path) -> None:
    (record,) = json.loads(SAMPLE.read_bytes())[:1]
    source = tmp_path / "launches.json"
    source.write_text(json.dumps([record | {"crew": ["x" * 60_000] * 5_000}]))
    done = subprocess.run(
        sandbox.command("--dry-run", "--source", source),
        env=sandbox.child_environment(TMPDIR=str(tmp_path), OPENBLAS_NUM_THREADS="1"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "transform: not enough memory" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("size", [70, 69], ids=["over", "under"])
def test_a_row_that_copy_may_refuse_is_warned_of(
    sandbox: Sandbox, tmp_path: Path, size: int
) -> None:
    records = json.loads(SAMPLE.read_bytes())
    records[3]["crew"] = ["x" * 60_000] * size
    source = tmp_path / "launches.json"
    source.write_text(json.dumps(records))
    done = sandbox.run("--config", PIPELINE, "--dry-run", "--source", source, TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    warning = 'public.launches, id="5eb87cdbffd86e000604b32d": the row has 4.2 MB of CSV'
    assert (warning in done.stderr) == (size == 70), done.stderr
