"""The program, run as a user runs it, against the sandbox.

The sandbox's `run` fails for any run whose output has a secret: the password, the AWS secret key,
or the token, which is in the URL of the source in all of these tests.
"""

from __future__ import annotations

import copy
import csv
import gzip
import hashlib
import io
import itertools
import json
import random
import re
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from forkserver import MAIN
from helpers import (
    AUDIT,
    CORES,
    LAUNCHES,
    RUN_ID,
    SHIPPED,
    Records,
    assert_failed,
    assert_table,
    column_name,
    count,
    fewer_launches,
    launches,
    loaded,
    quoted,
    run_id,
    serve,
    shipped,
)
from sandbox import BUCKET, PIPELINE, QUESTIONS, REGION, TOKEN, USER, Sandbox


@pytest.fixture(autouse=True)
def token(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """The source's URL has a secret in its query."""
    monkeypatch.setattr(sandbox.source, "url", f"{sandbox.source.url}?token={TOKEN}")


def assert_untouched(sandbox: Sandbox) -> None:
    """Nothing is staged, and Redshift was asked nothing."""
    assert sandbox.objects() == {}
    assert sandbox.redshift.statements == []


def assert_loaded(sandbox: Sandbox, document: Records, config: Path = PIPELINE) -> None:
    """The tables hold what the document has, nothing else, from one run."""
    tables = yaml.safe_load(config.read_text())["tables"]
    for name, table in tables.items():
        assert_table(sandbox, name, table, document)
    runs = " UNION ".join(f"SELECT _run_id, _loaded_at IS NULL AS no FROM {t}" for t in tables)
    assert [row["no"] for row in sandbox.query(runs)] == [False]


def test_first_load_creates_the_tables_and_loads_every_value(sandbox: Sandbox) -> None:
    start = datetime.now(UTC).replace(microsecond=0)
    done = loaded(sandbox, plainly=True)
    messages = [
        rf"run: {RUN_ID} from {sandbox.source.url.partition('?')[0]}",
        r"extract: MB 0\.07, seconds \d+\.\d\d",
        r"transform: public.launches 30, public.launch_cores 38, seconds \d+\.\d\d",
        r"stage: files 5, MB 0\.0\d, seconds \d+\.\d\d",
        r'load: CREATE TABLE IF NOT EXISTS "public"."launches"',
        r'load: CREATE TABLE IF NOT EXISTS "public"."launch_cores"',
        r'load: CREATE TABLE IF NOT EXISTS "public"."etl_runs"',
        r"load: tables 2, seconds \d+\.\d\d",
        r"run: done: public.launches 30 rows \(\+30\), public.launch_cores 38 rows \(\+38\), "
        r"\d+\.\d s",
    ]
    lines = done.stderr.splitlines()
    for line, message in zip(lines, messages, strict=True):
        assert re.fullmatch(rf"\S{{10}}T\d\d:\d\d:\d\dZ INFO    pipeline {message}", line), line
    assert_loaded(sandbox, launches())
    sql = f"SELECT _run_id, min(_loaded_at), max(_loaded_at) FROM {LAUNCHES} GROUP BY 1"
    (row,) = sandbox.query(sql)
    assert row["_run_id"] == run_id(done)
    assert start <= row["min"] <= row["max"] <= datetime.now(UTC)


AWKWARD = [
    *("", " ", " leading and trailing ", "NULL", "null", "None", "nan", r"\N", "\\", "true", "007"),
    *(r"C:\new\table", '"', '""', 'a "quoted" word', "',;|\t", "a,b", "1e5", "[1, 2]", "\n"),
    *("line\nfeed", "carriage\rreturn", "both\r\n", "'; DROP TABLE launches; --", "\ufeffmark"),
    *("é ö 9° \u00a0 🚀", "e\u0301 is not \u00e9", "\u2028\u2029\u0085", "\u0001\u001f\u007f"),
    *("x" * 16_384, "€" * (16_384 // 3)),
]


def test_awkward_values_arrive_unchanged(sandbox: Sandbox) -> None:
    document = launches()
    for number, text in enumerate(AWKWARD):
        record = copy.deepcopy(document[number % 30])
        record |= {"id": f"awkward-{number}", "details": text, "ships": [text, {text: None}]}
        document.append(record)
    document[0] |= {"fairings": None, "links": None, "cores": None, "static_fire_date_utc": None}
    document[1] |= {
        "date_utc": "0001-01-01T00:00:00.000Z",
        "static_fire_date_utc": "9999-12-31T23:59:59.999999Z",
        "date_unix": -(2**63),
        "static_fire_date_unix": 2**63 - 1,
        "window": -(2**31),
        "flight_number": 2**31 - 1,
    }
    document[2] |= {
        "date_utc": "2024-02-29T23:59:59.123456+05:30",
        "static_fire_date_utc": "2012-06-30T00:00:00-08:00",
        "failures": [{"time": 1.5, "altitude": -0.1, "reason": 123456789012345678}],
        "crew": {"an": "object"},
        "ships": 0,
        "capsules": "text",
        "payloads": False,
    }
    serve(sandbox, document)
    # Nor is a time shifted by the session's time zone.
    sandbox.as_user(f"ALTER ROLE {USER} SET timezone TO 'Asia/Tokyo'")
    try:
        loaded(sandbox)
    finally:
        sandbox.as_user(f"ALTER ROLE {USER} RESET timezone")
    assert_loaded(sandbox, document)


def test_thousands_of_records_pass_through_in_batches_and_parts(
    sandbox: Sandbox, tmp_path: Path
) -> None:
    chance = random.Random(1)
    document = [
        launches()[number % 30] | {"id": f"{number:024}", "details": chance.randbytes(700).hex()}
        for number in range(2_800)
    ]
    serve(sandbox, document)
    config = shipped(tmp_path, {"staging / part_mb": 1})
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    left: list[list[str]] = []

    def hook(stage: str, sql: str) -> None:
        if stage == "before" and sql.startswith("COPY"):
            (folder,) = temporary.iterdir()
            left.append([file.name for file in folder.iterdir()])

    sandbox.redshift.hook = hook
    loaded(sandbox, *config, TMPDIR=str(temporary))
    assert_loaded(sandbox, document)
    assert left == [["response"]] * 2, "what is in S3 stays in the temporary folder"
    parts = {key.rpartition("/")[2] for key in sandbox.staged(".csv.gz")}
    assert parts == {f"{LAUNCHES}.0001.csv.gz", f"{LAUNCHES}.0002.csv.gz", f"{CORES}.0001.csv.gz"}


def test_upsert_keeps_vanished_rows_and_renews_the_others(sandbox: Sandbox, tmp_path: Path) -> None:
    tables = copy.deepcopy(SHIPPED["tables"])
    tables[LAUNCHES]["mode"] = tables[CORES]["mode"] = "upsert"
    tables[CORES]["key"] = ["position", "launch_id"]
    config = shipped(tmp_path, {"tables": tables})
    first = run_id(loaded(sandbox, *config))
    assert_loaded(sandbox, launches(), config[1])

    vanished, served = launches()[:14], launches()[14:]
    served[0] |= {"name": "Renamed", "details": ""}
    served[1]["cores"][2]["landing_type"] = "changed"
    served.append(served[2] | {"id": "new", "name": "New"})
    serve(sandbox, served)
    done = sandbox.run(*config)
    second = run_id(done)
    new_cores = len(served[2]["cores"])
    change = f"public.launches 31 rows (+1), public.launch_cores {38 + new_cores} rows "
    assert f"run: done: {change}(+{new_cores}), " in done.stderr
    for name, table in tables.items():
        assert_table(sandbox, name, table, vanished + served)
    rows = sandbox.query(f"SELECT id, _run_id FROM {LAUNCHES}")
    expected = {it["id"]: first for it in vanished} | {it["id"]: second for it in served}
    assert {row["id"]: row["_run_id"] for row in rows} == expected


def test_far_fewer_rows_are_allowed_for_one_run(sandbox: Sandbox) -> None:
    of_cores = f"{CORES} has {{}} rows and would have {{}}, fewer than {{}} "
    of_launches = f"{LAUNCHES} has 30 rows and would have 4, fewer than 24 "
    for document, arguments, refusal, rows in (
        (fewer_launches(30, cores=0), [], of_cores.format(0, 0, 1), (0, 0, 0)),
        (fewer_launches(30), [], "", (30, 38, 2)),
        (fewer_launches(4, cores=4), [], of_launches, (30, 38, 2)),
        (fewer_launches(4, cores=4), ["--allow-shrink"], "", (4, 4, 4)),
        (fewer_launches(4, cores=3), [], of_cores.format(4, 3, 4), (4, 4, 4)),
    ):
        serve(sandbox, document)
        if refusal:
            assert_failed(sandbox.run(*arguments), refusal)
        else:
            loaded(sandbox, *arguments)
        assert tuple(count(sandbox, table) for table in (LAUNCHES, CORES, AUDIT)) == rows


def test_row_of_a_run_for_each_table(sandbox: Sandbox) -> None:
    source = sandbox.source.url.replace("http://", "http://me:pa55word@")
    source = source.replace("launches", "it's%20100%25") + "#part"
    shown = sandbox.source.url.partition("?")[0].replace("launches", "it's%20100%25")
    bodies = []
    for number in (30, 28):
        serve(sandbox, fewer_launches(number))
        bodies += [sandbox.source.body] * 2
        loaded(sandbox, "--source", source)
    rows = sandbox.query(f"SELECT * FROM {AUDIT} ORDER BY _run_id, table_name")
    found = [(row["table_name"], row["rows_before"], row["rows_loaded"]) for row in rows]
    assert found == [(CORES, 0, 38), (LAUNCHES, 0, 30), (CORES, 38, 36), (LAUNCHES, 30, 28)]
    assert {row["mode"] for row in rows} == {"replace"}
    for row, body in zip(rows, bodies, strict=True):
        assert re.fullmatch(RUN_ID, row["_run_id"])
        assert row["source"] == shown
        assert row["sha256"] == hashlib.sha256(body).hexdigest()
        assert f"{row['started_at']:%Y%m%dT%H%M%S}" == row["_run_id"].partition(".")[0]
        # GETDATE() has whole seconds: so has this, or it would be later where all took less.
        assert row["started_at"].microsecond == 0
        assert row["started_at"] <= row["_loaded_at"]
    assert rows[0]["_run_id"] == rows[1]["_run_id"] < rows[2]["_run_id"] == rows[3]["_run_id"]


def test_answers_to_the_questions(sandbox: Sandbox) -> None:
    loaded(sandbox)
    first, most, soon = (sandbox.query(sql) for sql in QUESTIONS[PIPELINE].values())
    assert [row["flight_number"] for row in first] == [1, 2, 3, 4, 5, 6, 7, 9]
    assert [(row["core"], row["flights"]) for row in most] == [
        ("5e9e28a7f3591817f23b2663", 14),
        ("5f57c5440622a633027900a0", 6),
        ("5e9e28a5f359182b023b2656", 4),
    ]
    assert [(row["core"], row["after"]) for row in soon] == [
        ("5e9e28a7f3591817f23b2663", timedelta(days=27, hours=8, minutes=21)),
        ("5f57c5440622a633027900a0", timedelta(days=21, hours=6, minutes=10)),
    ]


def test_staged_objects(sandbox: Sandbox, tmp_path: Path) -> None:
    run = run_id(loaded(sandbox, TMPDIR=str(tmp_path)))
    assert list(tmp_path.iterdir()) == []
    staged = sandbox.objects()
    day = f"{run[:4]}/{run[4:6]}/{run[6:8]}"
    raw = f"spacex/raw/{day}/{run}/response.json.gz"
    folders = {table: f"spacex/{table}/{day}/{run}" for table in (LAUNCHES, CORES)}
    parts = {table: f"{folder}/{table}.0001.csv.gz" for table, folder in folders.items()}
    manifests = {table: f"{folder}/manifest.json" for table, folder in folders.items()}
    assert set(staged) == {raw, *parts.values(), *manifests.values()}

    assert gzip.decompress(staged[raw]) == sandbox.source.body
    for table, rows in ((LAUNCHES, 30), (CORES, 38)):
        text = gzip.decompress(staged[parts[table]]).decode()
        header, *records = csv.reader(io.StringIO(text, newline=""))
        assert header == [column_name(path) for path in SHIPPED["tables"][table]["columns"]]
        assert len(records) == rows
        entry = {"url": f"s3://{BUCKET}/{parts[table]}", "mandatory": True}
        assert json.loads(staged[manifests[table]]) == {"entries": [entry]}
    for key in staged:
        assert "ServerSideEncryption" not in sandbox.s3.head_object(Bucket=BUCKET, Key=key)

    copies = [sql for sql in sandbox.redshift.statements if sql.startswith("COPY")]
    for sql, table in zip(copies, manifests, strict=True):
        url = f"s3://{BUCKET}/{manifests[table]}"
        assert f"FROM '{url}'\nIAM_ROLE default\nREGION '{REGION}'\n" in sql
        (row,) = sandbox.query(f"SELECT manifest, raw FROM {AUDIT} WHERE table_name = '{table}'")
        assert row == {"manifest": url, "raw": f"s3://{BUCKET}/{raw}"}


def test_dry_run_needs_no_aws_and_leaves_only_its_folder(sandbox: Sandbox, tmp_path: Path) -> None:
    home, work, temporary = folders = [tmp_path / name for name in ("home", "work", "tmp")]
    for folder in folders:
        folder.mkdir()
    nothing: dict[str, Any] = dict.fromkeys(sandbox.environment)
    environment = nothing | {"HOME": str(home), "TMPDIR": str(temporary)}
    done = sandbox.run("--dry-run", cwd=work, plainly=True, **environment)
    assert done.returncode == 0, done.stderr
    assert_untouched(sandbox)
    assert [*home.iterdir(), *work.iterdir()] == []
    (folder,) = temporary.glob("*")
    assert folder.name.startswith("sequra-")
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IRWXU

    for table, rows in ((LAUNCHES, 30), (CORES, 38)):
        assert f"{table}: {rows} rows" in done.stdout
        (part,) = folder.glob(f"{table}.*.csv.gz")
        assert str(part) in done.stdout
        with gzip.open(part, "rt", encoding="utf-8", newline="") as text:
            assert len(list(csv.reader(text))) == rows + 1
        for statement in ("CREATE TABLE IF NOT EXISTS", "DELETE FROM", "INSERT INTO"):
            assert f"{statement} {quoted(table)}" in done.stdout
        assert f"FROM 's3://{BUCKET}/spacex/{table}/" in done.stdout
    first, _, _, fourth, *_ = launches()
    for value in (first["id"], first["name"], first["cores"][0]["core"]):
        assert value in done.stdout
    assert fourth["id"] not in done.stdout


def test_dry_run_and_verbose_show_the_sql_that_a_load_runs(
    sandbox: Sandbox, tmp_path: Path
) -> None:
    shown = sandbox.run("--dry-run", TMPDIR=str(tmp_path))
    done = sandbox.run("--verbose")
    assert done.returncode == 0, done.stderr
    bound = "VALUES ($1"  # rewritten by the driver
    statements = [sql for sql in sandbox.redshift.statements if bound not in sql]
    assert [sql for sql in statements if sql not in done.stderr] == []

    old, new = run_id(shown), run_id(done)
    printed = shown.stdout.replace(old, new)
    printed = printed.replace(old.rpartition("-")[2], new.rpartition("-")[2])  # NULL AS 'NULL-…'
    around = "SET |SELECT (column_name|1 |pg_|count)|BEGIN|LOCK |COMMIT"
    of_the_load = [s for s in statements if not re.match(around, s) and "etl_runs" not in s]
    assert len(of_the_load) == 12
    assert [sql for sql in of_the_load if sql not in printed] == []


def test_command_line(sandbox: Sandbox) -> None:
    for arguments, status, text in (
        (["--help"], 0, "--dry-run"),
        (["--unknown"], 2, "unrecognized arguments: --unknown"),
        (["--config"], 2, "expected one argument"),
        (["extra"], 2, "unrecognized arguments: extra"),
        (["--dry-run", "--check"], 2, "--check: not allowed with argument --dry-run"),
        (["--source", ""], 2, "source.url: missing"),
    ):
        done = sandbox.run(*arguments)
        assert done.returncode == status
        assert text in (done.stderr if status else done.stdout)
    assert sandbox.source.requests == []


def test_the_source_of_the_configuration_and_a_file(sandbox: Sandbox, tmp_path: Path) -> None:
    config = shipped(tmp_path, {"source / url": sandbox.source.url})
    command: list[Any] = [sys.executable, MAIN, *config]  # sandbox.run() would give a --source
    subprocess.run(command, env=sandbox.child_environment(), check=True)
    assert sandbox.source.requests == [f"/v5/launches?token={TOKEN}"]
    lines = "\n".join(map(json.dumps, launches()[:-1])).encode()
    (tmp_path / "lines.ndjson.gz").write_bytes(gzip.compress(lines))
    loaded(sandbox, "--source", "lines.ndjson.gz", cwd=tmp_path)
    assert len(sandbox.source.requests) == 1
    assert_loaded(sandbox, launches()[:-1])


def test_a_source_without_records(sandbox: Sandbox, tmp_path: Path) -> None:
    nothing = f"s3://{BUCKET}/nothing.json"
    serve(sandbox, {"docs": [], "page": 1})
    for source, *says in (
        (sandbox.source.url, "no array at source.records", "set it to docs"),
        (tmp_path / "nothing.json", "nothing.json is no file"),
        (tmp_path, "is no file"),
        (nothing, f"cannot read {nothing}"),
        ("s3://no-such-bucket/x", "cannot read s3://no-such-bucket/x"),
    ):
        assert_failed(sandbox.run("--source", source), *says)
    assert_untouched(sandbox)


def test_one_transaction_swaps_all_tables_without_a_lock(sandbox: Sandbox) -> None:
    loaded(sandbox)
    statements = sandbox.redshift.statements
    odd = [sql for sql in statements if re.match(r"\s*(lock|truncate|alter)\b", sql, re.I)]
    assert odd == ['LOCK "public"."etl_runs"']
    begin = statements.index(odd[0]) - 1
    assert statements[begin] == "BEGIN"
    tables, audit = [quoted(name) for name in (LAUNCHES, CORES)], quoted(AUDIT)
    swaps = [(f"DELETE FROM {it}", f"INSERT INTO {it}", f"INSERT INTO {audit}") for it in tables]
    writes = [sql for sql in statements[begin:] if sql.startswith(("DELETE", "INSERT", "COMMIT"))]
    for sql, start in zip(writes, [*itertools.chain(*swaps), "COMMIT"], strict=True):
        assert sql.startswith(start)
    assert statements[-1] == "COMMIT"
    before = statements[:begin]
    assert not [sql for sql in before if sql.lower().startswith(("begin", "delete", "insert"))]
    assert not [sql for sql in before for it in tables if f"COPY {it}" in sql]
