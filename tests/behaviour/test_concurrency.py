"""Readers and loaders at the same time: what readers see, who waits for whom, who wins."""

from __future__ import annotations

import copy
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import pytest
import yaml

from helpers import AUDIT, CORES, LAUNCHES, SHIPPED, Done, loaded, run_id
from helpers import fewer_launches as launches
from sandbox import SAMPLE, Sandbox

DOCUMENT: list[dict[str, Any]] = json.loads(SAMPLE.read_bytes())  # 30 launches, 38 cores

Connect = Callable[[], psycopg.Connection[tuple[Any, ...]]]
Configure = Callable[..., Path]


def cores(count: int) -> int:
    """How many cores so many launches have."""
    return sum(len(launch["cores"]) for launch in launches(count))


@pytest.fixture
def configure(tmp_path: Path) -> Configure:
    """Writes the shipped configuration with other settings of Redshift; returns its path."""

    def write(redshift: dict[str, Any], **table: Any) -> Path:
        settings = copy.deepcopy(SHIPPED)
        settings["redshift"] |= redshift
        for each in settings["tables"].values():
            each |= table
        path = tmp_path / "pipeline.yaml"
        path.write_text(yaml.safe_dump(settings, sort_keys=False))
        return path

    return write


@pytest.fixture
def connect(sandbox: Sandbox) -> Iterator[Connect]:
    """Opens connections as an analyst does, who does not wait for a lock longer than 2 s."""
    connections = []

    def open_connection() -> psycopg.Connection[tuple[Any, ...]]:
        connection = sandbox.connect(application_name="analyst")
        connection.execute("SET lock_timeout = '2s'")
        connections.append(connection)
        return connection

    yield open_connection
    for connection in connections:
        connection.close()
    # The next test drops the tables; the proxy may not have noticed yet that they left.
    while sandbox.query("SELECT pid FROM pg_stat_activity WHERE application_name = 'analyst'"):
        time.sleep(0.02)


def at_once(sandbox: Sandbox, arguments: list[list[str | Path]]) -> list[Done]:
    """Runs a loader for each list of arguments, all at once; returns their ends."""
    loaders = [sandbox.start(*each) for each in arguments]
    try:
        logs = [loader.communicate(timeout=120)[1] for loader in loaders]
    finally:
        for loader in loaders:
            loader.kill()
    return [Done(each.args, each.wait(), "", log) for each, log in zip(loaders, logs, strict=True)]


def documents(folder: Path, counts: list[int]) -> list[list[str | Path]]:
    """The arguments for loaders of documents with so many launches."""
    for count in counts:
        (folder / f"{count}.json").write_text(json.dumps(launches(count)))
    return [["--source", folder / f"{count}.json"] for count in counts]


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
        assert [row["rows_before"] for row in history[1:]] == [
            row["rows_loaded"] for row in history[:-1]
        ]
        latest = {row["_run_id"]: row["rows_loaded"] for row in history[-len(loaders) :]}
        assert latest == {run: rows_of(count) for run, count in loaders.items()}
        assert check_complete(sandbox) == (loaders[rows[-1]["_run_id"]], rows[-1]["_run_id"])


# --- readers -------------------------------------------------------------------------------------


class Poll(NamedTuple):
    """What a reader saw in one transaction: rows and run ids."""

    launches: tuple[int, list[str]]
    cores: tuple[int, list[str]]
    audit: tuple[int, list[str]]


class Reader(threading.Thread):
    """Reads all tables again and again, each time in one transaction, until told to stop."""

    def __init__(self, connection: psycopg.Connection[tuple[Any, ...]]) -> None:
        super().__init__(daemon=True)
        self.connection = connection
        connection.execute("SET statement_timeout = '2s'")
        self.polls: list[Poll] = []
        self.slowest = 0.0
        self.error: Exception | None = None
        self.stopping = threading.Event()

    def poll(self, table: str) -> tuple[int, list[str]]:
        sql = f"SELECT count(*), array_agg(DISTINCT _run_id) FROM {table}"
        row = self.connection.execute(sql.encode()).fetchone()
        assert row
        return row[0], row[1] or []

    def run(self) -> None:
        try:
            while not self.stopping.is_set():
                start = time.perf_counter()
                with self.connection.transaction():
                    self.polls.append(Poll(*map(self.poll, (LAUNCHES, CORES, AUDIT))))
                self.slowest = max(self.slowest, time.perf_counter() - start)
                time.sleep(0.002)
        except Exception as error:
            self.error = error

    def stop(self) -> None:
        self.stopping.set()
        self.join(10)


def test_reader_sees_whole_states_only(
    sandbox: Sandbox, connect: Connect, record_property: Callable[[str, object], None]
) -> None:
    loaded(sandbox)
    start = len(sandbox.redshift.statements)
    reader = Reader(connect())
    reader.start()
    runs = []
    try:
        for number in range(20):
            sandbox.source.body = json.dumps(launches(28 if number % 2 == 0 else 30)).encode()
            done = loaded(sandbox)
            runs.append(run_id(done))
            assert "trying again" not in done.stderr  # the reader is in nobody's way
    finally:
        reader.stop()
    record_property("polls", len(reader.polls))
    record_property("slowest_poll_in_seconds", round(reader.slowest, 3))
    assert reader.error is None
    assert not reader.is_alive()
    whole = [(30, cores(30)), (28, cores(28))]
    for poll in reader.polls:
        assert (poll.launches[0], poll.cores[0]) in whole
        assert len(poll.launches[1]) == 1
        assert poll.launches[1] == poll.cores[1]
        # The history ends with the run that the tables are from.
        assert poll.audit[0] == 2 * len(poll.audit[1])
        assert max(poll.audit[1]) == poll.launches[1][0]
    seen = list(dict.fromkeys(poll.launches[1][0] for poll in reader.polls))
    assert seen == sorted(seen)
    assert len(set(seen) & set(runs)) >= 15  # it was there all the time
    # Nobody ever asks for a target as a whole.
    statements = sandbox.redshift.statements[start:]
    locking = [text for text in statements if re.match(r"\s*(LOCK|TRUNCATE)\b", text, re.I)]
    assert set(locking) == {'LOCK "public"."etl_runs"'}
    assert len(locking) == 20


def test_open_transaction_of_a_reader(sandbox: Sandbox, connect: Connect) -> None:
    """It stops no load, and goes on seeing the rows it saw."""
    first = run_id(loaded(sandbox))
    reader = Reader(connect())
    tables = (LAUNCHES, CORES)
    with reader.connection.transaction():
        before = [reader.poll(table) for table in tables]
        assert before == [(30, [first]), (cores(30), [first])]
        for count in (28, 30, 28):
            sandbox.source.body = json.dumps(launches(count)).encode()
            last = run_id(loaded(sandbox))
            assert [reader.poll(table) for table in tables] == before
    assert [reader.poll(table) for table in tables] == [(28, [last]), (cores(28), [last])]


def test_long_query_of_an_analyst(sandbox: Sandbox, connect: Connect) -> None:
    """The load does not wait for it, nor it for the load."""
    first = run_id(loaded(sandbox))
    connection, second_connection = connect(), connect()
    seconds = 5
    begun = threading.Event()
    seen: list[Any] = []
    ended: list[float] = []

    def analyse() -> None:
        with connection.transaction():
            connection.execute(f"SELECT count(*) FROM {LAUNCHES}")
            begun.set()
            connection.execute(f"SELECT pg_sleep({seconds})")
            sql = f"SELECT DISTINCT _run_id FROM {LAUNCHES} JOIN {CORES} USING (_run_id)"
            seen.extend(connection.execute(sql.encode()).fetchall())
        ended.append(time.monotonic())

    def scan() -> None:
        # One long SELECT: 30 rows of a sleep each.
        sql = f"SELECT _run_id, pg_sleep({seconds / 30}) FROM {LAUNCHES}"
        rows = second_connection.execute(sql.encode()).fetchall()
        seen.extend(dict.fromkeys((run,) for run, _ in rows))
        ended.append(time.monotonic())

    threads = [threading.Thread(target=target, daemon=True) for target in (analyse, scan)]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    assert begun.wait(5)
    second = run_id(loaded(sandbox))
    loaded_after = time.monotonic() - start
    for thread in threads:
        thread.join(30)
    if loaded_after < seconds:  # else this machine is too busy to tell
        assert all(end > start + loaded_after for end in ended)
    assert len(ended) == 2
    assert max(ended) - start < seconds + 2
    assert seen == [(first,), (first,)]
    assert check_complete(sandbox) == (30, second)


def test_locks_that_a_load_holds(sandbox: Sandbox) -> None:
    """Just before it commits it holds no lock on a target that a reader would wait for."""
    loaded(sandbox)
    held: list[tuple[str, str]] = []

    def look(when: str, statement: str) -> None:
        if (when, statement) == ("before", "COMMIT"):
            held.extend(
                (row["name"], row["mode"])
                for row in sandbox.query("""
                    SELECT nspname || '.' || relname AS name, mode FROM pg_locks
                    JOIN pg_class ON pg_class.oid = relation
                    JOIN pg_namespace ON pg_namespace.oid = relnamespace
                    JOIN pg_stat_activity USING (pid)
                    WHERE nspname = 'public' AND application_name = 'sequra_challenge'""")
            )

    sandbox.redshift.hook = look
    loaded(sandbox)
    harmless = {"AccessShareLock", "RowExclusiveLock", "SIReadLock"}
    for table in (LAUNCHES, CORES):
        assert {mode for name, mode in held if name == table} - harmless == set()
        assert (table, "RowExclusiveLock") in held
    assert (AUDIT, "AccessExclusiveLock") in held


def test_open_transaction_on_the_audit_table(
    sandbox: Sandbox, connect: Connect, configure: Configure
) -> None:
    """The one table that loaders lock: a load waits, and gives up in time and with its name."""
    loaded(sandbox)
    run = check_complete(sandbox)
    connection = connect()
    with connection.transaction():
        connection.execute(f"SELECT count(*) FROM {AUDIT}")
        done = sandbox.run("--config", configure({"statement_seconds": 2}))
        assert done.returncode == 1
        message = done.stderr[done.stderr.index(" ERROR ") :]
        assert "etl_runs" in message
        assert "timeout" in message
    assert check_complete(sandbox) == run
    loaded(sandbox)


# --- loaders -------------------------------------------------------------------------------------


def check_all_ended_well(ends: list[Done]) -> None:
    assert {done.returncode for done in ends} == {0}, "\n".join(done.stderr for done in ends)


def test_eight_loaders_at_once(sandbox: Sandbox, tmp_path: Path) -> None:
    loaded(sandbox)
    counts = [30, 29, 28, 27, 30, 29, 28, 27]
    for number in (1, 2, 3):
        start = len(sandbox.redshift.statements)
        ends = at_once(sandbox, documents(tmp_path, counts))
        check_all_ended_well(ends)
        runs = {run_id(done): count for done, count in zip(ends, counts, strict=True)}
        assert len(runs) == 8
        assert sandbox.query(f"SELECT count(*) AS rows FROM {AUDIT}") == [
            {"rows": 2 + number * 8 * 2}
        ]
        check_history(sandbox, runs)
        statements = sandbox.redshift.statements[start:]
        locking = [text for text in statements if re.match(r"\s*(LOCK|TRUNCATE)\b", text, re.I)]
        assert set(locking) == {'LOCK "public"."etl_runs"'}


def test_first_load_by_eight_at_once(sandbox: Sandbox, tmp_path: Path) -> None:
    counts = [30, 29, 28, 27, 30, 29, 28, 27]
    ends = at_once(sandbox, documents(tmp_path, counts))
    check_all_ended_well(ends)
    runs = {run_id(done): count for done, count in zip(ends, counts, strict=True)}
    check_history(sandbox, runs)
    assert sandbox.query(f"SELECT count(*) AS rows FROM {AUDIT}") == [{"rows": 8 * 2}]


def test_new_column_by_four_loaders_at_once(sandbox: Sandbox, tmp_path: Path) -> None:
    loaded(sandbox)
    with sandbox.redshift.connect() as connection:
        connection.execute(f"ALTER TABLE {LAUNCHES} DROP COLUMN details, DROP COLUMN rocket")
        connection.execute(f"ALTER TABLE {CORES} DROP COLUMN core")
        connection.execute(f"ALTER TABLE {AUDIT} DROP COLUMN raw")
    counts = [30, 29, 28, 27]
    ends = at_once(sandbox, documents(tmp_path, counts))
    check_all_ended_well(ends)
    check_history(sandbox, {run_id(done): count for done, count in zip(ends, counts, strict=True)})
    expected = {launch["id"]: (launch["details"], launch["rocket"]) for launch in DOCUMENT}
    rows = sandbox.query(f"SELECT id, details, rocket FROM {LAUNCHES}")
    assert all(expected[row["id"]] == (row["details"], row["rocket"]) for row in rows)


def test_upserts_at_once(sandbox: Sandbox, tmp_path: Path, configure: Configure) -> None:
    """Of overlapping records: each is there once, whole, from one of its loaders."""
    config = configure({}, mode="upsert")
    loaded(sandbox, "--config", config)
    slices = [DOCUMENT[start : start + 12] for start in (0, 6, 12, 18)]
    arguments: list[list[str | Path]] = []
    for number, document in enumerate(slices):
        source = tmp_path / f"slice{number}.json"
        source.write_text(json.dumps(document))
        arguments.append(["--config", config, "--source", source])
    ends = at_once(sandbox, arguments)
    check_all_ended_well(ends)
    writers = {run_id(done): document for done, document in zip(ends, slices, strict=True)}
    rows = sandbox.query(f"SELECT id, _run_id FROM {LAUNCHES}")
    assert sorted(row["id"] for row in rows) == sorted(launch["id"] for launch in DOCUMENT)
    last_of = {
        launch["id"]: row["_run_id"]
        for row in sandbox.query(f"SELECT _run_id FROM {AUDIT} ORDER BY ctid")
        for launch in writers.get(row["_run_id"], [])
    }
    assert {row["id"]: row["_run_id"] for row in rows if row["id"] in last_of} == last_of
    elements = sandbox.query(f"SELECT launch_id, _run_id FROM {CORES}")
    assert len(elements) == cores(30)
    assert all(last_of.get(row["launch_id"], row["_run_id"]) == row["_run_id"] for row in elements)
