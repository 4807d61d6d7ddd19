"""Load the records of a JSON API into Amazon Redshift: extract, transform, stage, load.

A run reads conf/pipeline.yaml, fetches JSON objects, flattens them into the configured tables,
stages each table as gzipped CSV in S3, copies the files into temporary tables, replaces (or
upserts) the rows of all tables in one transaction, and tells people how it went.

The file reads in the order in which the data flows: configuration, log, extract, transform, stage,
load, notify, run, check, main.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import ctypes
import errno
import gc
import gzip
import hashlib
import html
import json
import logging.handlers
import math
import os
import platform
import random
import re
import secrets
import shutil
import signal
import ssl
import struct
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, replace
from datetime import UTC, datetime, timedelta
from decimal import Context, Decimal, DecimalException, Inexact, InvalidOperation
from functools import cached_property, partial
from itertools import chain, islice, starmap
from multiprocessing.pool import AsyncResult, ThreadPool
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, get_type_hints
from urllib.parse import parse_qsl, quote, unquote, unquote_plus, urlencode, urljoin, urlsplit

import yaml

if TYPE_CHECKING:
    import boto3
    import botocore
    import pandas as pd
    import redshift_connector
    import requests
    import urllib3

DEFAULT_CONFIG = Path(__file__).resolve().parent.parent / "conf" / "pipeline.yaml"
HTTP_TIMEOUT = (10, 60)  # seconds: to connect, between two pieces of the answer
HTTP_TRIES = 6
READ_BYTES = 1 << 17  # of JSON; the objects made of so much stay in the processor's cache
CHUNK_PIECES = 60  # after which pandas gets their rows
CHUNK_RECORDS = 6_000  # or after the piece with the last of these
CHUNKS_AHEAD = 3  # of the thread that compresses and uploads
GZIP_LEVEL = 4
LOAD_TRIES = 4
ANSWER_MARGIN = 30  # seconds after a statement's time-out until the connection is given up
ALERT_SECONDS = 5  # for each channel that is told
PROGRESS_SECONDS = 5

Records = list[dict[str, Any]]
Columns = defaultdict[str, list[Any]]  # the values of a table's columns, by name
Figures = dict[str, Any]  # of a step, by the names that the log has
FieldNames = defaultdict[tuple[str, ...], set[str]]  # that the objects at a path of the source have


class PipelineError(Exception):
    """The run failed for a reason that its message explains."""

    status = 1  # of the program

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code  # SQLSTATE, of what Redshift reports


class ConfigError(PipelineError):
    """The configuration is wrong."""

    status = 2
    alerts: Alerts | None = None  # who is told, where that could be read


class UnavailableError(PipelineError):
    """The source, AWS or Redshift was away or had too much to do: another run may well succeed."""

    status = os.EX_TEMPFAIL


class TransientError(UnavailableError):
    """Redshift was not there, or undid what was asked: asked again it may well do it."""


class Stopped(BaseException):
    """A signal ends the run; what has been begun is undone on the way out."""

    by_signal: ClassVar[Stopped | None] = None  # since an `except:` of a package may swallow it

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.status = 128 + number


EXPECTED = (PipelineError, OSError, MemoryError, Stopped)  # which need no traceback


def import_packages() -> None:
    """Imports the large packages. --help and a wrong configuration answer without them."""
    global boto3, botocore, pd, redshift_connector, requests, urllib3
    import boto3.s3.transfer
    import botocore.session
    import pandas as pd
    import redshift_connector
    import requests
    import urllib3

    # An instance's metadata are asked once, by default for a second: too short on a busy machine.
    os.environ.setdefault("AWS_METADATA_SERVICE_TIMEOUT", "5")
    # redshift_connector.connect() asks for it under a bare `except:`, which would swallow a signal.
    platform.platform()
    # The garbage collector passes by all that they have made, and comes less often: what a batch of
    # records is made of has no cycles.
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)


# --- configuration ------------------------------------------------------------------------------


NAME = r"[a-z_][a-z0-9_]{0,126}"  # what Redshift can hold: it folds names to lower case
PATH = r"(\\.|[^.])+(\.(\\.|[^.])+)*"  # a.b; a dot in a name is \., a backslash \\
ROLE = r"arn:aws[\w-]*:iam::\d{12}:role/[\w+=.@/-]+"
SECRET_ID = r"[\w/+=.@:-]+"
PORT = r"[1-9]\d{0,3}|[1-5]\d{4}|6[0-4]\d{3}|65[0-4]\d\d|655[0-2]\d|6553[0-5]"
HOST = r"[\w-]{1,63}(\.[\w-]{1,63})*"
KIND = r"boolean|smallint|integer|bigint|real|double precision|date|timestamp|timestamptz|super"
TYPE = rf"({KIND}|varchar\(\d{{1,5}}\)|decimal\(\d\d?,\d\d?\))( not null)?( as {NAME})?( not null)?"
# What a value must be, where the pattern is hard to read.
PHRASES = {PORT: "be 1 to 65535", TYPE: "be a type such as varchar(24), bigint not null, date"}


def setting(rule: str, default: Any = MISSING) -> Any:
    """A field that the file sets, to a text that matches the pattern; required without a default.

    A tuple of texts may be one text in the file; columns and headers are mappings.
    """
    return field(default=default, metadata={"rule": rule})


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the records come from."""

    url: str = setting(r".+")
    body: str = setting(r"[\s\S]+", "")  # JSON, sent by POST
    records: str = setting(PATH, "")
    next: str = setting(rf"(?!\+0+$){PATH}", "")  # a path, Link, or what is added: +1, +100
    next_param: str = setting(r".+", "")  # with a body a path in it
    max_pages: int = setting(r"[1-9]\d{0,6}", 1000)
    max_wait: int = setting(r"\d{1,5}", 900)  # seconds
    answer_seconds: int = setting(r"[1-9]\d{0,5}", 3600)
    headers: dict[str, str] = setting(r"[\s\S]+")  # noqa: RUF009

    @property
    def step(self) -> int:
        """What is added to ``next_param`` for each page; 0 where pages are not counted."""
        return int(self.next) if re.fullmatch(r"\+\d+", self.next, re.ASCII) else 0


@dataclass(frozen=True, kw_only=True)
class Staging:
    """Where the files go that Redshift copies."""

    bucket: str = setting(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
    prefix: str = setting(r"[\w!.*()=-]+(/[\w!.*()=-]+)*")
    kms_key: str | None = setting(r"[\w:/-]+", None)
    part_mb: int = setting(r"[1-9]\d{0,3}", 64)  # compressed; COPY likes 1 MB to 1 GB


@dataclass(frozen=True, kw_only=True)
class Redshift:
    """The database, and how long it may take."""

    secret: str = setting(SECRET_ID)
    host: str = setting(HOST, "")  # this and the next two where the secret does not say
    port: int = setting(PORT, 5439)
    database: str = setting(r".+", "")
    copy_role: str | None = setting(rf"{ROLE}(,{ROLE})*", None)  # or $AWS_ROLE_ARN
    audit_table: str = setting(rf"{NAME}\.{NAME}", "public.etl_runs")
    connect_seconds: int = setting(r"\d{1,5}", 120)
    statement_seconds: int = setting(r"[1-9]\d{0,5}", 3600)


@dataclass(frozen=True, kw_only=True)
class Alerts:
    """Who is told how a run went."""

    on: tuple[str, ...] = setting(r"failure|success", ("failure",))
    slack_webhook_secret: str | None = setting(rf"(?!.*://){SECRET_ID}", None)
    sns_topic: str | None = setting(r"arn:aws[\w-]*:sns:[\w-]+:\d{12}:[\w.-]+", None)
    heartbeat_url: str | None = setting(r"https?://[\w.:@%-]+([/?]\S*)?", None)


@dataclass(frozen=True)
class Column:
    """A column of a table, and the path of its value in the JSON of a row."""

    path: tuple[str, ...]
    name: str
    type: str  # as Redshift writes it: "varchar(24)"
    not_null: bool = False
    in_key: bool = False

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


@dataclass(frozen=True, kw_only=True)
class Table:
    """A target table: a row for each record, or with ``rows`` for each element of that array."""

    name: str = ""
    staging: str = ""  # the name of the temporary table
    columns: tuple[Column, ...] = setting(TYPE)  # in the file "path: type"
    key: tuple[str, ...] = setting(r".+")
    mode: str = setting(r"replace|upsert", "replace")
    rows: str = setting(PATH, "")
    parent: str | None = setting(r"(?!(position|value)$)[^.]+", None)
    sort_key: tuple[str, ...] = setting(r".+", ())
    dist_key: str | None = setting(r".+", None)
    min_rows: int = setting(r"\d{1,15}", 1)
    max_shrink: float = setting(r"0|0?\.\d+|1(\.0)?", 0.2)

    @property
    def names(self) -> list[str]:
        """The names of the columns."""
        return [column.name for column in self.columns]

    @cached_property
    def paths_by_object(self) -> dict[Column, list[tuple[str, ...]]]:
        """The objects in a row that hold the values, outer ones first, and the paths in each."""
        paths = {c.path[:depth] for c in self.columns for depth in range(1, len(c.path) + 1)}
        inner = defaultdict[Column, list[tuple[str, ...]]](list)
        for path in sorted(paths, key=len):
            inner[Column(path[:-1], "", "object")].append(path)
        return inner


@dataclass(frozen=True, kw_only=True)
class Config:
    """What conf/pipeline.yaml says, checked."""

    source: Source
    staging: Staging
    redshift: Redshift
    alerts: Alerts
    tables: tuple[Table, ...]


# What the load sets in each row, and what else Redshift has no room for in a table.
META_COLUMNS = Column((), "_run_id", "varchar(64)"), Column((), "_loaded_at", "timestamptz")
RESERVED = {"oid", "tableoid", "xmin", "cmin", "xmax", "cmax", "ctid", "insertxid", "deletexid"}
RESERVED |= {column.name for column in META_COLUMNS}


class _Loader(yaml.SafeLoader):
    """YAML whose scalars are the texts that stand there, `on` and `1e3` too; no key twice."""

    yaml_implicit_resolvers: ClassVar = {"<": yaml.SafeLoader.yaml_implicit_resolvers["<"]}  # type: ignore[misc]

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping; raises MarkedYAMLError where a key stands twice."""
        for key, times in Counter(key.value for key, _ in node.value).items():
            if times > 1:
                raise yaml.MarkedYAMLError(None, None, f"{key!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def load_config(path: Path, url: str | None = None) -> Config:
    """Reads and checks the configuration; another URL takes the place of ``source.url``.

    Raises ConfigError with all faults in one message, each with its path in the file.
    """
    try:
        document = yaml.load(path.read_bytes(), _Loader)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except Exception as error:  # a YAMLError, and for odd tags and depths whatever PyYAML meets
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    faults: list[str] = []
    if url is not None and isinstance(document, dict) and isinstance(document.get("source"), dict):
        document["source"]["url"] = url
    config: Config = read_section(Config, document, "", faults)
    hide_credentials(config.source.url, config.source.headers)
    possible = chain(source_faults(config.source), *map(table_faults, config.tables))
    faults += [fault for is_wrong, fault in possible if is_wrong]
    if faults:
        wrong = ConfigError("\n  ".join([f"{path} has {len(faults)} fault(s):", *faults]))
        if not any(fault.startswith("alerts") for fault in faults):
            wrong.alerts = config.alerts
        raise wrong
    return config


def read_section(kind: Any, given: Any, at: str, faults: list[str]) -> Any:
    """A section of the file, as its dataclass; what is wrong with it is added to the faults."""
    rules = {rule.name: rule for rule in fields(kind) if rule.metadata or rule.default is MISSING}
    types, settings = get_type_hints(kind), read_mapping(given, at, faults)
    for name in sorted(settings.keys() - rules):
        faults.append(f"{at}.{name}: unknown key, expected {' or '.join(rules)}".removeprefix("."))
    values = {
        name: read_setting(rule, types[name], settings.get(name), f"{at}.{name}".strip("."), faults)
        for name, rule in rules.items()
    }
    return kind(**values)


def read_tables(given: Any, faults: list[str]) -> Iterator[Table]:
    """The tables that the file describes, by name."""
    sections = read_mapping(given, "tables", faults)
    faults += ["tables: missing"] * (not sections)
    for number, (name, section) in enumerate(sections.items(), 1):
        table = read_section(Table, section, f"tables.{name}", faults)
        columns = tuple(replace(c, in_key=c.name in table.key) for c in table.columns)
        yield replace(table, name=name, staging=f"staging_{number}", columns=columns)


def read_mapping(given: Any, at: str, faults: list[str]) -> dict[str, Any]:
    """A mapping; empty where the file has none."""
    if isinstance(given, dict):
        return {str(name): value for name, value in given.items()}
    if not is_null(given):
        faults.append(f"{at or 'the file'}: must be a mapping, not {shown(given, at)}")
    return {}


def read_setting(rule: Field[Any], kind: Any, given: Any, at: str, faults: list[str]) -> Any:
    """The value of one setting, of the kind that its dataclass annotates."""
    if is_dataclass(kind):
        return read_section(kind, given, at, faults)
    if kind == tuple[Table, ...]:
        return tuple(read_tables(given, faults))
    pattern, before = rule.metadata["rule"], len(faults)
    if kind in (dict[str, str], tuple[Column, ...]):
        items = read_mapping(given, at, faults).items()
        texts = {name: read_text(pattern, text, f"{at}.{name}", faults) for name, text in items}
        return texts if kind == dict[str, str] else tuple(starmap(parse_column, texts.items()))
    if rule.name == "audit_table" and given is not None and is_null(given):
        faults.append(f"{at}: cannot be null, loaders lock this table to take turns")
    if is_null(given) and rule.default is not MISSING:
        return rule.default
    if kind == tuple[str, ...]:
        several = given if isinstance(given, list) else [given]
        return tuple(read_text(pattern, text, at, faults) for text in several)
    text = read_text(pattern, given, at, faults)
    return kind(text) if kind in (int, float) and len(faults) == before else text


def read_text(pattern: str, given: Any, at: str, faults: list[str]) -> str:
    """A text that matches the pattern, or else is a fault; in the source without ${NAME}."""
    if at.startswith("source.") and isinstance(given, str):
        given = expand(given, at, faults)
    if is_null(given):
        faults.append(f"{at}: missing")
    elif not isinstance(given, str) or not re.fullmatch(pattern, given, re.ASCII):
        must = f"must {PHRASES.get(pattern, f'match {pattern}')}"
        faults.append(f"{at}: {must}, not {shown(given, at)}")
    return "" if is_null(given) else str(given)


def is_null(given: Any) -> bool:
    """Whether a setting is as if it were not there."""
    return given is None or str(given).lower() in ("", "null", "~")


def shown(given: Any, at: str) -> str:
    """What the file has there, but for what may be a secret or part of one."""
    is_secret = at.startswith(("alerts", "source.headers", "source.body")) and at != "alerts.on"
    return "what is there" if is_secret else repr(given)


def parse_column(path: str, text: str) -> Column:
    """The column that the file writes as "path: type".

    Its name is what stands behind "as", else the path in snake case: ``links_patch_small`` of
    links.patch.small, ``ship_to`` of shipTo.
    """
    names, own = split_path(path), re.search(r" as (\w+)", text)
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", "_".join(names))
    name = own[1] if own else re.sub(r"\W", "_", words).lower()
    return Column(names, name, re.split(" not | as ", text)[0], " not null" in text)


def split_path(path: str) -> tuple[str, ...]:
    """The names in a path as the configuration writes it; none in ""."""
    names = re.findall(r"((?:\\.|[^.])*)\.", f"{path}.") if path else ()
    return tuple(re.sub(r"\\(.)", r"\1", name) for name in names)


def join_path(names: Iterable[str]) -> str:
    """The path of these names as the configuration writes it."""
    return ".".join(re.sub(r"[\\.]", r"\\\g<0>", name) for name in names)


def table_faults(table: Table) -> Iterator[tuple[Any, str]]:
    """What no single setting of a table shows: for each fault whether it is there, and its text."""
    at, rule, own = f"tables.{table.name}", f"must match {NAME}", 'say "as another_name"'
    yield not table.columns, f"{at}.columns: missing"
    yield not re.fullmatch(rf"{NAME}\.{NAME}", table.name), f"{at}: must be schema.table, {rule}"
    yield table.key == (), f"{at}.key: must name the columns that no two rows share"
    yield bool(table.rows) != bool(table.parent), f"{at}: rows and parent go together"
    for column in table.columns:
        path, name, kind = f"{at}.columns.{join_path(column.path)}", column.name, column.type
        size, most = column.arguments or (1,), 38 if column.kind == "decimal" else 65_535
        yield not column.path or "" in column.path, f"{path}: a name in the path is empty"
        yield not re.fullmatch(f"{NAME}|", name), f"{path}: {name!r} {rule}: {own}"
        yield name in RESERVED, f"{path}: the name {name!r} is reserved: {own}"
        yield table.names.count(name) > 1, f"{path}: another path gives {name!r} too: {own}"
        yield not 0 < size[0] <= most, f"{path}: {kind}: {column.kind} takes 1 to {most}"
        yield size[-1] > size[0] or size[1:] > (37,), f"{path}: {kind}: scale over {size[0]} or 37"
    kinds = {column.name: column.kind for column in table.columns}
    used = {"key": table.key, "sort_key": table.sort_key, "dist_key": [table.dist_key]}
    for setting, names in used.items():
        for name in filter(None, names):
            fault = f"{at}.{setting}: {name!r} is"
            yield name not in kinds, f"{fault} no column, of {', '.join(kinds)}"
            yield kinds.get(name) == "super", f"{fault} a super, which cannot be compared"


def expand(text: str, at: str, faults: list[str]) -> str:
    """The text with the environment's values in the place of ${NAME}, as which they are shown."""

    def value(found: re.Match[str]) -> str:
        text = os.environ.get(found[1])
        if not text:
            faults.append(f"{at}: {found[0]} is not set in the environment, or empty")
            return found[0]
        hide(text, mask=found[0])
        return json.dumps(text)[1:-1] if at == "source.body" else text

    return re.sub(r"\$\{(\w+)\}", value, text)


def source_faults(source: Source) -> Iterator[tuple[Any, str]]:
    """What no single setting of the source shows, in the same form."""
    for name, text in source.headers.items():
        is_header = re.fullmatch(r"[\w-]+: [ -~]*", f"{name}: {text}", re.ASCII)
        yield not is_header, f"source.headers.{name}: has characters that no header can have"
    unsafe = is_http(source.url) and re.search(r'[\\\s"<>]', source.url)
    yield unsafe, 'source.url: space, \\ " < > are written %20 %5C %22 %3C %3E, also in a ${NAME}'
    yield source.next.isdigit(), f"source.next: what is added to count is written +{source.next}"
    yield source.step and not source.next_param, "source.next: a number needs source.next_param"
    yield source.next_param and source.next in ("", "Link"), "source.next_param: no cursor at next"
    yield source.body and not is_http(source.url), "source.body: is for a URL of http or https"
    try:
        request = Request(source.url, source.body)
        number = number_of(request, source) if source.step else 1
        with_parameter(request, source.next_param or "page", number)
    except (*UNREADABLE, TypeError, AttributeError):
        body = "source.body: must be a JSON object, in which source.next_param can be set"
        yield True, body if source.body else "source.next_param: must be a number in source.url"


# --- log ----------------------------------------------------------------------------------------


log = logging.getLogger("sequra_challenge")
# What each log line says beside its message; a run adds its run_id.
context = {"service": "sequra-challenge", "pipeline": "", "step": "configuration"}
paused = threading.Event()  # while the program waits, and has said so
history = logging.handlers.BufferingHandler(sys.maxsize)  # of the log: alerts have its warnings
hidden: dict[str, str] = {}  # patterns of what is masked, and by what
# User and password, in which a slash may stand as it is.
USERINFO = r"""[^\s/?#"'<>]*|[^\s/:@"'<>]+:(?!\d+[/?#])[^\s"'<>@]*"""
# Scheme, login, host and path; query and fragment. A slash may be escaped, as in JSON.
URL = re.compile(rf"""(\b\w+:(?:\\*/){{2}})(?:({USERINFO})@)?([^\s?#"<>]*)(?:[?#][^\s"<>]*)?""")
SENSITIVE = r"(?i:(^|[^a-z]|api)key|token|secret|sig(nature)?|password|auth\w*|cookie)$|[a-z]Key$"


def set_up_log(log_format: str, verbose: bool) -> None:
    """Logs to standard error, what packages warn of, too; not their logs, which have whole URLs."""
    if reconfigure := getattr(sys.stdout, "reconfigure", None):
        reconfigure(errors="backslashreplace")  # an emoji on a terminal of ASCII
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    log.addHandler(handler)
    log.addHandler(history)
    log.propagate = False
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").addHandler(handler)
    log.setLevel(logging.DEBUG if verbose else logging.INFO)


class TextFormatter(logging.Formatter):
    """A line of text, followed by the traceback of an error that nobody expected."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, masked and escaped, but for a traceback."""
        moment = f"{datetime.fromtimestamp(record.created, UTC):%Y-%m-%dT%H:%M:%SZ}"
        begin = f"{moment} {record.levelname:7} {context['pipeline']} {context['step']}"
        text = record.getMessage().rstrip()
        if record.exc_info and not isinstance(record.exc_info[1], EXPECTED):
            text += "\n" + self.formatException(record.exc_info)
        return escaped(f"{begin}: {masked(text)}")


class JsonFormatter(logging.Formatter):
    """A line with a JSON object, with the names of Datadog's standard attributes."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, masked, with what the context and the record's figures say."""
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {"timestamp": moment.replace("+00:00", "Z")}
        line |= {"level": record.levelname, "message": masked(record.getMessage().rstrip())}
        line |= context | getattr(record, "figures", {})
        if record.exc_info:
            error, stack = record.exc_info[1], self.formatException(record.exc_info)
            texts = {"message": masked(str(error)), "stack": masked(stack)}
            line["error"] = {"kind": type(error).__name__, **texts}
        return json.dumps(line)


def hide(*values: str, mask: str = "***") -> None:
    """Has these texts masked wherever something is shown, however it is written there."""
    for value in filter(re.compile(r"\w").search, values):
        pattern = re.sub(r"\\+|[^a-zA-Z0-9]", lambda found: spellings(found[0][0]), value)
        # Short ones as words only: a year is part of many a time and id.
        hidden[pattern if len(value) > 4 else rf"\b{pattern}\b"] = mask


def spellings(character: str) -> str:
    """A pattern of a character as texts, JSON, HTML and URLs write it, and one within the other."""
    ways = {character, character.replace(" ", "+"), html.escape(character), f"&#{ord(character)};"}
    ways |= {json.dumps(character)[1:-1], rf"\u{ord(character):04x}", rf"\{character}"}
    return f"(?:{'|'.join(''.join(map(percent_encoded, way)) for way in ways)})"


def percent_encoded(character: str) -> str:
    """A pattern of a character as it is, and as URLs write it, also in one another."""
    encoded = re.escape(quote(character, safe="", errors="replace")).replace("%", "%(?:25){0,3}")
    # Each text in a text doubles a backslash; a bound, or a long row of them would take for ever.
    return f"(?:{re.escape(character)}|{encoded}){'{1,32}' if character == chr(92) else ''}"


def hide_credentials(url: str, headers: dict[str, str]) -> None:
    """Hides user and password of a URL, and what by its name is secret: parameters, headers."""
    if (found := URL.match(url)) and found[2]:
        user_password = unquote(found[2])
        encoded = base64.b64encode(user_password.encode()).decode()
        hide(found[2], encoded, *found[2].split(":", 1), *user_password.split(":", 1))
    for name, value in chain(parse_qsl(url.partition("?")[2]), headers.items()):
        if re.search(SENSITIVE, name) and len(value) > 3:
            hide(value, *value.split()[-1:])  # the token behind "Bearer"


def masked(text: str) -> str:
    """The text without what is hidden, and with the host and path of URLs only."""
    for pattern in sorted(hidden, key=len, reverse=True):
        text = re.sub(pattern, hidden[pattern], text, flags=re.IGNORECASE)
    return URL.sub(r"\1\3", text)


def escaped(text: str) -> str:
    """The text with escapes for what could command a terminal, but for line feeds."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def print_lines(*lines: str) -> None:
    """Prints to standard output, of which nobody has to read all: ``--dry-run | head -1``."""
    try:
        print(*map(escaped, lines), sep="\n", flush=True)
    except BrokenPipeError:  # which Python would meet again, when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def shorten(value: Any, length: int = 80) -> str:
    """A value as JSON for a message, masked, cut to a length, safe to print."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=float)  # of the Decimals in it
    except (TypeError, ValueError, RecursionError):
        text = f"a deeply nested {type(value).__name__}"
    # Masked before it is cut: half a secret would not be known.
    text = masked(str(value) if isinstance(value, Decimal) else text)
    return escaped(text if len(text) <= length else text[:length] + "…")


@contextlib.contextmanager
def step(name: str, figures: Figures) -> Iterator[Figures]:
    """Logs the figures that a step puts into the dict, every few seconds and when it is done."""
    context["step"] = name
    began, done = time.perf_counter_ns(), threading.Event()

    def log_figures(prefix: str) -> None:
        logged = figures | {"duration": time.perf_counter_ns() - began}  # in ns, as Datadog has it
        texts = filter(None, starmap(figure_text, logged.items()))
        log.info("%s%s", prefix, ", ".join(texts), extra={"figures": logged})

    def log_progress() -> None:
        while not done.wait(PROGRESS_SECONDS):
            if not paused.is_set():
                log_figures("so far ")

    threading.Thread(target=log_progress, daemon=True).start()
    try:
        yield figures
    finally:
        done.set()
    log_figures("")


def figure_text(name: str, value: Any) -> str:
    """A figure for people: "MB 0.07" of bytes, "seconds 0.10" of a duration."""
    if name == "rows":
        return ", ".join(f"{table} {rows}" for table, rows in dict(value).items())
    unit, size = {"bytes": ("MB", 1e6), "duration": ("seconds", 1e9)}.get(name, (name, 0))
    return f"{unit} {value / size:.2f}" if size else f"{unit} {value}"


def pause(seconds: float, why: str) -> None:
    """Waits, and warns of it once, instead of lines of progress."""
    log.warning("%s", why)
    paused.set()
    time.sleep(seconds)
    paused.clear()


# --- extract ------------------------------------------------------------------------------------


BOM, WHITESPACE = b"\xef\xbb\xbf", b" \t\r\n"  # of UTF-8, of JSON
DAMAGED = ValueError, EOFError, gzip.BadGzipFile, zlib.error  # HTTP, or its gzip
# What reading JSON raises: for a number of 5,000 digits, an exponent of 20, deep brackets, bytes
# that are not UTF-8, a gzip file that is damaged or ends early.
UNREADABLE = (*DAMAGED, ArithmeticError, RecursionError, OSError)


@dataclass(frozen=True)
class Request:
    """What the source is asked: to GET a URL, or with a body, which is JSON, to POST."""

    url: str
    body: str = ""

    def __str__(self) -> str:
        return f"{'POST' if self.body else 'GET'} {masked(self.url)}"


def extract(config: Config, folder: Path, figures: Figures, pages: int | None = None) -> Path:
    """Fetches the source (http, https, s3 or a local file) and returns the file that holds it.

    Of a source that answers page by page, ``pages`` are the most that are asked for.
    """
    source, target = config.source, folder / "response"
    if is_http(source.url):
        absolute_url("", source.url, "source.url")
        with http_session(source.headers) as session:
            if source.records or source.next or source.body:
                found = islice(read_pages(session, source, target, figures), pages)
                return write_pages(found, config, folder, figures)
            download(session, Request(source.url), target, source, figures)
    elif source.url.startswith("s3://"):
        bucket, _, key = source.url.removeprefix("s3://").partition("/")
        with aws_errors("read", source.url):
            aws_client("s3").download_file(bucket, key, str(target))
    else:
        target = Path(source.url).expanduser()
        if not target.is_file():
            raise PipelineError(f"{masked(source.url)} is no file, nor a URL of http, https or s3")
    if is_one_object(target) and not re.search(r"\.ndjson(\.gz)?$", source.url):
        answer = read_answer(target, "the source")
        is_page = isinstance(dig(answer, split_path(source.records)), list)
        # Else it is the only record of a file, if it has what tells records apart.
        is_record = not is_page and any(dig(answer, path) is not None for path in key_paths(config))
        records = [answer] if is_record else records_of(answer, source, "the source")
        return write_pages([records], config, folder, figures)
    return target


def is_http(url: str) -> bool:
    """Whether a source is asked by HTTP."""
    return url.lower().startswith(("http://", "https://"))


def http_session(headers: dict[str, str]) -> Any:
    """A session of requests that sends these headers, but not to another host after a redirect."""
    session: Any = requests.Session()
    trusted = ssl.create_default_context()
    session.headers.update({"Accept-Encoding": "gzip"} | headers)

    def check_redirect(response: requests.Response, **_: Any) -> None:
        if location := session.get_redirect_target(response):
            url = absolute_url(response.url, location, "a redirect")
            redirect = f"redirect from {masked(response.url)} to {masked(url)}"
            if response.request.method == "POST":
                raise PipelineError(f"{redirect}, which a POST does not follow")
            if response.url.startswith("https:") > url.startswith("https:"):
                raise PipelineError(f"{redirect}, without TLS")
            if session.should_strip_auth(response.url, url):
                for name in headers:
                    response.request.headers.pop(name, None)

    class Adapter(requests.adapters.HTTPAdapter):
        """Trusts what OpenSSL does, so also $SSL_CERT_FILE, beside the bundle of requests."""

        def build_connection_pool_key_attributes(self, *arguments: Any) -> Any:
            host, pool = super().build_connection_pool_key_attributes(*arguments)
            return host, pool | {"ssl_context": trusted}

    session.hooks["response"].append(check_redirect)
    session.mount("https://", Adapter())
    return session


def absolute_url(base: str, reference: str, what: str) -> str:
    r"""The URL that a reference means.

    Raises PipelineError for what is none, and for characters that make parsers disagree: urllib3
    connects to a for http://a\@b/, urlsplit finds the host b.
    """
    with contextlib.suppress(ValueError):
        read = urllib3.util.parse_url(urljoin(base, reference))  # by the library that connects
        if read.host and reference.isprintable() and not re.search(r"[\\ ]", reference):
            return urlsplit(read.url).geturl()
    raise PipelineError(f"{what} is no URL, or has characters that none has: {shorten(reference)}")


def download(session: Any, request: Request, file: Path, source: Source, figures: Figures) -> str:
    """Asks for an answer, writes it to the file, and returns what its header Link names as next.

    Tried again after what Retry-After asks for, else with exponential back-off and jitter:
    connection errors, time-outs, a body that ends early, 408 and 5xx a few times, and 429 as often
    as fits; nothing later than ``max_wait`` seconds after the first try.
    """
    method, body = ("POST", json.loads(request.body)) if request.body else ("GET", None)
    ask = partial(session.request, method, request.url, stream=True, timeout=HTTP_TIMEOUT)
    too_long = f"{request}: no end after source.answer_seconds, {source.answer_seconds} s"
    before = figures.get("bytes", 0)
    tries, failures, give_up = 0, 0, time.monotonic() + source.max_wait
    while True:
        tries, status = tries + 1, 0
        wait = min(2**tries, 60) * random.uniform(0.5, 1)
        try:
            with limit_seconds(source.answer_seconds, too_long), ask(json=body) as response:
                status = response.status_code
                with contextlib.suppress(urllib3.exceptions.HTTPError, ValueError, OverflowError):
                    wait = urllib3.Retry().get_retry_after(response.raw) or wait
                if status != 200:
                    response.reason = f"{response.reason}{refusal(response)}"
                    raise requests.HTTPError(response=response)
                length = response.raw.length_remaining if "pages" not in figures else None
                with file.open("wb") as target:
                    for piece in decoded(response):
                        target.write(piece)
                        figures["bytes"] = before + target.tell()
                        if length:
                            figures["percent"] = 100 * response.raw.tell() // length
                figures.pop("percent", None)
            # Not response.links, which ends a URL at a semicolon, and then knows of no next page.
            link = re.search(r'<([^>]*)>[^<]*\brel="?next\b', response.headers.get("Link", ""))
            if link and not source.next:
                log.warning("the header Link names a next page: source.next: Link would follow it")
            return link[1] if link else ""
        except (requests.RequestException, urllib3.exceptions.HTTPError, *DAMAGED) as error:
            reason, may_pass = request_failure(error)
        failures += status != 429
        if failures == HTTP_TRIES or not may_pass:
            kind = UnavailableError if may_pass else PipelineError
            raise kind(f"{request}: {reason}" + f", attempt {tries}" * may_pass)
        again = f"again in {wait:.1f} s, at {datetime.now(UTC) + timedelta(seconds=wait):%H:%M:%SZ}"
        if time.monotonic() + wait > give_up:
            limit = f"source.max_wait, {source.max_wait} s"
            raise UnavailableError(f"gave up: {request}: {reason}; {again}, would be after {limit}")
        pause(wait, f"{reason}, trying {again}")


@contextlib.contextmanager
def limit_seconds(seconds: int, message: str) -> Iterator[None]:
    """Raises PipelineError inside after so long: who drips keeps all other time-outs."""

    def end(*_: Any) -> None:
        raise PipelineError(message)

    signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)  # again, if an except: swallows the first
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def decoded(response: requests.Response) -> Iterator[bytes]:
    """Yields the body of an answer.

    Gzip is decoded here: urllib3 takes it for whole wherever it breaks off between two blocks.
    """
    coding = response.headers.get("Content-Encoding", "").strip().lower()
    if coding not in ("", "identity", "gzip", "x-gzip"):
        raise PipelineError(f"the answer has the coding {shorten(coding)}, not gzip or none")
    body: Any = gzip.GzipFile(fileobj=response.raw) if "gzip" in coding else response.raw
    yield from iter(partial(body.read, 1 << 16), b"")
    if "gzip" in coding and not response.raw.tell():
        raise EOFError("not even the header of gzip has come")


def root_cause(error: BaseException) -> BaseException:
    """The error that led to this one; urllib3 wraps some without chaining them."""
    wrapped = next((argument for argument in error.args if isinstance(argument, Exception)), None)
    inner = error.__cause__ or error.__context__ or wrapped
    # Not further than what this error was raised beside: an alert tells of another failure.
    return root_cause(inner) if inner and not isinstance(inner, PipelineError) else error


def refusal(response: requests.Response) -> str:
    """What a server says beside a status of 4xx: ": " and 200 characters, on one line, or ""."""
    said = b""
    if 400 <= response.status_code < 500:
        with contextlib.suppress(Exception):  # the status tells, whatever becomes of its text
            said = next(decoded(response), b"")
    text = masked(" ".join(said.decode(errors="replace").split()))
    return (f": {text[:200]}" if text else "") + "…" * (len(text) > 200)


def request_failure(error: Exception) -> tuple[str, bool]:
    """What a request failed for, and whether it may succeed the next time.

    Shows no URL, which may be secret; what requests says has it.
    """
    if isinstance(error, requests.HTTPError):
        status, reason = error.response.status_code, error.response.reason
        return f"HTTP {status} {reason}", status in (408, 429) or (status >= 500 and status != 501)
    if isinstance(error, PipelineError):
        return str(error), False
    if isinstance(error, ValueError | requests.TooManyRedirects):  # a wrong URL or header
        return type(error).__name__, False
    cause = root_cause(error)
    may_pass = not isinstance(cause, ssl.SSLCertVerificationError)
    return f"{type(error).__name__}: {cause}", may_pass


def write_pages(pages: Iterable[list[Any]], config: Config, folder: Path, figures: Figures) -> Path:
    """Writes the records of all pages to a file, one a line.

    A record that comes again on a later page, because the list moved meanwhile, is kept as it is
    there. Within one page it stays twice, for the check of the keys.
    """
    key = key_paths(config)
    last_page: dict[str, str] = {}  # of the record with a key
    figures |= {"pages": 0, "records": 0}
    with (folder / "pages").open("w") as file:
        for page, records in enumerate(pages, 1):
            for record in records:
                of_record = dump_exactly([dig(record, path) for path in key])
                last_page[of_record] = str(page)
                file.write(f"{page}\t{of_record}\t{dump_exactly(record)}\n")  # JSON has no tab
            figures |= {"pages": page, "records": len(last_page)}
    with (folder / "pages").open() as written, (folder / "response.ndjson").open("w") as file:
        for number, of_record, record in (line.split("\t") for line in written):
            file.write(record if last_page[of_record] == number else "")
    return folder / "response.ndjson"


def key_paths(config: Config) -> list[tuple[str, ...]]:
    """Where a record has the keys of its tables; itself, where these are of its elements only."""
    return [c.path for t in config.tables if not t.rows for c in t.columns if c.in_key] or [()]


def read_pages(session: Any, source: Source, file: Path, figures: Figures) -> Iterator[list[Any]]:
    """Yields the records of page after page, each of which is downloaded to the file.

    Raises PipelineError where they go round in a circle, leave this host, skip records, have errors
    or are more than ``max_pages``.
    """
    request: Request | None = Request(source.url, source.body)
    seen, before = set[Request](), list[Any]()
    while request:
        page = f"page {len(seen) + 1}, {request},"
        if len(seen) == source.max_pages:
            raise PipelineError(f"{page} is one more than source.max_pages")
        if request in seen:
            raise PipelineError(f"{page} was there before")
        if session.should_strip_auth(source.url, request.url):
            raise PipelineError(f"{page} is on another host, or without TLS")
        link = download(session, request, file, source, figures)
        answer = read_answer(file, str(request))
        if source.body and isinstance(answer, dict) and answer.get("errors"):
            raise PipelineError(f"{page} has errors: {shorten(answer['errors'], 200)}")
        records = records_of(answer, source, str(request))
        if source.step and records and records == before:
            raise PipelineError(f"{page} repeats the one before, as if without source.next_param")
        if records and seen and len(before) < source.step > 1:
            raise PipelineError(f"{page} follows {len(before)} records, fewer than {source.next}")
        yield records
        if not source.next or (source.step and not records):
            return
        seen.add(request)
        request, before = next_request(source, request, answer, link), records


def read_answer(file: Path, what: str) -> Any:
    """The JSON of an answer. Raises PipelineError for anything else."""
    try:
        with open_body(file) as body:
            return json.load(body, parse_float=Decimal)
    except UNREADABLE as error:
        begins = shorten(getattr(error, "doc", "")[:2000], 200)
        raise PipelineError(f"{what}: not JSON: {error}: {begins}") from None


def records_of(answer: Any, source: Source, what: str) -> list[dict[str, Any]]:
    """The records in an answer. Raises PipelineError where there is no array of objects."""
    records = dig(answer, split_path(source.records))
    if not isinstance(records, list):
        items = answer.items() if isinstance(answer, dict) else ()
        arrays = [join_path([name]) for name, value in items if isinstance(value, list)]
        hint = f"; set it to {' or '.join(arrays)}" if arrays else ""
        raise PipelineError(f"{what}: no array at source.records: {shorten(answer, 200)}{hint}")
    for record in records:
        if not isinstance(record, dict):
            raise PipelineError(f"{what}: record is not an object: {shorten(record)}")
    return records


def next_request(source: Source, request: Request, answer: Any, link: str) -> Request | None:
    """The request for the page after the one with this answer; None after the last."""
    if source.step:
        return with_parameter(request, source.next_param, number_of(request, source) + source.step)
    following = link if source.next == "Link" else next_field(source, answer)
    if following in (None, ""):
        return None
    if source.next_param and type(following) in (int, str):
        return with_parameter(request, source.next_param, following)
    if not source.next_param and re.match(r"https?://|[/?]", str(following)):
        return replace(request, url=absolute_url(request.url, str(following), "source.next"))
    raise PipelineError(f"{request}: no URL or cursor at source.next: {shorten(following)}")


def next_field(source: Source, answer: Any) -> Any:
    """What an answer has at source.next; null after the last page."""
    if source.next.endswith("?") and not source.next.endswith(r"\?"):
        return dig(answer, split_path(source.next.removesuffix("?")))
    for name in split_path(source.next):
        if answer is not None and (not isinstance(answer, dict) or name not in answer):
            advice = f"if only the last page has none, write {source.next}?"
            raise PipelineError(f"the answer has no {source.next} (source.next); {advice}")
        answer = answer and answer[name]
    return answer


def number_of(request: Request, source: Source) -> int:
    """What is counted: the request's own number, else 1 for a page and 0 for an offset."""
    own: Any = dict(parse_qsl(urlsplit(request.url).query)).get(source.next_param)
    if request.body:
        own = dig(json.loads(request.body), split_path(source.next_param))
    return int(source.step == 1 if own is None else own)


def with_parameter(request: Request, name: str, value: Any) -> Request:
    """The request with a parameter of its URL, or a path in its body, set to a value."""
    if request.body:
        *outer, last = split_path(name)
        body = inner = json.loads(request.body)
        for part in outer:
            inner = inner.setdefault(part, {})
        inner[last] = value
        return replace(request, body=json.dumps(body, allow_nan=False))
    url = urlsplit(request.url)
    others = [p for p in url.query.split("&") if p and unquote_plus(p.partition("=")[0]) != name]
    query = "&".join([*others, urlencode({name: value})])
    return replace(request, url=url._replace(query=query).geturl())


def is_one_object(file: Path) -> bool:
    """Whether a file is one JSON object, like an answer, and not a line for each record."""
    with contextlib.suppress(*UNREADABLE), open_body(file) as body:
        if body.peek(1000).lstrip(BOM + WHITESPACE).startswith(b"{"):
            lines = filter(bytes.strip, body)
            return not next(lines).rstrip().endswith(b"}") or not next(lines, b"")
    return False


DECIMAL_MARK = secrets.token_hex(8)  # random, so that it stands in no text of the source


def dump_exactly(value: Any) -> str:
    """JSON on one line in which each Decimal keeps its digits."""
    text = json.dumps(value, default=lambda number: f"{DECIMAL_MARK}{number}{DECIMAL_MARK}")
    return text.replace(f'"{DECIMAL_MARK}', "").replace(f'{DECIMAL_MARK}"', "")


def open_body(path: Path) -> Any:
    """Opens a source as it was served; the raw responses in S3 are gzipped."""
    with path.open("rb") as file:
        is_gzipped = file.read(2) == b"\x1f\x8b"
    return gzip.open(path) if is_gzipped else path.open("rb")


def read_records(path: Path) -> Iterator[list[dict[str, Any]]]:
    """Yields the records in a file, gzipped or not, as lists of what a piece of the file holds.

    They are the objects of a JSON array, or of newline-delimited JSON. Numbers with a fraction or
    an exponent become Decimal, so that no digit is lost. Raises PipelineError for anything else.
    """
    count, size, records = 0, 0, list[Any]()
    try:
        with open_body(path) as body:
            for element, length in read_elements(body):
                count, size = count + 1, size + length
                if not isinstance(element, dict):
                    raise PipelineError(f"record {count} is not an object: {shorten(element)}")
                records.append(element)
                if size > READ_BYTES:
                    yield records
                    size, records = 0, []
    except json.JSONDecodeError as error:
        near = shorten(masked(error.doc[: error.pos])[-40:] + masked(error.doc[error.pos :])[:40])
        raise PipelineError(f"not JSON after record {count}: {error.msg}, near {near}") from None
    except UNREADABLE as error:
        raise PipelineError(f"not readable after record {count}: {error}") from None
    yield records


DECODER = json.JSONDecoder(parse_float=Decimal)


def read_elements(body: BinaryIO) -> Iterator[tuple[Any, int]]:
    """Yields what a JSON array holds, or each line, with its length."""
    begins = skip_blanks(body.read(len(BOM) + READ_BYTES).removeprefix(BOM), body)
    if begins.startswith(b"["):
        yield from read_array(skip_blanks(begins[1:], body), body)
    elif begins.startswith(b"{"):
        for line in chain((begins + body.readline()).split(b"\n"), body):
            if line.strip(WHITESPACE):
                yield DECODER.decode(line.decode()), len(line)
    elif begins:
        text = begins.decode(errors="replace")
        raise PipelineError(f"the source is no JSON array, it begins {shorten(text, 200)}")


def skip_blanks(buffer: bytes, body: BinaryIO) -> bytes:
    """The buffer, or the next piece of the body, from what is no white space on; b"" at the end."""
    while not (buffer := buffer.lstrip(WHITESPACE)) and (more := body.read(READ_BYTES)):
        buffer = more
    return buffer


def read_array(buffer: bytes, body: BinaryIO) -> Iterator[tuple[Any, int]]:
    """Yields the elements of a JSON array whose bracket is read already.

    A piece ends with a comma, or where the body ends. Up to a comma every number and literal is
    complete, so that more text can only mend an error at the end of the piece, or a string that
    does not end in it. The buffer holds bytes: in a text, a single emoji would make each character
    take four.
    """
    delimiter: Any = re.compile(rf"[{WHITESPACE.decode()}]*([,\]])[{WHITESPACE.decode()}]*").match
    is_open, buffer = buffer[:1] != b"]", buffer.removeprefix(b"]")
    while is_open:
        # As much again, so that one huge record is not scanned from its start for every piece.
        more, position = body.read(max(READ_BYTES, len(buffer))), 0
        buffer = (buffer + more).lstrip(WHITESPACE)
        cut = buffer.rfind(b",") + 1 if more else len(buffer)
        piece = buffer[:cut].decode()
        try:
            while is_open:
                element, end = DECODER.raw_decode(piece, position)
                yield element, end - position
                found = delimiter(piece, end)
                if not found:
                    raise json.JSONDecodeError("Expecting ',' delimiter", piece, end)
                is_open, position = found[1] == ",", found.end()
        except json.JSONDecodeError as error:
            if not more and not buffer.rstrip(WHITESPACE).endswith(b"]"):
                raise json.JSONDecodeError("it ends early", piece, len(piece)) from None
            if not more or (error.pos < len(piece) and not error.msg.startswith("Unterminated")):
                raise
        buffer = piece[position:].encode() + buffer[cut:]
    if more := skip_blanks(buffer, body):
        raise json.JSONDecodeError("Extra data after the array", more.decode(errors="replace"), 0)


# --- transform ----------------------------------------------------------------------------------


class Unfit(Exception):
    """A value does not fit its column; the message is the rule that it breaks."""


def read_frames(
    body: Path, tables: tuple[Table, ...], names: FieldNames
) -> Iterator[list[pd.DataFrame]]:
    """Yields the rows of each table, some thousand records at a time, as typed and checked frames.

    Adds the names of all fields that it meets.
    """
    count, columns = Counter[str](), [Columns(list) for _ in tables]
    for records in read_records(body):
        for table, of_table in zip(tables, columns, strict=True):
            flatten(records, table, of_table, names)
        count.update(pieces=1, records=len(records))
        if count["pieces"] == CHUNK_PIECES or count["records"] >= CHUNK_RECORDS:
            yield list(map(to_frame, tables, columns))
            count, columns = Counter(), [Columns(list) for _ in tables]
    if not names and any(table.min_rows and not table.rows for table in tables):
        raise PipelineError("the source is empty: only min_rows: 0 lets an empty one be loaded")
    yield list(map(to_frame, tables, columns))


def flatten(records: Records, table: Table, columns: Columns, names: FieldNames) -> None:
    """Appends the rows in the records to the columns: for each row the value at each path.

    Values for super become JSON, times and decimals the text that COPY reads, the others stay as
    they are. Raises PipelineError for the first value that does not fit its column, or is no object
    where a path goes on.
    """
    rows = explode(records, table)
    if not rows:
        return
    values: dict[tuple[str, ...], Sequence[Any]] = {(): rows}
    for column, paths in table.paths_by_object.items():
        objects = checked(column, values[column.path], table, rows)
        names[source_path(table, column.path)].update(*objects)
        inner = [path[-1] for path in paths]
        found = [tuple(map(one.get, inner)) for one in objects]
        values |= zip(paths, zip(*found, strict=True), strict=True)
    for column in table.columns:
        columns[column.name] += checked(column, values[column.path], table, rows)


def explode(records: Records, table: Table) -> Records:
    """The rows of a table in the records, as objects.

    These are the records themselves, or with ``rows`` the elements of that array, each with its
    record under the name ``parent`` and, unless it has one of its own, its ``position`` from 1. An
    element that is no object becomes the ``value`` of one: for arrays of ids.
    """
    if not table.rows:
        return records
    parents = [{str(table.parent): record} for record in records]
    found: Sequence[Any] = records
    for name in split_path(table.rows):
        found = [one.get(name) for one in checked(Column((), "", "object"), found, table, parents)]
    arrays = checked(Column((), "", "array"), found, table, parents)
    names, rows = {column.path[0] for column in table.columns}, []
    for parent, elements in zip(parents, arrays, strict=True):
        own = ["position" in element for element in elements if isinstance(element, dict)]
        if "position" in names and 0 < sum(own) < len(elements):
            raise misfit(table, parent, (), elements, "has a position in some elements, not in all")
        for position, element in enumerate(elements, 1):
            counted = {"position": position} if "position" in names else {}
            row = element if isinstance(element, dict) else {"value": element}
            if row is not element and "value" not in names:
                raise misfit(table, counted | parent, (), element, "is not an object")
            if table.parent in row:
                rule = f"has a field {table.parent!r}: choose another name for parent"
                raise misfit(table, counted | parent, (), element, rule)
            rows.append({**counted, **row, **parent})
    return rows


def dig(value: Any, path: Iterable[str]) -> Any:
    """The value at a path in nested objects; None where the path ends early."""
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def checked(column: Column, values: Sequence[Any], table: Table, rows: list[Any]) -> Sequence[Any]:
    """What the column takes of its values.

    Raises PipelineError for the first value that does not fit, named by the key of its row.
    """
    try:
        return fit(column, values)
    except Unfit as rule:
        if len(values) == 1:
            raise misfit(table, rows[0], column.path, values[0], str(rule)) from None
        for row, value in zip(rows, values, strict=True):
            checked(column, [value], table, [row])
        raise


def misfit(table: Table, row: Any, path: tuple[str, ...], value: Any, rule: str) -> PipelineError:
    """Which value is wrong: the key of its row, or the row if it has none; path, value, rule."""
    key = {column.name: dig(row, column.path) for column in table.columns if column.in_key}
    named = shorten(row) if all(value is None for value in key.values()) else key_text(key)
    where = join_path(source_path(table, path))
    return PipelineError(f"{table.name}, {named}: {where}: {shorten(value)} {rule}")


def key_text(key: Mapping[Any, Any]) -> str:
    """A key in a message: ``id=5, position=1``."""
    return ", ".join(f"{name}={shorten(value)}" for name, value in key.items())


def source_path(table: Table, path: tuple[str, ...]) -> tuple[str, ...]:
    """A path of a table as the source has it; none for the record around an element."""
    element = split_path(f"{table.rows}[]") if table.rows else ()
    return path[1:] if path[:1] == (table.parent,) else element + path


def fit(column: Column, values: Sequence[Any]) -> Sequence[Any]:
    """The values as a column takes them; all at once, which is several times as fast.

    Raises Unfit with the rule that one of them breaks. Only numbers for real, double precision and
    in super are rounded, to the nearest that these hold.
    """
    if (column.in_key or column.not_null) and None in values:
        raise Unfit("in the key" if column.in_key else "in a column that is not null")
    match column.kind:
        case "object" | "array" as kind:  # no types of columns, but what stands on the way to them
            container = {"object": dict, "array": list}[kind]
            if kind == "object" and list in map(type, values):
                raise Unfit("is an array: arrays in arrays are not supported, super is")
            refuse_others(values, f"an {kind}", container)
            return [value or container() for value in values]
        case "boolean":
            refuse_others(values, "a boolean", bool)
        case "smallint" | "integer" | "bigint":
            refuse_others(values, "an integer", int)
            limit = 1 << {"smallint": 15, "integer": 31, "bigint": 63}[column.kind]
            if not all(-limit <= value < limit for value in filter(None, values)):
                raise Unfit(f"is outside {-limit} to {limit - 1}")
        case "varchar":
            refuse_others(values, "a text", str)
            refuse_texts(list(filter(None, values)), column.arguments[0])
        case "super":
            return to_super(values)
        case kind:
            return [None if value is None else CONVERT[kind](column, value) for value in values]
    return values


def refuse_others(values: Sequence[Any], what: str, *types: type) -> None:
    """Raises Unfit unless each value is null or of these very types: True is no integer."""
    if not {type(None), *types}.issuperset(map(type, values)):
        raise Unfit(f"is not {what}")


def refuse_texts(texts: list[str], most: int) -> None:
    """Raises Unfit for texts of more bytes, and for what Redshift cannot hold in a text."""
    together = "".join(texts)
    if "\0" in together:
        raise Unfit("has a NUL character, which Redshift cannot hold")
    try:
        size = max(map(len, texts if together.isascii() else map(str.encode, texts)), default=0)
    except UnicodeEncodeError:
        raise Unfit("has a lone surrogate, which UTF-8 cannot hold") from None
    if size > most:
        raise Unfit(f"has a text of {size} bytes, at most {most} fit")


FLOATS = {"real": (ctypes.c_float, 2.0**-126), "double precision": (ctypes.c_double, 2.0**-1022)}


def to_float(column: Column, number: Any) -> float:
    """A number that real or double precision holds, if rounded."""
    refuse_others([number], "a number", int, Decimal)
    value, (held, least) = float(Decimal(number)), FLOATS[column.kind]
    if number and not least <= abs(held(value).value) < math.inf:
        raise Unfit(f"is outside the range of {column.kind}")
    return value


def to_decimal(column: Column, number: Any) -> str:
    """A number in all its digits; many APIs serve money in quotes."""
    refuse_others([number], "a number", int, Decimal, str)
    if isinstance(number, str) and not re.fullmatch(r"-?\d+(\.\d+)?", number, re.ASCII):
        raise Unfit("is not a number")
    precision, scale = column.arguments
    exact = Context(prec=precision, traps=[Inexact, InvalidOperation])
    try:
        return format(exact.quantize(Decimal(number), Decimal(1).scaleb(-scale)), "f")
    except DecimalException:
        raise Unfit(f"does not fit decimal({precision},{scale}) exactly") from None


TIME = r"(?a)\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d{1,6})?"
TIMES = {  # how a text has to be written, with an example
    "date": (r"(?a)\d{4}-\d\d-\d\d", "2006-03-24"),
    "timestamp": (TIME, "2006-03-24T22:30:00.123456, without an offset"),
    "timestamptz": (rf"{TIME}(Z|[+-]\d\d(:?\d\d)?)", "2006-03-24T22:30:00.123456Z, with an offset"),
}


def to_time(column: Column, text: object) -> str:
    """ISO 8601, as COPY reads it with TIMEFORMAT 'auto': microseconds, and UTC for an offset."""
    pattern, example = TIMES[column.kind]
    if not isinstance(text, str) or not re.fullmatch(pattern, text):
        raise Unfit(f"is not a {column.kind} such as {example}")
    try:
        moment = datetime.fromisoformat(text)
        if moment.utcoffset():
            text = moment.astimezone(UTC).isoformat()
    except (ValueError, OverflowError):
        raise Unfit("is outside the years 1 to 9999, or does not exist in the calendar") from None
    if column.kind == "date":
        return text
    # From the text: isoformat() takes longer than all the rest.
    zone = "Z" if column.kind == "timestamptz" else ""
    return f"{text[:10]}T{text[11:19]}.{moment.microsecond:06}{zone}"


CONVERT: dict[str, Callable[[Column, Any], Any]] = dict.fromkeys(TIMES, to_time)
CONVERT |= {"decimal": to_decimal} | dict.fromkeys(FLOATS, to_float)


# A number with a fraction becomes the nearest double, as most readers of JSON take it.
SUPER = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, check_circular=False, separators=(",", ":"), default=float
)
STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"')  # in JSON


def to_super(values: Sequence[Any]) -> list[str | None]:
    """The values as JSON."""
    try:
        # Most arrays that APIs serve are empty, and encode() takes its time to begin.
        texts = [None if v is None else "[]" if v == [] else SUPER.encode(v) for v in values]
    except (ValueError, RecursionError) as error:  # NaN, Infinity; nested too deeply
        raise Unfit(f"is not JSON that super holds: {error}") from None
    present = list(filter(None, texts))
    refuse_texts(present, 16 << 20)
    for text in present:
        if len(text) > 65_535 // 4 or r"\u0000" in text:  # a character has at most four bytes
            refuse_texts(list(map(json.loads, STRING.findall(text))), 65_535)
    return texts


# What pandas calls the types; all others are texts in the CSV, and objects for pandas.
DTYPES = {"boolean": "boolean", "real": "Float64", "double precision": "Float64"}
DTYPES |= dict.fromkeys(("smallint", "integer", "bigint"), "Int64")


def to_frame(table: Table, columns: Columns) -> pd.DataFrame:
    """The frame of checked values. Raises PipelineError where two of these rows have one key."""
    dtypes = {column.name: DTYPES.get(column.kind, "object") for column in table.columns}
    frame = pd.DataFrame({n: pd.Series(columns[n], dtype=dtype) for n, dtype in dtypes.items()})
    # Redshift compares texts without the spaces at their end.
    keys = frame[list(table.key)].apply(lambda k: k.str.rstrip(" ") if k.dtype == object else k)
    refuse_doubles(table, keys[keys.duplicated()].drop_duplicates().head(5).to_dict("records"))
    return frame


def refuse_doubles(table: Table, keys: list[dict[Any, Any]]) -> None:
    """Raises PipelineError for keys that more than one row has."""
    if keys:
        shown = "; ".join(map(key_text, keys))
        raise PipelineError(f"{table.name}: more than one row has the key {shown}")


def warn_of_drift(tables: tuple[Table, ...], names: FieldNames) -> None:
    """Logs the fields that no table loads, and those that no record has."""
    met = {(*path, name) for path, found in names.items() for name in found}
    known, wanted = set[tuple[str, ...]](), set[tuple[str, ...]]()
    for table in tables:
        paths, rows = [source_path(table, c.path) for c in table.columns], split_path(table.rows)
        known |= {path[:depth] for path in (*paths, rows) for depth in range(len(path) + 1)}
        if not met.isdisjoint(paths):  # a table without rows has not looked at any field
            wanted.update(paths)
        if rows:
            element = source_path(table, ())
            known.add((*element, str(table.parent)))
            wanted.discard((*element, "position"))  # counted where it is not served
    unknown = map(join_path, sorted(met - known))
    if shown := ", ".join(path if path.isprintable() else shorten(path) for path in unknown):
        log.warning("the source has fields that no table loads: %s", shown)
    for path in sorted(wanted - met - {()}):
        log.warning("no record has the field %s, so its column is null", join_path(path))


# --- stage --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One run of a pipeline. Ids sort by time."""

    config: Config
    allow_shrink: bool = False
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    token: str = field(default_factory=lambda: secrets.token_hex(4))
    rows: Counter[str] = field(default_factory=Counter)  # so far, by table

    @property
    def id(self) -> str:
        """Such as ``20261122T204327.031323Z-e33fbe39``."""
        return f"{self.started:%Y%m%dT%H%M%S.%fZ}-{self.token}"

    @property
    def null(self) -> str:
        r"""What stands for NULL in the CSV files; a text might be the usual \N, but not this."""
        return f"NULL-{self.token}"

    @property
    def seconds(self) -> float:
        """How long it has taken so far."""
        return (datetime.now(UTC) - self.started).total_seconds()

    def url(self, name: str, file: str) -> str:
        """Where the run stages a file of a table, or of the raw response."""
        day, staging = f"{self.started:%Y/%m/%d}", self.config.staging
        return f"s3://{staging.bucket}/{staging.prefix}/{name}/{day}/{self.id}/{file}"


def to_csv(frame: pd.DataFrame, null: str) -> list[bytes]:
    """The rows of a frame as lines of CSV, in which every text is quoted and NULL is not.

    The csv module cannot do that, and before Python 3.13 leaves a lone carriage return unquoted;
    DataFrame.to_csv takes several times as long.
    """

    def cells(data: pd.Series[Any]) -> Iterable[str]:
        if data.dtype == object:
            return (null if t is None else '"' + t.replace('"', '""') + '"' for t in data.tolist())
        if data.dtype == "boolean":  # Redshift's guide knows t and f, not True and False
            data = data.map({True: "t", False: "f"})
        return map(str, data.to_numpy(object, na_value=null))

    rows = zip(*(cells(frame[name]) for name in frame), strict=True)
    # One by one: in a text of all, a single emoji would make each character take four bytes.
    return [",".join(row).encode() for row in rows]


def warn_of_large_rows(table: Table, frame: pd.DataFrame, lines: list[bytes]) -> None:
    """Logs the rows that are over COPY's limit in its guide; a newer page allows SUPER more."""
    for number, line in enumerate(lines):
        if len(line) > 4 << 20:
            (key,) = frame[list(table.key)][number : number + 1].to_dict("records")
            size = f"{len(line) / 1e6:.1f} MB of CSV, COPY may refuse more than 4"
            log.warning("%s, %s: the row has %s", table.name, key_text(key), size)


class Stager:
    """Compresses the files of a run, uploads them to S3 and deletes them here.

    Until ``finish`` it does so in threads beside the parsing: zlib and the network release the GIL.
    Without a client the parts stay in the folder, and the response is not staged.
    """

    def __init__(self, run: Run, folder: Path, s3: Any) -> None:
        self.run, self.folder, self._s3 = run, folder, s3
        self.figures = Counter(files=0, bytes=0)  # uploaded so far
        self.parts: dict[str, list[Path]] = {table.name: [] for table in run.config.tables}
        self._open: dict[str, gzip.GzipFile] = {}  # each table's last part
        self._threads = ThreadPool(1), ThreadPool(1)  # for the parts in their order, the response
        self._ahead: deque[AsyncResult[None]] = deque()

    def stop(self) -> None:
        """Leaves undone what has not been done."""
        for thread in self._threads:
            thread.terminate()

    def begin_raw(self, body: Path) -> None:
        """Begins to stage the response."""
        if self._s3:
            self._raw = self._threads[1].apply_async(compress_raw, [body, self.folder])

    def write(self, table: Table, frame: pd.DataFrame) -> None:
        """Appends the rows of a frame to the table's parts; waits while too many are ahead."""
        lines = to_csv(frame, self.run.null)
        warn_of_large_rows(table, frame, lines)
        self._ahead.append(self._threads[0].apply_async(self._append, [table, lines]))
        self.run.rows[table.name] += len(frame)
        if len(self._ahead) > CHUNKS_AHEAD:
            self._ahead.popleft().get()

    def end_parts(self) -> None:
        """Waits until all that was written is in its parts, and these are in S3."""
        self._ahead.extend(self._threads[0].apply_async(self._end_part, [t]) for t in self.parts)
        for result in self._ahead:
            result.get()

    def stage_manifests(self) -> None:
        """Stages for each table the list of its parts, which COPY reads."""
        for name, parts in self.parts.items():
            manifest = self.folder / "manifest.json"
            entries = [{"url": self.run.url(name, p.name), "mandatory": True} for p in parts]
            manifest.write_text(json.dumps({"entries": entries}, indent=2))
            self._upload(name, manifest)

    def finish(self) -> dict[str, str]:
        """Stages the response and the manifests; tells where rows come from."""
        raw, sha256 = self._raw.get()
        self._upload("raw", raw)
        self.stage_manifests()
        source = masked(self.run.config.source.url)
        return {"source": source, "raw": self.run.url("raw", raw.name), "sha256": sha256}

    def _append(self, table: Table, lines: list[bytes]) -> None:
        parts = self.parts[table.name]
        if parts and parts[-1].stat().st_size > self.run.config.staging.part_mb << 20:
            self._end_part(table.name)
        if table.name not in self._open:
            parts.append(self.folder / f"{table.name}.{len(parts) + 1:04}.csv.gz")
            self._open[table.name] = gzip.GzipFile(parts[-1], "wb", GZIP_LEVEL, mtime=0)
            lines = [",".join(table.names).encode(), *lines]
        self._open[table.name].write(b"\n".join([*lines, b""]))

    def _end_part(self, name: str) -> None:
        self._open.pop(name).close()
        self._upload(name, self.parts[name][-1])

    def _upload(self, name: str, file: Path) -> None:
        if not self._s3:
            return
        key = self.run.config.staging.kms_key
        encryption = {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": key} if key else {}
        if key == "AES256":  # for a bucket whose policy demands the header
            encryption = {"ServerSideEncryption": key}
        threadless = boto3.s3.transfer.TransferConfig(use_threads=False)  # a signal ends it at once
        url = self.run.url(name, file.name)
        with aws_errors("write", url, "stage"):  # which goes on beside the transform
            bucket, path = urlsplit(url).netloc, urlsplit(url).path[1:]
            self._s3.upload_file(str(file), bucket, path, encryption, Config=threadless)
        self.figures.update(files=1, bytes=file.stat().st_size)
        file.unlink()


def compress_raw(body: Path, folder: Path) -> tuple[Path, str]:
    """Gzips the response into the folder; returns the file, and the SHA-256 of what is in it."""
    raw = folder / ("response.ndjson.gz" if body.suffix == ".ndjson" else "response.json.gz")
    digest = hashlib.sha256()
    with open_body(body) as response, gzip.open(raw, "wb", GZIP_LEVEL) as target:
        # Large pieces: beside the parsing, each waits for the GIL.
        for piece in iter(partial(response.read, 1 << 20), b""):
            digest.update(piece)
            target.write(piece)
    return raw, digest.hexdigest()


def aws_client(service: str, region: str | None = None) -> Any:
    """A client in $AWS_REGION, the profile's region, or else the region of the EC2 instance."""
    session = botocore.session.get_session()
    region = region or os.environ.get("AWS_REGION") or session.get_config_variable("region")
    region = region or botocore.utils.IMDSRegionProvider(session).provide()
    if not region:
        raise PipelineError("no AWS region: set AWS_REGION, or a region in the AWS profile")
    # S3 may ask to slow down, and takes its time to join parts; STS only helps a message.
    tries, seconds = {"s3": (10, 60), "sts": (1, 10)}.get(service, (3, 10))
    retries = {"mode": "standard", "total_max_attempts": tries}
    settings = botocore.config.Config(retries=retries, connect_timeout=10, read_timeout=seconds)
    return boto3.client(service, region_name=region, config=settings)


def bucket_client(bucket: str) -> Any:
    """A client in the region of the bucket, where S3 tells it."""
    with aws_errors("find", f"the bucket {bucket}"):
        s3 = aws_client("s3")
        try:
            answer = s3.head_bucket(Bucket=bucket)
        except botocore.exceptions.ClientError as error:
            answer = error.response  # also to those who must not look
    region = answer["ResponseMetadata"]["HTTPHeaders"].get("x-amz-bucket-region")
    return aws_client("s3", region)


@contextlib.contextmanager
def aws_errors(action: str, resource: str, of_step: str = "") -> Iterator[None]:
    """Turns what boto3 raises into a PipelineError: what could not be done to what, and as whom."""
    of_botocore = botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError
    try:
        yield
    except (*of_botocore, boto3.exceptions.Boto3Error) as error:
        context["step"] = of_step or context["step"]
        identity = ""
        with contextlib.suppress(Exception):
            identity = f" as {aws_client('sts').get_caller_identity()['Arn']}"
        kind = UnavailableError if aws_is_away(error) else PipelineError
        raise kind(f"cannot {action} {resource}{identity}: {error}") from None


def aws_is_away(error: Exception) -> bool:
    """Whether AWS did not answer, or was too busy, in each of boto3's tries."""
    cause: Any = root_cause(error)
    if isinstance(cause, botocore.exceptions.ClientError):
        status = cause.response["ResponseMetadata"]["HTTPStatusCode"]
        return status >= 500 or "Throttl" in cause.response["Error"]["Code"]
    return isinstance(cause, OSError) and not isinstance(cause, ssl.SSLCertVerificationError)


# --- load ---------------------------------------------------------------------------------------


def read_secret(secret: str) -> str:
    """The text of a secret in Secrets Manager."""
    with aws_errors("read", f"the secret {secret}"):
        manager = aws_client("secretsmanager")
        return str(manager.get_secret_value(SecretId=secret).get("SecretString"))


def read_credentials(redshift: Redshift) -> dict[str, Any]:
    """Reads the secret, a JSON object: host, port, database, user and password, in any case.

    AWS's own Redshift secrets say dbname and username, and some no host or database: these the
    configuration fills in. Raises PipelineError when it is something else; never shows a value.
    """
    secret = redshift.secret
    try:
        values = {name.lower(): value for name, value in json.loads(read_secret(secret)).items()}
    except (ValueError, TypeError, AttributeError):
        raise PipelineError(f"the secret {secret} is not a JSON object") from None
    values = {"database": values.get("dbname"), "user": values.get("username")} | values
    rules = {"host": HOST, "port": PORT, "database": ".+", "user": ".+", "password": ".+"}
    login = {name: str(values.get(name) or getattr(redshift, name, "")) for name in rules}
    unfit = [n for n in rules if not (re.fullmatch(rules[n], login[n]) and login[n].isprintable())]
    if lacking := ", ".join(map(str.upper, unfit)):
        also = "redshift.host and redshift.database may be set in the configuration instead"
        raise PipelineError(f"the secret {secret} has no {lacking}, or none that can be; {also}")
    hide(login["password"])
    return login | {"port": int(login["port"])}


def quoted(*names: str) -> str:
    """Identifiers in quotes, separated by commas; the dot of schema.table stays between two."""
    return ", ".join('"' + name.replace(".", '"."') + '"' for name in names)


def literal(text: str) -> str:
    """A text as an SQL literal: names, URLs and roles, in which the rules allow no backslash."""
    return "'" + text.replace("'", "''") + "'"


def create_sql(table: Table, temporary: bool = False) -> str:
    """CREATE of a target that does not exist yet, or of the temporary table that COPY fills.

    The latter vanishes with the session. It is not made LIKE the target, which may have columns
    that COPY is not given and that take no NULL.
    """
    what, name = ("TEMP TABLE", table.staging) if temporary else ("TABLE IF NOT EXISTS", table.name)
    columns = table.columns if temporary else (*table.columns, *META_COLUMNS)
    definitions = ",\n  ".join(column.sql for column in columns)
    dist = f"\nDISTKEY ({quoted(table.dist_key)})" if table.dist_key else ""
    sort = f"\nCOMPOUND SORTKEY ({quoted(*table.sort_key)})" if table.sort_key else ""
    return f"CREATE {what} {quoted(name)} (\n  {definitions}\n){dist}{sort}"


def copy_sql(run: Run, table: Table, region: str) -> str:
    """COPY of the files that the run has staged, and no others."""
    role = run.config.redshift.copy_role or os.environ.get("AWS_ROLE_ARN")
    return f"""COPY {quoted(table.staging)} ({quoted(*table.names)})
FROM {literal(run.url(table.name, "manifest.json"))}
IAM_ROLE {literal(role) if role else "default"}
REGION {literal(region)}
MANIFEST GZIP CSV IGNOREHEADER 1
NULL AS {literal(run.null)}
DATEFORMAT 'auto' TIMEFORMAT 'auto'
COMPUPDATE OFF STATUPDATE OFF"""


def doubles_sql(table: Table) -> str:
    """SELECT of the keys that several staged rows have: Redshift enforces no primary key."""
    texts = {column.name for column in table.columns if column.kind == "varchar"}
    key = ", ".join(f"rtrim({quoted(n)})" if n in texts else quoted(n) for n in table.key)
    staging = quoted(table.staging)
    return f"SELECT {key}\nFROM {staging}\nGROUP BY {key}\nHAVING count(*) > 1\nLIMIT 5"


def delete_sql(table: Table) -> str:
    """DELETE of the rows that the staged ones replace.

    Not TRUNCATE, which commits; and no lock, so that readers and the load never wait.
    """
    target, staging = quoted(table.name), quoted(table.staging)
    same = " AND ".join(f"{target}.{quoted(n)} = {staging}.{quoted(n)}" for n in table.key)
    of_staged = f"\nUSING {staging}\nWHERE {same}" if table.mode == "upsert" else ""
    return f"DELETE FROM {target}{of_staged}"


def insert_sql(run: Run, table: Table) -> str:
    """INSERT of the staged rows into the target.

    Not SYSDATE, which is when the transaction began, perhaps before another load's turn.
    """
    names = quoted(*table.names)
    return f"""INSERT INTO {quoted(table.name)} ({names}, "_run_id", "_loaded_at")
SELECT {names}, {literal(run.id)}, GETDATE()
FROM {quoted(table.staging)}"""


LOGIN_REFUSED, NO_SUCH_TABLE, BROKEN = "28000", "42P01", "08006"  # SQLSTATE
# 40001: two loaders wrote the same table; 40P01: they wait for one another; 23505, 42701, 42710,
# 42P07: two made a table or a column at the same moment (Redshift enforces no unique key of ours);
# 55P03: no lock in time; 53, 57P0, 08: no room for another connection, the server stops or starts,
# the connection broke.
TRANSIENT_CODES = re.compile("40001|40P01|23505|42701|42710|42P07|55P03|53...|57P0.|08...")
# What has no code of its own: a conflict with isolation by serialization (1023) and by snapshots, a
# table that somebody dropped while the catalog was read, S3 in COPY.
TRANSIENT_TEXTS = re.compile(
    "^1023|could not complete because of conflict with concurrent transaction"
    "|could not open relation with OID|S3ServiceException.*(SlowDown|InternalError|Status 50[03])"
)


def redshift_error(error: Exception) -> PipelineError:
    """What the driver raised, as one sentence; it hands on the server's message as a dict."""
    if not isinstance(error, redshift_connector.Error | OSError | struct.error):
        raise error
    said = next((argument for argument in error.args if isinstance(argument, dict)), {})
    code, text = said.get("C", ""), ". ".join(said[n] for n in "MD" if said.get(n))
    if not said:
        cause = next((argument for argument in error.args if isinstance(argument, OSError)), error)
        text = str(cause).partition(" We noticed a timeout")[0]  # a guess of the driver, and wrong
        code = "" if isinstance(cause, ssl.SSLCertVerificationError) else BROKEN
    is_transient = TRANSIENT_CODES.fullmatch(code) or TRANSIENT_TEXTS.search(text)
    return (TransientError if is_transient else PipelineError)(text, code)


def connect(redshift: Redshift) -> Any:
    """Connects over TLS to a host whose certificate has its name.

    Tries again for ``connect_seconds``: a paused cluster takes minutes to resume. A refused login
    has the secret read once more: its password may have been rotated meanwhile.
    """
    give_up, wait, refused = time.monotonic() + redshift.connect_seconds, 1.0, False
    while True:
        login = read_credentials(redshift)
        try:
            connection = redshift_connector.connect(
                **login,
                sslmode="verify-full",  # by default the driver only warns of another host's name
                timeout=30,
                tcp_keepalive_idle=60,
                application_name="sequra_challenge",
            )
            # The driver's time-out is for every answer, COPY's too.
            connection._usock.settimeout(redshift.statement_seconds + ANSWER_MARGIN)
            return connection
        except Exception as caught:
            error, left = redshift_error(caught), give_up - time.monotonic()
        if error.code == LOGIN_REFUSED and not refused:
            refused = True
            continue
        if not isinstance(error, TransientError) or left <= 0:
            to = "{host}:{port}, database {database}".format(**login)
            kind = UnavailableError if isinstance(error, TransientError) else PipelineError
            raise kind(f"cannot connect to Redshift at {to}: {error}", error.code)
        pause(min(wait, left), f"cannot connect: {error}, trying again in {min(wait, left):.0f} s")
        wait = min(wait * 2, 15)


def check_login(redshift: Redshift) -> None:
    """Raises PipelineError where login fails, unless Redshift is away: it may be back later."""
    try:
        connect(replace(redshift, connect_seconds=0)).close()
    except PipelineError as error:
        if not TRANSIENT_CODES.fullmatch(error.code):
            raise
        log.info("%s, trying again after the transform", error)


@contextlib.contextmanager
def session_on(redshift: Redshift) -> Iterator[Any]:
    """A cursor on a new connection, which commits each statement; closed even when broken."""
    connection = connect(redshift)
    try:
        connection.autocommit = True  # pg_last_copy_id() does not survive a rollback
        cursor = connection.cursor()
        execute(cursor, f"SET statement_timeout TO {redshift.statement_seconds * 1000}")
        yield cursor
    finally:
        with contextlib.suppress(redshift_connector.Error, OSError):
            connection.close()  # the server rolls back what was not committed


def execute(cursor: Any, sql: str, *values: Any, advice: str = "") -> Any:
    """Executes one statement. Raises PipelineError: how it begins, the server's reason, advice."""
    began = time.perf_counter()
    try:
        return cursor.execute(sql, values or None)
    except Exception as caught:
        error = redshift_error(caught)
        text = f"{' '.join(sql.split())[:60]}…: {error}{advice}"
        raise type(error)(text, error.code) from None
    finally:
        log.debug("%.3f s: %s", time.perf_counter() - began, sql)


Loaded = tuple[dict[str, int], dict[str, int]]  # rows of each table now, difference: see load()


def load(run: Run, region: str, lineage: dict[str, str]) -> Loaded:
    """Loads the staged files; where that may help again, on a new connection: twice does no harm.

    The pauses in between grow, with jitter, so that two loaders do not meet again. After the last
    try it is looked up whether only the answer to its commit got lost. Then, and when a try finds
    that of the one before, the rows are those that were staged, without a difference.
    """
    tries = 0
    while True:
        tries += 1
        try:
            return load_once(run, region, lineage)
        except TransientError as error:
            if tries == LOAD_TRIES:
                # Where nothing can be looked up, the failure is told that led there.
                with contextlib.suppress(PipelineError), session_on(run.config.redshift) as cursor:
                    if begin_turn(cursor, run):
                        return dict(run.rows), {}
                raise
            wait = 2**tries * random.uniform(0.5, 1)
            pause(wait, f"{error}, trying again in {wait:.1f} s")


def load_once(run: Run, region: str, lineage: dict[str, str]) -> Loaded:
    """Copies the staged files into temporary tables, and swaps the rows of all tables at once."""
    with session_on(run.config.redshift) as cursor:
        prepare_targets(cursor, run.config)
        for table in run.config.tables:
            copy(cursor, run, table, region)
        return (dict(run.rows), {}) if begin_turn(cursor, run) else swap(cursor, run, lineage)


AUDIT_COLUMNS = """table_name varchar(255), mode varchar(16), source varchar(4096),
manifest varchar(4096), raw varchar(4096), sha256 varchar(64), rows_before bigint,
rows_loaded bigint, started_at timestamptz"""


def audit_table(config: Config) -> Table:
    """The table that gets a row for each run and table, and that loaders lock to take turns."""
    columns = tuple(parse_column(*text.split()) for text in AUDIT_COLUMNS.split(","))
    return Table(name=config.redshift.audit_table, columns=columns, key=())


WIDEN_ADVICE = (
    "; no row has changed. The column {} of {} cannot be widened while a view uses it, nor with a "
    "DEFAULT or one of the encodings BYTEDICT, RUNLENGTH, TEXT255 and TEXT32K: remove that, or {}"
)
COLUMNS_SQL = """SELECT column_name, data_type,
  character_maximum_length, numeric_precision, numeric_scale
FROM svv_columns WHERE table_schema = {} AND table_name = {}"""


def prepare_targets(cursor: Any, config: Config) -> None:
    """Creates missing tables, adds missing columns and widens narrower texts."""
    for sql, advice in planned_changes(cursor, config).items():
        level = logging.WARNING if sql.startswith("ALTER") else logging.INFO
        log.log(level, "%s", sql.partition(" (")[0])
        execute(cursor, sql, advice=advice)


def planned_changes(cursor: Any, config: Config) -> dict[str, str]:
    """The statements that make the tables fit, each with what to do where it is refused.

    Raises PipelineError where a table differs in a way that none of them would mend.
    """
    changes, faults = dict[str, str](), list[str]()
    for table in (*config.tables, audit_table(config)):
        existing, alter = existing_columns(cursor, table), f"ALTER TABLE {quoted(table.name)}"
        if not existing:
            changes[create_sql(table)] = ""
            continue
        old = quoted(table.name.partition(".")[2] + "_old")
        fix = f"move this table away, and the next run makes a new one: {alter} RENAME TO {old}"
        for column in (*table.columns, *META_COLUMNS):
            has = existing.pop(column.name, None)
            if has is None and not column.not_null:
                changes[f"{alter} ADD COLUMN {column.sql}"] = ""
            elif has and has.kind == column.kind == "varchar":
                if has.arguments < column.arguments:
                    sql = f"{alter} ALTER COLUMN {quoted(column.name)} TYPE {column.type}"
                    changes[sql] = WIDEN_ADVICE.format(column.name, table.name, fix)
            elif has is None or has.type != column.type:
                there, wanted = has.type if has else "missing", column.sql.partition(" ")[2]
                types = f"{there} in the table and {wanted} in the configuration"
                faults.append(f"{table.name}: the column {column.name} is {types}; {fix}")
        if existing:
            log.warning("%s also has the columns %s", table.name, ", ".join(existing))
    if faults:
        raise PipelineError("\n  ".join(["tables differ from the configuration:", *faults]))
    return changes


def existing_columns(cursor: Any, table: Table) -> dict[str, Column]:
    """The columns that the target has, by name; none where there is no such table."""
    written = {
        "character varying": "varchar({})",
        "numeric": "decimal({1},{2})",
        "timestamp without time zone": "timestamp",
        "timestamp with time zone": "timestamptz",
    }
    look = partial(execute, cursor, COLUMNS_SQL.format(*map(literal, table.name.split("."))))
    rows = look().fetchall()
    # It is looked at again, because another loader may just have made the table.
    if not rows and exists(cursor, table) and not (rows := look().fetchall()):
        raise PipelineError(f"{table.name} exists, but svv_columns hides it: ask an administrator")
    return {n: Column((), n, written.get(kind, kind).format(*more)) for n, kind, *more in rows}


def exists(cursor: Any, table: Table) -> bool:
    """Whether there is such a table, whatever the metadata shows."""
    try:
        execute(cursor, f"SELECT 1 FROM {quoted(table.name)} WHERE false")
    except PipelineError as error:
        if error.code != NO_SUCH_TABLE:
            raise
        return False
    return True


def copy(cursor: Any, run: Run, table: Table, region: str) -> None:
    """Copies a table's files into its staging table; checks the number of rows and the keys."""
    execute(cursor, create_sql(table, temporary=True))
    try:
        execute(cursor, copy_sql(run, table, region))
    except PipelineError as error:
        reason = None if isinstance(error, TransientError) else copy_error(cursor)
        raise type(error)(f"COPY for {table.name}: {reason or error}", error.code) from None
    (copied,) = execute(cursor, "SELECT pg_last_copy_count()").fetchone()
    staged = run.rows[table.name]
    if copied != staged:
        raise PipelineError(f"COPY for {table.name}: {copied} rows, but {staged} were staged")
    doubles = execute(cursor, doubles_sql(table)).fetchall()
    refuse_doubles(table, [dict(zip(table.key, row, strict=True)) for row in doubles])


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


LOCK_ADVICE = (
    "; if another session holds a lock on it, a superuser sees which: SELECT pid, txn_owner, "
    "txn_start FROM svv_transactions WHERE granted AND relation = {}::regclass::oid"
)


def begin_turn(cursor: Any, run: Run) -> bool:
    """Begins the transaction with the loaders' lock; tells whether the run is committed already."""
    audit = quoted(run.config.redshift.audit_table)
    execute(cursor, "BEGIN")
    # The snapshot is taken at the first query, which is why the lock comes before it.
    execute(cursor, f"LOCK {audit}", advice=LOCK_ADVICE.format(literal(audit)))
    sql = f'SELECT count(*) FROM {audit} WHERE "_run_id" = {literal(run.id)}'
    (rows,) = execute(cursor, sql).fetchone()
    if rows:
        log.info("done already, only the answer to its commit was lost")
    return bool(rows)


def swap(cursor: Any, run: Run, lineage: dict[str, str]) -> Loaded:
    """Puts the staged rows of all tables in place, and a row for each into the audit table.

    All in one transaction: a reader sees the rows of before or those of this run, everywhere.
    """
    rows, difference = dict[str, int](), dict[str, int]()
    for table in run.config.tables:
        count = execute(cursor, f"SELECT count(*) FROM {quoted(table.name)}")
        (rows[table.name],) = count.fetchone()
        refuse_shrinking(run, table, rows[table.name])
    for table in run.config.tables:
        deleted, loaded = execute(cursor, delete_sql(table)).rowcount, run.rows[table.name]
        execute(cursor, insert_sql(run, table))
        row = lineage | {
            "table_name": table.name,
            "mode": table.mode,
            "manifest": run.url(table.name, "manifest.json"),
            "rows_before": rows[table.name],
            "rows_loaded": loaded,
            "started_at": run.started.replace(microsecond=0),  # as whole as GETDATE()
            "_run_id": run.id,
        }
        audit, places = quoted(run.config.redshift.audit_table), ", ".join(["%s"] * len(row))
        sql = f'INSERT INTO {audit} ({quoted(*row)}, "_loaded_at") VALUES ({places}, GETDATE())'
        execute(cursor, sql, *row.values())
        difference[table.name] = loaded - deleted
        rows[table.name] += loaded - deleted
    if Stopped.by_signal:
        raise Stopped.by_signal
    execute(cursor, "COMMIT")
    return rows, difference


def refuse_shrinking(run: Run, table: Table, before: int) -> None:
    """Raises PipelineError when a replace would leave so few rows that the source seems broken."""
    least = max(table.min_rows, math.ceil(round(before * (1 - table.max_shrink), 6)))
    after = run.rows[table.name]
    if after < least and table.mode == "replace" and not run.allow_shrink:
        rows = f"{table.name} has {before} rows and would have {after}"
        limit = f"fewer than {least} (min_rows {table.min_rows}, max_shrink {table.max_shrink})"
        raise PipelineError(f"{rows}, {limit}; if that is right, run once with --allow-shrink")


# --- notify -------------------------------------------------------------------------------------


def tell(alerts: Alerts, event: str, what: str, lines: Sequence[str] = ()) -> dict[str, str]:
    """Tells all who hear of an event (failure, success or test).

    Returns for each channel that was told what failed, or "". It never changes how the run ended.
    """
    ended = {"success": "succeeded", "failure": "failed"}.get(event, "runs")
    subject = f"{context['pipeline']} {ended} on {platform.node()}"
    subject += f": {context['step']}" * (event == "failure")
    context["step"] = "alerts"
    text = "\n".join([f"{subject}: {what}", *lines])
    message = event, escaped(masked(subject)), escaped(masked(text))
    people_hear, failures = event in (*alerts.on, "test"), dict[str, str]()
    for channel, send, target, hears in (
        ("slack", send_slack, alerts.slack_webhook_secret, people_hear),
        ("sns", send_sns, alerts.sns_topic, people_hear),
        ("heartbeat", send_heartbeat, alerts.heartbeat_url, event != "failure"),
    ):
        if target and hears:
            failures[channel] = ""
            try:
                with limit_seconds(ALERT_SECONDS, f"no end after {ALERT_SECONDS} seconds"):
                    send(target, *message)
            except Exception as error:
                failures[channel] = masked(request_failure(error)[0])
                log.warning("%s: %s", channel, failures[channel])
    return failures


def send_slack(secret: str, event: str, _subject: str, text: str) -> None:
    """Posts a message to the incoming webhook whose URL is in the secret, as such or in JSON."""
    if not (found := re.search(r'https?://[^\s"]*', read_secret(secret))):
        raise PipelineError(f"the secret {secret} holds no URL")
    url = found[0]
    hide(url, urlsplit(url).path)
    icon = {"success": "✅ ", "failure": "❌ "}.get(event, "")
    text = html.escape(icon + text, quote=False)[:39_000]  # of 40,000 that Slack takes
    message = {"text": re.sub(r"&\w*$", "…", text)}  # not half a character
    with http_session({}) as session:
        session.post(url, json=message, timeout=ALERT_SECONDS).raise_for_status()


def send_sns(topic: str, _event: str, subject: str, text: str) -> None:
    """Publishes a message to the topic, in the topic's region."""
    subject = re.sub(r"[^ -~]+", "?", subject)[:100]  # what SNS takes
    with aws_errors("publish to", topic):
        sns = aws_client("sns", topic.split(":")[3])
        message = text.encode()[:250_000].decode(errors="ignore")
        sns.publish(TopicArn=topic, Subject=subject, Message=message)


def send_heartbeat(url: str, _event: str, _subject: str, _text: str) -> None:
    """Tells a dead man's switch that all is well."""
    hide(url, urlsplit(url).path, urlsplit(url).query)
    with http_session({}) as session:
        session.get(url, timeout=ALERT_SECONDS).raise_for_status()


# --- run ----------------------------------------------------------------------------------------


def run_pipeline(config: Config, dry_run: bool, allow_shrink: bool) -> int:
    """Runs the pipeline once, tells people how it went, and returns the exit status."""
    run, alerts = Run(config, allow_shrink), Alerts() if dry_run else config.alerts
    context.update(run_id=run.id, step="run")
    lines = [f"run: {run.id} from {config.source.url}"]
    try:
        what, event, status = run_steps(run, dry_run), "success", 0
    except (Exception, Stopped) as error:
        event, status = "failure", getattr(error, "status", 1)
        what = log_failure(error, duration=round(run.seconds * 1e9))
        lines += [f"staged: {rows_text(run.rows, {}) or 'none'}"]
    warnings = [r.getMessage() for r in history.buffer if r.levelno == logging.WARNING]
    tell(alerts, event, what, [*lines, f"took: {run.seconds:.1f} s", *warnings])
    return status


def log_failure(error: BaseException, **figures: Any) -> str:
    """Logs the error that ended the run, and returns it as alerts show it."""
    reason = str(error) if isinstance(error, EXPECTED) else f"{type(error).__name__}: {error}"
    if isinstance(error, MemoryError):
        reason = "not enough memory: a record takes several times its size"
    if getattr(error, "errno", None) == errno.ENOSPC:
        reason += f" in {tempfile.gettempdir()}"
    log.error("%s", reason, exc_info=error, extra={"figures": {"outcome": "failure"} | figures})
    return reason


def run_steps(run: Run, dry_run: bool) -> str:
    """Extracts, transforms, stages and loads; returns a text with the rows that each table has now.

    Raises PipelineError; then no row has changed, though tables may have been made or altered,
    unless the answer to the commit was lost, and Redshift then away.
    """
    config = run.config
    # What is entered first is left last: the folder is removed when signals are ignored.
    with contextlib.ExitStack() as at_end, stoppable():
        folder = Path(tempfile.gettempdir(), f"sequra-{secrets.token_hex(8)}")
        at_end.callback(remove, folder)
        folder.mkdir(mode=0o700)
        log.info("%s from %s", run.id, masked(config.source.url))
        if not dry_run:
            context["step"] = "connect"
            check_login(config.redshift)
        s3: Any = None if dry_run else bucket_client(config.staging.bucket)
        with step("extract", {}) as figures:
            body = extract(config, folder, figures)
            figures["bytes"] = body.stat().st_size
        stager = Stager(run, folder, s3)
        at_end.callback(stager.stop)
        stager.begin_raw(body)
        with step("transform", {"rows": run.rows}):
            stage_rows(body, stager)
        if dry_run:
            print_dry_run(run, stager.parts)
            at_end.pop_all()  # the files stay
            return rows_text(run.rows, {})
        with step("stage", stager.figures):
            lineage = stager.finish()
        with step("load", {"tables": len(config.tables)}):
            rows, difference = load(run, s3.meta.region_name, lineage)
        context["step"] = "run"
        done = rows_text(rows, difference)
        figures = {"outcome": "success", "rows": rows, "difference": difference}
        figures["duration"] = round(run.seconds * 1e9)
        log.info("done: %s, %.1f s", done, run.seconds, extra={"figures": figures})
        return done


def remove(folder: Path) -> None:
    """Removes the folder; renamed first, so that a thread that goes on can add no file to it."""
    with contextlib.suppress(OSError):
        shutil.rmtree(folder.rename(f"{folder}.removed"))


def stage_rows(body: Path, stager: Stager) -> None:
    """Reads the source, and stages the rows of all tables, chunk by chunk."""
    tables, names = stager.run.config.tables, FieldNames(set)
    for frames in read_frames(body, tables, names):
        for table, frame in zip(tables, frames, strict=True):
            stager.write(table, frame)
    stager.end_parts()
    warn_of_drift(tables, names)


def rows_text(rows: Mapping[str, int], difference: Mapping[str, int]) -> str:
    """The rows of each table, with the difference where it is known."""
    changes = {name: f" ({change:+})" for name, change in difference.items()}
    return ", ".join(f"{name} {count} rows{changes.get(name, '')}" for name, count in rows.items())


def print_dry_run(run: Run, parts: dict[str, list[Path]]) -> None:
    """Prints the files, the first rows and the SQL of a run that goes no further."""
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "<region>"
    for table in run.config.tables:
        files = "".join(f"\n--   {file}" for file in parts[table.name])
        print_lines(f"\n-- {table.name}: {run.rows[table.name]} rows in{files}")
        first = pd.read_csv(parts[table.name][0], nrows=3, dtype=str, keep_default_na=False)
        if run.rows[table.name]:
            print_lines(first.replace(run.null, "NULL").T.to_string(header=False, max_colwidth=36))
        sqls = [create_sql(table), create_sql(table, temporary=True), copy_sql(run, table, region)]
        sqls += [doubles_sql(table), delete_sql(table), insert_sql(run, table)]
        print_lines("\n\n".join(["", *sqls]))


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """The first SIGINT (Ctrl-C) or SIGTERM inside raises Stopped; any later one does nothing."""

    def stop(number: int, _frame: Any) -> None:
        on_signals(signal.SIG_IGN)
        Stopped.by_signal = Stopped(number)
        raise Stopped.by_signal

    def on_signals(handler: Any) -> None:
        signal.signal(signal.SIGINT, handler)
        signal.signal(signal.SIGTERM, handler)

    on_signals(stop)
    try:
        yield
    finally:
        on_signals(signal.SIG_IGN)


# --- check --------------------------------------------------------------------------------------


def check(config: Config) -> int:
    """Tries all that a run needs, from its configuration to its tables; returns the exit status.

    Prints a line for each. After a failure it goes on with what can be tried all the same.
    """
    run, failed = Run(config, token="check"), set[str]()
    frames = [to_frame(table, Columns(list)) for table in config.tables]
    print_lines(f"configuration: ok, tables {len(frames)}")
    temporary = tempfile.TemporaryDirectory(prefix="sequra-", ignore_cleanup_errors=True)
    with temporary as folder, stoppable():
        with attempt("aws", failed) as details, aws_errors("ask", "AWS who this is"):
            details += [aws_client("sts").get_caller_identity()["Arn"]]
            details += [f"region {aws_client('s3').meta.region_name}"]
        with attempt("redshift", failed) as details, session_on(config.redshift) as cursor:
            details += execute(cursor, "SELECT current_user, current_database()").fetchone()
        if "redshift" not in failed:
            with attempt("rights", failed), session_on(config.redshift) as cursor:
                check_rights(cursor, run)
        with attempt("source", failed), step("source", {}) as figures:
            body = extract(config, Path(folder), figures, pages=1)
            frames = next(read_frames(body, config.tables, FieldNames(set)))
        with attempt("bucket", failed):
            s3 = bucket_client(config.staging.bucket)
            stager = Stager(run, Path(folder), s3)
            for table, frame in zip(config.tables, frames, strict=True):
                stager.write(table, frame)
            stager.end_parts()
            stager.stage_manifests()
        if not failed & {"redshift", "bucket"}:
            with attempt("copy", failed) as details, session_on(config.redshift) as cursor:
                for table in config.tables:
                    copy(cursor, run, table, s3.meta.region_name)
                details += [rows_text(run.rows, {})] + ["without a source"] * ("source" in failed)
        if "redshift" not in failed:
            with attempt("tables", failed) as details, session_on(config.redshift) as cursor:
                for sql in planned_changes(cursor, config):
                    details.append(f"a run would {sql.partition(' (')[0]}")
    return int(bool(failed))


@contextlib.contextmanager
def attempt(name: str, failed: set[str]) -> Iterator[list[str]]:
    """Prints whether a part of the check is ok, with details, or else what is wrong."""
    context["step"], details = name, ["ok"]
    try:
        yield details
    except (PipelineError, OSError) as error:
        failed.add(name)
        details = [f"failed: {' '.join(str(error).split())}"]
    print_lines(masked(f"{name}: {', '.join(details)}"))


def check_rights(cursor: Any, run: Run) -> None:
    """Raises PipelineError where the database user lacks a right, or gets no lock in time.

    Makes a temporary table, for which there is a right, too, and begins a transaction.
    """
    execute(cursor, create_sql(run.config.tables[0], temporary=True))
    lacking = dict[str, None]()
    for table in (*run.config.tables, audit_table(run.config)):
        existing, schema = existing_columns(cursor, table), table.name.partition(".")[0]
        kind, name = ("TABLE", table.name) if existing else ("SCHEMA", schema)
        for right in ("SELECT", "INSERT", "DELETE") if existing else ("CREATE",):
            sql = f"SELECT has_{kind}_privilege({literal(name)}, {literal(right)})"
            if not execute(cursor, sql).fetchone()[0]:
                lacking[f"{right} ON {kind} {name}"] = None
    if lacking:
        raise PipelineError(f"the user lacks {', '.join(lacking)}: the owner has to GRANT it")
    if existing:  # of the audit table, the last
        execute(cursor, "SET statement_timeout TO 10000")
        begin_turn(cursor, run)


# --- main ---------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Runs the program and returns its exit status.

    0 done, 1 failed, 2 wrong configuration, 75 failed for what may mend itself, 128 and the signal.
    """
    options = parse_arguments(arguments)
    set_up_log(options.log_format, options.verbose)
    context["pipeline"] = options.config.stem
    # Until there is something to undo a signal just ends the program: in an import, which may
    # swallow what a handler raises, too.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        config = load_config(options.config, options.source)
        import_packages()
        if options.check:
            return check(config)
        if options.test_alerts:
            return test_alerts(config)
        return run_pipeline(config, options.dry_run, options.allow_shrink)
    except (Exception, Stopped) as error:
        reason = log_failure(error)
        is_tried_out = options.dry_run or options.check or options.test_alerts
        if isinstance(error, ConfigError) and error.alerts and not is_tried_out:
            import_packages()
            tell(error.alerts, "failure", reason)
        return getattr(error, "status", 1)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The options of the command line; exits with status 2 where they are wrong."""
    parser = argparse.ArgumentParser(description="Load a JSON API into Amazon Redshift.")
    option, alone = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    option("--config", type=Path, default=DEFAULT_CONFIG, help="default: conf/pipeline.yaml")
    option("--source", help="URL (https, http, s3) or path to read instead of source.url")
    alone("--dry-run", action="store_true", help="stop before S3; print first rows and SQL")
    alone("--check", action="store_true", help="try all that a run needs, without loading")
    option("--allow-shrink", action="store_true", help="replace rows by far fewer, this once")
    option("--verbose", action="store_true", help="log the SQL, with its times")
    option("--log-format", default=os.environ.get("LOG_FORMAT") or "text", help="text or json")
    alone("--test-alerts", action="store_true", help="send a test message to every channel")
    options = parser.parse_args(arguments)
    if options.log_format not in ("text", "json"):
        parser.error(f"--log-format or $LOG_FORMAT: {options.log_format!r} is not text or json")
    return options


def test_alerts(config: Config) -> int:
    """Sends a test message to every channel, prints how that went, and returns the exit status."""
    failures = tell(config.alerts, "test", "a test of its alerts")
    for channel, failure in failures.items():
        print_lines(f"{channel}: failed: {failure}" if failure else f"{channel}: sent")
    if not failures:
        log.error("the configuration names no alerts")
    return int(not failures or any(failures.values()))


if __name__ == "__main__":
    sys.exit(main())
