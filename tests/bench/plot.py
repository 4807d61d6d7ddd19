"""Draws the results of compare.py: time and memory over the number of launches.

python tests/bench/plot.py RESULTS.json PLOT.png
"""

import json
import sys
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt

mpl.use("agg")
results = json.loads(Path(sys.argv[1]).read_text())
figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
titles = {"wall": "Wall-clock time, seconds", "memory": "Peak memory, MB"}
for panel, (measure, title) in zip(panels, titles.items(), strict=True):
    for name in dict.fromkeys(row["name"] for row in results):  # thick for main.py, dashed: floor
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
figure.savefig(sys.argv[2], dpi=110)
