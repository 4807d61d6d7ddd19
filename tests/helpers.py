"""Small configurations, read by the program as it reads any other."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from sequra_challenge import main

# conf/pipeline.yaml. Its scalars are texts, as the program takes them: `on` is not True.
SHIPPED: dict[str, Any] = yaml.load(main.DEFAULT_CONFIG.read_bytes(), yaml.BaseLoader)
SECTIONS: dict[str, Any] = {
    "source": {"url": "https://example.org/v5/launches"},
    "staging": {"bucket": "bucket", "prefix": "spacex"},
    "redshift": {"secret": "redshift/spacex"},
}


def config_of(tables: dict[str, Any], **sections: Any) -> main.Config:
    """A configuration with these tables; JSON is YAML as well."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pipeline.yaml"
        path.write_text(json.dumps(SECTIONS | sections | {"tables": tables}))
        return main.load_config(path)


def table_of(columns: dict[str, str], key: str | list[str] = "id", **settings: Any) -> main.Table:
    """The table public.things with these columns."""
    settings = {"key": key, "columns": columns, **settings}
    return config_of({"public.things": settings}).tables[0]


def columns_of(
    records: list[dict[str, Any]], table: main.Table, served: main.Fields | None = None
) -> main.Columns:
    """The typed columns of records, made of two batches."""
    columns: main.Columns = {column.name: [] for column in table.columns}
    for batch in (records[:2], records[2:]):
        main.flatten(batch, table, columns, main.Fields(set) if served is None else served)
    return main.transform(columns, table)


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file one by one, as the program reads them in batches."""
    for batch in main.read_batches(path):
        assert 0 < len(batch) <= main.BATCH_RECORDS
        yield from batch
