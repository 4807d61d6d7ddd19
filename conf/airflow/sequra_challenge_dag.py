"""
Runs every pipeline, `conf/*.yaml`, once a day: one task each.

The tasks run the program where it is installed, in its own virtual environment. A pipeline that
fails is tried again, three times; one with a wrong configuration is not.

Environment of Airflow's DAG processor and workers:

| variable | |
| --- | --- |
| `SEQURA_CHALLENGE_HOME` | where the program is installed; default `/opt/sequra-challenge` |
| `SEQURA_CHALLENGE_SLACK` | id of a Slack Incoming Webhook connection to tell the outcome to |
| `SEQURA_CHALLENGE_EMAIL` | addresses to mail it to, by the connection `smtp_default` |

Airflow alerts here, after the last try. The program knows nothing of later tries, so leave
`slack_webhook_secret` and `sns_topic` of the pipelines' own `alerts` null. `heartbeat_url` can
stay.
"""

from __future__ import annotations

import html
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from airflow.providers.slack.notifications.slack_webhook import SlackWebhookNotifier
from airflow.providers.smtp.notifications.smtp import SmtpNotifier
from airflow.providers.standard.hooks.subprocess import SubprocessHook
from airflow.sdk import DAG, BaseOperator, task
from airflow.sdk.exceptions import AirflowException, AirflowFailException

HOME = Path(os.environ.get("SEQURA_CHALLENGE_HOME", "/opt/sequra-challenge"))
SLACK = os.environ.get("SEQURA_CHALLENGE_SLACK")
EMAIL = os.environ.get("SEQURA_CHALLENGE_EMAIL")


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
        self.program = SubprocessHook()

    def execute(self, context: Any) -> str:
        """Returns the last line of the log, which says what was loaded."""
        python, config = HOME / ".venv/bin/python", HOME / f"conf/{self.pipeline}.yaml"
        done = self.program.run_command(
            [str(python), "sequra_challenge/main.py", "--config", str(config)], cwd=str(HOME)
        )
        outcome = done.output.strip()
        if done.exit_code == 2:  # a wrong configuration, which will not mend itself
            raise AirflowFailException(outcome)
        if done.exit_code:
            raise AirflowException(outcome)
        return outcome

    def on_kill(self) -> None:
        """Lets the program roll back when the time is up or the task is stopped."""
        self.program.send_sigterm()


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
