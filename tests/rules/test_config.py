"""Reading and checking conf/pipeline.yaml."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest

from helpers import REMOVED, ROLE, SECTIONS, Config, ConfigError, changed, load_config, table_of
from sandbox import PIPELINE

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
LAUNCHES, CORES = "tables.public.launches", "tables.public.launch_cores"
OPEN, ELEMENTS = "tables / public.launches", "tables / public.launch_cores"


@pytest.fixture(autouse=True)
def no_role(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ROLE_ARN", raising=False)


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


def valid_but(at: str, value: Any) -> Any:
    """The valid configuration with one thing changed: its keys, joined by " / "."""
    return changed(VALID, {at: value})


def test_a_valid_file_is_read() -> None:
    config = read(valid_but("staging / kms_key", "alias/loads"))
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
    key, _, small, *_ = launches.columns
    assert (key.type, key.not_null) == ("varchar(24)", True)
    assert (small.path, small.name) == (("links", "patch", "small"), "links_patch_small")
    assert (small.type, small.not_null) == ("varchar(1024)", False)


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
def test_a_wrong_setting_is_refused(at: str, value: Any, said: str) -> None:
    setting = at.replace(" / ", ".") + ": "
    assert [fault for fault in faults(valid_but(at, value)) if fault.startswith(setting + said)]


@pytest.mark.parametrize(
    ("at", "value", "fault"),
    [
        ("source", None, "source.url: missing"),
        ("staging", None, "staging.bucket: missing"),
        ("redshift", REMOVED, "redshift.secret: missing"),
        (OPEN, None, f"{LAUNCHES}.columns: missing"),
        (f"{OPEN} / rows", "cores", f"{LAUNCHES}: rows and parent"),
        (f"{OPEN} / parent", "launch", f"{LAUNCHES}: rows and parent"),
        (f"{ELEMENTS} / parent", REMOVED, f"{CORES}: rows and parent"),
        ("source / headers", {"Key": "${NO}"}, "source.headers.Key: ${NO} is not set"),
        ("source / url", "https://example.org/${NO}", "source.url: ${NO} is not set"),
        ("redshift / audit_table", "null", "redshift.audit_table: cannot be null, "),
    ],
)
def test_what_does_not_go_together_is_refused(at: str, value: Any, fault: str) -> None:
    assert [line for line in faults(valid_but(at, value)) if line.startswith(fault)]


WRONG_TYPES: dict[str, list[Any]] = {
    ": must match (boolean|smallint|": [
        *("varchar", "varchar(max)", "varchar(-1)", "varchar(٣)", "VARCHAR(24)", "char(24)"),
        *("text", "int", "float", "decimal", "decimal(5)", "integer null", "integer not  null"),
        *("integer; drop table x", "strnig", 24, ["integer"], {"type": "integer"}),
    ],
    ": varchar takes 1 to 65535": ["varchar(0)", "varchar(65536)"],
    ": decimal takes 1 to 38": ["decimal(39,2)", "decimal(0,0)"],
    ": the scale is larger than the precision": ["decimal(5,6)"],
    ": missing": ["", None],
}


@pytest.mark.parametrize(
    ("wrong", "said"), [(wrong, said) for said, cases in WRONG_TYPES.items() for wrong in cases]
)
def test_a_wrong_type_is_refused_and_named(wrong: Any, said: str) -> None:
    (fault,) = faults(valid_but(f"{OPEN} / columns / mass", wrong))
    assert fault.startswith(f"{LAUNCHES}.columns.mass: ")
    assert said in fault
    assert str(wrong or "missing") in fault


@pytest.mark.parametrize(
    "type_",
    [
        *("boolean", "smallint", "integer", "bigint", "real", "double precision", "decimal(1,0)"),
        *("decimal(38,38)", "varchar(1)", "varchar(65535)", "date", "timestamp", "timestamptz"),
        "super",
    ],
)
def test_every_type_is_accepted(type_: str) -> None:
    for suffix in ("", " not null"):
        column = read(valid_but(f"{OPEN} / columns / mass", type_ + suffix)).tables[0].columns[3]
        assert (column.type, column.not_null) == (type_, bool(suffix))


@pytest.mark.parametrize("path", ["naïve", "1st", "a" * 128, ".a", "a.", "a..b", ""])
def test_a_name_that_is_no_column_is_refused(path: str) -> None:
    (fault,) = faults(valid_but(f"{OPEN} / columns", COLUMNS | {path: "integer"}))
    assert fault.startswith(f"{LAUNCHES}.columns.{path}: ")


def test_names_that_redshift_or_the_load_has_taken_are_refused() -> None:
    reserved = "oid tableoid xmin cmin xmax cmax ctid insertxid deletexid _run_id _loaded_at"
    for path in (*reserved.split(), "_run.id"):
        name = path.replace(".", "_")
        assert faults(valid_but(f"{OPEN} / columns", COLUMNS | {path: "integer"})) == [
            f'{LAUNCHES}.columns.{path}: the name {name!r} is reserved: say "as another_name"'
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
        *("? [a]\n: b", "[" * 2_000),
    ],
)
def test_what_is_not_valid_yaml_is_refused(content: str | bytes) -> None:
    with pytest.raises(ConfigError, match=r"^/.*/pipeline\.yaml: not valid YAML: "):
        read(content)


TWICE = {
    "public.a": "public.a: {}\n  public.b: {}\n  public.a: {}",
    "id": "public.a:\n    columns:\n      id: integer\n      id: integer",
    "'id'": "public.a: {columns: {id: integer, 'id' : date}}",
    '"id"': 'public.a: {columns: {id: integer, "id": date}}',
}


@pytest.mark.parametrize("again", TWICE)
def test_a_key_that_stands_twice_is_refused(again: str) -> None:
    name = again.strip("'\"")
    with pytest.raises(ConfigError, match=f"'{re.escape(name)}' stands twice"):
        read(f"tables:\n  {TWICE[again]}\n")


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


def test_headers_take_secrets_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_TOKEN", "t0ken")
    config = read(valid_but("source / headers", {"Authorization": "Bearer ${API_TOKEN}"}))
    assert config.source.headers == {"Authorization": "Bearer t0ken"}


@pytest.mark.parametrize(
    ("configured", "variable", "used"),
    [
        (None, None, None),
        (None, "", None),
        (None, ROLE, ROLE),
        (f"{ROLE}2", ROLE, f"{ROLE}2"),
        (f"{ROLE},{ROLE}2", None, f"{ROLE},{ROLE}2"),
    ],
)
def test_the_copy_role(
    monkeypatch: pytest.MonkeyPatch, configured: Any, variable: str | None, used: str | None
) -> None:
    if variable is not None:
        monkeypatch.setenv("AWS_ROLE_ARN", variable)
    assert read(valid_but("redshift / copy_role", configured)).redshift.copy_role == used


def paths_in(value: Any, at: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
    """The paths of all values in nested objects that are neither objects nor null."""
    if isinstance(value, dict):
        return set().union(*(paths_in(inner, (*at, name)) for name, inner in value.items()))
    return set() if value is None else {at}


def test_the_shipped_configuration_loads_every_field_of_the_sample(sample: Path) -> None:
    launches, cores = load_config(PIPELINE).tables
    records = json.loads(sample.read_text(encoding="utf-8"))
    served = set().union(*map(paths_in, records))
    assert len(served) > 30
    assert served <= {column.path for column in launches.columns}
    assert set().union(*records) <= {column.path[0] for column in launches.columns}
    elements = [core for record in records for core in record["cores"]]
    assert {(name,) for name in set().union(*elements)} <= {c.path for c in cores.columns}
