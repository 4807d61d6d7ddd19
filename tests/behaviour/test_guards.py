"""What the load refuses, what it changes in existing tables, and what it leaves a record of."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import helpers
from helpers import AUDIT, CORES, LAUNCHES, REMOVED, RUN_ID, Records, count, serve, shipped
from helpers import fewer_launches as launches
from sandbox import BUCKET, SAMPLE, Sandbox

DOCUMENT = launches(30)  # with 38 cores

OF_LAUNCHES, OF_CORES = f"tables / {LAUNCHES}", f"tables / {CORES}"


def launches_without(field: str, core_field: str) -> Records:
    """The sample with null in a field of each launch and in one of each core."""
    return [
        launch | {field: None, "cores": [core | {core_field: None} for core in launch["cores"]]}
        for launch in DOCUMENT
    ]


def loaded(sandbox: Sandbox, *arguments: str | Path) -> str:
    """Runs the program, which must succeed; returns its log."""
    return helpers.loaded(sandbox, *arguments).stderr


def refused(sandbox: Sandbox, *arguments: str | Path) -> str:
    """Runs the program, which must fail and change nothing; returns its log."""
    before = state(sandbox)
    done = sandbox.run(*arguments)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert state(sandbox) == before
    return done.stderr


def error(log: str) -> str:
    """The error in a log, which is its last message, of one line or more."""
    return log[log.rindex(" ERROR ") :]


def state(sandbox: Sandbox) -> dict[str, tuple[list[Any], list[str]]]:
    """Columns and rows of all tables."""
    named = sandbox.query("""
        SELECT table_schema || '.' || table_name AS name,
               array_agg(row(column_name, data_type, character_maximum_length, is_nullable)::text
                         ORDER BY ordinal_position) AS columns
        FROM information_schema.columns WHERE table_schema = 'public' GROUP BY 1 ORDER BY 1""")
    rows = {it["name"]: sandbox.query(f"SELECT t::text AS r FROM {it['name']} t") for it in named}
    return {it["name"]: (it["columns"], sorted(r["r"] for r in rows[it["name"]])) for it in named}


def data(sandbox: Sandbox) -> list[Records]:
    """The rows of both tables, without what the load sets in each."""
    rows = [sandbox.query(f"SELECT * FROM {table} ORDER BY 1, 2") for table in (LAUNCHES, CORES)]
    return [[{n: row[n] for n in row if n[0] != "_"} for row in table] for table in rows]


def altered(log: str) -> list[str]:
    """The ALTER TABLEs in a log."""
    return re.findall(r"WARNING pipeline load: (ALTER TABLE .*)", log)


def column_type(sandbox: Sandbox, table: str, column: str) -> tuple[str, int | None] | None:
    schema, _, name = table.partition(".")
    rows = sandbox.query(f"""
        SELECT data_type, character_maximum_length FROM information_schema.columns
        WHERE table_schema = '{schema}' AND table_name = '{name}' AND column_name = '{column}'""")
    return tuple(rows[0].values()) if rows else None


# --- fewer rows than there were ------------------------------------------------------------------

LAUNCHES_MAY, CORES_MAY = f"{OF_LAUNCHES} / max_shrink", f"{OF_CORES} / max_shrink"
# Settings of the tables; launches and cores that are refused; some that are just enough.
FEW: dict[str, tuple[dict[str, Any], tuple[int, int], tuple[int, int]]] = {
    "launches": ({}, (23, 38), (24, 38)),
    "no cores": ({}, (30, 0), (30, 31)),
    "cores": ({}, (30, 30), (30, 31)),
    "half": ({LAUNCHES_MAY: 0.5, CORES_MAY: 1}, (14, 38), (15, 38)),
    "a tenth": ({LAUNCHES_MAY: 0.1, CORES_MAY: 1}, (26, 38), (27, 38)),
    # 30 * (1 - 0.7) is 9.000000000000002
    "seven tenths": ({LAUNCHES_MAY: 0.7, CORES_MAY: 1}, (8, 38), (9, 38)),
    "none": ({LAUNCHES_MAY: 0, CORES_MAY: 1, f"{OF_CORES} / min_rows": 0}, (29, 38), (30, 0)),
}


@pytest.mark.parametrize("case", FEW)
def test_fewer_rows(sandbox: Sandbox, tmp_path: Path, case: str) -> None:
    settings, few, enough = FEW[case]
    config = shipped(tmp_path, settings)
    loaded(sandbox, *config)
    serve(sandbox, launches(*few))
    message = error(refused(sandbox, *config))
    table, has, number = (LAUNCHES, 30, 0) if few[0] < enough[0] else (CORES, 38, 1)
    least = f"at least {enough[number]} "
    assert f"{table} has {has} rows and would have {few[number]}, {least}" in message
    assert "--allow-shrink" in message
    serve(sandbox, launches(*enough))
    loaded(sandbox, *config)
    assert count(sandbox, LAUNCHES) == enough[0]
    assert count(sandbox, CORES) == sum(len(launch["cores"]) for launch in launches(*enough))


def test_far_fewer_rows_are_allowed_for_one_run(sandbox: Sandbox) -> None:
    loaded(sandbox)
    serve(sandbox, launches(4, cores=4))
    refused(sandbox)
    loaded(sandbox, "--allow-shrink")
    assert (count(sandbox, LAUNCHES), count(sandbox, CORES)) == (4, 4)
    serve(sandbox, launches(4, cores=3))
    refused(sandbox)


@pytest.mark.parametrize(("min_rows", "rows"), [(1, 0), (39, 38)], ids=["default", "set"])
def test_min_rows_of_the_first_load(
    sandbox: Sandbox, tmp_path: Path, min_rows: int, rows: int
) -> None:
    serve(sandbox, launches(30, cores=rows))
    config = shipped(tmp_path, {f"{OF_CORES} / min_rows": min_rows})
    done = sandbox.run(*config)
    assert done.returncode == 1
    why = f"{CORES} has 0 rows and would have {rows}, at least {min_rows} .*--allow-shrink"
    assert re.search(why, error(done.stderr))
    assert [count(sandbox, table) for table in (LAUNCHES, CORES, AUDIT)] == [0, 0, 0]
    serve(sandbox, launches(30))
    loaded(sandbox, *shipped(tmp_path, {f"{OF_CORES} / min_rows": 38}))
    assert (count(sandbox, LAUNCHES), count(sandbox, CORES)) == (30, 38)


# --- tables that differ from the configuration ---------------------------------------------------


def test_missing_column_is_added(sandbox: Sandbox, tmp_path: Path) -> None:
    columns = [f"{OF_LAUNCHES} / columns / {name}" for name in ("details", "fairings.ships")]
    loaded(sandbox, *shipped(tmp_path, dict.fromkeys(columns, REMOVED)))
    log = loaded(sandbox)
    assert altered(log) == [
        'ALTER TABLE "public"."launches" ADD COLUMN "details" varchar(16384)',
        'ALTER TABLE "public"."launches" ADD COLUMN "fairings_ships" super',
    ]
    assert column_type(sandbox, LAUNCHES, "details") == ("character varying", 16384)
    rows = sandbox.query(f"SELECT id, details, fairings_ships AS ships FROM {LAUNCHES}")
    assert {row["id"]: (row["details"], row["ships"]) for row in rows} == {
        launch["id"]: (launch["details"], (launch["fairings"] or {}).get("ships"))
        for launch in DOCUMENT
    }
    assert altered(loaded(sandbox)) == []


def test_narrower_text_is_widened(sandbox: Sandbox, tmp_path: Path) -> None:
    narrower = {f"{OF_LAUNCHES} / columns / name": "varchar(64) not null"}
    loaded(
        sandbox,
        *shipped(tmp_path, narrower | {f"{OF_CORES} / columns / landing_type": "varchar(5)"}),
    )
    # The stand-in, as Redshift, refuses this inside a transaction.
    document = launches(30)
    document[0]["name"] = "ü" * 128  # 256 bytes
    serve(sandbox, document)
    log = loaded(sandbox)
    assert altered(log) == [
        'ALTER TABLE "public"."launches" ALTER COLUMN "name" TYPE varchar(256)',
        'ALTER TABLE "public"."launch_cores" ALTER COLUMN "landing_type" TYPE varchar(16)',
    ]
    assert column_type(sandbox, LAUNCHES, "name") == ("character varying", 256)
    assert column_type(sandbox, CORES, "landing_type") == ("character varying", 16)
    rows = sandbox.query(f"SELECT name FROM {LAUNCHES} WHERE id = '{document[0]['id']}'")
    assert rows == [{"name": "ü" * 128}]


def test_wider_text_is_left_alone(sandbox: Sandbox, tmp_path: Path) -> None:
    loaded(
        sandbox, *shipped(tmp_path, {f"{OF_LAUNCHES} / columns / name": "varchar(1000) not null"})
    )
    assert altered(loaded(sandbox)) == []
    assert column_type(sandbox, LAUNCHES, "name") == ("character varying", 1000)


DIFFERENT = {
    "type": ("window", "varchar(20)", "is varchar(20) in the table and integer in the config"),
    "type, not null": ("date_unix", "integer not null", "is integer in the table and bigint"),
    "missing, not null": ("upcoming", REMOVED, "is missing in the table and boolean NOT"),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_what_differs_stops_the_run_and_the_statement_helps(
    sandbox: Sandbox, tmp_path: Path, case: str
) -> None:
    column, type_, fault = DIFFERENT[case]
    changes = {
        f"{OF_LAUNCHES} / columns / {column}": type_,
        f"{OF_LAUNCHES} / columns / details": REMOVED,  # would be added
        f"{OF_CORES} / columns / core": "varchar(10)",  # would be widened
    }
    serve(sandbox, launches_without("window", "core"))
    loaded(sandbox, *shipped(tmp_path, changes))
    sandbox.source.body = SAMPLE.read_bytes()
    start = len(sandbox.redshift.statements)
    message = error(refused(sandbox))
    writing = ("ALTER", "CREATE", "COPY", "DELETE", "INSERT")
    assert not [sql for sql in sandbox.redshift.statements[start:] if sql.startswith(writing)]
    assert f"{LAUNCHES}: the column {column} {fault}" in message
    fix = re.search(r"ALTER TABLE .*", message)
    assert fix, message
    sandbox.as_user(fix[0])
    loaded(sandbox)
    rows = sandbox.query(f'SELECT id, "{column}" FROM {LAUNCHES}')
    assert {row["id"]: row[column] for row in rows} == {it["id"]: it[column] for it in DOCUMENT}
    if type_ is REMOVED:
        assert count(sandbox, f"{LAUNCHES}_old") == 30


def test_all_faults_in_one_message(sandbox: Sandbox, tmp_path: Path) -> None:
    changes = {
        f"{OF_LAUNCHES} / columns / window": "bigint",
        f"{OF_LAUNCHES} / columns / failures": "varchar(65535)",
        f"{OF_LAUNCHES} / columns / upcoming": REMOVED,
        f"{OF_CORES} / columns / gridfins": "smallint",
    }
    serve(sandbox, launches_without("failures", "gridfins"))
    loaded(sandbox, *shipped(tmp_path, changes))
    sandbox.as_user(
        f"ALTER TABLE {AUDIT} RENAME COLUMN rows_before TO old",
        f"ALTER TABLE {AUDIT} ADD COLUMN rows_before varchar(20)",
    )
    message = error(refused(sandbox))
    for fault in (
        "public.launches: the column window is bigint in the table and integer in",
        "public.launches: the column failures is varchar(65535) in the table and super in",
        "public.launches: the column upcoming is missing",
        "public.launch_cores: the column gridfins is smallint in the table and boolean in",
        "public.etl_runs: the column rows_before is varchar(20) in the table and bigint in",
    ):
        assert fault in message
    assert message.count("ALTER TABLE") == 5


def test_extra_columns_stay(sandbox: Sandbox) -> None:
    loaded(sandbox)
    sandbox.as_user(
        f"ALTER TABLE {LAUNCHES} ADD COLUMN note varchar(20)",
        f"ALTER TABLE {LAUNCHES} ADD COLUMN origin varchar(20) NOT NULL DEFAULT 'api'",
        f"ALTER TABLE {CORES} ADD COLUMN checked boolean DEFAULT false",
        f"UPDATE {LAUNCHES} SET note = 'mine', origin = 'hand'",
    )
    log = loaded(sandbox)
    assert altered(log) == []
    assert re.search(rf"WARNING pipeline load: {LAUNCHES} also has the columns note, origin", log)
    assert re.search(rf"WARNING pipeline load: {CORES} also has the columns checked", log)
    rows = sandbox.query(f"SELECT DISTINCT note, origin FROM {LAUNCHES}")
    assert rows == [{"note": None, "origin": "api"}]
    assert sandbox.query(f"SELECT DISTINCT checked FROM {CORES}") == [{"checked": False}]


@pytest.mark.parametrize("meta", ["", ", _run_id varchar(8)"])
def test_table_made_by_hand(sandbox: Sandbox, tmp_path: Path, meta: str) -> None:
    """With other names for the types, another order of the columns, and a row in it."""
    types = (
        "id: varchar(24) not null, name: varchar(256), flight_number: smallint, date_unix: bigint, "
        "window: integer, tbd: boolean, date_utc: timestamptz, static_fire_date_utc: timestamptz, "
        "mass.exact: 'decimal(10,2)', mass.about: double precision, mass.roughly: real, "
        "mass.on: date, mass.at: timestamp, links: super"
    )
    columns = yaml.load(f"{{{types}}}", yaml.BaseLoader)
    tables = {"public.flights": {"key": ["id"], "columns": columns}}
    sandbox.as_user(
        "CREATE TABLE public.flights (date_utc timestamp with time zone, static_fire_date_utc "
        'timestamptz, "window" int4, tbd bool, flight_number int2, date_unix int8, links super, '
        "mass_exact numeric(10, 2), mass_about float8, mass_roughly float4, mass_on date, mass_at "
        'timestamp without time zone, "ID" character varying(24) NOT NULL PRIMARY KEY, '
        f"name nvarchar(256){meta}) DISTSTYLE ALL",
        "INSERT INTO public.flights (id) VALUES ('by hand')",
    )
    mass = {"mass": {"exact": 1.25, "at": "2006-03-24 22:30:00"}}
    serve(sandbox, [launch | mass for launch in DOCUMENT])
    added = altered(loaded(sandbox, *shipped(tmp_path, {"tables": tables})))
    assert len(added) == 2
    assert "_run_id" in added[0]
    assert added[1].endswith('ADD COLUMN "_loaded_at" timestamptz')
    assert column_type(sandbox, "public.flights", "_run_id") == ("character varying", 64)
    rows = sandbox.query("SELECT id, name, mass_exact, _run_id, _loaded_at FROM public.flights")
    assert len(rows) == 30
    assert {row["name"] for row in rows} == {launch["name"] for launch in DOCUMENT}
    assert {str(row["mass_exact"]) for row in rows} == {"1.25"}
    (run,) = {row["_run_id"] for row in rows}
    assert run == sandbox.query(f"SELECT _run_id FROM {AUDIT}")[0]["_run_id"]
    assert all(row["_loaded_at"] for row in rows)


# --- the audit table -----------------------------------------------------------------------------


def test_row_of_a_run_for_each_table(sandbox: Sandbox) -> None:
    source = sandbox.source.url.replace("http://", "http://me:pa55word@")
    source = source.replace("launches", "it's%20100%25") + "?token=s3cret#part"
    bodies = []
    for number in (30, 28):
        serve(sandbox, launches(number))
        bodies += [sandbox.source.body] * 2
        loaded(sandbox, "--source", source)
    rows = sandbox.query(f"SELECT * FROM {AUDIT} ORDER BY _run_id, table_name")
    found = [(row["table_name"], row["rows_before"], row["rows_loaded"]) for row in rows]
    assert found == [(CORES, 0, 38), (LAUNCHES, 0, 30), (CORES, 38, 36), (LAUNCHES, 30, 28)]
    assert {row["mode"] for row in rows} == {"replace"}
    objects = sandbox.objects()
    for row, body in zip(rows, bodies, strict=True):
        assert row["source"] == sandbox.source.url.replace("launches", "it's%20100%25")
        assert row["sha256"] == hashlib.sha256(body).hexdigest()
        assert re.fullmatch(RUN_ID, row["_run_id"])
        entries = json.loads(objects[key(row["manifest"])])["entries"]
        assert f"/{row['table_name']}/" in row["manifest"]
        assert [key(entry["url"]) in objects for entry in entries] == [True]
        assert gzip.decompress(objects[key(row["raw"])]) == body
        assert row["_run_id"] in row["manifest"]
        assert row["_run_id"] in row["raw"]
        assert f"{row['started_at']:%Y%m%dT%H%M%S}" == row["_run_id"].partition(".")[0]
        # GETDATE() has whole seconds: so has this, or it would be later where all took less.
        assert row["started_at"].microsecond == 0
        assert row["started_at"] <= row["_loaded_at"]
    assert rows[0]["_run_id"] == rows[1]["_run_id"] < rows[2]["_run_id"] == rows[3]["_run_id"]
    joined = f"""SELECT count(*) AS rows, min(rows_loaded) AS said FROM {{0}}
        JOIN {AUDIT} USING (_run_id) WHERE table_name = '{{0}}'"""
    assert sandbox.query(joined.format(LAUNCHES)) == [{"rows": 28, "said": 28}]
    assert sandbox.query(joined.format(CORES)) == [{"rows": 36, "said": 36}]


def key(url: str) -> str:
    """The key of an object in the sandbox's bucket."""
    assert url.startswith(f"s3://{BUCKET}/")
    return url.removeprefix(f"s3://{BUCKET}/")


def test_replay_from_the_raw_response(sandbox: Sandbox) -> None:
    document = launches(30)
    document[0]["name"] = "before it was renamed"
    serve(sandbox, document)
    loaded(sandbox)
    tables = data(sandbox)
    serve(sandbox, launches(28))
    loaded(sandbox)
    assert data(sandbox) != tables
    (run,) = sandbox.query(f"SELECT DISTINCT raw, sha256 FROM {AUDIT} WHERE rows_before = 0")
    sandbox.source.requests.clear()
    loaded(sandbox, "--source", run["raw"])
    assert sandbox.source.requests == []
    assert data(sandbox) == tables
    last = f"(SELECT max(_run_id) FROM {AUDIT})"
    rows = sandbox.query(f"SELECT * FROM {AUDIT} WHERE _run_id = {last}")
    assert {row["table_name"]: row["rows_loaded"] for row in rows} == {LAUNCHES: 30, CORES: 38}
    assert {row["source"] for row in rows} == {run["raw"]}
    assert {row["sha256"] for row in rows} == {run["sha256"]}
    body = json.dumps(document).encode()
    assert run["sha256"] == hashlib.sha256(body).hexdigest()
    for row in rows:
        assert row["raw"] != run["raw"]
        assert gzip.decompress(sandbox.objects()[key(row["raw"])]) == body


def test_audit_table_of_another_name(sandbox: Sandbox, tmp_path: Path) -> None:
    sandbox.as_user("CREATE SCHEMA ops")
    try:
        loaded(sandbox, *shipped(tmp_path, {"redshift / audit_table": "ops.history"}))
        rows = sandbox.query("SELECT table_name, rows_loaded FROM ops.history ORDER BY 1")
        assert [tuple(row.values()) for row in rows] == [(CORES, 38), (LAUNCHES, 30)]
        assert set(state(sandbox)) == {LAUNCHES, CORES}
    finally:
        sandbox.as_user("DROP SCHEMA ops CASCADE")


def test_audit_table_of_an_older_version(sandbox: Sandbox) -> None:
    """A history without a column that was added later gets it, and keeps its rows."""
    loaded(sandbox)
    sandbox.as_user(
        f"ALTER TABLE {AUDIT} DROP COLUMN sha256",
        f"ALTER TABLE {AUDIT} ADD COLUMN remark varchar(100) DEFAULT 'none'",
    )
    log = loaded(sandbox)
    assert altered(log) == ['ALTER TABLE "public"."etl_runs" ADD COLUMN "sha256" varchar(64)']
    rows = sandbox.query(f"SELECT sha256, remark FROM {AUDIT} ORDER BY _run_id")
    served = hashlib.sha256(sandbox.source.body).hexdigest()
    assert [row["sha256"] for row in rows] == [None, None, served, served]
    assert {row["remark"] for row in rows} == {"none"}
