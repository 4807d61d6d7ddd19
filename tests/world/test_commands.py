"""The commands of all READMEs as they stand there; commands.yaml says which are run elsewhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from helpers import loaded, shipped_with
from sandbox import DATA, QUERY_CONFIG, READMES, REGION, ROOT, Sandbox

pytestmark = pytest.mark.ci
HOW = yaml.safe_load((DATA / "commands.yaml").read_text("utf-8"))


def commands(readme: Path) -> Iterator[tuple[str, str]]:
    """What stands in sh blocks, and commands within the text; before each, where it stands."""
    heading = ""
    for found in re.finditer(
        r"^#+ (?P<heading>[^\n]+)|^ *```(?P<language>\w+)\n(?P<block>.*?)^ *```$"
        r"|`(?P<inline>(\.venv/bin/\w+|poetry run|aws|airflow) [^`]+)`",
        readme.read_text("utf-8"),
        re.DOTALL | re.MULTILINE,
    ):
        heading = found["heading"] or heading
        if found["language"] == "sh" or found["inline"]:
            command = textwrap.dedent(found["block"] or found["inline"]).strip()
            yield f"{readme.relative_to(ROOT)}, {heading}: {command}", command


@pytest.fixture
def project(sandbox: Sandbox, tmp_path: Path) -> Path:
    """A copy of the project that loads from the sandbox and tells its channels."""
    for name in ("conf", "sequra_challenge", "tests", ".github"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    shipped_with(tmp_path / "conf", source={"url": sandbox.source.url}, alerts=sandbox.alerts())
    examples = (ROOT / "conf" / "examples" / "README.md").read_text("utf-8")
    source, *_ = re.findall(r"```yaml\n( +source:.*?)```", examples, re.DOTALL)
    source = re.sub(r"https://\S+", sandbox.url_of(QUERY_CONFIG), source)
    (tmp_path / "source.yaml").write_text(source, "utf-8")
    return tmp_path


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands(readme: Path, sandbox: Sandbox, project: Path) -> None:
    loaded(sandbox)
    (raw,) = sandbox.staged("response.json.gz")
    uv = [sys.executable, "-m", "uv", "tool", "run", "--quiet", "--from", "awscli"]
    aws = subprocess.check_output([*uv, "python", "-c", "import sys; print(sys.prefix)"], text=True)
    path = f"{project}/.venv/bin:{aws.strip()}/bin:{os.environ['PATH']}"
    more = {"PATH": path, "AWS_DEFAULT_REGION": REGION, "GIT_DIR": str(ROOT / ".git")}
    environment = sandbox.child_environment(**more, TMPDIR=str(project))
    for where, command in commands(readme):
        if any(re.match(pattern, where) for pattern in HOW["elsewhere"]):
            continue
        for pattern, text in HOW["changes"].items():
            text = text.format(source=sandbox.source.at("/"), raw=raw)
            command = re.sub(pattern, text, command, flags=re.MULTILINE)
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", HOW["start"] + command],
            cwd=project,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{where}\n{command}\n{done.stdout}"
        for words, shown in HOW["shown"].items():
            assert not re.search(words, command) or re.search(shown, done.stdout), done.stdout


def test_no_other_commands_are_said_to_run_elsewhere() -> None:
    found = [where for readme in READMES for where, _ in commands(readme)]
    unused = [it for it in HOW["elsewhere"] if not any(re.match(it, where) for where in found)]
    assert unused == []
