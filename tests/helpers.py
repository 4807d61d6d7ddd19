"""What the tests share: configurations, documents, runs; and the program's parts, one by one.

Whatever a test needs of the inside of main.py it gets from here, as records and rows.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import gzip
import io
import itertools
import json
import re
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, date, datetime
from decimal import Decimal
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any
from unittest import mock

import redshift_connector
import urllib3
import yaml

from redshift import make_certificate
from sandbox import (
    BUCKET,
    NO_PAUSES,
    PIPELINE,
    SAMPLE,
    SECRET,
    SLACK_SECRET,
    Handler,
    LocalServer,
    Process,
    Sandbox,
    Source,
    answer,
)
from sequra_challenge import main
from sequra_challenge.main import Config, Table
from sequra_challenge.main import ConfigError as ConfigError
from sequra_challenge.main import PipelineError as PipelineError

Answer = Callable[[BaseHTTPRequestHandler], None]
Done = CompletedProcess[str]
Record = dict[str, Any]
Records = list[Record]
Fetch = Callable[..., Records]
Load = Callable[..., Done]

LAUNCHES, CORES, AUDIT = "public.launches", "public.launch_cores", "public.etl_runs"
ROLE = "arn:aws:iam::123456789012:role/loader"
RUN_ID = r"\d{8}T\d{6}\.\d{6}Z-[0-9a-f]{8}"
JSON = ("--log-format", "json")
LOAD_TRIES = main.LOAD_TRIES
CANARY = "C4N4RY"  # what must never be seen
NULL = "NULL-7f"  # what stands for NULL in CSV, in the tests of that

# --- configurations ------------------------------------------------------------------------------

# conf/pipeline.yaml. Its scalars are texts, as the program takes them: `on` is not True.
SHIPPED: dict[str, Any] = yaml.load(PIPELINE.read_bytes(), yaml.BaseLoader)
SECTIONS: dict[str, Any] = {
    "source": {"url": "https://example.org/v5/launches"},
    "staging": {"bucket": "bucket", "prefix": "spacex"},
    "redshift": {"secret": "redshift/spacex"},
}


def load_config(path: Path) -> Config:
    """The configuration in a file, as the program reads it."""
    return main.load_config(path)


def config_of(tables: dict[str, Any], **sections: Any) -> Config:
    """A configuration with these tables; JSON is YAML as well."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pipeline.yaml"
        path.write_text(json.dumps(SECTIONS | sections | {"tables": tables}))
        return load_config(path)


def table_of(columns: dict[str, str], key: str | list[str] = "id", **settings: Any) -> Table:
    """The table public.things with these columns."""
    return config_of({"public.things": {"key": key, "columns": columns, **settings}}).tables[0]


def write_yaml(path: Path, document: dict[str, Any]) -> tuple[str, Path]:
    """Writes a configuration and returns the argument that names it."""
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return "--config", path


class REMOVED:
    """In the place of a value that is left out."""


def changed(document: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy with other values at these paths, whose keys are joined by " / "."""
    document = copy.deepcopy(document)
    for path, value in changes.items():
        *above, last = path.split(" / ")
        inner = document
        for key in above:
            inner = inner.setdefault(key, {})
        inner[last] = value
        if value is REMOVED:
            del inner[last]
    return document


def shipped(folder: Path, changes: Mapping[str, Any]) -> tuple[str, Path]:
    """conf/pipeline.yaml with other values at these paths, and the argument that names it."""
    return write_yaml(folder / "pipeline.yaml", changed(SHIPPED, changes))


def shipped_with(folder: Path, **sections: dict[str, Any]) -> tuple[str, Path]:
    """conf/pipeline.yaml with other settings in its sections, and the argument that names it."""
    document = {name: SHIPPED.get(name, {}) | sections.get(name, {}) for name in SHIPPED | sections}
    return write_yaml(folder / "pipeline.yaml", document)


THINGS: dict[str, Any] = {
    "public.things": {"key": "id", "columns": {"id": "integer not null", "name": "varchar(64)"}}
}


PAGED = {"records": "results", "next": "next"}  # settings for what page() answers


def arrays_config(
    folder: Path, url: str, tables: Any = None, redshift: Any = (), staging: Any = (), **source: Any
) -> Path:
    """A configuration for an API of things; a setting of the source that is None is left out."""
    source = {"url": url} | {name: value for name, value in source.items() if value is not None}
    sections = {
        "source": source,
        "staging": {"bucket": BUCKET, "prefix": "things"} | dict(staging),
        "redshift": {"secret": SECRET} | dict(redshift),
        "tables": tables or THINGS,
    }
    return write_yaml(folder / "things.yaml", sections)[1]


# --- documents and sources -----------------------------------------------------------------------


def launches() -> Records:
    """The sample: 30 launches with 38 cores."""
    document: Records = json.loads(SAMPLE.read_bytes())
    return document


def fewer_launches(count: int, cores: int | None = None) -> Records:
    """The sample without some of its launches with one core; with at most so many cores."""
    document = launches()
    single = [launch["id"] for launch in document if len(launch["cores"]) == 1]
    dropped = single[: len(document) - count]
    kept = [launch for launch in document if launch["id"] not in dropped]
    assert len(kept) == count
    for launch in kept if cores is not None else ():
        launch["cores"] = launch["cores"][:cores]
        cores = (cores or 0) - len(launch["cores"])
    return kept


def serve(sandbox: Sandbox, document: object) -> None:
    """Makes this the document of the sandbox's source."""
    sandbox.source.body = json.dumps(document).encode()


def responds(status: int, body: object = b"", **headers: str) -> Answer:
    """Answers with bytes as they are, or with anything else as JSON."""
    text = body if isinstance(body, bytes) else json.dumps(body).encode()
    return lambda handler: answer(handler, status, text, **headers)


def sends(*pieces: bytes) -> Answer:
    """Writes these bytes, status line and all, and closes the connection."""

    def respond(handler: BaseHTTPRequestHandler) -> None:
        handler.close_connection = True
        handler.wfile.write(b"".join(pieces))

    return respond


def drips(first: bytes, drop: bytes) -> Answer:
    """Sends the beginning of an answer, and then drop after drop until nobody listens."""

    def respond(handler: BaseHTTPRequestHandler) -> None:
        handler.close_connection = True
        with contextlib.suppress(OSError):
            handler.wfile.write(first)
            while True:
                handler.wfile.write(drop)
                threading.Event().wait(0.02)  # no sleep, which tests mock

    return respond


def json_lines(records: Records) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def things(*ids: int) -> Records:
    """Records of the API of things."""
    return [{"id": number, "name": f"a{number}"} for number in ids]


def page(records: Records, following: object = None) -> Answer:
    """Answers with a page of the API of things."""
    return responds(200, {"results": records, "next": following})


def with_tls(source: Source, folder: Path) -> tuple[str, Path]:
    """Gives the server TLS; returns its host and port, not by 127.0.0.1, and the authority."""
    certificate = make_certificate(folder, "localhost")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.certificate, certificate.key)
    source.server.socket = context.wrap_socket(source.server.socket, server_side=True)
    return f"localhost:{source.server.server_port}", certificate.ca


# --- runs ----------------------------------------------------------------------------------------


def loaded(sandbox: Sandbox, *arguments: str | Path, **options: Any) -> Done:
    """Runs the program, which must load."""
    done = sandbox.run(*arguments, **options)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    return done


@contextlib.contextmanager
def stalled(sandbox: Sandbox, *arguments: str | Path, **options: Any) -> Iterator[Process]:
    """A run that waits for the source, which answers nothing until this is left."""
    asked, over = threading.Event(), threading.Event()

    def stall(_: BaseHTTPRequestHandler) -> None:
        asked.set()
        over.wait(60)

    sandbox.source.answers = [stall]
    process = sandbox.start(*arguments, **options)
    assert asked.wait(60)
    try:
        yield process
    finally:
        over.set()


def set_webhook(sandbox: Sandbox, text: str) -> None:
    sandbox.secrets.put_secret_value(SecretId=SLACK_SECRET, SecretString=text)


def run_id(done: Done) -> str:
    """The id of a run, from its log in text or in JSON."""
    found = re.search(RUN_ID, done.stderr)
    assert found, done.stderr
    return found[0]


def messages(done: Done, level: str) -> list[str]:
    """Step and message of each entry of a level in the text log, where nothing else may be."""
    start = r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ (DEBUG|INFO|WARNING|ERROR) +\w+ (?=\w+: )"
    before, *found = re.split(start, done.stderr, flags=re.MULTILINE)
    assert not before, done.stderr
    assert not [text for text in found[1::2] if re.search(r"\n(?!  |\Z)", text)], done.stderr
    pairs = zip(found[::2], found[1::2], strict=True)
    return [text.rstrip("\n") for its_level, text in pairs if its_level == level]


def error(done: Done) -> str:
    """Step and message of the one error in the text log."""
    (text,) = messages(done, "ERROR")
    return text


def log_entries(done: Done, level: str = "") -> list[dict[str, Any]]:
    """What the JSON log has, of a level or of all."""
    logged = [json.loads(line) for line in done.stderr.splitlines()]
    return [entry for entry in logged if level in ("", entry["level"])]


def count(sandbox: Sandbox, table: str) -> int:
    """The number of rows in a table."""
    (row,) = sandbox.query(f"SELECT count(*) AS rows FROM {table}")
    return int(row["rows"])


def rows_of_things(sandbox: Sandbox) -> Records:
    return sandbox.query("SELECT id, name FROM public.things ORDER BY id")


def raw_response(sandbox: Sandbox) -> tuple[str, bytes]:
    """The URL of the only raw response in the bucket, and its text."""
    ((key, data),) = [item for item in sandbox.objects().items() if "/raw/" in item[0]]
    return f"s3://{BUCKET}/{key}", gzip.decompress(data)


def assert_failed(done: Done, *parts: str, status: int = 1) -> None:
    """The run ended with one error, the last line of the output, which says all of this."""
    assert done.returncode == status, done.stderr
    said = error(done)
    assert done.stderr.endswith(f"{said}\n")
    assert [part for part in parts if part not in said] == [], said
    assert status == 2 or "\n" not in said


# --- a pipeline of one small table ---------------------------------------------------------------

TABLE = "public.things"
COLUMNS = {"id": "varchar(8) not null", "n": "integer"}


class Things:
    """Loads records into public.things, in the sandbox."""

    def __init__(self, sandbox: Sandbox, folder: Path) -> None:
        self.sandbox, self.folder = sandbox, folder

    def config(self, redshift: Any = (), staging: Any = (), **table: Any) -> Path:
        tables = {TABLE: {"key": ["id"], "max_shrink": 1, "columns": COLUMNS} | table}
        return arrays_config(self.folder, self.sandbox.source.url, tables, redshift, staging)

    def serve(self, *records: tuple[Any, ...]) -> None:
        """Sets what the source answers: id and n of each record."""
        serve(self.sandbox, [dict(zip(("id", "n"), record, strict=True)) for record in records])

    def run(
        self, *records: tuple[Any, ...], options: dict[str, Any] | None = None, **settings: Any
    ) -> Done:
        """Runs the program with options of ``Sandbox.start``, and without pauses."""
        if records:
            self.serve(*records)
        options = {"patch": NO_PAUSES} | (options or {})
        return self.sandbox.run("--config", self.config(**settings), **options)

    def load(self, *records: tuple[Any, ...], **settings: Any) -> list[str]:
        """Runs the program, which must succeed; returns its warnings."""
        done = self.run(*records, **settings)
        assert done.returncode == 0, done.stderr
        return messages(done, "WARNING")

    def refused(self, *records: tuple[Any, ...], status: int = 1, **settings: Any) -> str:
        """Runs the program, which must fail and change no row; returns its error."""
        before = self.rows()
        done = self.run(*records, **settings)
        assert (done.returncode, self.rows()) == (status, before), done.stderr
        return error(done)

    def rows(self, columns: str = "id, n") -> list[tuple[Any, ...]]:
        """The rows, in order; none where there is no table."""
        with self.sandbox.redshift.connect() as connection:
            if connection.execute("SELECT to_regclass(%s)", [TABLE]).fetchone() == (None,):
                return []
            sql = f"SELECT {columns} FROM {TABLE} ORDER BY 1"
            return connection.execute(sql.encode()).fetchall()


# --- faults of AWS -------------------------------------------------------------------------------


def forward(
    handler: BaseHTTPRequestHandler, pool: urllib3.PoolManager, target: str, body: bytes
) -> None:
    """Passes a request on, and what is answered back."""
    given = pool.request(
        handler.command,
        target + handler.path,
        body=body,
        headers={name: value for name, value in handler.headers.items() if name != "Expect"},
        decode_content=False,
        redirect=False,
    )
    kept = {
        name.replace("-", "_"): value
        for name, value in given.headers.items()
        if name.lower() not in ("connection", "date", "server", "content-length")
    }
    length = given.headers.get("Content-Length", len(given.data))  # also of a HEAD's answer
    answer(handler, given.status, given.data, Content_Length=str(length), **kept)


class FlakyProxy(LocalServer):
    """An HTTP server in front of the sandbox's AWS.

    ``faults`` are answered first, one to each request with ``method``; None and what comes after
    the faults is passed on.
    """

    def __init__(self, target: str, *faults: Answer | None, method: str = "PUT") -> None:
        self.faults = list(faults)
        proxy, pool = self, urllib3.PoolManager()

        class Passes(Handler):
            protocol_version = "HTTP/1.1"

            def handle_request(self) -> None:
                self.length = int(self.headers.get("Content-Length", 0))
                fault = proxy.faults.pop(0) if proxy.faults and self.command == method else None
                if fault:
                    fault(self)
                else:
                    self.forward()

            def forward(self) -> None:
                forward(self, pool, target, self.rfile.read(self.length))

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_request

        super().__init__(Passes)


def relay(source: socket.socket, target: socket.socket, left: int = 1 << 60) -> None:
    """Sends on what comes, up to so many bytes, and then closes both."""
    with contextlib.suppress(OSError):
        while left and (data := source.recv(min(left, 1 << 16))):
            target.sendall(data)
            left -= len(data)
    for each in (source, target):
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)


def refusing(status: int, code: str) -> Answer:
    """An error as S3 answers it."""

    def respond(handler: Any) -> None:
        handler.rfile.read(handler.length)
        xml = f"<Error><Code>{code}</Code><Message>Sorry</Message></Error>"
        answer(handler, status, xml.encode(), Content_Type="application/xml")

    return respond


# Ten tries take a minute with botocore's pauses.
IMPATIENT = """
import botocore.retries.standard
botocore.retries.standard.ExponentialBackoff.delay_amount = lambda *_: 0
"""


@contextlib.contextmanager
def faulty_aws(
    sandbox: Sandbox, *faults: Answer | None, method: str = "PUT"
) -> Iterator[dict[str, str]]:
    """What leads a run to a FlakyProxy, all of whose faults it must meet."""
    with FlakyProxy(sandbox.aws, *faults, method=method) as proxy:
        yield {"AWS_ENDPOINT_URL": proxy.url}
        assert proxy.faults == []


def act_once(
    sandbox: Sandbox, start: str, act: Callable[[], object], when: str = "before"
) -> list[str]:
    """Acts before the first statement that starts so, or after it; returns what will hold it."""
    done: list[str] = []

    def hook(moment: str, sql: str) -> None:
        if not done and moment == when and sql.startswith(start):
            done.append(sql)
            act()

    sandbox.redshift.hook = hook
    return done


# --- tables and documents ------------------------------------------------------------------------


def column_name(path: str) -> str:
    return path.replace(".", "_")


def dig(value: Any, path: str) -> Any:
    for name in path.split("."):
        value = None if value is None else value.get(name)
    return value


def in_table(type_: str, value: Any) -> Any:
    """What a table must hold for a value of the JSON."""
    match type_.partition("(")[0].removesuffix(" not null"):
        case _ if value is None:
            return None
        case "timestamptz" | "timestamp":
            return datetime.fromisoformat(value)
        case "date":
            return date.fromisoformat(value)
        case "decimal":
            return Decimal(str(value))
        case "super":
            return canonical(value)
        case _:
            return value


def canonical(value: Any) -> str:
    """JSON as one text, in which true, 1 and "1" differ and the order of keys does not."""
    return json.dumps(value, sort_keys=True)


def assert_table(sandbox: Sandbox, name: str, table: dict[str, Any], document: Records) -> None:
    """Every value of every column is what the document has at the column's path."""
    expected = []
    for record in document:
        rows: list[Any] = [record]
        if "rows" in table:
            elements = dig(record, table["rows"]) or []
            plain = "value" in table["columns"]
            rows = [
                ({"value": element} if plain else element)
                | {table["parent"]: record, "position": position}
                for position, element in enumerate(elements, 1)
            ]
        expected += [
            {column_name(p): in_table(type_, dig(row, p)) for p, type_ in table["columns"].items()}
            for row in rows
        ]
    supers = [column_name(p) for p, type_ in table["columns"].items() if type_ == "super"]
    as_text = "".join(f', "{column}"::text' for column in supers)
    actual = [
        {column: value for column, value in row.items() if not column.startswith("_")}
        | {column: row[column] and canonical(json.loads(row[column])) for column in supers}
        for row in sandbox.query(f"SELECT *{as_text} FROM {name}")
    ]

    assert len(actual) == len(expected)
    of_actual, of_expected = (
        {tuple(row[column] for column in table["key"]): row for row in rows}
        for rows in (actual, expected)
    )
    assert len(of_actual) == len(actual), "double rows"
    assert of_actual == of_expected


# --- the program's parts -------------------------------------------------------------------------


def import_packages() -> None:
    """The large packages, which main.py imports after the configuration is read."""
    main.import_packages()


def sizes(**changes: Any) -> contextlib.AbstractContextManager[Any]:
    """The program with other sizes of its batches: READ_BYTES, CHUNK_RECORDS and so on."""
    return mock.patch.multiple(main, **changes) if changes else contextlib.nullcontext()


READ_BYTES, CHUNK_RECORDS = main.READ_BYTES, main.CHUNK_RECORDS


@contextlib.contextmanager
def without_pauses() -> Iterator[list[float]]:
    """The program's pauses, which are not made; but its clock goes on as if they were."""
    pauses: list[float] = []
    real = time.monotonic

    def monotonic() -> float:
        return real() + sum(pauses)

    with mock.patch.multiple(main.time, sleep=pauses.append, monotonic=monotonic):
        yield pauses


def without_log() -> mock._patch[Any]:
    """The program without its log."""
    return mock.patch.object(main.log, "disabled", True)


def batches_of(path: Path) -> Iterator[Records]:
    """The records of a file in batches, as the program reads them."""
    return main.read_records(path)


def read_records(path: Path) -> Iterator[Record]:
    """The records of a file one by one."""
    for batch in batches_of(path):
        yield from batch


def fetch_records(config: Config, folder: Path) -> Records:
    """What the program reads from the source of a configuration."""
    return list(itertools.chain(*main.read_records(main.extract(config, folder, {}))))


def csv_of(records: Iterable[Record], table: Table, null: str = NULL) -> str:
    """The CSV of a table that the program makes of records, which it gets in two batches."""
    records, names = list(records), main.FieldNames(set)
    columns = main.Columns(list)
    for batch in (records[:2], records[2:]):
        main.flatten(batch, table, columns, names)
    lines = main.to_csv(main.to_frame(table, columns), null)
    return b"".join(line + b"\n" for line in lines).decode()


def rows_of(records: Iterable[Record], table: Table, null: str = "NULL") -> list[list[str]]:
    """The rows as the CSV files have them."""
    return list(csv.reader(io.StringIO(csv_of(records, table, null), newline=""), strict=True))


def warn_of_drift(records: Iterable[Record], tables: tuple[Table, ...]) -> None:
    """Logs how the fields of records, transformed one by one, differ from the tables' columns."""
    names = main.FieldNames(set)
    for record in records:
        for table in tables:
            main.flatten([record], table, main.Columns(list), names)
    main.warn_of_drift(tables, names)


def parts_of(body: bytes, config: Config) -> Iterator[tuple[Table, list[str], int, str]]:
    """For each table its CSV files, the number of rows, and the text that stands for NULL."""
    # A thread may still write a part, when the transform has failed.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        source = Path(folder) / "source"
        source.write_bytes(body)
        stager = main.Stager(main.Run(config), Path(folder), None)
        main.stage_rows(source, stager)
        for table in config.tables:
            files = stager.parts[table.name]
            texts = [gzip.decompress(file.read_bytes()).decode() for file in files]
            yield table, texts, stager.run.rows[table.name], stager.run.null


def stage_chunks(chunks: Iterable[Records], folder: Path) -> None:
    """Makes the CSV files of things that come in chunks."""
    config = config_of(THINGS)
    (table,), stager = config.tables, main.Stager(main.Run(config), folder, None)
    for records in chunks:
        columns = main.Columns(list)
        main.flatten(records, table, columns, main.FieldNames(set))
        stager.write(table, main.to_frame(table, columns))
    stager.end_parts()


def refuse_shrinking(before: int, after: int, allow_shrink: bool = False, **table: Any) -> None:
    """Raises PipelineError where public.things must not go down to so many rows."""
    config = config_of({"public.things": THINGS["public.things"] | table})
    run = main.Run(config, allow_shrink)
    run.rows["public.things"] = after
    main.refuse_shrinking(run, config.tables[0], before)


def connect(login: dict[str, Any], seconds: int) -> Any:
    """A connection of the program with what a secret holds, for which it tries so long."""
    redshift = replace(config_of(THINGS).redshift, connect_seconds=seconds)
    with mock.patch.object(main, "read_secret", return_value=json.dumps(login)):
        return main.connect(redshift)


def is_tried_again(code: str) -> bool:
    """Whether the load is tried again after an error of Redshift with this code."""
    error = redshift_connector.ProgrammingError({"C": code, "M": "undone"})
    return isinstance(main.redshift_error(error), main.TransientError)


def forget_hidden() -> None:
    """Masks nothing any more."""
    main.hidden.clear()


hide, masked, shorten = main.hide, main.masked, main.shorten


# --- SQL -----------------------------------------------------------------------------------------

quoted, literal = main.quoted, main.literal
create_sql, doubles_sql = main.create_sql, main.doubles_sql


def run_of(config: Config) -> main.Run:
    """A run that began on 29 February 2024, and has the id 20240229T235958.000007Z-0a1b2c3d."""
    started = datetime(2024, 2, 29, 23, 59, 58, 7, UTC)
    return main.Run(config, started=started, token="0a1b2c3d")


def copy_sql(config: Config, table: Table) -> tuple[str, str]:
    """The statements that make a temporary table and fill it."""
    copy = main.copy_sql(run_of(config), table, "eu-west-1")
    return main.create_sql(table, temporary=True), copy


def swap_sql(config: Config, table: Table) -> tuple[str, str]:
    """The statements that replace a table's rows."""
    return main.delete_sql(table), main.insert_sql(run_of(config), table)
