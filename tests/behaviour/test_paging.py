"""Sources that answer page by page, rate limits, headers, and newline-delimited JSON."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers import THINGS, Done, Load, Records, assert_table, page, responds, things
from sandbox import BUCKET, LIBRARY, LIBRARY_CONFIG, LIBRARY_PAGE, LIBRARY_QUESTIONS, ROOT, Sandbox

DIGITS = b"0.1234567890123456789012345"  # more than a double holds
PAGED = {"records": "results", "next": "next"}


def rows_of(sandbox: Sandbox) -> Records:
    return sandbox.query("SELECT id, name FROM public.things ORDER BY id")


def archive(sandbox: Sandbox) -> tuple[str, bytes]:
    """The URL of the only raw response in the bucket, and its text."""
    ((key, data),) = [item for item in sandbox.objects().items() if "/raw/" in item[0]]
    return f"s3://{BUCKET}/{key}", gzip.decompress(data)


# --- pages --------------------------------------------------------------------------------------


def test_all_pages_are_loaded_archived_and_replayed(sandbox: Sandbox, load: Load) -> None:
    url = sandbox.source.url
    awkward = b'"\xc3\xa9\\ud83d\\ude80\\n\xe2\x80\xa8"'
    last = b'{"id": 5, "name": "a5", "more": [%s, %s, {}]}' % (awkward, DIGITS)
    records = [*things(1, 2, 3, 4), json.loads(last)]
    done = load(
        page(records[:2], f"{url}?page=2"),
        page([], "?page=3"),  # relative to the page it stands on
        page(records[2:4], "/other/things?page=4"),
        responds(200, b'{"next": "/other/more", "results": [%s]}' % last),
        page([], ""),
        **PAGED,
    )
    assert done.returncode == 0, done.stderr
    path = "/v5/launches"
    wanted = [path, f"{path}?page=2", f"{path}?page=3", "/other/things?page=4", "/other/more"]
    assert sandbox.source.requests == wanted
    assert rows_of(sandbox) == things(1, 2, 3, 4, 5)
    raw, text = archive(sandbox)
    assert raw.endswith("/response.ndjson.gz")
    assert [json.loads(line) for line in text.splitlines()] == records
    assert DIGITS in text
    (audit,) = sandbox.query("SELECT raw, source, rows_loaded FROM public.etl_runs")
    assert audit == {"raw": raw, "source": url, "rows_loaded": 5}

    sandbox.query("DELETE FROM public.things RETURNING id")
    sandbox.source.requests.clear()
    done = load(arguments=("--source", raw), **PAGED)
    assert done.returncode == 0, done.stderr
    assert sandbox.source.requests == []
    assert rows_of(sandbox) == things(1, 2, 3, 4, 5)


def test_a_record_that_moved_between_two_pages_is_kept_once(sandbox: Sandbox, load: Load) -> None:
    columns = {"thing.id": "integer", "position": "integer", "value": "varchar(8)"}
    parts = {"rows": "parts", "parent": "thing", "key": ["thing_id", "position"]}
    settings = PAGED | {"tables": THINGS | {"public.parts": parts | {"columns": columns}}}
    first, early, late, last = (
        {"id": number, "name": name, "parts": [name, "x"]}
        for number, name in ((1, "same"), (2, "early"), (2, "late"), (3, "same"))
    )
    kept: list[dict[str, Any]] = [first, late, last]

    def assert_kept(done: Done) -> None:
        assert done.returncode == 0, done.stderr
        assert rows_of(sandbox) == [{n: r[n] for n in ("id", "name")} for r in kept]
        query = "SELECT thing_id, value FROM public.parts ORDER BY thing_id, position"
        values = [{"thing_id": r["id"], "value": value} for r in kept for value in r["parts"]]
        assert sandbox.query(query) == values

    assert_kept(load(page([first, early], "?2"), page([late, last]), **settings))
    raw, text = archive(sandbox)
    assert sorted(map(json.loads, text.splitlines()), key=lambda r: r["id"]) == kept
    assert_kept(load(arguments=("--source", raw), **settings))


# --- Launch Library 2, and the news -------------------------------------------------------------


def test_launch_library_is_loaded_and_kept_up_to_date(sandbox: Sandbox) -> None:
    launches = json.loads(LIBRARY.read_bytes())
    arguments = "--config", LIBRARY_CONFIG, "--source", sandbox.url_of(LIBRARY_CONFIG)
    done = sandbox.run(*arguments)
    assert done.returncode == 0, done.stderr
    assert "WARNING pipeline transform" not in done.stderr  # every field has its column
    assert len(sandbox.source.requests) == -(-len(launches) // LIBRARY_PAGE) == 3
    for launch in launches:
        body = launch["pad"]["location"]["celestial_body"]
        assert body["mass"] == 5972168e18
        body["mass"] = 5972168 * 10**18  # as PostgreSQL shows it
    ((name, table),) = yaml.safe_load(LIBRARY_CONFIG.read_bytes())["tables"].items()
    assert_table(sandbox, name, table, launches)
    flights, pads = (sandbox.query(sql) for sql in LIBRARY_QUESTIONS.values())
    first, last = ((flight["mission"], flight["status"]) for flight in flights[::11])
    assert (first, last) == (("FalconSat", "Failure"), ("Dragonfly", "TBD"))
    assert [pad["launches"] for pad in pads] == [7, 3, 1, 1]

    launches[3] |= {"net": "2030-01-01T00:00:00Z", "mission": None, "rocket": None, "pad": None}
    sandbox.source.answers = [page(launches[3:5])]
    query = "SELECT id, net, _run_id FROM public.ll2_launches"
    (earlier,) = {row["_run_id"] for row in sandbox.query(query)}
    done = sandbox.run(*arguments)
    assert done.returncode == 0, done.stderr
    rows = sandbox.query(query)
    assert len(rows) == len(launches)
    renewed = {row["id"]: row["net"] for row in rows if row["_run_id"] != earlier}
    assert renewed.keys() == {launch["id"] for launch in launches[3:5]}
    assert max(renewed.values()) == datetime(2030, 1, 1, tzinfo=UTC)


@pytest.mark.ci
def test_the_sandbox_shows_launch_library() -> None:
    command = [sys.executable, "tests/sandbox.py", "--config", "conf/examples/launch_library.yaml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pages 3, records 12" in done.stderr
    for row in (r"\| MIN +\| Falcon 9 Block 5 \| IXPE", r"\| Launch Complex 39A +\| Kennedy"):
        assert re.search(row, done.stdout), done.stdout


def test_the_news_are_loaded(sandbox: Sandbox, tmp_path: Path) -> None:
    config, articles = ROOT / "conf" / "examples" / "news.yaml", ROOT / "tests/data/news.json"
    arguments = "--config", config, "--dry-run", "--source", articles
    done = sandbox.run(*arguments, TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    assert "59548105-347d" in done.stdout
