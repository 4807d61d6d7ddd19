"""Load the records of a JSON API into Amazon Redshift: extract, transform, stage, load.

A run reads conf/pipeline.yaml, fetches a JSON array of objects, flattens it into the configured
tables, stages each as gzipped CSV in S3, copies the files into temporary tables and replaces (or
upserts) the rows of all tables in one transaction.

The file reads in the order in which the data flows: configuration, extract, transform, stage,
load, run, main.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import errno
import gzip
import hashlib
import io
import json
import logging
import math
import os
import random
import re
import secrets
import shutil
import signal
import ssl
import struct
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from decimal import Context, Decimal, DecimalException, Inexact, InvalidOperation
from functools import partial
from itertools import islice
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, ClassVar, TextIO
from urllib.parse import urlsplit

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
READ_CHARACTERS = 1 << 20
WHITESPACE = " \t\r\n"  # of JSON
BATCH_RECORDS = 2_000  # some 30 MB of Python objects where a record is 2 kB of JSON
PART_BYTES = 64 << 20  # compressed; Redshift's guide asks for files of 1 MB to 1 GB
GZIP_LEVEL = 4

log = logging.getLogger("sequra_challenge")


class ConfigError(Exception):
    """The configuration is wrong: exit status 2."""


class PipelineError(Exception):
    """The run failed for a reason that its message explains: exit status 1."""


def import_packages() -> None:
    """Imports the large packages. --help and a wrong configuration answer without them."""
    global boto3, botocore, np, pd, redshift_connector, requests, urllib3
    import boto3.s3.transfer
    import botocore.config
    import botocore.exceptions
    import botocore.session
    import botocore.utils
    import numpy as np
    import pandas as pd
    import redshift_connector
    import requests
    import urllib3


# --- configuration ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """A column of a table, and the path of its value in the JSON of a row."""

    path: tuple[str, ...]
    type: str  # as Redshift writes it: "varchar(24)"
    not_null: bool

    @property
    def name(self) -> str:
        """The column's name: ``links_patch_small`` of links.patch.small."""
        return "_".join(self.path)

    @property
    def sql(self) -> str:
        """The column's definition in SQL."""
        return f"{quoted(self.name)} {self.type}" + " NOT NULL" * self.not_null

    @property
    def kind(self) -> str:
        """The type without its arguments: ``varchar``."""
        return self.type.partition("(")[0]

    @property
    def arguments(self) -> tuple[int, ...]:
        """The numbers in the type: ``(24,)`` of varchar(24), ``(10, 2)`` of decimal(10,2)."""
        return tuple(map(int, re.findall(r"\d+", self.type)))


@dataclass(frozen=True)
class Table:
    """A target table: a row for each record, or with ``rows`` for each element of that array."""

    name: str
    columns: tuple[Column, ...]
    key: tuple[str, ...]
    mode: str
    rows: tuple[str, ...]
    parent: str | None
    sort_key: tuple[str, ...]
    dist_key: tuple[str, ...]
    min_rows: int
    max_shrink: float
    staging: str  # the name of the temporary table


@dataclass(frozen=True)
class Config:
    """What conf/pipeline.yaml says, checked."""

    url: str
    bucket: str
    prefix: str
    kms_key: str | None
    secret: str
    copy_role: str | None
    audit_table: str | None
    connect_seconds: float
    statement_seconds: float
    tables: tuple[Table, ...]


NAME = r"[a-z_][a-z0-9_]{0,126}"  # what Redshift can hold: it folds names to lower case
ROLE = r"arn:aws[\w-]*:iam::\d{12}:role/[\w+=.@/-]+"
TYPE = (
    r"(boolean|smallint|integer|bigint|real|double precision|decimal\(\d{1,2},\d{1,2}\)"
    r"|varchar\(\d{1,5}\)|date|timestamp|timestamptz|super)( not null)?"
)
# What the file holds: mappings, and patterns of the names and the values in them. A pattern in a
# list stands for one or several values; behind one in a tuple stands the default.
SCHEMA: dict[str, Any] = {
    "source": {"url": r".+"},
    "staging": {
        "bucket": r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]",
        "prefix": r"[\w!.*()=-]+(/[\w!.*()=-]+)*",
        "kms_key": (r"[\w:/-]+", None),
    },
    "redshift": {
        "secret": r"[\w/+=.@:-]+",
        "copy_role": (rf"{ROLE}(,{ROLE})*", None),
        "audit_table": (rf"{NAME}\.{NAME}", "public.etl_runs"),
        "connect_seconds": (r"\d{1,5}", 120),
        "statement_seconds": (r"[1-9]\d{0,5}", 3600),
    },
    "tables": {
        r".+": {
            "columns": {r".+": TYPE},
            "key": [NAME],
            "mode": ("replace|upsert", "replace"),
            "rows": (r"[^.]+(\.[^.]+)*", None),
            "parent": (r"(?!(position|value)$)[^.]+", None),
            "sort_key": ([NAME], ()),
            "dist_key": (NAME, ()),
            "min_rows": (r"\d{1,15}", 1),
            "max_shrink": (r"0|0?\.\d+|1(\.0)?", 0.2),
        }
    },
}
# What the load sets in each row.
META_COLUMNS = (
    Column(("_run_id",), "varchar(64)", False),
    Column(("_loaded_at",), "timestamptz", False),
)
RESERVED = {column.name for column in META_COLUMNS}  # and Redshift's system columns
RESERVED |= {"oid", "tableoid", "xmin", "cmin", "xmax", "cmax", "ctid", "insertxid", "deletexid"}


class _Loader(yaml.SafeLoader):
    """YAML as people read it: `on` and `no` are text, and a key stands once in a mapping."""

    yaml_implicit_resolvers: ClassVar = {  # type: ignore[misc]
        first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith(":bool")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
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
    faults = list(_schema_faults(document, SCHEMA, ""))
    sections = {name: _mapping(_mapping(document).get(name)) for name in SCHEMA}
    settings: dict[str, Any] = {}
    for section in ("source", "staging", "redshift"):
        settings |= _with_defaults(sections[section], SCHEMA[section])
    settings["copy_role"] = settings["copy_role"] or os.environ.get("AWS_ROLE_ARN") or None
    tables = (
        _table(str(name), f"staging_{number}", _mapping(table))
        for number, (name, table) in enumerate(sections["tables"].items(), 1)
    )
    config = Config(**settings, tables=tuple(tables))
    for table in config.tables:
        faults += [f"tables.{table.name}{fault}" for fault in _table_faults(table)]
    if faults:
        raise ConfigError("\n  ".join([f"{path} has {len(faults)} fault(s):", *faults]))
    return config


def _mapping(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}


def _with_defaults(given: dict[Any, Any], schema: dict[str, Any]) -> dict[str, Any]:
    # A setting that is null is as one that is missing, but for audit_table: null turns that off.
    return {
        name: given[name]
        if name in given and (given[name] is not None or name == "audit_table")
        else (rule[1] if isinstance(rule, tuple) else None)
        for name, rule in schema.items()
    }


def _schema_faults(value: Any, schema: Any, at: str) -> Iterator[str]:
    rule, default = schema if isinstance(schema, tuple) else (schema, "")
    if isinstance(rule, dict):
        if not isinstance(value, dict) or not value:
            yield f"{at or 'the file'}: must be a mapping, not {shorten(value)}"
            return
        dot = f"{at}." if at else ""
        for name, inner in value.items():
            known = next((known for known in rule if re.fullmatch(known, str(name))), None)
            if known is None:
                yield f"{dot}{name}: unknown key, expected {' or '.join(rule)}"
            elif inner is not None or not isinstance(rule[known], tuple):
                yield from _schema_faults(inner, rule[known], f"{dot}{name}")
        for name, inner in rule.items():
            if name.isidentifier() and name not in value and not isinstance(inner, tuple):
                yield f"{dot}{name}: missing"
    elif isinstance(rule, list) and isinstance(value, list):
        yield from (fault for item in value for fault in _schema_faults(item, rule[0], at))
    else:
        pattern = rule[0] if isinstance(rule, list) else rule
        kind = (int, float) if isinstance(default, int | float) else str
        if not isinstance(value, kind) or not re.fullmatch(pattern, str(value), re.ASCII):
            wrong = "unknown type" if rule is TYPE else f"must match {pattern}, not"
            yield f"{at}: {wrong} {value!r}"


def _table(name: str, staging: str, given: dict[str, Any]) -> Table:
    settings = _with_defaults(given, SCHEMA["tables"][".+"])
    columns = []
    for path, text in _mapping(settings["columns"]).items():
        type_, _, not_null = str(text).partition(" not ")
        columns.append(Column(tuple(str(path).split(".")), type_, bool(not_null)))
    for setting in ("key", "sort_key", "dist_key"):
        value = settings[setting] or ()
        settings[setting] = tuple(map(str, [value] if isinstance(value, str) else value))
    settings["rows"] = tuple(str(settings["rows"]).split(".")) if settings["rows"] else ()
    return Table(**settings | {"name": name, "staging": staging, "columns": tuple(columns)})


def _table_faults(table: Table) -> Iterator[str]:
    if not re.fullmatch(rf"{NAME}\.{NAME}", table.name):
        yield f": must be schema.table, each matching {NAME}"
    kinds = {column.name: column.kind for column in table.columns}
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
    if not table.key:
        yield ".key: must name the columns that no two rows share"
    for setting in ("key", "sort_key", "dist_key"):
        for name in getattr(table, setting):
            if kinds.get(name, "super") == "super":
                yield f".{setting}: {name!r} is not a column that can be compared"
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


def extract(source: str, folder: Path) -> Path:
    """Fetches the source (http, https, s3 or a local file) and returns the file that holds it."""
    parts = urlsplit(source)
    target = folder / "response"
    if parts.scheme in ("http", "https"):
        download(source, target)
    elif parts.scheme == "s3":
        with aws_errors("read", source):
            aws_client("s3").download_file(parts.netloc, parts.path.lstrip("/"), str(target))
    else:
        target = Path(source).expanduser()
        if not target.is_file():
            raise PipelineError(f"the source {source} is not a file")
    return target


def download(url: str, target: Path) -> None:
    """GETs the URL into the file.

    Tried again after what Retry-After asks for, else with exponential back-off and jitter:
    connection errors, time-outs, a body that ends early, 429, 500, 502, 503 and 504.
    """
    broken = (
        requests.ConnectionError,
        requests.Timeout,
        requests.exceptions.ChunkedEncodingError,
        requests.exceptions.ContentDecodingError,
    )
    adapter = requests.adapters.HTTPAdapter()
    # Trusts what OpenSSL does, so also $SSL_CERT_FILE, beside the bundle that requests brings.
    adapter.init_poolmanager(1, 1, ssl_context=ssl.create_default_context())
    with requests.Session() as session:
        session.mount("https://", adapter)
        for attempt in range(1, HTTP_TRIES + 1):
            wait: float | None = None
            try:
                with session.get(url, stream=True, timeout=HTTP_TIMEOUT) as response:
                    with contextlib.suppress(urllib3.exceptions.InvalidHeader, ValueError):
                        wait = urllib3.Retry(retry_after_max=300).get_retry_after(response.raw)
                    response.raise_for_status()
                    with target.open("wb") as file:
                        for chunk in response.iter_content(1 << 20):
                            file.write(chunk)
                    return
            except requests.HTTPError as error:
                reason = f"HTTP {error.response.status_code} {error.response.reason}"
                transient = error.response.status_code in (429, 500, 502, 503, 504)
            except broken as error:
                cause = root_cause(error)
                reason = f"{type(error).__name__}: {cause}"
                transient = not isinstance(cause, ssl.SSLCertVerificationError)
            except (requests.RequestException, urllib3.exceptions.HTTPError, ValueError) as error:
                reason, transient = type(error).__name__, False  # their texts hold the URL
            if not transient or attempt == HTTP_TRIES:
                raise PipelineError(f"GET {public_url(url)}: {reason}, attempt {attempt}")
            wait = wait if wait is not None else 2**attempt * random.uniform(0.5, 1)
            log.warning("extract: %s, trying again in %.1f s", reason, wait)
            time.sleep(wait)


def root_cause(error: BaseException) -> BaseException:
    """The innermost error: the messages of those around it may hold the URL and its query."""
    inner = error.__cause__ or error.__context__
    return root_cause(inner) if inner else error


def is_gzipped(path: Path) -> bool:
    """Whether the file begins as gzip does."""
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def open_body(path: Path) -> Any:
    """Opens a source as it was served; the raw responses in S3 are gzipped."""
    return gzip.open(path) if is_gzipped(path) else path.open("rb")


# --- transform ----------------------------------------------------------------------------------


class Unfit(Exception):
    """A value does not fit its column; the message is the rule that it breaks."""


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the objects of a JSON array in a file, gzipped or not, with a piece in memory.

    Numbers with a fraction or an exponent become Decimal, so that no digit is lost.
    Raises PipelineError for anything but an array of at least one object.
    """
    count = 0
    try:
        with io.TextIOWrapper(open_body(path), "utf-8-sig", newline="") as text:
            for count, record in enumerate(_read_array(text), 1):
                if not isinstance(record, dict):
                    raise PipelineError(f"record {count} is not an object: {shorten(record)}")
                yield record
    except json.JSONDecodeError as error:
        near = shorten(error.doc[max(0, error.pos - 40) : error.pos + 40])
        raise PipelineError(f"not JSON after record {count}: {error.msg}, near {near}") from None
    except (ValueError, ArithmeticError, RecursionError, EOFError, OSError, zlib.error) as error:
        # A number of 5,000 digits, an exponent of 20, brackets a thousand deep, bytes that are
        # not UTF-8, a gzip file that is damaged.
        raise PipelineError(f"not readable after record {count}: {error}") from None
    if not count:
        raise PipelineError("the source is an empty array, there is nothing to load")


def _read_array(text: TextIO) -> Iterator[Any]:
    decoder = json.JSONDecoder(parse_float=Decimal)
    buffer, start, wanted, before = text.read(READ_CHARACTERS), 0, READ_CHARACTERS, "["
    while buffer and not buffer.strip(WHITESPACE):
        buffer = text.read(READ_CHARACTERS)
    if buffer.lstrip(WHITESPACE)[:1] != "[":
        what = "HTML or XML" if buffer.lstrip()[:1] == "<" else "no JSON array"
        raise PipelineError(f"the source is {what}, it begins {shorten(buffer, 200)}")
    while True:
        try:
            mark = _skip_whitespace(buffer, start)
            if buffer[mark] == "]" != before:
                break
            if buffer[mark] != before:
                raise json.JSONDecodeError(f"Expecting {before!r}", buffer, mark)
            first = _skip_whitespace(buffer, mark + 1)
            if before == "[" and buffer[first] == "]":
                mark = first
                break
            element, end = decoder.raw_decode(buffer, first)
        except (IndexError, json.JSONDecodeError) as error:
            # More text can only mend what is wrong at the end: in a string without an end, or in
            # a token of at most 12 characters, \ud83d\ude80.
            position = error.pos if isinstance(error, json.JSONDecodeError) else len(buffer)
            if position < len(buffer) - 12 and not str(error).startswith("Unterminated"):
                raise
            more = text.read(wanted)
            if not more and buffer.rstrip(WHITESPACE).endswith("]"):
                raise
            if not more:
                raise json.JSONDecodeError("it ends early", buffer, len(buffer)) from None
            # Doubled, so that one huge record is not scanned from its start for every piece.
            buffer, start, wanted = buffer[start:] + more, 0, wanted * 2
        else:
            yield element
            start, wanted, before = end, READ_CHARACTERS, ","
    rest = buffer[mark + 1 :]
    while rest:
        if rest.strip(WHITESPACE):
            raise json.JSONDecodeError("Extra data after the array", rest, 0)
        rest = text.read(READ_CHARACTERS)


def _skip_whitespace(text: str, start: int) -> int:
    match = re.compile(f"[{WHITESPACE}]*").match(text, start)
    return match.end() if match else start


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


def transform(records: list[dict[str, Any]], table: Table, served: set[str]) -> pd.DataFrame:
    """Flattens records into the rows of a table, one typed column for each configured path.

    Adds the paths of all fields it meets to ``served``: ``links.patch.small``, ``cores[].core``.
    Raises PipelineError for the first value that does not fit its column, and for a double key.
    """
    rows = explode(records, table)
    levels: dict[tuple[str, ...], list[dict[str, Any]]] = {(): rows}

    def checked(check: Callable[[list[Any]], Any], path: tuple[str, ...]) -> Any:
        values = [level.get(path[-1]) for level in levels[path[:-1]]]
        try:
            return check(values)
        except Unfit:
            for row, value in zip(rows, values, strict=True):
                try:
                    check([value])
                except Unfit as unfit:
                    raise _misfit(table, row, path, value, unfit) from None
            raise

    for path in sorted({c.path[:depth] for c in table.columns for depth in range(len(c.path))}):
        if path:
            levels[path] = checked(_objects, path)
        served |= {source_path(table, (*path, name)) for name in set().union(*levels[path])}
    frame = pd.DataFrame(
        {c.name: checked(partial(convert, c, c.name in table.key), c.path) for c in table.columns}
    )
    keys = frame[list(table.key)]
    _refuse_doubles(table, keys[keys.duplicated()].head(5).to_dict("records"))
    return frame


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
                raise _misfit(table, {table.parent: record}, (), elements, unfit)
        for position, element in enumerate(elements or [], 1):
            row = {"position": position, table.parent: record}
            if not plain and not isinstance(element, dict):
                raise _misfit(table, row, (), element, Unfit("is not an object"))
            rows.append(({"value": element} if plain else element) | row)
    return rows


def dig(value: Any, path: tuple[str, ...]) -> Any:
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
    table: Table, row: Any, path: tuple[str, ...], value: Any, rule: Unfit
) -> PipelineError:
    keys = {c.name: dig(row, c.path) for c in table.columns if c.name in table.key}
    key = shorten(row) if set(map(type, keys.values())) == {NoneType} else _key_text(keys)
    where = source_path(table, path)
    return PipelineError(f"{table.name}, {key}: {where}: {shorten(value)} {rule}")


def _refuse_doubles(table: Table, keys: list[dict[Any, Any]]) -> None:
    if keys:
        shown = "; ".join(map(_key_text, keys))
        raise PipelineError(f"{table.name}: more than one row has the key {shown}")


def _key_text(key: dict[Any, Any]) -> str:
    return ", ".join(f"{name}={shorten(value)}" for name, value in key.items())


def _only(values: list[Any], what: str, *types: type) -> list[Any]:
    """The values that are not null. Unfit unless of these very types: True is no integer."""
    if not set(map(type, values)) <= {NoneType, *types}:
        raise Unfit(f"is not {what}")
    return [value for value in values if value is not None]


def _objects(values: list[Any]) -> list[dict[str, Any]]:
    _only(values, "an object", dict)
    return [{} if value is None else value for value in values]


def convert(column: Column, in_key: bool, values: list[Any]) -> Any:
    """The values of a column as a typed pandas array, or texts as COPY reads them; null is null.

    Raises Unfit with the rule that a value breaks. Only numbers for real, double precision and in
    super are rounded, to the nearest that these hold.
    """
    if None in values and (in_key or column.not_null):
        raise Unfit("in the key" if in_key else "in a column that is not null")
    match column.kind:
        case "boolean":
            _only(values, "a boolean", bool)
            return pd.array(values, dtype="boolean")
        case "smallint" | "integer" | "bigint":
            limit = 1 << {"smallint": 15, "integer": 31, "bigint": 63}[column.kind]
            if not all(-limit <= value < limit for value in _only(values, "an integer", int)):
                raise Unfit(f"is outside {-limit} to {limit - 1}")
            return pd.array(values, dtype="Int64")
        case "real" | "double precision":
            numbers = _only(values, "a number", int, Decimal)
            single = column.kind == "real"
            with np.errstate(over="ignore"):
                sizes = np.abs(np.array([float(Decimal(number)) for number in numbers]))
                sizes = sizes.astype(np.float32) if single else sizes
            limits = np.finfo(np.float32 if single else np.float64)
            fits = (sizes >= limits.tiny) & (sizes <= limits.max)
            if not all(fits | np.array([number == 0 for number in numbers], dtype=bool)):
                raise Unfit(f"is outside the range of {column.kind}")
            return pd.array([None if v is None else float(v) for v in values], dtype="Float64")
        case "decimal":
            _only(values, "a number", int, Decimal)
            return _text_array(values, partial(_decimal, *column.arguments))
        case "varchar":
            for value in _only(values, "a text", str):
                _check_text(value, column.arguments[0])
            return _text_array(values, str)
        case "super":
            return _text_array(values, _super)
        case kind:
            return _times(values, kind)


def _text_array(values: list[Any], text: Callable[[Any], str]) -> pd.Series:
    return pd.Series([None if v is None else text(v) for v in values], dtype=object)


def _decimal(precision: int, scale: int, value: Any) -> str:
    exact = Context(prec=precision, traps=[Inexact, InvalidOperation])
    try:
        return format(exact.quantize(Decimal(value), Decimal(1).scaleb(-scale)), "f")
    except DecimalException:
        raise Unfit(f"does not fit decimal({precision},{scale}) exactly") from None


def _check_text(value: str, most: int) -> None:
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise Unfit("has a lone surrogate, which UTF-8 cannot hold") from None
    if size > most:
        raise Unfit(f"has a text of {size} bytes, at most {most} fit")
    if "\0" in value:
        raise Unfit("has a NUL character, which Redshift cannot hold")


# A number with a fraction becomes the nearest double, as most readers of JSON take it.
_dump_super = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=float
).encode


def _super(value: Any) -> str:
    try:
        text = _dump_super(value)
        _check_text(text, 16 << 20)
        if len(text) > 65_535 // 4 or "\\u0000" in text:
            for inner in _texts_in(value):
                _check_text(inner, 65_535)
        return text
    except (ValueError, RecursionError) as error:  # NaN, Infinity; nested too deeply
        raise Unfit(f"is not JSON that super holds: {error}") from None


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from _texts_in(inner)


DATE = r"\d{4}-\d\d-\d\d"
TIME = DATE + r"[T ]\d\d:\d\d:\d\d(\.\d{1,6})?"
TIMES = {"date": DATE, "timestamp": TIME, "timestamptz": TIME + r"(Z|[+-]\d\d(:?\d\d)?)"}
EXAMPLES = {
    "date": "2006-03-24",
    "timestamp": "2006-03-24T22:30:00, without an offset",
    "timestamptz": "2006-03-24T22:30:00Z, with an offset",
}


def _times(values: list[Any], kind: str) -> Any:
    """ISO 8601 texts, with microseconds and in UTC, as COPY reads them with TIMEFORMAT 'auto'."""
    what = f"a {kind} such as {EXAMPLES[kind]}"
    if not all(map(re.compile(TIMES[kind], re.ASCII).fullmatch, _only(values, what, str))):
        raise Unfit(f"is not {what}")
    try:
        times = pd.to_datetime(pd.Series(values, dtype=object), format="ISO8601", utc=True)
    except ValueError:
        raise Unfit("does not exist in the calendar") from None
    if not times.dropna().dt.year.between(1, 9999).all():
        raise Unfit("is outside the years 1 to 9999")
    moments = times.dt.tz_localize(None).to_numpy("datetime64[us]")
    texts = np.datetime_as_string(moments, unit="D" if kind == "date" else "us").astype(object)
    texts += "Z" if kind == "timestamptz" else ""
    return pd.Series(texts, dtype=object).where(times.notna(), None)


def warn_of_drift(tables: tuple[Table, ...], served: set[str]) -> None:
    """Logs the fields that no table loads, and those that no record has."""
    columns = [(table, column.path) for table in tables for column in table.columns]
    # A table without rows has not looked at any field.
    met = [table for table, path in columns if source_path(table, path) in served]
    wanted = {source_path(table, path) for table, path in columns if table in met}
    known = {source_path(t, path[: n + 1]) for t, path in columns for n in range(len(path))}
    known |= {".".join(table.rows[: n + 1]) for table in tables for n in range(len(table.rows))}
    for path in sorted(served - known - {""}):
        log.warning("transform: the source has a field that no table loads: %s", path)
    for path in sorted(wanted - served - {""}):
        log.warning("transform: no record has the field %s, so its column is null", path)


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
    """Writes the rows of a table into gzipped CSV parts of about PART_BYTES, each with a header."""

    def __init__(self, table: Table, run: Run) -> None:
        self.table, self.run = table, run
        self.parts: list[Path] = []
        self.rows = 0
        self._begin_part()

    def _begin_part(self) -> None:
        self.parts.append(self.run.folder / f"{self.table.name}.{len(self.parts) + 1:04}.csv.gz")
        self._file = gzip.GzipFile(self.parts[-1], "wb", GZIP_LEVEL, mtime=0)
        self._file.write(",".join(column.name for column in self.table.columns).encode() + b"\n")

    def write(self, frame: pd.DataFrame) -> None:
        """Appends the rows of a frame, to a new part where the last is large enough."""
        if self.parts[-1].stat().st_size > PART_BYTES:
            self.close()
            self._begin_part()
        self._file.write(csv_rows(frame, self.run.null).encode())
        self.rows += len(frame)

    def close(self) -> None:
        """Ends the last part."""
        self._file.close()


def csv_rows(frame: pd.DataFrame, null: str) -> str:
    """The rows of a frame as CSV, in which every text is quoted and NULL is not.

    The csv module cannot do that, and before Python 3.13 leaves a lone carriage return unquoted.
    """

    def cell_text(cell: Any) -> str:
        if cell is None:
            return null
        return '"' + cell.replace('"', '""') + '"' if isinstance(cell, str) else str(cell)

    columns = (column.astype(object).where(column.notna(), None) for _, column in frame.items())
    return "".join(",".join(map(cell_text, row)) + "\n" for row in zip(*columns, strict=True))


def transform_to_parts(run: Run, body: Path) -> list[PartWriter]:
    """Reads the source and writes the rows of all tables, batch by batch, into CSV parts."""
    served: set[str] = set()
    staged = [PartWriter(table, run) for table in run.config.tables]
    records = read_records(body)
    while batch := list(islice(records, BATCH_RECORDS)):
        for parts in staged:
            parts.write(transform(batch, parts.table, served))
    for parts in staged:
        parts.close()
    warn_of_drift(run.config.tables, served)
    return staged


def aws_client(service: str) -> Any:
    """A client in $AWS_REGION, the profile's region, or else the region of the EC2 instance."""
    session = botocore.session.get_session()
    region = os.environ.get("AWS_REGION") or session.get_config_variable("region")
    region = region or botocore.utils.IMDSRegionProvider(session).provide()
    if not region:
        raise PipelineError("no AWS region: set AWS_REGION, or a region in the AWS profile")
    retries = botocore.config.Config(retries={"mode": "standard"})
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


def stage(run: Run, s3: Any, body: Path, staged: list[PartWriter]) -> None:
    """Uploads the raw response, gzipped, and of each table the parts and then the manifest."""
    threadless = boto3.s3.transfer.TransferConfig(use_threads=False)  # a signal ends it at once
    encryption = {"ServerSideEncryption": "AES256"}
    if run.config.kms_key:
        encryption = {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": run.config.kms_key}

    def upload(file: Path, name: str) -> dict[str, Any]:
        url = run.url(name, file.name)
        with aws_errors("write", url):
            bucket, key = urlsplit(url).netloc, urlsplit(url).path[1:]
            s3.upload_file(str(file), bucket, key, ExtraArgs=encryption, Config=threadless)
        return {"url": url, "mandatory": True}

    raw = run.folder / "response.json.gz"
    opener: Callable[..., Any] = (
        open if is_gzipped(body) else partial(gzip.open, compresslevel=GZIP_LEVEL)
    )
    with body.open("rb") as source, opener(raw, "wb") as target:
        shutil.copyfileobj(source, target)
    upload(raw, "raw")
    manifest = run.folder / "manifest.json"
    for parts in staged:
        entries = [upload(part, parts.table.name) for part in parts.parts]
        manifest.write_text(json.dumps({"entries": entries}, indent=2))
        upload(manifest, parts.table.name)


# --- load ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Credentials:
    """How to reach Redshift."""

    host: str
    port: int
    database: str
    user: str
    password: str = field(repr=False)


def read_credentials(secret: str) -> Credentials:
    """Reads the secret: the fields of Credentials in upper or lower case, as JSON.

    AWS's own Redshift secrets say dbname and username. Raises PipelineError when it is something
    else; its values are never shown.
    """
    with aws_errors("read", f"the secret {secret}"):
        manager = aws_client("secretsmanager")
        text = manager.get_secret_value(SecretId=secret).get("SecretString")
    try:
        values = {name.lower(): value for name, value in json.loads(text).items()}
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
        sql += f"\nDISTKEY ({quoted(*table.dist_key)})"
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
            log.warning("load: cannot connect: %s, trying again in %.0f s", error, wait)
            time.sleep(wait)
            wait = min(wait * 2, 15)
        else:
            connection._usock.settimeout(None)  # the driver's is for every answer, COPY's too
            return connection


def execute(cursor: Any, sql: str, *values: Any) -> Any:
    """Executes one statement. Raises PipelineError with its beginning and the server's reason."""
    log.debug("load: %s", sql)
    try:
        return cursor.execute(sql, values or None)
    except Exception as caught:
        error = redshift_error(caught)
        raise type(error)(f"{' '.join(sql.split())[:60]}…: {error}") from None


def load(run: Run, staged: list[PartWriter], region: str, sha256: str) -> None:
    """Loads the staged files into the tables; where that may help, again on a new connection.

    Loading twice does no harm. After the last try it is looked up whether only the answer to its
    commit got lost.
    """
    credentials = read_credentials(run.config.secret)
    for tries_left in reversed(range(LOAD_TRIES + 1)):
        try:
            with session(run.config, credentials) as (connection, cursor):
                if tries_left:
                    prepare_targets(cursor, run.config)
                    for parts in staged:
                        copy(cursor, run, parts, region)
                connection.autocommit = False
                if is_loaded(cursor, run):
                    log.info("load: done already, only the answer to its commit was lost")
                    return
                if tries_left:
                    swap(cursor, run, staged, sha256)
                    return
        except TransientError as error:
            failure = error
            if tries_left > 1:
                log.warning("load: %s, trying again", error)
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
    audit = audit_table(config)
    for table in (*config.tables, audit) if audit else config.tables:
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
            log.warning("load: %s also has the columns %s", table.name, ", ".join(existing))
    if faults:
        raise PipelineError("\n  ".join(["tables differ from the configuration:", *faults]))
    for sql in changes:
        log.info("load: %s", sql.partition(" (")[0])
        execute(cursor, sql)


def _type_sql(kind: str, length: int, precision: int, scale: int) -> str:
    return {
        "character varying": f"varchar({length})",
        "numeric": f"decimal({precision},{scale})",
        "timestamp without time zone": "timestamp",
        "timestamp with time zone": "timestamptz",
    }.get(kind, kind)


def copy(cursor: Any, run: Run, parts: PartWriter, region: str) -> None:
    """Copies a table's files into its staging table; checks the number of rows and the keys."""
    table = parts.table
    create, copy = copy_sql(run, table, region)
    execute(cursor, create)
    try:
        execute(cursor, copy)
    except TransientError:
        raise
    except PipelineError as error:
        raise PipelineError(f"COPY for {table.name}: {copy_error(cursor) or error}") from None
    (rows,) = execute(cursor, "SELECT pg_last_copy_count()").fetchone()
    if rows != parts.rows:
        raise PipelineError(f"COPY for {table.name}: {rows} rows, but {parts.rows} were staged")
    doubles = execute(cursor, doubles_sql(table)).fetchall()
    _refuse_doubles(table, [dict(zip(table.key, row, strict=True)) for row in doubles])


def is_loaded(cursor: Any, run: Run) -> bool:
    """Takes the loaders' turn, and tells whether the run is in the tables already."""
    audit = audit_table(run.config)
    if audit:
        # First of all in the transaction, because the snapshot is taken after it.
        execute(cursor, f"LOCK {quoted(audit.name)}")
    witness = quoted(audit.name if audit else run.config.tables[0].name)
    sql = f'SELECT count(*) FROM {witness} WHERE "_run_id" = {literal(run.id)}'
    return bool(execute(cursor, sql).fetchone()[0])


def swap(cursor: Any, run: Run, staged: list[PartWriter], sha256: str) -> None:
    """Puts the staged rows of all tables in place, and a row for each into the audit table.

    All in one transaction: a reader sees the rows of before or those of this run, everywhere.
    """
    audit = audit_table(run.config)
    before = {}
    for parts in staged:
        name = parts.table.name
        (before[name],) = execute(cursor, f"SELECT count(*) FROM {quoted(name)}").fetchone()
        if parts.table.mode == "replace" and not run.allow_shrink:
            refuse_shrinking(parts.table, before[name], parts.rows)
    for parts in staged:
        for sql in swap_sql(run, parts.table):
            execute(cursor, sql)
        if audit:
            row = audit_row(run, parts, before[parts.table.name], sha256)
            names, places = quoted(*row, "_loaded_at"), ", ".join(["%s"] * len(row))
            sql = f"INSERT INTO {quoted(audit.name)} ({names}) VALUES ({places}, GETDATE())"
            execute(cursor, sql, *row.values())
    execute(cursor, "COMMIT")


def refuse_shrinking(table: Table, before: int, after: int) -> None:
    """Raises PipelineError when a replace would leave so few rows that the source seems broken."""
    least = max(table.min_rows, math.ceil(round(before * (1 - table.max_shrink), 6)))
    if after < least:
        raise PipelineError(
            f"{table.name} has {before} rows and would have {after}, at least {least} are "
            f"expected (min_rows {table.min_rows}, max_shrink {table.max_shrink}); "
            "if that is right, run once with --allow-shrink"
        )


def audit_table(config: Config) -> Table | None:
    """The table that gets a row for each run and table, unless it is turned off."""
    if not config.audit_table:
        return None
    columns = {
        "table_name": "varchar(255)",
        "mode": "varchar(16)",
        "source": "varchar(4096)",
        "manifest": "varchar(4096)",
        "raw": "varchar(4096)",
        "sha256": "varchar(64)",
        "rows_before": "bigint",
        "rows_loaded": "bigint",
        "started_at": "timestamptz",
    }
    return _table(config.audit_table, "", {"columns": columns})


def audit_row(run: Run, parts: PartWriter, before: int, sha256: str) -> dict[str, Any]:
    """What the audit table says of a run and a table."""
    return {
        "table_name": parts.table.name,
        "mode": parts.table.mode,
        "source": public_url(run.config.url),
        "manifest": run.url(parts.table.name, "manifest.json"),
        "raw": run.url("raw", "response.json.gz"),
        "sha256": sha256,
        "rows_before": before,
        "rows_loaded": parts.rows,
        "started_at": run.started.replace(microsecond=0),  # as whole as GETDATE()
        "_run_id": run.id,
    }


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


# --- run ----------------------------------------------------------------------------------------


def run_pipeline(config: Config, dry_run: bool = False, allow_shrink: bool = False) -> None:
    """Runs the pipeline once. Raises PipelineError; then no target has changed."""
    run = Run(config, Path(tempfile.gettempdir(), f"sequra-{secrets.token_hex(8)}"), allow_shrink)
    # At exit, because a signal can come between any two lines here, but none after main().
    atexit.register(shutil.rmtree, run.folder, ignore_errors=True)
    run.folder.mkdir(mode=0o700)
    log.info("run %s: %s", run.id, public_url(config.url))
    with timed("extract") as figures:
        body = extract(config.url, run.folder)
        figures["bytes"] = body.stat().st_size
    with timed("transform") as figures:
        staged = transform_to_parts(run, body)
        figures |= {parts.table.name: parts.rows for parts in staged}
    if dry_run:
        print_dry_run(run, staged)
        atexit.unregister(shutil.rmtree)
        return
    with timed("stage") as figures:
        s3 = aws_client("s3")
        stage(run, s3, body, staged)
        files = [part for parts in staged for part in parts.parts]
        figures |= {"files": len(files), "bytes": sum(file.stat().st_size for file in files)}
    with timed("load") as figures, open_body(body) as text:
        sha256 = hashlib.file_digest(text, "sha256").hexdigest()
        load(run, staged, s3.meta.region_name, sha256)
        figures["tables"] = len(staged)
    seconds = (datetime.now(UTC) - run.started).total_seconds()
    rows = ", ".join(f"{parts.table.name} {parts.rows} rows" for parts in staged)
    log.info("run %s: done: %s, %.1f s", run.id, rows, seconds)


@contextlib.contextmanager
def timed(step: str) -> Iterator[dict[str, Any]]:
    """Logs a step when it is done: the figures put into the dict, and the seconds it took."""
    figures: dict[str, Any] = {}
    start = time.perf_counter()
    try:
        yield figures
    except (PipelineError, OSError, botocore.exceptions.BotoCoreError) as error:
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        where = f" in {tempfile.gettempdir()}" if full else ""
        raise PipelineError(f"{step}: {error}{where}") from None
    figures["seconds"] = f"{time.perf_counter() - start:.2f}"
    log.info("%s: %s", step, ", ".join(f"{name} {value}" for name, value in figures.items()))


def print_dry_run(run: Run, staged: list[PartWriter]) -> None:
    """Prints the files, the first rows and the SQL of a run that goes no further."""
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "<region>"
    for parts in staged:
        table = parts.table
        print(f"\n-- {table.name}: {parts.rows} rows in", *parts.parts, sep="\n--   ")
        first = pd.read_csv(parts.parts[0], nrows=3, dtype=str, keep_default_na=False)
        if parts.rows:
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
    option("--verbose", action="store_true", help="log the SQL")
    options = parser.parse_args(arguments)
    form = logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", "%Y-%m-%dT%H:%M:%SZ")
    form.converter = time.gmtime
    handler = logging.StreamHandler()
    handler.setFormatter(form)
    log.addHandler(handler)
    log.propagate = False  # and nothing else is shown: urllib3 warns with whole URLs
    log.setLevel(logging.DEBUG if options.verbose else logging.INFO)
    # Nothing has been begun that has to be undone; and an import can lose an exception.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        config = load_config(options.config)
        import_packages()
        on_signal(stop)
        config = replace(config, url=options.source or config.url)
        run_pipeline(config, options.dry_run, options.allow_shrink)
    except ConfigError as error:
        log.error("%s", error)
        return 2
    except (PipelineError, OSError) as error:
        log.error("%s", error)
        return 1
    finally:
        on_signal(signal.SIG_IGN)
    return 0


def on_signal(handler: Any) -> None:
    """Sets what SIGINT (Ctrl-C) and SIGTERM do."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def stop(number: int, _frame: Any) -> None:
    """Ends the run on a signal; what has been begun is undone on the way out."""
    on_signal(signal.SIG_IGN)
    log.error("stopped by %s", signal.Signals(number).name)
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
