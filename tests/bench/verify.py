"""Counts the rows of staged files, and compares those of main.py with the JSON, value by value.

    python tests/bench/verify.py FOLDER [--config YAML --source JSON]

A program of its own, because a process that compare.py starts would be taken to use at least as
much memory as compare.py has used.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import re
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from sequra_challenge.main import load_config  # noqa: E402

csv.field_size_limit(1 << 30)
STAGED = ("launches.csv.gz", "sequra-*/public.launches.*.csv.gz", "out/dlt/launches/*.csv.gz")
READ: dict[str, Callable[[str], Any]] = {
    "boolean": lambda cell: {"true": True, "false": False}[cell.lower()],
    "integer": int,
    "bigint": int,
    "timestamptz": datetime.fromisoformat,
    "super": json.loads,
}


def rows(files: list[Path]) -> Iterator[list[str]]:
    """The rows of gzipped CSV files, each with a header."""
    for file in files:
        with gzip.open(file, "rt", encoding="utf-8", newline="") as text:
            reader = csv.reader(text)
            next(reader)
            yield from reader


def compare(config: Path, source: Path, folder: Path, files: list[Path]) -> int:
    """Raises ValueError at the first value that differs; returns the number of rows."""
    (null,) = re.findall(r"^NULL AS '(.*)'", (folder / "stdout").read_text(), re.MULTILINE)[:1]
    columns = load_config(config).tables[0].columns
    count = 0
    with source.open(encoding="utf-8") as lines:
        records = (json.loads(line.rstrip(",\n")) for line in lines if line[:1] == "{")
        for count, (record, row) in enumerate(zip(records, rows(files), strict=True), 1):
            for column, cell in zip(columns, row, strict=True):
                wanted: Any = record
                for name in column.path:
                    wanted = wanted.get(name) if isinstance(wanted, dict) else None
                if column.kind == "timestamptz" and wanted is not None:
                    wanted = datetime.fromisoformat(wanted)
                found = None if cell == null else READ.get(column.kind, str)(cell)
                if found != wanted or type(found) is not type(wanted):
                    raise ValueError(f"row {count}, {column.name}: {found!r}, not {wanted!r}")
    return count


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--source", type=Path)
    given = parser.parse_args()
    files = sorted(file for pattern in STAGED for file in given.folder.glob(pattern))
    if given.config:
        print(compare(given.config, given.source, given.folder, files))
    else:
        print(sum(1 for _ in rows(files)))
