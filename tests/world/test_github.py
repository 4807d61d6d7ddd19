"""What GitHub is told to require before a merge."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest
import yaml

from sandbox import ROOT

JOBS: dict[str, Any] = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
RULES: dict[str, Any] = {
    rule["type"]: rule.get("parameters")
    for rule in json.loads((ROOT / ".github/rulesets/main.json").read_text())["rules"]
}


def test_the_required_check_is_a_job_that_waits_for_all_others() -> None:
    (check,) = RULES["required_status_checks"]["required_status_checks"]
    job = JOBS[check["context"]]
    assert "name" not in job  # which would be the check's name
    assert "matrix" not in job.get("strategy", {})
    assert job["if"] == "always()"
    assert {*job["needs"]} == JOBS.keys() - {check["context"]}
    assert {"pull_request", "non_fast_forward", "deletion"} < RULES.keys()


@pytest.mark.parametrize("others", ["success", "skipped", "failure", "cancelled"])
def test_it_fails_unless_all_have_succeeded(others: str) -> None:
    (step,) = JOBS["ci"]["steps"]
    assert step["env"] == {"RESULTS": "${{ join(needs.*.result, ' ') }}"}
    as_github = ["bash", "-e", "-c", step["run"]]  # its default shell
    for results in (others, f"success {others}", f"{others} success"):
        done = subprocess.run(as_github, env={"RESULTS": results}, check=False)
        assert (done.returncode == 0) == (others == "success")
