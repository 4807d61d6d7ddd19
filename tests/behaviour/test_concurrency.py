"""Readers and loaders at the same time: what readers see, who waits for whom, who wins."""

from __future__ import annotations

import itertools
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest

from helpers import AUDIT, CORES, LAUNCHES, count, loaded, run_id, serve, shipped
from helpers import fewer_launches as launches
from redshift import ISOLATION, SNAPSHOT
from sandbox import Sandbox


def cores(count: int) -> int:
    """How many cores so many launches have."""
    return sum(len(launch["cores"]) for launch in launches(count))


def at_once(sandbox: Sandbox, arguments: list[list[str | Path]]) -> list[str]:
    """The ids of runs with these arguments, all at once, which all succeed."""
    with ThreadPoolExecutor(len(arguments)) as pool:
        return [run_id(done) for done in pool.map(lambda each: loaded(sandbox, *each), arguments)]


def load_documents_at_once(sandbox: Sandbox, folder: Path) -> dict[str, int]:
    """Four runs, all at once, with the number of launches that each loads."""
    counts = [30, 29, 28, 27]
    sources = [folder / f"{number}.json" for number in counts]
    for source, number in zip(sources, counts, strict=True):
        source.write_text(json.dumps(launches(number)))
    runs = at_once(sandbox, [["--source", source] for source in sources])
    return dict(zip(runs, counts, strict=True))


def check_complete(sandbox: Sandbox) -> tuple[int, str]:
    """Checks that the tables are one run's, whole; returns the number of launches and the run."""
    found = sandbox.query(f"SELECT id, _run_id FROM {LAUNCHES}")
    expected = {launch["id"]: len(launch["cores"]) for launch in launches(len(found))}
    assert sorted(row["id"] for row in found) == sorted(expected)
    elements = sandbox.query(f"SELECT launch_id, position, _run_id FROM {CORES}")
    assert sorted((row["launch_id"], row["position"]) for row in elements) == sorted(
        (name, position) for name, cores in expected.items() for position in range(1, cores + 1)
    )
    (run,) = {row["_run_id"] for row in [*found, *elements]}
    return len(found), run


def check_history(sandbox: Sandbox, loaders: dict[str, int]) -> None:
    """Checks the rows in the audit table of runs with so many launches, in the order of commit.

    Each found what the one before it left, and the last one's rows are in the tables.
    """
    rows = sandbox.query(f"SELECT * FROM {AUDIT} ORDER BY ctid")  # it only grows
    assert [row["_loaded_at"] for row in rows] == sorted(row["_loaded_at"] for row in rows)
    for table, rows_of in ((LAUNCHES, int), (CORES, cores)):
        history = [row for row in rows if row["table_name"] == table]
        left = [row["rows_loaded"] for row in history[:-1]]
        assert [row["rows_before"] for row in history[1:]] == left
        latest = {row["_run_id"]: row["rows_loaded"] for row in history[-len(loaders) :]}
        assert latest == {run: rows_of(count) for run, count in loaders.items()}
        assert check_complete(sandbox) == (loaders[rows[-1]["_run_id"]], rows[-1]["_run_id"])


def test_readers_see_whole_states_and_wait_for_nothing(sandbox: Sandbox) -> None:
    first = run_id(loaded(sandbox))
    serve(sandbox, launches(28))
    sandbox.redshift.statements.clear()
    seen: list[Any] = []

    def read(connection: psycopg.Connection[Any]) -> list[Any]:
        select = "SELECT count(*), array_agg(DISTINCT _run_id) FROM "
        with connection.transaction():
            tables = (LAUNCHES, CORES)
            return [connection.execute((select + name).encode()).fetchone() for name in tables]

    with sandbox.redshift.connect() as early, sandbox.redshift.connect() as late:
        for connection in (early, late):
            connection.execute("SET default_transaction_isolation = 'repeatable read'")
            connection.execute("SET statement_timeout = '60s'")
        with early.transaction():
            old = read(early)
            assert old == [(30, [first]), (cores(30), [first])]
            sandbox.redshift.hook = lambda *_: seen.append(read(late))  # at each statement
            done = loaded(sandbox)
            sandbox.redshift.hook = None
            assert read(early) == old
        last = run_id(done)
        new = [(28, [last]), (cores(28), [last])]
        assert read(early) == new
    assert [state for state, _ in itertools.groupby(seen)] == [old, new]
    assert "trying again" not in done.stderr  # the readers are in nobody's way
    assert locks(sandbox) == ['LOCK "public"."etl_runs"']


@pytest.fixture(params=["serializable", "snapshot"])
def isolation(sandbox: Sandbox, request: pytest.FixtureRequest) -> None:
    """How the database isolates."""
    if request.param == "snapshot":
        sandbox.redshift.settings = {ISOLATION: SNAPSHOT}


in_either_isolation = pytest.mark.usefixtures("isolation")


def locks(sandbox: Sandbox) -> list[str]:
    """The statements that lock a table; nobody ever asks for a target as a whole."""
    statements = sandbox.redshift.statements
    return [sql for sql in statements if re.match(r"\s*(LOCK|TRUNCATE)\b", sql, re.I)]


@in_either_isolation
def test_four_loaders_at_once(sandbox: Sandbox, tmp_path: Path) -> None:
    """There are no tables yet; in the tests below there are."""
    runs = load_documents_at_once(sandbox, tmp_path)
    assert count(sandbox, AUDIT) == 2 * 4
    check_history(sandbox, runs)
    assert set(locks(sandbox)) == {'LOCK "public"."etl_runs"'}


@in_either_isolation
def test_new_column_by_four_loaders_at_once(sandbox: Sandbox, tmp_path: Path) -> None:
    loaded(sandbox)
    for name, columns in {LAUNCHES: ["details", "rocket"], CORES: ["core"], AUDIT: ["raw"]}.items():
        sandbox.as_user(*(f"ALTER TABLE {name} DROP COLUMN {column}" for column in columns))
    check_history(sandbox, load_documents_at_once(sandbox, tmp_path))
    assert set(locks(sandbox)) == {'LOCK "public"."etl_runs"'}
    expected = {launch["id"]: (launch["details"], launch["rocket"]) for launch in launches(30)}
    rows = sandbox.query(f"SELECT id, details, rocket FROM {LAUNCHES}")
    assert all(expected[row["id"]] == (row["details"], row["rocket"]) for row in rows)


@in_either_isolation
def test_upserts_at_once(sandbox: Sandbox, tmp_path: Path) -> None:
    """Of overlapping records: each is there once, whole, from one of its loaders."""
    modes = [f"tables / {name} / mode" for name in (LAUNCHES, CORES)]
    config = shipped(tmp_path, dict.fromkeys(modes, "upsert"))
    loaded(sandbox, *config)
    slices = [launches(30)[start : start + 12] for start in (0, 6, 12, 18)]
    arguments: list[list[str | Path]] = []
    for number, document in enumerate(slices):
        source = tmp_path / f"slice{number}.json"
        source.write_text(json.dumps(document))
        arguments.append([*config, "--source", source])
    writers = dict(zip(at_once(sandbox, arguments), slices, strict=True))
    rows = sandbox.query(f"SELECT id, _run_id FROM {LAUNCHES}")
    assert sorted(row["id"] for row in rows) == sorted(launch["id"] for launch in launches(30))
    last_of = {
        launch["id"]: row["_run_id"]
        for row in sandbox.query(f"SELECT _run_id FROM {AUDIT} ORDER BY ctid")
        for launch in writers.get(row["_run_id"], [])
    }
    assert {row["id"]: row["_run_id"] for row in rows if row["id"] in last_of} == last_of
    elements = sandbox.query(f"SELECT launch_id, _run_id FROM {CORES}")
    assert len(elements) == cores(30)
    assert all(last_of.get(row["launch_id"], row["_run_id"]) == row["_run_id"] for row in elements)
