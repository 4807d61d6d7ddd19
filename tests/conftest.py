"""What the tests share: the sandbox, started once a worker and emptied before each test."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from helpers import (
    Answer,
    Done,
    Fetch,
    Load,
    Records,
    Things,
    arrays_config,
    fetch_records,
    forget_hidden,
    import_packages,
    load_config,
    without_pauses,
)
from sandbox import NO_PAUSES, Sandbox, Source

# So many documents are made in test_documents.py and test_reader.py, by default the same ones.
for name, examples in {"default": 500, "ci": 2_000, "nightly": 10_000}.items():
    settings.register_profile(
        name,
        max_examples=examples,
        deadline=None,
        derandomize=name != "nightly",
        print_blob=name == "nightly",
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_xdist_auto_num_workers() -> int:
    """Half of the time a worker waits, for the run of the program or for a server."""
    return 2 * (os.cpu_count() or 1)


def pytest_make_parametrize_id(val: object) -> str | None:
    """Words for a parameter in a test's name."""
    if val is None or (isinstance(val, bool | int | float) and not isinstance(val, signal.Signals)):
        return None
    text = getattr(val, "__name__", None) or getattr(val, "name", None) or str(val)
    return " ".join(re.findall(r"[\w.:/+-]+", text, re.ASCII))[:40] or "nothing"


@pytest.fixture(scope="session", autouse=True)
def packages() -> None:
    import_packages()


@pytest.fixture(scope="session")
def running_sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    with Sandbox(tmp_path_factory.mktemp("sandbox")) as sandbox:
        yield sandbox


@pytest.fixture
def sandbox(running_sandbox: Sandbox) -> Sandbox:
    """The sandbox with the sample as its source, an empty database and an empty bucket."""
    running_sandbox.reset()
    return running_sandbox


@pytest.fixture
def things(sandbox: Sandbox, tmp_path: Path) -> Things:
    """A pipeline of one small table in the sandbox."""
    return Things(sandbox, tmp_path)


@pytest.fixture(autouse=True)
def nothing_hidden() -> None:
    """What an earlier test in this process has hidden is shown again."""
    forget_hidden()


@pytest.fixture
def source() -> Iterator[Source]:
    with Source() as source:
        yield source


@pytest.fixture
def fetch(source: Source, tmp_path: Path) -> Fetch:
    """What the program reads from the source when that gives these answers."""

    def fetch(*answers: Answer, url: str | None = None, **settings: Any) -> Records:
        source.answers = list(answers)
        config = load_config(arrays_config(tmp_path, url or source.url, **settings))
        return fetch_records(config, tmp_path)

    return fetch


@pytest.fixture
def pauses() -> Iterator[list[float]]:
    """The pauses, which are not made."""
    with without_pauses() as pauses:
        yield pauses


@pytest.fixture
def load(sandbox: Sandbox, tmp_path: Path) -> Load:
    """Runs the program, to which the sandbox's source gives these answers."""

    def load(
        *answers: Answer,
        status: int = 0,
        arguments: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
        url: str | None = None,
        **settings: Any,
    ) -> Done:
        sandbox.source.answers = list(answers)
        url = url or sandbox.source.url
        config = arrays_config(tmp_path, url, **settings)
        arguments = arguments if "--source" in arguments else ("--source", url, *arguments)
        environment = {"TMPDIR": str(tmp_path)} | (environment or {})
        done = sandbox.run("--config", config, *arguments, patch=NO_PAUSES, **environment)
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr
        return done

    return load


@pytest.fixture(scope="session")
def needed() -> Callable[[str], str]:
    """The path of a command; without it the test is skipped, but fails where $CI is set."""

    def path(command: str) -> str:
        found = shutil.which(command)
        if not found:
            (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{command} is not installed")
        return found

    return path
