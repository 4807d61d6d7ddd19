"""The program, run as a user runs it, against the sandbox."""

from __future__ import annotations

from sandbox import Sandbox


def test_first_load(sandbox: Sandbox) -> None:
    done = sandbox.run()
    assert done.returncode == 0, done.stderr
    assert sandbox.query("SELECT count(*) AS rows FROM public.launches") == [{"rows": 30}]
    assert sandbox.query("SELECT count(*) AS rows FROM public.launch_cores") == [{"rows": 38}]


def test_second_load_leaves_no_duplicates(sandbox: Sandbox) -> None:
    for _ in range(2):
        done = sandbox.run()
        assert done.returncode == 0, done.stderr
    counts = "SELECT count(*) AS rows, count(DISTINCT id) AS ids FROM public.launches"
    assert sandbox.query(counts) == [{"rows": 30, "ids": 30}]
