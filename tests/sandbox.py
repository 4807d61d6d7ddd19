"""The whole world of the program on one machine: source, S3, Secrets Manager and Redshift.

    python tests/sandbox.py           load the sample and show what is in the tables
    python tests/sandbox.py --keep    and leave everything running, to try things by hand
    python tests/sandbox.py --config conf/examples/launch_library.yaml
                                      the same with Launch Library 2, page by page
    python tests/sandbox.py --config conf/examples/launches_query.yaml
                                      the same with a query to r/SpaceX's API

Everything listens on loopback and keeps its files in a temporary folder. The program is run as it
is, as a subprocess with the shipped configuration; only its environment leads it here.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qsl, urlencode, urlsplit

import boto3
import psycopg
import yaml
from moto.server import ThreadedMotoServer
from psycopg.rows import dict_row

from forkserver import MAIN, Forked, ForkServer
from redshift import Redshift

logging.getLogger("werkzeug").setLevel(logging.ERROR)  # moto's line for each request

ROOT = Path(__file__).resolve().parent.parent
READMES = [ROOT / "README.md", *sorted(ROOT.glob("[ct]*/**/README.md"))]  # of conf and tests
PIPELINE = ROOT / "conf" / "pipeline.yaml"
DATA = ROOT / "tests" / "data"
SAMPLE, LIBRARY = DATA / "launches.json", DATA / "launch_library.json"
PLACES = DATA / "places.json"  # rockets and launchpads
LIBRARY_CONFIG = ROOT / "conf" / "examples" / "launch_library.yaml"
QUERY_CONFIG = ROOT / "conf" / "examples" / "launches_query.yaml"
LIBRARY_PAGE, QUERY_PAGE = 5, 12  # launches, at most
REGION = "eu-west-1"
# What conf/pipeline.yaml names.
BUCKET, SECRET = "my-data-bucket", "redshift/spacex"
SLACK_SECRET, TOPIC = "spacex/slack", "etl-alerts"
DATABASE, USER, PASSWORD = "dev", "loader", "S4ndbox-Passw0rd"
SECRET_KEY, TOKEN = "sandbox-Secret-Key", "s0urce-T0ken"  # of AWS; in the source's URL
WEBHOOK, PING = "T000/B000/Sl4ck-W3bhook", "H3artbeat-P1ng"  # who knows these may send

Process = subprocess.Popen[str] | Forked

# What to ask of the tables that a configuration fills.
QUESTIONS: dict[Path, dict[str, str]] = {
    ROOT / path: questions
    for path, questions in yaml.safe_load((DATA / "questions.yaml").read_bytes()).items()
}
LIBRARY_QUESTIONS = QUESTIONS[LIBRARY_CONFIG]


class Handler(BaseHTTPRequestHandler):
    """Says nothing of the requests."""

    def log_message(self, *_: Any) -> None:
        pass


class LocalServer:
    """An HTTP server on loopback, which runs while it is entered."""

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


class Source(LocalServer):
    """An HTTP server with one document, a small Launch Library 2, and r/SpaceX's queries.

    ``answers`` are given first, one a request: functions that get the request's handler and do
    what they like with it. ``requests`` are the paths asked for, ``headers`` and ``posted`` what
    came along.
    """

    def __init__(self, path: str = "/v5/launches", body: bytes = SAMPLE.read_bytes()) -> None:
        self.reset(body)
        source = self

        class Serves(Handler):
            def do_GET(self) -> None:
                source.requests.append(self.path)
                source.headers.append(dict(self.headers))
                if length := int(self.headers.get("Content-Length", 0)):
                    source.posted.append(self.rfile.read(length))
                    self.rfile = io.BytesIO(source.posted[-1])  # an answer may read it again
                if source.answers:
                    source.answers.pop(0)(self)
                elif self.path.startswith("/2.3.0/launches/"):
                    answer(self, 200, library_page(self))
                elif self.path == "/v5/launches/query":
                    answer(self, 200, query_page(source.posted[-1]))
                else:
                    answer(self, 200, source.body)

            do_HEAD = do_POST = do_PUT = do_GET

        super().__init__(Serves)
        self.url = self.at(path)

    def reset(self, body: bytes) -> None:
        """The document; no answers to give, and no requests yet."""
        self.body = body
        self.answers: list[Callable[[BaseHTTPRequestHandler], None]] = []
        self.requests: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.posted: list[bytes] = []

    def at(self, url: str) -> str:
        """The URL with this server in the place of its own."""
        host = f"127.0.0.1:{self.server.server_port}"
        return urlsplit(url)._replace(scheme="http", netloc=host).geturl()


def answer(handler: BaseHTTPRequestHandler, status: int, body: bytes = b"", **headers: str) -> None:
    """Sends one answer; an underscore in a header's name is a hyphen."""
    handler.send_response(status)
    for name, value in ({"Content_Length": str(len(body))} | headers).items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def library_page(handler: BaseHTTPRequestHandler) -> bytes:
    """The launches at the offset that is asked for, as Launch Library 2 wraps them."""
    path, _, query = handler.path.partition("?")
    parameters = dict(parse_qsl(query))
    start, launches = int(parameters.get("offset", 0)), json.loads(LIBRARY.read_bytes())

    def url(offset: int) -> str | None:
        more = urlencode(parameters | {"offset": offset})
        exists = 0 <= offset < len(launches)
        return f"http://{handler.headers['Host']}{path}?{more}" if exists else None

    page = {
        "count": len(launches),
        "next": url(start + LIBRARY_PAGE),
        "previous": url(start - LIBRARY_PAGE),
        "results": launches[start : start + LIBRARY_PAGE],
    }
    return json.dumps(page).encode()


def query_page(body: bytes) -> bytes:
    """The sample's launches as r/SpaceX answers a query: sorted, selected, populated, paged."""
    options = json.loads(body)["options"]
    places, launches = json.loads(PLACES.read_bytes()), json.loads(SAMPLE.read_bytes())
    launches.sort(key=lambda launch: launch["id"])
    page, limit = options.get("page", 1), min(options["limit"], QUERY_PAGE)
    docs = []
    for launch in launches[(page - 1) * limit : page * limit]:
        doc = {name: launch[name] for name in (*options["select"], "id")}
        for populated in options["populate"]:
            path, fields = populated["path"], populated["select"]
            place = places[path][doc[path]]
            doc[path] = {name: place[name] for name in fields} | {"id": doc[path]}
        docs.append(doc)
    pages = -(-len(launches) // limit)
    answered = {
        "docs": docs,
        "totalDocs": len(launches),
        "limit": limit,
        "totalPages": pages,
        "page": page,
        "hasNextPage": page < pages,
        "nextPage": page + 1 if page < pages else None,
    }
    return json.dumps(answered).encode()


# Something unexpected, when files are staged.
BUG = """
def write_text(*_):
    raise RuntimeError("a bug")
Path.write_text = write_text
"""

# For runs whose pauses between two tries are nobody's concern.
NO_PAUSES = "time.sleep = lambda seconds: None"


class Sandbox:
    """Source, S3, Secrets Manager and Redshift, running; use it as a context manager."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self.source = stack.enter_context(Source())
            self.slack = stack.enter_context(Source(f"/services/{WEBHOOK}", b"ok"))
            self.heartbeat = stack.enter_context(Source(f"/{PING}", b"OK"))
            moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
            moto.start()
            stack.callback(moto.stop)
            self.aws = "http://{}:{}".format(*moto.get_host_and_port())
            cluster = Redshift(self.folder / "redshift", self.aws, DATABASE, {USER: PASSWORD})
            self.redshift = stack.enter_context(cluster)
            self.environment = {
                "AWS_ENDPOINT_URL": self.aws,
                "AWS_ACCESS_KEY_ID": "sandbox",
                "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
                "AWS_REGION": REGION,
                "SSL_CERT_FILE": str(self.redshift.ca),
            }
            self.s3 = self.client("s3")
            where = {"LocationConstraint": REGION}
            self.s3.create_bucket(Bucket=BUCKET, CreateBucketConfiguration=where)
            self.secrets = self.client("secretsmanager")
            self.secrets.create_secret(Name=SECRET, SecretString=json.dumps(self.secret()))
            self.secrets.create_secret(Name=SLACK_SECRET, SecretString=self.slack.url)
            self.subscribe()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def reset(self) -> None:
        """The sample as source, the secret as it was, no tables, nothing in the bucket."""
        self.source.reset(SAMPLE.read_bytes())
        for channel in (self.slack, self.heartbeat):
            channel.reset(channel.body)
        self.redshift.hook, self.redshift.settings = None, {}
        self.redshift.statements.clear()
        self.set_secret()
        self.secrets.put_secret_value(SecretId=SLACK_SECRET, SecretString=self.slack.url)
        self.received()
        if keys := [{"Key": key} for key in self.staged()]:
            self.s3.delete_objects(Bucket=BUCKET, Delete={"Objects": keys})
        with self.redshift.connect() as connection:
            schema = f'CREATE SCHEMA public AUTHORIZATION "{USER}"'
            connection.execute(f"DROP SCHEMA public CASCADE; {schema}".encode())

    def query(self, sql: str) -> list[dict[str, Any]]:
        """The rows that a statement gives, straight from PostgreSQL."""
        with self.redshift.connect() as connection:
            cursor = connection.cursor(row_factory=dict_row)
            return cursor.execute(sql.encode()).fetchall()

    def objects(self) -> dict[str, bytes]:
        """The objects in the bucket, by their keys."""
        get = self.s3.get_object
        return {key: get(Bucket=BUCKET, Key=key)["Body"].read() for key in self.staged()}

    def staged(self, end: str = "") -> list[str]:
        """The keys in the bucket that end so."""
        listed = self.s3.list_objects_v2(Bucket=BUCKET).get("Contents", [])
        return [item["Key"] for item in listed if item["Key"].endswith(end)]

    def subscribe(self) -> None:
        """Makes the SNS topic, with a queue as its subscriber."""
        sns = self.client("sns")
        self.topic = sns.create_topic(Name=TOPIC)["TopicArn"]
        self.sqs = self.client("sqs")
        self.queue = self.sqs.create_queue(QueueName=TOPIC)["QueueUrl"]
        queue = self.topic.replace(":sns:", ":sqs:")
        sns.subscribe(TopicArn=self.topic, Protocol="sqs", Endpoint=queue)

    def received(self) -> dict[str, list[Any]]:
        """What each channel has got since this was last asked."""
        slack = [json.loads(body) for body in self.slack.posted]
        got: dict[str, list[Any]] = {
            "slack": slack,
            "sns": [],
            "heartbeat": self.heartbeat.requests,
        }
        self.slack.posted, self.heartbeat.requests = [], []
        while some := self.sqs.receive_message(QueueUrl=self.queue).get("Messages"):
            for message in some:
                body = json.loads(message["Body"])
                got["sns"].append({name: body[name] for name in ("Subject", "Message")})
                handle = message["ReceiptHandle"]
                self.sqs.delete_message(QueueUrl=self.queue, ReceiptHandle=handle)
        return {channel: some for channel, some in got.items() if some}

    def alerts(self, *on: str) -> dict[str, Any]:
        """The section ``alerts`` of a configuration, with all channels of the sandbox."""
        channels = {
            "slack_webhook_secret": SLACK_SECRET,
            "sns_topic": self.topic,
            "heartbeat_url": self.heartbeat.url,
        }
        return channels | ({"on": list(on)} if on else {})

    def client(self, service: str, **options: Any) -> Any:
        """A boto3 client of the sandbox's AWS."""
        where = {"endpoint_url": self.aws, "region_name": REGION}
        keys = {"aws_access_key_id": "sandbox", "aws_secret_access_key": SECRET_KEY}
        return boto3.client(service, **where | keys | options)

    def secret(self) -> dict[str, Any]:
        """What the secret holds."""
        where = {"HOST": self.redshift.host, "PORT": self.redshift.port, "DATABASE": DATABASE}
        return where | {"USER": USER, "PASSWORD": PASSWORD}

    def set_secret(self, text: str = "", **changes: Any) -> None:
        """Makes the secret this text, or what it is with changes; None removes a value."""
        values = self.secret() | changes
        text = text or json.dumps(
            {name: values[name] for name in values if values[name] is not None}
        )
        self.secrets.put_secret_value(SecretId=SECRET, SecretString=text)

    def command(self, *arguments: str | Path) -> list[str]:
        """The program's command line; it reads the sandbox's source unless told otherwise."""
        if "--source" not in arguments:
            arguments = ("--source", self.source.url, *arguments)
        return [sys.executable, str(MAIN), *map(str, arguments)]

    def url_of(self, config: Path) -> str:
        """The URL that a configuration names, on the sandbox's source."""
        return self.source.at(yaml.safe_load(config.read_bytes())["source"]["url"])

    def child_environment(self, **changes: str | None) -> dict[str, str]:
        """An environment with nothing of this machine's AWS settings; None removes a variable."""
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
        environment = kept | self.environment | changes
        return {name: value for name, value in environment.items() if value is not None}

    @cached_property
    def forks(self) -> ForkServer:
        """Started for the first run that needs no Python of its own."""
        return self._stack.enter_context(ForkServer())

    def start(
        self,
        *arguments: str | Path,
        cwd: Path | None = None,
        plainly: bool = False,
        wrapper: tuple[str, ...] = (),
        patch: str = "",
        **changes: str | None,
    ) -> Process:
        """Starts the program, ``plainly`` or with a wrapper in a Python of its own, else forked.

        ``patch`` is Python that is run in the fork, among the program's names, before its main().
        """
        command, environment = self.command(*arguments), self.child_environment(**changes)
        if not plainly and not wrapper:
            return self.forks.start(command, cwd, environment, patch)
        return subprocess.Popen(
            [*wrapper, *command],
            cwd=cwd,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )

    def run(self, *arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
        """Runs the program to its end."""
        return self.finish(self.start(*arguments, **options))

    def finish(self, process: Process) -> subprocess.CompletedProcess[str]:
        """Waits for the end of a run and returns what it printed, which must hold no secret."""
        try:
            stdout, stderr = process.communicate(timeout=120)
        finally:
            process.kill()
        done = subprocess.CompletedProcess(process.args, process.wait(), stdout, stderr)
        secrets = (PASSWORD, SECRET_KEY, TOKEN, WEBHOOK, PING)
        shown = [secret for secret in secrets if secret in done.stdout + done.stderr]
        if shown:
            raise AssertionError(f"the program showed {shown}:\n{done.stdout}{done.stderr}")
        return done

    def connect(self) -> psycopg.Connection[tuple[Any, ...]]:
        """A connection through the proxy, as the user that the program also is."""
        where = f"host={self.redshift.host} port={self.redshift.port} dbname={DATABASE} user={USER}"
        tls = f"sslmode=verify-full sslrootcert='{self.redshift.ca}'"
        return psycopg.connect(f"{where} {tls}", password=PASSWORD, autocommit=True)

    def as_user(self, *statements: str) -> None:
        """Runs Redshift's SQL as the program's user: tables belong to their maker."""
        with self.connect() as connection:
            for statement in statements:
                connection.execute(statement.encode())

    def psql(self) -> list[str]:
        """The psql command that looks into the tables, past the proxy: this psql has no TLS."""
        binary = self.redshift.cluster.bin_path / "psql"
        return [str(binary), "-X", "-h", str(self.redshift.postgres.parent), "-U", USER, DATABASE]


def main() -> int:
    """Runs the program once in a new sandbox and shows what it loaded."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", action="store_true", help="leave everything running")
    parser.add_argument("--source", help="load this instead of the sample")
    parser.add_argument("--config", help="a pipeline other than conf/pipeline.yaml")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything is stopped
    given = {"--source": options.source, "--config": options.config}
    arguments = [text for option in given.items() if option[1] for text in option]
    config = Path(options.config or PIPELINE).resolve()
    with tempfile.TemporaryDirectory(prefix="sandbox-") as folder, Sandbox(Path(folder)) as sandbox:
        print("$ python", MAIN.relative_to(ROOT), *arguments, flush=True)
        if config in QUESTIONS and not options.source:
            arguments += ["--source", sandbox.url_of(config)]
        command = sandbox.command(*arguments)
        status = subprocess.run(command, env=sandbox.child_environment(), check=False).returncode
        if status == 0:
            show(sandbox, QUESTIONS.get(config, {}))
        if options.keep:
            keep(sandbox, command)
    return status


def show(sandbox: Sandbox, questions: dict[str, str]) -> None:
    """Prints the answers to the questions, as psql shows them."""
    for question, sql in questions.items():
        print(f"\n{question}\n{sql}\n", flush=True)
        # No pager; "—" for NULL, which psql otherwise shows as nothing.
        settings = ["-P", "pager=off", "-P", "null=—", "-P", "border=2", "-P", "footer=off"]
        subprocess.run([*sandbox.psql(), *settings, "-c", sql], check=True)


def keep(sandbox: Sandbox, command: list[str]) -> None:
    """Prints how to use the sandbox from another terminal, and waits for Ctrl-C."""
    print("\nEverything keeps running until you press Ctrl-C. In another terminal:\n")
    for name, value in sandbox.environment.items():
        print(f"export {name}={shlex.quote(value)}")
    print(f"\n{shlex.join(command)}\n{shlex.join(sandbox.psql())}")
    print("\nTo see here what alerts are sent, in the place of alerts: in a copy for --config:\n")
    print("alerts:", json.dumps(sandbox.alerts("failure", "success")), flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            time.sleep(1)
            for channel, got in sandbox.received().items():
                print(f"\n{channel} got", json.dumps(got, indent=2), flush=True)


if __name__ == "__main__":
    sys.exit(main())
