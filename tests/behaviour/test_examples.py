"""The configurations in conf/examples, beside those that test_paging.py plays."""

from __future__ import annotations

import json
import re
import subprocess
import sys

from sandbox import PLACES, QUERY_CONFIG, ROOT, SAMPLE, Sandbox


def test_a_query_gives_launches_the_names_of_their_places(sandbox: Sandbox) -> None:
    arguments = "--config", QUERY_CONFIG, "--source", sandbox.url_of(QUERY_CONFIG)
    done = sandbox.run(*arguments)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr  # every field has its column
    assert [json.loads(body)["options"].get("page", 1) for body in sandbox.source.posted] == [
        1,
        2,
        3,
    ]
    places = json.loads(PLACES.read_bytes())
    loaded = sandbox.query(
        "SELECT id, rocket_id, rocket_name, launchpad_full_name FROM public.launches_with_places"
    )
    assert {row["id"]: row for row in loaded} == {
        launch["id"]: {
            "id": launch["id"],
            "rocket_id": launch["rocket"],
            "rocket_name": places["rocket"][launch["rocket"]]["name"],
            "launchpad_full_name": places["launchpad"][launch["launchpad"]]["full_name"],
        }
        for launch in json.loads(SAMPLE.read_bytes())
    }


def test_the_sandbox_shows_the_query() -> None:
    command = [sys.executable, "tests/sandbox.py", "--config", str(QUERY_CONFIG.relative_to(ROOT))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pages 3, records 30" in done.stderr
    row = r"\| Falcon 1 +\| Omelek Island, Kwajalein Atoll +\| +5 \| 2006-03-24"
    assert re.search(row, done.stdout), done.stdout
