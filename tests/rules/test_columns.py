"""Which value of a record becomes which column: paths, names, elements of arrays, numbers."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import pytest

from helpers import ConfigError, PipelineError, Table, rows_of, table_of, warn_of_drift

IMAGES: dict[str, Any] = {"rows": "images", "parent": "product", "key": ["product_id", "position"]}
IMAGE_COLUMNS = {"product.id": "integer", "position": "smallint"}
UNKNOWN = "the source has fields that no table loads: "


def faults(columns: dict[str, str], key: str = "id", **settings: Any) -> str:
    with pytest.raises(ConfigError) as refused:
        table_of({"id": "integer"} | columns, key, **settings)
    return str(refused.value)


def warnings(caplog: pytest.LogCaptureFixture, table: Table, *records: Any) -> list[str]:
    warn_of_drift(records, (table,))
    return caplog.messages


# --- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "text", "name", "not_null"),
    [
        ("reactions.+1", "integer as plus_one", "plus_one", False),
        ("24h", "integer not null as last_day", "last_day", True),
        ("größe", "integer as size not null", "size", True),
        ("a", "decimal(5,2) as b", "b", False),
    ],
)
def test_a_column_has_a_name_of_its_own(path: str, text: str, name: str, not_null: bool) -> None:
    column = table_of({"id": "integer", path: text}).columns[1]
    assert (column.name, column.not_null) == (name, not_null)
    assert " as " not in column.type


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"größe": "integer"}, "columns.größe: 'größe' must match [a-z_]"),
        ({"24h": "integer as 24h"}, "columns.24h: must match (boolean|"),
        ({"a": "integer as Größe"}, "columns.a: must match (boolean|"),
        ({"a": "integer as"}, "columns.a: must match (boolean|"),
        ({"a": "as b"}, "columns.a: must match (boolean|"),
        ({"a": "integer as oid"}, "columns.a: the name 'oid' is reserved"),
        ({"a": "integer as b", "b": "integer"}, "columns: 2 paths give 'b': say"),
        ({"+1": "integer", "-1": "integer"}, "columns: 2 paths give '_1': say"),
    ],
)
def test_a_name_that_cannot_be_is_refused(columns: dict[str, str], message: str) -> None:
    assert message in faults(columns)


@pytest.mark.parametrize("wrong", ["int", "text", "numeric(5,2)", "json", "uuid", "varchar"])
def test_a_type_that_there_is_not_is_told_those_that_there_are(wrong: str) -> None:
    (line,) = [line for line in faults({"a": wrong}).splitlines() if "columns.a" in line]
    for type_ in ("boolean", "bigint", "decimal", "varchar", "super"):
        assert type_ in line
    assert f"'{wrong}'" in line


@pytest.mark.parametrize("setting", ["key", "sort_key", "dist_key"])
@pytest.mark.parametrize("path", ["Order ID", "orderId", "order.id"])
def test_a_path_as_key_is_told_the_columns_name(setting: str, path: str) -> None:
    columns, settings = {"id": "integer", path: "integer"}, {"key": "id"} | {setting: path}
    with pytest.raises(ConfigError) as refused:
        table_of(columns, **settings)
    assert (
        f".{setting}: {path!r} is not a column that can be compared, its column is 'order_id'"
        in str(refused.value)
    )


# --- paths --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("a.b", ["a", "b"]),
        (r"a\.b", ["a.b"]),
        (r"a\.b.c\.", ["a.b", "c."]),
        (r"a\\.b", ["a\\", "b"]),
        (r"\+1", ["+1"]),
        ("a\\", ["a\\"]),
    ],
)
def test_a_dot_in_a_name_has_a_backslash(
    caplog: pytest.LogCaptureFixture, path: str, names: list[str]
) -> None:
    table = table_of({"id": "integer", path: "varchar(9) as v"})
    record: Any = "found"
    for name in reversed(names):
        record = {name: record}
    assert rows_of([{"id": 1, **record}], table) == [["1", "found"]]
    assert warnings(caplog, table, {"id": 2, **record}) == []


@pytest.mark.parametrize("path", ["a.", ".a", "a..b", r"a\..", ""])
def test_a_path_that_is_none_is_refused(path: str) -> None:
    assert f"columns.{path}: " in faults({path: "integer as v"})


def test_a_name_with_a_dot_is_no_path(caplog: pytest.LogCaptureFixture) -> None:
    table = table_of({"id": "integer", "a.b": "varchar(9)"})
    assert warnings(caplog, table, {"id": 1, "a.b": "x"}) == [
        UNKNOWN + r"a\.b",
        "no record has the field a.b, so its column is null",
    ]


def test_a_message_writes_a_path_as_the_configuration_does() -> None:
    table = table_of({"id": "integer", r"a\.b.c": "integer"})
    with pytest.raises(PipelineError, match=r'id=1: a\\\.b\.c: "x" is not an integer'):
        rows_of([{"id": 1, "a.b": {"c": "x"}}], table)


def test_unknown_fields_come_in_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    record = {"id": 1, "c": 1, "b": {"d": 2}, "a\n": 3}
    table = table_of({"id": "integer", "b.e": "integer"})
    assert warnings(caplog, table, record)[:1] == [UNKNOWN + r'"a\n", b.d, c']


# --- elements of arrays -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "positions"),
    [
        ([{"src": "a"}, {"src": "b"}], ["1", "2"]),
        ([{"src": "a", "position": 3}, {"src": "b", "position": 1}], ["3", "1"]),
        ([{"src": "a", "position": None}], ["NULL"]),
    ],
    ids=["counted", "own", "own null"],
)
def test_the_position(images: list[Any], positions: list[str]) -> None:
    columns, key = IMAGE_COLUMNS | {"src": "varchar(9)"}, ["product_id", "src"]
    table = table_of(columns, **IMAGES | {"key": key})
    assert [row[1] for row in rows_of([{"id": 1, "images": images}], table)] == positions


def test_positions_of_some_elements_alone_are_refused() -> None:
    record = {"id": 7, "images": [{"position": 2}, {"src": "x"}]}
    with pytest.raises(PipelineError) as refused:
        rows_of([{"id": 6, "images": [{}]}, record], table_of(IMAGE_COLUMNS, **IMAGES))
    assert str(refused.value) == (
        'public.things, product_id=7, position=null: images[]: [{"position": 2}, {"src": "x"}] '
        "has a position in some elements, not in all"
    )


def test_a_position_that_is_no_column_is_a_field_like_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    columns = {"product.id": "integer", "src": "varchar(9)"}
    table = table_of(columns, **IMAGES | {"key": ["product_id", "src"]})
    record = {"id": 1, "images": [{"position": 2, "src": "a"}, {"src": "b"}]}
    assert rows_of([record], table) == [["1", "a"], ["1", "b"]]
    assert UNKNOWN + "images[].position" in warnings(caplog, table, record)


def test_fields_of_elements_that_no_record_has_are_not_missed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    table = table_of(IMAGE_COLUMNS | {"product": "super", "src": "varchar(9)"}, **IMAGES)
    record = {"id": 1, "images": [{"src": "a"}]}
    assert warnings(caplog, table, {"id": 1, "images": []}) == []
    assert warnings(caplog, table, record) == []


def test_an_element_with_a_field_named_like_the_parent_is_refused() -> None:
    record = {"id": 7, "images": [{"src": "x"}, {"product": 7}]}
    with pytest.raises(PipelineError) as refused:
        rows_of([record], table_of(IMAGE_COLUMNS, **IMAGES))
    assert str(refused.value) == (
        'public.things, product_id=7, position=2: images[]: {"product": 7} '
        "has a field 'product': choose another name for parent"
    )


@pytest.mark.parametrize(
    ("elements", "values"),
    [
        ([5, 6], ["5", "6"]),
        ([{"value": 5}, {"value": None}, {}], ["5", "NULL", "NULL"]),
        ([5, {"value": 6, "hash": "x"}], ["5", "6"]),
        ([None], ["NULL"]),
    ],
    ids=["values", "objects", "both", "null"],
)
def test_the_value(elements: list[Any], values: list[str]) -> None:
    table = table_of(IMAGE_COLUMNS | {"value": "integer"}, **IMAGES)
    assert [row[2] for row in rows_of([{"id": 1, "images": elements}], table)] == values


def test_arrays_in_arrays_are_refused() -> None:
    table = table_of(IMAGE_COLUMNS, **IMAGES | {"rows": "lines.taxes"})
    with pytest.raises(PipelineError) as refused:
        rows_of([{"id": 1, "lines": [{"taxes": [1]}]}], table)
    assert str(refused.value) == (
        'public.things, product_id=1, position=null: lines.taxes[]: [{"taxes": [1]}] '
        "is not an object"
    )


# --- numbers in quotes --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ('"19.99"', "19.99"),
        ('"-0.5"', "-0.50"),
        ('"7"', "7.00"),
        ('"999.990"', "999.99"),
        ("19.99", "19.99"),
        ("null", "NULL"),
    ],
)
def test_a_decimal_takes_numbers_in_quotes(text: str, written: str) -> None:
    table = table_of({"id": "integer", "v": "decimal(5,2)"})
    record = json.loads(f'{{"id": 1, "v": {text}}}', parse_float=Decimal)
    assert rows_of([{"id": 2, "v": 1}, record], table)[1] == ["1", written]


@pytest.mark.parametrize(
    "text",
    ["1.999", "1000", "", "NaN", "Infinity", "1e5", " 1", "1,5", "+1", ".5", "1.", "\u0661", "1_0"],
)
def test_a_decimal_refuses_other_texts(text: str) -> None:
    table = table_of({"id": "integer", "v": "decimal(5,2)"})
    with pytest.raises(PipelineError) as refused:
        rows_of([{"id": 1, "v": text}], table)
    message = str(refused.value)
    assert message.startswith(f'public.things, id=1: v: "{text}" ')
    assert message.endswith(("is not a number", "does not fit decimal(5,2) exactly"))


@pytest.mark.parametrize("type_", ["integer", "double precision", "real"])
def test_other_numbers_in_quotes_are_refused(type_: str) -> None:
    with pytest.raises(PipelineError, match=r'id=1: v: "1" is not a'):
        rows_of([{"id": 1, "v": "1"}], table_of({"id": "integer", "v": type_}))


def test_one_number_written_in_two_ways_is_one_key() -> None:
    with pytest.raises(PipelineError, match="more than one row has the key id="):
        rows_of([{"id": "1.5"}, {"id": Decimal("1.50")}], table_of({"id": "decimal(5,2)"}))
