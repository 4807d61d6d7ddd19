"""Logs: what a person, and what a log collector, sees of a run; and that no secret is in it."""

from __future__ import annotations

import base64
import json
import re
import time
from datetime import datetime
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from helpers import (
    AUDIT,
    CORES,
    JSON,
    LAUNCHES,
    Answer,
    Done,
    Record,
    launches,
    log_entries,
    responds,
    serve,
    shipped_with,
)
from redshift import RedshiftError
from sandbox import BUG, NO_PAUSES, PASSWORD, PING, SAMPLE, SLACK_SECRET, WEBHOOK, Sandbox

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
    sandbox.as_user(DRIFT)
    done = sandbox.run(*JSON)
    assert done.returncode == 1
    *_, last = entries(done)
    assert (last["level"], last["step"]) == ("ERROR", "load")
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
    serve(sandbox, [launch | {forged: 1} for launch in launches()])
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
    logged_ones = "SET statement|CREATE|COPY|SELECT|LOCK|DELETE|INSERT|COMMIT"
    ran = [sql for sql in sandbox.redshift.statements if re.match(logged_ones, sql)]
    # Where the driver puts values in, the log has $1 or %s.
    missing = [sql for sql in ran if " ".join(sql.split())[:60] not in shown]
    assert (missing, len(ran) > 15) == ([], True)
    timed = [re.match(r"(\d+\.\d{3}) s: (\w+)", entry["message"]) for entry in debug]
    times = [(float(match[1]), match[2]) for match in timed if match]
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
HALF = responds(200, b"[", Content_Length="100")


def redirects(to: str) -> Answer:
    return responds(302, Location=to)


# What is wrong; the exit status is 1 unless it says another.
KINDS: dict[str, dict[str, Any]] = {
    "success": {"status": 0},
    "not found": {"answers": [redirects("../elsewhere"), responds(404)]},
    "retries": {"answers": [HALF, responds(429, Retry_After="0"), responds(410)]},
    "redirect to ftp": {"answers": [redirects(f"ftp://{USER_PASSWORD}@127.0.0.1/{CANARY}")]},
    "redirect to no URL": {"answers": [redirects(f"http://[{CANARY}/?{CANARY}")] * 40},
    "endless redirects": {"answers": [redirects(f"/again?token={CANARY}")] * 40},
    "misspelt scheme": {"source": f"htps://{USER_PASSWORD}@127.0.0.1/?token={CANARY}"},
    "no port": {"source": f"http://{USER_PASSWORD}@127.0.0.1:x/?token={CANARY}"},
    "proxy": {"source": f"http://nowhere.invalid/?token={CANARY}", "answers": [responds(407)] * 9},
    "no bucket": {"staging": {"bucket": "no-such-bucket"}},
    "no JSON": {"secret": f"PASSWORD={CANARY}"},
    "no host": {"login": {"HOST": f"{CANARY} {CANARY}"}},
    "no port in the secret": {"login": {"PORT": CANARY}},
    "wrong password": {"login": {"PASSWORD": CANARY}},
    "table differs": {"statements": [DRIFT]},
    "bug": {"patch": BUG},
    "configuration": {"status": 2, "alerts": {"heartbeat_url": f"//127.0.0.1/{CANARY}"}},
    "header": {"status": 2, "headers": {"X-Token": f"{CANARY}\n"}},
    "header with a space": {"headers": {"X-Token": f" {CANARY}"}},
    "no YAML": {"status": 2, "break": "heartbeat_url: "},
    "secret is a URL": {"status": 2, "alerts": {"slack_webhook_secret": f"https://a/{CANARY}"}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_secret_is_shown(sandbox: Sandbox, tmp_path: Path, kind: str) -> None:
    """Not in the log, in an alert, in the run history or in the name of a staged object."""
    wrong, number = KINDS[kind], [*KINDS].index(kind)
    status = wrong.get("status", 1)
    sandbox.source.answers = [*wrong.get("answers", [])]
    sandbox.set_secret(wrong.get("secret", ""), NOTE=CANARY, **wrong.get("login", {}))
    sandbox.as_user(*wrong.get("statements", []))
    # Half of the runs have alerts that arrive, half have alerts that fail.
    webhook = sandbox.slack.url if number % 4 < 2 else f"http://{USER_PASSWORD}@127.0.0.1:9"
    sandbox.secrets.put_secret_value(
        SecretId=SLACK_SECRET, SecretString=json.dumps({"URL": f"{webhook}/{CANARY}"})
    )
    alerts = sandbox.alerts("failure", "success")
    alerts["heartbeat_url"] += f"/{CANARY}?{CANARY}"
    config = shipped_with(
        tmp_path,
        alerts=alerts | wrong.get("alerts", {}),
        staging=wrong.get("staging", {}),
        source={"headers": wrong.get("headers", {"Authorization": "Token ${API_TOKEN}"})},
    )
    if broken := wrong.get("break"):
        config[1].write_text(config[1].read_text().replace(broken, broken + '"'))
    source = sandbox.source.url.replace("://", f"://{USER_PASSWORD}@") + f"?token={CANARY}"
    environment = dict.fromkeys(("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"), CANARY)
    environment["API_TOKEN"] = CANARY
    if kind == "proxy":
        proxy = sandbox.source.url.replace("://", f"://{USER_PASSWORD}@").partition("/v5")[0]
        environment |= {"HTTP_PROXY": proxy, "HTTPS_PROXY": proxy, "NO_PROXY": "127.0.0.1"}
    format_, patch = ("text", "json")[number % 2], wrong.get("patch", NO_PAUSES)
    options = "--verbose", "--log-format", format_, "--source", wrong.get("source", source)
    done = sandbox.run(*options, *config, patch=patch, **environment)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr or kind == "bug" or number % 2
    alerted = {name: got for name, got in sandbox.received().items() if name != "heartbeat"}
    assert bool(alerted) == (status < 2 or kind == "header")
    audit = sandbox.query(f"SELECT * FROM {AUDIT}") if status == 0 else []
    staged = sandbox.objects()
    manifests = [body for key, body in staged.items() if key.endswith("manifest.json")]
    shown = repr([done.stdout, done.stderr, alerted, audit, [*staged], manifests])
    for secret in (CANARY, base64.b64encode(USER_PASSWORD.encode()).decode(), PASSWORD):
        assert secret.lower() not in shown.lower()


def repeats(secret: str) -> Answer:
    """Refuses, and says in its status line what must not be said."""

    def refuse(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(403, f"not for {secret}")
        handler.end_headers()

    return refuse


def test_a_secret_that_a_server_repeats_is_masked(sandbox: Sandbox, tmp_path: Path) -> None:
    """The run itself fails when a secret is in its log; the alerts are looked at here."""

    def repeat_password(_: str, sql: str) -> None:
        if sql.startswith("COPY"):
            raise RedshiftError("XX000", f"not for {PASSWORD}")

    sandbox.redshift.hook = repeat_password
    config = shipped_with(tmp_path, alerts=sandbox.alerts("failure"))
    (error,) = log_entries(sandbox.run(*JSON, *config), "ERROR")
    got = sandbox.received()
    assert PASSWORD not in str(got)
    for text in (error["message"], got["slack"][0]["text"], got["sns"][0]["Message"]):
        assert "not for ***" in text

    sandbox.redshift.hook = None
    refuses = repeats(f"/services/{WEBHOOK}")
    sandbox.slack.answers = [refuses]
    sandbox.heartbeat.answers = [repeats(f"/{PING} nor id=Qu3ry-of-it")]
    alerts = sandbox.alerts("success")
    alerts["heartbeat_url"] += "?id=Qu3ry-of-it"
    done = sandbox.run(*JSON, *shipped_with(tmp_path, alerts=alerts))
    said = [entry["message"] for entry in log_entries(done, "WARNING")]
    assert said == ["slack: HTTP 403 not for ***", "heartbeat: HTTP 403 not for *** nor ***"]

    sandbox.slack.answers = [refuses]
    done = sandbox.run("--test-alerts", *config)
    assert "slack: failed: HTTP 403 not for ***" in done.stdout
