"""--check: all that a first run needs, tried in the order of a run, without changing a row."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import (
    AUDIT,
    CORES,
    LAUNCHES,
    SHIPPED,
    Done,
    launches,
    loaded,
    responds,
    serve,
    shipped_with,
    stalled,
)
from redshift import DropConnection, RedshiftError
from sandbox import BUCKET, USER, Sandbox

NAMES = ["configuration", "aws", "redshift", "rights", "source", "bucket", "copy", "tables"]
NEEDS = {"rights": "redshift", "copy": "redshift bucket", "tables": "redshift"}


def checked(done: Done) -> dict[str, str]:
    """What was printed, by the name of the check."""
    assert "Traceback" not in done.stderr
    lines = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert len(lines) == len(done.stdout.splitlines())
    return lines


def failed(lines: dict[str, str]) -> dict[str, str]:
    return {name: text for name, text in lines.items() if not re.match(r"ok\b", text)}


def everything(sandbox: Sandbox) -> dict[str, Any]:
    """All that a check must not change."""
    names = f"'{LAUNCHES}', '{CORES}', '{AUDIT}'"
    columns = "SELECT attrelid::regclass::text AS t, attname, atttypmod FROM pg_attribute"
    regclasses = f"SELECT to_regclass(n) FROM unnest(ARRAY[{names}]) AS n"
    tables = {
        name: sandbox.query(f"SELECT * FROM {name} ORDER BY 1")
        for name in (LAUNCHES, CORES, AUDIT)
        if sandbox.query(f"SELECT to_regclass('{name}')") != [{"to_regclass": None}]
    }
    shape = sandbox.query(f"{columns} WHERE attrelid IN ({regclasses}) ORDER BY 1, 2")
    return {**tables, "columns": shape}


def test_before_the_first_run(sandbox: Sandbox, tmp_path: Path) -> None:
    before = everything(sandbox)
    done = sandbox.run("--check", *shipped_with(tmp_path, alerts=sandbox.alerts("success")))
    lines = checked(done)
    assert [*lines] == NAMES
    assert (failed(lines), done.returncode) == ({}, 0), done.stderr
    assert "eu-west-1" in lines["aws"]
    assert ":user/moto" in lines["aws"]
    assert lines["copy"] == f"ok, {LAUNCHES} 30 rows, {CORES} 38 rows"
    for name in (LAUNCHES, CORES, AUDIT):
        assert f"CREATE TABLE IF NOT EXISTS {quoted(name)}" in lines["tables"]
    assert everything(sandbox) == before
    assert sandbox.received() == {}
    # What it leaves is below the tables, where the lifecycle rule removes it.
    keys = [*sandbox.objects()]
    assert keys
    pattern = rf"spacex/({LAUNCHES}|{CORES})/\d{{4}}/\d\d/\d\d/\S*check/\S+"
    assert [key for key in keys if not re.fullmatch(pattern, key)] == []


def quoted(name: str) -> str:
    return '"' + name.replace(".", '"."') + '"'


def test_beside_tables_that_would_be_altered(sandbox: Sandbox) -> None:
    loaded(sandbox)
    sandbox.as_user(
        f"ALTER TABLE {LAUNCHES} DROP COLUMN details",
        f"ALTER TABLE {CORES} DROP COLUMN landpad",
        f"ALTER TABLE {CORES} ADD COLUMN landpad varchar(8)",
    )
    before = everything(sandbox)
    done = sandbox.run("--check")
    lines = checked(done)
    assert (failed(lines), done.returncode) == ({}, 0), done.stderr
    assert 'ADD COLUMN "details"' in lines["tables"]
    assert 'ALTER COLUMN "landpad" TYPE varchar(24)' in lines["tables"]
    assert "CREATE" not in lines["tables"]
    assert everything(sandbox) == before
    sandbox.as_user(f"BEGIN; LOCK {AUDIT} NOWAIT")  # nothing is locked any more


# --- what is wrong -------------------------------------------------------------------------------


def not_found(sandbox: Sandbox) -> dict[str, Any]:
    sandbox.source.answers = [responds(404)]
    return {}


def misfit(sandbox: Sandbox) -> dict[str, Any]:
    serve(sandbox, [launches()[0] | {"flight_number": "one"}])
    return {}


def password(sandbox: Sandbox) -> dict[str, Any]:
    """Which is shown nowhere, not as the database either."""
    sandbox.set_secret(PASSWORD="Wr0ng-Passw0rd", DATABASE="Wr0ng-Passw0rd")
    return {}


def no_create(sandbox: Sandbox) -> dict[str, Any]:
    with sandbox.redshift.connect() as connection:
        connection.execute("ALTER SCHEMA public OWNER TO CURRENT_USER")
        connection.execute("GRANT USAGE ON SCHEMA public TO PUBLIC")
    return {}


def no_rights(sandbox: Sandbox) -> dict[str, Any]:
    loaded(sandbox)
    with sandbox.redshift.connect() as connection:
        for table, rights in ((LAUNCHES, "SELECT, DELETE"), (AUDIT, "SELECT, INSERT")):
            connection.execute(f"ALTER TABLE {table} OWNER TO CURRENT_USER".encode())
            connection.execute(f"GRANT {rights} ON {table} TO {USER}".encode())
    return {}


def refused(at: str, error: Exception) -> Callable[[Sandbox], dict[str, Any]]:
    """Redshift refuses a statement with this beginning, or drops the connection."""

    def prepare(sandbox: Sandbox) -> dict[str, Any]:
        def hook(when: str, sql: str) -> None:
            if when == "before" and sql.startswith(at):
                raise error

        sandbox.redshift.hook = hook
        return {}

    return prepare


def differs(sandbox: Sandbox) -> dict[str, Any]:
    sandbox.as_user(f"CREATE TABLE {LAUNCHES} (id integer)")
    return {}


def unreadable(sandbox: Sandbox) -> dict[str, Any]:
    """The role for COPY finds nothing."""

    def delete(when: str, sql: str) -> None:
        if when == "before" and sql.startswith("COPY"):
            for key in sandbox.objects():
                sandbox.s3.delete_object(Bucket=BUCKET, Key=key)

    sandbox.redshift.hook = delete
    return {}


def setting(section: str, **values: Any) -> Callable[[Sandbox], dict[str, Any]]:
    return lambda _: {section: values}


CASES: dict[str, tuple[Callable[[Sandbox], dict[str, Any]], dict[str, str]]] = {
    "no region": (
        lambda _: {"environment": {"AWS_REGION": None, "AWS_EC2_METADATA_DISABLED": "true"}},
        {"aws": "AWS_REGION", "redshift": "AWS_REGION", "bucket": "AWS_REGION"},
    ),
    "no profile": (
        lambda _: {"environment": {"AWS_PROFILE": "nope"}},
        {"aws": "(nope)", "redshift": "(nope)", "bucket": "(nope)"},
    ),
    "no secret": (setting("redshift", secret="no/such"), {"redshift": "no/such"}),
    "wrong password": (password, {"redshift": "database ***: password authentication"}),
    "no temporary table": (
        refused("CREATE TEMP", RedshiftError("42501", "permission denied")),
        {"rights": 'CREATE TEMP TABLE "staging_1"', "copy": 'CREATE TEMP TABLE "staging_1"'},
    ),
    "no right to create": (no_create, {"rights": "lacks CREATE ON SCHEMA public: the owner"}),
    "no right to insert or lock": (
        no_rights,
        {"rights": f"lacks INSERT ON TABLE {LAUNCHES}, DELETE ON TABLE {AUDIT}: the owner"},
    ),
    "no source": (not_found, {"source": "HTTP 404"}),
    "misfit": (misfit, {"source": 'flight_number: "one" is not an integer'}),
    "no bucket": (setting("staging", bucket="no-such-bucket"), {"bucket": "NoSuchBucket"}),
    "COPY's role cannot read": (unreadable, {"copy": f"COPY for {LAUNCHES}: "}),
    "a session breaks": (refused("COPY", DropConnection()), {"copy": "COPY"}),
    "a table differs": (differs, {"tables": f"{LAUNCHES}: the column id is integer"}),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_said_and_the_rest_is_checked(
    sandbox: Sandbox, tmp_path: Path, case: str
) -> None:
    prepare, expected = CASES[case]
    given = prepare(sandbox)
    before = everything(sandbox)
    environment = given.pop("environment", {}) | {"HOME": str(tmp_path)}
    done = sandbox.run("--check", *shipped_with(tmp_path, **given), **environment)
    lines = checked(done)
    assert done.returncode == 1, done.stdout + done.stderr
    assert [*lines] == [n for n in NAMES if not expected.keys() & NEEDS.get(n, "").split()]
    wrong = failed(lines)
    assert wrong.keys() == expected.keys()
    assert {name: text for name, text in wrong.items() if expected[name] not in text} == {}
    assert everything(sandbox) == before
    assert ("rows, without a source" in lines.get("copy", "")) == ({*wrong} == {"source"})
    assert "Wr0ng-Passw0rd" not in done.stdout + done.stderr


def test_a_paged_source_is_asked_for_one_page(sandbox: Sandbox, tmp_path: Path) -> None:
    page = {"results": launches(), "next": sandbox.source.url}
    serve(sandbox, page)
    config = shipped_with(
        tmp_path, source=SHIPPED["source"] | {"records": "results", "next": "next"}
    )
    done = sandbox.run("--check", *config)
    assert done.returncode == 0, done.stdout
    assert len(sandbox.source.requests) == 1


def test_a_load_that_is_going_on(sandbox: Sandbox, tmp_path: Path) -> None:
    """Its lock is not waited for as long as a load would wait; all else is checked."""
    loaded(sandbox)
    with sandbox.redshift.connect() as other:
        other.execute(f"BEGIN; LOCK {AUDIT}".encode())
        done = sandbox.run("--check")
        other.execute("ROLLBACK")
    lines = checked(done)
    assert done.returncode == 1
    assert failed(lines).keys() == {"rights"}
    assert "statement timeout; if another session holds a lock on it" in lines["rights"]


def test_ctrl_c_ends_it(sandbox: Sandbox, tmp_path: Path) -> None:
    with stalled(sandbox, "--check", plainly=True, TMPDIR=str(tmp_path)) as process:
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert stdout.splitlines()[-1] == "rights: ok"
    assert "Traceback" not in stderr
    assert [*tmp_path.iterdir()] == []
