"""Reading and checking conf/pipeline.yaml."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers import (
    REMOVED,
    SECTIONS,
    Config,
    ConfigError,
    changed,
    launches,
    load_config,
    table_of,
    warn_of_drift,
)
from sandbox import PIPELINE, SAMPLE

COLUMNS = {
    "id": "varchar(24) not null",
    "date_utc": "timestamptz not null",
    "links.patch.small": "varchar(1024)",
    "mass": "decimal(10,2)",
    "ships": "super",
}
TABLES: dict[str, Any] = {
    "public.launches": {
        "key": ["id"],
        "mode": "upsert",
        "sort_key": ["date_utc"],
        "dist_key": "id",
        "columns": COLUMNS,
    },
    "public.launch_cores": {
        "rows": "cores",
        "parent": "launch",
        "key": ["launch_id", "position"],
        "columns": {"launch.id": "varchar(24)", "position": "smallint", "core": "varchar(24)"},
    },
}
VALID = SECTIONS | {"tables": TABLES}
COLUMNS_AT = "tables / public.launches / columns"


def read(content: Any) -> Config:
    """What the program reads from a file with this content: text, bytes, or JSON of the rest."""
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "pipeline.yaml")
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_config(path)


def faults(content: Any) -> list[str]:
    with pytest.raises(ConfigError) as refused:
        read(content)
    first, *rest = str(refused.value).splitlines()
    assert first.endswith(f"/pipeline.yaml has {len(rest)} fault(s):")
    return [line.strip() for line in rest]


WRONG: dict[str, dict[str, list[Any]]] = yaml.safe_load(
    (SAMPLE.parent / "wrong_settings.yaml").read_text("utf-8")
)


@pytest.mark.parametrize(
    ("at", "value", "said"),
    [
        (at, value, said)
        for said, settings in WRONG.items()
        for at, values in settings.items()
        for value in values
    ],
)
def test_a_wrong_setting_is_refused_and_shown_unless_it_may_be_secret(
    at: str, value: Any, said: str
) -> None:
    found = faults(changed(VALID, {at: REMOVED if value == "REMOVED" else value}))
    setting = at.replace(" / ", ".")
    fault = next(line for line in found if line.startswith((f"{setting}: {said}", said)))
    if said.startswith("must match"):
        is_secret = setting.startswith(("alerts.s", "alerts.h", "source.headers"))
        text = value if isinstance(value, list | dict) else str(value)
        assert fault.endswith("not what is there" if is_secret else f"not {text!r}")


def test_names_that_redshift_or_the_load_has_taken_are_refused() -> None:
    reserved = "oid tableoid xmin cmin xmax cmax ctid insertxid deletexid _run_id _loaded_at"
    for path in (*reserved.split(), "_run.id"):
        name = path.replace(".", "_")
        said = f'the name {name!r} is reserved: say "as another_name"'
        assert faults(changed(VALID, {f"{COLUMNS_AT} / {path}": "integer"})) == [
            f"tables.public.launches.columns.{path}: {said}"
        ]


NAMES = {
    "orderId": "order_id",
    "shipTo.postalCode": "ship_to_postal_code",
    "Name": "name",
    "lineNo2Total": "line_no2_total",
    "imageURL": "image_url",
    "ID": "id",
    "ship-to": "ship_to",
    "first name": "first_name",
    "@type": "_type",
    'a"b': "a_b",
    "_id": "_id",
    "a" * 127: "a" * 127,
}


@pytest.mark.parametrize("path", NAMES)
def test_a_name_is_in_snake_case(path: str) -> None:
    assert table_of({path: "integer"}, NAMES[path]).columns[0].name == NAMES[path]


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


def test_all_faults_are_in_one_message() -> None:
    found = faults("""
source: {}
staging: {bucket: B, prefix: spacex, region: eu-west-1}
redshift: {secret: redshift/spacex}
tables: {launches: {key: nmae, columns: {id: strnig, oid: integer}}}
""")
    assert sorted(fault.partition(": ")[0] for fault in found) == [
        *("source.url", "staging.bucket", "staging.region", "tables.launches"),
        *("tables.launches.columns.id", "tables.launches.columns.oid", "tables.launches.key"),
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        *((content, "the file: must be") for content in ("[]", "[source, tables]", "text", "5")),
        *((f"source: {odd}", "source: must be") for odd in ("&s [*s]", "[{2020-01-01: a}]")),
        ("a: 2020-13-45", "a: unknown key"),
    ],
)
def test_a_file_of_another_shape_is_refused(content: str, said: str) -> None:
    assert faults(content)[0].startswith(said)


@pytest.mark.parametrize("content", ["", "# nothing", "null", "~", "{}", "---\n..."])
def test_an_empty_file_lacks_what_is_required(content: str) -> None:
    required = ("source.url", "staging.bucket", "staging.prefix", "redshift.secret", "tables")
    assert faults(content) == [f"{setting}: missing" for setting in required]


@pytest.mark.parametrize(
    "content",
    [
        *("source: {url: x", "source: *nowhere", "a: b: c", "\tsource: x"),
        *("a: !!python/object/apply:os.getcwd []", "a: b\n---\na: b", "a: \0", b"\xff\xfe\xff"),
        *(b"source: {url: caf\xe9}", "a: !!int ''", "a: !!timestamp noon", "a: !!bool maybe"),
        *("? [a]\n: b", "[" * 1_000),
    ],
)
def test_what_is_not_valid_yaml_is_refused(content: str | bytes) -> None:
    with pytest.raises(ConfigError, match=r"^/.*/pipeline\.yaml: not valid YAML: "):
        read(content)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("public.a", "{public.a: {}, public.b: {}, public.a: {}}"),
        ("id", "\n  public.a:\n    columns:\n      id: integer\n      id: integer"),
        ("id", """{public.a: {columns: {id: integer, 'id' : date}}}"""),
        ("id", """{public.a: {columns: {id: integer, "id": date}}}"""),
    ],
    ids=["table", "column", "quoted", "quoted twice"],
)
def test_a_key_that_stands_twice_is_refused(name: str, content: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}' stands twice"):
        read(f"tables: {content}\n")


@pytest.mark.parametrize(
    ("name", "said"), [("nowhere.yaml", "No such file"), (".", "Is a directory")]
)
def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(str(tmp_path / name))}: {said}"):
        load_config(tmp_path / name)


def test_a_scalar_is_the_text_that_stands_there() -> None:
    config = read("""
source: {url: x, max_wait: "007", headers: {X-Version: 1.10, X-Day: 2026-11-22, X-Flag: on}}
staging: {bucket: 123, prefix: 2026, part_mb: "1"}
redshift: {secret: s, audit_table: "null.x", connect_seconds: 0}
alerts: {on: success}
tables:
  public.t:
    key: on
    columns: {on: date, off: date, yes: date, no: date, y: date, n: date, true: date, false: date}
""")
    source, staging, redshift = config.source, config.staging, config.redshift
    assert (staging.bucket, staging.prefix, redshift.audit_table) == ("123", "2026", "null.x")
    assert (source.max_wait, staging.part_mb, redshift.connect_seconds) == (7, 1, 0)
    assert source.headers == {"X-Version": "1.10", "X-Day": "2026-11-22", "X-Flag": "on"}
    (table,) = config.tables
    assert (config.alerts.on, table.min_rows, table.key) == (("success",), 1, ("on",))
    assert table.names == ["on", "off", "yes", "no", "y", "n", "true", "false"]


@pytest.mark.parametrize("null", ["", "~", "null", "Null", "NULL"])
def test_null_is_as_if_the_setting_were_not_there(null: str) -> None:
    config = read(f"""
source: {{url: x, records: {null}}}
staging: {{bucket: bucket, prefix: spacex, kms_key: {null}, part_mb: {null}}}
redshift: {{secret: s, copy_role: {null}}}
alerts: {null}
tables:
  public.t: {{key: a, columns: {{a: date}}, rows: {null}, parent: {null}, sort_key: {null}}}
""")
    assert (config.source.records, config.redshift.copy_role) == ("", None)
    assert (config.staging.kms_key, config.staging.part_mb) == (None, 64)
    assert (config.alerts.on, config.alerts.slack_webhook_secret) == (("failure",), None)
    assert (config.tables[0].rows, config.tables[0].sort_key) == ("", ())


def test_the_shipped_configuration_loads_every_field_of_the_sample(
    caplog: pytest.LogCaptureFixture,
) -> None:
    warn_of_drift(launches(), load_config(PIPELINE).tables)
    assert caplog.messages == []
