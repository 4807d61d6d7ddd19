"""Alerts: who is told what about a run, and that telling it never changes the run's result.

The channels are real: an HTTP server in the place of Slack and of the heartbeat's monitor, and an
SNS topic with a subscriber.
"""

from __future__ import annotations

import contextlib
import html
import json
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from helpers import (
    CORES,
    JSON,
    LAUNCHES,
    SHIPPED,
    Done,
    launches,
    loaded,
    log_entries,
    responds,
    run_id,
    serve,
    set_webhook,
    shipped_with,
    stalled,
)
from sandbox import (
    BUG,
    NO_PAUSES,
    PING,
    REGION,
    SAMPLE,
    SLACK_SECRET,
    TOPIC,
    WEBHOOK,
    Process,
    Sandbox,
    Source,
    answer,
)

Configure = Callable[..., tuple[str, Path]]

HOST = socket.gethostname()
REFUSES = "http://127.0.0.1:9"  # a port that nobody listens on
GONE = f"arn:aws:sns:{REGION}:123456789012:gone"


@pytest.fixture
def configure(sandbox: Sandbox, tmp_path: Path) -> Configure:
    """Writes the shipped configuration with alerts and other settings; gives the argument."""

    def write(*on: str, name: str = "pipeline", **sections: dict[str, Any]) -> tuple[str, Path]:
        alerts = sandbox.alerts(*on) | sections.pop("alerts", {})
        option, path = shipped_with(tmp_path, alerts=alerts, **sections)
        return option, path.rename(tmp_path / f"{name}.yaml")

    return write


def log_of(done: Done, level: str) -> list[str]:
    """The messages of a level, as they are in the text log."""
    return [f"{entry['step']}: {entry['message']}" for entry in log_entries(done, level)]


def check_message(sandbox: Sandbox, first: str, heartbeat: bool = False) -> list[str]:
    """Both got one message that begins like this. Returns the lines behind that."""
    got = sandbox.received()
    assert got.pop("heartbeat", []) == [f"/{PING}"] * heartbeat
    assert sorted(got) == ["slack", "sns"]
    (mail,), (chat,) = got["sns"], got["slack"]
    message: str = mail["Message"]
    assert f"{message}\n".startswith(first + "\n")
    # What failed, or that all went well, in the characters that SNS takes.
    subject = ":".join(first.split(":")[: 1 if " succeeded on " in first else 2])
    assert mail["Subject"] == re.sub(r"[^ -~]+", "?", subject)[:100]
    check_slack(chat, message)
    return message[len(first) + 1 :].rstrip("\n").split("\n")


def check_failure(sandbox: Sandbox, done: Done, name: str = "pipeline") -> tuple[str, list[str]]:
    """Both got the one message of a failed run. Returns the error, and the lines behind it."""
    (reason,) = log_of(done, "ERROR")
    return reason, check_message(sandbox, f"{name} failed on {HOST}: {reason}")


def check_slack(chat: dict[str, Any], message: str) -> None:
    """Slack would take this, and show the message as it is."""
    escaped = [html.escape(line, quote=False) for line in message.splitlines()]
    assert chat.keys() == {"text"}
    assert len(chat["text"]) <= 40_000
    icon, _, text = chat["text"].partition(" ")
    assert icon == ("✅" if " succeeded on " in escaped[0] else "❌")
    assert len(chat["text"]) > 38_900 or text == "\n".join(escaped)
    assert "\n".join(escaped).startswith(text.removesuffix("…"))
    # "<" begins a link or a mention, "&" an entity.
    assert re.search(r"[<>]|&(?!amp;|lt;|gt;)", text) is None


# --- what a failure says -------------------------------------------------------------------------


NOT_FOUND = r"extract: GET http://127.0.0.1:\d+/v5/launches: HTTP 404 Not Found"


def run_line(sandbox: Sandbox, done: Done) -> str:
    return f"run: {run_id(done)} from {sandbox.source.url.partition('?')[0]}"


def check_failed(sandbox: Sandbox, done: Done, error: str, rows: str = "none") -> None:
    """It says what happened, and how far the run came."""
    assert done.returncode in (1, 130, 143), done.stderr
    reason, lines = check_failure(sandbox, done)
    assert re.match(error, reason), reason
    assert lines[:2] == [run_line(sandbox, done), f"staged: {rows}"]
    assert re.fullmatch(r"took: \d+\.\d s", lines[2])
    assert lines[3:] == [entry["message"] for entry in log_entries(done, "WARNING")]
    assert warned(done) == set()


def test_failed_runs(sandbox: Sandbox, configure: Configure) -> None:
    loaded(sandbox, *JSON)
    config = configure()
    sandbox.source.answers = [responds(404)]
    check_failed(sandbox, sandbox.run(*JSON, *config), NOT_FOUND)
    sandbox.source.body = b"<!channel> & <http://evil.example|click>"
    sandbox.source.answers = [responds(503, Retry_After="0")]
    done = sandbox.run(*JSON, *config)
    error = "transform: the source is no JSON array.*<!channel> & <"
    check_failed(sandbox, done, error)
    serve(sandbox, launches()[:3])
    done = sandbox.run(*JSON, *config)
    rows = f"{LAUNCHES} 3 rows, {CORES} 3 rows"
    check_failed(sandbox, done, f"load: {LAUNCHES} has 30 rows and would", rows)
    sandbox.source.body = SAMPLE.read_bytes()
    rows = f"{LAUNCHES} 30 rows, {CORES} 38 rows"
    done = sandbox.run(*JSON, *config, patch=BUG)
    check_failed(sandbox, done, ".*a bug", rows)


SIGNALLED_AGAIN = """
import requests

def close(self, close=requests.Session.close):
    os.kill(os.getpid(), signal.SIGINT)
    close(self)

requests.Session.close = close
"""


@pytest.mark.parametrize("again", ["", SIGNALLED_AGAIN], ids=["once", "again"])
def test_a_stopped_run(sandbox: Sandbox, configure: Configure, again: str) -> None:
    """A signal that comes while the program leaves what the first interrupted does nothing."""
    with stalled(sandbox, *JSON, *configure(), plainly=not again, patch=again) as process:
        process.send_signal(signal.SIGTERM)
        done = sandbox.finish(process)
    assert done.returncode == 128 + signal.SIGTERM
    check_failed(sandbox, done, "(extract: )?stopped by SIGTERM$")


def test_a_signal_while_a_success_is_told(sandbox: Sandbox, configure: Configure) -> None:
    """The rows are in the tables, so the run has not failed."""
    process: Process

    def stop(handler: BaseHTTPRequestHandler) -> None:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        answer(handler, 200)

    sandbox.slack.answers = [stop]
    process = sandbox.start(*JSON, *configure("success"))
    done = sandbox.finish(process)
    assert (done.returncode, log_entries(done, "ERROR")) == (0, [])
    assert sorted(sandbox.received()) == ["heartbeat", "slack", "sns"]


def test_a_huge_error(sandbox: Sandbox, configure: Configure) -> None:
    """Each table differs in each column; the message is cut for Slack."""
    for name in (LAUNCHES, CORES):
        columns = [path.replace(".", "_") for path in SHIPPED["tables"][name]["columns"]]
        types = ", ".join(f'"{column}" date' for column in columns)
        sandbox.as_user(f"CREATE TABLE {name} ({types})")
    reason, _ = check_failure(sandbox, sandbox.run(*JSON, *configure()))
    assert len(reason) > 10_000


def test_a_subject_is_short_and_ascii(sandbox: Sandbox, configure: Configure) -> None:
    sandbox.source.body = json.dumps([{"id": "Ähre 🚀\r\n" * 9, "flight_number": "one"}]).encode()
    name = "Blütenlese" * 9
    reason, _ = check_failure(sandbox, sandbox.run(*JSON, *configure(name=name)), name)
    assert reason.startswith(f"transform: {LAUNCHES}")


WRONG = {"staging": {"bucket": "B", "part_mb": "0"}}


def test_a_wrong_configuration_is_told(sandbox: Sandbox, configure: Configure) -> None:
    done = sandbox.run(*JSON, *configure(**WRONG))
    assert done.returncode == 2
    reason, _ = check_failure(sandbox, done)
    assert re.search(r"2 fault.*\n  staging\.bucket: .*\n  staging\.part_mb: ", reason)
    set_webhook(sandbox, f"{REFUSES}/{WEBHOOK}")
    done = sandbox.run(*JSON, *configure(**WRONG))
    (failed,) = log_of(done, "WARNING")
    assert re.search(r"slack: .*refused$", failed), failed


# --- what a success says -------------------------------------------------------------------------


def test_successful_runs(sandbox: Sandbox, configure: Configure) -> None:
    config = configure("success")
    rows_at_heartbeat = []

    def alive(handler: BaseHTTPRequestHandler) -> None:
        rows_at_heartbeat.append(sandbox.query(f"SELECT count(*) FROM {LAUNCHES}")[0]["count"])
        answer(handler, 200)

    sandbox.heartbeat.answers = [alive]
    done = loaded(sandbox, *JSON, *config)
    check_success(sandbox, done, f"{LAUNCHES} 30 rows (+30), {CORES} 38 rows (+38)")
    assert rows_at_heartbeat == [30]

    # Fewer rows, and all kinds of warnings; one of them would make Slack call the channel.
    *served, last, very_last = launches()
    lost = len(last["cores"] + very_last["cores"])
    odd = "<!channel> & <http://evil.example|click>"
    for launch in served:
        launch[odd] = 1
        del launch["auto_update"]
    serve(sandbox, served)
    sandbox.source.answers = [responds(503, Retry_After="0")]
    sandbox.as_user(f"ALTER TABLE {LAUNCHES} DROP COLUMN details")
    done = loaded(sandbox, *JSON, *config, patch=NO_PAUSES)
    tables = f"{LAUNCHES} 28 rows (-2), {CORES} {38 - lost} rows (-{lost})"
    check_success(sandbox, done, tables, "503", odd[:20], "auto_update", 'ADD COLUMN "details"')

    # By default only the heartbeat is told.
    loaded(sandbox, *JSON, *configure())
    assert sandbox.received() == {"heartbeat": [f"/{PING}"]}

    # Who wants to hear of success only hears nothing of a failure.
    sandbox.source.answers = [responds(404)]
    assert sandbox.run(*configure("success")).returncode == 1
    assert sandbox.received() == {}


def check_success(sandbox: Sandbox, done: Done, tables: str, *warnings: str) -> None:
    """Each channel got the one message, with all warnings; those of the log include these."""
    first = f"pipeline succeeded on {HOST}: {tables}"
    run, took, *lines = check_message(sandbox, first, heartbeat=True)
    assert run == run_line(sandbox, done)
    assert re.fullmatch(r"took: \d+\.\d s", took)
    logged = [entry["message"] for entry in log_entries(done, "WARNING")]
    assert lines == logged
    assert [some for some in warnings if not [text for text in logged if some in text]] == []


def test_a_huge_success(sandbox: Sandbox, configure: Configure) -> None:
    """The source has a field with an endless name: SNS refuses more than 256 KiB."""
    serve(sandbox, [launch | {"&" * 300_000: 1} for launch in launches()])
    done = loaded(sandbox, *JSON, *configure("success"))
    tables = f"{LAUNCHES} 30 rows (+30), {CORES} 38 rows (+38)"
    check_message(sandbox, f"pipeline succeeded on {HOST}: {tables}", heartbeat=True)
    assert warned(done) == set()


# --- who is not told -----------------------------------------------------------------------------


UNHEARD: dict[str, tuple[list[str], dict[str, Any], int]] = {
    "dry run": (["--dry-run"], {}, 0),
    "failed dry run": (["--dry-run", "--source", "/nowhere"], {}, 1),
    "wrong option": (["--log-format", "xml"], {}, 2),
    # Who tries out a wrong configuration sees it.
    "wrong dry run": (["--dry-run"], WRONG, 2),
    "wrong test": (["--test-alerts"], WRONG, 2),
    # Nobody wants to hear of failures, or it cannot be told who.
    "only success": ([], WRONG | {"alerts": {"on": ["success"]}}, 2),
    "no topic": ([], WRONG | {"alerts": {"sns_topic": "etl"}}, 2),
    "unknown channel": ([], WRONG | {"alerts": {"sns": "etl"}}, 2),
}


@pytest.mark.parametrize(("arguments", "sections", "status"), UNHEARD.values(), ids=UNHEARD)
def test_nobody_is_alerted(
    sandbox: Sandbox,
    configure: Configure,
    tmp_path: Path,
    arguments: list[str],
    sections: dict[str, Any],
    status: int,
) -> None:
    config = configure("failure", "success", **sections)
    done = sandbox.run(*arguments, *config, TMPDIR=str(tmp_path))
    assert (done.returncode, sandbox.received()) == (status, {}), done.stderr


# --- channels that fail --------------------------------------------------------------------------


def test_a_test_alert(sandbox: Sandbox, configure: Configure) -> None:
    done = sandbox.run("--test-alerts", *configure())
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["heartbeat: sent", "slack: sent", "sns: sent"]
    got = sandbox.received()
    assert HOST in got["sns"][0]["Message"]
    assert HOST in got["slack"][0]["text"]
    assert got["heartbeat"] == [f"/{PING}"]
    assert sandbox.source.requests == sandbox.redshift.statements == []

    done = sandbox.run("--test-alerts")
    assert done.returncode == 1
    assert "alerts" in done.stdout + done.stderr


def test_forms_of_the_webhook_secret(sandbox: Sandbox, configure: Configure) -> None:
    for text in ('{"url": "%s"}', '{"URL": "%s", "note": 1}', "%s\n"):
        set_webhook(sandbox, text % sandbox.slack.url)
        done = sandbox.run(
            "--test-alerts", *configure(alerts={"sns_topic": None, "heartbeat_url": None})
        )
        assert (done.returncode, done.stdout) == (0, "slack: sent\n"), done.stderr
        assert sandbox.slack.requests.pop() == f"/services/{WEBHOOK}"


def test_a_topic_may_be_in_another_region(sandbox: Sandbox, configure: Configure) -> None:
    config = configure(alerts={"sns_topic": sandbox.topic.replace(REGION, "us-east-2")})
    done = sandbox.run("--test-alerts", *config)
    assert "NotFound" in done.stdout, "a topic that does not exist is as good as one that does"
    sandbox.client("sns", region_name="us-east-2").create_topic(Name=TOPIC)
    assert sandbox.run("--test-alerts", *config).returncode == 0


# Channel; Slack's status, the webhook or the settings that break it; why it was not told.
BREAKS: dict[str, tuple[str, int | str | dict[str, str], str]] = {
    "slack 404": ("slack", 404, "404"),
    "refused": ("slack", f"{REFUSES}/{WEBHOOK}", "refused"),
    "unknown host": ("slack", f"https://nowhere.invalid/{WEBHOOK}", "resol|known"),
    "wrong port": ("slack", f"https://127.0.0.1:one/{WEBHOOK}", "."),
    "wrong brackets": ("slack", f"http://[/{WEBHOOK}", "."),
    "wrong host": ("slack", f"http://a..b/{WEBHOOK}", "."),
    "ftp": ("slack", f"ftp://127.0.0.1/{WEBHOOK}", SLACK_SECRET),
    "no URL": ("slack", WEBHOOK, SLACK_SECRET),
    "JSON without URL": ("slack", json.dumps({"HOOK": WEBHOOK}), SLACK_SECRET),
    "no secret": ("slack", {"slack_webhook_secret": "no/such"}, "no/such"),
    "no topic": ("sns", {"sns_topic": GONE}, f"{GONE}.*NotFound"),
    "heartbeat refused": ("heartbeat", {"heartbeat_url": f"{REFUSES}/{PING}"}, "refused"),
}


@pytest.mark.parametrize("case", BREAKS)
def test_a_channel_that_fails(sandbox: Sandbox, configure: Configure, case: str) -> None:
    """The reason is told without the URL, and the other channels get theirs."""
    channel, broken, why = BREAKS[case]
    if isinstance(broken, int):
        sandbox.slack.answers = [responds(broken, b"no_team")] * 9
    if isinstance(broken, str):
        set_webhook(sandbox, broken)
    settings = broken if isinstance(broken, dict) else {}
    done = sandbox.run("--test-alerts", *configure(alerts=settings))
    assert done.returncode == 1
    lines = sorted(done.stdout.splitlines())
    (failed,) = [line for line in lines if not line.endswith(": sent")]
    assert re.match(rf"{channel}: failed: .*({why})", failed), failed
    assert [line.partition(":")[0] for line in lines] == ["heartbeat", "slack", "sns"]


def test_all_channels_fail(sandbox: Sandbox, configure: Configure) -> None:
    """The run ends as it would have, and warns of each."""
    config = configure("success", "failure", alerts={"sns_topic": GONE})
    for server in (sandbox.slack, sandbox.heartbeat):
        server.answers = [responds(500)] * 9
    assert warned(loaded(sandbox, *JSON, *config)) == {"slack", "sns", "heartbeat"}
    sandbox.source.answers = [responds(404)]
    done = sandbox.run(*JSON, *config)
    assert (done.returncode, warned(done)) == (1, {"slack", "sns"}), done.stderr


def warned(done: Done) -> set[str]:
    """The channels of which the log says that they were not told."""
    found = [re.match(r"alerts: (\w+): ", text) for text in log_of(done, "WARNING")]
    return {match[1] for match in found if match}


# --- channels that hang --------------------------------------------------------------------------


# A name that nobody answers for: the resolver of the system tries for longer than we want to wait.
HANG = """
import socket, botocore.config, redshift_connector
ALERT_SECONDS = 4
real = socket.getaddrinfo
def getaddrinfo(host, *others, **more):
    if str(host).endswith(".invalid"):
        time.sleep(900)
    return real(host, *others, **more)
socket.getaddrinfo = getaddrinfo

def shorter(call, **limit):
    return lambda *arguments, **options: call(*arguments, **options | limit)
botocore.config.Config = shorter(botocore.config.Config, read_timeout=1)
redshift_connector.connect = shorter(redshift_connector.connect, timeout=3)
"""


def test_everything_hangs(sandbox: Sandbox, configure: Configure) -> None:
    """Sending ends, here after four seconds instead of ten, and the run as it would have."""
    over = threading.Event()

    def wait(_: BaseHTTPRequestHandler) -> None:
        over.wait()

    def drip(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nSlow: ")
        with contextlib.suppress(OSError):
            while not over.wait(0.2):
                handler.wfile.write(b".")

    def start(name: str, *arguments: str, alerts: Any = (), **options: Any) -> Future[Done]:
        redshift = options.pop("redshift", {})
        config = configure("success", "failure", name=name, alerts=dict(alerts), redshift=redshift)
        return pool.submit(sandbox.run, *JSON, *config, *arguments, patch=HANG, **options)

    with contextlib.ExitStack() as stack:
        silent = stack.enter_context(Source(f"/services/{WEBHOOK}", b""))
        pool = stack.enter_context(ThreadPoolExecutor())
        stack.callback(over.set)
        silent.answers, sandbox.heartbeat.answers = [wait] * 99, [drip] * 9
        quiet, lost = silent.at("").rstrip("/"), "http://nowhere.invalid"
        secrets = {
            "silent/slack": silent.url,
            "lost/slack": f"{lost}/{WEBHOOK}",
            "silent/redshift": json.dumps(sandbox.secret() | {"PORT": silent.server.server_port}),
        }
        for name, text in secrets.items():
            sandbox.secrets.create_secret(Name=name, SecretString=text)
        fails = "--source", "/nowhere"
        slack = {"slack_webhook_secret": "silent/slack"}
        unknown = {"slack_webhook_secret": "lost/slack", "heartbeat_url": f"{lost}/{PING}"}
        # With the exit status, and who is not told.
        runs = [
            (start("channels", alerts=slack, AWS_ENDPOINT_URL_SNS=quiet), 0, "heartbeat slack sns"),
            (start("names", alerts=unknown, AWS_ENDPOINT_URL_SNS=lost), 0, "heartbeat slack sns"),
            (start("aws", *fails, AWS_ENDPOINT_URL=quiet), 75, "slack sns"),
            (start("redshift", *fails, redshift={"secret": "silent/redshift"}), 1, ""),
        ]
        for future, status, told in runs:
            done = future.result()
            assert done.returncode == status, done.stderr
            assert warned(done) == set(told.split()), done.stderr
    nowhere = "/nowhere is no file, nor a URL of http, https or s3"
    first = f"redshift failed on {HOST}: extract: {nowhere}"
    lines = check_message(sandbox, first, heartbeat=True)  # to the one that drips
    assert not [line for line in lines if line.startswith("public.")]
