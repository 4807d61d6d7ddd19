"""Whatever the values are, they arrive as they are or are refused."""

from __future__ import annotations

import contextlib
import json
import struct
import tempfile
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers import (
    NULL,
    SECTIONS,
    PipelineError,
    config_of,
    read_records,
    rows_of,
    run_pipeline,
    sizes,
    table_of,
)
from sandbox import BUCKET, SECRET, Sandbox

# --- values -------------------------------------------------------------------------------------

# Neither PostgreSQL nor Redshift hold NUL.
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)


def fraction(value: float) -> Decimal:
    """A float as read_batches gives it."""
    return Decimal(repr(value))


def integers(bits: int) -> st.SearchStrategy[int]:
    return st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def floats(width: int) -> st.SearchStrategy[Decimal]:
    """All floats of this width but its largest and smallest, which are tested on their own."""
    most, least = (3.4e38, 1.2e-38) if width == 32 else (1.7e308, 2.3e-308)
    exact = struct.Struct("f" if width == 32 else "d")
    numbers = st.floats(-most, most, allow_subnormal=False).filter(
        lambda value: not value or abs(value) >= least
    )
    return numbers.map(lambda value: fraction(exact.unpack(exact.pack(value))[0]))


def decimals(precision: int, scale: int) -> st.SearchStrategy[Decimal]:
    most = 10**precision - 1
    return st.integers(-most, most).map(
        lambda unscaled: Decimal((int(unscaled < 0), tuple(map(int, str(abs(unscaled)))), -scale))
    )


def varchars(size: int) -> st.SearchStrategy[str]:
    return TEXTS.map(lambda text: text.encode()[:size].decode(errors="ignore"))


def times(*zones: Any) -> st.SearchStrategy[str]:
    """ISO 8601 texts of times whose offset leaves them within the years 1 to 9999."""
    moments = st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30))
    return st.builds(
        lambda moment, zone, separator: moment.replace(tzinfo=zone).isoformat(separator),
        moments,
        st.one_of(*zones),
        st.sampled_from("T "),
    )


OFFSETS = st.integers(-23 * 60 - 59, 23 * 60 + 59).map(
    lambda minutes: timezone(timedelta(minutes=minutes))
)
ZULU = times(st.none()).map(lambda text: f"{text}Z")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | floats(64) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=10,
)
FITTING: dict[str, st.SearchStrategy[Any]] = {
    "boolean": st.booleans(),
    "smallint": integers(16),
    "integer": integers(32),
    "bigint": integers(64),
    "real": floats(32) | st.integers(-(2**24), 2**24),
    "double precision": floats(64) | st.integers(-(2**53), 2**53),
    "date": st.dates().map(date.isoformat),
    "timestamp": times(st.none()),
    "timestamptz": times(OFFSETS) | ZULU,
    "super": JSON,
}
SIZED = st.one_of(
    st.integers(1, 60).map(lambda size: (f"varchar({size})", varchars(size))),
    st.integers(1, 38)
    .flatmap(lambda precision: st.tuples(st.just(precision), st.integers(0, precision)))
    .map(lambda sizes: ("decimal({},{})".format(*sizes), decimals(*sizes))),
)
TYPES = st.sampled_from(sorted(FITTING.items())) | SIZED


def plain(value: Any) -> Any:
    """Nested JSON with floats for its fractions, as any reader of super has it."""
    if isinstance(value, dict):
        return {name: plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return list(map(plain, value))
    return float(value) if isinstance(value, Decimal) else value


def instant(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)


def single(value: float | str | Decimal) -> float:
    """The nearest float of 32 bits."""
    (nearest,) = struct.unpack("f", struct.pack("f", float(value)))
    return float(nearest)


def strictly(value: Any) -> str:
    """JSON without Python's True == 1 == 1.0."""
    return json.dumps(plain(value), sort_keys=True)


# kind: (the text of a CSV cell, the value in the source) to what has to be equal.
READERS: dict[str, tuple[Callable[[str], Any], Callable[[Any], Any]]] = {
    "boolean": ({"True": True, "False": False}.__getitem__, bool),
    "smallint": (int, int),
    "integer": (int, int),
    "bigint": (int, int),
    "real": (single, single),
    "double precision": (float, float),
    "decimal": (Decimal, Decimal),
    "varchar": (str, str),
    "date": (date.fromisoformat, date.fromisoformat),
    "timestamp": (datetime.fromisoformat, datetime.fromisoformat),
    "timestamptz": (instant, instant),
    "super": (lambda text: strictly(json.loads(text)), strictly),
}


def written(type_: str, values: list[Any]) -> list[str]:
    """The cells of a column with these values."""
    table = table_of({"id": "integer", "v": type_})
    records = [{"id": number, "v": value} for number, value in enumerate(values)]
    rows = rows_of(records, table, NULL)
    assert [row[0] for row in rows] == [str(number) for number in range(len(values))]
    return [row[1] for row in rows]


def check_cells(type_: str, values: list[Any], cells: list[str]) -> None:
    read, source = READERS[type_.partition("(")[0]]
    for value, cell in zip(values, cells, strict=True):
        if value is None:
            assert cell == NULL
        else:
            assert read(cell) == source(value)


@given(st.data(), TYPES)
@settings(max_examples=200, deadline=None)
def test_values_that_fit_are_in_the_csv(
    data: st.DataObject, typed: tuple[str, st.SearchStrategy[Any]]
) -> None:
    type_, fitting = typed
    values = data.draw(st.lists(st.none() | fitting, max_size=8))
    check_cells(type_, values, written(type_, values))


# Exponents of a million, which overflow, are tested on their own.
DECIMALS = st.decimals(allow_nan=False, allow_infinity=False).filter(
    lambda number: abs(number.adjusted()) < 100_000
)
ANYTHING = st.one_of(
    JSON,
    DECIMALS,
    st.integers(),
    st.sampled_from([float("nan"), float("inf"), float("-inf"), Decimal("-0.0"), "\0", "\ud800"]),
    st.text(),
    st.lists(st.text() | DECIMALS, max_size=3),
    st.from_regex(r"\d{4}-[01]\d-[0-3]\d", fullmatch=True),
    st.from_regex(
        r"\d{4}-[01]\d-[0-3]\d[T ][0-2]\d:[0-6]\d:[0-6]\d(\.\d{1,9})?(Z|[+-]\d\d(:?\d\d)?)?",
        fullmatch=True,
    ),
    *FITTING.values(),
)


@given(TYPES, ANYTHING)
@settings(max_examples=500, deadline=None)
def test_any_value_is_in_the_csv_or_refused(
    typed: tuple[str, st.SearchStrategy[Any]], value: Any
) -> None:
    type_, _ = typed
    with contextlib.suppress(PipelineError):
        check_cells(type_, [value], written(type_, [value]))


# --- the source ---------------------------------------------------------------------------------

BATCHES = st.sampled_from([1, 2, 3, 7])  # records
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
DOCUMENTS = st.lists(
    st.dictionaries(
        st.text(max_size=9),
        st.recursive(
            st.none() | st.booleans() | NUMBERS | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            max_leaves=8,
        ),
        max_size=5,
    ),
    min_size=1,
    max_size=8,
)


@given(
    DOCUMENTS,
    st.integers(1, 64),
    st.sampled_from([None, 0, 1, 4, "\t", "lines"]),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_the_records_are_those_of_the_document(
    document: list[dict[str, Any]], size: int, indent: int | str | None, escaped: bool
) -> None:
    if indent == "lines":
        text = "\n".join(json.dumps(record, ensure_ascii=escaped) for record in document)
    else:
        text = json.dumps(document, indent=indent, ensure_ascii=escaped)
    served = json.loads(json.dumps(document), parse_float=Decimal)
    with tempfile.TemporaryDirectory() as folder, sizes(READ_CHARACTERS=size):
        path = Path(folder) / "response"
        path.write_bytes(text.encode())
        assert list(read_records(path)) == served


@given(DOCUMENTS, st.integers(1, 64), st.data())
@settings(max_examples=100, deadline=None)
def test_a_document_that_is_cut_is_refused(
    document: list[dict[str, Any]], size: int, data: st.DataObject
) -> None:
    text = json.dumps(document)
    cut = data.draw(st.integers(0, len(text) - 1))
    with tempfile.TemporaryDirectory() as folder, sizes(READ_CHARACTERS=size):
        path = Path(folder) / "response"
        path.write_text(text[:cut])
        with pytest.raises(PipelineError):
            list(read_records(path))


# --- from end to end ----------------------------------------------------------------------------

LOADED = {
    "boolean": FITTING["boolean"],
    "smallint": FITTING["smallint"],
    "integer": FITTING["integer"],
    "bigint": FITTING["bigint"],
    "real": FITTING["real"],
    "double precision": FITTING["double precision"],
    "decimal(38,0)": decimals(38, 0),
    "decimal(20,9)": decimals(20, 9),
    "varchar(24)": varchars(24),
    "varchar(65535)": TEXTS,
    "date": FITTING["date"],
    "timestamp": FITTING["timestamp"],
    "timestamptz": FITTING["timestamptz"],
    "super": FITTING["super"],
}
PATHS = {type_: ("values", f"v{number}") for number, type_ in enumerate(LOADED)}
COLUMNS = {".".join(path): type_ for type_, path in PATHS.items()}
ALL_TYPES = config_of(
    {
        "public.things": {"key": "id", "columns": {"id": "bigint"} | COLUMNS},
        "public.parts": {
            "rows": "parts",
            "parent": "thing",
            "key": ["thing_id", "position"],
            "columns": {
                "thing.id": "bigint not null",
                "position": "smallint not null",
                "name": "varchar(400)",
                "size": "decimal(38,19)",
                "made": "timestamptz",
            },
        },
    },
    staging=SECTIONS["staging"] | {"bucket": BUCKET},
    redshift={"secret": SECRET, "copy_role": "arn:aws:iam::123456789012:role/loader"},
)
ABSENT = object()
PART = st.fixed_dictionaries(
    {},
    optional={
        "name": st.none() | TEXTS,
        "size": st.none() | decimals(38, 19),
        "made": st.none() | FITTING["timestamptz"],
    },
)


@st.composite
def things(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Up to 50 records, in which a few values of each type meet in ever other combinations."""
    count = draw(st.integers(1, 50))
    pools = {
        path: draw(st.lists(st.none() | st.just(ABSENT) | values, min_size=1, max_size=7))
        for (_, path), values in zip(PATHS.values(), LOADED.values(), strict=True)
    }
    parts = draw(st.lists(st.none() | st.lists(PART, max_size=3), min_size=1, max_size=5))
    ids = draw(st.lists(integers(64), min_size=count, max_size=count, unique=True))
    records = []
    for number, id_ in enumerate(ids):
        values = {path: pool[number % len(pool)] for path, pool in pools.items()}
        present = {path: value for path, value in values.items() if value is not ABSENT}
        records.append({"id": id_, "values": present, "parts": parts[number % len(parts)]})
    return records


def encoded(value: Any) -> str:
    """JSON in which a Decimal is the number that it is."""
    if isinstance(value, dict):
        pairs = (f"{json.dumps(name)}:{encoded(inner)}" for name, inner in value.items())
        return "{" + ",".join(pairs) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(encoded, value)) + "]"
    return str(value) if isinstance(value, Decimal) else json.dumps(value)


def alike(loaded: Any, served: Any) -> bool:
    """Whether nested JSON from the database is what was served, which rounds fractions."""
    if isinstance(served, dict):
        return loaded.keys() == served.keys() and all(
            alike(loaded[name], value) for name, value in served.items()
        )
    if isinstance(served, list):
        return len(loaded) == len(served) and all(map(alike, loaded, served))
    if isinstance(served, Decimal):
        return not isinstance(loaded, bool) and float(loaded) == float(served)
    return type(loaded) is type(served) and bool(loaded == served)


def equal(type_: str, loaded: Any, served: Any) -> bool:
    """Whether a column of this type holds a value of the source."""
    if served is None or loaded is None:
        return loaded is served
    match type_.partition("(")[0]:
        case "super":
            return alike(loaded, served)
        case "real":
            return single(loaded) == single(served)
        case "double precision":
            return bool(loaded == float(served))
        case "timestamptz":
            return bool(loaded == instant(served))
        case "timestamp":
            return bool(loaded == datetime.fromisoformat(served))
        case "date":
            return bool(loaded == date.fromisoformat(served))
        case _:
            return type(loaded) is type(served) and bool(loaded == served)


@pytest.fixture
def at_hand(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Sandbox:
    """The sandbox, in which this process is the program's."""
    for name, value in sandbox.environment.items():
        monkeypatch.setenv(name, value)
    return sandbox


@given(records=things(), batch=BATCHES)
@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.large_base_example,
    ],
)
def test_every_value_is_in_redshift(
    at_hand: Sandbox, records: list[dict[str, Any]], batch: int
) -> None:
    at_hand.source.body = encoded(records).encode()
    with sizes(CHUNK_RECORDS=batch):
        assert run_pipeline(ALL_TYPES, at_hand.source.url) == 0

    rows = {row["id"]: row for row in at_hand.query("SELECT * FROM public.things")}
    assert rows.keys() == {record["id"] for record in records}
    for record in records:
        for type_, path in PATHS.items():
            loaded = rows[record["id"]]["_".join(path)]
            assert equal(type_, loaded, record["values"].get(path[1])), type_

    parts = at_hand.query("SELECT * FROM public.parts")
    loaded_parts = {(row["thing_id"], row["position"]): row for row in parts}
    served_parts = {
        (record["id"], position): part
        for record in records
        for position, part in enumerate(record["parts"] or [], 1)
    }
    assert len(parts) == len(served_parts)
    assert loaded_parts.keys() == served_parts.keys()
    for key, part in served_parts.items():
        assert equal("varchar", loaded_parts[key]["name"], part.get("name"))
        assert equal("decimal", loaded_parts[key]["size"], part.get("size"))
        assert equal("timestamptz", loaded_parts[key]["made"], part.get("made"))
