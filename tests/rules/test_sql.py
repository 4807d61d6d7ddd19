"""The SQL that Redshift gets, whole."""

from __future__ import annotations

from typing import Any

import pytest

from helpers import (
    ROLE,
    Config,
    PipelineError,
    Table,
    config_of,
    copy_sql,
    create_sql,
    doubles_sql,
    literal,
    quoted,
    swap_sql,
)

REPLACED = {
    "key": "id",
    "sort_key": ["date_utc", "id"],
    "dist_key": "id",
    "columns": {
        "id": "varchar(24) not null",
        "date_utc": "timestamptz not null",
        "links.patch": "super",
        "mass": "decimal(10,2)",
        "ratio": "double precision",
    },
}
UPSERTED = {
    "mode": "upsert",
    "rows": "cores",
    "parent": "launch",
    "key": ["launch_id", "position"],
    "columns": {
        "launch.id": "varchar(24)",
        "position": "smallint not null",
        "select": "boolean",
    },
}
TABLES = {"public.launches": REPLACED, "spacex.cores": UPSERTED}


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.delenv("AWS_ROLE_ARN", raising=False)
    return config_of(TABLES)


@pytest.fixture
def launches(config: Config) -> Table:
    return config.tables[0]


@pytest.fixture
def cores(config: Config) -> Table:
    return config.tables[1]


def test_create(launches: Table) -> None:
    assert (
        create_sql(launches)
        == """\
CREATE TABLE IF NOT EXISTS "public"."launches" (
  "id" varchar(24) NOT NULL,
  "date_utc" timestamptz NOT NULL,
  "links_patch" super,
  "mass" decimal(10,2),
  "ratio" double precision,
  "_run_id" varchar(64),
  "_loaded_at" timestamptz
)
DISTKEY ("id")
COMPOUND SORTKEY ("date_utc", "id")"""
    )


def test_create_without_sort_and_dist_key(cores: Table) -> None:
    assert (
        create_sql(cores)
        == """\
CREATE TABLE IF NOT EXISTS "spacex"."cores" (
  "launch_id" varchar(24),
  "position" smallint NOT NULL,
  "select" boolean,
  "_run_id" varchar(64),
  "_loaded_at" timestamptz
)"""
    )


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


def test_copy_with_the_default_role(config: Config, launches: Table) -> None:
    create, copy = copy_sql(config, launches)
    columns = create_sql(launches).partition("(")[2].replace(META, "")
    assert create == f'CREATE TEMP TABLE "staging_1" ({columns}'
    assert copy == COPY.format("default")


@pytest.mark.parametrize("role", [ROLE, f"{ROLE},{ROLE}2"])
def test_copy_with_a_role(role: str) -> None:
    redshift = {"secret": "s", "copy_role": role}
    config = config_of(TABLES, redshift=redshift)
    _, copy = copy_sql(config, config.tables[0])
    assert copy == COPY.format(f"'{role}'")


def test_doubles_of_one_key(launches: Table) -> None:
    assert (
        doubles_sql(launches)
        == """\
SELECT rtrim("id")
FROM "staging_1"
GROUP BY rtrim("id")
HAVING count(*) > 1
LIMIT 5"""
    )


def test_doubles_of_two_keys(cores: Table) -> None:
    assert (
        doubles_sql(cores)
        == """\
SELECT rtrim("launch_id"), "position"
FROM "staging_2"
GROUP BY rtrim("launch_id"), "position"
HAVING count(*) > 1
LIMIT 5"""
    )


def test_replace(config: Config, launches: Table) -> None:
    assert swap_sql(config, launches) == (
        'DELETE FROM "public"."launches"',
        """\
INSERT INTO "public"."launches" \
("id", "date_utc", "links_patch", "mass", "ratio", "_run_id", "_loaded_at")
SELECT "id", "date_utc", "links_patch", "mass", "ratio", \
'20240229T235958.000007Z-0a1b2c3d', GETDATE()
FROM "staging_1\"""",
    )


def test_upsert_by_two_keys(config: Config, cores: Table) -> None:
    assert swap_sql(config, cores) == (
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


@pytest.mark.parametrize(
    ("names", "written"),
    [
        (["id"], '"id"'),
        (["a", "b"], '"a", "b"'),
        (["public.launches"], '"public"."launches"'),
        (["public.launches.id", "select"], '"public"."launches"."id", "select"'),
    ],
)
def test_quoted(names: list[str], written: str) -> None:
    assert quoted(*names) == written


LONG = "t" * 120


@pytest.mark.parametrize(
    "names", [["a.b_c", "a_b.c"], [f"public.{LONG}_1", f"public.{LONG}_2"]], ids=["dot", "long"]
)
def test_every_table_is_staged_in_its_own(names: list[str]) -> None:
    settings: dict[str, Any] = {"key": "id", "columns": {"id": "integer"}}
    first, second = config_of(dict.fromkeys(names, settings)).tables
    assert doubles_sql(first) != doubles_sql(second)
