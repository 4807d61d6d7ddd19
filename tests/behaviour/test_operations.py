"""A year in production: whose line it is, how a run ended, who hears of it, what may mend."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from helpers import (
    CORES,
    JSON,
    LAUNCHES,
    Done,
    fewer_launches,
    launches,
    loaded,
    log_entries,
    responds,
    serve,
    shipped_with,
)
from sandbox import SECRET, Sandbox

AWAY = 75  # EX_TEMPFAIL
REFUSES = "http://127.0.0.1:9"  # a port that nobody listens on


# --- lines ---------------------------------------------------------------------------------------

# A package that warns, when files are staged.
WARNS = """
import pathlib, warnings
def write_text(*arguments, write=pathlib.Path.write_text):
    warnings.warn("an odd thing")
    return write(*arguments)
pathlib.Path.write_text = write_text
"""


@pytest.mark.parametrize("format_", ["text", "json"])
def test_each_line_names_its_pipeline(sandbox: Sandbox, tmp_path: Path, format_: str) -> None:
    """What a package warns of, too."""
    config = shipped_with(tmp_path)[1].rename(tmp_path / "second.yaml")
    done = loaded(sandbox, "--config", config, LOG_FORMAT=format_, patch=WARNS)
    assert "an odd thing" in done.stderr
    if format_ == "json":
        named = {(entry["service"], entry["pipeline"]) for entry in log_entries(done)}
        assert named == {("sequra-challenge", "second")}
        assert any("odd thing" in entry["message"] for entry in log_entries(done, "WARNING"))
    else:
        starts = [line for line in done.stderr.splitlines() if not line.startswith("  ")]
        pattern = r"\S+Z (INFO|WARNING) +second \w+: \S.*"
        assert [line for line in starts if not re.fullmatch(pattern, line)] == []


# --- how a run ended -----------------------------------------------------------------------------


def ending(done: Done) -> dict[str, Any]:
    """The one record that ends a run."""
    (record,) = [entry for entry in log_entries(done) if "outcome" in entry]
    return record


def test_the_record_that_ends_a_run(sandbox: Sandbox) -> None:
    record = ending(loaded(sandbox, *JSON))
    assert (record["outcome"], record["level"], record["step"]) == ("success", "INFO", "run")
    assert record["rows"] == record["difference"] == {LAUNCHES: 30, CORES: 38}
    assert 100_000_000 < record["duration"] < 60e9
    serve(sandbox, fewer := fewer_launches(28))
    cores = sum(len(launch["cores"]) for launch in fewer)
    record = ending(loaded(sandbox, *JSON))
    assert record["rows"] == {LAUNCHES: 28, CORES: cores}
    assert record["difference"] == {LAUNCHES: -2, CORES: cores - 38}


def test_the_record_of_a_failure(sandbox: Sandbox, tmp_path: Path) -> None:
    sandbox.source.answers = [responds(404)]
    failed = ending(sandbox.run(*JSON))
    assert (failed["outcome"], failed["level"], failed["step"]) == ("failure", "ERROR", "extract")
    assert failed["error"]["message"] == failed["message"]
    assert type(failed["duration"]) is int
    assert "rows" not in failed
    wrong = ending(sandbox.run(*JSON, *shipped_with(tmp_path, staging={"bucket": "B"})))
    assert (wrong["outcome"], wrong["error"]["kind"]) == ("failure", "ConfigError")


# --- a wrong configuration -----------------------------------------------------------------------


def wrong(folder: Path, alerts: dict[str, Any], **sections: dict[str, Any]) -> tuple[str, Path]:
    return shipped_with(folder, alerts=alerts, staging={"bucket": "B", "part_mb": "0"}, **sections)


def test_a_wrong_configuration_is_told(sandbox: Sandbox, tmp_path: Path) -> None:
    done = sandbox.run(*wrong(tmp_path, sandbox.alerts()))
    assert done.returncode == 2
    received = sandbox.received()
    (mail,), (chat,) = received.pop("sns"), received.pop("slack")
    assert received == {}
    for text in (mail["Message"], json.dumps(chat)):
        assert "pipeline failed" in text
        assert "staging.bucket: " in text
        assert "staging.part_mb: " in text
    assert mail["Subject"].startswith("pipeline failed")


@pytest.mark.parametrize("option", ["--dry-run", "--check", "--test-alerts"])
def test_who_tries_out_a_wrong_configuration_sees_it(
    sandbox: Sandbox, tmp_path: Path, option: str
) -> None:
    done = sandbox.run(option, *wrong(tmp_path, sandbox.alerts()))
    assert (done.returncode, sandbox.received()) == (2, {}), done.stderr
    assert "2 fault" in done.stderr


@pytest.mark.parametrize(
    "alerts",
    [{"on": ["success"]}, {"sns_topic": "etl"}, {"sns": "etl"}],
    ids=["only success", "no topic", "unknown channel"],
)
def test_a_wrong_configuration_that_nobody_hears_of(
    sandbox: Sandbox, tmp_path: Path, alerts: dict[str, Any]
) -> None:
    """Nobody wants to hear of failures, or it cannot be told who."""
    done = sandbox.run(*wrong(tmp_path, sandbox.alerts() | alerts))
    assert (done.returncode, sandbox.received()) == (2, {}), done.stderr


# --- what may mend itself ------------------------------------------------------------------------


def too_many(sandbox: Sandbox) -> dict[str, Any]:
    sandbox.source.answers = [responds(429, Retry_After="2000")]
    return {}


def source_is_away(_: Sandbox) -> dict[str, Any]:
    return {"source": {"url": f"{REFUSES}/v5/launches", "max_wait": "0"}}


def redshift_is_away(sandbox: Sandbox) -> dict[str, Any]:
    values = json.dumps(sandbox.secret() | {"PORT": 9})
    sandbox.secrets.put_secret_value(SecretId=SECRET, SecretString=values)
    return {"redshift": {"connect_seconds": "0"}}


def aws_is_away(_: Sandbox) -> dict[str, Any]:
    return {"AWS_ENDPOINT_URL_S3": REFUSES}


def secrets_manager(status: int, kind: str) -> Callable[[Sandbox], dict[str, Any]]:
    """Secrets Manager answers each request with this error."""

    def prepare(sandbox: Sandbox) -> dict[str, Any]:
        body = {"__type": kind, "message": "no"}
        sandbox.heartbeat.answers = [responds(status, body)] * 9
        return {"AWS_ENDPOINT_URL_SECRETS_MANAGER": sandbox.heartbeat.url.rpartition("/")[0]}

    return prepare


def certificate(_: Sandbox) -> dict[str, Any]:
    return {"SSL_CERT_FILE": None}


def misfit(sandbox: Sandbox) -> dict[str, Any]:
    serve(sandbox, [launches()[0] | {"flight_number": "one"}])
    return {}


def refusal(sandbox: Sandbox) -> dict[str, Any]:
    loaded(sandbox)
    serve(sandbox, fewer_launches(20))
    return {}


@pytest.mark.parametrize(
    ("prepare", "status"),
    [
        (too_many, AWAY),
        (source_is_away, AWAY),
        (redshift_is_away, AWAY),
        (aws_is_away, AWAY),
        (secrets_manager(400, "ThrottlingException"), AWAY),
        (secrets_manager(503, "ServiceUnavailable"), AWAY),
        (secrets_manager(400, "AccessDeniedException"), 1),
        (certificate, 1),
        (misfit, 1),
        (refusal, 1),
    ],
    ids=[
        "too many requests",
        "source away",
        "redshift away",
        "s3 away",
        "throttled",
        "secrets manager away",
        "access denied",
        "bad certificate",
        "misfit",
        "refused to shrink",
    ],
)
def test_exit_statuses(
    sandbox: Sandbox, tmp_path: Path, prepare: Callable[[Sandbox], dict[str, Any]], status: int
) -> None:
    given = prepare(sandbox)
    sections = {name: given.pop(name) for name in ("source", "redshift") if name in given}
    config = shipped_with(tmp_path, **sections)
    source = ("--source", sections["source"]["url"]) if "source" in sections else ()
    done = sandbox.run(*config, *source, **given)
    assert done.returncode == status, done.stderr
    assert done.stderr.count(" ERROR ") == 1


# --- messages ------------------------------------------------------------------------------------


def test_a_wait_that_would_be_too_long(sandbox: Sandbox, tmp_path: Path) -> None:
    too_many(sandbox)
    done = sandbox.run(*JSON, *shipped_with(tmp_path, source={"max_wait": "3"}))
    (error,) = log_entries(done, "ERROR")
    assert re.match(r"gave up: GET \S+: HTTP 429 .*source.max_wait, 3 s", error["message"])


@pytest.mark.parametrize(
    ("changes", "step", "says"),
    [
        ({"AWS_REGION": None, "AWS_EC2_METADATA_DISABLED": "true"}, "connect", "no AWS region"),
        ({"bucket": "no-such-bucket"}, "stage", "cannot write s3://no-such-bucket"),
    ],
    ids=["no region", "no bucket"],
)
def test_what_is_lacking_is_no_error_of_the_transform(
    sandbox: Sandbox, tmp_path: Path, changes: dict[str, Any], step: str, says: str
) -> None:
    bucket = changes.pop("bucket", "my-data-bucket")
    config = shipped_with(tmp_path, staging={"bucket": bucket})
    done = sandbox.run(*JSON, *config, HOME=str(tmp_path), **changes)
    assert done.returncode == 1
    (error,) = log_entries(done, "ERROR")
    assert (error["step"], error["message"][: len(says)]) == (step, says)


def test_alerts_at_a_glance(sandbox: Sandbox, tmp_path: Path) -> None:
    """Good or bad in Slack, the step in the subject; what is staged is called so."""
    config = shipped_with(tmp_path, alerts=sandbox.alerts("success", "failure"))
    loaded(sandbox, *config)
    received = sandbox.received()
    assert received["slack"][0]["text"].startswith("✅ pipeline succeeded")
    assert received["sns"][0]["Subject"].startswith("pipeline succeeded")
    serve(sandbox, launches()[:3])
    assert sandbox.run(*config).returncode == 1
    received = sandbox.received()
    assert received["slack"][0]["text"].startswith("❌ pipeline failed")
    (mail,) = received["sns"]
    assert re.fullmatch(r"pipeline failed on \S+: load", mail["Subject"])
    assert f"\nstaged, not loaded: {LAUNCHES} 3 rows, " in mail["Message"]


# --- progress ------------------------------------------------------------------------------------


def test_progress_is_for_people(sandbox: Sandbox) -> None:
    """Megabytes and per cent, and nothing while the program has said that it waits."""

    def half(handler: BaseHTTPRequestHandler) -> None:
        body = b" " * 4_000_000 + json.dumps(launches()).encode()
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body[:2_000_000])
        time.sleep(7)
        handler.wfile.write(body[2_000_000:])

    sandbox.source.answers = [responds(429, Retry_After="6"), half]
    lines = [line.partition("Z ")[2] for line in loaded(sandbox).stderr.splitlines()]
    (waits,) = [n for n, line in enumerate(lines) if "HTTP 429" in line]
    progress = [line for line in lines if "so far" in line]
    shown = re.compile(r"INFO +pipeline extract: so far MB [12]\.\d\d, percent \d\d, seconds \S+")
    assert [line for line in progress if not shown.fullmatch(line)] == []
    assert len(progress) in (1, 2)
    assert lines.index(progress[0]) > waits
    (end,) = [line for line in lines if re.search("extract: MB", line)]
    assert re.search(r"extract: MB 4\.0\d, seconds \d+\.\d\d$", end)
    assert any(re.search(r"stage: files 5, MB 0\.0\d, ", line) for line in lines)
