"""From the bytes of the source to the rows of the tables."""

from __future__ import annotations

import gzip
import itertools
import json
import logging
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

import helpers
from helpers import (
    NULL,
    READ_CHARACTERS,
    PipelineError,
    Record,
    Records,
    Table,
    batches_of,
    config_of,
    csv_of,
    read_records,
    rows_of,
    sizes,
    table_of,
)

# A warning of NumPy or pandas would stand between the lines of the log; a ResourceWarning is about
# the server of an earlier test, which is collected in the middle of one here.
pytestmark = pytest.mark.filterwarnings("error", "ignore::ResourceWarning")


def packed(content: bytes) -> bytes:
    """Gzipped, the same at any time: the tests' names come from it."""
    return gzip.compress(content, mtime=0)


def file_of(folder: Path, content: str | bytes) -> Path:
    path = folder / "response"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def parsed(text: str) -> Any:
    """A JSON value as the program reads it: a number with a fraction or exponent is exact."""
    return json.loads(text, parse_float=Decimal)


# --- records -------------------------------------------------------------------------------


GOOD: dict[str, str | bytes] = {
    "array": '[{"a":1},{"a":2}]',
    "array with a last line": '[{"a":1},{"a":2}]\n',
    "array with spaces": ' \t\r\n[ \t\r\n{ "a" : 1 } \t\r\n, \t\r\n{\t"a"\r\n:\n2\n}\n]\r\n \t',
    "array with a mark": '\ufeff[{"a":1},{"a":2}]',
    "array with a mark and spaces": '\ufeff \n[{"a":1},{"a":2}]',
    "array after much white space": " " * READ_CHARACTERS + '[{"a":1},{"a":2}]',
    "array gzipped": packed(b'[{"a":1},{"a":2}]'),
    "array with a mark gzipped": packed(b'\xef\xbb\xbf[{"a":1},{"a":2}]\n'),
    "array in two gzip members": packed(b'[{"a":1},') + packed(b'{"a":2}]'),
    "lines": '{"a":1}\n{"a":2}',
    "lines with spaces": ' \t\r\n\n{ "a" :\t1 } \r\n\n \n{"a":2}\r\n\n',
    "lines with a mark": '\ufeff{"a":1}\n{"a":2}\n',
    "lines after much white space": " " * 5_000 + '{"a":1}\n{"a":2}\n',
    "lines in two gzip members": packed(b'{"a":1}\n{"a"') + packed(b":2}\n"),
}


@pytest.mark.parametrize("case", GOOD)
def test_the_records_of_an_array_or_one_a_line(tmp_path: Path, case: str) -> None:
    assert list(read_records(file_of(tmp_path, GOOD[case]))) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("join", ["[{}]", "{}"], ids=["array", "lines"])
def test_batches_are_bounded(tmp_path: Path, join: str) -> None:
    lengths = [1, 1, 1, 1, 1, 200, 1, 1, 300, 300, 1] * 20
    texts = [json.dumps({"a": "x" * size}) for size in lengths]
    path = file_of(tmp_path, join.format((",", "\n")[join == "{}"].join(texts)))
    with sizes(READ_CHARACTERS=250):
        batches = [[len(record["a"]) for record in batch] for batch in batches_of(path)]
    assert list(itertools.chain(*batches)) == lengths
    assert max(map(sum, batches)) <= 1050  # a record that did not end yet, and two pieces more


@pytest.mark.parametrize(
    "content", ['[{"a": 1}, {"a": 2}, {"a": oops}]', '{"a": 1}\n{"a": 2}\n{"a": oops}\n']
)
def test_records_before_a_fault_are_given(tmp_path: Path, content: str) -> None:
    with sizes(READ_CHARACTERS=10):
        records = read_records(file_of(tmp_path, content))
        assert [next(records), next(records)] == [{"a": 1}, {"a": 2}]
        with pytest.raises(PipelineError, match="not JSON after record 2"):
            next(records)


PACKED = packed(json.dumps([{"a": f"{n:x}" * 9} for n in range(999)]).encode())

# The beginning of what is said after it, and what is refused so.
WRONG: dict[str, dict[str, str | bytes]] = {
    "not JSON after record 0": {
        "object cut": '{"error": "busy"',
        "object on two lines": '{"error":\n"busy"}',
        "two objects on a line": '{"a": 1} {"a": 2}',
        "comma at the end of a line": '{"a": 1},\n{"a": 2}',
        "bracket": "[",
        "end of line in a text": '[{"a": "line\nbreak"}]',
        "wrong escape": r'[{"a": "\x41"}]',
    },
    "not JSON after record 1": {
        "line cut": '{"a": 1}\n{"a": 2\n',
        "odd space between lines": '{"a": 1}\n\xa0\n',
        "a comment": "[{}, // comment\n{}]",
        "colon": "[{}: {}]",
    },
    "not JSON after record 1: Expecting": {
        "last comma": '[{"a":1},]',
        "last comma and space": "[{}, ]",
        "no comma": '[{"a":1} {"b":2}]',
    },
    "not JSON after record 0: Expecting": {"no comma in an object": '[{"a":1 "b":2}]'},
    "not JSON after record 1: it ends early": {
        "no end": "[{}",
        "text without end": '[{}, {"a": "te',
        "escape without end": '[{}, {"a": "te\\ud83',
        "number without end": '[{}, {"a": 1',
        "word without end": '[{}, {"a": tru',
    },
    "not JSON after record 2: it ends early": {"comma without end": "[{}, {}, "},
    "not JSON after record 1: Extra data": {
        "bracket after it": "[{}]]",
        "array after it": "[{}] []",
        "HTML after it": "[{}]\n<!-- served in 3 ms -->",
        "text after much white space": "[{}]" + " " * 2 * READ_CHARACTERS + "garbage",
        **{f"U+{ord(it):04X} after it": "[{}]" + it for it in "\xa0\x0b\x0c\u2028"},
    },
    "record 1 is not an object: null": {"null": "[null]"},
    "record 1 is not an object: [{}]": {"array in it": "[[{}]]"},
    "record 2 is not an object: 5": {"number": "[{}, 5]"},
    'record 2 is not an object: "text"': {"text": '[{}, "text", {}]'},
    "record 2 is not an object: []": {"array on a line": '{"a": 1}\n[]'},
    "record 2 is not an object: null": {"null on a line": '{"a": 1}\nnull'},
    "not readable after record 0": {
        "digits": '{"a": ' + "1" * 5_000 + "}",
        "deep object": '{"a":' * 100_000,
        "Latin-1": b'[{"a": "caf\xe9"}]',
        "UTF-16": '[{"a": 1}]'.encode("utf-16"),
        "exponent": '[{"a": 1e99999999999999999999}]',
        "deep array": "[" * 100_000,
        "deep value": '[{"a": ' + "[" * 100_000,
        "deep object in an array": '[{"a":' * 100_000,
    },
    "not readable after record 1": {"digits after one": '[{}, {"a": ' + "1" * 5_000 + "}]"},
    "not readable after record ": {
        "Latin-1 on a line": b'{"a": 1}\n{"a": "caf\xe9"}',
        "gzip without end": PACKED[:-9],
        "gzip cut": PACKED[:100],
        "gzip header": PACKED[:3],
        "gzip checksum": PACKED[:-8] + bytes(8),
        "garbage after gzip": PACKED + b"garbage",
        "gzip damaged": PACKED[:50] + b"\xff" * 9 + PACKED[59:],
    },
    'is HTML or XML, it begins "<!DOCTYPE html>': {"HTML": "<!DOCTYPE html><title>503</title>"},
    'is no JSON array, it begins "5"': {"number alone": "5"},
    'is no JSON array, it begins "null"': {"null alone": "null"},
    "is no JSON array": {"text alone": '"[]"'},
    "the source is empty, there is nothing to load": {
        "nothing": "",
        "end of line": "\n",
        "nothing gzipped": packed(b""),
        "spaces": " " * 5_000,
        "no records": "[]",
        "no records and spaces": " [ \r\n\t] \n",
    },
}
CASES = {name: (text, said) for said, cases in WRONG.items() for name, text in cases.items()}


@pytest.mark.parametrize("case", CASES)
def test_what_holds_no_objects_is_refused(tmp_path: Path, case: str) -> None:
    content, said = CASES[case]
    for size in (2, 3, 7, READ_CHARACTERS) if len(content) < 50 else (READ_CHARACTERS,):
        with sizes(READ_CHARACTERS=size), pytest.raises(PipelineError) as refused:
            list(read_records(file_of(tmp_path, content)))
        assert said in str(refused.value) or size < READ_CHARACTERS
        assert len(str(refused.value)) < 400


# --- rows of elements ----------------------------------------------------------------------------


def refusal(records: Records, table: Table) -> str:
    """What is said of records that are refused."""
    with pytest.raises(PipelineError) as refused:
        rows_of(records, table)
    return str(refused.value)


def elements(rows: str, columns: dict[str, str]) -> dict[str, Any]:
    """The settings of a table of elements."""
    columns = {"launch.id": "integer", "position": "smallint"} | columns
    return {"rows": rows, "parent": "launch", "key": ["launch_id", "position"], "columns": columns}


LAUNCH_COLUMNS = {"id": "integer", "links.patch.small": "varchar(9)", "stage": "super"}
CORE_COLUMNS = {"core": "varchar(9)", "landing.pad": "varchar(9)"}
LAUNCHES, CORES, SHIPS = config_of(
    {
        "public.launches": {"key": "id", "columns": LAUNCH_COLUMNS},
        "public.cores": elements("stage.cores", CORE_COLUMNS),
        "public.ships": elements("ships", {"value": "varchar(9)"}),
    }
).tables


def test_elements_become_rows_and_the_source_is_not_changed() -> None:
    records: Records = [
        {"id": 1, "stage": {"cores": [{"core": "a"}, {"core": "b", "landing": {"pad": "c"}}]}},
        {"id": 2, "stage": {"cores": []}},
        {"id": 3, "stage": {"cores": [{"core": "d"}]}},
    ]
    before = json.dumps(records)
    rows = [["1", "1", "a", "NULL"], ["1", "2", "b", "c"], ["3", "1", "d", "NULL"]]
    assert rows_of(records, CORES) == rows
    assert json.dumps(records) == before


@pytest.mark.parametrize(
    "rest",
    [{}, {"stage": None}, {"stage": {}}, {"stage": {"cores": None}}, {"stage": {"cores": []}}],
)
def test_a_record_without_elements_has_no_rows(rest: Record) -> None:
    assert rows_of([{"id": 1} | rest], CORES) == []
    others: Records = [{"id": 1} | rest, {"id": 2, "stage": {"cores": [{}]}}]
    assert rows_of(others, CORES) == [["2", "1", "NULL", "NULL"]]


@pytest.mark.parametrize(
    ("cores", "position", "message"),
    [
        ("text", "null", ': "text" is not an array'),
        ({"0": {}}, "null", ': {"0": {}} is not an array'),
        (0, "null", ": 0 is not an array"),
        (False, "null", ": false is not an array"),
        (["text"], "1", ': "text" is not an object'),
        ([{}, None], "2", ": null is not an object"),
        ([[]], "1", ": [] is not an object"),
        ([{"core": "a"}, {"core": 5}], "2", ".core: 5 is not a text"),
        ([{"landing": 5}], "1", ".landing: 5 is not an object"),
    ],
)
def test_a_misfit_in_the_elements_is_named(cores: Any, position: str, message: str) -> None:
    said = refusal([{"id": 6}, {"id": 7, "stage": {"cores": cores}}], CORES)
    assert said == f"public.cores, launch_id=7, position={position}: stage.cores[]{message}"


def test_a_misfit_in_the_parent_is_named_by_its_path_in_the_source() -> None:
    said = refusal([{"id": "x", "stage": {"cores": [{}]}}], CORES)
    assert said == 'public.cores, launch_id="x", position=1: id: "x" is not an integer'


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
def test_nested_paths(record: Record, row: list[str]) -> None:
    other = {"id": 8, "a": {"b": {"c": 5}, "d": 6}}
    rows = [["8", "5", "6", '{"c":5}'], ["9", *row]]
    assert rows_of([other, record | {"id": 9}], NESTED) == rows


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
def test_what_is_not_of_the_configured_shape_is_refused(record: Record, message: str) -> None:
    said = refusal([{"id": 8}, record | {"id": 9}, {"id": 10}], NESTED)
    assert said == f"public.things, id=9: {message}"


# --- transform: values --------------------------------------------------------------------------


def cell(type_: str, text: str) -> str:
    """A JSON value as the CSV file has it in a column of this type, between two nulls."""
    table = table_of({"id": "integer", "a.v": type_})
    records: Records = [{"id": 1}, {"id": 2, "a": {"v": parsed(text)}}, {"id": 3, "a": {"v": None}}]
    before, row, after = rows_of(records, table)
    assert (before, after) == (["1", "NULL"], ["3", "NULL"])
    assert row[0] == "2"
    return row[1]


DIGITS = "12345678901234567890123456789012345678"
MANY = "x" * 65_535

# For each type values that fit. What is written is the value itself, unless it is given.
FITS: dict[str, list[str | tuple[str, str]]] = {
    "boolean": [("true", "t"), ("false", "f")],
    "smallint": ["-32768", "32767"],
    "integer": ["-2147483648", "2147483647", ("-0", "0")],
    "bigint": ["-9223372036854775808", "9223372036854775807", "9007199254740993"],
    "real": [("1", "1.0"), "0.1", ("0", "0.0"), ("-3.4028234e38", "-3.4028234e+38")],
    "double precision": [
        *("0.1", ("0.1000000000000000055511151231257827", "0.1"), ("5", "5.0"), ("0e5", "0.0")),
        *(("1e22", "1e+22"), ("-1.7976931348623157e308", "-1.7976931348623157e+308")),
        "2.2250738585072014e-308",
    ],
    "decimal(5,2)": [
        *("123.45", "-999.99", ("0.1", "0.10"), ("1", "1.00"), ("1e2", "100.00")),
        *(("1.500000", "1.50"), ("0", "0.00")),
    ],
    "decimal(5,0)": ["99999"],
    "decimal(2,2)": ["0.99"],
    "decimal(38,0)": [DIGITS],
    "decimal(38,38)": [f"-0.{DIGITS}"],
    "decimal(38,19)": ["1234567890123456789.1234567890123456789"],
    "varchar(3)": [('""', ""), ('"abc"', "abc"), ('"€"', "€")],
    "varchar(4)": [('"🚀"', "🚀"), (r'"\ud83d\ude80"', "🚀")],
    "varchar(9)": [
        (r'"\r\n\t\",\\N"', '\r\n\t",\\N'),
        *((f'"{text}"', text) for text in ("  x  ", "null", "NaN")),
    ],
    "varchar(65535)": [(f'"{MANY}"', MANY)],
    "date": [(f'"{day}"', day) for day in ("2024-02-29", "0001-01-01", "9999-12-31")],
    "timestamp": [
        ('"2006-03-24T22:30:00"', "2006-03-24T22:30:00.000000"),
        ('"2006-03-24 22:30:00.5"', "2006-03-24T22:30:00.500000"),
        ('"0001-01-01T00:00:00"', "0001-01-01T00:00:00.000000"),
        ('"9999-12-31T23:59:59.999999"', "9999-12-31T23:59:59.999999"),
    ],
    "timestamptz": [
        ('"2006-03-24T22:30:00.000Z"', "2006-03-24T22:30:00.000000Z"),
        ('"2006-03-25T10:30:00+12:00"', "2006-03-24T22:30:00.000000Z"),
        ('"2006-03-24T19:00:00-0330"', "2006-03-24T22:30:00.000000Z"),
        ('"2006-03-24 23:30:00+01"', "2006-03-24T22:30:00.000000Z"),
        ('"2006-03-24T22:30:00.123456Z"', "2006-03-24T22:30:00.123456Z"),
        ('"0001-01-01T01:00:00+01:00"', "0001-01-01T00:00:00.000000Z"),
        ('"9999-12-31T22:59:59-01:00"', "9999-12-31T23:59:59.000000Z"),
    ],
    "super": [
        *("true", "0", '""', '"text"', "[]", f"[{DIGITS}]", r'"\\u0000"', f'["{MANY}"]'),
        *(f'["{"é" * 32_767}"]', ("[null, 1.50, 1e2]", "[null,1.5,100.0]")),
        (r'{"é": "\ud83d\ude80\n\"\\"}', r'{"é":"🚀\n\"\\"}'),
    ],
}


def pairs(values: list[str | tuple[str, str]]) -> list[tuple[str, str]]:
    return [(each, each) if isinstance(each, str) else each for each in values]


@pytest.mark.parametrize(
    ("type_", "text", "written"), [(type_, *pair) for type_ in FITS for pair in pairs(FITS[type_])]
)
def test_a_value_that_fits(type_: str, text: str, written: str) -> None:
    assert cell(type_, text) == written


# The rule that values break. They are shown as they are, or as it is given.
BROKEN: dict[tuple[str, str], list[str | tuple[str, str]]] = {
    ("boolean", "is not a boolean"): ["0", '"true"', "[]"],
    ("smallint", "is not an integer"): ["true"],
    ("smallint", "is outside -32768 to 32767"): ["-32769", "32768"],
    ("integer", "is not an integer"): ["false", "1.5", "1.0", ("1e2", "1E+2"), '"1"', "NaN", "{}"],
    ("integer", "is outside -2147483648 to 2147483647"): ["-2147483649", "2147483648"],
    ("bigint", "is outside -9223372036854775808 to 9223372036854775807"): [
        *("-9223372036854775809", "9223372036854775808", ("9" * 100, "9" * 80 + "…"))
    ],
    ("real", "is outside the range of real"): [
        *(("3.5e38", "3.5E+38"), ("-1e39", "-1E+39"), ("1e-38", "1E-38")),
        ("1e1000000", "1E+1000000"),
    ],
    ("real", "is not a number"): ['"1"'],
    ("double precision", "is not a number"): ["true", '"1"', "NaN", "Infinity", "-Infinity"],
    ("double precision", "is outside the range of double precision"): [
        *(("1e309", "1E+309"), ("-2e308", "-2E+308"), ("1e-400", "1E-400")),
        *(("1e1000000", "1E+1000000"), ("1" * 400, "1" * 80 + "…")),
    ],
    ("decimal(5,2)", "does not fit decimal(5,2) exactly"): [
        *("1000", "0.001", "999.995", ("1e99", "1E+99"), ("1e1000000", "1E+1000000")),
        ("1e-1000000", "1E-1000000"),
    ],
    ("decimal(5,2)", "is not a number"): ["true", '"1e2"', "NaN"],
    ("decimal(38,0)", "does not fit decimal(38,0) exactly"): ["1" * 39],
    ("varchar(3)", "has a text of 4 bytes, at most 3 fit"): ['"abcd"', '"🚀"'],
    ("varchar(3)", "has a text of 5 bytes, at most 3 fit"): ['"é€"'],
    ("varchar(3)", "is not a text"): ["5", "1.5"],
    ("varchar(9)", "is not a text"): ["true", '["a"]'],
    ("varchar(9)", "has a NUL character"): [r'"a\u0000b"'],
    ("varchar(9)", "has a lone surrogate"): [r'"a\ud83d"'],
    ("varchar(9)", "has a text of 500 bytes"): [(f'"{"x" * 500}"', '"' + "x" * 79 + "…")],
    ("date", "does not exist in the calendar"): ['"2023-02-29"', '"2023-13-01"'],
    ("date", "is outside the years 1 to 9999"): ['"0000-01-01"'],
    ("date", "is not a date such as"): [
        *('"24/03/2006"', '"2006-3-24"', '"2006-03-24T00:00:00Z"', '"2006-03-24 "', '""'),
        "20060324",
    ],
    ("timestamp", "without an offset"): ['"2006-03-24T22:30:00Z"'],
    ("timestamp", "is not a timestamp"): [
        *('"2006-03-24"', '"2006-03-24T22:30"', '"now"', '"2006-03-24T22:30:00.1234567"')
    ],
    ("timestamp", "does not exist"): ['"2006-03-24T24:00:00"', '"2006-03-24T22:30:60"'],
    ("timestamp", "is outside the years"): ['"0000-12-31T23:59:59"'],
    ("timestamptz", "with an offset"): ['"2006-03-24T22:30:00"', '"2006-03-24T22:30:00z"'],
    ("timestamptz", "is not a timestamp"): ["1143239400", '"2006-03-24T22:30:00.0000001Z"'],
    ("timestamptz", "does not exist in the calendar"): [
        *('"2006-02-30T22:30:00Z"', '"2006-03-24T22:30:00+24:00"')
    ],
    ("timestamptz", "is outside the years 1 to 9999"): [
        *('"0001-01-01T00:00:00+01:00"', '"9999-12-31T23:59:59-01:00"')
    ],
    ("super", "is not JSON that super holds"): [*("NaN", '{"a": [Infinity]}', ("1e999", "1E+999"))],
    ("super", "has a NUL character"): [r'["\u0000"]', r'{"\u0000": 1}'],
    ("super", "has a lone surrogate"): [r'["\udc00"]'],
    ("super", "has a text of 65536 bytes, at most 65535 fit"): [
        (f'{{"a": [["{MANY}x"]]}}', '{"a": [["' + "x" * 71 + "…"),
        (f'["{"é" * 32_768}"]', '["' + "é" * 78 + "…"),
        (f'["{"🚀" * 16_384}"]', '["' + "🚀" * 78 + "…"),
        (f'{{"{MANY}x": 1}}', '{"' + "x" * 78 + "…"),
    ],
    ("super", "has a text of 16835778 bytes, at most 16777216 fit"): [
        (json.dumps(["x" * 65_000] * 259), '["' + "x" * 78 + "…")
    ],
}


@pytest.mark.parametrize(
    ("type_", "rule", "text", "shown"),
    [(*rule, *pair) for rule in BROKEN for pair in pairs(BROKEN[rule])],
)
def test_a_value_that_does_not_fit_is_named(type_: str, rule: str, text: str, shown: str) -> None:
    with pytest.raises(PipelineError) as refused:
        cell(type_, text)
    before, named, said = str(refused.value).partition(f"public.things, id=2: a.v: {shown} ")
    assert not before
    assert named
    assert rule in said


@pytest.mark.parametrize(
    "text", ["1.1754944e-38", "3.4028235e38", "3.4028234663852886e38", "1.17549435e-38"]
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
    said = refusal([{"id": 1, "v": value}], table_of({"id": "integer", "v": "super"}))
    assert said.startswith("public.things, id=1: v: a deeply nested list is not JSON that")


# --- transform: nulls and keys ------------------------------------------------------------------


TYPES = ["boolean", "bigint", "real", "decimal(5,2)", "varchar(9)", "date", "timestamptz"]


@pytest.mark.parametrize("type_", TYPES)
@pytest.mark.parametrize("value", [{}, {"v": None}], ids=["absent", "null"])
def test_null_in_a_column_that_is_not_null_is_refused(type_: str, value: dict[str, None]) -> None:
    table = table_of({"id": "integer", "v": f"{type_} not null"})
    said = refusal([{"id": 5} | value], table)
    assert said == "public.things, id=5: v: null in a column that is not null"


def test_null_in_the_key_is_refused() -> None:
    table = table_of({"id": "integer", "part.n": "integer"}, ["id", "part_n"])
    said = refusal([{"id": 1, "part": {"n": 1}}, {"id": 2}], table)
    assert said == "public.things, id=2, part_n=null: part.n: null in the key"


def test_columns_of_nothing_but_null() -> None:
    types = enumerate([*TYPES, "timestamp", "super"])
    table = table_of({"id": "integer"} | {f"v{n}": type_ for n, type_ in types})
    assert rows_of([{"id": 1}, {"id": 2}], table) == [[n, *["NULL"] * 9] for n in ("1", "2")]


def test_doubles_are_refused_and_named() -> None:
    table = table_of({"id": "integer", "name": "varchar(9)", "n": "integer"}, ["id", "name"])
    keys = [(1, "a"), (1, "b"), (2, "a"), (1, "b"), (2, "a")]
    records: Records = [{"id": key[0], "name": key[1], "n": n} for n, key in enumerate(keys)]
    said = refusal(records, table)
    assert said == 'public.things: more than one row has the key id=1, name="b"; id=2, name="a"'
    assert len(rows_of(records[:3], table)) == 3


@pytest.mark.parametrize(
    ("type_", "values"),
    [
        ("decimal(5,2)", ["1", "1.0"]),
        ("double precision", ["100", "1e2"]),
        ("timestamptz", ['"2006-03-24T22:30:00Z"', '"2006-03-25T10:30:00.0+12:00"']),
        ("varchar(9)", ['"é"', r'"\u00e9"']),
        ("varchar(9)", ['"a"', '"a "']),  # as Redshift compares texts
    ],
)
def test_a_key_written_in_two_ways_is_a_double(type_: str, values: list[str]) -> None:
    said = refusal([{"id": parsed(value)} for value in values], table_of({"id": type_}))
    assert "more than one row has the key id=" in said


def test_texts_of_a_key_that_differ_are_no_doubles() -> None:
    table = table_of({"id": "varchar(9)"})
    texts = ["", "a", "A", " a", "a\t", "null", "NULL", "nan"]
    assert rows_of([{"id": text} for text in texts], table) == [[text] for text in texts]


# --- warn_of_drift ------------------------------------------------------------------------------

UNKNOWN = "the source has fields that no table loads: "
MISSING = "no record has the field {}, so its column is null"
COMPLETE: Record = {
    "id": 1,
    "links": {"patch": {"small": "x"}},
    "stage": {"cores": [{"core": "a", "landing": {"pad": "b"}}]},
    "ships": ["s"],
}
MORE: Record = {
    "crew": [],
    "links": {"patch": {"small": "x", "large": None}, "wiki": {"en": ""}},
    "stage": {"cores": [{"core": "a", "legs": True, "landing": {"pad": "b", "zone": 4}}]},
}
MORE_PATHS = "crew, links.patch.large, links.wiki, stage.cores[].landing.zone, stage.cores[].legs"
LESS: Record = {"id": 1, "links": {"patch": {}}, "stage": {"cores": [{}]}, "ships": []}
LESS_PATHS = "links.patch.small stage.cores[].core stage.cores[].landing.pad ships[].value"

# The records, which are transformed one by one, and what is logged of them.
DRIFTS: dict[str, tuple[Records, set[str]]] = {
    "none": ([COMPLETE], set()),
    "a field of one record is enough": ([{"id": 2}, COMPLETE, {"id": 3, "links": None}], set()),
    "null is no missing field": ([COMPLETE | {"links": {"patch": {"small": None}}}], set()),
    "unknown": ([COMPLETE | MORE], {UNKNOWN + MORE_PATHS}),
    "missing": ([LESS], set(map(MISSING.format, LESS_PATHS.split()))),
    "renamed": (
        [COMPLETE | {"links": {"patch": {"Small": "x"}}}],
        {UNKNOWN + "links.patch.Small", MISSING.format("links.patch.small")},
    ),
}


@pytest.mark.parametrize("case", DRIFTS)
def test_drift_is_logged(caplog: pytest.LogCaptureFixture, case: str) -> None:
    records, logged = DRIFTS[case]
    with caplog.at_level(logging.INFO, "sequra_challenge"):
        helpers.warn_of_drift(records, (LAUNCHES, CORES, SHIPS))
    assert {record.levelname for record in caplog.records} <= {"WARNING"}
    assert sorted(caplog.messages) == sorted(logged)


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
        f'9007199254740993,t,0.1,"[""a""]"\n1,{NULL},{NULL},{NULL}\n'
    )


def test_no_rows_are_no_text() -> None:
    assert csv_of([], table_of({"id": "integer"})) == ""
