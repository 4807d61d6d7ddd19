"""The files in conf/cron, installed with its README's commands and run by the real daemons.

Each test boots a machine for that: systemd in a container (systemd-nspawn) that sees this machine's
files below an overlay, which takes all changes and is gone afterwards.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
import yaml

from helpers import responds
from sandbox import DATA, ROOT, Sandbox, answer

MACHINE = DATA / "machine"

pytestmark = pytest.mark.ci

# A value for the environment, and how conf/cron/environment says that it has to be written there.
ODD = """pa$word!x\\y & #1 100% "two" 'one' `id` $(id) ~ end\\"""
QUOTED = '"' + re.sub(r'([\\"$`])', r"\\\1", ODD) + '"'

Machine = Callable[[str], str]


@pytest.fixture
def machine(sandbox: Sandbox, needed: Callable[[str], str], tmp_path: Path) -> Machine:
    """Boots a machine that has the program, runs a script in it and returns what it printed."""
    needed("systemd-nspawn")
    as_root = [needed("sudo"), "-n", "unshare", "--mount"]
    if not os.environ.get("CI") and subprocess.run([*as_root, "true"], check=False).returncode:
        pytest.skip("needs root")
    with Path(needed("poetry")).open(encoding="utf-8") as file:
        poetry_python = file.readline().removeprefix("#!").strip()
    poetry_packages = subprocess.check_output(
        [poetry_python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    )
    binds = {
        "/srv/python": sys.base_prefix,
        "/srv/poetry": poetry_packages.strip(),
        "/srv/.venv": sysconfig.get_path("purelib"),
        "/etc/systemd/system/test.service": MACHINE / "test.service",
    }
    options = [f"--bind-ro={path}:{there}" for there, path in binds.items()]

    releases(tmp_path, sandbox.source.url)
    moved = {"SSL_CERT_FILE": "/etc/sandbox-ca.pem", "LD_LIBRARY_PATH": "/srv/python/lib"}
    environment = sandbox.environment | moved
    lines = [f"{name}={value}\n" for name, value in environment.items()]
    (tmp_path / "environment").write_text("".join(lines) + f"ODD={QUOTED}\n")
    (tmp_path / "ca").write_bytes(sandbox.redshift.ca.read_bytes())
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    install = script("install.sh", python=version, release=readme("## A release")[1])

    def run(commands: str) -> str:
        (tmp_path / "script").write_text(install + commands)
        command = [*as_root, "sh", str(MACHINE / "boot.sh"), f"--bind={tmp_path}:/test", *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=360, check=False)
        if not (tmp_path / "output").exists():
            pytest.skip(f"no container can be booted here: {done.stdout}{done.stderr}")
        output = (tmp_path / "output").read_text("utf-8")
        assert done.returncode == 0, output
        return output

    return run


def releases(folder: Path, source: str) -> None:
    """A clone of the project that has v1.2.0, and a tarball of v1.3.0 as deploy.yml makes it."""
    clone = folder / "clone"
    for name in ("conf", "sequra_challenge"):
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("poetry.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, clone)
    pipeline = clone / "conf" / "pipeline.yaml"
    text = pipeline.read_text("utf-8")
    for name in ("pipeline", "second"):
        (url,) = re.findall("  url: .*", text)
        other = f'  url: {source}/{name}\n  headers: {{X-Odd: "${{ODD}}"}}'
        changed = text.replace(url, other)
        pipeline.with_stem(name).write_text(changed, "utf-8")
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "1.2.0"], ["tag", "v1.2.0"]):
        subprocess.run([*git, *command], cwd=clone, check=True)

    (clone / "conf" / "examples" / "news.yaml").unlink()
    deploy = yaml.safe_load((ROOT / ".github/workflows/deploy.yml").read_text("utf-8"))
    (pack,) = (step for step in deploy["jobs"]["deploy"]["steps"] if step.get("name") == "Pack")
    environment = os.environ | {"RUNNER_TEMP": str(folder)}
    subprocess.run(["bash", "-c", pack["run"]], cwd=clone, env=environment, check=True)
    (folder / "package.tar.gz").rename(folder / "sequra-challenge-v1.3.0.tar.gz")


def script(name: str, **parts: str) -> str:
    """A script in tests/data/machine, with parts in the place of @name@."""
    text = (MACHINE / name).read_text("utf-8")
    for part, lines in parts.items():
        assert f"@{part}@" in text
        text = text.replace(f"@{part}@", lines)
    return text


def readme(heading: str) -> list[str]:
    """The commands below a heading of conf/cron/README.md."""
    text = (ROOT / "conf" / "cron" / "README.md").read_text("utf-8")
    section = text.partition(f"\n{heading}\n")[2]
    return re.findall(r"```sh\n(.*?)```", re.split(r"\n##", section)[0], re.DOTALL)


def runs(sandbox: Sandbox) -> list[tuple[str, str]]:
    """The pipelines that filled the tables, and the ids of their runs, in their order."""
    assert sandbox.query("SELECT count(*) FROM public.launches") == [{"count": 30}]
    sql = "SELECT DISTINCT source, _run_id, started_at FROM public.etl_runs ORDER BY started_at"
    return [(row["source"].rpartition("/")[2], row["_run_id"]) for row in sandbox.query(sql)]


def sent(sandbox: Sandbox) -> list[str]:
    """What each request had of the environment."""
    return [headers["X-Odd"] for headers in sandbox.source.headers]


def test_systemd(sandbox: Sandbox, machine: Machine, tmp_path: Path) -> None:
    install, try_out = readme("## With systemd")
    aws = (ROOT / "conf" / "aws" / "README.md").read_text("utf-8")
    (to_file,) = re.findall(r"```ini\n(.*?)```", aws, re.DOTALL)

    def succeed(handler: BaseHTTPRequestHandler) -> None:
        answer(handler, 200, sandbox.source.body)

    fails, is_away = responds(404), responds(429, Retry_After="2000")
    sandbox.source.answers = [succeed, succeed, succeed, fails, is_away, succeed]
    printed = machine(script("systemd.sh", install=install, to_file=to_file, try_out=try_out))
    assert re.search(r"05:30:00 IST .* sequra-challenge@pipeline.timer", printed), printed
    journal = printed.rpartition("+ journalctl")[2]
    assert "sequra-challenge[" in journal
    _, *loaded = runs(sandbox)
    assert [name for name, _ in loaded] == ["pipeline"] * 3
    assert [run_id for _, run_id in loaded if run_id not in journal] == []
    assert journal.count("Scheduled restart job") == 1
    assert sent(sandbox) == [ODD] * 6
    mail = (tmp_path / "mail").read_text("utf-8")
    assert mail.startswith("To: root\nSubject: sequra-challenge: pipeline failed on ")
    assert "HTTP 404" in mail


def test_cron(
    sandbox: Sandbox, machine: Machine, needed: Callable[[str], str], tmp_path: Path
) -> None:
    for command in ("cron", "faketime", "logrotate"):
        needed(command)
    install, try_out, by_hand = [*readme("## With cron"), *readme("## By hand")]
    try_out += by_hand
    (tarball,) = readme("### From GitHub")
    another, times = re.subn(r"git archive .*\n", tarball, readme("## A release")[1])
    assert times == 1
    parts = {"another": re.sub(r"\$\(.*\)", "v1.3.0", another), "back": another.splitlines()[-1]}
    printed = machine(script("cron.sh", install=install, try_out=try_out, **parts))
    loaded = runs(sandbox)
    assert [name for name, _ in sorted(loaded)] == ["pipeline"] * 3 + ["second"], printed
    assert sent(sandbox) == [ODD] * 5  # once by hand, without a load
    assert "INSERT INTO" in printed
    mail = (tmp_path / "mail").read_text("utf-8")
    (skipped,) = re.findall(r"^\S+Z WARNING second: skipped, .*\n", mail, re.MULTILINE)
    rotated = printed.rpartition("+ ls")[2]
    assert "sequra-challenge.log.1\n" in rotated
    assert skipped in rotated
    assert not [run_id for _, run_id in loaded if run_id not in rotated]
