"""Counts the rows of staged files, or compares those of main.py with another's, byte by byte.

    python tests/bench/verify.py FOLDER [OTHER]

A program of its own, because a process that compare.py starts would be taken to use at least as
much memory as compare.py has used.
"""

from __future__ import annotations

import csv
import gzip
import re
import sys
from collections.abc import Iterator
from itertools import islice, zip_longest
from pathlib import Path

csv.field_size_limit(1 << 30)
STAGED = ("launches.csv.gz", "sequra-*/public.launches.*.csv.gz", "out/dlt/launches/*.csv.gz")


def rows(folder: Path) -> int:
    """The number of rows in gzipped CSV files, each with a header."""
    count = 0
    for file in (file for pattern in STAGED for file in folder.glob(pattern)):
        with gzip.open(file, "rt", encoding="utf-8", newline="") as text:
            count += sum(1 for _ in csv.reader(text)) - 1
    return count


def tables(folder: Path) -> set[str]:
    """The tables that main.py has staged."""
    return {file.name.rsplit(".", 3)[0] for file in folder.glob("sequra-*/*.csv.gz")}


def lines(folder: Path, table: str) -> Iterator[bytes]:
    """The lines of all parts of a table, with one header, and NULL for each run's own text."""
    (null,) = re.findall(rb"^NULL AS '(.*)'", (folder / "stdout").read_bytes(), re.MULTILINE)[:1]
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


if __name__ == "__main__":
    staged, *others = map(Path, sys.argv[1:])
    for other in others:
        compare_bytes(staged, other)
    print(rows(staged))
