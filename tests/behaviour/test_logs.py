"""Logs: what a person, and what a log collector, sees of a run; and that no secret is in it."""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Callable
from datetime import datetime
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from helpers import AUDIT, CORES, JSON, LAUNCHES, Answer, Done, Record, log_entries, shipped_with
from sandbox import BUG, NO_PAUSES, PASSWORD, SAMPLE, SECRET, SLACK_SECRET, Sandbox, answer

STEPS = ("extract", "transform", "stage", "load")
LEVELS = {"DEBUG", "INFO", "WARNING", "ERROR"}
LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ (DEBUG|INFO|WARNING|ERROR)\s+pipeline (\S.*)")


def entries(done: Done) -> list[Record]:
    """The JSON log, each line of it, in the form that every line must have."""
    found = log_entries(done)
    times = [datetime.strptime(e["timestamp"], "%Y-%m-%dT%H:%M:%S.%f%z") for e in found]
    assert times == sorted(times)
    for entry in found:
        assert re.fullmatch(r"\S{19}\.\d{3}Z", entry["timestamp"])
        assert entry["level"] in LEVELS
        assert entry["message"] == entry["message"].strip() != ""
    return found


# --- JSON ----------------------------------------------------------------------------------------


def test_json_of_a_run(sandbox: Sandbox) -> None:
    done = sandbox.run(*JSON)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    logged = entries(done)
    (row, *_) = sandbox.query(f"SELECT DISTINCT _run_id FROM {AUDIT}")
    assert {entry["run_id"] for entry in logged} == {row["_run_id"]}
    steps = dict.fromkeys(entry["step"] for entry in logged)
    assert list(steps) == ["run", *STEPS]
    # The figures of each step, at its end.
    ends = {entry["step"]: entry for entry in logged if "step" in entry and "duration" in entry}
    rows = {LAUNCHES: 30, CORES: 38}
    objects = sandbox.objects()
    assert ends["extract"]["bytes"] == SAMPLE.stat().st_size
    assert ends["transform"]["rows"] == rows
    assert ends["stage"]["files"] == len(objects) == 5
    assert ends["stage"]["bytes"] == sum(map(len, objects.values()))
    assert ends["load"]["tables"] == 2
    durations = [entry["duration"] for entry in logged if "duration" in entry]
    assert set(map(type, durations)) == {int}
    assert all(duration > 100_000 for duration in durations)  # in nanoseconds


DRIFT = f"CREATE TABLE {LAUNCHES} (id integer, name date)"


def test_json_of_an_error(sandbox: Sandbox) -> None:
    """One line, although the message has several."""
    with sandbox.connect() as connection:
        connection.execute(DRIFT.encode())
    done = sandbox.run(*JSON)
    assert done.returncode == 1
    *_, last = entries(done)
    assert last["level"] == "ERROR"
    assert last["step"] == "load"
    assert last["message"].startswith("tables differ")
    assert f"\n  {LAUNCHES}: the column name is date" in last["message"]
    assert last["error"]["kind"] == "PipelineError"
    assert last["error"]["message"] == last["message"]
    assert "prepare_targets" in last["error"]["stack"]


def test_json_of_a_bug(sandbox: Sandbox) -> None:
    done = sandbox.run(*JSON, patch=BUG)
    assert (done.returncode, done.stdout) == (1, "")
    *_, last = entries(done)
    assert (last["level"], last["step"]) == ("ERROR", "stage")
    assert last["error"]["kind"] == "RuntimeError"
    assert last["error"]["message"] == "a bug"
    assert re.match(r"Traceback \(.*\nRuntimeError: a bug\n?$", last["error"]["stack"], re.DOTALL)


def test_text_of_a_bug(sandbox: Sandbox) -> None:
    """Whoever mends the program needs the traceback; below it, as ever, the reason."""
    done = sandbox.run(patch=BUG)
    assert (done.returncode, done.stdout) == (1, "")
    assert len(re.findall(r"^\S+Z ERROR +pipeline stage: .*a bug$", done.stderr, re.MULTILINE)) == 1
    assert "Traceback (most recent call last):\n" in done.stderr
    assert "RuntimeError: a bug\n" in done.stderr
    assert sandbox.query(f"SELECT to_regclass('{LAUNCHES}')") == [{"to_regclass": None}]


@pytest.mark.parametrize(
    ("option", "variable", "json_"),
    [("json", None, True), (None, "json", True), ("text", "json", False), ("json", "xml", True)],
)
def test_choice_of_the_format(
    sandbox: Sandbox, tmp_path: Path, option: str | None, variable: str | None, json_: bool
) -> None:
    """Also of the message about a configuration that is wrong."""
    arguments = ["--log-format", option] if option else []
    config = shipped_with(tmp_path, staging={"bucket": "B"}, source={"max_wait": "soon"})
    done = sandbox.run(*arguments, *config, LOG_FORMAT=variable)
    assert done.returncode == 2
    if json_:
        (entry,) = entries(done)
        assert entry["level"] == "ERROR"
        assert entry["error"]["kind"] == "ConfigError"
        assert "\n  staging.bucket: " in entry["message"]
        assert "run_id" not in entry
    else:
        assert re.match(r"\S+Z ERROR +\S.* has 2 fault", done.stderr)


@pytest.mark.parametrize("wrong", ["--log-format", "LOG_FORMAT"])
def test_unknown_format(sandbox: Sandbox, wrong: str) -> None:
    option = wrong.startswith("--")
    done = sandbox.run(wrong, "xml") if option else sandbox.run(**{wrong: "xml"})
    assert (done.returncode, done.stdout) == (2, "")
    assert re.search(rf"{wrong}\b.*xml.*text.*json", done.stderr, re.DOTALL), done.stderr
    assert "Traceback" not in done.stderr
    assert sandbox.source.requests == []


# --- text ----------------------------------------------------------------------------------------


def text_entries(done: Done) -> list[tuple[str, str]]:
    """Level and message of each line of the text log, which has no other lines."""
    found = [LINE.fullmatch(line) for line in done.stderr.splitlines()]
    assert None not in found, done.stderr
    return [(match[1], match[2]) for match in found if match]


def test_a_line_cannot_be_forged(sandbox: Sandbox) -> None:
    """The source may have any text in the names of its fields."""
    forged = "x\n2026-11-22T20:43:27Z ERROR   load: no rows"
    launches = json.loads(SAMPLE.read_bytes())
    sandbox.source.body = json.dumps([launch | {forged: 1} for launch in launches]).encode()
    done = sandbox.run()
    assert done.returncode == 0
    ((level, text),) = [entry for entry in text_entries(done) if "no rows" in entry[1]]
    assert (level, text[:11]) == ("WARNING", "transform: ")


def test_statements_and_their_times(sandbox: Sandbox) -> None:
    """--verbose adds them, and nothing of the libraries."""

    def slow(when: str, sql: str) -> None:
        if (when, sql[:5]) == ("before", "COPY "):
            time.sleep(0.3)

    sandbox.redshift.hook = slow
    done = sandbox.run("--verbose", *JSON)
    assert done.returncode == 0, done.stderr
    logged = entries(done)
    debug = [entry for entry in logged if entry["level"] == "DEBUG"]
    shown = " ".join(" ".join(entry["message"].split()) for entry in debug)
    ran = [
        statement
        for statement in sandbox.redshift.statements
        if re.match("SET statement|CREATE|COPY|SELECT|LOCK|DELETE|INSERT|COMMIT", statement)
    ]
    # Where the driver puts values in, the log has $1 or %s.
    missing = [sql for sql in ran if " ".join(sql.split())[:60] not in shown]
    assert (missing, len(ran) > 15) == ([], True)
    times = [
        (float(match[1]), match[2])
        for entry in debug
        if (match := re.match(r"(\d+\.\d{3}) s: (\w+)", entry["message"]))
    ]
    assert len(times) >= len(ran)
    assert [seconds >= 0.3 for seconds, word in times if word == "COPY"] == [True, True]
    assert {entry["step"] for entry in debug} <= {*STEPS}

    sandbox.redshift.hook = None
    sandbox.redshift.statements.clear()
    quiet = sandbox.run()
    assert {level for level, _ in text_entries(quiet)} == {"INFO"}
    assert "SELECT" not in quiet.stderr


# --- secrets -------------------------------------------------------------------------------------

# Every secret has this in it, and it stays the same when it is quoted, shortened or lower case.
CANARY = "C4N4RY"
USER_PASSWORD = f"{CANARY}-user:{CANARY}-pass"


def not_found(sandbox: Sandbox) -> None:
    sandbox.source.answers = [redirects("../elsewhere"), lambda handler: answer(handler, 404)]


def redirects(to: str) -> Answer:
    return lambda handler: answer(handler, 302, Location=to)


def redirected(to: str) -> Callable[[Sandbox], None]:
    def prepare(sandbox: Sandbox) -> None:
        sandbox.source.answers = [redirects(to)] * 40

    return prepare


def breaks_off(sandbox: Sandbox) -> None:
    def half(handler: BaseHTTPRequestHandler) -> None:
        answer(handler, 200, b"[", Content_Length="100")

    def busy(handler: BaseHTTPRequestHandler) -> None:
        answer(handler, 429, Retry_After="0")

    sandbox.source.answers = [half, busy, lambda handler: answer(handler, 410)]


def database(**changes: Any) -> Callable[[Sandbox], None]:
    def prepare(sandbox: Sandbox) -> None:
        values = sandbox.secret() | {"NOTE": CANARY} | changes
        text = json.dumps({key: value for key, value in values.items() if value is not None})
        sandbox.secrets.put_secret_value(SecretId=SECRET, SecretString=text)

    return prepare


def no_json(sandbox: Sandbox) -> None:
    sandbox.secrets.put_secret_value(SecretId=SECRET, SecretString=f"PASSWORD={CANARY}")


def differs(sandbox: Sandbox) -> None:
    with sandbox.connect() as connection:
        connection.execute(DRIFT.encode())


def nothing(_: Sandbox) -> None:
    pass


KINDS: dict[str, tuple[int, Callable[[Sandbox], None], dict[str, Any]]] = {
    "success": (0, database(), {}),
    "not found": (1, not_found, {}),
    "retries": (1, breaks_off, {}),
    "redirect to ftp": (1, redirected(f"ftp://{USER_PASSWORD}@127.0.0.1/{CANARY}"), {}),
    "redirect to no URL": (1, redirected(f"http://[{CANARY}/?{CANARY}"), {}),
    "endless redirects": (1, redirected(f"/again?token={CANARY}"), {}),
    "misspelt scheme": (
        1,
        nothing,
        {"--source": f"htps://{USER_PASSWORD}@127.0.0.1/?token={CANARY}"},
    ),
    "no port": (1, nothing, {"--source": f"http://{USER_PASSWORD}@127.0.0.1:x/?token={CANARY}"}),
    "proxy": (1, nothing, {"proxy": True}),
    "no bucket": (1, database(), {"staging": {"bucket": "no-such-bucket"}}),
    "no JSON": (1, no_json, {}),
    "no host": (1, database(HOST=f"{CANARY} {CANARY}"), {}),
    "no port in the secret": (1, database(PORT=CANARY), {}),
    "wrong password": (1, database(PASSWORD=CANARY), {}),
    "table differs": (1, differs, {}),
    "bug": (1, database(), {"bug": True}),
    "configuration": (2, nothing, {"alerts": {"heartbeat_url": f"//127.0.0.1/{CANARY}"}}),
    "header": (2, nothing, {"headers": {"X-Token": f"{CANARY}\n"}}),
    "header with a space": (1, nothing, {"headers": {"X-Token": f" {CANARY}"}}),
    "no YAML": (2, nothing, {"break": "heartbeat_url: "}),
    "secret is a URL": (
        2,
        nothing,
        {"alerts": {"slack_webhook_secret": f"https://hooks.slack.com/{CANARY}"}},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_secret_is_shown(sandbox: Sandbox, tmp_path: Path, kind: str) -> None:
    """Not in the log, in an alert, in the run history or in the name of a staged object."""
    status, prepare, changes = KINDS[kind]
    prepare(sandbox)
    number = [*KINDS].index(kind)
    # Half of the runs have alerts that arrive, half have alerts that fail.
    webhook = sandbox.slack.url if number % 4 < 2 else f"http://{USER_PASSWORD}@127.0.0.1:9"
    sandbox.secrets.put_secret_value(
        SecretId=SLACK_SECRET, SecretString=json.dumps({"URL": f"{webhook}/{CANARY}"})
    )
    alerts = sandbox.alerts("failure", "success")
    alerts["heartbeat_url"] += f"/{CANARY}?{CANARY}"
    config = shipped_with(
        tmp_path,
        alerts=alerts | changes.get("alerts", {}),
        staging=changes.get("staging", {}),
        source={"headers": changes.get("headers", {"Authorization": "Token ${API_TOKEN}"})},
    )
    if "break" in changes:
        text = config[1].read_text()
        config[1].write_text(text.replace(changes["break"], changes["break"] + '"'))
    source = sandbox.source.url.replace("://", f"://{USER_PASSWORD}@") + f"?token={CANARY}"
    environment = dict.fromkeys(("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"), CANARY)
    environment["API_TOKEN"] = CANARY
    if "proxy" in changes:
        sandbox.source.answers = [lambda handler: answer(handler, 407)] * 9
        proxy = sandbox.source.url.replace("://", f"://{USER_PASSWORD}@").partition("/v5")[0]
        source = f"http://nowhere.invalid/?token={CANARY}"
        environment |= {"HTTP_PROXY": proxy, "HTTPS_PROXY": proxy, "NO_PROXY": "127.0.0.1"}
    done = sandbox.run(
        "--verbose",
        "--log-format",
        ("text", "json")[number % 2],
        "--source",
        changes.get("--source", source),
        *config,
        patch=BUG if "bug" in changes else NO_PAUSES,
        **environment,
    )
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr or "bug" in changes or number % 2
    alerted = {name: got for name, got in sandbox.received().items() if name != "heartbeat"}
    assert bool(alerted) == (status < 2 or kind == "header")
    audit = sandbox.query(f"SELECT * FROM {AUDIT}") if status == 0 else []
    staged = sandbox.objects()
    manifests = [body for key, body in staged.items() if key.endswith("manifest.json")]
    shown = repr([done.stdout, done.stderr, alerted, audit, [*staged], manifests])
    for secret in (CANARY, base64.b64encode(USER_PASSWORD.encode()).decode(), PASSWORD):
        assert secret.lower() not in shown.lower()
