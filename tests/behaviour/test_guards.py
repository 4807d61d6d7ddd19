"""Fewer rows than there were, which the load refuses; and the record that it leaves of each run."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import pytest

from helpers import (
    AUDIT,
    CORES,
    LAUNCHES,
    RUN_ID,
    PipelineError,
    assert_failed,
    count,
    loaded,
    messages,
    refuse_shrinking,
    serve,
    shipped,
)
from helpers import fewer_launches as launches
from sandbox import BUCKET, Sandbox

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
    message = f"has {before} rows and would have {few}, fewer than {enough} .*--allow-shrink"
    with pytest.raises(PipelineError, match=message):
        refuse_shrinking(before, few, **settings)
    refuse_shrinking(before, few, allow_shrink=True, **settings)
    refuse_shrinking(before, few, mode="upsert", **settings)


def test_far_fewer_rows_are_allowed_for_one_run(sandbox: Sandbox) -> None:
    of_cores = f"{CORES} has {{}} rows and would have {{}}, fewer than {{}} "
    of_launches = f"{LAUNCHES} has 30 rows and would have 4, fewer than 24 "
    for document, arguments, refusal, rows in (
        (launches(30, cores=0), [], of_cores.format(0, 0, 1), (0, 0, 0)),
        (launches(30), [], "", (30, 38, 2)),
        (launches(4, cores=4), [], of_launches, (30, 38, 2)),
        (launches(4, cores=4), ["--allow-shrink"], "", (4, 4, 4)),
        (launches(4, cores=3), [], of_cores.format(4, 3, 4), (4, 4, 4)),
    ):
        serve(sandbox, document)
        if refusal:
            assert_failed(sandbox.run(*arguments), refusal)
        else:
            loaded(sandbox, *arguments)
        assert tuple(count(sandbox, table) for table in (LAUNCHES, CORES, AUDIT)) == rows


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
        assert sandbox.query(f"SELECT to_regclass('{AUDIT}')") == [{"to_regclass": None}]
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
    other = f"{AUDIT} also has the columns remark"
    assert sorted(messages(loaded(sandbox), "WARNING")) == [f"load: {it}" for it in (added, other)]
    rows = sandbox.query(f"SELECT sha256, remark FROM {AUDIT} ORDER BY _run_id")
    served = hashlib.sha256(sandbox.source.body).hexdigest()
    assert [row["sha256"] for row in rows] == [None, None, served, served]
    assert {row["remark"] for row in rows} == {"none"}
