"""How fast main.py is, beside other tools, the floor under them all, and itself as it was.

    python tests/bench/compare.py                 all that follows
    python tests/bench/compare.py --sizes 20000   one JSON file to staged files, by size
    python tests/bench/compare.py --small         205 launches from the source to the database
    python tests/bench/compare.py --against FILE  any of these with another main.py beside it,
                                                  whose CSV must be the same

Prints tables in Markdown, and draws compare.png of several sizes. Each run is a
process of its own, the contenders take turns, the tables show medians. Needs the extra `dev`;
inputs and the other tools' environments are kept in .cache/bench.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import yaml

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent.parent
MAIN, CONFIG = ROOT / "sequra_challenge" / "main.py", ROOT / "conf" / "pipeline.yaml"
PINNED = {
    "duckdb": ["duckdb==2.0.1"],
    "polars": ["polars==2.1.0"],
    "awswrangler": ["awswrangler==3.17.1", "pandas==3.1.1", "pyarrow==25.0.1"],
    "dlt": ["dlt[filesystem]==1.31.0"],
    "plot": ["matplotlib==3.11.2"],
}
TITLES = {
    "ours": "main.py",
    "both": "main.py, both tables",
    "duckdb": "DuckDB",
    "polars": "polars",
    "pandas": "pandas",
    "awswrangler": "awswrangler",
    "dlt": "dlt",
    "floor": "json.loads and zlib alone",
    "imports": "importing main.py's packages",
}
PEERS = ["both", "duckdb", "polars", "pandas", "awswrangler", "dlt", "floor"]
SIZES = [20_000, 100_000, 1_000_000]
MOST = 100_000  # for all but these, which do not hold all launches in memory:
STREAMING = ("ours", "duckdb", "floor")


class Usage(NamedTuple):
    """What a run took: wall-clock seconds, CPU seconds (user and system), peak megabytes."""

    wall: float
    cpu: float
    memory: float


Runs = dict[str, list[Usage]]


def of_each(figure: Callable[..., float], usages: list[Usage]) -> Usage:
    """A figure of several runs, such as the median, of each thing measured."""
    return Usage(*map(figure, zip(*usages, strict=True)))


def print_table(title: str, runs: Runs, rows: int) -> None:
    """Prints the medians, and how many times those of main.py they are."""
    print(f"\n| {title} | launches a second | seconds | CPU seconds | peak memory, MB |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, usages in runs.items():
        usage = of_each(median, usages)
        cells = [TITLES[name], f"{rows / usage.wall:,.0f}"]
        for value, base in zip(usage, of_each(median, runs["ours"]), strict=True):
            ratio = f" ({value / base:.2f}x)" if name != "ours" else ""
            cells.append(f"{value:,.{0 if value >= 20 else 2}f}{ratio}")
        print(f"| {' | '.join(cells)} |", flush=True)


def note(text: str) -> None:
    """Shows on standard error how far it is."""
    print(text, file=sys.stderr, flush=True)


def check(rows: int, command: list[Any], environment: dict[str, str]) -> None:
    """Ends the program unless the command prints this number of rows."""
    text = list(map(str, command))
    done = subprocess.run(text, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode or int(done.stdout) != rows:
        said = done.stdout + done.stderr
        sys.exit(f"wrong files, {rows} rows expected: {shlex.join(text)}:\n{said}")


class Bench:
    """The folder with inputs, environments and what a run writes, and the servers meanwhile."""

    def __init__(self, folder: Path, servers: contextlib.ExitStack, against: Path | None) -> None:
        self.folder, self.servers, self.against = folder, servers, against
        self.run, self.kept, self.environment = folder / "run", folder / "kept", dict[str, str]()

    def clear(self) -> None:
        """Empties the folder of a run."""
        shutil.rmtree(self.run, ignore_errors=True)
        self.run.mkdir(parents=True)

    def input(self, rows: int) -> Path:
        """A JSON file of so many launches, made when it is not there yet."""
        path = self.folder / f"launches-{rows}.json"
        if not path.exists():
            note(f"making {path}")
            subprocess.run([sys.executable, BENCH / "generate.py", str(rows), path], check=True)
        note(f"{path.name}: {path.stat().st_size / 1e6:.0f} MB")
        return path

    def python(self, name: str) -> Path:
        """The Python of a tool's own environment, which is made when it is not there yet."""
        home, wanted = self.folder / "environments" / name, "\n".join(PINNED[name])
        installed = home / "installed"
        if not installed.exists() or installed.read_text() != wanted:
            note(f"pip install {' '.join(PINNED[name])}")
            venv.create(home, clear=True, with_pip=True)
            pip = [home / "bin" / "python", "-m", "pip", "install", "-q", *PINNED[name]]
            subprocess.run(pip, check=True, stderr=subprocess.DEVNULL)
            installed.write_text(wanted)
        return home / "bin" / "python"

    def tool(self, name: str, job: str, *arguments: Any) -> list[Any]:
        """The command that runs a job of contenders.py."""
        python = self.python(name) if name in PINNED else sys.executable
        return [python, BENCH / "contenders.py", job, *arguments]

    def measure(self, command: list[Any]) -> Usage:
        """Runs a command to its end; what it prints goes into files in the folder of the run.

        The kernel gives the memory of the largest process, and starts that of a new process at
        what its parent has used: so this program stays small, and leaves all else to others.
        """
        text, log = list(map(str, command)), self.run / "stderr"
        with (self.run / "stdout").open("wb") as stdout, log.open("wb") as stderr:
            start = time.perf_counter()
            environment = os.environ | self.environment
            process = subprocess.Popen(text, env=environment, stdout=stdout, stderr=stderr)
            _, status, usage = os.wait4(process.pid, 0)
            wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"{shlex.join(text)}:\n{log.read_text()[-2000:]}")
        return Usage(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1000)

    def in_turn(
        self, commands: dict[str, list[Any]], repeats: int, verify: Callable[[str, bool], None]
    ) -> Runs:
        """The runs of each contender: the first run of each, then the next of each.

        After each, what it wrote is verified; the function is told whether that was the first.
        """
        runs: Runs = {name: [] for name in commands}
        for number in range(repeats):
            for name, usages in runs.items():
                self.clear()
                usages.append(self.measure(commands[name]))
                note(f"  {name}: {usages[-1].wall:.2f} s, {usages[-1].memory:.0f} MB")
                verify(name, number == 0)
        return runs

    def start(self, *command: Any, **options: Any) -> subprocess.Popen[str]:
        """Starts a server, which ends with the bench."""
        server = subprocess.Popen(list(map(str, command)), text=True, **options)
        self.servers.callback(server.wait)
        self.servers.callback(server.terminate)
        return server

    def start_http(self, *module: Any, method: str = "GET", path: str = "/") -> str:
        """Starts a module that takes a port as its last argument; its URL, when it answers."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            url = "http://{}:{}".format(*free.getsockname())
        silent = dict.fromkeys(("stdout", "stderr"), subprocess.DEVNULL)
        self.start(sys.executable, "-m", *module, url.rpartition(":")[2], **silent)
        request = urllib.request.Request(url + path, method=method)
        for tries_left in reversed(range(150)):
            try:
                urllib.request.urlopen(request).close()
                break
            except urllib.error.URLError:
                if not tries_left:
                    raise
                time.sleep(0.2)
        return url


def dry_run(config: Path, source: Path, program: Path = MAIN) -> list[Any]:
    """The command of main.py that stages in $TMPDIR and goes no further."""
    return [sys.executable, program, "--dry-run", "--config", config, "--source", source]


# --- the tables ----------------------------------------------------------------------------------


def time_sizes(bench: Bench, peers: list[str], sizes: list[int], repeats: int) -> None:
    """One JSON file to staged files of all launches, at each size."""
    bench.environment = {"TMPDIR": str(bench.run), "RUNTIME__DLTHUB_TELEMETRY": "false"}
    if "awswrangler" in peers:
        moto = bench.start_http("moto.server", "-p", method="PUT", path="/bench")
        bench.environment |= {"AWS_ENDPOINT_URL": moto, "AWS_DEFAULT_REGION": "us-east-1"}
        keys = "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"
        bench.environment |= dict.fromkeys(keys, "bench")
    results = []
    asked = ["ours", *dict.fromkeys(["against", "both", *peers] if bench.against else peers)]
    for rows in sizes:
        names = [name for name in asked if rows <= MOST or name in STREAMING]
        for name, usages in time_size(bench, names, rows, repeats).items():
            usage = of_each(median, usages)._asdict()
            results.append({"name": TITLES[name], "rows": rows} | usage)
    if len(sizes) > 1 and not bench.against:
        path = bench.folder / "results.json"
        path.write_text(json.dumps(results))
        subprocess.run(bench.tool("plot", "plot", path, BENCH / "compare.png"), check=True)


def time_size(bench: Bench, names: list[str], rows: int, repeats: int) -> Runs:
    """One size; after the first run of each contender its rows are counted."""
    source, one_table = bench.input(rows), bench.folder / "one-table.yaml"
    shipped = yaml.safe_load(CONFIG.read_text())
    table = shipped["tables"]["public.launches"]
    one_table.write_text(yaml.safe_dump(shipped | {"tables": {"public.launches": table}}))
    csv, staged = bench.folder / "staged.csv", bench.run / "launches.csv.gz"
    parquet = "s3://bench/launches.parquet"
    (level,) = re.findall(r"^GZIP_LEVEL = (\d)", MAIN.read_text(), re.MULTILINE)
    jobs: dict[str, list[Any]] = {
        "duckdb": [staged, json.dumps(table["columns"])],
        "polars": [staged],
        "pandas": [staged],
        "awswrangler": [parquet],
        "dlt": [bench.run],
        "floor": [staged, csv, level],
    }
    commands = {name: bench.tool(name, name, source, *jobs[name]) for name in names if name in jobs}
    commands |= {"ours": dry_run(one_table, source), "both": dry_run(CONFIG, source)}
    if bench.against:
        commands["against"] = dry_run(CONFIG, source, bench.against)

    def verify(name: str, is_first: bool) -> None:
        if not is_first or name == "floor":  # it has no rows of its own
            return
        count = [sys.executable, BENCH / "verify.py", bench.run]
        if name == "both" and bench.against:
            count.append(bench.kept)
        if name == "awswrangler":
            count = bench.tool(name, "count_parquet", parquet)
        check(rows, count, bench.environment)
        if name == "ours":
            parts = sorted(bench.run.glob("sequra-*/public.launches.*.csv.gz"))
            with csv.open("wb") as file:
                subprocess.run(["gzip", "-dc", *parts], stdout=file, check=True)
        if name == "against":
            shutil.rmtree(bench.kept, ignore_errors=True)
            bench.run.rename(bench.kept)

    runs = bench.in_turn({name: commands[name] for name in names}, repeats, verify)
    size = source.stat().st_size / 1e6
    print_table(f"{rows:,} launches, {size:.0f} MB of JSON", runs, rows)
    if bench.against:
        # Of the least disturbed runs: on a busy machine the medians differ with equal programs.
        least, base = of_each(min, runs["both"]), of_each(min, runs["against"])
        print(
            f"\nBoth tables beside {bench.against.name}, best of {repeats} runs: "
            f"{least.wall / base.wall:.2f} times the seconds, {least.cpu / base.cpu:.2f} times the "
            f"CPU seconds, {least.memory / base.memory:.2f} times the memory. The CSV is the same."
        )
    return runs


def time_small(bench: Bench, repeats: int) -> None:
    """As many launches as the API has, from an HTTP server into tests/sandbox.py's database."""
    rows = 205
    source, bench.environment = bench.input(rows), {}
    served = bench.start_http("http.server", "-b", "127.0.0.1", "-d", bench.folder)
    command = [sys.executable, "-u", ROOT / "tests" / "sandbox.py", "--keep", "--source", source]
    sandbox = bench.start(*command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    psql = ""
    while "/psql " not in psql:  # the last line that it prints, after those with export
        psql = sandbox.stdout.readline() or sys.exit("tests/sandbox.py ended")
        if psql.startswith("export "):
            name, _, value = shlex.split(psql)[1].partition("=")
            bench.environment[name] = value
    delete = (
        "WITH deleted AS (DELETE FROM public.launches RETURNING 1) SELECT count(*) FROM deleted"
    )
    programs = {"ours": MAIN} | ({"against": bench.against} if bench.against else {})
    options = ["--config", CONFIG, "--source", f"{served}/{source.name}"]
    commands = {name: [sys.executable, program, *options] for name, program in programs.items()}
    packages = "import requests, pandas, boto3, yaml, redshift_connector"
    commands["imports"] = [sys.executable, "-c", packages]

    def verify(name: str, _: bool) -> None:
        if name != "imports":
            check(rows, [*shlex.split(psql), "-qAtc", delete], {})

    runs = bench.in_turn(commands, repeats, verify)
    print_table(f"{rows} launches into the database", runs, rows)
    cpu = {name: of_each(min, usages).cpu for name, usages in runs.items()}
    for name in programs:
        times = f"{cpu[name] / cpu['imports']:.2f} times the CPU seconds of importing the packages"
        print(f"\n{TITLES[name]}, best of {repeats}: {times}.")


def machine() -> str:
    """What the figures were measured on, and with."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    tools = [f"pandas {version('pandas')}"]
    tools += [re.sub(r"(\[.*)?==", " ", PINNED[name][0]) for name in PINNED if name in PEERS]
    return (
        f"{datetime.now(UTC):%d %B %Y}, {model[1] if model else platform.machine()}, "
        f"{os.cpu_count()} cores, {memory:.0f} GB, Python {platform.python_version()}, "
        + ", ".join(tools)
    )


def main() -> None:
    """Measures what is asked for, or everything."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--sizes", type=int, nargs="+", metavar="N", help=f"default: {SIZES}")
    option("--small", action="store_true")
    option("--against", type=Path, metavar="FILE", help="another main.py, to compare with")
    option("--contenders", nargs="*", choices=PEERS, default=PEERS, help="beside main.py")
    option("--repeats", type=int, default=3, help="default: 3; --small makes three times as many")
    option("--folder", type=Path, default=ROOT / ".cache" / "bench", help="default: .cache/bench")
    given = parser.parse_args()
    everything = not (given.sizes or given.small)
    given.folder.mkdir(parents=True, exist_ok=True)
    if given.against:
        TITLES["against"] = f"{given.against.name}, both tables"
    with contextlib.ExitStack() as servers:
        bench = Bench(given.folder.resolve(), servers, given.against)
        if given.sizes or everything:
            time_sizes(bench, given.contenders, given.sizes or SIZES, given.repeats)
        if given.small or everything:
            time_small(bench, 3 * given.repeats)
        bench.clear()
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
