"""What the load refuses, what it changes in existing tables, and what it leaves a record of."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import helpers
from helpers import (
    AUDIT,
    CORES,
    LAUNCHES,
    REMOVED,
    RUN_ID,
    PipelineError,
    Records,
    assert_failed,
    count,
    messages,
    refuse_shrinking,
    serve,
    shipped,
)
from helpers import fewer_launches as launches
from sandbox import BUCKET, SAMPLE, Sandbox

DOCUMENT = launches(30)  # with 38 cores

OF_LAUNCHES, OF_CORES = f"tables / {LAUNCHES} / columns /", f"tables / {CORES} / columns /"


def launches_without(field: str, core_field: str) -> Records:
    """The sample with null in a field of each launch and in one of each core."""
    return [
        launch | {field: None, "cores": [core | {core_field: None} for core in launch["cores"]]}
        for launch in DOCUMENT
    ]


def loaded(sandbox: Sandbox, *arguments: str | Path) -> list[str]:
    """Runs the program, which must succeed; returns its warnings."""
    warnings = messages(helpers.loaded(sandbox, *arguments), "WARNING")
    return [text.removeprefix("load: ") for text in warnings]


def refused(sandbox: Sandbox, *arguments: str | Path) -> str:
    """Runs the program, which must fail and change nothing; returns its error."""
    before = state(sandbox)
    done = sandbox.run(*arguments)
    assert (done.returncode, state(sandbox)) == (1, before), done.stderr
    (error,) = messages(done, "ERROR")
    return error


def state(sandbox: Sandbox) -> dict[str, tuple[list[Any], list[str]]]:
    """Columns and rows of all tables."""
    named = sandbox.query("""
        SELECT table_schema || '.' || table_name AS name,
               array_agg(row(column_name, data_type, character_maximum_length, is_nullable)::text
                         ORDER BY ordinal_position) AS columns
        FROM information_schema.columns WHERE table_schema = 'public' GROUP BY 1 ORDER BY 1""")
    rows = {it["name"]: sandbox.query(f"SELECT t::text AS r FROM {it['name']} t") for it in named}
    return {it["name"]: (it["columns"], sorted(r["r"] for r in rows[it["name"]])) for it in named}


# --- fewer rows than there were ------------------------------------------------------------------

# Settings of the table; rows that it has; the fewest that are enough.
ENOUGH: dict[str, tuple[dict[str, Any], int, int]] = {
    "default": ({}, 30, 24),
    "default, rounded up": ({}, 38, 31),
    "half": ({"max_shrink": 0.5}, 30, 15),
    "seven tenths, 9.000000000000002": ({"max_shrink": 0.7}, 30, 9),
    "none less": ({"max_shrink": 0}, 30, 30),
    "a least number": ({"max_shrink": 1, "min_rows": 7}, 30, 7),
    "all": ({"max_shrink": 1}, 30, 1),
    "first load": ({}, 0, 1),
    "first load, a least number": ({"min_rows": 39}, 0, 39),
}


@pytest.mark.parametrize(("settings", "before", "enough"), ENOUGH.values(), ids=ENOUGH)
def test_fewer_rows(settings: dict[str, Any], before: int, enough: int) -> None:
    refuse_shrinking(before, enough, **settings)
    few = enough - 1
    message = f"has {before} rows and would have {few}, at least {enough} .*--allow-shrink"
    with pytest.raises(PipelineError, match=message):
        refuse_shrinking(before, few, **settings)
    refuse_shrinking(before, few, allow_shrink=True, **settings)
    refuse_shrinking(before, few, mode="upsert", **settings)


def test_far_fewer_rows_are_allowed_for_one_run(sandbox: Sandbox) -> None:
    serve(sandbox, launches(30, cores=0))
    assert_failed(sandbox.run(), f"{CORES} has 0 rows and would have 0, at least 1 ")
    assert [count(sandbox, table) for table in (LAUNCHES, CORES, AUDIT)] == [0, 0, 0]
    serve(sandbox, DOCUMENT)
    loaded(sandbox)
    serve(sandbox, launches(4, cores=4))
    assert f"{LAUNCHES} has 30 rows and would have 4, at least 24 " in refused(sandbox)
    loaded(sandbox, "--allow-shrink")
    assert (count(sandbox, LAUNCHES), count(sandbox, CORES)) == (4, 4)
    serve(sandbox, launches(4, cores=3))
    refused(sandbox)


# --- tables that differ from the configuration ---------------------------------------------------


def test_missing_columns_are_added_and_narrower_texts_widened(
    sandbox: Sandbox, tmp_path: Path
) -> None:
    changes = {
        f"{OF_LAUNCHES} details": REMOVED,
        f"{OF_LAUNCHES} fairings.ships": REMOVED,
        f"{OF_LAUNCHES} name": "varchar(64) not null",
        f"{OF_LAUNCHES} rocket": "varchar(1000)",
        f"{OF_CORES} landing_type": "varchar(5)",
    }
    loaded(sandbox, *shipped(tmp_path, changes))
    document = launches(30)
    document[0]["name"] = "ü" * 128  # 256 bytes
    serve(sandbox, document)
    assert sorted(loaded(sandbox)) == [
        'ALTER TABLE "public"."launch_cores" ALTER COLUMN "landing_type" TYPE varchar(16)',
        'ALTER TABLE "public"."launches" ADD COLUMN "details" varchar(16384)',
        'ALTER TABLE "public"."launches" ADD COLUMN "fairings_ships" super',
        # The stand-in, as Redshift, refuses this inside a transaction.
        'ALTER TABLE "public"."launches" ALTER COLUMN "name" TYPE varchar(256)',
    ]
    rows = sandbox.query(f"SELECT id, name, details, fairings_ships FROM {LAUNCHES}")
    assert {row["id"]: [*row.values()][1:] for row in rows} == {
        it["id"]: [it["name"], it["details"], (it["fairings"] or {}).get("ships")]
        for it in document
    }
    (wide,) = sandbox.query("""SELECT character_maximum_length AS length
        FROM information_schema.columns WHERE column_name = 'rocket'""")
    assert wide["length"] == 1000
    assert loaded(sandbox) == []


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
        f"{OF_LAUNCHES} {column}": type_,
        f"{OF_LAUNCHES} details": REMOVED,  # would be added
        f"{OF_CORES} core": "varchar(10)",  # would be widened
    }
    serve(sandbox, launches_without("window", "core"))
    loaded(sandbox, *shipped(tmp_path, changes))
    sandbox.source.body = SAMPLE.read_bytes()
    start = len(sandbox.redshift.statements)
    message = refused(sandbox)
    writing = ("ALTER", "CREATE", "COPY", "DELETE", "INSERT")
    assert not [sql for sql in sandbox.redshift.statements[start:] if sql.startswith(writing)]
    assert f"{LAUNCHES}: the column {column} {fault}" in message
    (fix,) = re.findall(r"ALTER TABLE .*", message)
    sandbox.as_user(fix)
    loaded(sandbox)
    rows = sandbox.query(f'SELECT id, "{column}" FROM {LAUNCHES}')
    assert {row["id"]: row[column] for row in rows} == {it["id"]: it[column] for it in DOCUMENT}
    if type_ is REMOVED:
        assert count(sandbox, f"{LAUNCHES}_old") == 30


def test_all_faults_in_one_message(sandbox: Sandbox, tmp_path: Path) -> None:
    changes = {
        f"{OF_LAUNCHES} window": "bigint",
        f"{OF_LAUNCHES} failures": "varchar(65535)",
        f"{OF_LAUNCHES} upcoming": REMOVED,
        f"{OF_CORES} gridfins": "smallint",
    }
    serve(sandbox, launches_without("failures", "gridfins"))
    loaded(sandbox, *shipped(tmp_path, changes))
    sandbox.as_user(
        f"ALTER TABLE {AUDIT} RENAME COLUMN rows_before TO old",
        f"ALTER TABLE {AUDIT} ADD COLUMN rows_before varchar(20)",
    )
    message = refused(sandbox)
    for fault in (
        "public.launches: the column window is bigint in the table and integer in",
        "public.launches: the column failures is varchar(65535) in the table and super in",
        "public.launches: the column upcoming is missing",
        "public.launch_cores: the column gridfins is smallint in the table and boolean in",
        "public.etl_runs: the column rows_before is varchar(20) in the table and bigint in",
    ):
        assert fault in message
    assert message.count("ALTER TABLE") == 5


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
    log = loaded(sandbox, *shipped(tmp_path, {"tables": tables}))
    run_id, loaded_at = [text for text in log if text.startswith("ALTER TABLE")]
    assert re.search('"_run_id" (TYPE )?varchar.64.$', run_id)
    assert loaded_at.endswith('ADD COLUMN "_loaded_at" timestamptz')
    rows = sandbox.query("SELECT id, name, mass_exact, _run_id, _loaded_at FROM public.flights")
    assert sorted(row["name"] for row in rows) == sorted(launch["name"] for launch in DOCUMENT)
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
    for row, body in zip(rows, bodies, strict=True):
        run = row["_run_id"]
        assert re.fullmatch(RUN_ID, run)
        folder = f"{run[:4]}/{run[4:6]}/{run[6:8]}/{run}"
        url = f"s3://{BUCKET}/spacex/{row['table_name']}/{folder}/manifest.json"
        assert row["manifest"] == url
        assert row["raw"] == f"s3://{BUCKET}/spacex/raw/{folder}/response.json.gz"
        assert row["source"] == sandbox.source.url.replace("launches", "it's%20100%25")
        assert row["sha256"] == hashlib.sha256(body).hexdigest()
        assert f"{row['started_at']:%Y%m%dT%H%M%S}" == run.partition(".")[0]
        # GETDATE() has whole seconds: so has this, or it would be later where all took less.
        assert row["started_at"].microsecond == 0
        assert row["started_at"] <= row["_loaded_at"]
    assert rows[0]["_run_id"] == rows[1]["_run_id"] < rows[2]["_run_id"] == rows[3]["_run_id"]


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
    added = 'ALTER TABLE "public"."etl_runs" ADD COLUMN "sha256" varchar(64)'
    assert sorted(loaded(sandbox)) == [added, f"{AUDIT} also has the columns remark"]
    rows = sandbox.query(f"SELECT sha256, remark FROM {AUDIT} ORDER BY _run_id")
    served = hashlib.sha256(sandbox.source.body).hexdigest()
    assert [row["sha256"] for row in rows] == [None, None, served, served]
    assert {row["remark"] for row in rows} == {"none"}
