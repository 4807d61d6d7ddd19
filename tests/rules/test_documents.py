"""Documents of all kinds: each is loaded exactly, or refused with a message that names a record.

Hypothesis makes the documents. They are written as JSON by a serializer of their own, so that a
number stands in them as it was made, and what is expected of each value is worked out here without
the program's help.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import re
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from operator import or_
from typing import Any, Literal

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from helpers import PipelineError, Records, Table, config_of, parts_of, shorten, sizes, without_log
from redshift import Column, CopyCommand

COLUMNS = {
    "id": "varchar(24) not null",
    "flag": "boolean",
    "small": "smallint",
    "whole": "integer not null",
    "big": "bigint",
    "single": "real",
    "number": "double precision",
    "amount": "decimal(10,2)",
    "exact": "decimal(38,10)",
    "title": "varchar(40)",
    "box.label": "varchar(12)",
    "box.inner.day": "date",
    "local": "timestamp",
    "moment": "timestamptz",
    "anything": "super",
}
ELEMENT = {"item.id": "varchar(24) not null", "position": "smallint not null"}
PART = {
    "sku": "varchar(16) not null",
    "size.width": "real",
    "since": "timestamptz",
    "tags": "super",
}
ELEMENTS = {"parent": "item", "key": ["item_id", "position"], "min_rows": 0}
TABLES: dict[str, Any] = {
    "public.items": {"key": "id", "columns": COLUMNS},
    "public.parts": ELEMENTS | {"rows": "box.parts", "columns": ELEMENT | PART},
    "public.codes": ELEMENTS | {"rows": "codes", "columns": ELEMENT | {"value": "bigint not null"}},
}
CONFIG = config_of(TABLES)


@pytest.fixture(autouse=True)
def silence() -> Iterator[None]:
    """Its warnings name keys with lone surrogates, which pytest-xdist cannot send on."""
    with without_log():
        yield


# --- documents -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Number:
    """A number as it stands in JSON, or NaN or an Infinity, which Python's reader takes."""

    text: str

    @property
    def integer(self) -> int | None:
        return int(self.text) if re.fullmatch(r"-?\d+", self.text) else None

    @property
    def decimal(self) -> Decimal | None:
        return Decimal(self.text) if re.search(r"\d", self.text) else None


MISSING = Number("missing")  # in the place of a value: its key is left out

# Lone surrogates, NUL and other controls, what looks like CSV or NULL, combining and wide ones.
LETTERS = st.characters() | st.sampled_from(
    "aZ09 ,\"'\\\n\r\t\0\x1f\x7f\x85\xa0éß漢🚀\u0301\u200f\u2028\ufeff\ud83d\ude80\udfff"
)
WORDS = ["", "NULL", "null", r"\N", "NULL-", "true", "1", "NaN", " ", '"', "é" * 20, "🚀" * 10]
# Pairs and triples that mean something to a reader of CSV, of JSON or of COPY's text.
PIECES = st.sampled_from(["\r\n", '""', '",', '"\n"', r"\n", r"\N", r"\u0000", "\n\n", ",,", "x"])
TEXTS = (
    st.text(LETTERS, max_size=14)
    | st.lists(PIECES, min_size=1, max_size=4).map("".join)
    | st.sampled_from(WORDS)
)
DIGITS = st.text("0123456789", min_size=1, max_size=30)


def numbers(text: str) -> st.SearchStrategy[Number]:
    return st.sampled_from([Number(word) for word in text.split()])


def integers(bits: int) -> st.SearchStrategy[Number]:
    limit = 1 << (bits - 1)
    borders = st.sampled_from([0, -1, 1, limit - 1, -limit])
    return (borders | st.integers(-limit, limit - 1)).map(lambda value: Number(str(value)))


def decimals(whole: int, fraction: int) -> st.SearchStrategy[Number]:
    """Numbers of at most so many digits before and behind the point, in all their spellings."""

    def spell(value: int, trailing: int, exponent: int, sign: str) -> Number:
        digits = tuple(map(int, str(value) + "0" * trailing))
        # Made from its digits, a Decimal is not rounded.
        text = f"{Decimal((0, digits, -fraction - trailing - exponent)):f}"
        return Number(sign + text + (f"e{exponent:+}" if exponent else ""))

    most = 10 ** (whole + fraction) - 1
    return st.builds(
        spell,
        st.sampled_from([0, 1, most]) | st.integers(0, most),
        st.integers(0, 3),
        st.sampled_from([0, 0, 0, 2, -3, 7]),
        st.sampled_from(["", "-"]),
    )


def floats(width: Literal[32, 64]) -> st.SearchStrategy[Number]:
    finite = {"allow_nan": False, "allow_infinity": False, "allow_subnormal": False}
    values = st.floats(width=width, **finite)
    return values.map(lambda value: Number(repr(value))) | numbers(
        "0 -0.0 0e9 1E5 1e+05 0.1 16777217 -3"
    )


ODD_NUMBERS = numbers("""0 -0 1.0 1e0 1e2 32768 -32769 2147483648 9223372036854775808 1e19 3.5e38
    -3.5e38 1e-38 1.8e308 -1.8e308 1e309 1e-308 5e-324 1e-400 1e400 -1e999999 1e-999999 0.001
    99999999.99 100000000.00 99999999.995 0.00000000001 NaN Infinity -Infinity""") | st.one_of(
    st.just("9" * 4000),
    DIGITS.map(lambda digits: digits.lstrip("0") or "0"),
    st.builds("0.{}e{}".format, DIGITS, st.integers(-400, 400)),
).map(Number)

# At most six digits that count: ODD_TIMES has those with more.
FRACTIONS = st.sampled_from(["", ".0", ".5", ".000", ".123456", ".999999"])
OFFSETS = ["Z", "+00:00", "-00:00", "+14:00", "-12", "+0530", "+05:45", "+23:59"]


def times(offsets: list[str]) -> st.SearchStrategy[str]:
    moments = st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30)) | st.sampled_from(
        [datetime(1, 1, 2), datetime(1970, 1, 1), datetime(2000, 2, 29), datetime(9999, 12, 30)]
    )

    def spell(moment: datetime, separator: str, fraction: str, offset: str) -> str:
        return moment.replace(microsecond=0).isoformat(separator) + fraction + offset

    return st.builds(spell, moments, st.sampled_from("T "), FRACTIONS, st.sampled_from(offsets))


ODD_TIME_WORDS = """2006-02-29 2006-3-24 20060324 0000-01-01 10000-01-01 0001-01-01T00:00:00+00:01
    9999-12-31T23:59:59-00:01 2006-03-24T24:00:00Z 2006-03-24T23:59:60Z 2006-03-24T22:30Z
    2006-03-24T22:30:00 2006-03-24T22:30:00z 2006-03-24t22:30:00Z 2006-03-24T22:30:00.1234567Z
    2006-03-24T22:30:00+24:00 2006-03-24T22:30:00+00:60 2006-03-24T22:30:00,5Z 1143239400
    2006-03-24T22:30:00.Z -2006-03-24 ٢٠٠٦-٠٣-٢٤ 2006-W12-5 now"""
SPACED_TIMES = ["2006-03-24T22:30:00Z ", "2006-03-24\n", "2006-03-24 22:30:00 +01:00"]
ODD_TIMES = st.sampled_from(ODD_TIME_WORDS.split() + SPACED_TIMES)
LONG_TEXTS = st.builds(lambda text, times: text * times, TEXTS, st.sampled_from([3, 30]))
SCALARS = st.none() | st.booleans() | ODD_NUMBERS | TEXTS | ODD_TIMES
KEYS = st.sampled_from(["", "id", "item", "position", "value", "a.b", "_run_id", " ", "\0", "é"])
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | TEXTS, inner, max_size=3),
    max_leaves=8,
)


def nested(depth: int, value: Any) -> Any:
    for number in range(depth):
        value = {"": value} if number % 2 else [value]
    return value


def texts(most: int) -> st.SearchStrategy[str]:
    """Texts of at most so many bytes that a column can hold."""
    return TEXTS.filter(
        lambda text: not re.search("[\0\ud800-\udfff]", text) and len(text.encode()) <= most
    )


GOOD_TEXTS = texts(40)
GOOD_JSON = st.recursive(
    st.booleans() | GOOD_TEXTS | floats(64) | integers(64) | st.none(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(KEYS.filter(lambda key: "\0" not in key) | GOOD_TEXTS, inner, max_size=3)
    ),
    max_leaves=6,
) | st.builds(nested, st.integers(1, 100), st.booleans())


def mapping(
    required: dict[str, st.SearchStrategy[Any]], **optional: st.SearchStrategy[Any]
) -> st.SearchStrategy[dict[str, Any]]:
    """Objects with these names, the optional ones absent or null at times, and with others."""
    nullable = {name: st.none() | strategy for name, strategy in optional.items()}
    others = st.dictionaries(KEYS | TEXTS, JSON, max_size=2)
    return st.builds(or_, others, st.fixed_dictionaries(required, optional=nullable))


PARTS = mapping(
    {"sku": texts(16)}, size=mapping({}, width=floats(32)), since=times(OFFSETS), tags=GOOD_JSON
)
ITEMS = mapping(
    {"whole": integers(32)},
    flag=st.booleans(),
    small=integers(16),
    big=integers(64),
    single=floats(32),
    number=floats(64),
    amount=decimals(8, 2),
    exact=decimals(28, 10),
    title=GOOD_TEXTS,
    box=mapping(
        {},
        label=texts(12),
        inner=mapping({}, day=st.dates().map(date.isoformat)),
        parts=st.lists(PARTS, max_size=3),
    ),
    local=times([""]),
    moment=times(OFFSETS),
    anything=GOOD_JSON,
    codes=st.lists(integers(64), max_size=3),
)

PLACES = [*COLUMNS, "box", "box.inner", "box.parts", "codes"]
PLACES += ["box.parts.0", "box.parts.0.size", *(f"box.parts.0.{name}" for name in PART)]


def put(target: Any, place: str, value: Any) -> None:
    """Puts a value into a document, where it has such a place."""
    *way, last = place.split(".")
    with contextlib.suppress(LookupError, TypeError, ValueError):
        for step in way:
            target = target[int(step) if isinstance(target, list) else step]
        if isinstance(target, list):
            target[int(last)] = None if value is MISSING else value
        elif value is MISSING:
            del target[last]
        else:
            target[last] = value


@st.composite
def documents(draw: st.DrawFn) -> list[Any]:
    """Items that fit, each with its own id, and then at most three values put in at random."""
    items: list[Any] = draw(st.lists(ITEMS, min_size=1, max_size=3))
    for number, item in enumerate(items, 1):
        item["id"] = f"item {number}"
    for _ in range(draw(st.integers(0, 3))):
        number = draw(st.integers(0, len(items) - 1))
        place = draw(st.sampled_from([f"{number}", *(f"{number}.{place}" for place in PLACES)]))
        put(items, place, draw(JSON | LONG_TEXTS | st.just(MISSING)))
    # Without an id it is named by its beginning.
    ids = [item.get("id") for item in items if isinstance(item, dict)]
    assume(None not in ids and len(set(map(written, ids))) == len(ids))
    return items


MARK = "-number-"  # stands around one until the JSON is made


def written(value: Any, ascii_only: bool = True) -> str:
    """A value as JSON. Lone surrogates and controls are always escaped."""
    text = json.dumps(
        value,
        ensure_ascii=ascii_only,
        separators=(",", ":"),
        default=lambda number: f"{MARK}{number.text}{MARK}",
    )
    text = text.replace(f'"{MARK}', "").replace(f'{MARK}"', "")
    return re.sub("[\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text)


def laid_out(document: list[Any], ascii_only: bool, as_lines: bool) -> str:
    """A document as an array, or with a record a line."""
    if as_lines and all(isinstance(record, dict) for record in document):
        return "\r\n\n".join(written(record, ascii_only) for record in document)
    return written(document, ascii_only)


# --- what is expected ----------------------------------------------------------------------------


class Refused(Exception):
    """The value is one that its column cannot hold."""


def require(fits: Any) -> Any:
    if not fits:
        raise Refused
    return fits


def dug(value: Any, path: str) -> Any:
    """The value at a path; a value that is no object on the way is refused."""
    for name in path.split("."):
        require(value is None or isinstance(value, dict))
        value = None if value is None else value.get(name)
    return value


LIMITS = {
    "real": (2.0**-126, (2 - 2.0**-23) * 2.0**127),
    "double precision": (sys.float_info.min, sys.float_info.max),
}
SECOND = re.compile(
    r"(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d:\d\d)(?:\.(\d{1,6}))?(?:(Z)|([+-])(\d\d)(?::?(\d\d))?)?",
    re.ASCII,
)


def moment(text: str, with_offset: bool) -> datetime:
    day, clock, fraction, zulu, sign, hours, minutes = require(SECOND.fullmatch(text)).groups()
    require(with_offset == bool(zulu or sign))
    offset = timedelta(hours=int(hours or 0), minutes=int(minutes or 0))
    require(int(hours or 0) < 24 and int(minutes or 0) < 60)
    try:
        found = datetime.fromisoformat(f"{day}T{clock}.{(fraction or '0').ljust(6, '0')}")
        return (found - (-offset if sign == "-" else offset)).replace(tzinfo=UTC)
    except (ValueError, OverflowError):
        raise Refused from None


def check_text(text: str, most: int) -> str:
    require("\0" not in text and not re.search("[\ud800-\udfff]", text))
    require(len(text.encode()) <= most)
    return text


def plain(value: Any) -> Any:
    """A value for SUPER as Python has it: a number with a fraction is the nearest double."""
    if isinstance(value, dict):
        return {check_text(name, 65_535): plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return list(map(plain, value))
    if isinstance(value, Number):
        number = float(value.text) if value.integer is None else value.integer
        require(isinstance(number, int) or math.isfinite(number))
        return number
    return check_text(value, 65_535) if isinstance(value, str) else value


def expected(kind: str, arguments: tuple[int, ...], value: Any) -> Any:
    """What a column holds of a value that is not null. Raises Refused."""
    if kind == "super":
        return plain(value)
    if kind == "boolean":
        require(isinstance(value, bool))
        return value
    if kind in ("varchar", "date", "timestamp", "timestamptz"):
        require(isinstance(value, str))
    if kind == "varchar":
        return check_text(value, arguments[0])
    if kind == "date":
        require(re.fullmatch(r"\d{4}-\d\d-\d\d", value, re.ASCII))
        return moment(f"{value}T00:00:00", False).date()
    if kind in ("timestamp", "timestamptz"):
        return moment(value, kind == "timestamptz")
    if kind == "decimal" and isinstance(value, str):
        require(re.fullmatch(r"-?\d+(\.\d+)?", value, re.ASCII))
        value = Number(value)
    require(isinstance(value, Number))
    if kind in ("smallint", "integer", "bigint"):
        limit = 1 << {"smallint": 15, "integer": 31, "bigint": 63}[kind]
        require(value.integer is not None and -limit <= value.integer < limit)
        return value.integer
    number: Any = value.decimal
    require(number is not None)
    if kind == "decimal":
        precision, scale = arguments
        require(not number or number.adjusted() < precision - scale)
        require(Decimal(f"{number:.{scale}f}") == number)
        return number
    least, most = LIMITS[kind]
    try:
        nearest = float(value.text) if value.integer is None else float(value.integer)  # -0 is 0
        nearest = nearest if kind == "double precision" else single(nearest)
    except OverflowError:
        raise Refused from None
    require(not number or least <= abs(nearest) <= most)
    return nearest


def single(number: float) -> float:
    """The nearest number of 32 bits."""
    (nearest,) = struct.unpack("<f", struct.pack("<f", number))
    return float(nearest)


def expected_rows(table: Table, record: Any) -> Records:
    """The rows of a table that come from a record. Raises Refused."""
    require(isinstance(record, dict))
    sources = [record]
    if table.rows:
        # A box that is no object is refused by the table of the items.
        elements = dug(record, table.rows)
        require(elements is None or isinstance(elements, list))
        sources = []
        own = ["position" in element for element in elements or [] if isinstance(element, dict)]
        require(not any(own) or (all(own) and len(own) == len(elements)))
        for position, element in enumerate(elements or [], 1):
            if table.name == "public.codes" and not isinstance(element, dict):
                element = {"value": element}
            require(isinstance(element, dict) and "item" not in element)
            sources.append({"position": Number(str(position))} | element | {"item": record})
    rows = []
    for source in sources:
        row = {}
        for column in table.columns:
            value = dug(source, ".".join(column.path))
            require(value is not None or not column.not_null)
            row[column.name] = (
                None if value is None else expected(column.kind, column.arguments, value)
            )
        rows.append(row)
    return rows


def all_expected(document: list[Any]) -> tuple[dict[str, Records], list[int]]:
    """The rows of all tables, and the indexes of the records that have to be refused."""
    rows: dict[str, Records] = {table.name: [] for table in CONFIG.tables}
    faulty = []
    for number, record in enumerate(document):
        try:
            for table in CONFIG.tables:
                rows[table.name] += expected_rows(table, record)
        except Refused:
            faulty.append(number)
    return rows, faulty


# --- what came out -------------------------------------------------------------------------------

READ: dict[str, Callable[[str], Any]] = {
    "boolean": {"t": True, "f": False}.__getitem__,
    **dict.fromkeys(("smallint", "integer", "bigint"), int),
    "real": lambda text: single(float(text)),
    "double precision": float,
    "decimal": Decimal,
    "varchar": str,
    "date": date.fromisoformat,
    "timestamp": lambda text: datetime.fromisoformat(text).replace(tzinfo=UTC),
    "timestamptz": datetime.fromisoformat,
    "super": json.loads,
}


# What Redshift calls the types of columns.
TYPES = {"boolean": "bool", "smallint": "int2", "integer": "int4", "bigint": "int8"}
TYPES |= {"real": "float4", "double precision": "float8", "decimal": "numeric"}


def written_rows(table: Table, files: list[str], count: int, null: str) -> Records:
    """The rows in the files of a table, which the stand-in's COPY must take as well."""
    options = {"NULL": null, "TIMEFORMAT": "auto", "IGNOREHEADER": "1"}
    copy, rows = CopyCommand(table.name, [], "", options), []
    targets = [
        Column(c.name, TYPES.get(c.kind, c.kind), ",".join(map(str, c.arguments)), c.not_null)
        for c in table.columns
    ]
    for text in files:
        header, *found = csv.reader(io.StringIO(text, newline=""), strict=True)
        assert header == table.names
        assert len([*copy.rows("", text.encode(), targets)]) == len(found)
        for cells in found:
            row: dict[str, Any] = {}
            for column, cell in zip(table.columns, cells, strict=True):
                row[column.name] = None if cell == null else READ[column.kind](cell)
                if column.kind == "decimal" and cell != null:
                    assert len(cell.partition(".")[2]) == column.arguments[1]
            rows.append(row)
    assert len(rows) == count
    return rows


def transformed(body: bytes) -> dict[str, Records]:
    """The rows that the program makes of a source, or its PipelineError."""
    return {part[0].name: written_rows(*part) for part in parts_of(body, CONFIG)}


def exact(value: Any) -> Any:
    """What is equal for equal values of one type: True is not 1, nor 1 the same as 1.0."""
    if isinstance(value, Decimal):
        return value
    return type(value), json.dumps(value, sort_keys=True, default=str)


def names_a_record(message: str, document: list[Any], faulty: list[int]) -> bool:
    """Whether a message has the key or the number of one of these records."""
    for index in faulty:
        record = document[index]
        if isinstance(record, dict):
            key = shorten(json.loads(written(record["id"]), parse_float=Decimal))
            if re.search(rf"\b(item_)?id={re.escape(key)}", message):
                return True
        elif f"record {index + 1} is not an object" in message:
            return True
        if f"after record {index}:" in message:
            return True
    return False


# The usual ones first, which Hypothesis takes most often.
SIZES = st.fixed_dictionaries(
    {
        "CHUNK_RECORDS": st.sampled_from([7, 3, 1]),
        "CHUNK_PIECES": st.sampled_from([3, 2, 1]),
        "READ_BYTES": st.sampled_from([1 << 20, 64, 7]),
    }
)


def check(
    document: list[Any], changes: dict[str, int], ascii_only: bool = True, as_lines: bool = False
) -> bool:
    """Checks one document; returns whether it was accepted."""
    rows, faulty = all_expected(document)
    message = ""
    with sizes(**changes):
        try:
            found = transformed(laid_out(document, ascii_only, as_lines).encode())
        except PipelineError as error:
            message = str(error)
    if message:
        assert faulty, f"refused for no reason: {message}"
        assert names_a_record(message, document, faulty), message
        assert len(message) < 1000
        assert message.encode()  # no lone surrogate, which could not be printed
        return False
    assert not faulty, f"accepted, although records {faulty} do not fit"
    for table, wanted in rows.items():
        for left, right in zip(found[table], wanted, strict=True):
            for name in right:
                assert exact(left[name]) == exact(right[name]), (table, name)
    return True


# --- tests ---------------------------------------------------------------------------------------


@given(documents(), SIZES, st.booleans(), st.booleans())
def test_any_document(
    document: list[Any], changes: dict[str, int], ascii_only: bool, as_lines: bool
) -> None:
    check(document, changes, ascii_only, as_lines)
