"""The SQL that Redshift gets, whole: tests/data/statements.sql has it for two tables."""

from __future__ import annotations

from typing import Any

import pytest

from helpers import ROLE, config_of, copy_sql, create_sql, doubles_sql, literal, swap_sql
from sandbox import SAMPLE

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
STATEMENTS = (SAMPLE.parent / "statements.sql").read_text("utf-8")


@pytest.mark.parametrize(
    ("configured", "variable", "role"),
    [(None, "", ""), (None, ROLE, ROLE), (f"{ROLE},{ROLE}2", ROLE, f"{ROLE},{ROLE}2")],
)
def test_all_statements(
    monkeypatch: pytest.MonkeyPatch, configured: str | None, variable: str, role: str
) -> None:
    monkeypatch.setenv("AWS_ROLE_ARN", variable)
    config = config_of(TABLES, redshift={"secret": "s", "copy_role": configured})
    written = ""
    for table in config.tables:
        copy, swap = copy_sql(config, table), swap_sql(config, table)
        for statement in (create_sql(table), *copy, doubles_sql(table), *swap):
            written += f"{statement};\n\n"
    expected = STATEMENTS.replace("ROLE default", f"ROLE '{role}'") if role else STATEMENTS
    assert written == expected


@pytest.mark.parametrize(
    ("text", "written"),
    [("", "''"), ("a b", "'a b'"), ("it's", "'it''s'"), ("''", "''''''"), ('"é"', "'\"é\"'")],
)
def test_a_literal(text: str, written: str) -> None:
    assert literal(text) == written
