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

from helpers import (
    AUDIT,
    CORES,
    LAUNCHES,
    SHIPPED,
    Records,
    assert_table,
    count,
    loaded,
    run_id,
    serve,
    shipped,
)
from helpers import fewer_launches as launches
from redshift import ISOLATION, SNAPSHOT
from sandbox import Sandbox


def cores_of(document: Records) -> int:
    return sum(len(launch["cores"]) for launch in document)


def load_at_once(
    sandbox: Sandbox, folder: Path, documents: list[Records], *arguments: str | Path
) -> dict[str, Records]:
    """Runs, all at once, of which each loads one of the documents; these by the runs' ids."""
    sources = [folder / f"{number}.json" for number in range(len(documents))]
    for source, document in zip(sources, documents, strict=True):
        source.write_text(json.dumps(document))
    with ThreadPoolExecutor(len(sources)) as pool:
        done = pool.map(lambda source: loaded(sandbox, *arguments, "--source", source), sources)
        return dict(zip(map(run_id, done), documents, strict=True))


def check_history(sandbox: Sandbox, loaders: dict[str, Records]) -> None:
    """Checks the rows in the audit table of runs with these documents, in the order of commit.

    Each found what the one before it left, and the last one's rows are in the tables.
    """
    rows = sandbox.query(f"SELECT * FROM {AUDIT} ORDER BY ctid")  # it only grows
    assert [row["_loaded_at"] for row in rows] == sorted(row["_loaded_at"] for row in rows)
    for table, rows_of in ((LAUNCHES, len), (CORES, cores_of)):
        history = [row for row in rows if row["table_name"] == table]
        left = [row["rows_loaded"] for row in history[:-1]]
        assert [row["rows_before"] for row in history[1:]] == left
        latest = {row["_run_id"]: row["rows_loaded"] for row in history[-len(loaders) :]}
        assert latest == {run: rows_of(it) for run, it in loaders.items()}
    last = rows[-1]["_run_id"]
    for name, settings in SHIPPED["tables"].items():
        assert_table(sandbox, name, settings, loaders[last])
        assert sandbox.query(f"SELECT DISTINCT _run_id FROM {name}") == [{"_run_id": last}]


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
            assert old == [(30, [first]), (cores_of(launches(30)), [first])]
            sandbox.redshift.hook = lambda *_: seen.append(read(late))  # at each statement
            done = loaded(sandbox)
            sandbox.redshift.hook = None
            assert read(early) == old
        last = run_id(done)
        new = [(28, [last]), (cores_of(launches(28)), [last])]
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
@pytest.mark.parametrize("there_are", ["no tables", "tables that lack columns"])
def test_four_loaders_at_once(sandbox: Sandbox, tmp_path: Path, there_are: str) -> None:
    if there_are != "no tables":
        loaded(sandbox)
        for name, column in ((LAUNCHES, "rocket"), (CORES, "core"), (AUDIT, "raw")):
            sandbox.as_user(f"ALTER TABLE {name} DROP COLUMN {column}")
        sandbox.as_user(f"ALTER TABLE {LAUNCHES} DROP COLUMN details")
    documents = [launches(number) for number in (30, 29, 28, 27)]
    check_history(sandbox, load_at_once(sandbox, tmp_path, documents))
    assert count(sandbox, AUDIT) == 2 * (4 + (there_are != "no tables"))
    assert set(locks(sandbox)) == {'LOCK "public"."etl_runs"'}


@in_either_isolation
def test_upserts_at_once(sandbox: Sandbox, tmp_path: Path) -> None:
    """Of overlapping records: each is there once, whole, from one of its loaders."""
    modes = [f"tables / {name} / mode" for name in (LAUNCHES, CORES)]
    config = shipped(tmp_path, dict.fromkeys(modes, "upsert"))
    loaded(sandbox, *config)
    slices = [launches(30)[start : start + 12] for start in (0, 6, 12, 18)]
    writers = load_at_once(sandbox, tmp_path, slices, *config)
    for name, table in SHIPPED["tables"].items():
        assert_table(sandbox, name, table, launches(30))
    last_of = {
        launch["id"]: row["_run_id"]
        for row in sandbox.query(f"SELECT _run_id FROM {AUDIT} ORDER BY ctid")
        for launch in writers.get(row["_run_id"], [])
    }
    for name, id_ in ((LAUNCHES, "id"), (CORES, "launch_id")):
        for row in sandbox.query(f"SELECT {id_}, _run_id FROM {name}"):
            assert row["_run_id"] == last_of.get(row[id_], row["_run_id"])
