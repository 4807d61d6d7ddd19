"""Reading and checking conf/pipeline.yaml."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import REMOVED, ROLE, SECTIONS, ConfigError, changed, load_config, table_of
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
REQUIRED = [("source", "url"), ("staging", "bucket"), ("redshift", "secret")]
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
        return write(json.dumps(changed({**SECTIONS, "tables": TABLES}, {at: value})))

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


OPEN = "tables / public.launches"
ELEMENTS = "tables / public.launch_cores"

# What is said of a setting: where it stands, and the values that are refused so.
WRONG: dict[str, list[tuple[str, Any]]] = {
    "unknown key": [
        *(("sources", {}), ("source / uri", "x"), ("source / pages", 3), ("staging / Bucket", "x")),
        *(("redshift / password", "x"), ("alerts / slack_channel", "#etl")),
        (f"{OPEN} / sortkey", "id"),
    ],
    "missing": [
        *(("staging / bucket", REMOVED), ("staging / prefix", REMOVED), ("tables", REMOVED)),
        *(("tables", {}), ("tables", None), ("source / url", None), ("source / url", "")),
        *((f"{OPEN} / key", REMOVED), (f"{OPEN} / columns", REMOVED), (f"{OPEN} / columns", {})),
        *((f"{OPEN} / key", ""), (f"{OPEN} / key", None)),
    ],
    "must be a mapping": [
        *(("source", "https://example.org"), ("staging", []), ("redshift", "secret")),
        *(("tables", ["public.launches"]), (OPEN, "id"), (f"{OPEN} / columns", ["id"])),
        *(("alerts", "failure"), ("source / headers", "Accept: text/csv")),
        ("source / headers", ["Authorization"]),
    ],
    "must match": [
        *(("source / url", ["https://example.org"]), ("source / records", "data..items")),
        *(("source / next", ["links"]), ("source / max_pages", 0), ("source / max_pages", "many")),
        *(("source / max_wait", -1), ("staging / bucket", "Bucket"), ("staging / part_mb", 0)),
        *(("staging / bucket", "s3://bucket"), ("staging / prefix", "/spacex/")),
        *(("staging / prefix", ["spacex"]), ("staging / part_mb", 0.5)),
        *(("staging / kms_key", "a key"), ("redshift / secret", "it's")),
        *(("redshift / copy_role", "loader"), ("redshift / copy_role", f"{ROLE}'")),
        *(("alerts / on", "always"), ("alerts / sns_topic", "loads")),
        *(("alerts / heartbeat_url", "example.org"), ("alerts / heartbeat_url", "ftp://a/b")),
        # Whoever puts the URL here has it in the repository, and in the log of each failure.
        ("alerts / slack_webhook_secret", "https://hooks.slack.com/services/T0/B0/x"),
        *((f"{OPEN} / dist_key", ["id", "date_utc"]), (f"{OPEN} / mode", "merge")),
        *((f"{ELEMENTS} / parent", "a.b"), (f"{ELEMENTS} / rows", "cores..x")),
    ],
    "": [
        *((f"{OPEN} / key", []), (f"{OPEN} / key", ["nmae"]), (f"{OPEN} / key", ["ships"])),
        *((f"{OPEN} / key", ["links.patch.small"]), (f"{OPEN} / sort_key", ["date"])),
        *((f"{OPEN} / sort_key", "ships"), (f"{OPEN} / dist_key", "date")),
        ("source / headers / Accept", "a\nb"),
        ("source / headers / Authorization", ["Token"]),
        ("source / headers / Not a name", "x"),
    ],
    "must be schema.table": [
        ("tables / " + name, TABLES["public.launches"])
        for name in ("launches", "a.b.c", "public.My", "public.my-t", "public." + "t" * 128)
    ],
}


@pytest.mark.parametrize(
    ("at", "value", "said"), [(*each, said) for said, cases in WRONG.items() for each in cases]
)
def test_a_wrong_setting_is_refused(change: Change, at: str, value: Any, said: str) -> None:
    setting = at.replace(" / ", ".") + ": "
    assert [fault for fault in faults(change(at, value)) if fault.startswith(setting + said)]


@pytest.mark.parametrize(
    ("at", "value", "fault"),
    [
        *((section, REMOVED, f"{section}.{required}: missing") for section, required in REQUIRED),
        *((section, None, f"{section}.{required}: missing") for section, required in REQUIRED),
        (OPEN, None, f"{LAUNCHES}.columns: missing"),
        (f"{OPEN} / rows", "cores", f"{LAUNCHES}: rows and parent"),
        (f"{OPEN} / parent", "launch", f"{LAUNCHES}: rows and parent"),
        (f"{ELEMENTS} / parent", REMOVED, f"{CORES}: rows and parent"),
        ("source / headers", {"Key": "${NO}"}, "source.headers.Key: ${NO} is not set"),
    ],
)
def test_what_does_not_go_together_is_refused(
    change: Change, at: str, value: Any, fault: str
) -> None:
    assert [line for line in faults(change(at, value)) if line.startswith(fault)]


def test_a_wrong_type_is_named(change: Change) -> None:
    path = change("tables / public.launches / columns / id", "strnig")
    (fault,) = faults(path)
    assert fault.startswith("tables.public.launches.columns.id: must match (boolean|smallint|")
    assert fault.endswith(", not 'strnig'")


@pytest.mark.parametrize(
    "wrong",
    [
        *("varchar", "varchar(0)", "varchar(65536)", "varchar(max)", "varchar(-1)", "varchar(٣)"),
        *("VARCHAR(24)", "char(24)", "text", "int", "float", "decimal", "decimal(5)", ""),
        *("decimal(39,2)", "decimal(5,6)", "decimal(0,0)", "integer null", "integer not  null"),
        *("integer; drop table x", None, 24, ["integer"], {"type": "integer"}),
    ],
)
def test_a_wrong_type_is_refused(change: Change, wrong: Any) -> None:
    (fault,) = faults(change("tables / public.launches / columns / mass", wrong))
    assert fault.startswith(f"{LAUNCHES}.columns.mass: ")


@pytest.mark.parametrize(
    "type_",
    [
        *("boolean", "smallint", "integer", "bigint", "real", "double precision", "decimal(1,0)"),
        *("decimal(38,38)", "varchar(1)", "varchar(65535)", "date", "timestamp", "timestamptz"),
        "super",
    ],
)
def test_every_type_is_accepted(change: Change, type_: str) -> None:
    for suffix in ("", " not null"):
        config = load_config(change("tables / public.launches / columns / mass", type_ + suffix))
        column = config.tables[0].columns[3]
        assert (column.type, column.not_null) == (type_, bool(suffix))


@pytest.mark.parametrize(
    "path",
    [
        *("naïve", "1st", "a" * 128, ".a", "a.", "a..b", "", "_run_id", "_loaded_at", "_run.id"),
        *("oid", "tableoid", "xmin", "cmin", "xmax", "cmax", "ctid", "insertxid", "deletexid"),
    ],
)
def test_a_name_that_is_no_column_is_refused(change: Change, path: str) -> None:
    columns = TABLES["public.launches"]["columns"] | {path: "integer"}
    found = faults(change("tables / public.launches / columns", columns))
    assert found
    assert all(fault.startswith(f"{LAUNCHES}.columns.{path}: ") for fault in found)


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


def test_two_names_that_become_one_are_refused(change: Change) -> None:
    names = dict.fromkeys(("shipTo", "ship.to", "ship_to"), "date")
    columns = TABLES["public.launches"]["columns"] | names
    assert faults(change("tables / public.launches / columns", columns)) == [
        f"{LAUNCHES}.columns: 3 paths give 'ship_to': say \"as another_name\""
    ]


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
        *("source: {url: x", "source: *nowhere", "a: b: c", "\tsource: x", "a: 2020-13-45"),
        *("a: !!python/object/apply:os.getcwd []", "a: b\n---\na: b", "a: \0", b"\xff\xfe\xff"),
        *(b"source: {url: caf\xe9}", "a: !!int ''", "a: !!timestamp noon", "a: !!bool maybe"),
        *("? [a]\n: b", "source: &s [*s]", "source: [{2020-01-01: a}]", "[" * 2_000),
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


def paths_in(value: Any, at: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
    """The paths of all values in nested objects that are neither objects nor null."""
    if isinstance(value, dict):
        return set().union(*(paths_in(inner, (*at, name)) for name, inner in value.items()))
    return set() if value is None else {at}


def test_names_that_redshift_or_the_load_has_taken_are_refused() -> None:
    names = ["oid", "tableoid", "xmin", "cmin", "xmax", "cmax", "ctid", "insertxid", "deletexid"]
    names += ["_run_id", "_loaded_at"]
    with pytest.raises(ConfigError) as caught:
        table_of(dict.fromkeys(["id", *names], "integer"))
    assert [n for n in names if f"the name {n!r} is reserved" not in str(caught.value)] == []


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
