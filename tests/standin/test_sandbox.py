"""The sandbox: a fork of the program is as good as one that Python starts."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil
import pytest

from helpers import stalled
from sandbox import NO_PAUSES, Sandbox

in_both_ways = pytest.mark.parametrize("plainly", [True, False], ids=["plainly", "forked"])


@in_both_ways
def test_a_run_is_a_process_of_its_own(sandbox: Sandbox, tmp_path: Path, plainly: bool) -> None:
    options = {"cwd": tmp_path, "plainly": plainly, "TMPDIR": str(tmp_path)}
    with stalled(sandbox, "--dry-run", **options) as process:
        assert psutil.Process(process.pid).cwd() == str(tmp_path)
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (-signal.SIGKILL, "")
    assert stderr.endswith(f"from {sandbox.source.url}\n")
    assert not psutil.pid_exists(process.pid)


@in_both_ways
def test_how_it_ends_and_what_it_prints(sandbox: Sandbox, plainly: bool) -> None:
    done = sandbox.run("--help", plainly=plainly, COLUMNS="40")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: main.py [-h]")
    assert max(map(len, done.stdout.splitlines())) <= 40
    done = sandbox.run("--config", "nowhere.yaml", plainly=plainly, LOG_FORMAT="json")
    assert (done.returncode, done.stdout) == (2, "")
    assert "nowhere.yaml: No such file" in done.stderr


def test_a_patch_is_for_one_run(sandbox: Sandbox) -> None:
    assert sandbox.run("--help", patch=f"{NO_PAUSES}; raise SystemExit(7)").returncode == 7
    assert sandbox.run("--help").returncode == 0
