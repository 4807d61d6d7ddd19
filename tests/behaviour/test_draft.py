"""conf/draft.py: what it prints for an API loads, unchanged but for bucket and secret."""

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

from helpers import count, messages, responds, things
from sandbox import LIBRARY_CONFIG, QUERY_CONFIG, ROOT, SECRET, Sandbox

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
    path.write_text(text.replace("redshift/credentials", SECRET), encoding="utf-8")
    (url,) = re.findall("^  url: (.*)", text, re.MULTILINE)
    done = sandbox.run("--config", path, "--source", url)
    assert (done.returncode, messages(done, "WARNING")) == (0, []), done.stderr
    tables = re.findall(r"^  (public\.\w+):$", text, re.MULTILINE)
    return {name: count(sandbox, name) for name in tables}


def test_the_sample(sandbox: Sandbox, draft: Draft, tmp_path: Path) -> None:
    text = draft(sandbox.source.url)
    columns = {line.strip() for line in text.splitlines() if line.startswith("      ")}
    wanted = "id: varchar(64) not null", "date_utc: timestamptz", "window: integer", "cores: super"
    for line in wanted:
        assert any(column.startswith(line) for column in columns), line
    assert load(sandbox, text, tmp_path) == {"public.launches": 30}
    text = re.sub("(?m)^# ( .*)", r"\1", text)  # with the tables of arrays
    rows = load(sandbox, text.replace("public.launches", "public.l"), tmp_path)
    assert rows["public.l_cores"] == 38


def test_launch_library(sandbox: Sandbox, draft: Draft, tmp_path: Path) -> None:
    text = draft(sandbox.url_of(LIBRARY_CONFIG))
    assert "  records: results\n  next: next\n" in text
    assert load(sandbox, text, tmp_path) == {"public.launches": 12}


# A document as YAML, what is in its draft, and the rows of the tables.
APIS: dict[str, tuple[str, str, dict[str, int]]] = {
    "GitHub": (
        """
        - &issue {id: 2000000007, title: The rocket 🚀 leaks, labels: [{id: 208045946, name: bug}],
           closed_at: null, body: "first line\\nsecond line", reactions: {"+1": 2, "-1": 1},
           assignee: null}
        - {<<: *issue, id: 2000000008,
           assignee: {login: hubot}, pull_request: {merged_at: "2026-01-02T03:04:06Z"}}""",
        """key: [id]
        id: bigint not null
        reactions.+1: integer as reactions_plus_1
        reactions.-1: integer as reactions_minus_1
        pull_request.merged_at: timestamptz
        closed_at: super # null in all of them
        assignee.login: varchar(16) # longest 5 bytes""",
        {"": 2, "_labels": 2},
    ),
    # The records differ: so did this service's, when temperatures got units.
    "weather": (
        """
        "@context": ["https://geojson.example", {"@version": "1.1"}]
        properties:
          updateTime: "2026-01-01T09:00:00+00:00"
          periods:
          - {number: 1, startTime: "2026-01-01T18:00:00-05:00", temperature: 41,
             rain: {unitCode: "wmoUnit:percent", value: null}}
          - {number: 2, startTime: "2026-01-02T06:00:00-05:00", dewpoint: 3.25,
             temperature: {unitCode: "wmoUnit:degC", value: 5.5},
             rain: {unitCode: "wmoUnit:percent", value: 20}}""",
        """records: properties.periods
        key: [number]
        startTime: varchar(64) # as a timestamptz it would lose its offset
        temperature: super # values of different kinds
        rain.value: integer
        dewpoint: double precision""",
        {"": 2},
    ),
    "exchange": (
        """
        status: ok
        data:
        - {symbol: ETH-BTC, 24h: "-0.00012000", last: "0.03151000", oid: 1}
        - {symbol: BTC-EUR, 24h: "1234.5", last: "91234.56", oid: 1}""",
        """records: data
        key: [symbol]
        24h: decimal(18,8) as _24h # numbers in quotes
        last: decimal(18,8) # numbers in quotes
        oid: integer as oid_""",
        {"": 2},
    ),
    "CMS": (
        """
        - &post {id: 1, date: "2026-01-02T03:04:05", größe: 1, meta.seo: "", tags: [4, 5],
                 _links: {self: [{href: "https://cms.example/1"}], "wp:term": []}}
        - {<<: *post, id: 2}""",
        """date: timestamp
        größe: integer as grosse
        meta\\.seo: varchar(16) # longest 0 bytes
        tags: super # an array
        _links.wp:term: super # an array""",
        {"": 2, "__links_self": 2},
    ),
    "Ethereum": (
        """
        next_page_params: null
        items:
        - &block {height: 21000001, total_difficulty: 58750003716598352816469, transactions:
                  [{value: 1000000000000000000, position: 0}, {value: 1, position: 1}]}
        - {<<: *block, height: 21000002}""",
        """records: items
        # next and next_param? There is: next_page_params
        key: [height]
        total_difficulty: decimal(38,0)
        # value: bigint
        # key: [thing_height, position]""",
        {"": 2, "_transactions": 4},
    ),
}


@pytest.mark.parametrize(("document", "lines", "rows"), APIS.values(), ids=APIS)
def test_other_apis(
    sandbox: Sandbox, draft: Draft, tmp_path: Path, document: str, lines: str, rows: dict[str, int]
) -> None:
    sandbox.source.answers = [responds(200, yaml.safe_load(document))] * 3
    text = draft(sandbox.source.at("https://api.example.org/v1/things?per_page=2"))
    seen = [re.sub(" +", " ", line.replace('"', "").strip()) for line in text.splitlines()]
    assert [line.strip() for line in lines.splitlines() if line.strip() not in seen] == [], text
    assert load(sandbox, text, tmp_path) == {"public.things": rows[""]}
    if len(rows) > 1:
        text = re.sub("(?m)^# ( .*)", r"\1", text).replace("public.things", "public.t")
        loaded = load(sandbox, text, tmp_path)
        assert {name: loaded[f"public.t{name}"] for name in rows} == rows


def test_pages_by_the_header_link(sandbox: Sandbox, draft: Draft, tmp_path: Path) -> None:
    first = responds(200, things(1, 2), Link='</v5/launches?page=2>; rel="next"')
    sandbox.source.answers = [first, first, responds(200, things(3))]
    text = draft(sandbox.source.url)
    assert "  next: Link\n" in text
    assert load(sandbox, text, tmp_path) == {"public.launches": 3}


def test_pages_by_a_cursor(sandbox: Sandbox, draft: Draft, tmp_path: Path) -> None:
    first, last = (
        responds(200, {"members": members, "response_metadata": {"next_cursor": cursor}})
        for members, cursor in ((things(1, 2), "dXNlcjpV=="), (things(3), ""))
    )
    sandbox.source.answers = [first, first, last]
    text = draft(sandbox.source.url)
    assert "  next: response_metadata.next_cursor\n  next_param: cursor\n" in text
    assert load(sandbox, text, tmp_path) == {"public.launches": 3}
    assert sandbox.source.requests[-1] == "/v5/launches?cursor=dXNlcjpV%3D%3D"


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
    path = tmp_path / "things.json"
    for content, message in (
        ("[]", "there are no records"),
        ("[1]", "record 1 is not an object: 1"),
        ("<html>", "no JSON array"),
    ):
        path.write_text(content)
        assert message in draft(path, status=1)
    path = tmp_path / "source.yaml"
    for content, message in (
        ("tables: {}", "source.url: missing"),
        ("source: {url: 'x?${NOT_SET}'}", "${NOT_SET} is not set"),
        ("source: [", "line 1"),
        (f"source: {{url: '{sandbox.source.url}', body: '{{}}'}}", "no such field"),
    ):
        sandbox.source.answers = [responds(200, {"errors": [{"message": "no such field"}]})]
        path.write_text(content)
        assert message in draft(path, status=1)
    said = draft("http://localhost:1/?key=s3cret", status=1)
    assert said.startswith("http://localhost:1/: GET http://localhost:1/: ConnectionError")
    assert len(pauses) == 5
    command = [sys.executable, DRAFT, "no-such.json"]  # as it is started
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.match(r"no-such.json: .*No such file.*\n$", done.stderr)
