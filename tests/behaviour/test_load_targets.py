"""What a load refuses, and targets, secrets, rights and buckets as real clusters have them."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

from helpers import (
    AUDIT,
    COLUMNS,
    TABLE,
    PipelineError,
    Things,
    act_once,
    count,
    faulty_aws,
    refuse_shrinking,
    serve,
)
from sandbox import BUCKET, DATABASE, PASSWORD, USER, answer

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
    message = f"has {before} rows and would have {few}, fewer than {enough} .*--allow-shrink"
    with pytest.raises(PipelineError, match=message):
        refuse_shrinking(before, few, **settings)
    refuse_shrinking(before, few, allow_shrink=True, **settings)
    refuse_shrinking(before, few, mode="upsert", **settings)


IN_THE_WAY = {
    "view": (
        "CREATE TABLE public.things (id varchar(8) NOT NULL, name varchar(4), n integer)",
        "CREATE VIEW public.seen AS SELECT name FROM public.things",
    ),
    "default": (
        "CREATE TABLE public.things (id varchar(8) NOT NULL, n int, name varchar(4) DEFAULT '')",
    ),
}


@pytest.mark.parametrize("case", IN_THE_WAY)
def test_a_text_that_cannot_be_widened(things: Things, case: str) -> None:
    things.sandbox.as_user(*IN_THE_WAY[case], "INSERT INTO public.things (id, n) VALUES ('a', 1)")
    columns = COLUMNS | {"name": "varchar(9)"}
    error = things.refused(("b", 2), columns=columns)
    assert "cannot alter type of a column" in error
    assert f"no row has changed. The column name of {TABLE} cannot be widened while" in error
    (fix,) = re.findall(r"ALTER TABLE \S+ RENAME TO \S+", error)
    things.sandbox.as_user(fix)
    things.load(("b", 2), columns=columns)
    assert things.rows() == [("b", 2)]


def test_missing_columns_are_added_and_narrower_texts_widened(things: Things) -> None:
    columns = {"id": "varchar(8) not null", "name": "varchar(4) not null", "wide": "varchar(1000)"}
    record = {"id": "a", "name": "abcd", "wide": "w"}
    serve(things.sandbox, [record])
    things.load(columns=columns)
    more = {"n": "integer", "ships.of it": "super", "name": "varchar(8) not null"}
    serve(things.sandbox, [record | {"name": "ü" * 4, "n": 1, "ships": {"of it": [1]}}])
    for changes in (
        [
            # The stand-in, as Redshift, refuses this inside a transaction.
            'ALTER TABLE "public"."things" ALTER COLUMN "name" TYPE varchar(8)',
            'ALTER TABLE "public"."things" ADD COLUMN "n" integer',
            'ALTER TABLE "public"."things" ADD COLUMN "ships_of_it" super',
        ],
        [],
    ):
        warnings = things.load(columns=columns | {"wide": "varchar(20)"} | more)
        assert warnings == [f"load: {change}" for change in changes]
        assert things.rows("id, name, wide, n, ships_of_it::text") == [("a", "üüüü", "w", 1, "[1]")]
    (wide,) = things.sandbox.query("""SELECT character_maximum_length AS length
        FROM information_schema.columns WHERE column_name = 'wide'""")
    assert wide["length"] == 1000


# The type of a column in the table, and that in the configuration.
DIFFERENT = {
    "text": ("varchar(20)", "integer"),
    "whole": ("bigint", "integer"),
    "json": ("varchar(65535)", "super"),
    "flag": ("smallint", "boolean"),
    "lacking": ("missing", "boolean not null"),
}


def test_what_differs_stops_the_run_and_the_statement_helps(things: Things) -> None:
    """All faults are in one message; nothing is altered before there are none."""
    fault = "{}: the column {} is {} in the table and {} in the configuration"
    faults = [fault.format(TABLE, name, *kinds) for name, kinds in DIFFERENT.items()]
    faults = [text.replace("not null", "NOT NULL") for text in faults]
    faults.append(fault.format(AUDIT, "rows_before", "varchar(20)", "bigint"))
    before = {name: kind for name, (kind, _) in DIFFERENT.items() if kind != "missing"}
    now = {name: kind for name, (_, kind) in DIFFERENT.items()}
    now |= {"name": "varchar(9)", "added": "super"}  # which would be altered
    values = {"whole": 5, "lacking": True, "name": "abcd", "added": [1]}
    serve(things.sandbox, [{"id": "a", "n": 1} | dict.fromkeys(before) | values])
    things.load(columns=COLUMNS | before | {"whole": "bigint not null", "name": "varchar(4)"})
    things.sandbox.as_user(
        f"ALTER TABLE {AUDIT} RENAME COLUMN rows_before TO old",
        f"ALTER TABLE {AUDIT} ADD COLUMN rows_before varchar(20)",
    )
    statements = things.sandbox.redshift.statements
    statements.clear()
    error = things.refused(columns=COLUMNS | now)
    writing = ("ALTER", "CREATE", "COPY", "DELETE", "INSERT")
    assert not [sql for sql in statements if sql.startswith(writing)]
    assert [fault for fault in faults if fault not in error] == []
    fixes = re.findall(r"ALTER TABLE .*", error)
    assert len(fixes) == len(faults)
    things.sandbox.as_user(*set(fixes))
    things.load(columns=COLUMNS | now)
    assert things.rows("id, n, name, added::text") == [("a", 1, "abcd", "[1]")]
    assert count(things.sandbox, f"{TABLE}_old") == 1


# Types; the names by which a table may have been made with them; a value.
SPELLED: dict[str, tuple[str, Any]] = {
    "varchar(256)": ("nvarchar(256)", "name"),
    "smallint": ("int2", 7),
    "integer": ("int4", 8),
    "bigint": ("int8", 9),
    "boolean": ("bool", True),
    "decimal(10,2)": ("numeric(10, 2)", 1.25),
    "double precision": ("float8", 1.5),
    "real": ("float4", 2.5),
    "date": ("date", "2006-03-24"),
    "timestamp": ("timestamp without time zone", "2006-03-24 22:30:00"),
    "timestamptz": ("timestamp with time zone", "2006-03-24T22:30:00Z"),
    "super": ("super", "text"),
}


@pytest.mark.parametrize("meta", ["", ", _run_id varchar(8)"])
def test_table_made_by_hand(things: Things, meta: str) -> None:
    """With other names for the types, another order of the columns, and a row in it."""
    names = [f"c{number}" for number in range(len(SPELLED))]
    spelled, values = zip(*SPELLED.values(), strict=True)
    made = [*map(" ".join, zip(names, spelled, strict=True))]
    things.sandbox.as_user(
        f"CREATE TABLE {TABLE} ({', '.join(reversed(made))}, "
        f'"ID" character varying(8) NOT NULL PRIMARY KEY{meta}) DISTSTYLE ALL',
        f"INSERT INTO {TABLE} (id) VALUES ('by hand')",
    )
    serve(things.sandbox, [{"id": "a"} | dict(zip(names, values, strict=True))])
    columns = {"id": "varchar(8) not null"} | dict(zip(names, SPELLED, strict=True))
    run_id, loaded_at = things.load(columns=columns)
    assert re.search('"_run_id" (TYPE )?varchar.64.$', run_id)
    assert loaded_at.endswith('ADD COLUMN "_loaded_at" timestamptz')
    (row,) = things.sandbox.query(f"SELECT * FROM {TABLE}")
    assert (row["id"], str(row["c5"]), row["_loaded_at"] is None) == ("a", "1.25", False)
    assert [row["_run_id"]] == [it["_run_id"] for it in things.sandbox.query(f"TABLE {AUDIT}")]


@pytest.mark.parametrize("case", ["user and password", "cluster identifier"])
def test_the_configuration_fills_in_what_the_secret_lacks(things: Things, case: str) -> None:
    secret = {"username": USER, "password": PASSWORD}
    if case == "cluster identifier":
        secret |= {"engine": "redshift", "dbClusterIdentifier": "my-cluster", "dbname": DATABASE}
    things.sandbox.set_secret(json.dumps(secret))
    where = {"host": things.sandbox.redshift.host, "port": things.sandbox.redshift.port}
    error = things.refused(("a", 1))
    assert re.search(r"has no HOST.* redshift\.host", error)
    things.load(("a", 1), redshift=where | {"database": DATABASE})
    # As AWS writes it; the secret wins.
    things.sandbox.set_secret(json.dumps(secret | where | {"port": str(where["port"])}))
    things.load(("a", 2), redshift={"host": "nowhere.invalid", "port": 1, "database": DATABASE})
    assert things.rows() == [("a", 2)]


MADE = {
    "identity": "number bigint IDENTITY(1, 1), {}",
    "identity by default": "number bigint GENERATED BY DEFAULT AS IDENTITY(1, 1), {}",
    "default": "origin varchar(9) DEFAULT 'api', {}",
    "not null with a default": "{}, origin varchar(9) NOT NULL DEFAULT 'api'",
    "order": "n integer, {}",
}


@pytest.mark.parametrize("case", MADE)
def test_columns_that_the_configuration_does_not_have(things: Things, case: str) -> None:
    columns = "id varchar(8) NOT NULL" + (", n integer" if case != "order" else "")
    things.sandbox.as_user(f"CREATE TABLE {TABLE} ({MADE[case].format(columns)})")
    warnings = things.load(("a", 1), ("b", 2))
    assert things.rows() == [("a", 1), ("b", 2)]
    extra = [text for text in warnings if f"{TABLE} also has the columns " in text]
    assert len(extra) == (case != "order")
    if "identity" in case:
        assert sorted(things.rows("number")) == [(1,), (2,)]
    if "default" in case.split():
        assert case.startswith("identity") or set(things.rows("origin")) == {("api",)}


NULLS = {
    "not configured": ("{}, owner varchar(9) NOT NULL", "owner"),
    "no longer not null": ("id varchar(8) NOT NULL, n integer NOT NULL", "n"),
}


@pytest.mark.parametrize("case", NULLS)
def test_a_null_that_the_target_refuses(things: Things, case: str) -> None:
    columns, column = NULLS[case]
    columns = columns.format("id varchar(8) NOT NULL, n integer")
    things.sandbox.as_user(f"CREATE TABLE {TABLE} ({columns})")
    error = things.refused(("a", None))
    assert 'INSERT INTO "public"."things"' in error
    assert f'null value in column "{column}"' in error


def test_audit_table_of_another_name(things: Things) -> None:
    things.sandbox.as_user("CREATE SCHEMA ops")
    try:
        things.load(("a", 1), redshift={"audit_table": "ops.history"})
        rows = things.sandbox.query("SELECT table_name, rows_loaded FROM ops.history")
        assert rows == [{"table_name": TABLE, "rows_loaded": 1}]
        assert things.sandbox.query(f"SELECT to_regclass('{AUDIT}')") == [{"to_regclass": None}]
    finally:
        things.sandbox.as_user("DROP SCHEMA ops CASCADE")


def test_audit_table_of_an_older_version(things: Things) -> None:
    """A history without a column that was added later gets it, and keeps its rows."""
    things.load(("a", 1))
    things.sandbox.as_user(
        f"ALTER TABLE {AUDIT} DROP COLUMN sha256",
        f"ALTER TABLE {AUDIT} ADD COLUMN remark varchar(100) DEFAULT 'none'",
    )
    added = 'ALTER TABLE "public"."etl_runs" ADD COLUMN "sha256" varchar(64)'
    other = f"{AUDIT} also has the columns remark"
    assert sorted(things.load(("a", 2))) == [f"load: {text}" for text in (added, other)]
    served = hashlib.sha256(things.sandbox.source.body).hexdigest()
    rows = things.sandbox.query(f"SELECT sha256, remark FROM {AUDIT} ORDER BY _run_id")
    assert [(row["sha256"], row["remark"]) for row in rows] == [(None, "none"), (served, "none")]


def test_metadata_that_is_closed(things: Things) -> None:
    """No columns are seen: that is no proof that there is no table."""
    things.sandbox.redshift.settings = {"sandbox.svv_columns": "closed"}
    things.load(("a", 1), redshift={"audit_table": "public.first"})
    statements = things.sandbox.redshift.statements
    statements.clear()
    error = things.refused(("a", 2), redshift={"audit_table": "public.second"})
    assert re.search(rf"{TABLE} exists.*svv_columns", error)
    assert not [sql for sql in statements if sql.startswith(("CREATE", "ALTER", "COPY"))]


def test_a_table_that_another_loader_makes_meanwhile(things: Things) -> None:
    """After the metadata showed none, before it is asked for: it is not taken for a closed one."""
    make = f"CREATE TABLE {TABLE} (id varchar(8) NOT NULL, n integer)"
    looked = act_once(
        things.sandbox, "SELECT column_name", lambda: things.sandbox.as_user(make), "after"
    )
    things.load(("a", 1))
    assert ["'things'" in sql for sql in looked] == [True]
    assert things.rows() == [("a", 1)]


def test_booleans_and_times_as_the_guide_spells_them(things: Things) -> None:
    columns = COLUMNS | {"is": "boolean", "on": "date", "at": "timestamp", "tz": "timestamptz"}
    times = {"0001-01-01": True, "0099-12-31": False, "0999-02-28": None}
    records = [
        {"id": day, "is": is_, "on": day, "at": f"{day} 01:02:03", "tz": f"{day}T01:02:03.5Z"}
        for day, is_ in times.items()
    ]
    serve(things.sandbox, records)
    things.load(columns=columns | {"id": "varchar(10) not null"})
    rows = things.rows('"is", "on"::text, "at"::text, tz::text, id')
    assert {row[4]: row[0] for row in rows} == times
    for _, on, at, tz, day in rows:
        assert (on, at, tz) == (day, f"{day} 01:02:03", f"{day} 01:02:03.5+00")
    (key,) = things.sandbox.staged(".csv.gz")
    text = gzip.decompress(things.sandbox.objects()[key]).decode()
    cells = [line.split(",")[2] for line in text.splitlines()[1:]]
    assert cells[:2] == ["t", "f"]


def test_a_lock_that_somebody_else_holds(things: Things) -> None:
    """On the one table that loaders lock: a load gives up in time, and names it."""
    things.load(("a", 1))
    with things.sandbox.redshift.connect() as other:
        other.execute("BEGIN; SELECT count(*) FROM public.etl_runs")  # a lock as well
        error = things.refused(("a", 2), redshift={"statement_seconds": 1})
    assert '"public"."etl_runs"' in error
    sees = """a superuser sees which: SELECT .* FROM svv_transactions WHERE .*relation = """
    assert re.search(sees + """'"public"."etl_runs"'::regclass::oid$""", error)
    things.load(("a", 2))


def test_keys_that_differ_in_spaces_at_the_end_are_double(things: Things) -> None:
    """In two chunks, so that only the staging table shows it."""
    between = [(str(number), number) for number in range(20_000)]
    error = things.refused(("a", 1), *between, ("a  ", 2))
    assert re.search(rf'load: {TABLE}: more than one row has the key id="a"$', error)


def test_a_key_with_a_space_at_its_end_replaces_the_one_without(things: Things) -> None:
    things.load(("a", 1), ("b", 2), mode="upsert")
    things.load(("a ", 3), mode="upsert")
    assert things.rows() == [("a ", 3), ("b", 2)]


def rewrite(things: Things, old: str, new: str) -> None:
    """Changes the only staged file before it is copied."""

    def change() -> None:
        (key,) = things.sandbox.staged(".csv.gz")
        text = gzip.decompress(things.sandbox.objects()[key]).decode()
        assert old in text
        body = gzip.compress(text.replace(old, new).encode())
        things.sandbox.s3.put_object(Bucket=BUCKET, Key=key, Body=body)

    act_once(things.sandbox, "COPY", change)


@pytest.mark.parametrize("errors", ["GRANT", "REVOKE"])
def test_a_value_that_copy_refuses_is_shown_with_its_place(things: Things, errors: str) -> None:
    """Without stl_load_errors, as on Redshift Serverless, its place alone."""
    rewrite(things, "2\n", "x2\n")
    with things.sandbox.redshift.connect() as connection, contextlib.ExitStack() as at_end:
        view = b"SELECT ON sandbox.stl_load_errors"
        if errors == "REVOKE":
            connection.execute(b"REVOKE %b FROM PUBLIC" % view)
            at_end.callback(connection.execute, b"GRANT %b TO PUBLIC" % view)
        error = things.refused(("a", 1), ("b", 2), ("c", 3))
    (key,) = things.sandbox.staged(".csv.gz")
    place = f"COPY for {TABLE}: s3://{BUCKET}/{key}, line 3, column n (int4): "
    reason = "Invalid digit, Value 'x', Pos 0, Type: Integer"
    value = ', value "x2"' if errors == "GRANT" else ""
    assert error == f"load: {place}{reason}{value}"


def test_fewer_rows_than_staged_are_refused(things: Things) -> None:
    rewrite(things, '"b",2\n', "")
    error = things.refused(("a", 1), ("b", 2), ("c", 3))
    assert f"COPY for {TABLE}: 2 rows, but 3 were staged" in error


ENCRYPTIONS = {
    "none": (None, None, None),
    "AES256": ("AES256", "AES256", None),
    "key": ("alias/things", "aws:kms", "alias/things"),
}


@pytest.mark.parametrize("case", ENCRYPTIONS)
def test_encryption_of_uploads(things: Things, case: str) -> None:
    kms_key, *expected = ENCRYPTIONS[case]
    sent: list[list[str | None]] = []

    def note(handler: Any) -> None:
        header = "x-amz-server-side-encryption"
        names = (header, f"{header}-aws-kms-key-id")
        sent.append([handler.headers.get(name) for name in names])
        handler.forward()

    with faulty_aws(things.sandbox, *[note] * 3) as options:
        things.load(("a", 1), options=options, staging={"kms_key": kms_key})
    assert sent == [expected] * 3  # a part, the response, the manifest


def test_the_region_of_a_bucket(things: Things) -> None:
    """Also of one that must not be looked at."""
    where = {"LocationConstraint": "us-west-2"}
    other = things.sandbox.client("s3", region_name="us-west-2")
    other.create_bucket(Bucket="things-elsewhere", CreateBucketConfiguration=where)
    things.load(("a", 1), staging={"bucket": "things-elsewhere"})
    assert things.rows() == [("a", 1)]

    def deny(handler: BaseHTTPRequestHandler) -> None:
        answer(handler, 403, x_amz_bucket_region="eu-north-1")

    with faulty_aws(things.sandbox, deny, method="HEAD") as options:
        things.load(("a", 1), options=options)
    copies = [sql for sql in things.sandbox.redshift.statements if sql.startswith("COPY")]
    regions = [re.findall("REGION '(.*)'", sql) for sql in copies]
    assert regions == [["us-west-2"], ["eu-north-1"]]
