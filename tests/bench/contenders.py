"""The job of main.py as other tools do it, the floor under it, and the plot of both.

    python tests/bench/contenders.py NAME ARGUMENT…

compare.py runs each function here as a process of its own, in an environment that has its tool.
A contender turns a JSON file into staged files of all launches: one table, a column for each path,
arrays as JSON.
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


def floor(source: str, target: str, csv: str, level: str) -> None:
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


def frame_of(source: str) -> Any:
    """All records in one frame of pandas."""
    import pandas as pd

    with Path(source).open("rb") as file:
        return pd.json_normalize(json.load(file), sep="_")


def pandas(source: str, target: str) -> None:
    """Gzip at the level that pandas takes, 9."""
    frame_of(source).to_csv(target, index=False, compression="gzip")


def awswrangler(source: str, url: str) -> None:
    """The same frame as Parquet, which awswrangler prefers for Redshift, in S3."""
    import awswrangler as wr

    wr.s3.to_parquet(frame_of(source), url)


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


def plot(source: str, target: str) -> None:
    """Draws the results of compare.py: time and memory over the number of launches."""
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    mpl.use("agg")
    results = json.loads(Path(source).read_text())
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    titles = {"wall": "Wall-clock time, seconds", "memory": "Peak memory, MB"}
    for panel, (measure, title) in zip(panels, titles.items(), strict=True):
        for name in dict.fromkeys(row["name"] for row in results):  # thick: main.py, dashed: floor
            rows = [row for row in results if row["name"] == name]
            style = {"linewidth": 3 if name == "main.py" else 1.5, "marker": "o"}
            style["linestyle"] = "--" if "alone" in name else "-"
            sizes, values = [row["rows"] for row in rows], [row[measure] for row in rows]
            panel.loglog(sizes, values, label=name, **style)
        panel.set(title=title, xlabel="launches", xticks=sorted({row["rows"] for row in results}))
        panel.grid(which="both", alpha=0.2)
        panel.xaxis.set_major_formatter("{x:,.0f}")
        panel.yaxis.set_major_formatter("{x:,g}")
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_minor_formatter("")
    panels[0].legend()
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
