"""The SQL that Redshift gets, whole."""

from __future__ import annotations

from typing import Any

import pytest

from helpers import (
    ROLE,
    Config,
    PipelineError,
    config_of,
    copy_sql,
    create_sql,
    doubles_sql,
    literal,
    quoted,
    swap_sql,
)

COLUMNS = {
    "id": "varchar(24) not null",
    "date_utc": "timestamptz not null",
    "links.patch": "super",
    "mass": "decimal(10,2)",
    "ratio": "double precision",
}
CORE_COLUMNS = {"launch.id": "varchar(24)", "position": "smallint not null", "select": "boolean"}
TABLES: dict[str, Any] = {
    "public.launches": {
        "key": "id",
        "sort_key": ["date_utc", "id"],
        "dist_key": "id",
        "columns": COLUMNS,
    },
    "spacex.cores": {
        "mode": "upsert",
        "rows": "cores",
        "parent": "launch",
        "key": ["launch_id", "position"],
        "columns": CORE_COLUMNS,
    },
}
LAUNCHES = """(
  "id" varchar(24) NOT NULL,
  "date_utc" timestamptz NOT NULL,
  "links_patch" super,
  "mass" decimal(10,2),
  "ratio" double precision{meta}
)
DISTKEY ("id")
COMPOUND SORTKEY ("date_utc", "id")"""
CORES = """(
  "launch_id" varchar(24),
  "position" smallint NOT NULL,
  "select" boolean{meta}
)"""
META = """,
  "_run_id" varchar(64),
  "_loaded_at" timestamptz"""
COPY = """\
COPY "staging_1" ("id", "date_utc", "links_patch", "mass", "ratio")
FROM 's3://bucket/spacex/public.launches/2024/02/29/20240229T235958.000007Z-0a1b2c3d/manifest.json'
IAM_ROLE {}
REGION 'eu-west-1'
MANIFEST GZIP CSV IGNOREHEADER 1
NULL AS 'NULL-0a1b2c3d'
DATEFORMAT 'auto' TIMEFORMAT 'auto'
COMPUPDATE OFF STATUPDATE OFF"""


def config(role: str | None = None) -> Config:
    return config_of(TABLES, redshift={"secret": "s", "copy_role": role})


@pytest.fixture(autouse=True)
def no_role(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ROLE_ARN", raising=False)


def test_create() -> None:
    launches, cores = config().tables
    create = "CREATE TABLE IF NOT EXISTS "
    assert create_sql(launches) == f'{create}"public"."launches" {LAUNCHES.format(meta=META)}'
    assert create_sql(cores) == f'{create}"spacex"."cores" {CORES.format(meta=META)}'


@pytest.mark.parametrize(
    ("configured", "variable", "role"),
    [(None, None, None), (None, "", None), (None, ROLE, ROLE), (f"{ROLE},{ROLE}2", ROLE, "both")],
)
def test_copy(
    monkeypatch: pytest.MonkeyPatch, configured: str | None, variable: str | None, role: str | None
) -> None:
    if variable is not None:
        monkeypatch.setenv("AWS_ROLE_ARN", variable)
    role = configured or role
    create, copy = copy_sql(config(configured), config().tables[0])
    assert create == f'CREATE TEMP TABLE "staging_1" {LAUNCHES.format(meta="")}'
    assert copy == COPY.format(f"'{role}'" if role else "default")


def test_doubles() -> None:
    sql = "SELECT {0}\nFROM {1}\nGROUP BY {0}\nHAVING count(*) > 1\nLIMIT 5"
    launches, cores = config().tables
    assert doubles_sql(launches) == sql.format('rtrim("id")', '"staging_1"')
    assert doubles_sql(cores) == sql.format('rtrim("launch_id"), "position"', '"staging_2"')


REPLACE = (
    'DELETE FROM "public"."launches"',
    """\
INSERT INTO "public"."launches" \
("id", "date_utc", "links_patch", "mass", "ratio", "_run_id", "_loaded_at")
SELECT "id", "date_utc", "links_patch", "mass", "ratio", \
'20240229T235958.000007Z-0a1b2c3d', GETDATE()
FROM "staging_1\"""",
)
UPSERT = (
    """\
DELETE FROM "spacex"."cores"
USING "staging_2"
WHERE "spacex"."cores"."launch_id" = "staging_2"."launch_id" \
AND "spacex"."cores"."position" = "staging_2"."position\"""",
    """\
INSERT INTO "spacex"."cores" ("launch_id", "position", "select", "_run_id", "_loaded_at")
SELECT "launch_id", "position", "select", '20240229T235958.000007Z-0a1b2c3d', GETDATE()
FROM "staging_2\"""",
)


def test_replace_and_upsert() -> None:
    launches, cores = config().tables
    assert swap_sql(config(), launches) == REPLACE
    assert swap_sql(config(), cores) == UPSERT


@pytest.mark.parametrize(
    ("text", "written"),
    [("", "''"), ("a b", "'a b'"), ("it's", "'it''s'"), ("''", "''''''"), ('"é"', "'\"é\"'")],
)
def test_a_literal(text: str, written: str) -> None:
    assert literal(text) == written


@pytest.mark.parametrize("text", ["\\", "a\\'b"])
def test_a_literal_has_no_backslash(text: str) -> None:
    with pytest.raises(PipelineError, match="backslash"):
        literal(text)


def test_quoted() -> None:
    assert quoted("id") == '"id"'
    assert quoted("public.launches") == '"public"."launches"'
    assert quoted("public.launches.id", "select") == '"public"."launches"."id", "select"'
