"""The configurations in conf/examples, with sources that answer as the real ones do."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml

from helpers import assert_table, launches, load_config, loaded, page
from sandbox import (
    LIBRARY,
    LIBRARY_CONFIG,
    LIBRARY_PAGE,
    LIBRARY_QUESTIONS,
    PLACES,
    QUERY_CONFIG,
    ROOT,
    Sandbox,
)

EXAMPLES = {path.stem: path for path in sorted((ROOT / "conf" / "examples").glob("*.yaml"))}


@pytest.mark.parametrize("path", EXAMPLES.values(), ids=EXAMPLES)
def test_an_example_is_valid(path: Path) -> None:
    assert load_config(path).tables


def test_launch_library_is_loaded_and_kept_up_to_date(sandbox: Sandbox) -> None:
    launches = json.loads(LIBRARY.read_bytes())
    arguments = "--config", LIBRARY_CONFIG, "--source", sandbox.url_of(LIBRARY_CONFIG)
    done = loaded(sandbox, *arguments)
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
    loaded(sandbox, *arguments)
    rows = sandbox.query(query)
    assert len(rows) == len(launches)
    renewed = {row["id"]: row["net"] for row in rows if row["_run_id"] != earlier}
    assert renewed.keys() == {launch["id"] for launch in launches[3:5]}
    assert max(renewed.values()) == datetime(2030, 1, 1, tzinfo=UTC)


def test_a_query_gives_launches_the_names_of_their_places(sandbox: Sandbox) -> None:
    done = loaded(sandbox, "--config", QUERY_CONFIG, "--source", sandbox.url_of(QUERY_CONFIG))
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


def test_the_news_are_loaded(sandbox: Sandbox, tmp_path: Path) -> None:
    articles = ROOT / "tests" / "data" / "news.json"
    arguments = "--config", EXAMPLES["news"], "--dry-run", "--source", articles
    done = sandbox.run(*arguments, TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    assert "59548105-347d" in done.stdout
