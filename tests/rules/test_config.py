"""Reading and checking conf/pipeline.yaml."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import ROLE, SECTIONS, ConfigError, load_config, table_of
from sandbox import PIPELINE

LAUNCHES = "tables.public.launches"
CORES = "tables.public.launch_cores"
TABLES: dict[str, Any] = {
    "public.launches": {
        "key": ["id"],
        "mode": "upsert",
        "sort_key": ["date_utc"],
        "dist_key": "id",
        "columns": {
            "id": "varchar(24) not null",
            "date_utc": "timestamptz not null",
            "links.patch.small": "varchar(1024)",
            "mass": "decimal(10,2)",
            "ships": "super",
        },
    },
    "public.launch_cores": {
        "rows": "cores",
        "parent": "launch",
        "key": ["launch_id", "position"],
        "columns": {"launch.id": "varchar(24)", "position": "smallint", "core": "varchar(24)"},
    },
}
REMOVED = object()
Change = Callable[[str, Any], Path]
Write = Callable[[str | bytes], Path]


@pytest.fixture(autouse=True)
def no_role(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ROLE_ARN", raising=False)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a configuration and returns its path."""

    def write(content: str | bytes) -> Path:
        path = tmp_path / "pipeline.yaml"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


@pytest.fixture
def change(write: Write) -> Change:
    """Writes the valid configuration with one thing changed: its keys, joined by " / "."""

    def change(at: str, value: Any) -> Path:
        document = copy.deepcopy({**SECTIONS, "tables": TABLES})
        *above, last = at.split(" / ")
        inner = document
        for key in above:
            inner = inner[key]
        if value is REMOVED:
            del inner[last]
        else:
            inner[last] = value
        return write(json.dumps(document))

    return change


def faults(path: Path) -> list[str]:
    with pytest.raises(ConfigError) as refused:
        load_config(path)
    first, *rest = str(refused.value).splitlines()
    assert first == f"{path} has {len(rest)} fault(s):"
    return [line.strip() for line in rest]


def test_a_valid_file_is_read(change: Change) -> None:
    config = load_config(change("staging / kms_key", "alias/loads"))
    staging = config.staging
    assert (staging.bucket, staging.prefix, staging.kms_key) == ("bucket", "spacex", "alias/loads")
    assert config.source.url == "https://example.org/v5/launches"
    assert config.redshift.secret == "redshift/spacex"
    launches, cores = config.tables
    assert (launches.name, launches.key, launches.mode) == ("public.launches", ("id",), "upsert")
    assert (launches.sort_key, launches.dist_key) == (("date_utc",), "id")
    assert (launches.rows, launches.parent) == ("", None)
    assert (cores.mode, cores.rows, cores.parent) == ("replace", "cores", "launch")
    assert (cores.key, cores.sort_key, cores.dist_key) == (("launch_id", "position"), (), None)
    small = launches.columns[2]
    assert small.path == ("links", "patch", "small")
    assert (small.name, small.type, small.not_null) == (
        "links_patch_small",
        "varchar(1024)",
        False,
    )
    assert launches.columns[0].type == "varchar(24)"
    assert launches.columns[0].not_null


@pytest.mark.parametrize(
    ("at", "value", "fault"),
    [
        ("sources", {}, "sources: unknown key"),
        ("source / uri", "x", "source.uri: unknown key"),
        ("staging / Bucket", "x", "staging.Bucket: unknown key"),
        ("redshift / password", "x", "redshift.password: unknown key"),
        ("tables / public.launches / sortkey", "id", f"{LAUNCHES}.sortkey: unknown key"),
        ("source", REMOVED, "source.url: missing"),
        ("staging", REMOVED, "staging.bucket: missing"),
        ("redshift", REMOVED, "redshift.secret: missing"),
        ("tables", REMOVED, "tables: missing"),
        ("source", {"uri": "x"}, "source.url: missing"),
        ("staging / bucket", REMOVED, "staging.bucket: missing"),
        ("staging / prefix", REMOVED, "staging.prefix: missing"),
        ("redshift", {"copy_role": None}, "redshift.secret: missing"),
        ("tables / public.launches / key", REMOVED, f"{LAUNCHES}.key: missing"),
        ("tables / public.launches / columns", REMOVED, f"{LAUNCHES}.columns: missing"),
        ("source", None, "source.url: missing"),
        ("source", "https://example.org", "source: must be a mapping"),
        ("staging", [], "staging: must be a mapping"),
        ("redshift", "secret", "redshift: must be a mapping"),
        ("tables", {}, "tables: missing"),
        ("tables", None, "tables: missing"),
        ("tables", ["public.launches"], "tables: must be a mapping"),
        ("tables / public.launches", None, f"{LAUNCHES}.columns: missing"),
        ("tables / public.launches", "id", f"{LAUNCHES}: must be a mapping"),
        ("tables / public.launches / columns", {}, f"{LAUNCHES}.columns: missing"),
        ("tables / public.launches / columns", ["id"], f"{LAUNCHES}.columns: must be a mapping"),
        ("source / url", None, "source.url: "),
        ("source / url", "", "source.url: "),
        ("source / url", ["https://example.org"], "source.url: "),
        ("staging / bucket", "Bucket", "staging.bucket: "),
        ("staging / bucket", "s3://bucket", "staging.bucket: "),
        ("staging / prefix", "/spacex/", "staging.prefix: "),
        ("staging / prefix", ["spacex"], "staging.prefix: "),
        ("staging / part_mb", 0, "staging.part_mb: "),
        ("staging / part_mb", 0.5, "staging.part_mb: "),
        ("source / records", "data..items", "source.records: "),
        ("source / next", ["links"], "source.next: "),
        ("source / max_pages", 0, "source.max_pages: "),
        ("source / max_wait", -1, "source.max_wait: "),
        ("source / headers", "Accept: text/csv", "source.headers: must be a mapping"),
        ("source / headers", {"Accept": "a\nb"}, "source.headers.Accept: "),
        ("source / headers", {"Key": "${NOT_SET}"}, "source.headers.Key: ${NOT_SET} is not set"),
        ("alerts", "failure", "alerts: must be a mapping"),
        ("alerts", {"on": "always"}, "alerts.on: "),
        ("alerts", {"sns_topic": "loads"}, "alerts.sns_topic: "),
        ("alerts", {"heartbeat_url": "example.org"}, "alerts.heartbeat_url: "),
        ("staging / kms_key", "a key", "staging.kms_key: "),
        ("redshift / secret", "it's", "redshift.secret: "),
        ("redshift / copy_role", "loader", "redshift.copy_role: "),
        ("redshift / copy_role", f"{ROLE}'", "redshift.copy_role: "),
        ("tables / public.launches / key", "", f"{LAUNCHES}.key: "),
        ("tables / public.launches / key", None, f"{LAUNCHES}.key: "),
        ("tables / public.launches / key", [], f"{LAUNCHES}.key: "),
        ("tables / public.launches / key", ["nmae"], f"{LAUNCHES}.key: 'nmae'"),
        ("tables / public.launches / key", ["ships"], f"{LAUNCHES}.key: 'ships'"),
        ("tables / public.launches / key", ["links.patch.small"], f"{LAUNCHES}.key: "),
        ("tables / public.launches / sort_key", ["date"], f"{LAUNCHES}.sort_key: 'date'"),
        ("tables / public.launches / sort_key", "ships", f"{LAUNCHES}.sort_key: 'ships'"),
        ("tables / public.launches / dist_key", "date", f"{LAUNCHES}.dist_key: 'date'"),
        ("tables / public.launches / dist_key", ["id", "date_utc"], f"{LAUNCHES}.dist_key: "),
        ("tables / public.launches / mode", "merge", f"{LAUNCHES}.mode: "),
        ("tables / public.launches / rows", "cores", f"{LAUNCHES}: rows and parent"),
        ("tables / public.launches / parent", "launch", f"{LAUNCHES}: rows and parent"),
        ("tables / public.launch_cores / parent", REMOVED, f"{CORES}: rows and parent"),
        ("tables / public.launch_cores / parent", "a.b", f"{CORES}.parent: "),
        ("tables / public.launch_cores / rows", "cores..x", f"{CORES}.rows: "),
        ("tables / launches", TABLES["public.launches"], "tables.launches: must be schema.table"),
        ("tables / a.b.c", TABLES["public.launches"], "tables.a.b.c: must be schema.table"),
        ("tables / public.My", TABLES["public.launches"], "tables.public.My: must be"),
        ("tables / public.my-t", TABLES["public.launches"], "tables.public.my-t: must be"),
        ("tables / public." + "t" * 128, TABLES["public.launches"], "tables.public.ttt"),
    ],
)
def test_a_wrong_setting_is_refused(change: Change, at: str, value: Any, fault: str) -> None:
    assert [line for line in faults(change(at, value)) if line.startswith(fault)]


def test_a_wrong_type_is_named(change: Change) -> None:
    path = change("tables / public.launches / columns / id", "strnig")
    assert faults(path) == ["tables.public.launches.columns.id: unknown type 'strnig'"]


@pytest.mark.parametrize(
    "wrong",
    [
        "varchar",
        "varchar(0)",
        "varchar(65536)",
        "varchar(max)",
        "varchar(-1)",
        "varchar(٣)",
        "VARCHAR(24)",
        "char(24)",
        "text",
        "int",
        "float",
        "decimal",
        "decimal(5)",
        "decimal(39,2)",
        "decimal(5,6)",
        "decimal(0,0)",
        "integer null",
        "integer not  null",
        "integer; drop table x",
        "",
        None,
        24,
        ["integer"],
        {"type": "integer"},
    ],
)
def test_a_wrong_type_is_refused(change: Change, wrong: Any) -> None:
    (fault,) = faults(change("tables / public.launches / columns / mass", wrong))
    assert fault.startswith(f"{LAUNCHES}.columns.mass: ")


@pytest.mark.parametrize(
    "type_",
    [
        "boolean",
        "smallint",
        "integer",
        "bigint",
        "real",
        "double precision",
        "decimal(1,0)",
        "decimal(38,38)",
        "varchar(1)",
        "varchar(65535)",
        "date",
        "timestamp",
        "timestamptz",
        "super",
    ],
)
@pytest.mark.parametrize("suffix", ["", " not null"])
def test_every_type_is_accepted(change: Change, type_: str, suffix: str) -> None:
    config = load_config(change("tables / public.launches / columns / mass", type_ + suffix))
    column = config.tables[0].columns[3]
    assert (column.type, column.not_null) == (type_, bool(suffix))


@pytest.mark.parametrize(
    "path",
    [
        "naïve",
        "1st",
        "a" * 128,
        ".a",
        "a.",
        "a..b",
        "",
        "_run_id",
        "_loaded_at",
        "_run.id",
        "oid",
        "xmin",
        "ctid",
    ],
)
def test_a_name_that_is_no_column_is_refused(change: Change, path: str) -> None:
    columns = TABLES["public.launches"]["columns"] | {path: "integer"}
    found = faults(change("tables / public.launches / columns", columns))
    assert found
    assert all(fault.startswith(f"{LAUNCHES}.columns.{path}: ") for fault in found)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("orderId", "order_id"),
        ("shipTo.postalCode", "ship_to_postal_code"),
        ("Name", "name"),
        ("lineNo2Total", "line_no2_total"),
        ("imageURL", "image_url"),
        ("ID", "id"),
        ("ship-to", "ship_to"),
        ("first name", "first_name"),
        ("@type", "_type"),
        ('a"b', "a_b"),
        ("_id", "_id"),
    ],
)
def test_a_name_is_in_snake_case(path: str, name: str) -> None:
    assert table_of({path: "integer"}, name).columns[0].name == name


def test_two_names_that_become_one_are_refused(change: Change) -> None:
    columns = TABLES["public.launches"]["columns"] | {"shipTo": "date", "ship.to": "date"}
    assert faults(change("tables / public.launches / columns", columns)) == [
        f"{LAUNCHES}.columns: 2 paths give the column 'ship_to'"
    ]


def test_a_name_of_127_bytes_is_accepted(change: Change) -> None:
    name = "a" * 127
    path = change(
        "tables / public.launches / columns", {"id": "integer", "date_utc": "date"} | {name: "date"}
    )
    assert load_config(path).tables[0].columns[2].name == name


def test_two_paths_that_give_one_column_are_refused(change: Change) -> None:
    columns = TABLES["public.launches"]["columns"] | {"a.b": "integer", "a_b": "integer"}
    (fault,) = faults(change("tables / public.launches / columns", columns))
    assert fault.startswith(f"{LAUNCHES}.columns: ")
    assert "'a_b'" in fault


def test_all_faults_are_in_one_message(write: Write) -> None:
    path = write(
        """
source: {}
staging: {bucket: B, prefix: spacex, region: eu-west-1}
redshift: {secret: redshift/spacex}
tables:
  launches:
    key: nmae
    columns: {id: strnig, oid: integer}
"""
    )
    found = sorted(fault.partition(": ")[0] for fault in faults(path))
    assert found == [
        "source.url",
        "staging.bucket",
        "staging.region",
        "tables.launches",
        "tables.launches.columns.id",
        "tables.launches.columns.oid",
        "tables.launches.key",
    ]


@pytest.mark.parametrize("content", ["[]", "[source, tables]", "text", "5"])
def test_a_file_that_is_no_mapping_is_refused(write: Write, content: str) -> None:
    assert faults(write(content))[0].startswith("the file: must be a mapping")


@pytest.mark.parametrize("content", ["", "# nothing", "null", "~", "{}", "---\n..."])
def test_an_empty_file_lacks_what_is_required(write: Write, content: str) -> None:
    required = ("source.url", "staging.bucket", "staging.prefix", "redshift.secret", "tables")
    assert faults(write(content)) == [f"{setting}: missing" for setting in required]


@pytest.mark.parametrize(
    "content",
    [
        "source: {url: x",
        "source: *nowhere",
        "a: b: c",
        "\tsource: x",
        "a: !!python/object/apply:os.getcwd []",
        "a: 2020-13-45",
        "a: b\n---\na: b",
        "a: \0",
        b"\xff\xfe\xff",
        b"source: {url: caf\xe9}",
        "a: !!int ''",
        "a: !!timestamp noon",
        "a: !!bool maybe",
        "? [a]\n: b",
        "source: &s [*s]",
        "source: [{2020-01-01: a}]",
        "[" * 2_000,
    ],
)
def test_what_is_not_valid_yaml_is_refused(write: Write, content: str | bytes) -> None:
    path = write(content)
    with pytest.raises(ConfigError) as refused:
        load_config(path)
    assert str(refused.value).startswith(str(path))


@pytest.mark.parametrize("again", ["id: integer", '"id": date', "'id' : date"])
def test_a_key_that_stands_twice_is_refused(write: Write, again: str) -> None:
    path = write(f"tables:\n  a.b:\n    columns:\n      id: integer\n      {again}\n")
    with pytest.raises(ConfigError, match="'id' stands twice"):
        load_config(path)


def test_a_table_that_stands_twice_is_refused(write: Write) -> None:
    with pytest.raises(ConfigError, match=r"'public\.a' stands twice"):
        load_config(write("tables:\n  public.a: {}\n  public.b: {}\n  public.a: {}\n"))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "nowhere.yaml"
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: No such file"):
        load_config(path)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Is a directory"):
        load_config(tmp_path)


@pytest.mark.parametrize("name", ["on", "off", "yes", "no", "y", "n", "true", "false"])
def test_a_word_that_yaml_takes_as_a_boolean_is_a_column(write: Write, name: str) -> None:
    path = write(
        f"""
source: {{url: x}}
staging: {{bucket: bucket, prefix: spacex}}
redshift: {{secret: s}}
tables:
  public.t:
    key: {name}
    columns:
      {name}: integer
"""
    )
    (table,) = load_config(path).tables
    assert (table.key, table.columns[0].path) == ((name,), (name,))


def test_a_scalar_is_the_text_that_stands_there(write: Write) -> None:
    path = write(
        """
source: {url: x, max_wait: "007", headers: {X-Version: 1.10, X-Day: 2026-11-22, X-Flag: on}}
staging: {bucket: 123, prefix: 2026, part_mb: "1"}
redshift: {secret: s, audit_table: "null.x", connect_seconds: 0}
alerts: {on: success}
tables: {public.t: {key: a, columns: {a: date}}}
"""
    )
    config = load_config(path)
    source, staging, redshift = config.source, config.staging, config.redshift
    assert (staging.bucket, staging.prefix, redshift.audit_table) == ("123", "2026", "null.x")
    assert (source.max_wait, staging.part_mb, redshift.connect_seconds) == (7, 1, 0)
    assert source.headers == {"X-Version": "1.10", "X-Day": "2026-11-22", "X-Flag": "on"}
    assert (config.alerts.on, config.tables[0].min_rows) == (("success",), 1)


@pytest.mark.parametrize("null", ["", "~", "null", "Null", "NULL"])
def test_null_is_as_if_the_setting_were_not_there(write: Write, null: str) -> None:
    path = write(
        f"""
source:
  url: x
  records: {null}
staging: {{bucket: bucket, prefix: spacex, kms_key: {null}, part_mb: {null}}}
redshift: {{secret: s, copy_role: {null}}}
alerts: {null}
tables:
  public.t:
    key: a
    columns: {{a: date}}
    rows: {null}
    parent: {null}
    sort_key: {null}
"""
    )
    config = load_config(path)
    assert (config.source.records, config.redshift.copy_role) == ("", None)
    assert (config.staging.kms_key, config.staging.part_mb) == (None, 64)
    assert (config.alerts.on, config.alerts.slack_webhook_secret) == (("failure",), None)
    assert (config.tables[0].rows, config.tables[0].sort_key) == ("", ())


def test_the_audit_table_cannot_be_turned_off(change: Change) -> None:
    (fault,) = faults(change("redshift / audit_table", "null"))
    assert fault.startswith("redshift.audit_table: cannot be null, ")


def test_headers_take_secrets_from_the_environment(
    change: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("API_TOKEN", "t0ken")
    config = load_config(change("source / headers", {"Authorization": "Bearer ${API_TOKEN}"}))
    assert config.source.headers == {"Authorization": "Bearer t0ken"}


@pytest.mark.parametrize(
    ("configured", "environment", "used"),
    [
        (None, None, None),
        (None, "", None),
        (None, ROLE, ROLE),
        (f"{ROLE}2", ROLE, f"{ROLE}2"),
        (f"{ROLE},{ROLE}2", None, f"{ROLE},{ROLE}2"),
    ],
)
def test_the_copy_role(
    change: Change,
    monkeypatch: pytest.MonkeyPatch,
    configured: str | None,
    environment: str | None,
    used: str | None,
) -> None:
    if environment is not None:
        monkeypatch.setenv("AWS_ROLE_ARN", environment)
    assert load_config(change("redshift / copy_role", configured)).redshift.copy_role == used


def test_the_role_of_the_environment_is_used_where_the_setting_is_absent(
    change: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ROLE_ARN", ROLE)
    assert load_config(change("redshift / secret", "spacex")).redshift.copy_role == ROLE


def paths_in(value: Any, at: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
    """The paths of all values in nested objects that are neither objects nor null."""
    if isinstance(value, dict):
        return set().union(*(paths_in(inner, (*at, name)) for name, inner in value.items()))
    return set() if value is None else {at}


def test_the_shipped_configuration_is_valid_and_loads_every_field_of_the_sample(
    sample: Path,
) -> None:
    launches, cores = load_config(PIPELINE).tables
    records = json.loads(sample.read_text(encoding="utf-8"))
    served = set().union(*map(paths_in, records))
    assert len(served) > 30
    assert served <= {column.path for column in launches.columns}
    assert {(name,) for record in records for name in record} <= {
        column.path[:1] for column in launches.columns
    }
    elements = [core for record in records for core in record["cores"]]
    assert {(name,) for core in elements for name in core} <= {c.path for c in cores.columns}
