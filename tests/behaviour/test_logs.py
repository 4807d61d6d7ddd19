"""Logs and exit statuses: what people, and what a log collector, see of a run; and no secret."""

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
    CANARY,
    CORES,
    JSON,
    LAUNCHES,
    Answer,
    Done,
    Record,
    assert_failed,
    error,
    fewer_launches,
    launches,
    loaded,
    log_entries,
    messages,
    responds,
    sends,
    serve,
    set_webhook,
    shipped_with,
)
from redshift import RedshiftError
from sandbox import BUG, NO_PAUSES, PASSWORD, PING, REGION, SAMPLE, WEBHOOK, Sandbox

AWAY = 75  # EX_TEMPFAIL
STEPS = ("extract", "transform", "stage", "load")
LEVELS = {"DEBUG", "INFO", "WARNING", "ERROR"}


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
    logged = entries(loaded(sandbox, *JSON))
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
    # The one record that ends a run.
    (end,) = [entry for entry in logged if "outcome" in entry]
    assert (end["outcome"], end["level"], end["step"]) == ("success", "INFO", "run")
    assert end["rows"] == end["difference"] == rows
    assert end["duration"] > sum(ends[step]["duration"] for step in STEPS)
    serve(sandbox, fewer := fewer_launches(28))
    cores = sum(len(launch["cores"]) for launch in fewer)
    *_, end = entries(loaded(sandbox, *JSON))
    assert end["rows"] == {LAUNCHES: 28, CORES: cores}
    assert end["difference"] == {LAUNCHES: -2, CORES: cores - 38}


DRIFT = f"CREATE TABLE {LAUNCHES} (id integer, name date)"


def test_json_of_an_error(sandbox: Sandbox) -> None:
    """One line, although the message has several."""
    sandbox.as_user(DRIFT)
    done = sandbox.run(*JSON)
    assert done.returncode == 1
    *_, last = entries(done)
    assert (last["level"], last["step"], last["outcome"]) == ("ERROR", "load", "failure")
    assert type(last["duration"]) is int
    assert "rows" not in last
    assert last["message"].startswith("tables differ")
    assert f"\n  {LAUNCHES}: the column name is date" in last["message"]
    assert last["error"]["kind"] == "PipelineError"
    assert last["error"]["message"] == last["message"]
    assert "prepare_targets" in last["error"]["stack"]


def test_a_bug(sandbox: Sandbox) -> None:
    """Whoever mends the program needs the traceback; in text the reason is above it, as ever."""
    done = sandbox.run(*JSON, patch=BUG)
    assert (done.returncode, done.stdout) == (1, "")
    *_, last = entries(done)
    assert (last["level"], last["step"]) == ("ERROR", "stage")
    assert (last["error"]["kind"], last["error"]["message"]) == ("RuntimeError", "a bug")
    assert re.match(r"Traceback \(.*\nRuntimeError: a bug\n?$", last["error"]["stack"], re.DOTALL)
    done = sandbox.run(patch=BUG)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.findall(r"Z ERROR +pipeline stage: (.*)\n", done.stderr) == ["RuntimeError: a bug"]
    assert "Traceback (most recent call last):\n" in done.stderr
    assert sandbox.query(f"SELECT to_regclass('{LAUNCHES}')") == [{"to_regclass": None}]


def test_choice_of_the_format(sandbox: Sandbox, tmp_path: Path) -> None:
    """Also of the message about a configuration that is wrong."""
    config = shipped_with(tmp_path, staging={"bucket": "B"}, source={"max_wait": "soon"})
    for arguments, variable in ((JSON, None), ((), "json"), (JSON, "xml")):
        # What the program asked of AWS would arrive at the source, too.
        given = {"LOG_FORMAT": variable, "AWS_ENDPOINT_URL": sandbox.source.at("")}
        done = sandbox.run(*arguments, *config, **given)
        assert (done.returncode, sandbox.source.requests) == (2, [])
        (entry,) = entries(done)
        assert (entry["level"], entry["outcome"]) == ("ERROR", "failure")
        assert entry["error"]["kind"] == "ConfigError"
        assert "\n  staging.bucket: " in entry["message"]
        assert "run_id" not in entry
    done = sandbox.run("--log-format", "text", *config, LOG_FORMAT="json")
    assert " has 2 fault" in "".join(messages(done, "ERROR"))


def test_unknown_format(sandbox: Sandbox) -> None:
    for done in (sandbox.run("--log-format", "xml"), sandbox.run(LOG_FORMAT="xml")):
        assert (done.returncode, done.stdout) == (2, "")
        assert re.search(r"--log-format or \$LOG_FORMAT: .*xml.*text.*json", done.stderr)
    assert sandbox.source.requests == []


# A package that warns, when files are staged.
WARNS = """
import pathlib, warnings
def write_text(*arguments, write=pathlib.Path.write_text):
    warnings.warn("an odd thing")
    return write(*arguments)
pathlib.Path.write_text = write_text
"""


def test_each_line_names_its_pipeline(sandbox: Sandbox, tmp_path: Path) -> None:
    """What a package warns of, too."""
    config = shipped_with(tmp_path)[1].rename(tmp_path / "second.yaml")
    done = loaded(sandbox, "--config", config, patch=WARNS)
    assert "an odd thing" in "".join(messages(done, "WARNING"))
    assert set(re.findall(r"(?m)^\d{4}-\S+Z \w+ +(\S+) ", done.stderr)) == {"second"}
    done = loaded(sandbox, "--config", config, LOG_FORMAT="json", patch=WARNS)
    assert "an odd thing" in str(log_entries(done, "WARNING"))
    named = {(entry["service"], entry["pipeline"]) for entry in log_entries(done)}
    assert named == {("sequra-challenge", "second")}


# --- text ----------------------------------------------------------------------------------------


def test_a_line_cannot_be_forged(sandbox: Sandbox) -> None:
    """The source may have any text in the names of its fields."""
    forged = "x\n2026-11-22T20:43:27Z ERROR   load: no rows"
    serve(sandbox, [launch | {forged: 1} for launch in launches()])
    done = sandbox.run()
    assert done.returncode == 0
    (text,) = messages(done, "WARNING")
    assert re.match("transform: .*no rows", text)


def test_statements_have_their_times(sandbox: Sandbox) -> None:
    """--verbose shows them, and nothing of the libraries."""

    def slow(when: str, sql: str) -> None:
        if (when, sql[:5]) == ("before", "COPY "):
            time.sleep(0.3)

    sandbox.redshift.hook = slow
    logged = entries(loaded(sandbox, "--verbose", *JSON))
    debug = [entry for entry in logged if entry["level"] == "DEBUG"]
    timed = [re.match(r"(\d+\.\d{3}) s: (\w+)", entry["message"]) for entry in debug]
    times = [(float(match[1]), match[2]) for match in timed if match]
    assert len(times) > 15
    assert [seconds >= 0.3 for seconds, word in times if word == "COPY"] == [True, True]
    assert {entry["step"] for entry in debug} <= {*STEPS}


def test_progress_is_for_people(sandbox: Sandbox) -> None:
    """Megabytes and per cent, and nothing while the program has said that it waits."""

    def half(handler: BaseHTTPRequestHandler) -> None:
        body = b" " * 4_000_000 + json.dumps(launches()).encode()
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body[:2_000_000])
        time.sleep(2.5)
        handler.wfile.write(body[2_000_000:])

    sandbox.source.answers = [responds(429, Retry_After="2"), half]
    done = loaded(sandbox, patch="PROGRESS_SECONDS = 1.4")  # not when the wait ends
    lines = [line.partition("Z ")[2] for line in done.stderr.splitlines()]
    (waits,) = [n for n, line in enumerate(lines) if "HTTP 429" in line]
    progress = [line for line in lines if "so far" in line and "extract" in line]
    shown = re.compile(r"INFO +pipeline extract: so far MB [12]\.\d\d, percent \d\d, seconds \S+")
    assert progress
    assert [line for line in progress if not shown.fullmatch(line)] == []
    assert lines.index(progress[0]) > waits
    (end,) = [line for line in lines if re.search("extract: MB", line)]
    assert re.search(r"extract: MB 4\.0\d, seconds \d+\.\d\d$", end)
    assert any(re.search(r"stage: files 5, MB 0\.0\d, ", line) for line in lines)


# --- exit statuses -------------------------------------------------------------------------------


def secrets_manager(status: int, kind: str) -> Answer:
    return responds(status, {"__type": kind, "message": "no"})


NO_REGION = {"AWS_REGION": None, "AWS_EC2_METADATA_DISABLED": "true"}
NO_KEYS = NO_REGION | {"AWS_REGION": REGION, "AWS_ACCESS_KEY_ID": None}
NO_BUCKET = {"staging": {"bucket": "no-such-bucket"}}
LIMITED = responds(429, Retry_After="2000")
# What is wrong; the exit status, and how the error begins.
ENDS: dict[str, tuple[dict[str, Any], int, str]] = {
    "too many requests": ({"source": [LIMITED]}, AWAY, "extract: gave up: GET "),
    "source away": (
        {"arguments": ("--source", "http://127.0.0.1:9/")},  # nobody listens
        AWAY,
        "extract: GET http://127.0.0.1:9/: .*attempt 6",
    ),
    "throttled": ({"aws": secrets_manager(400, "ThrottlingException")}, AWAY, "connect: "),
    "aws away": ({"aws": secrets_manager(503, "ServiceUnavailable")}, AWAY, "connect: "),
    "denied": ({"aws": secrets_manager(400, "AccessDeniedException")}, 1, "connect: "),
    "no credentials": (NO_KEYS, 1, "connect: .*credentials"),
    "no region": (NO_REGION, 1, "connect: no AWS region"),
    "no bucket": (NO_BUCKET, 1, "stage: cannot write s3://no-such-bucket"),
}


@pytest.mark.parametrize(("wrong", "status", "says"), ENDS.values(), ids=ENDS)
def test_what_may_mend_itself_has_a_status_of_its_own(
    sandbox: Sandbox, tmp_path: Path, wrong: dict[str, Any], status: int, says: str
) -> None:
    environment: dict[str, Any] = {name: wrong[name] for name in wrong if name in NO_KEYS}
    sandbox.source.answers = wrong.get("source", [])
    if "aws" in wrong:
        sandbox.heartbeat.answers = [wrong["aws"]] * 9
        environment["AWS_ENDPOINT_URL_SECRETS_MANAGER"] = sandbox.heartbeat.at("")
    arguments = (
        *wrong.get("arguments", ()),
        *shipped_with(tmp_path, staging=wrong.get("staging", {})),
    )
    done = sandbox.run(*arguments, patch=NO_PAUSES, HOME=str(tmp_path), **environment)
    assert_failed(done, status=status)
    assert re.match(says, error(done))


# --- secrets -------------------------------------------------------------------------------------

# Every secret has the canary in it, which stays the same when it is quoted or shortened.
USER_PASSWORD = f"{CANARY}-user:{CANARY}-pass"
HALF = responds(200, b"[", Content_Length="100")
ODD_HEADERS = b"HTTP/1.1 200 OK\r\nContent-Length: 65647\r\nno colon here\r\n\r\n"
FTP = responds(302, Location=f"ftp://{USER_PASSWORD}@127.0.0.1/{CANARY}")
AGAIN = responds(302, Location=f"/again?token={CANARY}")
# What is wrong; the exit status is 1 unless it says another.
KINDS: dict[str, dict[str, Any]] = {
    "success": {"status": 0},
    "odd headers": {"status": 0, "answers": [sends(ODD_HEADERS, SAMPLE.read_bytes())]},
    "retries": {"answers": [HALF, responds(429, Retry_After="0"), responds(410)]},
    "redirect to ftp": {"answers": [FTP]},
    "endless redirects": {"answers": [AGAIN] * 40},
    "misspelt scheme": {"source": f"htps://{USER_PASSWORD}@127.0.0.1/?token={CANARY}"},
    "proxy": {"source": f"http://nowhere.invalid/?token={CANARY}", "answers": [responds(407)] * 9},
    "no bucket": NO_BUCKET,
    "no JSON": {"secret": f"PASSWORD={CANARY}"},
    "no host": {"login": {"HOST": f"{CANARY} {CANARY}"}},
    "wrong password": {"login": {"PASSWORD": CANARY}},
    "table differs": {"statements": [DRIFT]},
    "bug": {"patch": BUG},
    "configuration": {"status": 2, "alerts": {"heartbeat_url": f"//127.0.0.1/{CANARY}"}},
    "header": {"status": 2, "headers": {"X-Token": f"{CANARY}\n"}},
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
    set_webhook(sandbox, json.dumps({"URL": f"{webhook}/{CANARY}"}))
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


def test_a_secret_that_a_server_repeats_is_masked(sandbox: Sandbox, tmp_path: Path) -> None:
    """The run itself fails when a secret is in its log; the alerts are looked at here."""

    def repeat_password(_: str, sql: str) -> None:
        if sql.startswith("COPY"):
            raise RedshiftError("XX000", f"not for {PASSWORD}")

    sandbox.redshift.hook = repeat_password
    config = shipped_with(tmp_path, alerts=sandbox.alerts("failure"))
    (entry,) = log_entries(sandbox.run(*JSON, *config), "ERROR")
    got = sandbox.received()
    assert PASSWORD not in str(got)
    for text in (entry["message"], got["slack"][0]["text"], got["sns"][0]["Message"]):
        assert "not for ***" in text

    sandbox.redshift.hook = None
    refuses = sends(f"HTTP/1.1 403 not for /services/{WEBHOOK}\r\n\r\n".encode())
    sandbox.slack.answers = [refuses]
    query = f"/{PING} nor id=Qu3ry-of-it"
    sandbox.heartbeat.answers = [sends(f"HTTP/1.1 403 not for {query}\r\n\r\n".encode())]
    alerts = sandbox.alerts("success")
    alerts["heartbeat_url"] += "?id=Qu3ry-of-it"
    done = sandbox.run(*JSON, *shipped_with(tmp_path, alerts=alerts))
    said = [entry["message"] for entry in log_entries(done, "WARNING")]
    assert said == ["slack: HTTP 403 not for ***", "heartbeat: HTTP 403 not for *** nor ***"]

    sandbox.slack.answers = [refuses]
    done = sandbox.run("--test-alerts", *config)
    assert "slack: failed: HTTP 403 not for ***" in done.stdout
