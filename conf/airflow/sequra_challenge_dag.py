"""
Runs every pipeline, `conf/*.yaml`, once a day: one task each.

The tasks run the program where it is installed, in its own virtual environment. A run that ends
with exit status 75, which may mend itself, or is killed is tried again, three times; what fails for
another reason is not.

Environment of Airflow's DAG processor and workers:

| variable | |
| --- | --- |
| `SEQURA_CHALLENGE_HOME` | where the program is; default `/opt/sequra-challenge/current` |
| `SEQURA_CHALLENGE_SLACK` | id of a Slack Incoming Webhook connection to tell the outcome to |
| `SEQURA_CHALLENGE_EMAIL` | addresses to mail it to, by the connection `smtp_default` |

Airflow alerts here, after the last try. The program knows nothing of later tries, so leave
`slack_webhook_secret` and `sns_topic` of the pipelines' own `alerts` null. `heartbeat_url` can
stay.
"""

from __future__ import annotations

import html
import json
import logging
import os
import subprocess
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from airflow.providers.slack.notifications.slack_webhook import SlackWebhookNotifier
from airflow.providers.smtp.notifications.smtp import SmtpNotifier
from airflow.sdk import DAG, BaseOperator, task
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowTaskTimeout

HOME = Path(os.environ.get("SEQURA_CHALLENGE_HOME", "/opt/sequra-challenge/current"))
SLACK = os.environ.get("SEQURA_CHALLENGE_SLACK")
EMAIL = os.environ.get("SEQURA_CHALLENGE_EMAIL")
# Errors of the program whose messages say all.
EXPECTED = {"ConfigError", "PipelineError", "UnavailableError", "TransientError", "Stopped"}
TO_STOP = 60  # seconds that a program has to roll back


def report(outcome: str, reason: str) -> list[Callable[[Any], None]]:
    """Callbacks that tell how a task ended; outcome and reason are Jinja.

    A notifier keeps what it has rendered, so each call makes a new one.
    """
    title = "{{ ti.dag_id }}: {{ ti.rendered_map_index or ti.task_id }} " + outcome
    text = f"{{{{ {reason} | escaped }}}}"
    log = "{{ ti.log_url }}"
    callbacks: list[Callable[[Any], None]] = []
    if SLACK:
        message = f"{title}\n{text}\n<{log}|Log>"
        callbacks.append(
            lambda context: SlackWebhookNotifier(slack_webhook_conn_id=SLACK, text=message)(context)
        )
    if EMAIL:
        content = f'<p>{text}</p><p><a href="{log}">Log</a></p>'
        callbacks.append(
            lambda context: SmtpNotifier(to=EMAIL, subject=title, html_content=content)(context)
        )
    return callbacks


class LoadOperator(BaseOperator):
    """Runs the program on one pipeline."""

    template_fields = ("pipeline",)

    def __init__(self, *, pipeline: str, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.pipeline = pipeline
        self.program: subprocess.Popen[str] | None = None
        self.message = ""

    def execute(self, context: Any) -> str:
        """Returns what the program says was loaded."""
        home = HOME.resolve()  # a run keeps its release when the link is switched
        command = [home / ".venv/bin/python", home / "sequra_challenge/main.py"]
        try:
            self.program = subprocess.Popen(
                [*command, "--config", home / f"conf/{self.pipeline}.yaml"],
                cwd=home,
                env=os.environ | {"LOG_FORMAT": "json"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="backslashreplace",
                start_new_session=True,
            )
        except OSError as error:
            raise AirflowFailException(f"the program did not start: {error}") from None
        try:
            self.relay()
        except AirflowTaskTimeout:
            self.on_kill()
            self.relay()
            self.message = f"stopped after {self.execution_timeout}: {self.message}"
        status = self.program.wait()
        if not status:
            return self.message
        was_killed = status < 0 or status > 128
        may_mend = was_killed or status == os.EX_TEMPFAIL
        raise (AirflowException if may_mend else AirflowFailException)(
            self.message or f"exit status {status}"
        )

    def relay(self) -> None:
        """Logs each line of the program at its own level; keeps how it says that it ended."""
        assert self.program
        assert self.program.stdout
        has_ended = False
        for line in self.program.stdout:
            try:
                record = json.loads(line)
                level, message = logging.getLevelNamesMapping()[record["level"]], record["message"]
            except (ValueError, TypeError, KeyError):  # of Python itself or a package
                record, level, message = {}, logging.WARNING, line.rstrip()
            error = record.get("error", {})
            is_bug = error and error["kind"] not in EXPECTED
            self.log.log(level, "%s", message)
            if is_bug:
                self.log.error("%s", error["stack"])
            if not has_ended:
                self.message = message
            has_ended = has_ended or "outcome" in record

    def on_kill(self) -> None:
        """Lets the program roll back when the time is up or the task is stopped."""
        if self.program:
            self.program.terminate()
            killer = threading.Timer(TO_STOP, self.program.kill)
            killer.daemon = True
            killer.start()


with DAG(
    "sequra_challenge",
    description="Loads JSON APIs into Amazon Redshift",
    doc_md=__doc__,
    tags=["redshift"],
    schedule="@daily",
    start_date=datetime(2026, 1, 1, tzinfo=UTC),
    catchup=False,
    max_active_runs=1,
    user_defined_filters={"escaped": lambda text: html.escape(str(text), quote=False)},
    default_args={
        "retries": 3,  # the first after 5 to 10 minutes: Airflow's default_task_retry_delay
        "retry_exponential_backoff": 2,
        "execution_timeout": timedelta(hours=3),
        "on_failure_callback": report("failed on try {{ ti.try_number }}", "exception"),
    },
) as dag:

    @task
    def pipelines() -> list[str]:
        """The names of the pipelines."""
        found = sorted(path.stem for path in HOME.glob("conf/*.yaml"))
        if not found:
            raise AirflowFailException(f"there is no pipeline {HOME}/conf/*.yaml")
        return found

    LoadOperator.partial(
        task_id="load",
        map_index_template="{{ task.pipeline }}",
        on_success_callback=report(
            "loaded", "ti.xcom_pull(task_ids=ti.task_id, map_indexes=ti.map_index)"
        ),
    ).expand(pipeline=pipelines())
