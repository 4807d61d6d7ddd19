"""Draws the results of compare.py: time and memory over the number of launches.

python tests/bench/plot.py RESULTS.json PLOT.png
"""

import json
import sys
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.ticker import NullFormatter

mpl.use("agg")


def main(results: Path, target: Path) -> None:
    """Draws a line for each contender: thick for main.py, dashed for the floor."""
    lines: dict[str, list[dict]] = {}
    for row in json.loads(results.read_text()):
        lines.setdefault(row["name"], []).append(row)
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    titles = {"wall": "Wall-clock time, seconds", "memory": "Peak memory, MB"}
    for panel, (measure, title) in zip(panels, titles.items(), strict=True):
        for name, rows in lines.items():
            panel.loglog(
                [row["rows"] for row in rows],
                [row[measure] for row in rows],
                label=name,
                marker="o",
                linewidth=3 if name == "main.py" else 1.5,
                linestyle="--" if "alone" in name else "-",
            )
        panel.set_title(title)
        panel.set_xlabel("launches")
        panel.set_xticks(sorted({row["rows"] for rows in lines.values() for row in rows}))
        panel.grid(which="both", alpha=0.2)
        panel.xaxis.set_major_formatter("{x:,.0f}")
        panel.yaxis.set_major_formatter("{x:,g}")
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.yaxis.set_minor_formatter(NullFormatter())
    panels[0].legend()
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
