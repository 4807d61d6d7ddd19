"""Documents of all kinds: each is loaded exactly, or refused with a message that names a record.

Hypothesis makes the documents. They are written as JSON by a serializer of their own, so that a
number stands in them as it was made, and what is expected of each value is worked out here without
the program's help.
"""

from __future__ import annotations

import json
import math
import re
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, seed, settings
from hypothesis import strategies as st

from helpers import Config, PipelineError, Table, load_config, parts_of, shorten, sizes, without_log
from sandbox import Sandbox

CONFIG = """
source: {url: https://localhost/}
staging: {bucket: my-data-bucket, prefix: spacex}
redshift: {secret: redshift/spacex}
tables:
  public.items:
    key: [id]
    columns:
      id: varchar(24) not null
      flag: boolean
      small: smallint
      whole: integer not null
      big: bigint
      single: real
      number: double precision
      amount: decimal(10,2)
      exact: decimal(38,10)
      title: varchar(40)
      box.label: varchar(12)
      box.inner.day: date
      local: timestamp
      moment: timestamptz
      anything: super
  public.parts:
    rows: box.parts
    parent: item
    key: [item_id, position]
    min_rows: 0
    columns:
      item.id: varchar(24) not null
      position: integer not null
      sku: varchar(16) not null
      size.width: real
      since: timestamptz
      tags: super
  public.codes:
    rows: codes
    parent: item
    key: [item_id, position]
    min_rows: 0
    columns: {item.id: varchar(24) not null, position: smallint not null, value: bigint not null}
"""


def share(percent: int) -> settings:
    """So much of the profile's examples: it says how many there are in this file together."""
    return settings(max_examples=settings().max_examples * percent // 100)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    path = tmp_path_factory.mktemp("documents") / "pipeline.yaml"
    path.write_text(CONFIG)
    return load_config(path)


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


def words(text: str) -> list[str]:
    return text.split()


DEEP = 900  # levels; Python 3.11 reads some 990, later versions thousands
MISSING = Number("missing")  # in the place of a value: its key is left out

# Lone surrogates, NUL and other controls, what looks like CSV or NULL, combining and wide ones.
LETTERS = st.one_of(
    st.sampled_from(
        "aZ09 ,\"'\\\n\r\t\0\x1f\x7f\x85\xa0éß漢🚀\u0301\u200f\u2028\ufeff\ud83d\ude80\udfff"
    ),
    st.characters(),
)
WORDS = ["", "NULL", "null", r"\N", "NULL-", "true", "1", "NaN", " ", '"', "é" * 20, "🚀" * 10]
# Pairs and triples that mean something to a reader of CSV, of JSON or of COPY's text.
PIECES = st.sampled_from(["\r\n", '""', '",', '"\n"', r"\n", r"\N", r"\u0000", "\n\n", ",,", "x"])
TEXTS = (
    st.text(LETTERS, max_size=14)
    | st.lists(PIECES, min_size=1, max_size=4).map("".join)
    | st.sampled_from(WORDS)
)
GOOD_LETTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0") | st.sampled_from(
    ",\"'\\\n\r\t\x1f\x7f\x85\u2028é漢🚀"
)
DIGITS = st.text("0123456789", min_size=1, max_size=30)


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


def floats(width: int) -> st.SearchStrategy[Number]:
    finite = st.floats(
        allow_nan=False,
        allow_infinity=False,
        allow_subnormal=False,
        width=64 if width == 64 else 32,
    )
    return finite.map(lambda value: Number(repr(value))) | st.sampled_from(
        [Number(text) for text in ("0", "-0.0", "0e9", "1E5", "1e+05", "0.1", "16777217", "-3")]
    )


ODD_NUMBERS = st.one_of(
    st.sampled_from(
        words("""0 -0 1.0 1e0 1e2 32768 -32769 2147483648 9223372036854775808 1e19 3.5e38 -3.5e38
        1e-38 1.8e308 -1.8e308 1e309 1e-308 5e-324 1e-400 1e400 -1e999999 1e-999999 0.001
        99999999.99 100000000.00 99999999.995 0.00000000001 NaN Infinity -Infinity""")
    ),
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


ODD_TIMES = st.sampled_from(
    [
        *words("""2006-02-29 2006-3-24 20060324 0000-01-01 10000-01-01 0001-01-01T00:00:00+00:01
    9999-12-31T23:59:59-00:01 2006-03-24T24:00:00Z 2006-03-24T23:59:60Z 2006-03-24T22:30Z
    2006-03-24T22:30:00 2006-03-24T22:30:00z 2006-03-24t22:30:00Z 2006-03-24T22:30:00.1234567Z
    2006-03-24T22:30:00+24:00 2006-03-24T22:30:00+00:60 2006-03-24T22:30:00,5Z 1143239400
    2006-03-24T22:30:00.Z -2006-03-24 ٢٠٠٦-٠٣-٢٤ 2006-W12-5 now"""),
        "2006-03-24T22:30:00Z ",
        "2006-03-24\n",
        "2006-03-24 22:30:00 +01:00",
    ]
)
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


GOOD_TEXTS = (
    st.text(GOOD_LETTERS, max_size=10) | st.lists(PIECES, max_size=3).map("".join)
).filter(lambda text: len(text.encode()) <= 40)
GOOD_JSON = st.recursive(
    st.booleans() | GOOD_TEXTS | floats(64) | integers(64) | st.none(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(KEYS.filter(lambda key: "\0" not in key) | GOOD_TEXTS, inner, max_size=3)
    ),
    max_leaves=6,
) | st.builds(nested, st.integers(1, 100), st.booleans())


def maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(strategy, strategy, st.sampled_from([None, MISSING]))


def mapping(**values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    def clean(it: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        kept = {name: value for name, value in it.items() if value is not MISSING}
        return {name: value for name, value in extra.items() if name not in it} | kept

    extra: st.SearchStrategy[dict[str, Any]] = st.just({}) | st.dictionaries(
        KEYS | TEXTS, JSON, max_size=2
    )
    return st.builds(clean, st.fixed_dictionaries(values), extra)


def short(most: int) -> st.SearchStrategy[str]:
    return GOOD_TEXTS.filter(lambda text: len(text.encode()) <= most)


DAYS = st.dates().map(date.isoformat)
PARTS = mapping(
    sku=short(16),
    size=maybe(mapping(width=maybe(floats(32)))),
    since=maybe(times(OFFSETS)),
    tags=maybe(GOOD_JSON),
)
ITEMS = mapping(
    flag=maybe(st.booleans()),
    small=maybe(integers(16)),
    whole=integers(32),
    big=maybe(integers(64)),
    single=maybe(floats(32)),
    number=maybe(floats(64)),
    amount=maybe(decimals(8, 2)),
    exact=maybe(decimals(28, 10)),
    title=maybe(GOOD_TEXTS),
    box=maybe(
        mapping(
            label=maybe(short(12)),
            inner=maybe(mapping(day=maybe(DAYS))),
            parts=maybe(st.lists(PARTS, max_size=3)),
        )
    ),
    local=maybe(times([""])),
    moment=maybe(times(OFFSETS)),
    anything=maybe(GOOD_JSON),
    codes=maybe(st.lists(integers(64), max_size=3)),
)

PLACES = words("""id flag small whole big single number amount exact title box box.label box.inner
box.inner.day box.parts local moment anything codes""")
PART_PLACES = words("sku size size.width since tags")


@st.composite
def documents(draw: st.DrawFn, faults: int = 3) -> list[Any]:
    """Items that fit, each with its own id, and then at most so many values put in at random."""
    items: list[Any] = draw(st.lists(ITEMS, min_size=1, max_size=3))
    for number, item in enumerate(items, 1):
        item["id"] = f"item {number}"
    for _ in range(draw(st.integers(0, faults))):
        number = draw(st.integers(0, len(items) - 1))
        value = draw(JSON | st.just(MISSING) | st.builds(nested, st.just(2000), st.none()))
        target, places = items[number], PLACES
        if not isinstance(target, dict) or draw(st.integers(0, 19)) == 0:
            items[number] = None if value is MISSING else value  # no object at all, perhaps
            continue
        box = target.get("box")
        parts = box.get("parts") if isinstance(box, dict) else None
        if isinstance(parts, list) and parts and draw(st.booleans()):
            index = draw(st.integers(0, len(parts) - 1))
            if not isinstance(parts[index], dict) or draw(st.integers(0, 9)) == 0:
                parts[index] = None if value is MISSING else value
                continue
            target, places = parts[index], PART_PLACES
        *way, name = draw(st.sampled_from(places)).split(".")
        for step in way:
            target = target.get(step) if isinstance(target, dict) else None
        if isinstance(target, dict):
            if name == "id" and (value is None or value is MISSING):
                continue  # refused by its beginning, not by its key
            target[name] = value
            if value is MISSING:
                del target[name]
    ids = [written(item["id"]) for item in items if isinstance(item, dict) and "id" in item]
    assume(len(set(ids)) == len(ids))
    assume(all(item.get("id") is not None for item in items if isinstance(item, dict)))
    return items


def written(value: Any, ascii_only: bool = True) -> str:
    """A value as JSON. Lone surrogates and controls are always escaped."""
    # Not recursive: some documents are thousands of levels deep.
    pieces: list[str] = []
    stack: list[Any] = [(value,)]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            pieces.append(item)
            continue
        (item,) = item
        if isinstance(item, dict):
            stack.append("}")
            for position, (name, inner) in reversed(list(enumerate(item.items()))):
                stack += [(inner,), ":", text_written(name, ascii_only), "," * (position > 0)]
            pieces.append("{")
        elif isinstance(item, list):
            stack.append("]")
            for position, inner in reversed(list(enumerate(item))):
                stack += [(inner,), "," * (position > 0)]
            pieces.append("[")
        elif isinstance(item, Number):
            pieces.append(item.text)
        elif isinstance(item, str):
            pieces.append(text_written(item, ascii_only))
        else:
            pieces.append({None: "null", True: "true", False: "false"}[item])
    return "".join(pieces)


def laid_out(document: list[Any], ascii_only: bool, layout: str) -> str:
    """A document as an array, as one with white space, or with a record a line."""
    if layout == "array":
        return written(document, ascii_only)
    records = [written(record, ascii_only) for record in document]
    if layout == "lines" and all(isinstance(record, dict) for record in document):
        return "\r\n\n".join(records)
    return "\n[ " + " ,\r\n\t".join(records) + "\n] "


def text_written(text: str, ascii_only: bool) -> str:
    shown = json.dumps(text, ensure_ascii=ascii_only)
    return re.sub("[\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", shown)


# --- what is expected ----------------------------------------------------------------------------


class Refused(Exception):
    """The value is one that its column cannot hold."""


def require(fits: object) -> None:
    if not fits:
        raise Refused


def dug(value: Any, path: str) -> Any:
    """The value at a path; a value that is no object on the way is refused."""
    for name in path.split("."):
        require(value is None or isinstance(value, dict))
        value = None if value is None else value.get(name)
    return value


FLOAT32_MOST, FLOAT32_LEAST = (
    struct.unpack("<f", it)[0] for it in (b"\xff\xff\x7f\x7f", b"\0\0\x80\0")
)
LIMITS = {
    "real": (Decimal(FLOAT32_LEAST), Decimal(FLOAT32_MOST)),
    "double precision": (Decimal(sys.float_info.min), Decimal(sys.float_info.max)),
}
SECOND = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})[T ]([0-9]{2}:[0-9]{2}:[0-9]{2})(?:\.([0-9]{1,6}))?"
    r"(?:(Z)|([+-])([0-9]{2})(?::?([0-9]{2}))?)?"
)


def moment(text: str, with_offset: bool) -> datetime:
    match = SECOND.fullmatch(text)
    require(match)
    assert match
    day, clock, fraction, zulu, sign, hours, minutes = match.groups()
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


def plain(value: Any, depth: int = 0) -> Any:
    """A value for SUPER as Python has it: a number with a fraction is the nearest double."""
    require(depth < DEEP)
    if isinstance(value, dict):
        return {check_text(name, 65_535): plain(it, depth + 1) for name, it in value.items()}
    if isinstance(value, list):
        return [plain(it, depth + 1) for it in value]
    if isinstance(value, Number):
        if value.integer is not None:
            return value.integer
        number = float(value.text)
        require(math.isfinite(number))
        return number
    return check_text(value, 65_535) if isinstance(value, str) else value


def expected(kind: str, value: Any) -> Any:
    """What a column holds of a value that is not null. Raises Refused."""
    name, _, size = kind.partition("(")
    sizes = [int(text) for text in size.rstrip(")").split(",") if text]
    if name == "super":
        return plain(value)
    if name == "boolean":
        require(isinstance(value, bool))
        return value
    if name == "varchar":
        require(isinstance(value, str))
        return check_text(value, sizes[0])
    if name in ("date", "timestamp", "timestamptz"):
        require(isinstance(value, str))
        if name != "date":
            return moment(value, name == "timestamptz")
        require(re.fullmatch("[0-9]{4}-[0-9]{2}-[0-9]{2}", value))
        return moment(f"{value}T00:00:00", False).date()
    if name == "decimal" and isinstance(value, str):
        require(re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", value))
        value = Number(value)
    require(isinstance(value, Number))
    if name in ("smallint", "integer", "bigint"):
        limit = 1 << {"smallint": 15, "integer": 31, "bigint": 63}[name]
        require(value.integer is not None and -limit <= value.integer < limit)
        return value.integer
    number = value.decimal
    require(number is not None)
    assert number is not None
    if name == "decimal":
        _, digits, exponent = number.as_tuple()
        assert isinstance(exponent, int)
        significant = "".join(map(str, digits)).lstrip("0")
        exponent += len(significant) - len(significant.rstrip("0"))
        significant = significant.rstrip("0")
        require(not significant or (exponent >= -sizes[1]
                and len(significant) + exponent <= sizes[0] - sizes[1]))  # fmt: skip
        return number if significant else Decimal(0)
    least, most = LIMITS[name]
    try:
        nearest = float(value.text) if value.integer is None else float(value.integer)  # -0 is 0
        nearest = nearest if name == "double precision" else single(nearest)
    except OverflowError:
        raise Refused from None
    require(not number or least <= abs(nearest) <= most)
    return nearest


def single(number: float) -> float:
    """The nearest number of 32 bits."""
    (nearest,) = struct.unpack("<f", struct.pack("<f", number))
    return float(nearest)


Rows = list[dict[str, Any]]


def expected_rows(table: Table, number: int, record: Any) -> Rows:
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
            row[column.name] = None if value is None else expected(column.type, value)
        rows.append(row)
    return rows


def all_expected(config: Config, document: list[Any]) -> tuple[dict[str, Rows], list[int]]:
    """The rows of all tables, and the indexes of the records that have to be refused.

    Of those that are nested deeply it depends on the version of Python whether they are.
    """
    rows: dict[str, Rows] = {table.name: [] for table in config.tables}
    faulty = []
    for number, record in enumerate(document):
        try:
            require(depth(record) < DEEP)
            for table in config.tables:
                rows[table.name] += expected_rows(table, number, record)
        except Refused:
            faulty.append(number)
    return rows, faulty


def depth(value: Any) -> int:
    """How many arrays and objects stand in one another."""
    level, deep = [value], 0
    while level := [it for it in level if isinstance(it, list | dict)]:
        deep += 1
        level = [it for each in level for it in (each.values() if isinstance(each, dict) else each)]
    return deep


# --- what came out -------------------------------------------------------------------------------

CELL = re.compile(r'"((?:[^"]|"")*)"(?=[,\n])|([^",\r\n]*)(?=[,\n])')


def csv_cells(text: str) -> Iterator[list[tuple[bool, str]]]:
    """The rows of CSV: of each cell whether it stands in quotes, and its text."""
    position = 0
    while position < len(text):
        row: list[tuple[bool, str]] = []
        while not row or text[position - 1] == ",":
            match = CELL.match(text, position)
            assert match, text[position : position + 100]
            in_quotes = match[1] is not None
            row.append((in_quotes, match[1].replace('""', '"') if in_quotes else match[2]))
            position = match.end() + 1
        yield row


READ: dict[str, Callable[[str], Any]] = {
    "boolean": {"t": True, "f": False}.__getitem__,
    "smallint": int,
    "integer": int,
    "bigint": int,
    "real": lambda text: single(float(text)),
    "double precision": float,
    "decimal": Decimal,
    "varchar": str,
    "date": date.fromisoformat,
    "timestamp": lambda text: datetime.fromisoformat(text).replace(tzinfo=UTC),
    "timestamptz": datetime.fromisoformat,
    "super": json.loads,
}


def written_rows(table: Table, files: list[str], count: int, null: str) -> Rows:
    """The rows in the files of a table, as COPY reads them."""
    rows, columns = [], table.columns
    for text in files:
        header, *found = csv_cells(text)
        assert header == [(False, column.name) for column in columns]
        for cells in found:
            row: dict[str, Any] = {}
            for column, (in_quotes, cell) in zip(columns, cells, strict=True):
                if cell == null:
                    assert not in_quotes
                    row[column.name] = None
                    continue
                # What is not in quotes must not be empty: COPY would make NULL of it.
                assert in_quotes or cell
                assert in_quotes or column.kind not in ("varchar", "super")
                row[column.name] = READ[column.kind](cell)
                if column.kind == "decimal":
                    assert len(cell.partition(".")[2]) == column.arguments[1]
            rows.append(row)
    assert len(rows) == count
    return rows


def transformed(config: Config, body: bytes) -> dict[str, Rows]:
    """The rows that the program makes of a source, or its PipelineError."""
    return {part[0].name: written_rows(*part) for part in parts_of(body, config)}


def same(left: Any, right: Any) -> bool:
    """Equal with equal types: True is not 1, nor 1 the same as 1.0; -0.0 is not 0.0."""
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same, left, right))
    if type(left) is not type(right) or left != right:
        return False
    return not isinstance(left, float) or math.copysign(1, left) == math.copysign(1, right)


def names_a_record(message: str, document: list[Any], faulty: list[int]) -> bool:
    """Whether a message has the key or the number of one of these records."""
    for index in faulty:
        record = document[index]
        if isinstance(record, dict) and depth(record) < DEEP:
            key = shorten(json.loads(written(record["id"]), parse_float=Decimal))
            if re.search(rf"\b(item_)?id={re.escape(key)}", message):
                return True
        elif f"record {index + 1} is not an object" in message:
            return True
        if f"after record {index}:" in message:
            return True
    return False


LAYOUTS = st.sampled_from(["array", "spaced", "lines"])
SIZES = st.fixed_dictionaries(
    {
        "CHUNK_RECORDS": st.sampled_from([1, 3, 7]),
        "CHUNK_PIECES": st.sampled_from([1, 2, 3]),
        "CSV_ROWS": st.sampled_from([1, 2, 300]),
        "READ_CHARACTERS": st.sampled_from([1, 7, 64, 1 << 20]),
    }
)


def check(
    config: Config,
    document: list[Any],
    ascii_only: bool = True,
    changes: dict[str, int] | None = None,
    layout: str = "array",
) -> bool:
    """Checks one document; returns whether it was accepted."""
    rows, faulty = all_expected(config, document)
    message = ""
    with sizes(**changes or {}):
        try:
            found = transformed(config, laid_out(document, ascii_only, layout).encode())
        except PipelineError as error:
            message = str(error)
    if message:
        assert faulty, f"refused for no reason: {message}"
        assert names_a_record(message, document, faulty), message
        assert len(message) < 1000
        assert message.encode()  # no lone surrogate, which could not be printed
        return False
    if any(depth(document[index]) >= DEEP for index in faulty):
        return False
    assert not faulty, f"accepted, although records {faulty} do not fit"
    for table in config.tables:
        assert len(found[table.name]) == len(rows[table.name])
        for left, right in zip(found[table.name], rows[table.name], strict=True):
            for name in right:
                assert same(left[name], right[name]) or (
                    isinstance(right[name], Decimal) and left[name] == right[name]
                ), (table.name, name, left[name], right[name])
    return True


# --- tests ---------------------------------------------------------------------------------------


@share(55)
@given(documents(), SIZES, st.booleans(), LAYOUTS)
def test_any_document(
    config: Config, document: list[Any], changes: dict[str, int], ascii_only: bool, layout: str
) -> None:
    check(config, document, ascii_only, changes, layout)


COLUMN_VALUES = JSON | st.builds(
    lambda text, times: text * times, TEXTS, st.sampled_from([1, 3, 30])
)


ALL_PLACES = [*PLACES[1:], *(f"box.parts.{place}" for place in PART_PLACES)]


def document_with(value: Any, place: str) -> list[Any]:
    """A document whose second record has the value at a place, and nothing else that is odd."""
    item: dict[str, Any] = {"id": "item 2", "whole": Number("1"), "box": {"inner": {}, "parts": []}}
    target = item
    *way, name = place.split(".")
    for step in way:
        if step == "parts":
            target["parts"] = [{"sku": "a", "size": {}}]
            target = target["parts"][0]
        else:
            target = target[step]
    target[name] = value
    return [{"id": "item 1", "whole": Number("1")}, item]


@share(15)
@given(ODD_NUMBERS | ODD_TIMES | COLUMN_VALUES, st.sampled_from(ALL_PLACES))
def test_one_value_of_any_kind(config: Config, value: Any, place: str) -> None:
    check(config, document_with(value, place))


@pytest.mark.parametrize("place", ALL_PLACES)
def test_each_kind_of_value(config: Config, place: str) -> None:
    numbers = [Number(text) for text in ("0", "1", "-1", "1.0", "1e3", "0.5", "NaN", "-Infinity")]
    texts = ["", "a", "1", "true", "2006-03-24", "2006-03-24T22:30:00", "2006-03-24T22:30:00Z"]
    others: list[Any] = [None, True, False, [], {}, [True], [{}], {"a": True}]
    for value in [*numbers, *texts, *others]:
        check(config, document_with(value, place))


@share(15)
@given(documents(faults=0), st.data())
def test_text_that_is_damaged(config: Config, document: list[Any], data: st.DataObject) -> None:
    """With a piece cut out or put in, it is JSON all the same, or refused."""
    assume(not all_expected(config, document)[1])  # a part may have a field that is called item
    text = written(document, ascii_only=False)
    start = data.draw(st.integers(0, len(text)))
    end = min(len(text), start + data.draw(st.sampled_from([0, 1, 1, 2, 10, 10_000])))
    new = data.draw(st.text('{}[]",:\\ue0-.1n \n\0', max_size=2))
    damaged = text[:start] + new + text[end:]
    message = ""
    try:
        value = json.loads(damaged)
    except ValueError:
        value = None
    with sizes(**data.draw(SIZES)):
        try:
            found = transformed(config, damaged.encode())
        except PipelineError as error:
            message = str(error)
    if message:
        assert damaged != text, message
        assert len(message) < 1000
        return
    assert isinstance(value, list)
    assert [row["id"] for row in found["public.items"]] == [record["id"] for record in value]


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_loaded_into_the_tables(
    sandbox: Sandbox, tmp_path: Path, config: Config, batch: int
) -> None:
    """Documents that are accepted, put together, through S3 and COPY into the tables."""
    together: list[Any] = []

    @seed(batch)
    @settings(share(5), suppress_health_check=list(HealthCheck), database=None)
    @given(documents(faults=batch - 1))
    def collect(document: list[Any]) -> None:
        if check(config, document):
            together.extend(document)

    collect()
    assert len(together) >= 20
    for number, record in enumerate(together):
        record["id"] = f"{batch}.{number}"
    rows, faulty = all_expected(config, together)
    assert not faulty
    source, pipeline = tmp_path / "source.json", tmp_path / "pipeline.yaml"
    source.write_text(written(together, ascii_only=bool(batch % 2)), encoding="utf-8")
    pipeline.write_text(CONFIG)
    done = sandbox.run("--config", pipeline, "--source", source)
    assert done.returncode == 0, done.stderr
    for table in config.tables:
        keys = ["id"] if table.key == ("id",) else ["item_id", "position"]
        stored = {
            tuple(row[key] for key in keys): row
            for row in sandbox.query(f"SELECT * FROM {table.name}")
        }
        wanted = {tuple(row[key] for key in keys): row for row in rows[table.name]}
        assert stored.keys() == wanted.keys()
        for name, row in wanted.items():
            for column in table.columns:
                value = stored[name][column.name]
                if column.kind == "timestamp" and value is not None:
                    value = value.replace(tzinfo=UTC)
                assert equal(column.kind, value, row[column.name]), (table.name, name, column.name)


def equal(kind: str, stored: Any, wanted: Any) -> bool:
    """Whether PostgreSQL has the value; its jsonb keeps numbers as decimals, without -0."""
    if wanted is None or stored is None:
        return stored is wanted
    if kind == "real":
        return bool(single(stored) == wanted)
    if kind != "super":
        return bool(stored == wanted)
    if isinstance(wanted, dict):
        return set(stored) == set(wanted) and all(
            equal(kind, stored[name], wanted[name]) for name in wanted
        )
    if isinstance(wanted, list):
        return len(stored) == len(wanted) and all(map(equal, [kind] * len(wanted), stored, wanted))
    if isinstance(wanted, float):
        return bool(float(stored) == wanted)
    return type(stored) is type(wanted) and bool(stored == wanted)
