"""What the tests share: the sandbox, started once a worker and emptied before each test."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from sandbox import SAMPLE, Sandbox
from sequra_challenge import main

# How many documents tests/test_documents.py makes in all. By default the same ones each time.
slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile(
    "default", max_examples=2_000, deadline=None, derandomize=True, suppress_health_check=slow
)
settings.register_profile(
    "nightly", max_examples=10_000, deadline=None, print_blob=True, suppress_health_check=slow
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(scope="session", autouse=True)
def packages() -> None:
    """The large packages, which main.py imports after the configuration is read."""
    main.import_packages()


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
def sample() -> Path:
    return SAMPLE


@pytest.fixture(scope="session")
def needed() -> Callable[[str], str]:
    """The path of a command; without it the test is skipped, but fails where $CI is set."""

    def path(command: str) -> str:
        found = shutil.which(command)
        if not found:
            (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{command} is not installed")
        return found

    return path
