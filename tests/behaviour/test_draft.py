"""conf/draft.py: what it prints for an API loads, unchanged but for bucket and secret."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import yaml

from sandbox import LIBRARY, LIBRARY_CONFIG, QUERY_CONFIG, ROOT, SAMPLE, SECRET, Sandbox, answer

Draft = Callable[..., str]
Answer = Callable[[BaseHTTPRequestHandler], None]

GITHUB: list[dict[str, Any]] = [
    {
        "url": f"https://api.github.example/repos/o/r/issues/{number}",
        "id": 2_000_000_000 + number,
        "number": number,
        "title": "The rocket 🚀 leaks",
        "user": {"login": "octocat", "id": 1, "site_admin": False},
        "labels": [{"id": 208_045_946, "name": "bug", "color": "f29513", "default": True}],
        "assignee": None,
        "comments": 3,
        "created_at": "2026-01-02T03:04:05Z",
        "closed_at": None,
        "body": "first line\nsecond line",
        "reactions": {"total_count": 3, "+1": 2, "-1": 1, "laugh": 0},
    }
    for number in (7, 8)
]
GITHUB[1] |= {"pull_request": {"merged_at": "2026-01-02T03:04:06Z"}, "assignee": {"login": "hubot"}}

WEATHER = {
    "@context": ["https://geojson.example", {"@version": "1.1"}],
    "geometry": {"type": "Polygon", "coordinates": [[[-80.6, 28.5], [-80.5, 28.6]]]},
    "properties": {
        "updateTime": "2026-01-01T09:00:00+00:00",
        "periods": [  # the records differ: so did this service's, when temperatures got units
            {
                "number": 1,
                "name": "Tonight",
                "startTime": "2026-01-01T18:00:00-05:00",
                "isDaytime": False,
                "temperature": 41,
                "probabilityOfPrecipitation": {"unitCode": "wmoUnit:percent", "value": None},
            },
            {
                "number": 2,
                "name": "Friday",
                "startTime": "2026-01-02T06:00:00-05:00",
                "isDaytime": True,
                "temperature": {"unitCode": "wmoUnit:degC", "value": 5.5},
                "probabilityOfPrecipitation": {"unitCode": "wmoUnit:percent", "value": 20},
                "dewpoint": 3.25,
            },
        ],
    },
}

EXCHANGE = {
    "status": "ok",
    "data": [
        {"symbol": "ETH-BTC", "24h": "-0.00012000", "last": "0.03151000", "count": 9, "oid": 1},
        {"symbol": "BTC-EUR", "24h": "1234.5", "last": "91234.56", "count": 3, "oid": 1},
    ],
}

POSTS = [
    {
        "id": number,
        "date": "2026-01-02T03:04:05",
        "date_gmt": "2026-01-02T02:04:05",
        "title": {"rendered": "Ein Titel mit Größe"},
        "größe": 1,
        "meta.seo": "",
        "tags": [4, 5],
        "_links": {"self": [{"href": "https://cms.example/1"}], "wp:term": []},
    }
    for number in (1, 2, 3)
]

ETHEREUM = {
    "items": [
        {
            "height": 21_000_000 + number,
            "hash": f"0x{number:064x}",
            "timestamp": "2026-01-02T03:04:05.000000Z",
            "total_difficulty": 58_750_003_716_598_352_816_469,
            "value": None,
            "transactions": [
                {"hash": f"0x{number}{n}", "value": 10**18 + n, "position": n} for n in (0, 1)
            ],
        }
        for number in (1, 2)
    ],
    "next_page_params": None,
}


def served(document: Any, **headers: str) -> Answer:
    return lambda handler: answer(handler, 200, json.dumps(document).encode(), **headers)


@pytest.fixture
def draft(tmp_path: Path) -> Draft:
    """What the script prints."""

    def draft(source: str | Path, **environment: str) -> str:
        command = [sys.executable, str(ROOT / "conf" / "draft.py"), str(source)]
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
        )
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        return done.stdout

    return draft


def load(sandbox: Sandbox, text: str, tmp_path: Path) -> dict[str, int]:
    """Loads what a draft says; returns the rows of each table."""
    path = tmp_path / "draft.yaml"
    path.write_text(text.replace("redshift/credentials", SECRET), encoding="utf-8")
    (url,) = re.findall("^  url: (.*)", text, re.MULTILINE)
    done = sandbox.run("--config", path, "--source", url)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    tables = re.findall(r"^  (public\.\w+):$", text, re.MULTILINE)
    return {name: sandbox.query(f"SELECT count(*) FROM {name}")[0]["count"] for name in tables}


def test_the_sample(sandbox: Sandbox, draft: Draft, tmp_path: Path) -> None:
    text = draft(sandbox.source.url)
    columns = sorted(line for line in text.splitlines() if line.startswith("      "))
    for line in (
        "id: varchar(64) not null",
        "date_utc: timestamptz",
        "window: integer",
        "cores: super",
    ):
        assert any(column.startswith(f"      {line}") for column in columns), line
    assert load(sandbox, text, tmp_path) == {"public.launches": 30}
    text = re.sub("(?m)^# ( .*)", r"\1", text)  # with the tables of arrays
    rows = load(sandbox, text.replace("public.launches", "public.l"), tmp_path)
    assert rows["public.l_cores"] == sum(len(x["cores"]) for x in json.loads(SAMPLE.read_bytes()))


def test_launch_library(sandbox: Sandbox, draft: Draft, tmp_path: Path) -> None:
    url = sandbox.url_of(LIBRARY_CONFIG)
    text = draft(url)
    assert "  records: results\n  next: next\n" in text
    assert len(json.loads(LIBRARY.read_bytes())) == 12
    assert load(sandbox, text, tmp_path) == {"public.launches": 12}


@pytest.mark.parametrize(
    ("document", "lines", "rows"),
    [
        (
            GITHUB,
            """key: [id]
            id: bigint not null
            reactions.+1: integer as reactions_plus_1
            reactions.-1: integer as reactions_minus_1
            pull_request.merged_at: timestamptz
            closed_at: super # null in all of them
            assignee.login: varchar(16) # longest 5 bytes""",
            {"": 2, "_labels": 2},
        ),
        (
            WEATHER,
            """records: properties.periods
            key: [number]
            startTime: varchar(64) # as a timestamptz it would lose its offset
            temperature: super # values of different kinds
            probabilityOfPrecipitation.value: integer
            dewpoint: double precision""",
            {"": 2},
        ),
        (
            EXCHANGE,
            """records: data
            key: [symbol]
            24h: decimal(18,8) as _24h # numbers in quotes
            last: decimal(18,8) # numbers in quotes
            oid: integer as oid_""",
            {"": 2},
        ),
        (
            POSTS[:2],
            """next: Link
            date: timestamp
            größe: integer as grosse
            meta\\.seo: varchar(16) # longest 0 bytes
            tags: super # an array
            _links.wp:term: super # an array""",
            {"": 3, "__links_self": 3},
        ),
        (
            ETHEREUM,
            """records: items
            # next and next_param? There is: next_page_params
            key: [height]
            total_difficulty: decimal(38,0)
            # value: bigint
            # key: [thing_height, position]""",
            {"": 2, "_transactions": 4},
        ),
    ],
    ids=["GitHub", "weather", "exchange", "CMS", "Ethereum"],
)
def test_other_apis(
    sandbox: Sandbox, draft: Draft, tmp_path: Path, document: Any, lines: str, rows: dict[str, int]
) -> None:
    url = sandbox.source.at("https://api.example.org/v1/things?per_page=2")
    is_paged = document == POSTS[:2]
    more = {"Link": f'<{url}&page=2>; rel="next"'} if is_paged else {}
    answers = [served(document, **more), *[served(POSTS[2:])] * is_paged]
    sandbox.source.answers = answers[:1]
    text = draft(url)
    seen = [re.sub(" +", " ", line.replace('"', "").strip()) for line in text.splitlines()]
    for line in lines.splitlines():
        assert line.strip() in seen, f"{line}\n{text}"
    sandbox.source.answers = answers.copy()
    assert load(sandbox, text, tmp_path) == {"public.things": rows[""]}
    text = re.sub("(?m)^# ( .*)", r"\1", text).replace("public.things", "public.t")
    sandbox.source.answers = answers.copy()
    loaded = load(sandbox, text, tmp_path)
    assert {name: loaded[f"public.t{name}"] for name in rows} == rows


def test_a_cursor(sandbox: Sandbox, draft: Draft, tmp_path: Path) -> None:
    users = [{"id": number, "name": "a"} for number in range(5)]
    pages = (users[:3], "dXNlcjpV=="), (users[3:], "")
    answers = [served({"members": m, "response_metadata": {"next_cursor": c}}) for m, c in pages]
    sandbox.source.answers = answers[:1]
    text = draft(sandbox.source.url)
    assert "  next: response_metadata.next_cursor\n  next_param: cursor\n" in text
    sandbox.source.answers = answers.copy()
    assert load(sandbox, text, tmp_path) == {"public.launches": 5}
    assert sandbox.source.requests[-1] == "/v5/launches?cursor=dXNlcjpV%3D%3D"


def test_the_example_of_the_readme(sandbox: Sandbox, draft: Draft, tmp_path: Path) -> None:
    readme = (ROOT / "conf" / "examples" / "README.md").read_text(encoding="utf-8")
    blocks = re.findall("^   ```yaml\n(.*?)^   ```$", readme, re.DOTALL | re.MULTILINE)
    url = yaml.safe_load(QUERY_CONFIG.read_bytes())["source"]["url"]
    there = [textwrap.dedent(block).replace(url, sandbox.source.at(url)) for block in blocks]
    (tmp_path / "source.yaml").write_text(there[0])
    text = draft("source.yaml")
    assert text == there[1]
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
    sandbox.source.answers = [served({"docs": [{"id": 1}], "meta": {"after": None}})]
    text = draft(source, KEY="k", TOKEN="s3cret", WHO='"me"')
    assert sandbox.source.requests == ["/query?key=k"]
    assert sandbox.source.headers[0]["Authorization"] == "Bearer s3cret"
    assert json.loads(sandbox.source.posted[0]) == {"query": "{ things }", "who": '"me"'}
    assert "s3cret" not in text
    written = yaml.safe_load(source.read_bytes())["source"]
    assert yaml.safe_load(text)["source"] == written | {"records": "docs"}


def test_errors_are_no_records(sandbox: Sandbox, tmp_path: Path) -> None:
    source = tmp_path / "source.yaml"
    source.write_text(f"source: {{url: '{sandbox.source.url}', body: '{{}}'}}")
    sandbox.source.answers = [served({"data": None, "errors": [{"message": "no such field"}]})]
    command = [sys.executable, str(ROOT / "conf" / "draft.py"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "no array at source.records" in done.stderr
    assert "no such field" in done.stderr


WRONG = {
    "empty": ("things.json", "[]", "there are no records"),
    "numbers": ("things.json", "[1]", "record 1 is not an object: 1"),
    "HTML": ("things.json", "<html>", "HTML"),
    "no file": ("things.json", None, "No such file"),
    "no section": ("source.yaml", "tables: {}", "source.url: missing"),
    "not set": ("source.yaml", "source: {url: 'x?${NOT_SET}'}", "${NOT_SET} is not set"),
    "no YAML": ("source.yaml", "source: [", "line 1"),
    "no port": ("http://localhost:1/?key=s3cret", None, "http://localhost:1/: GET http://"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_holds_no_records_gets_a_sentence(tmp_path: Path, kind: str) -> None:
    name, content, message = WRONG[kind]
    if content is not None:
        (tmp_path / name).write_text(content)
    # Without pauses: what does not answer is asked several times.
    code = "import sys, time, draft; time.sleep = int; draft.run()"
    environment = {"PYTHONPATH": str(ROOT / "conf")}
    command = [sys.executable, "-c", code, name]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert "s3cret" not in done.stderr
