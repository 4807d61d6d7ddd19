"""Load the records of a JSON API into Amazon Redshift: extract, transform, stage, load.

A run reads conf/pipeline.yaml, fetches JSON objects, flattens them into the configured tables,
stages each table as gzipped CSV in S3, copies the files into temporary tables, replaces (or
upserts) the rows of all tables in one transaction, and tells people how it went.

The file reads in the order in which the data flows: configuration, extract, transform, stage,
load, notify, run, main.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import errno
import gc
import gzip
import hashlib
import html
import io
import json
import logging
import math
import multiprocessing
import os
import random
import re
import secrets
import shutil
import signal
import socket
import ssl
import struct
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta
from decimal import Context, Decimal, DecimalException, Inexact, InvalidOperation
from functools import cached_property, partial
from itertools import chain
from logging.handlers import MemoryHandler
from multiprocessing.pool import AsyncResult, ThreadPool
from operator import itemgetter
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, ClassVar, TextIO
from urllib.parse import urljoin, urlsplit

import yaml

if TYPE_CHECKING:
    import boto3
    import botocore
    import numpy as np
    import pandas as pd
    import redshift_connector
    import requests
    import urllib3

DEFAULT_CONFIG = Path(__file__).resolve().parent.parent / "conf" / "pipeline.yaml"
HTTP_TIMEOUT = (10, 60)  # seconds: to connect, between two pieces of the answer
HTTP_TRIES = 6
LOAD_TRIES = 4
PROGRESS_SECONDS = 5
ALERT_SECONDS = 10  # for all that is done about alerts
READ_CHARACTERS = 1 << 17
WHITESPACE = " \t\r\n"  # of JSON
# Records are flattened while the objects made of a batch, some 2 MB, are in the processor's cache:
# it is a fifth faster than by the thousand. pandas gets them in chunks of some thousand.
BATCH_RECORDS = 100
CHUNK_BATCHES = 60
CSV_ROWS = 300  # quoted at a time
# What reading JSON raises: for a number of 5,000 digits, an exponent of 20, deep brackets, bytes
# that are not UTF-8, a gzip file that is damaged or ends early.
UNREADABLE = (ValueError, ArithmeticError, RecursionError, EOFError, OSError, zlib.error)
CHUNKS_AHEAD = 3  # of the thread that compresses and uploads
GZIP_LEVEL = 4
MARK = secrets.token_hex(8)  # random, so that it stands in no text

Upload = Callable[[str, Path], None]  # takes a table's name, or "raw", and a file
Columns = dict[str, Any]  # the values of a table's columns, by name
Fields = defaultdict[tuple[str, ...], set[str]]  # the names served in a table's objects, by path
Channel = Callable[[str, list[str]], None]  # sends a message's first line and its other lines

log = logging.getLogger("sequra_challenge")


class ConfigError(Exception):
    """The configuration is wrong: exit status 2."""


class PipelineError(Exception):
    """The run failed for a reason that its message explains: exit status 1."""


def import_packages() -> None:
    """Imports the large packages. --help and a wrong configuration answer without them."""
    global boto3, botocore, np, pd, redshift_connector, requests, urllib3
    import boto3.s3.transfer
    import botocore.session
    import numpy as np
    import pandas as pd
    import redshift_connector
    import requests
    import urllib3

    # The garbage collector passes by all that they have made, and comes less often: what a batch of
    # records is made of has no cycles.
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)


# --- configuration ------------------------------------------------------------------------------


NAME = r"[a-z_][a-z0-9_]{0,126}"  # what Redshift can hold: it folds names to lower case
PATH = r"[^.]+(\.[^.]+)*"
ROLE = r"arn:aws[\w-]*:iam::\d{12}:role/[\w+=.@/-]+"
SECRET = r"[\w/+=.@:-]+"
TYPE = (
    r"(boolean|smallint|integer|bigint|real|double precision|decimal\(\d{1,2},\d{1,2}\)"
    r"|varchar\(\d{1,5}\)|date|timestamp|timestamptz|super)( not null)?"
)


def setting(section: str, rule: Any, *default: Any) -> Any:
    """A field that the file sets in a section.

    ``rule`` is a pattern; in a list it stands for one or several values, in a dict for the values
    of any names. Without a default the setting is required.
    """
    return field(metadata={"section": section, "rule": rule, "default": default})


@dataclass(frozen=True)
class Column:
    """A column of a table, and the path of its value in the JSON of a row."""

    path: tuple[str, ...]
    type: str  # as Redshift writes it: "varchar(24)"
    not_null: bool = False

    @cached_property
    def name(self) -> str:
        """The column's name: ``links_patch_small`` of links.patch.small, ``ship_to`` of shipTo."""
        words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", "_".join(self.path))
        return re.sub(r"\W", "_", words).lower()

    @property
    def sql(self) -> str:
        """The column's definition in SQL."""
        return f"{quoted(self.name)} {self.type}" + " NOT NULL" * self.not_null

    @cached_property
    def kind(self) -> str:
        """The type without its arguments: ``varchar``."""
        return self.type.partition("(")[0]

    @cached_property
    def arguments(self) -> tuple[int, ...]:
        """The numbers in the type: ``(24,)`` of varchar(24), ``(10, 2)`` of decimal(10,2)."""
        return tuple(map(int, re.findall(r"\d+", self.type)))


@dataclass(frozen=True)
class Table:
    """A target table: a row for each record, or with ``rows`` for each element of that array."""

    name: str
    staging: str  # the name of the temporary table
    columns: tuple[Column, ...] = setting("tables", {"*": TYPE})
    key: tuple[str, ...] = setting("tables", [NAME])
    mode: str = setting("tables", "replace|upsert", "replace")
    rows: tuple[str, ...] = setting("tables", PATH, "")
    parent: str | None = setting("tables", r"(?!(position|value)$)[^.]+", None)
    sort_key: tuple[str, ...] = setting("tables", [NAME], ())
    dist_key: str | None = setting("tables", NAME, None)
    min_rows: int = setting("tables", r"\d{1,15}", 1)
    max_shrink: float = setting("tables", r"0|0?\.\d+|1(\.0)?", 0.2)

    @cached_property
    def objects(self) -> dict[tuple[str, ...], list[str]]:
        """The objects in a row that hold the values, by path, and the names to look up in each."""
        paths = {c.path[:depth] for c in self.columns for depth in range(1, len(c.path) + 1)}
        names = defaultdict[tuple[str, ...], list[str]](list)
        for path in sorted(paths, key=len):
            names[path[:-1]].append(path[-1])
        return names


@dataclass(frozen=True)
class Config:
    """What conf/pipeline.yaml says, checked."""

    name: str  # of the file: pipeline
    tables: tuple[Table, ...]
    url: str = setting("source", r".+")
    records: str | None = setting("source", PATH, None)
    next: str | None = setting("source", PATH, None)
    max_pages: int = setting("source", r"[1-9]\d{0,6}", 1000)
    max_wait: int = setting("source", r"\d{1,5}", 900)
    headers: dict[str, str] = setting("source", {"*": r"[^\r\n]+"}, {})  # noqa: RUF009
    bucket: str = setting("staging", r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
    prefix: str = setting("staging", r"[\w!.*()=-]+(/[\w!.*()=-]+)*")
    kms_key: str | None = setting("staging", r"[\w:/-]+", None)
    part_mb: int = setting("staging", r"[1-9]\d{0,3}", 64)  # compressed; COPY likes 1 MB to 1 GB
    secret: str = setting("redshift", SECRET)
    copy_role: str | None = setting("redshift", rf"{ROLE}(,{ROLE})*", None)
    audit_table: str | None = setting("redshift", rf"{NAME}\.{NAME}", "public.etl_runs")
    connect_seconds: int = setting("redshift", r"\d{1,5}", 120)
    statement_seconds: int = setting("redshift", r"[1-9]\d{0,5}", 3600)
    on: tuple[str, ...] = setting("alerts", ["failure|success"], ("failure",))
    slack_webhook_secret: str | None = setting("alerts", rf"(?!.*://){SECRET}", None)
    sns_topic: str | None = setting("alerts", r"arn:aws[\w-]*:sns:[\w-]+:\d{12}:[\w.-]+", None)
    heartbeat_url: str | None = setting("alerts", r"https?://[\w.:@%-]+([/?]\S*)?", None)


# What the load sets in each row, and what else Redshift has no room for in a table.
META_COLUMNS = (Column(("_run_id",), "varchar(64)"), Column(("_loaded_at",), "timestamptz"))
RESERVED = {"oid", "tableoid", "xmin", "cmin", "xmax", "cmax", "ctid", "insertxid", "deletexid"}
RESERVED |= {column.name for column in META_COLUMNS}
AUDIT_COLUMNS = (
    "table_name varchar(255), mode varchar(16), source varchar(4096), manifest varchar(4096), "
    "raw varchar(4096), sha256 varchar(64), rows_before bigint, rows_loaded bigint, "
    "started_at timestamptz"
)


def _rules(kind: type, section: str) -> dict[str, tuple[Any, ...]]:
    metadata = ((f.name, f.metadata) for f in fields(kind) if f.metadata)
    return {n: (m["rule"], *m["default"]) for n, m in metadata if m["section"] == section}


SCHEMA: dict[str, Any] = {
    section: (_rules(Config, section),) for section in ("source", "staging", "redshift", "alerts")
} | {"tables": ({"*": _rules(Table, "tables")},)}


class _Loader(yaml.SafeLoader):
    """YAML whose scalars are the texts that stand there, `on` and `1e3` too; no key twice."""

    yaml_implicit_resolvers: ClassVar = {  # type: ignore[misc]
        "<": yaml.SafeLoader.yaml_implicit_resolvers["<"]
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        for key, times in Counter(key.value for key, _ in node.value).items():
            if times > 1:
                raise yaml.MarkedYAMLError(None, None, f"{key!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def load_config(path: Path) -> Config:
    """Reads and checks the configuration.

    Raises ConfigError with all faults in one message, each with its path in the file.
    """
    try:
        document = yaml.load(path.read_bytes(), _Loader)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except Exception as error:  # a YAMLError, and for odd tags and depths whatever PyYAML meets
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    faults: list[str] = []
    sections = _checked(document, SCHEMA, "", faults)
    tables = [
        _table(name, f"staging_{number}", settings)
        for number, (name, settings) in enumerate(sections.pop("tables").items(), 1)
    ]
    faults += [f"tables.{table.name}{fault}" for table in tables for fault in _table_faults(table)]
    settings = {name: value for section in sections.values() for name, value in section.items()}
    settings["copy_role"] = settings["copy_role"] or os.environ.get("AWS_ROLE_ARN") or None
    for name, value in settings["headers"].items():
        variables = {v: os.environ.get(v, "") for v in re.findall(r"\$\{(\w+)\}", str(value))}
        sent = re.sub(r"\$\{(\w+)\}", lambda found: os.environ.get(found[1], ""), str(value))
        hide(sent, *variables.values())
        settings["headers"][name] = sent
        for variable in (v for v, text in variables.items() if not text):
            faults.append(f"source.headers.{name}: ${{{variable}}} is not set in the environment")
        if not re.fullmatch(r"[\w-]+: [ -~]*", f"{name}: {sent}", re.ASCII):
            faults.append(f"source.headers.{name}: has characters that no header can have")
    if faults:
        raise ConfigError("\n  ".join([f"{path} has {len(faults)} fault(s):", *faults]))
    return Config(path.stem, tuple(tables), **settings)


def _checked(given: Any, rule: Any, at: str, faults: list[str], *default: Any) -> Any:
    """What the file sets, with defaults and numbers; adds what is wrong with it to the faults."""
    is_open = not at.startswith(("alerts", "source.headers"))  # no secret, or part of one
    shown = repr(given) if is_open else "what is there"
    missing = given is None or str(given).lower() in ("", "null", "~")
    dot = f"{at}." if at else ""
    if isinstance(rule, dict):
        if not isinstance(given, dict):
            if not missing:
                faults.append(f"{at or 'the file'}: must be a mapping, not {shown}")
            given = {}
        if "*" in rule:
            if not given and not default:
                faults.append(f"{at}: missing")
            return {str(n): _checked(v, rule["*"], f"{dot}{n}", faults) for n, v in given.items()}
        expected = " or ".join(rule)
        faults += [f"{dot}{n}: unknown key, expected {expected}" for n in given if n not in rule]
        return {n: _checked(given.get(n), r, dot + n, faults, *d) for n, (r, *d) in rule.items()}
    if missing:
        if not default:
            faults.append(f"{at}: missing")
        # Null turns the audit table off; any other setting is then as if it were not there.
        return None if at == "redshift.audit_table" and given is not None else (*default, None)[0]
    if isinstance(rule, list):
        items = given if isinstance(given, list) else [given]
        return tuple(_checked(item, rule[0], at, faults) for item in items)
    if not isinstance(given, str) or not re.fullmatch(rule, given, re.ASCII):
        wrong = "unknown type" if rule is TYPE else f"must match {rule}, not"
        faults.append(f"{at}: {wrong} {shown}")
        return (*default, str(given))[0]
    return type(default[0])(given) if default and isinstance(default[0], int | float) else given


def _table(name: str, staging: str, settings: dict[str, Any]) -> Table:
    columns = []
    for path, text in settings["columns"].items():
        type_, _, not_null = str(text).partition(" not ")
        columns.append(Column(tuple(path.split(".")), type_, bool(not_null)))
    rows = tuple(settings["rows"].split(".")) if settings["rows"] else ()
    return Table(name, staging, **settings | {"columns": tuple(columns), "rows": rows})


def _table_faults(table: Table) -> Iterator[str]:
    if not re.fullmatch(rf"{NAME}\.{NAME}", table.name):
        yield f": must be schema.table, each matching {NAME}"
    for column in table.columns:
        at = f".columns.{'.'.join(column.path)}"
        if not re.fullmatch(NAME, column.name) or not all(column.path):
            yield f"{at}: the name of the column, {column.name!r}, must match {NAME}"
        if column.name in RESERVED:
            yield f"{at}: the name {column.name!r} is reserved"
        most = 38 if column.kind == "decimal" else 65_535
        if column.arguments and not 0 < column.arguments[0] <= most:
            yield f"{at}: {column.type}: {column.kind} takes 1 to {most}"
        if column.arguments and column.arguments[-1] > column.arguments[0]:
            yield f"{at}: {column.type}: the scale is larger than the precision"
    for name, paths in Counter(column.name for column in table.columns).items():
        if paths > 1:
            yield f".columns: {paths} paths give the column {name!r}"
    kinds = {column.name: column.kind for column in table.columns}
    for setting in ("key", "sort_key", "dist_key"):
        names = getattr(table, setting) or ()
        for name in [names] if isinstance(names, str) else names:
            if kinds.get(name, "super") == "super":
                yield f".{setting}: {name!r} is not a column that can be compared"
    if table.key == ():
        yield ".key: must name the columns that no two rows share"
    if bool(table.rows) != bool(table.parent):
        yield ": rows and parent go together"


# --- extract ------------------------------------------------------------------------------------


def public_url(url: str) -> str:
    """The URL without what may be secret in it: user, password, query and fragment."""
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise PipelineError(f"the source is not a URL: {error}") from None
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def extract(config: Config, folder: Path, figures: dict[str, Any]) -> Path:
    """Fetches the source (http, https, s3 or a local file) and returns the file that holds it."""
    parts = urlsplit(config.url)
    target = folder / "response"
    if parts.scheme in ("http", "https"):
        with http_session(config.headers) as session:
            if config.records or config.next:
                return download_pages(session, config, folder, figures)
            download(session, config.url, target, config.max_wait, figures)
    elif parts.scheme == "s3":
        with aws_errors("read", config.url):
            aws_client("s3").download_file(parts.netloc, parts.path.lstrip("/"), str(target))
    else:
        target = Path(config.url).expanduser()
        if not target.is_file():
            raise PipelineError(
                f"the source {public_url(config.url)} is not a file, nor a URL of http, https or s3"
            )
    return target


def http_session(headers: dict[str, str]) -> requests.Session:
    """A session that sends these headers, but not to another host after a redirect."""
    session = requests.Session()
    session.headers.update(headers)

    def keep_secrets(response: requests.Response, **_: Any) -> None:
        if is_elsewhere(response.url, urljoin(response.url, response.headers.get("Location", ""))):
            for name in headers:
                response.request.headers.pop(name, None)

    session.hooks["response"].append(keep_secrets)
    adapter = requests.adapters.HTTPAdapter()
    # Trusts what OpenSSL does, so also $SSL_CERT_FILE, beside the bundle that requests brings.
    adapter.init_poolmanager(1, 1, ssl_context=ssl.create_default_context())
    session.mount("https://", adapter)
    return session


def is_elsewhere(url: str, other: str) -> bool:
    """Whether what is secret for one URL must not be sent to the other."""
    redirects = requests.sessions.SessionRedirectMixin()
    return bool(redirects.should_strip_auth(url, other))  # type: ignore[no-untyped-call]


def download(
    session: requests.Session, url: str, target: Path, max_wait: float, figures: dict[str, Any]
) -> None:
    """GETs the URL into the file.

    Tried again after what Retry-After asks for, else with exponential back-off and jitter:
    connection errors, time-outs, a body that ends early, 500, 502, 503 and 504 a few times, and
    429 until ``max_wait`` seconds would have been waited.
    """
    before = figures.get("bytes", 0)
    tries, failures, give_up = 0, 0, time.monotonic() + max_wait
    while True:
        tries += 1
        wait = min(2**tries, 60) * random.uniform(0.5, 1)
        try:
            with session.get(url, stream=True, timeout=HTTP_TIMEOUT) as response:
                with contextlib.suppress(urllib3.exceptions.InvalidHeader, ValueError):
                    wait = urllib3.Retry().get_retry_after(response.raw) or wait
                response.raise_for_status()
                with target.open("wb") as file:
                    for chunk in response.iter_content(1 << 16):
                        file.write(chunk)
                        figures["bytes"] = before + file.tell()
                return
        except (requests.RequestException, urllib3.exceptions.HTTPError, ValueError) as error:
            reason, is_transient = error_text(error)
            failures += not reason.startswith("HTTP 429")
        if not is_transient or failures == HTTP_TRIES:
            raise PipelineError(f"GET {public_url(url)}: {reason}, attempt {tries}")
        at = datetime.now(UTC) + timedelta(seconds=wait)
        again = f"again in {wait:.1f} s, at {at:%H:%M:%SZ}"
        if time.monotonic() + wait > give_up:
            limit = f"source.max_wait, {max_wait} s"
            raise PipelineError(f"GET {public_url(url)}: {reason}; {again}, would be after {limit}")
        log.warning("%s, trying %s", reason, again)
        time.sleep(wait)


def error_text(error: Exception) -> tuple[str, bool]:
    """What a request failed for, and whether that may be otherwise the next time.

    Without the URL, which may be a secret and stands in the messages of requests.
    """
    if isinstance(error, requests.HTTPError):
        status = error.response.status_code
        return f"HTTP {status} {error.response.reason}", status in (429, 500, 502, 503, 504)
    if isinstance(
        error,
        requests.ConnectionError
        | requests.Timeout
        | requests.exceptions.ChunkedEncodingError
        | requests.exceptions.ContentDecodingError,
    ):
        cause: BaseException = error
        while inner := cause.__cause__ or cause.__context__:
            cause = inner
        is_transient = not isinstance(cause, ssl.SSLCertVerificationError)
        return f"{type(error).__name__}: {cause}", is_transient
    is_of_http = isinstance(
        error, requests.RequestException | urllib3.exceptions.HTTPError | ValueError
    )
    return type(error).__name__ if is_of_http else str(error), False


def download_pages(
    session: requests.Session, config: Config, folder: Path, figures: dict[str, Any]
) -> Path:
    """GETs page after page; returns a file of the records of all, one a line.

    A record that comes again on a later page, because the list moved meanwhile, is kept as it is
    there. Within one page it stays twice, for the check of the keys.
    """
    keys = [c.path for t in config.tables if not t.rows for c in t.columns if c.name in t.key]
    last_page: dict[str, int] = {}
    lines: list[tuple[str, int]] = []
    seen: set[str] = set()
    url = config.url
    with (folder / "pages").open("w") as file:
        while url:
            page = len(seen) + 1
            if url in seen or page > config.max_pages or is_elsewhere(config.url, url):
                rule = "was there before" if url in seen else "is on another host, or without TLS"
                rule = rule if page <= config.max_pages else "is one more than source.max_pages"
                raise PipelineError(f"page {page}, {public_url(url)}, {rule}")
            seen.add(url)
            download(session, url, folder / "response", config.max_wait, figures)
            records, url = read_page(config, url, folder / "response")
            for record in records:
                if not isinstance(record, dict):
                    raise PipelineError(f"page {page}: record is not an object: {shorten(record)}")
                key = dump_exactly([dig(record, path) for path in keys or [()]])
                last_page[key] = page
                lines.append((key, page))
                file.write(dump_exactly(record) + "\n")
            figures |= {"pages": page, "records": len(last_page)}
    with (folder / "pages").open() as pages, (folder / "response.ndjson").open("w") as file:
        for line, (key, page) in zip(pages, lines, strict=True):
            file.write(line if last_page[key] == page else "")
    return folder / "response.ndjson"


def read_page(config: Config, url: str, file: Path) -> tuple[list[Any], str]:
    """The records in one answer, and the URL of the next page, which is "" after the last."""
    text = b""
    try:
        with open_body(file) as body:
            text = body.read()
        page = json.loads(text, parse_float=Decimal)
    except UNREADABLE as error:
        begins = shorten(text[:200].decode(errors="replace"), 200)
        what = f"not JSON: {error}, it begins {begins}"
        raise PipelineError(f"GET {public_url(url)}: {what}") from None
    records = dig(page, config.records.split(".") if config.records else ())
    if not isinstance(records, list):
        what = f"no array at source.records: {shorten(page, 200)}"
        raise PipelineError(f"GET {public_url(url)}: {what}")
    following = dig(page, config.next.split(".")) if config.next else None
    try:
        following = urljoin(url, following) if following else ""
        urlsplit(following).port  # noqa: B018 - raises ValueError
        return records, following
    except (ValueError, TypeError, AttributeError):
        what = f"no URL at source.next: {shorten(following)}"
        raise PipelineError(f"GET {public_url(url)}: {what}") from None


def dump_exactly(value: Any) -> str:
    """JSON on one line in which each Decimal keeps its digits."""
    text = json.dumps(value, default=lambda number: f"{MARK}{number}{MARK}")
    return text.replace(f'"{MARK}', "").replace(f'{MARK}"', "")


def is_gzipped(path: Path) -> bool:
    """Whether the file begins as gzip does."""
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def open_body(path: Path) -> Any:
    """Opens a source as it was served; the raw responses in S3 are gzipped."""
    return gzip.open(path) if is_gzipped(path) else path.open("rb")


# --- transform ----------------------------------------------------------------------------------


# A number with a fraction becomes the nearest double, as most readers of JSON take it.
TO_SUPER = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, check_circular=False, separators=(",", ":"), default=float
)


class Unfit(Exception):
    """A value does not fit its column; the message is the rule that it breaks."""


def read_batches(path: Path) -> Iterator[list[dict[str, Any]]]:
    """Yields the records in a file, gzipped or not, as lists of bounded length.

    They are the objects of a JSON array, or of newline-delimited JSON. Numbers with a fraction or
    an exponent become Decimal, so that no digit is lost. Raises PipelineError for anything else,
    and where there is no record.
    """
    count = 0
    try:
        with io.TextIOWrapper(open_body(path), "utf-8-sig", newline="\n") as text:
            for elements in _read_elements(text):
                batch: list[dict[str, Any]] = []
                for record in elements:
                    count += 1
                    if not isinstance(record, dict):
                        raise PipelineError(f"record {count} is not an object: {shorten(record)}")
                    if len(batch) == BATCH_RECORDS:
                        yield batch
                        batch = []
                    batch.append(record)
                if batch:
                    yield batch
    except json.JSONDecodeError as error:
        near = shorten(error.doc[max(0, error.pos - 40) : error.pos + 40])
        raise PipelineError(f"not JSON after record {count}: {error.msg}, near {near}") from None
    except UNREADABLE as error:
        raise PipelineError(f"not readable after record {count}: {error}") from None
    if not count:
        raise PipelineError("the source is empty, there is nothing to load")


def _read_elements(text: TextIO) -> Iterator[Iterable[Any]]:
    decoder = json.JSONDecoder(parse_float=Decimal)
    pieces = iter(partial(text.read, 1000), "")
    begins = next(filter(None, (piece.lstrip(WHITESPACE) for piece in pieces)), "")
    text.seek(0)
    if begins[:1] == "[":
        yield from _read_array(text, decoder)
    elif begins[:1] == "{":
        while lines := text.readlines(READ_CHARACTERS):
            yield (decoder.decode(line) for line in lines if line.strip(WHITESPACE))
    elif begins:
        what = "HTML or XML" if begins[:1] == "<" else "no JSON array"
        raise PipelineError(f"the source is {what}, it begins {shorten(begins, 200)}")


def _read_array(text: TextIO, decoder: json.JSONDecoder) -> Iterator[list[Any]]:
    skip: Any = re.compile(f"[{WHITESPACE}]*").match
    elements = list[Any]()
    buffer, start, wanted, before, several = "", 0, READ_CHARACTERS, "[", True
    while True:
        try:
            mark = skip(buffer, start).end()
            first = skip(buffer, mark + (buffer[mark] == before)).end()
            if buffer[first] == "]" and (before == "[" or first == mark):
                break
            if first == mark:
                raise json.JSONDecodeError(f"Expecting {before!r}", buffer, mark)
            decoded, end = _decode(buffer, first, decoder, several)
        except (IndexError, *UNREADABLE) as error:
            yield elements
            elements = []
            # More text can only mend what is wrong at the end: in a string without an end, or in
            # a token of at most 12 characters, \ud83d\ude80.
            at_end = isinstance(error, IndexError)
            position = len(buffer) if at_end else getattr(error, "pos", -math.inf)
            if position < len(buffer) - 12 and not str(error).startswith("Unterminated"):
                raise
            more = text.read(wanted)
            if not more and buffer.rstrip(WHITESPACE).endswith("]"):
                raise
            if not more:
                raise json.JSONDecodeError("it ends early", buffer, len(buffer)) from None
            # Doubled, so that one huge record is not scanned from its start for every piece.
            buffer, start, wanted, several = buffer[start:] + more, 0, wanted * 2, not buffer
        else:
            elements += decoded
            start, wanted, before = end, READ_CHARACTERS, ","
            if several := len(decoded) > 1:
                yield elements
                # What is left is the beginning of an element: to try it would be in vain.
                elements, buffer, start = [], buffer[end:] + text.read(READ_CHARACTERS), 0
    yield elements
    rest = buffer[first + 1 :]
    while rest:
        if rest.strip(WHITESPACE):
            raise json.JSONDecodeError("Extra data after the array", rest, 0)
        rest = text.read(READ_CHARACTERS)


def _decode(
    buffer: str, first: int, decoder: json.JSONDecoder, several: bool
) -> tuple[list[Any], int]:
    """The element that begins there, or several in one call, and where they end.

    Several are faster: they share the texts of their keys. They end where another begins as the
    first does, `{"id":`. If that stands inside of an element, what is before it is no array.
    """
    if several:
        begins = buffer[first : buffer.find(":", first) + 1]
        comma = buffer.rfind(",", first, buffer.rfind(begins))
        if comma > 0:
            with contextlib.suppress(*UNREADABLE):
                return decoder.decode(f"[{buffer[first:comma]}]"), comma
    element, end = decoder.raw_decode(buffer, first)
    return [element], end


def shorten(value: Any, length: int = 80) -> str:
    """A value as JSON for a message, cut to a length, safe to print."""

    def default(other: Any) -> Any:
        return float(other) if isinstance(other, Decimal) else str(other)

    try:
        text = json.dumps(value, ensure_ascii=False, default=default)
        text = text if text.isprintable() else json.dumps(value, default=default)
    except (TypeError, ValueError, RecursionError):
        text = f"a deeply nested {type(value).__name__}"
    text = str(value) if isinstance(value, Decimal) else text
    return text if len(text) <= length else text[:length] + "…"


def flatten(records: list[dict[str, Any]], table: Table, columns: Columns, served: Fields) -> None:
    """Appends the rows in the records to the columns: for each row the value at each path.

    Values for super become JSON, the others stay as they are. Adds the names of all fields it
    meets to ``served``. Raises PipelineError for the first value that is no object where one is
    expected, is null where it must not be, or is no JSON that super holds.
    """
    rows = explode(records, table)
    if not rows:
        return
    values: dict[tuple[str, ...], Sequence[Any]] = {(): rows}

    def checked_at(path: tuple[str, ...], check: Callable[[Any], Any]) -> Any:
        return checked(check, values[path], table, path, lambda n: _row_text(table, rows[n]))

    for path, names in table.objects.items():
        objects = checked_at(path, _objects)
        served[table.name, *path].update(*objects)
        # One look at each object is faster than one for each name. Of a single name it would give
        # no tuple, so that the first stands there twice.
        wanted = (*names, names[0])
        try:
            found = list(map(itemgetter(*wanted), objects))
        except KeyError:
            found = [tuple(map(one.get, wanted)) for one in objects]
        paths = [(*path, name) for name in wanted]
        values |= zip(paths, zip(*found, strict=True), strict=True)
    for column in table.columns:
        in_key = column.name in table.key
        if in_key or column.not_null:
            checked_at(column.path, partial(_present, in_key))
        is_super = column.kind == "super"
        columns[column.name] += checked_at(column.path, _super) if is_super else values[column.path]


def transform(columns: Columns, table: Table) -> Columns:
    """Makes typed columns of the values: pandas arrays, and of texts lists.

    Raises PipelineError for the first value that does not fit its column, and for a double key.
    """

    def named(number: int) -> str:
        return _key_text({name: columns[name][number] for name in table.key})

    typed = {}
    for column in table.columns:
        values = columns[column.name]
        typed[column.name] = checked(partial(convert, column), values, table, column.path, named)
    keys = pd.DataFrame({name: typed[name] for name in table.key})
    _refuse_doubles(table, keys[keys.duplicated()].head(5).to_dict("records"))
    return typed


def checked(
    check: Callable[[Any], Any],
    values: Sequence[Any],
    table: Table,
    path: tuple[str, ...],
    named: Callable[[int], str],
) -> Any:
    """What the check makes of the values at a path.

    Raises PipelineError for the first value that is unfit, with what ``named`` says of its row.
    """
    try:
        return check(values)
    except Unfit:
        for number, value in enumerate(values):
            try:
                check([value])
            except Unfit as unfit:
                raise _misfit(table, named(number), path, value, unfit) from None
        raise


def explode(records: list[dict[str, Any]], table: Table) -> list[dict[str, Any]]:
    """The rows of a table in the records, as objects.

    These are the records themselves, or with ``rows`` the elements of that array, each with its
    ``position`` from 1 and its record under the name ``parent``. Where the table has a column for
    the path ``value``, the element itself becomes it: for arrays of ids.
    """
    if not table.rows:
        return records
    plain = any(column.path == ("value",) for column in table.columns)
    rows = []
    for record in records:
        for depth in range(1, len(table.rows) + 1):
            elements = dig(record, table.rows[:depth])
            kind, what = (dict, "object") if depth < len(table.rows) else (list, "array")
            if not isinstance(elements, kind | NoneType):
                unfit = Unfit(f"is not an {what}")
                named = _row_text(table, {table.parent: record})
                raise _misfit(table, named, (), elements, unfit)
        for position, element in enumerate(elements or [], 1):
            row = {"position": position, table.parent: record}
            if not plain and not isinstance(element, dict):
                unfit = Unfit("is not an object")
                raise _misfit(table, _row_text(table, row), (), element, unfit)
            rows.append(({"value": element} if plain else element) | row)
    return rows


def dig(value: Any, path: Iterable[str]) -> Any:
    """The value at a path in nested objects; None where the path ends early."""
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def source_path(table: Table, path: tuple[str, ...]) -> str:
    """A path of a table as the source has it; "" for what the source does not have."""
    if not table.rows:
        return ".".join(path)
    if path[:1] == (table.parent,):
        return ".".join(path[1:])
    return "" if path == ("position",) else ".".join((".".join(table.rows) + "[]", *path))


def _misfit(
    table: Table, named: str, path: tuple[str, ...], value: Any, rule: Unfit
) -> PipelineError:
    where = source_path(table, path)
    return PipelineError(f"{table.name}, {named}: {where}: {shorten(value)} {rule}")


def _row_text(table: Table, row: Any) -> str:
    key = {c.name: dig(row, c.path) for c in table.columns if c.name in table.key}
    return shorten(row) if all(value is None for value in key.values()) else _key_text(key)


def _refuse_doubles(table: Table, keys: list[dict[Any, Any]]) -> None:
    if keys:
        shown = "; ".join(map(_key_text, keys))
        raise PipelineError(f"{table.name}: more than one row has the key {shown}")


def _key_text(key: dict[Any, Any]) -> str:
    return ", ".join(f"{name}={shorten(value)}" for name, value in key.items())


def _only(values: Sequence[Any], what: str, *types: type) -> list[Any]:
    """The values that are not null. Unfit unless of these very types: True is no integer."""
    if not set(map(type, values)) <= {NoneType, *types}:
        raise Unfit(f"is not {what}")
    return [value for value in values if value is not None]


def _objects(values: Sequence[Any]) -> list[dict[str, Any]]:
    _only(values, "an object", dict)
    return [{} if value is None else value for value in values]


def _present(in_key: bool, values: Sequence[Any]) -> None:
    if None in values:
        raise Unfit("in the key" if in_key else "in a column that is not null")


def convert(column: Column, values: list[Any]) -> Any:
    """The values of a column as a typed pandas array, or a list of texts as COPY reads them.

    Raises Unfit with the rule that a value breaks. Only numbers for real, double precision and in
    super are rounded, to the nearest that these hold.
    """
    match column.kind:
        case "boolean":
            _only(values, "a boolean", bool)
            return pd.array(values, dtype="boolean")
        case "smallint" | "integer" | "bigint":
            limit = 1 << {"smallint": 15, "integer": 31, "bigint": 63}[column.kind]
            numbers = _only(values, "an integer", int)
            if numbers and not -limit <= min(numbers) <= max(numbers) < limit:
                raise Unfit(f"is outside {-limit} to {limit - 1}")
            return pd.array(values, dtype="Int64")
        case "real" | "double precision":
            kind: Any = np.float32 if column.kind == "real" else np.float64
            with np.errstate(over="ignore"):
                for number in _only(values, "a number", int, Decimal):
                    size = abs(kind(float(Decimal(number))))
                    if number and not np.finfo(kind).tiny <= size <= np.finfo(kind).max:
                        raise Unfit(f"is outside the range of {column.kind}")
            return pd.array([None if v is None else float(v) for v in values], dtype="Float64")
        case "decimal":
            _only(values, "a number", int, Decimal)
            precision, scale = column.arguments
            values = [None if v is None else _decimal(precision, scale, v) for v in values]
        case "varchar":
            _check_texts(_only(values, "a text", str), column.arguments[0])
        case kind if kind in TIMES:
            values = _times(values, kind)
    return values


def _decimal(precision: int, scale: int, value: Any) -> str:
    exact = Context(prec=precision, traps=[Inexact, InvalidOperation])
    try:
        return format(exact.quantize(Decimal(value), Decimal(1).scaleb(-scale)), "f")
    except DecimalException:
        raise Unfit(f"does not fit decimal({precision},{scale}) exactly") from None


def _check_texts(texts: list[str], most: int) -> None:
    together = "".join(texts)
    if "\0" in together:
        raise Unfit("has a NUL character, which Redshift cannot hold")
    try:
        sizes = map(len, texts if together.isascii() else map(str.encode, texts))
        size = max(sizes, default=0)
    except UnicodeEncodeError:
        raise Unfit("has a lone surrogate, which UTF-8 cannot hold") from None
    if size > most:
        raise Unfit(f"has a text of {size} bytes, at most {most} fit")


def _super(values: Sequence[Any]) -> list[str | None]:
    """The values as JSON. One call for all is several times as fast as one for each."""
    marked = [MARK] * (2 * len(values))
    marked[::2] = values
    try:
        text = TO_SUPER.encode(marked)
    except (ValueError, RecursionError) as error:  # NaN, Infinity; nested too deeply
        raise Unfit(f"is not JSON that super holds: {error}") from None
    _check_texts([text], sys.maxsize)
    texts = f"{text[1:-1]},".split(f',"{MARK}",')[:-1]
    # The search for six characters would be slow where there is no backslash.
    has_nul = "\\" in text and "\\u0000" in text
    if has_nul or max(map(len, texts), default=0) > 65_535 // 4:
        _check_texts(texts, 16 << 20)
        _check_texts(list(_texts_in(list(values))), 65_535)
    return [None if v is None else text for v, text in zip(values, texts, strict=True)]


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from _texts_in(inner)


DATE = r"\d{4}-\d\d-\d\d"
TIME = DATE + r"[T ]\d\d:\d\d:\d\d(\.\d{1,6})?"
# For each type what its texts must match, and an example.
TIMES = {
    "date": (DATE, "2006-03-24"),
    "timestamp": (TIME, "2006-03-24T22:30:00.123456, without an offset"),
    "timestamptz": (TIME + r"(Z|[+-]\d\d(:?\d\d)?)", "2006-03-24T22:30:00.123456Z, with an offset"),
}


def _times(values: list[Any], kind: str) -> list[str | None]:
    """ISO 8601 texts, with microseconds and in UTC, as COPY reads them with TIMEFORMAT 'auto'."""
    pattern, example = TIMES[kind]
    what = f"a {kind} such as {example}"
    if not all(map(re.compile(pattern, re.ASCII).fullmatch, _only(values, what, str))):
        raise Unfit(f"is not {what}")
    try:
        times = pd.to_datetime(values, format="ISO8601", utc=True)
    except ValueError:
        raise Unfit("does not exist in the calendar") from None
    years = times.year
    if ((years < 1) | (years > 9999)).any():
        raise Unfit("is outside the years 1 to 9999")
    moments = times.tz_localize(None).to_numpy("datetime64[us]")
    texts = np.datetime_as_string(moments, unit="D" if kind == "date" else "us").astype(object)
    texts += "Z" if kind == "timestamptz" else ""
    texts[times.isna()] = None
    return list(texts)


def warn_of_drift(tables: tuple[Table, ...], names: Fields) -> None:
    """Logs the fields that no table loads, and those that no record has."""
    served = {
        source_path(table, (*path, name))
        for table in tables
        for path in table.objects
        for name in names[table.name, *path]
    }
    columns = [(table, column.path) for table in tables for column in table.columns]
    # A table without rows has not looked at any field.
    met = [table for table, path in columns if source_path(table, path) in served]
    wanted = {source_path(table, path) for table, path in columns if table in met}
    known = {source_path(t, path[: n + 1]) for t, path in columns for n in range(len(path))}
    known |= {".".join(table.rows[: n + 1]) for table in tables for n in range(len(table.rows))}
    for path in sorted(served - known - {""}):
        shown = path if path.isprintable() else shorten(path)
        log.warning("the source has a field that no table loads: %s", shown)
    for path in sorted(wanted - served - {""}):
        log.warning("no record has the field %s, so its column is null", path)


# --- stage --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One run of a pipeline, with a folder for its files. Ids sort by time."""

    config: Config
    folder: Path
    allow_shrink: bool = False
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    token: str = field(default_factory=lambda: secrets.token_hex(4))

    @property
    def id(self) -> str:
        """Such as ``20261122T204327.031323Z-e33fbe39``."""
        return f"{self.started:%Y%m%dT%H%M%S.%fZ}-{self.token}"

    @property
    def null(self) -> str:
        r"""What stands for NULL in the CSV files; a text might be the usual \N, but not this."""
        return f"NULL-{self.token}"

    def url(self, name: str, file: str) -> str:
        """Where the run stages a file of a table, or of the raw response."""
        day = f"{self.started:%Y/%m/%d}"
        return f"s3://{self.config.bucket}/{self.config.prefix}/{name}/{day}/{self.id}/{file}"


class PartWriter:
    """Writes the rows of a table into gzipped CSV parts, each with a header; hands on full ones."""

    def __init__(self, table: Table, run: Run, upload: Upload | None) -> None:
        self.table, self.run, self._upload = table, run, upload
        self.parts: list[Path] = []
        self._begin_part()

    def _begin_part(self) -> None:
        self.parts.append(self.run.folder / f"{self.table.name}.{len(self.parts) + 1:04}.csv.gz")
        self._file = gzip.GzipFile(self.parts[-1], "wb", GZIP_LEVEL, mtime=0)
        self._file.write(",".join(column.name for column in self.table.columns).encode() + b"\n")

    def write(self, csv: bytes) -> None:
        """Appends lines, to a new part where the last is large enough."""
        if self.parts[-1].stat().st_size > self.run.config.part_mb << 20:
            self.close()
            self._begin_part()
        self._file.write(csv)

    def close(self) -> None:
        """Ends the last part."""
        self._file.close()
        if self._upload:
            self._upload(self.table.name, self.parts[-1])


def csv_rows(columns: Columns, null: str) -> bytes:
    """The rows of typed columns as CSV, in which every text is quoted and NULL is not.

    The csv module cannot do that, and before Python 3.13 leaves a lone carriage return unquoted.
    """

    def quote(texts: list[str | None]) -> list[str]:
        if '"' in "".join(filter(None, texts)):
            texts = [text and text.replace('"', '""') for text in texts]
        return [null if text is None else f'"{text}"' for text in texts]

    def cells(column: Any) -> Iterable[str]:
        if isinstance(column, list):
            # Some at a time, so that they are still in the cache when the rows are made of them.
            slices = (column[n : n + CSV_ROWS] for n in range(0, len(column), CSV_ROWS))
            return chain.from_iterable(map(quote, slices))
        return map(str, column.to_numpy(object, na_value=null))

    rows = map(",".join, zip(*map(cells, columns.values()), strict=True))
    # One by one: in a text of all, a single emoji would make each character take four bytes.
    return b"\n".join([*map(str.encode, rows), b""])


def read_columns(body: Path, tables: tuple[Table, ...], served: Fields) -> Iterator[list[Columns]]:
    """Yields for some thousand records at a time the columns of each table."""

    def no_rows() -> list[Columns]:
        return [{column.name: [] for column in table.columns} for table in tables]

    columns = no_rows()
    for number, records in enumerate(read_batches(body), 1):
        for table, of_table in zip(tables, columns, strict=True):
            flatten(records, table, of_table, served)
        if number % CHUNK_BATCHES == 0:
            yield columns
            columns = no_rows()
    yield columns


def transform_to_parts(
    run: Run, body: Path, upload: Upload | None, rows: dict[str, int]
) -> list[PartWriter]:
    """Reads the source and writes the rows of all tables, chunk by chunk, into CSV parts.

    The parts are compressed and uploaded in a thread beside the parsing: zlib and the network
    release the GIL. Counts the rows of each table.
    """
    served = Fields(set)
    staged = [PartWriter(table, run, upload) for table in run.config.tables]
    rows |= {table.name: 0 for table in run.config.tables}
    with ThreadPool(1) as thread:
        ahead: deque[AsyncResult[None]] = deque()

        def hand_on(call: Callable[..., None], *arguments: Any) -> None:
            ahead.append(thread.apply_async(call, arguments))
            if len(ahead) > CHUNKS_AHEAD:
                ahead.popleft().get()

        for columns in read_columns(body, run.config.tables, served):
            for parts, of_table in zip(staged, columns, strict=True):
                typed = transform(of_table, parts.table)
                hand_on(parts.write, csv_rows(typed, run.null))
                rows[parts.table.name] += len(typed[parts.table.key[0]])
        for parts in staged:
            hand_on(parts.close)
        for result in ahead:
            result.get()
    warn_of_drift(run.config.tables, served)
    return staged


_aws_lock = threading.Lock()  # boto3 makes clients for one thread at a time


def aws_client(service: str, region: str | None = None) -> Any:
    """A client in $AWS_REGION, the profile's region, or else the region of the EC2 instance."""
    session = botocore.session.get_session()
    region = region or os.environ.get("AWS_REGION") or session.get_config_variable("region")
    region = region or botocore.utils.IMDSRegionProvider(session).provide()
    if not region:
        raise PipelineError("no AWS region: set AWS_REGION, or a region in the AWS profile")
    retries = botocore.config.Config(retries={"mode": "standard"})
    with _aws_lock:
        return boto3.client(service, region_name=region, config=retries)


@contextlib.contextmanager
def aws_errors(action: str, resource: str) -> Iterator[None]:
    """Turns what boto3 raises into a PipelineError: what could not be done to what, and as whom."""
    try:
        yield
    except (
        botocore.exceptions.BotoCoreError,
        botocore.exceptions.ClientError,
        boto3.exceptions.Boto3Error,
    ) as error:
        identity = ""
        with contextlib.suppress(Exception):
            identity = f" as {aws_client('sts').get_caller_identity()['Arn']}"
        raise PipelineError(f"cannot {action} {resource}{identity}: {error}") from None


def upload(run: Run, s3: AsyncResult[Any], figures: dict[str, int], name: str, file: Path) -> None:
    """Uploads a file of the run, and deletes it here, so that the disk never holds all parts."""
    encryption = {"ServerSideEncryption": "AES256"}
    if run.config.kms_key:
        encryption = {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": run.config.kms_key}
    threadless = boto3.s3.transfer.TransferConfig(use_threads=False)  # a signal ends it at once

    def count(uploaded: int) -> None:
        figures["bytes"] += uploaded

    url = run.url(name, file.name)
    with aws_errors("write", url):
        bucket, key = urlsplit(url).netloc, urlsplit(url).path[1:]
        s3.get().upload_file(str(file), bucket, key, encryption, count, threadless)
    figures["files"] += 1
    file.unlink()


def compress_raw(run: Run, body: Path) -> tuple[Path, str]:
    """Gzips the raw response; returns the file, and the SHA-256 of what is in it."""
    raw = run.folder / ("response.ndjson.gz" if body.suffix == ".ndjson" else "response.json.gz")
    digest = hashlib.sha256()
    with open_body(body) as response, gzip.open(raw, "wb", GZIP_LEVEL) as target:
        # Large pieces: beside the parsing, each waits for the GIL.
        for piece in iter(partial(response.read, 1 << 20), b""):
            digest.update(piece)
            target.write(piece)
    return raw, digest.hexdigest()


def stage(
    run: Run, raw: Path, sha256: str, staged: list[PartWriter], upload: Upload
) -> dict[str, str]:
    """Uploads the raw response and the manifests; returns where the rows come from."""
    upload("raw", raw)
    for parts in staged:
        urls = [run.url(parts.table.name, part.name) for part in parts.parts]
        manifest = run.folder / "manifest.json"
        entries = [{"url": url, "mandatory": True} for url in urls]
        manifest.write_text(json.dumps({"entries": entries}, indent=2))
        upload(parts.table.name, manifest)
    return {"source": public_url(run.config.url), "raw": run.url("raw", raw.name), "sha256": sha256}


# --- load ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Credentials:
    """How to reach Redshift."""

    host: str
    port: int
    database: str
    user: str
    password: str = field(repr=False)


def read_secret(secret: str) -> str:
    """The text of a secret in Secrets Manager."""
    with aws_errors("read", f"the secret {secret}"):
        manager = aws_client("secretsmanager")
        return str(manager.get_secret_value(SecretId=secret).get("SecretString"))


def read_credentials(secret: str) -> Credentials:
    """Reads the secret: the fields of Credentials in upper or lower case, as JSON.

    AWS's own Redshift secrets say dbname and username. Raises PipelineError when it is something
    else; its values are never shown.
    """
    try:
        values = {name.lower(): value for name, value in json.loads(read_secret(secret)).items()}
    except (ValueError, TypeError, AttributeError):
        raise PipelineError(f"the secret {secret} is not a JSON object") from None
    values = {"database": values.get("dbname"), "user": values.get("username")} | values
    names = [field.name for field in fields(Credentials)]
    missing = [name.upper() for name in names if values.get(name) in (None, "")]
    if missing:
        raise PipelineError(f"the secret {secret} lacks {', '.join(missing)}")
    if not re.fullmatch(r"\d{1,5}", str(values["port"])) or int(values["port"]) > 65_535:
        raise PipelineError(f"the secret {secret} has a PORT that is no number up to 65535")
    if not re.fullmatch(r"[\w-]{1,63}(\.[\w-]{1,63})*", str(values["host"]), re.ASCII):
        raise PipelineError(f"the secret {secret} has a HOST that is no host name")
    values = {name: str(values[name]) for name in names}
    hide(values["password"])
    return Credentials(**values | {"port": int(values["port"])})


def quoted(*names: str) -> str:
    """Identifiers in quotes, separated by commas; the dot of schema.table stays between two."""
    return ", ".join('"' + name.replace(".", '"."') + '"' for name in names)


def literal(text: str) -> str:
    """A text as an SQL literal. Redshift reads a backslash in one as an escape, PostgreSQL not."""
    if "\\" in text:
        raise PipelineError(f"{text!r} has a backslash, which a name in SQL cannot have")
    return "'" + text.replace("'", "''") + "'"


def create_sql(table: Table) -> str:
    """CREATE TABLE for a target that does not exist yet."""
    columns = ",\n  ".join(column.sql for column in (*table.columns, *META_COLUMNS))
    sql = f"CREATE TABLE IF NOT EXISTS {quoted(table.name)} (\n  {columns}\n)"
    if table.dist_key:
        sql += f"\nDISTKEY ({quoted(table.dist_key)})"
    if table.sort_key:
        sql += f"\nCOMPOUND SORTKEY ({quoted(*table.sort_key)})"
    return sql


def copy_sql(run: Run, table: Table, region: str) -> tuple[str, str]:
    """CREATE of the temporary table, which vanishes with the session, and COPY into it."""
    role, names = run.config.copy_role, quoted(*(column.name for column in table.columns))
    create = (
        f"CREATE TEMP TABLE {quoted(table.staging)} (LIKE {quoted(table.name)} INCLUDING DEFAULTS)"
    )
    return (
        create,
        f"""COPY {quoted(table.staging)} ({names})
FROM {literal(run.url(table.name, "manifest.json"))}
IAM_ROLE {literal(role) if role else "default"}
REGION {literal(region)}
MANIFEST GZIP CSV IGNOREHEADER 1
NULL AS {literal(run.null)}
DATEFORMAT 'auto' TIMEFORMAT 'auto'
COMPUPDATE OFF STATUPDATE OFF""",
    )


def doubles_sql(table: Table) -> str:
    """SELECT of the keys that several staged rows have: Redshift enforces no primary key."""
    key = quoted(*table.key)
    return (
        f"SELECT {key}\nFROM {quoted(table.staging)}\nGROUP BY {key}\nHAVING count(*) > 1\nLIMIT 5"
    )


def swap_sql(run: Run, table: Table) -> tuple[str, str]:
    """DELETE and INSERT that put the staged rows in the place of the target's.

    Not TRUNCATE, which commits; and no lock, so that readers and the load never wait. Not
    SYSDATE, which is when the transaction began, perhaps before another load's turn.
    """
    names = quoted(*(column.name for column in table.columns))
    delete = f"DELETE FROM {quoted(table.name)}"
    if table.mode == "upsert":
        same = (
            f"{quoted(f'{table.name}.{k}')} = {quoted(table.staging)}.{quoted(k)}"
            for k in table.key
        )
        delete += f"\nUSING {quoted(table.staging)}\nWHERE " + " AND ".join(same)
    return (
        delete,
        f"""INSERT INTO {quoted(table.name)} ({names}, "_run_id", "_loaded_at")
SELECT {names}, {literal(run.id)}, GETDATE()
FROM {quoted(table.staging)}""",
    )


class TransientError(PipelineError):
    """Redshift was not there, or undid what was asked: asked again it may well do it."""


# 40001 and 1023: two loaders wrote the same table; 23505, 42701, 42P07: two created a table or a
# column at the same moment (Redshift enforces no unique key of ours); 55P03: no lock in time;
# 53, 57P0, 08: no room for another connection, the server stops or starts, the connection broke.
TRANSIENT = re.compile("40001|23505|42701|42P07|55P03|53...|57P0.|08...")


def redshift_error(error: Exception) -> PipelineError:
    """What the driver raised, as one sentence; it hands on the server's message as a dict."""
    if not isinstance(error, redshift_connector.Error | OSError | struct.error):
        raise error
    said = next((argument for argument in error.args if isinstance(argument, dict)), None)
    if said:
        text = ". ".join(said[name] for name in "MD" if said.get(name))
        transient = text.startswith("1023") or bool(TRANSIENT.fullmatch(said.get("C", "")))
    else:
        cause = next((argument for argument in error.args if isinstance(argument, OSError)), error)
        text, transient = str(cause), not isinstance(cause, ssl.SSLCertVerificationError)
    return TransientError(text) if transient else PipelineError(text)


def connect(config: Config, credentials: Credentials) -> Any:
    """Connects over TLS to a host whose certificate has its name.

    Tries again for ``connect_seconds``: a paused cluster takes minutes to resume.
    """
    to = f"{credentials.host}:{credentials.port}, database {credentials.database}"
    give_up, wait = time.monotonic() + config.connect_seconds, 1.0
    while True:
        try:
            connection = redshift_connector.connect(
                **vars(credentials),
                ssl=True,
                sslmode="verify-full",  # by default the driver only warns of another host's name
                timeout=30,
                tcp_keepalive_idle=60,
                application_name="sequra_challenge",
            )
        except Exception as caught:
            error = redshift_error(caught)
            if not isinstance(error, TransientError) or time.monotonic() + wait > give_up:
                raise PipelineError(f"cannot connect to Redshift at {to}: {error}") from None
            log.warning("cannot connect: %s, trying again in %.0f s", error, wait)
            time.sleep(wait)
            wait = min(wait * 2, 15)
        else:
            connection._usock.settimeout(None)  # the driver's is for every answer, COPY's too
            return connection


def execute(cursor: Any, sql: str, *values: Any) -> Any:
    """Executes one statement. Raises PipelineError with its beginning and the server's reason."""
    began = time.perf_counter()
    try:
        return cursor.execute(sql, values or None)
    except Exception as caught:
        error = redshift_error(caught)
        raise type(error)(f"{' '.join(sql.split())[:60]}…: {error}") from None
    finally:
        log.debug("%.3f s: %s", time.perf_counter() - began, sql)


def load(
    run: Run, credentials: Credentials, region: str, rows: dict[str, int], lineage: dict[str, str]
) -> dict[str, tuple[int, int]]:
    """Loads the staged files into the tables; where that may help, again on a new connection.

    Loading twice does no harm. After the last try it is looked up whether only the answer to its
    commit got lost. Returns for each table how many rows it had and has, where that is known.
    """
    for tries_left in reversed(range(LOAD_TRIES + 1)):
        try:
            with session(run.config, credentials) as (connection, cursor):
                if tries_left:
                    prepare_targets(cursor, run.config)
                    for table in run.config.tables:
                        copy(cursor, run, table, region, rows[table.name])
                connection.autocommit = False
                if is_loaded(cursor, run):
                    log.info("done already, only the answer to its commit was lost")
                    return {}
                if tries_left:
                    return swap(cursor, run, rows, lineage)
        except TransientError as error:
            failure = error
            if tries_left > 1:
                log.warning("%s, trying again", error)
    raise failure


@contextlib.contextmanager
def session(config: Config, credentials: Credentials) -> Iterator[tuple[Any, Any]]:
    """A new connection, at first in autocommit, with its cursor; closed even when broken."""
    connection = connect(config, credentials)
    try:
        connection.autocommit = True  # pg_last_copy_id() does not survive a rollback
        cursor = connection.cursor()
        execute(cursor, f"SET statement_timeout TO {config.statement_seconds * 1000}")
        yield connection, cursor
    finally:
        with contextlib.suppress(redshift_connector.Error, OSError):
            connection.close()  # the server rolls back what was not committed


COLUMNS_SQL = """SELECT column_name, data_type, character_maximum_length, numeric_precision,
  numeric_scale
FROM svv_columns
WHERE table_schema = {} AND table_name = {}"""


def prepare_targets(cursor: Any, config: Config) -> None:
    """Creates missing tables, adds missing columns and widens narrower texts.

    Raises PipelineError, before any of that, where a table differs in another way.
    """
    changes, faults = [], []
    for table in (*config.tables, *audit_tables(config)):
        rows = execute(cursor, COLUMNS_SQL.format(*map(literal, table.name.split(".")))).fetchall()
        existing = {name: Column((name,), _type_sql(*kind), False) for name, *kind in rows}
        alter = f"ALTER TABLE {quoted(table.name)}"
        for column in (*table.columns, *META_COLUMNS) if existing else ():
            has = existing.pop(column.name, None)
            if has is None and not column.not_null:
                changes.append(f"{alter} ADD COLUMN {column.sql}")
            elif has and has.kind == column.kind == "varchar":
                if has.arguments < column.arguments:
                    name = quoted(column.name)
                    changes.append(f"{alter} ALTER COLUMN {name} TYPE {column.type}")
            elif has is None or has.type != column.type:
                there = has.type if has else "missing"
                fix = f"{alter} RENAME TO {quoted(table.name.partition('.')[2] + '_old')}"
                faults.append(
                    f"{table.name}: the column {column.name} is {there} in the table and "
                    f"{column.sql.partition(' ')[2]} in the configuration. The next run makes a "
                    f"new table after: {fix}"
                )
        if not rows:
            changes.append(create_sql(table))
        elif existing:
            log.warning("%s also has the columns %s", table.name, ", ".join(existing))
    if faults:
        raise PipelineError("\n  ".join(["tables differ from the configuration:", *faults]))
    for sql in changes:
        level = logging.WARNING if sql.startswith("ALTER") else logging.INFO
        log.log(level, "%s", sql.partition(" (")[0])
        execute(cursor, sql)


def _type_sql(kind: str, length: int, precision: int, scale: int) -> str:
    return {
        "character varying": f"varchar({length})",
        "numeric": f"decimal({precision},{scale})",
        "timestamp without time zone": "timestamp",
        "timestamp with time zone": "timestamptz",
    }.get(kind, kind)


def copy(cursor: Any, run: Run, table: Table, region: str, staged: int) -> None:
    """Copies a table's files into its staging table; checks the number of rows and the keys."""
    create, copy = copy_sql(run, table, region)
    execute(cursor, create)
    try:
        execute(cursor, copy)
    except TransientError:
        raise
    except PipelineError as error:
        raise PipelineError(f"COPY for {table.name}: {copy_error(cursor) or error}") from None
    (copied,) = execute(cursor, "SELECT pg_last_copy_count()").fetchone()
    if copied != staged:
        raise PipelineError(f"COPY for {table.name}: {copied} rows, but {staged} were staged")
    doubles = execute(cursor, doubles_sql(table)).fetchall()
    _refuse_doubles(table, [dict(zip(table.key, row, strict=True)) for row in doubles])


def is_loaded(cursor: Any, run: Run) -> bool:
    """Takes the loaders' turn, and tells whether the run is in the tables already."""
    for audit in audit_tables(run.config):
        # First of all in the transaction, because the snapshot is taken after it.
        execute(cursor, f"LOCK {quoted(audit.name)}")
    witness = (*audit_tables(run.config), *run.config.tables)[0]
    sql = f'SELECT count(*) FROM {quoted(witness.name)} WHERE "_run_id" = {literal(run.id)}'
    return bool(execute(cursor, sql).fetchone()[0])


def swap(
    cursor: Any, run: Run, rows: dict[str, int], lineage: dict[str, str]
) -> dict[str, tuple[int, int]]:
    """Puts the staged rows of all tables in place, and a row for each into the audit table.

    All in one transaction: a reader sees the rows of before or those of this run, everywhere.
    Returns for each table how many rows it had and has.
    """
    changes = {}
    for table in run.config.tables:
        count = f"SELECT count(*) FROM {quoted(table.name)}"
        (before,) = execute(cursor, count).fetchone()
        changes[table.name] = before, rows[table.name]
        if table.mode == "replace" and not run.allow_shrink:
            refuse_shrinking(table, before, rows[table.name])
    for table in run.config.tables:
        before, loaded = changes[table.name]
        delete, insert = swap_sql(run, table)
        deleted = execute(cursor, delete).rowcount
        execute(cursor, insert)
        changes[table.name] = before, before - deleted + loaded
        row = lineage | {
            "table_name": table.name,
            "mode": table.mode,
            "manifest": run.url(table.name, "manifest.json"),
            "rows_before": before,
            "rows_loaded": loaded,
            "started_at": run.started.replace(microsecond=0),  # as whole as GETDATE()
            "_run_id": run.id,
        }
        names, places = quoted(*row, "_loaded_at"), ", ".join(["%s"] * len(row))
        for audit in audit_tables(run.config):
            sql = f"INSERT INTO {quoted(audit.name)} ({names}) VALUES ({places}, GETDATE())"
            execute(cursor, sql, *row.values())
    execute(cursor, "COMMIT")
    return changes


def refuse_shrinking(table: Table, before: int, after: int) -> None:
    """Raises PipelineError when a replace would leave so few rows that the source seems broken."""
    least = max(table.min_rows, math.ceil(round(before * (1 - table.max_shrink), 6)))
    if after < least:
        raise PipelineError(
            f"{table.name} has {before} rows and would have {after}, at least {least} are "
            f"expected (min_rows {table.min_rows}, max_shrink {table.max_shrink}); "
            "if that is right, run once with --allow-shrink"
        )


def audit_tables(config: Config) -> list[Table]:
    """The table that gets a row for each run and table, unless it is turned off."""
    columns = dict(column.split(" ") for column in AUDIT_COLUMNS.split(", "))
    settings = _checked({"columns": columns, "key": []}, _rules(Table, "tables"), "", [])
    return [_table(config.audit_table, "", settings)] if config.audit_table else []


# Only stl_load_errors shows the value, and only a provisioned cluster has it.
COPY_ERRORS = (
    """SELECT filename, line_number, colname, type, err_reason, raw_field_value
FROM stl_load_errors WHERE query = pg_last_copy_id() LIMIT 1""",
    """SELECT file_name, line_number, column_name, column_type, error_message, NULL
FROM sys_load_error_detail WHERE query_id = pg_last_copy_id() LIMIT 1""",
)


def copy_error(cursor: Any) -> str | None:
    """Redshift's reason for the last COPY to fail: file, line, column, type and value."""
    for sql in COPY_ERRORS:
        with contextlib.suppress(PipelineError):
            if row := execute(cursor, sql).fetchone():
                file, line, column, kind, reason, value = (str(cell or "").strip() for cell in row)
                shown = f", value {shorten(value)}" if value else ""
                return f"{file}, line {line}, column {column} ({kind}): {reason}{shown}"
    return None


# --- notify -------------------------------------------------------------------------------------

_secrets: set[str] = set()


def hide(*values: str) -> None:
    """Has these texts masked in every log line and alert, though none should get there."""
    _secrets.update(value for value in values if len(value) > 7)


def masked(text: str) -> str:
    """The text without what is secret in it."""
    for secret in _secrets:
        text = text.replace(secret, "***")
    return text


def in_time(calls: Mapping[str, Callable[[], Any]], seconds: float) -> Iterator[tuple[str, Any]]:
    """Calls all at once; yields what each returns or raises, and leaves alone what takes longer."""
    give_up = time.monotonic() + seconds
    thread = ThreadPool(len(calls) or 1)  # which does not keep the program from ending
    pending = {name: thread.apply_async(call) for name, call in calls.items()}
    thread.close()
    for name, result in pending.items():
        try:
            yield name, result.get(max(0, give_up - time.monotonic()))
        except multiprocessing.TimeoutError:
            yield name, PipelineError(f"no answer within {seconds} seconds")
        except Exception as error:
            yield name, error


def channels(config: Config, event: str) -> dict[str, Channel]:
    """The channels that hear of an event (failure, success or test), as functions that send."""
    found: dict[str, Channel] = {}
    if event in (*config.on, "test") and config.slack_webhook_secret:
        found["slack"] = partial(send_slack, config.slack_webhook_secret)
    if event in (*config.on, "test") and config.sns_topic:
        found["sns"] = partial(send_sns, config.sns_topic)
    if event != "failure" and config.heartbeat_url:
        found["heartbeat"] = partial(send_heartbeat, config.heartbeat_url)
    return found


def send(to: dict[str, Channel], first: str, lines: list[str]) -> dict[str, str]:
    """Sends a message, with its first line apart; returns for each channel what failed, or ""."""
    calls = {name: partial(call, masked(first), [*map(masked, lines)]) for name, call in to.items()}
    return {n: error_text(e)[0] if e else "" for n, e in in_time(calls, ALERT_SECONDS / 2)}


def send_slack(secret: str, first: str, lines: list[str]) -> None:
    """Posts a message to the incoming webhook whose URL is the secret, or its URL as JSON."""
    url = read_secret(secret)
    with contextlib.suppress(ValueError, AttributeError):
        url = {name.lower(): str(value) for name, value in json.loads(url).items()}.get("url", "")
    if not re.match("https?://", url):
        raise PipelineError(f"the secret {secret} holds no URL")
    hide(url, urlsplit(url).path)
    shown = [html.escape(text, quote=False)[:2900] for text in (first, "\n".join(lines)) if text]
    texts = [re.sub(r"&\w*$", "…", text) for text in shown]  # not half a character
    blocks = [{"type": "section", "text": {"type": "mrkdwn", "text": text}} for text in texts]
    message = {"text": texts[0], "blocks": blocks}
    with http_session({}) as session:
        session.post(url, json=message, timeout=ALERT_SECONDS).raise_for_status()


def send_sns(topic: str, first: str, lines: list[str]) -> None:
    """Publishes a message to the topic, in the topic's region."""
    subject = re.sub(r"[^ -~]+", "?", first)[:100]  # what SNS takes
    with aws_errors("publish to", topic):
        sns = aws_client("sns", topic.split(":")[3])
        message = "\n".join([first, *lines]).encode()[:250_000].decode(errors="ignore")
        sns.publish(TopicArn=topic, Subject=subject, Message=message)


def send_heartbeat(url: str, _first: str, _lines: list[str]) -> None:
    """Tells a dead man's switch that all is well."""
    with http_session({}) as session:
        session.get(url, timeout=ALERT_SECONDS).raise_for_status()


def tables_now(config: Config) -> list[str]:
    """A line for each table: how many rows are in it, and which run loaded the last of them."""

    def look() -> Iterator[str]:
        credentials = read_credentials(config.secret)
        with session(replace(config, connect_seconds=0), credentials) as (_, cursor):
            for table in config.tables:
                sql = f'SELECT count(*), max("_run_id") FROM {quoted(table.name)}'
                try:
                    rows, run_id = execute(cursor, sql).fetchone()
                    yield f"{table.name}: {rows} rows, unchanged since run {run_id}"
                except PipelineError as error:
                    absent = re.search(r'relation "[^"]+" does not exist$', str(error))
                    yield f"{table.name}: {'does not exist' if absent else error}"

    ((_, lines),) = in_time({"": lambda: list(look())}, ALERT_SECONDS / 2)
    return lines if isinstance(lines, list) else [f"tables: not known, {error_text(lines)[0]}"]


# --- run ----------------------------------------------------------------------------------------


context = {"step": "configuration"}  # what each log line says beside its message: run_id, step
warned = MemoryHandler(1000, flushLevel=sys.maxsize)  # keeps the warnings for the alerts


class Stopped(BaseException):
    """A signal ends the run; what has been begun is undone on the way out."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.status = 128 + number


EXPECTED = (ConfigError, PipelineError, OSError, Stopped)  # their messages say all


class LogFormatter(logging.Formatter):
    """Lines of text, or JSON objects with the names of Datadog's standard attributes."""

    def __init__(self, as_json: bool) -> None:
        super().__init__()
        self.as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        """One line, in text followed by the traceback of an error that nobody expected."""
        moment = datetime.fromtimestamp(record.created, UTC)
        error = record.exc_info[1] if record.exc_info else None
        stack = self.formatException(record.exc_info) if record.exc_info else ""
        if self.as_json:
            line: dict[str, Any] = {
                "timestamp": f"{moment:%Y-%m-%dT%H:%M:%S.%f}"[:-3] + "Z",
                "level": record.levelname,
                "message": masked(record.getMessage()),
                **context,
                **getattr(record, "figures", {}),
            }
            if error:
                texts = {"message": masked(str(error)), "stack": masked(stack)}
                line["error"] = {"kind": type(error).__name__, **texts}
            return json.dumps(line)
        begin = f"{moment:%Y-%m-%dT%H:%M:%SZ} {record.levelname:7} {context['step']}: "
        text = f"{begin}{record.getMessage()}"
        return masked(text if isinstance(error, EXPECTED) or not error else f"{text}\n{stack}")


@contextlib.contextmanager
def step(name: str, figures: dict[str, Any] | None = None) -> Iterator[dict[str, Any]]:
    """Logs the figures that a step puts into the dict, every few seconds and when it is done."""
    context["step"] = name
    figures = {} if figures is None else figures
    began, done = time.perf_counter_ns(), threading.Event()

    def tell(prefix: str) -> None:
        told = figures | {"duration": time.perf_counter_ns() - began}  # in ns, as Datadog has it
        shown = told.get("rows", {}) | told | {"seconds": f"{told['duration'] / 1e9:.2f}"}
        texts = (f"{n} {v}" for n, v in shown.items() if n not in ("rows", "duration"))
        log.info("%s%s", prefix, ", ".join(texts), extra={"figures": told})

    def tell_progress() -> None:
        while not done.wait(PROGRESS_SECONDS):
            tell("so far ")

    threading.Thread(target=tell_progress, daemon=True).start()
    try:
        yield figures
    except (OSError, botocore.exceptions.BotoCoreError) as error:
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        where = f" in {tempfile.gettempdir()}" if full else ""
        raise PipelineError(f"{error}{where}") from None
    finally:
        done.set()
    tell("")


def run_pipeline(config: Config, dry_run: bool = False, allow_shrink: bool = False) -> int:
    """Runs the pipeline once, tells people how it went, and returns the exit status."""
    run = Run(config, Path(), allow_shrink)
    context.update(run_id=run.id, step="run")
    rows: dict[str, int] = {}
    event, status, what = "success", 0, "succeeded"
    try:
        what += f" on {socket.gethostname()}: {run_steps(run, dry_run, rows)}"
    except (Exception, Stopped) as error:
        reason = str(error) if isinstance(error, EXPECTED) else f"{type(error).__name__}: {error}"
        log.error("%s", reason, exc_info=True)
        event, status = "failure", error.status if isinstance(error, Stopped) else 1
        what = f"failed on {socket.gethostname()}: {context['step']}: {reason}"
    context["step"] = "alerts"
    on_signal(signal.SIG_IGN)  # the result stands, and the rest takes some seconds at most
    if (to := channels(config, event)) and not dry_run:
        seconds = (datetime.now(UTC) - run.started).total_seconds()
        lines = [f"run: {run.id}", f"took: {seconds:.1f} s"]
        if event == "success":
            lines += [record.getMessage() for record in warned.buffer]
        else:
            lines += [f"rows so far: {rows_text(rows, {}) or 'none'}", *tables_now(config)]
        for channel, failure in send(to, f"{config.name} {what}", lines).items():
            if failure:
                log.warning("%s: %s", channel, failure)
    return status


def run_steps(run: Run, dry_run: bool, rows: dict[str, int]) -> str:
    """Extracts, transforms, stages and loads. Raises PipelineError; then no target has changed.

    Counts the rows of each table; returns a text that says how many it has now.
    """
    config, uploaded = run.config, {"files": 0, "bytes": 0}
    run = replace(run, folder=Path(tempfile.gettempdir(), f"sequra-{secrets.token_hex(8)}"))
    # At exit, because a signal can come between any two lines here, but none after main().
    atexit.register(shutil.rmtree, run.folder, ignore_errors=True)
    run.folder.mkdir(mode=0o700)
    log.info("%s from %s", run.id, public_url(config.url))
    to_s3: Upload | None = None
    if not dry_run:
        beside = ThreadPool(2)  # the download, then the transform
        s3 = beside.apply_async(aws_client, ["s3"])
        credentials = beside.apply_async(read_credentials, [config.secret])
        to_s3 = partial(upload, run, s3, uploaded)
    with step("extract") as figures:
        body = extract(config, run.folder, figures)
        figures["bytes"] = body.stat().st_size
    if to_s3:
        compressed = beside.apply_async(compress_raw, [run, body])
        beside.close()
    with step("transform", {"rows": rows}):
        staged = transform_to_parts(run, body, to_s3, rows)
    if not to_s3:
        print_dry_run(run, staged, rows)
        atexit.unregister(shutil.rmtree)
        return rows_text(rows, {})
    with step("stage", uploaded):
        lineage = stage(run, *compressed.get(), staged, to_s3)
    with step("load") as figures:
        changes = load(run, credentials.get(), s3.get().meta.region_name, rows, lineage)
        figures["tables"] = len(changes)
    context["step"] = "run"
    seconds = (datetime.now(UTC) - run.started).total_seconds()
    loaded = rows_text(rows, changes)
    log.info("done: %s, %.1f s", loaded, seconds)
    return loaded


def rows_text(rows: dict[str, int], changes: dict[str, tuple[int, int]]) -> str:
    """The rows of each table: those loaded, or where it is known those there, with the change."""
    texts = {name: f"{name} {loaded} rows" for name, loaded in rows.items()}
    for name, (before, after) in changes.items():
        texts[name] = f"{name} {after} rows ({after - before:+})"
    return ", ".join(texts.values())


def print_dry_run(run: Run, staged: list[PartWriter], rows: dict[str, int]) -> None:
    """Prints the files, the first rows and the SQL of a run that goes no further."""
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "<region>"
    for parts in staged:
        table = parts.table
        print(f"\n-- {table.name}: {rows[table.name]} rows in", *parts.parts, sep="\n--   ")
        first = pd.read_csv(parts.parts[0], nrows=3, dtype=str, keep_default_na=False)
        if rows[table.name]:
            print(first.replace(run.null, "NULL").T.to_string(header=False, max_colwidth=36))
        sqls = [create_sql(table), *copy_sql(run, table, region), doubles_sql(table)]
        print("", *sqls, *swap_sql(run, table), sep="\n\n", end="\n")


# --- main ---------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Runs the program and returns its exit status: 0 done, 1 failed, 2 wrong configuration."""
    parser = argparse.ArgumentParser(description="Load a JSON API into Amazon Redshift.")
    option = parser.add_argument
    option("--config", type=Path, default=DEFAULT_CONFIG, help="default: conf/pipeline.yaml")
    option("--source", help="URL (https, http, s3) or path to read instead of source.url")
    option("--dry-run", action="store_true", help="stop before S3; print first rows and SQL")
    option("--allow-shrink", action="store_true", help="replace rows by far fewer, this once")
    option("--verbose", action="store_true", help="log the SQL, with its times")
    option("--log-format", default=os.environ.get("LOG_FORMAT") or "text", help="text or json")
    option("--test-alerts", action="store_true", help="send a test message to every channel")
    options = parser.parse_args(arguments)
    if options.log_format not in ("text", "json"):
        parser.error(f"--log-format or $LOG_FORMAT: {options.log_format!r} is not text or json")
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter(options.log_format == "json"))
    log.addHandler(handler)
    warned.setLevel(logging.WARNING)
    log.addHandler(warned)
    log.propagate = False  # and nothing else is shown: urllib3 warns with whole URLs
    log.setLevel(logging.DEBUG if options.verbose else logging.INFO)
    # Nothing has been begun that has to be undone; and an import can lose an exception.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        config = load_config(options.config)
        import_packages()
        on_signal(stop)
        config = replace(config, url=options.source or config.url)
        heartbeat = urlsplit(config.heartbeat_url or "")
        hide(heartbeat.query, heartbeat.path)
        if options.test_alerts:
            return test_alerts(config)
        return run_pipeline(config, options.dry_run, options.allow_shrink)
    except (Exception, Stopped) as error:
        log.error("%s", error, exc_info=True)
        return error.status if isinstance(error, Stopped) else 1 + isinstance(error, ConfigError)
    finally:
        on_signal(signal.SIG_IGN)


def test_alerts(config: Config) -> int:
    """Sends a test message to every channel, prints how that went, and returns the exit status."""
    what = f"{config.name} on {socket.gethostname()}: a test of its alerts"
    results = send(channels(config, "test"), what, [])
    for channel, failure in results.items():
        print(f"{channel}: failed: {failure}" if failure else f"{channel}: sent")
    if not results:
        log.error("the configuration names no alerts")
    return int(not results or any(results.values()))


def on_signal(handler: Any) -> None:
    """Sets what SIGINT (Ctrl-C) and SIGTERM do."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def stop(number: int, _frame: Any) -> None:
    """Ends the run on a signal; a second one is ignored."""
    on_signal(signal.SIG_IGN)
    raise Stopped(number)


if __name__ == "__main__":
    sys.exit(main())
