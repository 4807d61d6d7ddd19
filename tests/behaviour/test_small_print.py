"""What is easily overlooked: who can read files, what servers repeat, regions, a second signal."""

from __future__ import annotations

import signal
import stat
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from subprocess import CompletedProcess

from helpers import JSON, log_entries, shipped_with
from redshift import RedshiftError
from sandbox import PASSWORD, PING, REGION, TOPIC, WEBHOOK, Sandbox


def repeats(secret: str) -> Callable[[BaseHTTPRequestHandler], None]:
    """Refuses, and says in its status line what must not be said."""

    def refuse(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(403, f"not for {secret}")
        handler.end_headers()

    return refuse


def test_others_cannot_read_what_is_in_the_temporary_folder(
    sandbox: Sandbox, tmp_path: Path
) -> None:
    assert sandbox.run("--dry-run", TMPDIR=str(tmp_path)).returncode == 0
    (folder,) = tmp_path.glob("sequra-*")
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IRWXU


def test_a_secret_that_a_server_repeats_is_masked(sandbox: Sandbox, tmp_path: Path) -> None:
    """The run itself fails when a secret is in its log; the alerts are looked at here."""

    def repeat_password(_: str, sql: str) -> None:
        if sql.startswith("COPY"):
            raise RedshiftError("XX000", f"not for {PASSWORD}")

    sandbox.redshift.hook = repeat_password
    config = shipped_with(tmp_path, alerts=sandbox.alerts("failure"))
    done = sandbox.run(*JSON, *config)
    (error,) = log_entries(done, "ERROR")
    assert "not for ***" in error["message"]
    got = sandbox.received()
    assert PASSWORD not in str(got)
    assert "not for ***" in got["slack"][0]["text"]
    assert "not for ***" in got["sns"][0]["Message"]

    sandbox.redshift.hook = None
    sandbox.slack.answers = [repeats(f"/services/{WEBHOOK}")]
    sandbox.heartbeat.answers = [repeats(f"/{PING} nor id=Qu3ry-of-it")]
    alerts = sandbox.alerts("success") | {
        "heartbeat_url": f"{sandbox.heartbeat.url}?id=Qu3ry-of-it"
    }
    done = sandbox.run(*JSON, *shipped_with(tmp_path, alerts=alerts))
    said = [entry["message"] for entry in log_entries(done, "WARNING")]
    assert said == ["slack: HTTP 403 not for ***", "heartbeat: HTTP 403 not for *** nor ***"]

    sandbox.slack.answers = [repeats(f"/services/{WEBHOOK}")]
    done = sandbox.run("--test-alerts", *config)
    assert "slack: failed: HTTP 403 not for ***" in done.stdout


def test_a_topic_may_be_in_another_region(sandbox: Sandbox, tmp_path: Path) -> None:
    elsewhere = sandbox.topic.replace(REGION, "us-east-2")
    config = shipped_with(tmp_path, alerts={"sns_topic": elsewhere})
    done = sandbox.run("--test-alerts", *config)
    assert "NotFound" in done.stdout, "a topic that does not exist is as good as one that does"
    sandbox.client("sns", region_name="us-east-2").create_topic(Name=TOPIC)
    assert sandbox.run("--test-alerts", *config).stdout == "sns: sent\n"


SIGNALLED_AGAIN = """
import requests

def close(self, close=requests.Session.close):
    os.kill(os.getpid(), signal.SIGINT)
    close(self)

requests.Session.close = close
"""


def test_a_signal_after_the_first_does_nothing(sandbox: Sandbox, tmp_path: Path) -> None:
    """It comes while the program leaves what the first has interrupted."""
    waiting, over = threading.Event(), threading.Event()

    def stall(_: BaseHTTPRequestHandler) -> None:
        waiting.set()
        over.wait(60)

    sandbox.source.answers = [stall]
    config = shipped_with(tmp_path, alerts=sandbox.alerts("failure"))
    process = sandbox.start(*JSON, *config, patch=SIGNALLED_AGAIN)
    try:
        assert waiting.wait(30)
        process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        over.set()
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM, stderr
    (error,) = log_entries(CompletedProcess([], 0, stdout, stderr), "ERROR")
    assert error["message"] == "stopped by SIGTERM"
    (told,) = sandbox.received()["slack"]
    assert "stopped by SIGTERM" in told["text"]
