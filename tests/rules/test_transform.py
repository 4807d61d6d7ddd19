"""From the bytes of the source to the rows of the tables."""

from __future__ import annotations

import gzip
import itertools
import json
import logging
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

import helpers
from helpers import (
    CSV_ROWS,
    NULL,
    READ_CHARACTERS,
    PipelineError,
    Records,
    batches_of,
    config_of,
    csv_of,
    read_records,
    rows_of,
    sizes,
    table_of,
)

# A warning of NumPy or pandas would stand between the lines of the log.
pytestmark = pytest.mark.filterwarnings("error")

Read = Callable[[str | bytes], list[dict[str, Any]]]


def packed(content: bytes) -> bytes:
    """Gzipped, the same at any time: the tests' names come from it."""
    return gzip.compress(content, mtime=0)


def brief(value: object) -> str:
    """A parameter in a test's name."""
    return ascii(value)[:40]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Reads the records of a file with this content."""

    def read(content: str | bytes) -> list[dict[str, Any]]:
        path = tmp_path / "response"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return list(read_records(path))

    return read


def parsed(text: str) -> Any:
    """A JSON value as read_batches gives it: a number with a fraction or exponent is exact."""
    return json.loads(text, parse_float=Decimal)


# --- read_batches -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        '[{"a":1},{"a":2}]',
        '[{"a":1},{"a":2}]\n',
        ' \t\r\n[ \t\r\n{ "a" : 1 } \t\r\n, \t\r\n{\t"a"\r\n:\n2\n}\n]\r\n \t',
        '\ufeff[{"a":1},{"a":2}]',
        '\ufeff \n[{"a":1},{"a":2}]',
        packed(b'[{"a":1},{"a":2}]'),
        packed(b'\xef\xbb\xbf[{"a":1},{"a":2}]\n'),
        packed(b'[{"a":1},') + packed(b'{"a":2}]'),
        '{"a":1}\n{"a":2}',
        ' \t\r\n\n{ "a" :\t1 } \r\n\n \n{"a":2}\r\n\n',
        '\ufeff{"a":1}\n{"a":2}\n',
        " " * 5_000 + '{"a":1}\n{"a":2}\n',
        packed(b'{"a":1}\n{"a"') + packed(b":2}\n"),
    ],
    ids=brief,
)
def test_the_records_of_an_array_or_one_a_line(read: Read, content: str | bytes) -> None:
    assert read(content) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("join", ["[{}]", "{}"], ids=["array", "lines"])
def test_batches_are_bounded(tmp_path: Path, join: str) -> None:
    lengths = [1, 1, 1, 1, 1, 200, 1, 1, 300, 300, 1] * 20
    texts = [json.dumps({"a": "x" * size}) for size in lengths]
    path = tmp_path / "response"
    path.write_text(join.format((",", "\n")[join == "{}"].join(texts)))
    with sizes(READ_CHARACTERS=250):
        batches = [[len(record["a"]) for record in batch] for batch in batches_of(path)]
    assert list(itertools.chain(*batches)) == lengths
    assert max(map(sum, batches)) <= 1050  # a record that did not end yet, and two pieces more


ACROSS_BOUNDARIES = [
    r'[{"text": "\ud83d\ude80 \u00e9 \\ \" \/ \b\f\n\r\t é 🚀 , ] } [ {"}, {"": "\ud83d"}]',
    '[{"long": "' + "abcdefghi\\\\" * 300 + '"}, {"after": 1}]',
    '[{"numbers": [0, -1, 12345678901234567890, -1.5, 1e5, 1E-5, 2.5e+10, 0.10]}]',
    '[{"words": [true, false, null, NaN, Infinity, -Infinity]}, {"next": true}]',
    '[{"nested": {"a": [{"b": [[], {}, [{}]]}, []]}}, {}, {}]',
    '[{"id": 1, "parts": [{"id": 2}, {"id": 3}]}, {"id": 4, "parts": [{"id": 5}, {"id": 6}]}]',
    '[{"id": 1, "text": ",{\\"id\\":"}, {"id": 2, "text": ", {"}, {"id": 3},\n{"id": 4}]',
    '[{"id": 1}, {"id": 2}, {"ID": {"id": 3}}, {"id": 4}, {"id" : 5}, {"id": 6}]',
    '[{ "spaces" :\n\t[ 1 ,  2 ] , "and" : { } }   ,\r\n   { "more" : "" }   ]   ',
]


@pytest.mark.parametrize("size", [*range(1, 8), *range(20, 90, 7), 1000])
@pytest.mark.parametrize("content", ACROSS_BOUNDARIES, ids=brief)
def test_records_across_the_boundaries_of_reads(read: Read, content: str, size: int) -> None:
    with sizes(READ_CHARACTERS=size):
        assert repr(read(content)) == repr(parsed(content))


def test_numbers_are_exact(read: Read) -> None:
    digits = "0.1234567890123456789012345678901234567890"
    (record,) = read(f'[{{"fraction": {digits}, "integer": 9007199254740993, "one": 1.0}}]')
    assert (str(record["fraction"]), record["integer"]) == (digits, 9007199254740993)
    assert isinstance(record["one"], Decimal)


@pytest.mark.parametrize(
    "content", ['[{"a": 1}, {"a": 2}, {"a": oops}]', '{"a": 1}\n{"a": 2}\n{"a": oops}\n']
)
def test_records_before_a_fault_are_given(tmp_path: Path, content: str) -> None:
    path = tmp_path / "response"
    path.write_text(content)
    with sizes(READ_CHARACTERS=10):
        records = read_records(path)
        assert [next(records), next(records)] == [{"a": 1}, {"a": 2}]
        with pytest.raises(PipelineError, match="not JSON after record 2"):
            next(records)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("<!DOCTYPE html><title>503</title>", 'is HTML or XML, it begins "<!DOCTYPE html>'),
        ('{"error": "busy"', "not JSON after record 0"),
        ('{"error":\n"busy"}', "not JSON after record 0"),
        ('{"a": 1}\n{"a": 2\n', "not JSON after record 1"),
        ('{"a": 1} {"a": 2}', "not JSON after record 0"),
        ('{"a": 1},\n{"a": 2}', "not JSON after record 0"),
        ('{"a": 1}\n[]', "record 2 is not an object: []"),
        ('{"a": 1}\nnull', "record 2 is not an object: null"),
        ('{"a": 1}\n\xa0\n', "not JSON after record 1"),
        (b'{"a": 1}\n{"a": "caf\xe9"}', "not readable after record"),
        ('{"a": ' + "1" * 5_000 + "}", "not readable after record 0"),
        ('{"a":' * 100_000, "not readable after record 0"),
        ("5", 'is no JSON array, it begins "5"'),
        ("null", 'is no JSON array, it begins "null"'),
        ('"[]"', "is no JSON array"),
        ("", "the source is empty"),
        ("\n", "the source is empty"),
        (packed(b""), "the source is empty"),
        (" " * 5_000, "the source is empty"),
        ("[]", "the source is empty, there is nothing to load"),
        (" [ \r\n\t] \n", "the source is empty"),
        ("[", "not JSON after record 0"),
        ("[,]", "not JSON after record 0"),
        ("[{}, ]", "not JSON after record 1"),
        ("[{},, {}]", "not JSON after record 1"),
        ("[{} {}]", "not JSON after record 1"),
        ("[{}: {}]", "not JSON after record 1"),
        ("[{}", "not JSON after record 1: it ends early"),
        ("[{}, {}, ", "not JSON after record 2: it ends early"),
        ('[{}, {"a": "te', "not JSON after record 1: it ends early"),
        ('[{}, {"a": "te\\ud83', "not JSON after record 1: it ends early"),
        ('[{}, {"a": 1', "not JSON after record 1: it ends early"),
        ('[{}, {"a": tru', "not JSON after record 1: it ends early"),
        ("[{}]]", "not JSON after record 1: Extra data"),
        ("[{}] []", "not JSON after record 1: Extra data"),
        ("[{}]\n<!-- served in 3 ms -->", "not JSON after record 1: Extra data"),
        ("[{'a': 1}]", "not JSON after record 0"),
        ("[{a: 1}]", "not JSON after record 0"),
        ('[{"a": 01}]', "not JSON after record 0"),
        ('[{"a": .5}]', "not JSON after record 0"),
        ('[{"a": 1,}]', "not JSON after record 0"),
        ('[{"a": [1}]', "not JSON after record 0"),
        ('[{"a": "line\nbreak"}]', "not JSON after record 0"),
        (r'[{"a": "\x41"}]', "not JSON after record 0"),
        ("[{}, // comment\n{}]", "not JSON after record 1"),
        ("[{}, 5]", "record 2 is not an object: 5"),
        ("[null]", "record 1 is not an object: null"),
        ('[{}, "text", {}]', 'record 2 is not an object: "text"'),
        ("[[{}]]", "record 1 is not an object: [{}]"),
        (b'[{"a": "caf\xe9"}]', "not readable after record 0"),
        ('[{"a": 1}]'.encode("utf-16"), "not readable after record 0"),
        ('[{}, {"a": ' + "1" * 5_000 + "}]", "not readable after record 1"),
        ('[{"a": 1e99999999999999999999}]', "not readable after record 0"),
        ("[" * 100_000, "not readable after record 0"),
        ('[{"a": ' + "[" * 100_000, "not readable after record 0"),
        ('[{"a":' * 100_000, "not readable after record 0"),
    ],
    ids=brief,
)
def test_what_holds_no_objects_is_refused(read: Read, content: str | bytes, message: str) -> None:
    with pytest.raises(PipelineError) as refused:
        read(content)
    assert message in str(refused.value)
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize("size", range(1, 8))
@pytest.mark.parametrize(
    "content",
    ["[{},]", "[{} {}]", "[{}", '[{"a": "x', '[{"a": tru}]', '[{"a": 1 "b": 2}]', "[{}, 5]"],
)
def test_wrong_arrays_are_refused_across_the_boundaries_of_reads(
    read: Read, content: str, size: int
) -> None:
    with sizes(READ_CHARACTERS=size), pytest.raises(PipelineError):
        read(content)


PACKED = packed(json.dumps([{"a": f"{n:x}" * 9} for n in range(999)]).encode())


@pytest.mark.parametrize(
    "content",
    [
        PACKED[:-9],
        PACKED[:100],
        PACKED[:3],
        PACKED[:-8] + bytes(8),
        PACKED + b"garbage",
        PACKED[:50] + b"\xff" * 9 + PACKED[59:],
    ],
    ids=["end", "half", "header", "checksum", "garbage after it", "damaged"],
)
def test_a_damaged_gzip_file_is_refused(read: Read, content: bytes) -> None:
    with pytest.raises(PipelineError, match="not readable after record"):
        read(content)


def test_an_array_after_much_whitespace_is_read(read: Read) -> None:
    assert read(" " * READ_CHARACTERS + "[{}]") == [{}]


def test_garbage_after_much_whitespace_is_refused(read: Read) -> None:
    with pytest.raises(PipelineError, match="Extra data"):
        read("[{}]" + " " * 2 * READ_CHARACTERS + "garbage")


@pytest.mark.parametrize("space", ["\xa0", "\x0b", "\x0c", "\u2028"])
def test_whitespace_that_is_not_of_json_is_refused(read: Read, space: str) -> None:
    with pytest.raises(PipelineError, match="Extra data"):
        read("[{}]" + space)


@pytest.mark.parametrize("content", ['[{"a":1},]', '[{"a":1} {"b":2}]', '[{"a":1 "b":2}]'])
def test_an_array_that_does_not_end_early_is_not_said_to(read: Read, content: str) -> None:
    with pytest.raises(PipelineError, match="Expecting"):
        read(content)


# --- explode ------------------------------------------------------------------------------------

CORE_COLUMNS = {"launch.id": "integer", "position": "smallint", "core": "varchar(9)"}
CORES = table_of(CORE_COLUMNS, ["launch_id", "position"], rows="stage.cores", parent="launch")
SHIPS = table_of(
    {"launch.id": "integer", "position": "smallint", "value": "varchar(9)"},
    ["launch_id", "position"],
    rows="ships",
    parent="launch",
)


def test_elements_become_rows_with_position_and_parent() -> None:
    records: list[dict[str, Any]] = [
        {"id": 1, "stage": {"cores": [{"core": "a"}, {"core": "b"}]}},
        {"id": 2, "stage": {"cores": []}},
        {"id": 3, "stage": {"cores": [{"core": "c"}]}},
    ]
    assert rows_of(records, CORES) == [["1", "1", "a"], ["1", "2", "b"], ["3", "1", "c"]]


def test_elements_that_are_no_objects_become_the_value() -> None:
    records: list[dict[str, Any]] = [{"id": 1, "ships": ["x", None]}, {"id": 2, "ships": ["y"]}]
    assert rows_of(records, SHIPS) == [["1", "1", "x"], ["1", "2", "NULL"], ["2", "1", "y"]]


@pytest.mark.parametrize(
    "record",
    [
        {"id": 1},
        {"id": 1, "stage": None},
        {"id": 1, "stage": {}},
        {"id": 1, "stage": {"cores": None}},
        {"id": 1, "stage": {"cores": []}},
    ],
)
def test_a_record_without_elements_has_no_rows(record: dict[str, Any]) -> None:
    assert rows_of([record], CORES) == []
    assert rows_of([record, {"id": 2, "stage": {"cores": [{}]}}], CORES) == [["2", "1", "NULL"]]


def test_the_source_is_not_changed() -> None:
    records: list[dict[str, Any]] = [{"id": 1, "stage": {"cores": [{"core": "a"}]}}]
    before = json.dumps(records)
    rows_of(records, CORES)
    assert json.dumps(records) == before


@pytest.mark.parametrize(
    ("cores", "message"),
    [
        ("text", '"text" is not an array'),
        ({"0": {}}, '{"0": {}} is not an array'),
        (0, "0 is not an array"),
        (False, "false is not an array"),
        (["text"], '"text" is not an object'),
        ([{}, None], "null is not an object"),
        ([[]], "[] is not an object"),
    ],
)
def test_rows_that_are_no_array_of_objects_are_refused(cores: Any, message: str) -> None:
    records: list[dict[str, Any]] = [{"id": 6}, {"id": 7, "stage": {"cores": cores}}]
    with pytest.raises(PipelineError) as refused:
        rows_of(records, CORES)
    assert str(refused.value).startswith("public.things, launch_id=7, position=")
    assert str(refused.value).endswith(f": stage.cores[]: {message}")


# --- transform: paths ---------------------------------------------------------------------------

NESTED = table_of({"id": "integer", "a.b.c": "integer", "a.d": "integer", "a.b": "super"})


@pytest.mark.parametrize(
    ("record", "row"),
    [
        ({"a": {"b": {"c": 1}, "d": 2}}, ["1", "2", '{"c":1}']),
        ({"a": {"b": {"c": None}, "d": None}}, ["NULL", "NULL", '{"c":null}']),
        ({"a": {"b": None, "d": 2}}, ["NULL", "2", "NULL"]),
        ({"a": {"b": {}}}, ["NULL", "NULL", "{}"]),
        ({"a": {}}, ["NULL", "NULL", "NULL"]),
        ({"a": None}, ["NULL", "NULL", "NULL"]),
        ({}, ["NULL", "NULL", "NULL"]),
    ],
)
def test_nested_paths(record: dict[str, Any], row: list[str]) -> None:
    other = {"id": 8, "a": {"b": {"c": 5}, "d": 6}}
    assert rows_of([other, record | {"id": 9}], NESTED) == [
        ["8", "5", "6", '{"c":5}'],
        ["9", *row],
    ]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"a": "text"}, 'a: "text" is not an object'),
        ({"a": []}, "a: [] is not an object"),
        ({"a": 0}, "a: 0 is not an object"),
        ({"a": False}, "a: false is not an object"),
        ({"a": {"b": "text"}}, 'a.b: "text" is not an object'),
        ({"a": {"b": {"c": "text"}}}, 'a.b.c: "text" is not an integer'),
        ({"a": {"d": [1]}}, "a.d: [1] is not an integer"),
    ],
)
def test_what_is_not_of_the_configured_shape_is_refused(
    record: dict[str, Any], message: str
) -> None:
    with pytest.raises(PipelineError) as refused:
        rows_of([{"id": 8}, record | {"id": 9}, {"id": 10}], NESTED)
    assert str(refused.value) == f"public.things, id=9: {message}"


def test_a_misfit_in_an_element_names_the_path_in_the_source() -> None:
    records: list[dict[str, Any]] = [
        {"id": 4, "stage": {"cores": [{"core": "a"}, {"core": "0123456789"}]}}
    ]
    with pytest.raises(PipelineError) as refused:
        rows_of(records, CORES)
    assert str(refused.value) == (
        "public.things, launch_id=4, position=2: stage.cores[].core: "
        '"0123456789" has a text of 10 bytes, at most 9 fit'
    )


def test_a_misfit_in_the_parent_names_the_path_in_the_source() -> None:
    with pytest.raises(PipelineError) as refused:
        rows_of([{"id": "x", "stage": {"cores": [{}]}}], CORES)
    assert str(refused.value) == (
        'public.things, launch_id="x", position=1: id: "x" is not an integer'
    )


# --- transform: values --------------------------------------------------------------------------


def cell(type_: str, text: str) -> str:
    """A JSON value as the CSV file has it in a column of this type, between two nulls."""
    table = table_of({"id": "integer", "a.v": type_})
    records: list[dict[str, Any]] = [
        {"id": 1},
        {"id": 2, "a": {"v": parsed(text)}},
        {"id": 3, "a": {"v": None}},
    ]
    before, row, after = rows_of(records, table)
    assert (before, after) == (["1", "NULL"], ["3", "NULL"])
    assert row[0] == "2"
    return row[1]


DIGITS = "12345678901234567890123456789012345678"


@pytest.mark.parametrize(
    ("type_", "text", "written"),
    [
        ("boolean", "true", "True"),
        ("boolean", "false", "False"),
        ("smallint", "-32768", "-32768"),
        ("smallint", "32767", "32767"),
        ("integer", "-2147483648", "-2147483648"),
        ("integer", "2147483647", "2147483647"),
        ("integer", "-0", "0"),
        ("bigint", "-9223372036854775808", "-9223372036854775808"),
        ("bigint", "9223372036854775807", "9223372036854775807"),
        ("bigint", "9007199254740993", "9007199254740993"),
        ("real", "1", "1.0"),
        ("real", "0.1", "0.1"),
        ("real", "0", "0.0"),
        ("real", "-3.4028234e38", "-3.4028234e+38"),
        ("real", "1.1754944e-38", "1.1754944e-38"),
        ("double precision", "5", "5.0"),
        ("double precision", "0.1", "0.1"),
        ("double precision", "0.1000000000000000055511151231257827", "0.1"),
        ("double precision", "1e22", "1e+22"),
        ("double precision", "0e5", "0.0"),
        ("double precision", "-1.7976931348623157e308", "-1.7976931348623157e+308"),
        ("double precision", "2.2250738585072014e-308", "2.2250738585072014e-308"),
        ("decimal(5,2)", "123.45", "123.45"),
        ("decimal(5,2)", "-999.99", "-999.99"),
        ("decimal(5,2)", "0.1", "0.10"),
        ("decimal(5,2)", "1", "1.00"),
        ("decimal(5,2)", "1e2", "100.00"),
        ("decimal(5,2)", "1.500000", "1.50"),
        ("decimal(5,2)", "0", "0.00"),
        ("decimal(5,0)", "99999", "99999"),
        ("decimal(2,2)", "0.99", "0.99"),
        ("decimal(38,0)", DIGITS, DIGITS),
        ("decimal(38,38)", f"-0.{DIGITS}", f"-0.{DIGITS}"),
        (
            "decimal(38,19)",
            "1234567890123456789.1234567890123456789",
            "1234567890123456789.1234567890123456789",
        ),
        ("varchar(3)", '""', ""),
        ("varchar(3)", '"abc"', "abc"),
        ("varchar(3)", '"€"', "€"),
        ("varchar(4)", '"🚀"', "🚀"),
        ("varchar(4)", r'"\ud83d\ude80"', "🚀"),
        ("varchar(9)", r'"\r\n\t\",\\N"', '\r\n\t",\\N'),
        ("varchar(9)", '"  x  "', "  x  "),
        ("varchar(9)", '"null"', "null"),
        ("varchar(9)", '"NaN"', "NaN"),
        ("varchar(65535)", f'"{"x" * 65_535}"', "x" * 65_535),
        ("date", '"2024-02-29"', "2024-02-29"),
        ("date", '"0001-01-01"', "0001-01-01"),
        ("date", '"9999-12-31"', "9999-12-31"),
        ("timestamp", '"2006-03-24T22:30:00"', "2006-03-24T22:30:00.000000"),
        ("timestamp", '"2006-03-24 22:30:00.5"', "2006-03-24T22:30:00.500000"),
        ("timestamp", '"0001-01-01T00:00:00"', "0001-01-01T00:00:00.000000"),
        ("timestamp", '"9999-12-31T23:59:59.999999"', "9999-12-31T23:59:59.999999"),
        ("timestamptz", '"2006-03-24T22:30:00.000Z"', "2006-03-24T22:30:00.000000Z"),
        ("timestamptz", '"2006-03-25T10:30:00+12:00"', "2006-03-24T22:30:00.000000Z"),
        ("timestamptz", '"2006-03-24T19:00:00-0330"', "2006-03-24T22:30:00.000000Z"),
        ("timestamptz", '"2006-03-24 23:30:00+01"', "2006-03-24T22:30:00.000000Z"),
        ("timestamptz", '"2006-03-24T22:30:00.123456Z"', "2006-03-24T22:30:00.123456Z"),
        ("timestamptz", '"0001-01-01T01:00:00+01:00"', "0001-01-01T00:00:00.000000Z"),
        ("timestamptz", '"9999-12-31T22:59:59-01:00"', "9999-12-31T23:59:59.000000Z"),
        ("super", "true", "true"),
        ("super", "0", "0"),
        ("super", '""', '""'),
        ("super", '"text"', '"text"'),
        ("super", "[]", "[]"),
        ("super", "[null, 1.50, 1e2]", "[null,1.5,100.0]"),
        ("super", f"[{DIGITS}]", f"[{DIGITS}]"),
        ("super", r'{"é": "\ud83d\ude80\n\"\\"}', r'{"é":"🚀\n\"\\"}'),
        ("super", r'"\\u0000"', r'"\\u0000"'),
        ("super", f'["{"x" * 65_535}"]', f'["{"x" * 65_535}"]'),
        ("super", f'["{"é" * 32_767}"]', f'["{"é" * 32_767}"]'),
    ],
    ids=brief,
)
def test_a_value_that_fits(type_: str, text: str, written: str) -> None:
    assert cell(type_, text) == written


@pytest.mark.parametrize(
    ("type_", "text", "shown", "rule"),
    [
        ("boolean", "0", "0", "is not a boolean"),
        ("boolean", '"true"', '"true"', "is not a boolean"),
        ("boolean", "[]", "[]", "is not a boolean"),
        ("smallint", "true", "true", "is not an integer"),
        ("smallint", "-32769", "-32769", "is outside -32768 to 32767"),
        ("smallint", "32768", "32768", "is outside -32768 to 32767"),
        ("integer", "false", "false", "is not an integer"),
        ("integer", "1.5", "1.5", "is not an integer"),
        ("integer", "1.0", "1.0", "is not an integer"),
        ("integer", "1e2", "1E+2", "is not an integer"),
        ("integer", '"1"', '"1"', "is not an integer"),
        ("integer", "NaN", "NaN", "is not an integer"),
        ("integer", "{}", "{}", "is not an integer"),
        ("integer", "-2147483649", "-2147483649", "is outside -2147483648 to 2147483647"),
        ("integer", "2147483648", "2147483648", "is outside -2147483648 to 2147483647"),
        ("bigint", "-9223372036854775809", "-9223372036854775809", "is outside -9223372"),
        ("bigint", "9223372036854775808", "9223372036854775808", "is outside -9223372"),
        ("bigint", "9" * 100, "9" * 80 + "…", "is outside"),
        ("real", "3.5e38", "3.5E+38", "is outside the range of real"),
        ("real", "-1e39", "-1E+39", "is outside the range of real"),
        ("real", "1e-38", "1E-38", "is outside the range of real"),
        ("real", '"1"', '"1"', "is not a number"),
        ("double precision", "true", "true", "is not a number"),
        ("double precision", '"1"', '"1"', "is not a number"),
        ("double precision", "NaN", "NaN", "is not a number"),
        ("double precision", "Infinity", "Infinity", "is not a number"),
        ("double precision", "-Infinity", "-Infinity", "is not a number"),
        ("double precision", "1e309", "1E+309", "is outside the range of double precision"),
        ("double precision", "-2e308", "-2E+308", "is outside the range of double precision"),
        ("double precision", "1e-400", "1E-400", "is outside the range of double precision"),
        ("double precision", "1" * 400, "1" * 80 + "…", "is outside the range"),
        ("decimal(5,2)", "1000", "1000", "does not fit decimal(5,2) exactly"),
        ("decimal(5,2)", "0.001", "0.001", "does not fit decimal(5,2) exactly"),
        ("decimal(5,2)", "999.995", "999.995", "does not fit decimal(5,2) exactly"),
        ("decimal(5,2)", "1e99", "1E+99", "does not fit decimal(5,2) exactly"),
        ("decimal(5,2)", "1e1000000", "1E+1000000", "does not fit decimal(5,2) exactly"),
        ("decimal(5,2)", "1e-1000000", "1E-1000000", "does not fit decimal(5,2) exactly"),
        ("decimal(5,2)", "true", "true", "is not a number"),
        ("decimal(5,2)", '"1.00"', '"1.00"', "is not a number"),
        ("decimal(5,2)", "NaN", "NaN", "is not a number"),
        ("decimal(38,0)", "1" * 39, "1" * 39, "does not fit decimal(38,0) exactly"),
        ("varchar(3)", '"abcd"', '"abcd"', "has a text of 4 bytes, at most 3 fit"),
        ("varchar(3)", '"é€"', '"é€"', "has a text of 5 bytes, at most 3 fit"),
        ("varchar(3)", '"🚀"', '"🚀"', "has a text of 4 bytes, at most 3 fit"),
        ("varchar(3)", "5", "5", "is not a text"),
        ("varchar(3)", "1.5", "1.5", "is not a text"),
        ("varchar(9)", "true", "true", "is not a text"),
        ("varchar(9)", '["a"]', '["a"]', "is not a text"),
        ("varchar(9)", r'"a\u0000b"', r'"a\u0000b"', "has a NUL character"),
        ("varchar(9)", r'"a\ud83d"', r'"a\ud83d"', "has a lone surrogate"),
        ("varchar(9)", f'"{"x" * 500}"', '"' + "x" * 79 + "…", "has a text of 500 bytes"),
        ("date", '"2023-02-29"', '"2023-02-29"', "does not exist in the calendar"),
        ("date", '"2023-13-01"', '"2023-13-01"', "does not exist in the calendar"),
        ("date", '"0000-01-01"', '"0000-01-01"', "is outside the years 1 to 9999"),
        ("date", '"24/03/2006"', '"24/03/2006"', "is not a date such as"),
        ("date", '"2006-3-24"', '"2006-3-24"', "is not a date such as"),
        ("date", '"2006-03-24T00:00:00Z"', '"2006-03-24T00:00:00Z"', "is not a date such as"),
        ("date", '"2006-03-24 "', '"2006-03-24 "', "is not a date such as"),
        ("date", '""', '""', "is not a date such as"),
        ("date", "20060324", "20060324", "is not a date such as"),
        ("timestamp", '"2006-03-24T22:30:00Z"', '"2006-03-24T22:30:00Z"', "without an offset"),
        ("timestamp", '"2006-03-24"', '"2006-03-24"', "is not a timestamp"),
        ("timestamp", '"2006-03-24T22:30"', '"2006-03-24T22:30"', "is not a timestamp"),
        ("timestamp", '"now"', '"now"', "is not a timestamp"),
        (
            "timestamp",
            '"2006-03-24T22:30:00.1234567"',
            '"2006-03-24T22:30:00.1234567"',
            "is not a timestamp",
        ),
        ("timestamp", '"2006-03-24T24:00:00"', '"2006-03-24T24:00:00"', "does not exist"),
        ("timestamp", '"2006-03-24T22:30:60"', '"2006-03-24T22:30:60"', "does not exist"),
        ("timestamp", '"0000-12-31T23:59:59"', '"0000-12-31T23:59:59"', "is outside the years"),
        ("timestamptz", '"2006-03-24T22:30:00"', '"2006-03-24T22:30:00"', "with an offset"),
        ("timestamptz", '"2006-03-24T22:30:00z"', '"2006-03-24T22:30:00z"', "with an offset"),
        ("timestamptz", "1143239400", "1143239400", "is not a timestamp"),
        (
            "timestamptz",
            '"2006-03-24T22:30:00.0000001Z"',
            '"2006-03-24T22:30:00.0000001Z"',
            "is not a timestamp",
        ),
        (
            "timestamptz",
            '"2006-02-30T22:30:00Z"',
            '"2006-02-30T22:30:00Z"',
            "does not exist in the calendar",
        ),
        (
            "timestamptz",
            '"2006-03-24T22:30:00+24:00"',
            '"2006-03-24T22:30:00+24:00"',
            "does not exist in the calendar",
        ),
        (
            "timestamptz",
            '"0001-01-01T00:00:00+01:00"',
            '"0001-01-01T00:00:00+01:00"',
            "is outside the years 1 to 9999",
        ),
        (
            "timestamptz",
            '"9999-12-31T23:59:59-01:00"',
            '"9999-12-31T23:59:59-01:00"',
            "is outside the years 1 to 9999",
        ),
        ("super", "NaN", "NaN", "is not JSON that super holds"),
        ("super", '{"a": [Infinity]}', '{"a": [Infinity]}', "is not JSON that super holds"),
        ("super", "1e999", "1E+999", "is not JSON that super holds"),
        ("super", r'["\u0000"]', r'["\u0000"]', "has a NUL character"),
        ("super", r'{"\u0000": 1}', r'{"\u0000": 1}', "has a NUL character"),
        ("super", r'["\udc00"]', r'["\udc00"]', "has a lone surrogate"),
        (
            "super",
            f'{{"a": [["{"x" * 65_536}"]]}}',
            '{"a": [["' + "x" * 71 + "…",
            "has a text of 65536 bytes, at most 65535 fit",
        ),
        (
            "super",
            f'["{"é" * 32_768}"]',
            '["' + "é" * 78 + "…",
            "has a text of 65536 bytes, at most 65535 fit",
        ),
        (
            "super",
            f'["{"🚀" * 16_384}"]',
            '["' + "🚀" * 78 + "…",
            "has a text of 65536 bytes, at most 65535 fit",
        ),
        (
            "super",
            f'{{"{"x" * 65_536}": 1}}',
            '{"' + "x" * 78 + "…",
            "has a text of 65536 bytes, at most 65535 fit",
        ),
        (
            "super",
            json.dumps(["x" * 65_000] * 259),
            '["' + "x" * 78 + "…",
            "has a text of 16835778 bytes, at most 16777216 fit",
        ),
    ],
    ids=brief,
)
def test_a_value_that_does_not_fit_is_named(type_: str, text: str, shown: str, rule: str) -> None:
    with pytest.raises(PipelineError) as refused:
        cell(type_, text)
    message = str(refused.value)
    assert message.startswith(f"public.things, id=2: a.v: {shown} ")
    assert rule in message.removeprefix(f"public.things, id=2: a.v: {shown} ")


@pytest.mark.parametrize("type_", ["real", "double precision"])
def test_a_number_with_a_huge_exponent_is_refused(type_: str) -> None:
    with pytest.raises(PipelineError, match="is outside the range"):
        cell(type_, "1e1000000")


@pytest.mark.parametrize(
    "text", ["3.4028235e38", "3.4028234663852886e38", "1.17549435e-38", "1.1754943508222875e-38"]
)
def test_a_number_that_rounds_to_the_border_of_real_fits(text: str) -> None:
    assert float(cell("real", text)) == pytest.approx(float(text), rel=1e-7)


@pytest.mark.parametrize("depth", [10, 300, 800])
def test_a_deeply_nested_value_fits_in_super(depth: int) -> None:
    nested = "[" * depth + '"' + "x" * 20_000 + '"' + "]" * depth
    assert cell("super", nested) == nested


def test_a_value_too_deep_for_super_is_refused() -> None:
    value: Any = "x" * 20_000
    for _ in range(5_000):
        value = [value]
    table = table_of({"id": "integer", "v": "super"})
    with pytest.raises(PipelineError, match="id=1: v: a deeply nested list is not JSON that"):
        rows_of([{"id": 1, "v": value}], table)


# --- transform: nulls and keys ------------------------------------------------------------------


@pytest.mark.parametrize(
    "type_", ["boolean", "bigint", "real", "decimal(5,2)", "varchar(9)", "date", "timestamptz"]
)
@pytest.mark.parametrize("value", [{}, {"v": None}], ids=["absent", "null"])
def test_null_in_a_column_that_is_not_null_is_refused(type_: str, value: dict[str, None]) -> None:
    table = table_of({"id": "integer", "v": f"{type_} not null"})
    with pytest.raises(PipelineError) as refused:
        rows_of([{"id": 5} | value], table)
    assert str(refused.value) == "public.things, id=5: v: null in a column that is not null"


def test_null_in_the_key_is_refused() -> None:
    table = table_of({"id": "integer", "part.n": "integer"}, ["id", "part_n"])
    with pytest.raises(PipelineError) as refused:
        rows_of([{"id": 1, "part": {"n": 1}}, {"id": 2}], table)
    assert str(refused.value) == "public.things, id=2, part_n=null: part.n: null in the key"


def test_columns_of_nothing_but_null() -> None:
    types = [
        "boolean",
        "bigint",
        "real",
        "decimal(5,2)",
        "varchar(9)",
        "date",
        "timestamp",
        "super",
    ]
    table = table_of({"id": "integer"} | {f"v{n}": type_ for n, type_ in enumerate(types)})
    assert rows_of([{"id": 1}, {"id": 2}], table) == [[n, *["NULL"] * 8] for n in ("1", "2")]


def test_doubles_are_refused_and_named() -> None:
    table = table_of({"id": "integer", "name": "varchar(9)", "n": "integer"}, ["id", "name"])
    records = [
        {"id": 1, "name": "a", "n": 1},
        {"id": 1, "name": "b", "n": 2},
        {"id": 2, "name": "a", "n": 3},
        {"id": 1, "name": "b", "n": 4},
        {"id": 2, "name": "a", "n": 5},
    ]
    with pytest.raises(PipelineError) as refused:
        rows_of(records, table)
    assert str(refused.value) == (
        'public.things: more than one row has the key id=1, name="b"; id=2, name="a"'
    )
    assert len(rows_of(records[:3], table)) == 3


@pytest.mark.parametrize(
    ("type_", "values"),
    [
        ("decimal(5,2)", ["1", "1.0"]),
        ("double precision", ["100", "1e2"]),
        ("timestamptz", ['"2006-03-24T22:30:00Z"', '"2006-03-25T10:30:00.0+12:00"']),
        ("varchar(9)", ['"é"', r'"\u00e9"']),
    ],
)
def test_a_key_written_in_two_ways_is_a_double(type_: str, values: list[str]) -> None:
    table = table_of({"id": type_})
    with pytest.raises(PipelineError, match="more than one row has the key id="):
        rows_of([{"id": parsed(value)} for value in values], table)


def test_texts_of_a_key_that_differ_are_no_doubles() -> None:
    table = table_of({"id": "varchar(9)"})
    texts = ["", " ", "a", "A", "a ", "null", "NULL", "nan"]
    assert rows_of([{"id": text} for text in texts], table) == [[text] for text in texts]


# --- warn_of_drift ------------------------------------------------------------------------------

UNKNOWN = "the source has a field that no table loads: "
MISSING = "no record has the field {}, so its column is null"
DRIFT = config_of(
    {
        "public.launches": {
            "key": "id",
            "columns": {"id": "integer", "links.patch.small": "varchar(9)", "stage": "super"},
        },
        "public.cores": {
            "rows": "stage.cores",
            "parent": "launch",
            "key": ["launch_id", "position"],
            "columns": CORE_COLUMNS | {"landing.pad": "varchar(9)"},
        },
        "public.ships": {
            "rows": "ships",
            "parent": "launch",
            "key": ["launch_id", "position"],
            "columns": {"launch.id": "integer", "position": "smallint", "value": "varchar(9)"},
        },
    }
)
COMPLETE: dict[str, Any] = {
    "id": 1,
    "links": {"patch": {"small": "x"}},
    "stage": {"cores": [{"core": "a", "landing": {"pad": "b"}}]},
    "ships": ["s"],
}


def drift(caplog: pytest.LogCaptureFixture, *records: dict[str, Any]) -> set[str]:
    """What is logged of these records, which are transformed one by one."""
    with caplog.at_level(logging.INFO, "sequra_challenge"):
        helpers.warn_of_drift(records, DRIFT.tables)
    assert {record.levelname for record in caplog.records} <= {"WARNING"}
    assert len(caplog.messages) == len(set(caplog.messages))
    return set(caplog.messages)


def test_no_drift_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert drift(caplog, COMPLETE) == set()


def test_a_field_of_one_record_is_enough(caplog: pytest.LogCaptureFixture) -> None:
    assert drift(caplog, {"id": 2}, COMPLETE, {"id": 3, "links": None}) == set()


def test_null_is_no_missing_field(caplog: pytest.LogCaptureFixture) -> None:
    patch = {"links": {"patch": {"small": None}}}
    assert drift(caplog, COMPLETE | patch) == set()


def test_unknown_fields_are_named_by_their_paths(caplog: pytest.LogCaptureFixture) -> None:
    record = {
        "id": 1,
        "crew": [],
        "links": {"patch": {"small": "x", "large": None}, "wiki": {"en": ""}},
        "stage": {"cores": [{"core": "a", "legs": True, "landing": {"pad": "b", "zone": 4}}]},
        "ships": ["s"],
    }
    assert drift(caplog, record) == {
        UNKNOWN + path
        for path in (
            "crew",
            "links.patch.large",
            "links.wiki",
            "stage.cores[].legs",
            "stage.cores[].landing.zone",
        )
    }


def test_missing_fields_are_named_by_their_paths(caplog: pytest.LogCaptureFixture) -> None:
    record = {"id": 1, "links": {"patch": {}}, "stage": {"cores": [{}]}, "ships": []}
    assert drift(caplog, record) == {
        MISSING.format(path)
        for path in (
            "links.patch.small",
            "stage.cores[].core",
            "stage.cores[].landing.pad",
            "ships[].value",
        )
    }


def test_a_renamed_field_is_both(caplog: pytest.LogCaptureFixture) -> None:
    record = {**COMPLETE, "links": {"patch": {"Small": "x"}}}
    assert drift(caplog, record) == {
        UNKNOWN + "links.patch.Small",
        MISSING.format("links.patch.small"),
    }


# --- CSV ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (None, NULL),
        ("", '""'),
        (NULL, f'"{NULL}"'),
        ("\\N", '"\\N"'),
        ('say "hi"', '"say ""hi"""'),
        ('"', '""""'),
        ("a,b", '"a,b"'),
        ("a\nb", '"a\nb"'),
        ("a\rb", '"a\rb"'),
        ("\r\n", '"\r\n"'),
        (" é🚀\u2028", '" é🚀\u2028"'),
    ],
    ids=brief,
)
def test_a_cell_of_text(value: str | None, written: str) -> None:
    table = table_of({"id": "integer", "text": "varchar(99)"})
    records: Records = [{"id": 1, "text": value}, {"id": 2, "text": "x"}]
    assert csv_of(records, table) == f'1,{written}\n2,"x"\n'


def test_a_row_of_all_kinds() -> None:
    kinds = {"number": "bigint", "flag": "boolean", "float": "double precision", "text": "super"}
    records: Records = [
        {"number": 9007199254740993, "flag": True, "float": Decimal("0.1"), "text": ["a"]},
        {"number": 1},
    ]
    assert csv_of(records, table_of(kinds, "number")) == (
        f'9007199254740993,True,0.1,"[""a""]"\n1,{NULL},{NULL},{NULL}\n'
    )


@pytest.mark.parametrize("number", [CSV_ROWS - 1, CSV_ROWS, 2 * CSV_ROWS])
def test_a_text_with_quotes_among_many(number: int) -> None:
    texts = ["", None, "x"] * CSV_ROWS
    texts[number] = '"'
    cells = ['""', NULL, '"x"'] * CSV_ROWS
    cells[number] = '""""'
    table = table_of({"text": "varchar(9)", "n": "integer"}, "n")
    records: Records = [{"text": text, "n": n} for n, text in enumerate(texts)]
    assert csv_of(records, table).split("\n") == [
        *(f"{cell},{n}" for n, cell in enumerate(cells)),
        "",
    ]


def test_no_rows_are_no_text() -> None:
    assert csv_of([], table_of({"id": "integer"})) == ""
