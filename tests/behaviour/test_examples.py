"""The configurations in conf/examples, beside those that test_paging.py plays."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import launches, load_config
from sandbox import PLACES, QUERY_CONFIG, ROOT, Sandbox

EXAMPLES = sorted((ROOT / "conf" / "examples").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_valid(path: Path) -> None:
    assert load_config(path).tables


def test_a_query_gives_launches_the_names_of_their_places(sandbox: Sandbox) -> None:
    done = sandbox.run("--config", QUERY_CONFIG, "--source", sandbox.url_of(QUERY_CONFIG))
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr  # every field has its column
    bodies = map(json.loads, sandbox.source.posted)
    assert [body["options"].get("page") for body in bodies] == [None, 2, 3]
    places = json.loads(PLACES.read_bytes())
    rows = sandbox.query("""
        SELECT id, rocket_id, rocket_name, launchpad_full_name, launchpad_latitude
        FROM public.launches_with_places ORDER BY id""")
    wanted = [
        {
            "id": launch["id"],
            "rocket_id": launch["rocket"],
            "rocket_name": places["rocket"][launch["rocket"]]["name"],
            "launchpad_full_name": places["launchpad"][launch["launchpad"]]["full_name"],
            "launchpad_latitude": places["launchpad"][launch["launchpad"]]["latitude"],
        }
        for launch in launches()
    ]
    assert rows == sorted(wanted, key=lambda row: row["id"])


@pytest.mark.ci
def test_the_sandbox_shows_the_query() -> None:
    command = [sys.executable, "tests/sandbox.py", "--config", "conf/examples/launches_query.yaml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pages 3, records 30" in done.stderr
    row = r"\| Falcon 1 +\| Omelek Island, Kwajalein Atoll +\| +5 \| 2006-03-24"
    assert re.search(row, done.stdout), done.stdout
