"""conf/draft.py: what it prints for an API loads, with the sandbox's bucket and secret."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import yaml

from helpers import Answer, Records, count, messages, responds, things
from sandbox import LIBRARY_CONFIG, QUERY_CONFIG, ROOT, SAMPLE, Sandbox

DRAFT = str(ROOT / "conf" / "draft.py")
Draft = Callable[..., str]


@pytest.fixture
def draft(capsys: pytest.CaptureFixture[str]) -> Draft:
    """What the script prints, or says when it ends with another status."""

    def draft(source: str | Path, status: int = 0, **environment: str) -> str:
        argv = mock.patch.object(sys, "argv", [DRAFT, str(source)])
        with argv, mock.patch.dict(os.environ, environment), pytest.raises(SystemExit) as end:
            runpy.run_path(DRAFT, run_name="__main__")
        printed = capsys.readouterr()
        assert end.value.code == status
        assert "" in printed
        return printed.out or printed.err

    return draft


def load(sandbox: Sandbox, text: str, tmp_path: Path) -> dict[str, int]:
    """Loads what a draft says; returns the rows of each table."""
    path = tmp_path / "draft.yaml"
    path.write_text(text, encoding="utf-8")
    (url,) = re.findall("^  url: (.*)", text, re.MULTILINE)
    done = sandbox.run("--config", path, "--source", url)
    assert (done.returncode, messages(done, "WARNING")) == (0, []), done.stderr
    tables = re.findall(r"^  (public\.\w+):$", text, re.MULTILINE)
    return {name: count(sandbox, name) for name in tables}


def with_arrays(text: str) -> str:
    """The draft with the tables of arrays, which it has as comments."""
    return re.sub("(?m)^# ( .*)", r"\1", text)


def test_the_sample(sandbox: Sandbox, draft: Draft, tmp_path: Path) -> None:
    text = draft(sandbox.source.url)
    assert "are these records all?" in text  # 30, as many as some APIs give at a time
    columns = {line.strip() for line in text.splitlines() if line.startswith("      ")}
    wanted = "id: varchar(64) not null", "date_utc: timestamptz", "window: integer", "cores: super"
    for line in wanted:
        assert any(column.startswith(line) for column in columns), line
    assert load(sandbox, text, tmp_path) == {"public.launches": 30}
    text = with_arrays(text).replace("public.launches", "public.l")
    assert load(sandbox, text, tmp_path)["public.l_cores"] == 38


def test_launch_library(sandbox: Sandbox, draft: Draft, tmp_path: Path) -> None:
    text = draft(sandbox.url_of(LIBRARY_CONFIG))
    assert "  records: results\n  next: next\n" in text
    assert load(sandbox, text, tmp_path) == {"public.launches": 12}


APIS = yaml.safe_load((SAMPLE.parent / "apis.yaml").read_text("utf-8"))


@pytest.mark.parametrize("api", APIS)
def test_other_apis(sandbox: Sandbox, draft: Draft, tmp_path: Path, api: str) -> None:
    answered, lines, rows = (APIS[api][name] for name in ("answer", "draft", "rows"))
    sandbox.source.answers = [responds(200, answered)] * 3
    text = draft(sandbox.source.at("https://api.example.org/v1/things?per_page=2"))
    seen = [re.sub(" +", " ", line.replace('"', "").strip()) for line in text.splitlines()]
    assert [line for line in lines.splitlines() if line not in seen] == [], text
    assert load(sandbox, text, tmp_path) == {"public.things": rows[""]}
    if len(rows) > 1:
        text = with_arrays(text).replace("public.things", "public.t")
        loaded = load(sandbox, text, tmp_path)
        assert {name: loaded[f"public.t{name}"] for name in rows} == rows


def members(records: Records, cursor: str) -> Answer:
    meta = {"next_cursor": cursor}
    return responds(200, {"members": records, "response_metadata": meta})


# The pages, what the draft says of them, and how the second is asked for.
STYLES: dict[str, tuple[list[Answer], str, str]] = {
    "Link": (
        [responds(200, things(1, 2), Link='<?page=2>; rel="next"'), responds(200, things(3))],
        "  next: Link\n",
        "page=2",
    ),
    "cursor": (
        [members(things(1, 2), "dXNlcjpV=="), members(things(3), "")],
        "  next: response_metadata.next_cursor\n  next_param: cursor\n",
        "cursor=dXNlcjpV%3D%3D",
    ),
}


@pytest.mark.parametrize(("pages", "lines", "query"), STYLES.values(), ids=STYLES)
def test_pages(
    sandbox: Sandbox, draft: Draft, tmp_path: Path, pages: list[Answer], lines: str, query: str
) -> None:
    sandbox.source.answers = [*pages[:1], *pages]
    text = draft(sandbox.source.url)
    assert lines in text
    assert load(sandbox, text, tmp_path) == {"public.launches": 3}
    assert sandbox.source.requests[-1] == f"/v5/launches?{query}"


def test_the_example_of_the_readme(sandbox: Sandbox, draft: Draft, tmp_path: Path) -> None:
    readme = (ROOT / "conf" / "examples" / "README.md").read_text(encoding="utf-8")
    blocks = re.findall("^   ```yaml\n(.*?)^   ```$", readme, re.DOTALL | re.MULTILINE)
    url = yaml.safe_load(QUERY_CONFIG.read_bytes())["source"]["url"]
    given, wanted = (textwrap.dedent(b).replace(url, sandbox.source.at(url)) for b in blocks)
    source = tmp_path / "source.yaml"
    source.write_text(given)
    text = draft(source)
    assert text == wanted
    assert load(sandbox, text, tmp_path) == {"public.query": 30}


def test_secrets_that_stay_unsaid(sandbox: Sandbox, draft: Draft, tmp_path: Path) -> None:
    source = tmp_path / "source.yaml"
    source.write_text(f"""source:
  url: {sandbox.source.at("https://api.example.org/query")}?key=${{KEY}}
  headers: {{Authorization: "Bearer ${{TOKEN}}"}}
  body: |
    {{"query": "{{ things }}",
     "who": "${{WHO}}"}}
  next: meta.after
  next_param: variables.after
""")
    sandbox.source.answers = [responds(200, {"docs": [{"id": 1}], "meta": {"after": None}})]
    text = draft(source, KEY="k", TOKEN="s3cret", WHO='"me"')
    assert sandbox.source.requests == ["/query?key=k"]
    assert sandbox.source.headers[0]["Authorization"] == "Bearer s3cret"
    assert json.loads(sandbox.source.posted[0]) == {"query": "{ things }", "who": '"me"'}
    assert "s3cret" not in text
    written = yaml.safe_load(source.read_bytes())["source"]
    assert yaml.safe_load(text)["source"] == written | {"records": "docs"}


def test_what_is_wrong_gets_a_sentence(
    sandbox: Sandbox, draft: Draft, tmp_path: Path, pauses: list[float]
) -> None:
    url = sandbox.source.url
    sandbox.source.answers = [responds(200, {"errors": [{"message": "no such field"}]})]
    for name, content, message in (
        ("things.json", "[]", "the array is empty; a draft needs records"),
        ("things.json", '{"data": {"orders": []}, "total": 0}', "data.orders is empty"),
        ("things.json", "[1]", "record 1 is not an object: 1"),
        ("things.json", "<html>", "no JSON array"),
        ("source.yaml", "tables: {}", "source.url: missing"),
        ("source.yaml", "source: {url: 'x?${NOT_SET}'}", "${NOT_SET} is not set"),
        ("source.yaml", "source: [", "line 1"),
        ("source.yaml", f"source: {{url: '{url}', body: '{{}}'}}", "no such field"),
    ):
        (tmp_path / name).write_text(content)
        assert message in draft(tmp_path / name, status=1)
    said = draft("http://localhost:1/?key=s3cret", status=1)
    assert said.startswith("http://localhost:1/: gave up: GET http://localhost:1/: ConnectionError")
    assert 1 <= len(pauses) <= 3
    command = [sys.executable, DRAFT, "no-such.json"]  # as it is started
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.match(r"no-such.json: no such file, nor a URL of http or https\n$", done.stderr)
