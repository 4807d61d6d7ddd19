"""The job of main.py as other tools do it, and the floor under it.

    python tests/bench/contenders.py NAME ARGUMENT…

compare.py runs each function here as a process of its own, in an environment that has its tool.
Each turns a JSON file into staged files of all launches: one table, a column for each path, arrays
as JSON.
"""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path
from typing import Any

# The columns in which dlt is to keep an array as JSON, instead of making a table of it.
ARRAYS = (
    "failures crew ships capsules payloads cores fairings__ships links__flickr__small "
    "links__flickr__original"
)


def floor(source: str, csv: str, target: str, level: str) -> None:
    """The JSON parsed once, and the CSV that main.py made of it compressed: nothing between."""
    with Path(source).open("rb") as lines:
        for line in lines:
            if line[:1] == b"{":
                json.loads(line.rstrip(b",\n"))
    packer = zlib.compressobj(int(level), wbits=31)
    with Path(csv).open("rb") as rows, Path(target).open("wb") as file:
        while piece := rows.read(1 << 20):
            file.write(packer.compress(piece))
        file.write(packer.flush())


def duckdb(source: str, target: str, columns: str) -> None:
    """Read with the types of the configuration, arrays as JSON; in no order, which takes less."""
    import duckdb as db

    types: dict[str, Any] = {}
    selected = []
    for path, kind in json.loads(columns).items():
        names = path.split(".")
        selected.append('"{}" AS {}'.format('"."'.join(names), "_".join(names)))
        objects = types
        for name in names[:-1]:
            objects = objects.setdefault(name, {})
        objects[names[-1]] = kind.removesuffix(" not null").replace("super", "json")

    def type_of(kind: Any) -> str:
        if isinstance(kind, str):
            return kind
        return f"struct({', '.join(f'{name} {type_of(inner)}' for name, inner in kind.items())})"

    given = {name: type_of(kind) for name, kind in types.items()}
    db.sql("SET preserve_insertion_order = false; SET TimeZone = 'UTC'")
    db.sql(
        f"COPY (SELECT {', '.join(selected)} "
        f"FROM read_json('{source}', format = 'array', columns = {given})) "
        f"TO '{target}' (FORMAT csv, COMPRESSION gzip)"
    )


def polars(source: str, target: str) -> None:
    """All records in one frame; its types inferred from all, or a late field would be lost."""
    import polars as pl

    frame = pl.read_json(source, infer_schema_length=None)
    while structs := [name for name, kind in frame.schema.items() if kind == pl.Struct]:
        frame = frame.unnest(structs, separator="_")
    arrays = [name for name, kind in frame.schema.items() if kind == pl.List]
    frame = frame.with_columns(  # of the arrays, which CSV cannot hold, JSON: {"name":[…]} cut
        pl.when(pl.col(name).is_not_null()).then(
            pl.struct(name).struct.json_encode().str.slice(len(name) + 4).str.head(-1)
        )
        for name in arrays
    )
    frame.write_csv(target, compression="gzip")


def pandas(source: str, target: str) -> None:
    """All records in one frame; gzip at the level that pandas takes, 9."""
    import pandas as pd

    with Path(source).open("rb") as file:
        frame = pd.json_normalize(json.load(file), sep="_")
    frame.to_csv(target, index=False, compression="gzip")


def awswrangler(source: str, url: str) -> None:
    """The same frame as Parquet, which awswrangler prefers for Redshift, in S3."""
    import awswrangler as wr
    import pandas as pd

    with Path(source).open("rb") as file:
        frame = pd.json_normalize(json.load(file), sep="_")
    wr.s3.to_parquet(frame, url)


def count_parquet(url: str) -> None:
    """Prints the number of rows in S3."""
    import awswrangler as wr

    print(len(wr.s3.read_parquet(url, columns=["id"])))


def dlt(source: str, folder: str) -> None:
    """Its filesystem destination with gzipped CSV files."""
    import dlt
    from dlt.common import json
    from dlt.destinations import filesystem

    def records():
        with Path(source).open("rb") as file:
            yield json.load(file)

    pipeline = dlt.pipeline(
        "bench",
        destination=filesystem(bucket_url=f"{folder}/out"),
        dataset_name="dlt",
        pipelines_dir=f"{folder}/work",
    )
    columns = {name: {"data_type": "json"} for name in ARRAYS.split()}
    columns["date_local"] = {"data_type": "text"}  # a timestamp would lose the offset
    pipeline.run(records(), table_name="launches", columns=columns, loader_file_format="csv")


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
