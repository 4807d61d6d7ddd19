"""Counts the rows of staged files, and compares those of main.py with the JSON, value by value,
or with those of another main.py, byte by byte.

    python tests/bench/verify.py FOLDER [--config YAML --source JSON | --against FOLDER]

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
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from sequra_challenge.main import load_config  # noqa: E402

csv.field_size_limit(1 << 30)
STAGED = ("launches.csv.gz", "sequra-*/public.launches.*.csv.gz", "out/dlt/launches/*.csv.gz")
READ: dict[str, Callable[[str], Any]] = {
    "boolean": lambda cell: {"t": True, "f": False}[cell],
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


def null_text(folder: Path) -> str:
    """What stands for NULL in the CSV of a run, whose output is there: each has its own."""
    (null,) = re.findall(r"^NULL AS '(.*)'", (folder / "stdout").read_text(), re.MULTILINE)[:1]
    return null


def tables(folder: Path) -> set[str]:
    """The tables that main.py has staged."""
    return {file.name.rsplit(".", 3)[0] for file in folder.glob("sequra-*/*.csv.gz")}


def lines(folder: Path, table: str) -> Iterator[bytes]:
    """The lines of all parts of a table, with one header."""
    null = null_text(folder).encode()
    for number, file in enumerate(sorted(folder.glob(f"sequra-*/{table}.*.csv.gz"))):
        with gzip.open(file) as part:
            yield from (line.replace(null, b"NULL") for line in islice(part, number > 0, None))


def compare_bytes(folder: Path, other: Path) -> None:
    """Raises ValueError at the first difference between the CSV of two runs of main.py."""
    if tables(folder) != tables(other):
        raise ValueError(f"tables: {tables(folder)}, not {tables(other)}")
    for table in sorted(tables(folder)):
        pairs = zip_longest(lines(folder, table), lines(other, table), fillvalue=b"")
        for number, (found, wanted) in enumerate(pairs, 1):
            if found != wanted:
                place = next(n for n in range(len(found) + 1) if found[: n + 1] != wanted[: n + 1])
                shown = slice(max(0, place - 30), place + 31)
                at = f"{table}, line {number}, byte {place + 1}"
                raise ValueError(f"{at}: {found[shown]!r}, not {wanted[shown]!r}")


def compare(config: Path, source: Path, folder: Path, files: list[Path]) -> int:
    """Raises ValueError at the first value that differs; returns the number of rows."""
    null = null_text(folder)
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
    parser.add_argument("--against", type=Path)
    given = parser.parse_args()
    files = sorted(file for pattern in STAGED for file in given.folder.glob(pattern))
    if given.against:
        compare_bytes(given.folder, given.against)
    if given.config:
        print(compare(given.config, given.source, given.folder, files))
    else:
        print(sum(1 for _ in rows(files)))
