"""From records to the rows of the tables, and to CSV."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest
import yaml

from helpers import (
    NULL,
    PipelineError,
    Record,
    Records,
    Table,
    csv_of,
    rows_of,
    table_of,
    warn_of_drift,
)
from sandbox import SAMPLE

# A warning of NumPy or pandas would stand between the lines of the log; a ResourceWarning is about
# the server of an earlier test, which is collected in the middle of one here.
pytestmark = pytest.mark.filterwarnings("error", "ignore::ResourceWarning")


def parsed(text: str) -> Any:
    """A JSON value as the program reads it: a number with a fraction or exponent is exact."""
    return json.loads(text, parse_float=Decimal)


def refusal(records: Records, table: Table) -> str:
    """What is said of records that are refused."""
    with pytest.raises(PipelineError) as refused:
        rows_of(records, table)
    return str(refused.value)


# --- values -------------------------------------------------------------------------------------

VALUES: dict[str, dict[str, list[Any]]] = yaml.load(
    (SAMPLE.parent / "values.yaml").read_text("utf-8"), yaml.BaseLoader
)
CASES = [
    (type_, rule, *next(iter(value.items() if isinstance(value, dict) else [(value, value)])))
    for type_, rules in VALUES.items()
    for rule, values in rules.items()
    for value in values
]
MANY = "x" * 65_535
TOO_LONG = "has a text of 65536 bytes, at most 65535 fit"
DEEP = ["[" * depth + f'"{MANY[:20_000]}"' + "]" * depth for depth in (10, 300, 800)]
CASES += [
    ("varchar(65535)", "fits", f'"{MANY}"', MANY),
    ("varchar(9)", "has a text of 500 bytes", f'"{"x" * 500}"', '"' + "x" * 79 + "…"),
    *(("super", "fits", f'["{text}"]', f'["{text}"]') for text in (MANY, "é" * 32_767)),
    *(("super", "fits", text, text) for text in DEEP),
    ("super", TOO_LONG, f'{{"a": [["{MANY}x"]]}}', '{"a": [["' + "x" * 71 + "…"),
    ("super", TOO_LONG, f'["{"é" * 32_768}"]', '["' + "é" * 78 + "…"),
    ("super", TOO_LONG, f'["{"🚀" * 16_384}"]', '["' + "🚀" * 78 + "…"),
    ("super", TOO_LONG, f'{{"{MANY}x": 1}}', '{"' + "x" * 78 + "…"),
    (
        "super",
        "has a text of 16835778 bytes, at most 16777216 fit",
        json.dumps(["x" * 65_000] * 259),
        '["' + "x" * 78 + "…",
    ),
    ("bigint", "is outside", "9" * 100, "9" * 80 + "…"),
    ("double precision", "is outside the range of double", "1" * 400, "1" * 80 + "…"),
]


@pytest.mark.parametrize(("type_", "rule", "text", "shown"), CASES)
def test_a_value_fits_or_is_named(type_: str, rule: str, text: str, shown: str) -> None:
    """In a column of this type, between two nulls."""
    table = table_of({"id": "integer", "a.v": type_})
    records: Records = [{"id": 1}, {"id": 2, "a": {"v": parsed(text)}}, {"id": 3, "a": {"v": None}}]
    if rule == "fits":
        assert rows_of(records, table) == [["1", "NULL"], ["2", shown], ["3", "NULL"]]
    else:
        named = f"public.things, id=2: a.v: {shown} "
        said = refusal(records, table)
        assert said.startswith(named)
        assert rule in said.removeprefix(named)


@pytest.mark.parametrize(
    "text", ["1.1754944e-38", "3.4028235e38", "3.4028234663852886e38", "1.17549435e-38"]
)
def test_a_number_that_rounds_to_the_border_of_real_fits(text: str) -> None:
    ((_, cell),) = rows_of([{"id": 1, "v": parsed(text)}], table_of({"id": "bigint", "v": "real"}))
    assert float(cell) == pytest.approx(float(text), rel=1e-7)


# --- rows ---------------------------------------------------------------------------------------


def elements(rows: str, columns: dict[str, str], key: str = "position", **settings: Any) -> Table:
    """A table of elements of launches, whose columns begin with launch_id and position."""
    columns = {"launch.id": "integer", "position": "smallint"} | columns
    settings = {"parent": "launch", "rows": rows} | settings
    return table_of(columns, ["launch_id", key], **settings)


LAUNCHES = table_of({"id": "integer", "links.patch.small": "varchar(9)", "stage": "super"})
CORES = elements("stage.cores", {"core": "varchar(9)", "landing.pad": "varchar(9)"})
SHIPS = elements("ships", {"value": "varchar(9)"})
NESTED = table_of({"id": "integer", "a.b.c": "integer", "a.d": "integer", "a.b": "super"})
IMAGES = elements("images", {"src": "varchar(9)"}, "src")
UNCOUNTED = replace(IMAGES, columns=(IMAGES.columns[0], IMAGES.columns[2]))
CODES = elements("codes", {"value": "integer"})
DOTTED = {
    path: table_of({"id": "integer", path: "varchar(9) as v"})
    for path in ("a.b", r"a\.b", r"a\.b.c\.", r"a\\.b", r"\+1", "a\\")
}

# A table, the record with the id 7, and its rows after this id.
ROWS: list[tuple[Table, Record, list[list[str]]]] = [
    (NESTED, {"a": {"b": {"c": 1}, "d": 2}}, [["1", "2", '{"c":1}']]),
    (NESTED, {"a": {"b": {"c": None}, "d": None}}, [["NULL", "NULL", '{"c":null}']]),
    (NESTED, {"a": {"b": None, "d": 2}}, [["NULL", "2", "NULL"]]),
    (NESTED, {"a": {"b": {}}}, [["NULL", "NULL", "{}"]]),
    (NESTED, {"a": {}}, [["NULL"] * 3]),
    (NESTED, {"a": None}, [["NULL"] * 3]),
    (NESTED, {}, [["NULL"] * 3]),
    (DOTTED["a.b"], {"a": {"b": "x"}, "a.b": "y"}, [["x"]]),
    (DOTTED[r"a\.b"], {"a": {"b": "x"}, "a.b": "y"}, [["y"]]),
    (DOTTED[r"a\.b.c\."], {"a.b": {"c.": "x"}}, [["x"]]),
    (DOTTED[r"a\\.b"], {"a\\": {"b": "x"}}, [["x"]]),
    (DOTTED[r"\+1"], {"+1": "x"}, [["x"]]),
    (DOTTED["a\\"], {"a\\": "x"}, [["x"]]),
    (CORES, {}, []),
    (CORES, {"stage": None}, []),
    (CORES, {"stage": {}}, []),
    (CORES, {"stage": {"cores": None}}, []),
    (CORES, {"stage": {"cores": []}}, []),
    (
        CORES,
        {"stage": {"cores": [{"core": "a"}, {"core": "b", "landing": {"pad": "c"}}]}},
        [["1", "a", "NULL"], ["2", "b", "c"]],
    ),
    (IMAGES, {"images": [{"src": "a"}, {"src": "b"}]}, [["1", "a"], ["2", "b"]]),
    (IMAGES, {"images": [{"position": 3, "src": "a"}]}, [["3", "a"]]),
    (IMAGES, {"images": [{"position": None, "src": "a"}]}, [["NULL", "a"]]),
    (UNCOUNTED, {"images": [{"position": 2, "src": "a"}, {"src": "b"}]}, [["a"], ["b"]]),
    (CODES, {"codes": [5, {"value": 6, "hash": "x"}]}, [["1", "5"], ["2", "6"]]),
    (CODES, {"codes": [None, {"value": None}, {}]}, [[n, "NULL"] for n in ("1", "2", "3")]),
]


@pytest.mark.parametrize(("table", "record", "rows"), ROWS)
def test_rows(table: Table, record: Record, rows: list[list[str]]) -> None:
    records: Records = [{"id": 7} | record, {"id": 8} | record]
    before = json.dumps(records)
    assert rows_of(records, table) == [[id_, *row] for id_ in ("7", "8") for row in rows]
    assert json.dumps(records) == before


# A table, the record with the id 7, and what is said of it.
MISFITS: list[tuple[Table, Record, str]] = [
    (NESTED, {"a": "text"}, 'id=7: a: "text" is not an object'),
    (NESTED, {"a": []}, "id=7: a: [] is an array: arrays in arrays are not supported, super is"),
    (NESTED, {"a": 0}, "id=7: a: 0 is not an object"),
    (NESTED, {"a": False}, "id=7: a: false is not an object"),
    (NESTED, {"a": {"b": "text"}}, 'id=7: a.b: "text" is not an object'),
    (NESTED, {"a": {"b": {"c": "text"}}}, 'id=7: a.b.c: "text" is not an integer'),
    (NESTED, {"a": {"d": [1]}}, "id=7: a.d: [1] is not an integer"),
    (DOTTED[r"a\.b.c\."], {"a.b": {"c.": 5}}, r"id=7: a\.b.c\.: 5 is not a text"),
    *(
        (
            CORES,
            {"stage": {"cores": cores}},
            f"launch_id=7, position={position}: stage.cores[]{said}",
        )
        for cores, position, said in [
            ("text", "null", ': "text" is not an array'),
            ({"0": {}}, "null", ': {"0": {}} is not an array'),
            (0, "null", ": 0 is not an array"),
            (False, "null", ": false is not an array"),
            (["text"], "1", ': "text" is not an object'),
            ([{}, None], "2", ": null is not an object"),
            ([[]], "1", ": [] is not an object"),
            ([{"core": "a"}, {"core": 5}], "2", ".core: 5 is not a text"),
            ([{"landing": 5}], "1", ".landing: 5 is not an object"),
        ]
    ),
    # Named by its path in the source.
    (
        CORES,
        {"id": "x", "stage": {"cores": [{}]}},
        'launch_id="x", position=1: id: "x" is not an integer',
    ),
    (
        elements("images", {}),
        {"images": [{"position": 2}, {"src": "x"}]},
        'launch_id=7, position=null: images[]: [{"position": 2}, {"src": "x"}] '
        "has a position in some elements, not in all",
    ),
    (
        elements("images", {}),
        {"images": [{"src": "x"}, {"launch": 7}]},
        'launch_id=7, position=2: images[]: {"launch": 7} '
        "has a field 'launch': choose another name for parent",
    ),
    (
        elements("lines.taxes", {}),
        {"lines": [{"taxes": [1]}]},
        'launch_id=7, position=null: lines.taxes[]: [{"taxes": [1]}] is an array: '
        "arrays in arrays are not supported, super is",
    ),
    (
        table_of({"id": "integer", "part.n": "integer"}, ["id", "part_n"]),
        {},
        "id=7, part_n=null: part.n: null in the key",
    ),
    *(
        (
            table_of({"id": "integer", "v": f"{type_} not null"}),
            record,
            "id=7: v: null in a column that is not null",
        )
        for type_ in ("boolean", "bigint", "real", "decimal(5,2)", "varchar(9)", "date", "super")
        for record in ({}, {"v": None})
    ),
]


@pytest.mark.parametrize(("table", "record", "said"), MISFITS)
def test_a_misfit_is_named(table: Table, record: Record, said: str) -> None:
    assert refusal([{"id": 7} | record, {"id": 8}], table) == f"public.things, {said}"


def test_a_value_too_deep_for_super_is_refused() -> None:
    value: Any = MANY[:20_000]
    for _ in range(5_000):
        value = [value]
    said = refusal([{"id": 1, "v": value}], table_of({"id": "integer", "v": "super"}))
    assert said.startswith("public.things, id=1: v: a deeply nested list is not JSON that")


def test_columns_of_nothing_but_null() -> None:
    table = table_of({"id": "integer"} | {f"v{n}": type_ for n, type_ in enumerate(VALUES)})
    nulls = ["NULL"] * len(VALUES)
    assert rows_of([{"id": 1}, {"id": 2}], table) == [["1", *nulls], ["2", *nulls]]


# --- keys ---------------------------------------------------------------------------------------


def test_doubles_are_refused_and_named() -> None:
    table = table_of({"id": "integer", "name": "varchar(9)", "n": "integer"}, ["id", "name"])
    keys = [(1, "a"), (1, "b"), (2, "a"), (1, "b"), (2, "a"), (1, "b")]
    records: Records = [{"id": key[0], "name": key[1], "n": n} for n, key in enumerate(keys)]
    said = refusal(records, table)
    assert said == 'public.things: more than one row has the key id=1, name="b"; id=2, name="a"'
    assert len(rows_of(records[:3], table)) == 3


@pytest.mark.parametrize(
    ("type_", "values"),
    [
        ("decimal(5,2)", ["1", "1.0"]),
        ("decimal(5,2)", ['"1.5"', "1.50"]),
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
    texts = ["", "a", "A", " a", "a\t", "null", "NULL", "nan"]
    rows = rows_of([{"id": text} for text in texts], table_of({"id": "varchar(9)"}))
    assert rows == [[text] for text in texts]


# --- warn_of_drift ------------------------------------------------------------------------------

UNKNOWN = "the source has fields that no table loads: "
MISSING = "no record has the field {}, so its column is null"
ALL = tuple(replace(table, name=f"public.{n}") for n, table in enumerate([LAUNCHES, CORES, SHIPS]))
COMPLETE: Record = {
    "id": 1,
    "links": {"patch": {"small": "x"}},
    "stage": {"cores": [{"core": "a", "landing": {"pad": "b"}}]},
    "ships": ["s"],
}
MORE: Record = {
    "crew": [],
    "a\n": 3,
    "links": {"patch": {"small": "x", "large": None}, "wiki": {"en": ""}},
    "stage": {"cores": [{"core": "a", "legs": True, "landing": {"pad": "b", "zone": 4}}]},
}
MORE_PATHS = (
    r'"a\n", crew, links.patch.large, links.wiki, stage.cores[].landing.zone, stage.cores[].legs'
)
LESS: Record = {"id": 1, "links": {"patch": {}}, "stage": {"cores": [{}]}, "ships": []}
LESS_PATHS = "links.patch.small stage.cores[].core stage.cores[].landing.pad ships[].value"

# The tables, the records, which are transformed one by one, and what is logged of them.
DRIFTS: dict[str, tuple[tuple[Table, ...], Records, set[str]]] = {
    "none": (ALL, [COMPLETE], set()),
    "one record is enough": (ALL, [{"id": 2}, COMPLETE, {"id": 3, "links": None}], set()),
    "null is no missing field": (ALL, [COMPLETE | {"links": {"patch": {"small": None}}}], set()),
    "unknown": (ALL, [COMPLETE | MORE], {UNKNOWN + MORE_PATHS}),
    "missing": (ALL, [LESS], set(map(MISSING.format, LESS_PATHS.split()))),
    "renamed": (
        ALL,
        [COMPLETE | {"links": {"patch": {"Small": "x"}}}],
        {UNKNOWN + "links.patch.Small", MISSING.format("links.patch.small")},
    ),
    "a dot in a name": ((DOTTED[r"a\.b.c\."],), [{"id": 1, "a.b": {"c.": "x"}}], set()),
    "a backslash in a name": ((DOTTED[r"a\\.b"],), [{"id": 1, "a\\": {"b": "x"}}], set()),
    "a name with a dot": (
        (DOTTED["a.b"],),
        [{"id": 1, "a.b": "x"}],
        {UNKNOWN + r"a\.b", MISSING.format("a.b")},
    ),
    "a position that is no column": (
        (UNCOUNTED,),
        [{"id": 1, "images": [{"position": 2, "src": "a"}]}],
        {UNKNOWN + "images[].position"},
    ),
    "a parent that is loaded whole": (
        (elements("images", {"launch": "super", "src": "varchar(9)"}),),
        [{"images": []}],
        set(),
    ),
}


@pytest.mark.parametrize("case", DRIFTS)
def test_drift_is_logged(caplog: pytest.LogCaptureFixture, case: str) -> None:
    tables, records, logged = DRIFTS[case]
    with caplog.at_level(logging.INFO, "sequra_challenge"):
        warn_of_drift(records, tables)
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
