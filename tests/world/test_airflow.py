"""The DAG in a real Airflow: a day with pipelines that load, fail, are stopped, and are wrong."""

from __future__ import annotations

import email.policy
import json
import os
import re
import signal
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from email.message import EmailMessage
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from helpers import SHIPPED, changed, write_yaml
from sandbox import PASSWORD, ROOT, SECRET_KEY, Sandbox, Source, answer

pytestmark = pytest.mark.ci
DAG = ROOT / "conf" / "airflow" / "sequra_challenge_dag.py"
WEBHOOK_TOKEN = "T0/B0/Sl4ckT0ken"
PIPELINES: dict[str, dict[str, str]] = {
    "away": {},
    "hangs": {},
    "launches": {"alerts / heartbeat_url": "http://127.0.0.1:9/ping"},  # after its end, a warning
    "missing": {},
    "stopped": {},
    "wrong": {"staging / bucket": "B", "<!channel>": "1"},
}


@pytest.fixture
def airflow() -> Path:
    """The command of an Airflow in an environment of its own, which stays for the next time."""
    environment = ROOT / ".cache" / "airflow"
    uv = [sys.executable, "-m", "uv", "--quiet"]
    subprocess.run([*uv, "venv", "--allow-existing", "-p", sys.executable, environment], check=True)
    pins = ROOT / "tests" / "requirements-airflow.txt"
    subprocess.run(
        [*uv, "pip", "sync", "--python", environment / "bin" / "python", pins], check=True
    )
    return environment / "bin" / "airflow"


@pytest.fixture
def mailbox() -> Iterator[tuple[int, list[EmailMessage]]]:
    """The port of an SMTP server, and the mails that it got."""
    mails: list[EmailMessage] = []

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(b"220 ready\r\n")
            for line in self.rfile:
                if line.upper() == b"DATA\r\n":
                    self.wfile.write(b"354 go on\r\n")
                    content = b"".join(iter(self.rfile.readline, b".\r\n"))
                    mails.append(email.message_from_bytes(content, policy=email.policy.default))
                self.wfile.write(b"250 ok\r\n")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server.server_address[1], mails
        server.shutdown()


def test_each_pipeline_is_a_task_that_airflow_tries_again_and_reports(
    airflow: Path, mailbox: tuple[int, list[EmailMessage]], sandbox: Sandbox, tmp_path: Path
) -> None:
    home = installation(tmp_path / "home", sandbox.source.url)
    readme = DAG.with_name("README.md").read_text("utf-8")
    connect, run = re.findall(r"```sh\n( +airflow .*?)```", readme, re.DOTALL)
    test, unpause = run.strip().splitlines()
    port, mails = mailbox
    chat: list[str] = []
    with Source() as slack:
        slack.answers = [lambda handler: chat.append(message(handler))] * 10
        for theirs, ours in {
            "https://hooks.slack.com/services/…": f"{slack.url}/{WEBHOOK_TOKEN}",
            "587": str(port),
            "--conn-login … --conn-password …": "",
            "email-smtp.eu-west-1.amazonaws.com": "127.0.0.1",
            '"disable_ssl": true': '"disable_ssl": true, "disable_tls": true',
        }.items():
            assert theirs in connect
            connect = connect.replace(theirs, ours)
        environment = sandbox.child_environment(
            PATH=f"{airflow.parent}:{os.environ['PATH']}",
            AIRFLOW_HOME=str(tmp_path / "airflow"),
            AIRFLOW__CORE__DAGS_FOLDER=str(quick_dag(tmp_path / "dags")),
            AIRFLOW__CORE__DEFAULT_TASK_RETRY_DELAY="0",
            AIRFLOW__CORE__LOAD_EXAMPLES="false",
            SEQURA_CHALLENGE_HOME=str(home),
            SEQURA_CHALLENGE_SLACK="slack_default",
            SEQURA_CHALLENGE_EMAIL="etl@test,oncall@test",
        )
        shell = partial(subprocess.run, shell=True, env=environment, check=True, timeout=120)
        shell(f"set -e; airflow db migrate; {connect}")
        with (tmp_path / "log").open("w+", encoding="utf-8") as file:
            day = subprocess.Popen(test.split(), env=environment, stdout=file, stderr=file)
            sandbox.source.answers = [partial(serve, sandbox, day.pid)] * 10
            try:
                status = day.wait(timeout=400)
            finally:
                day.kill()
            file.seek(0)
            log = file.read()
        shell(unpause)
    assert status == 1, log  # one pipeline fails, one is wrong

    # What Airflow told, and on which try: neither 404 nor a wrong configuration was tried again.
    told = {text.split("\n")[0]: text for text in chat}
    assert sorted(told) == [
        "sequra_challenge: away loaded",
        "sequra_challenge: hangs loaded",
        "sequra_challenge: launches loaded",
        "sequra_challenge: missing failed on try 1",
        "sequra_challenge: stopped loaded",
        "sequra_challenge: wrong failed on try 1",
    ], log
    assert len(chat) == 6
    assert "public.launches 30 rows" in told["sequra_challenge: launches loaded"]
    assert "404" in told["sequra_challenge: missing failed on try 1"]
    wrong = told["sequra_challenge: wrong failed on try 1"]
    assert "&lt;!channel&gt;" in wrong  # and nobody's telephone rings for a name in a file
    assert "staging.bucket" in wrong  # all faults
    assert sorted(mail["Subject"] for mail in mails) == sorted(told)
    assert {mail["To"] for mail in mails} == {"etl@test, oncall@test"}
    body = mails[chat.index(wrong)].get_body()
    assert body
    shown = body.get_content()
    assert "&lt;!channel&gt;" in shown

    assert sandbox.source.requests.count("/missing") == 1
    assert "stopped after 0:00:30: stopped by SIGTERM" in log
    assert re.search(r"\[error +\] GET \S+/missing: HTTP 404", log)
    assert re.search(r"\[info +\] done: public.launches 30 rows", log)
    assert re.search(r"\[warning +\] heartbeat: ConnectionError", log)
    loaded = sandbox.query("SELECT source, rows_loaded FROM public.etl_runs")
    assert sorted((Path(row["source"]).name, row["rows_loaded"]) for row in loaded) == [
        (name, rows) for name in ("away", "hangs", "launches", "stopped") for rows in (30, 38)
    ]
    assert not [line for line in log.splitlines() if "py.warnings" in line and DAG.name in line]
    assert not [secret for secret in (PASSWORD, SECRET_KEY, WEBHOOK_TOKEN) if secret in log]


def quick_dag(folder: Path) -> Path:
    """A folder with the DAG, which waits for seconds instead of hours."""
    text, times = re.subn(r"timedelta\(hours=3\)", "timedelta(seconds=30)", DAG.read_text("utf-8"))
    assert times == 1
    folder.mkdir()
    (folder / DAG.name).write_text(text, encoding="utf-8")
    return folder


def installation(home: Path, url: str) -> Path:
    """The program as it is installed for Airflow, with the pipelines."""
    (home / "conf" / "aws").mkdir(parents=True)
    (home / "conf" / "aws" / "stack.yaml").write_text("# no pipeline\n", encoding="utf-8")
    (home / ".venv").symlink_to(sys.prefix)
    (home / "sequra_challenge").symlink_to(ROOT / "sequra_challenge")
    for name, changes in PIPELINES.items():
        address = {"source / url": url.replace("/v5/launches", f"/{name}")}
        write_yaml(home / "conf" / f"{name}.yaml", changed(SHIPPED, changes | address))
    return home


def serve(sandbox: Sandbox, airflow: int, handler: BaseHTTPRequestHandler) -> None:
    """Answers a pipeline's request; while the first to /stopped waits, Airflow gets SIGTERM."""
    is_first = sandbox.source.requests.count(handler.path) == 1
    if handler.path == "/missing":
        answer(handler, 404)
    elif handler.path == "/away" and is_first:
        answer(handler, 429, Retry_After="2000")
    elif handler.path in ("/hangs", "/stopped") and is_first:
        if handler.path == "/stopped":
            os.kill(airflow, signal.SIGTERM)
        handler.connection.recv(1)  # returns when the program has gone
    else:
        answer(handler, 200, sandbox.source.body)


def message(handler: BaseHTTPRequestHandler) -> str:
    """The text that Slack was sent."""
    text: str = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))["text"]
    answer(handler, 200, b"ok")
    return text
