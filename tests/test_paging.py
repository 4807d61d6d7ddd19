"""Sources that answer page by page, rate limits, headers, and newline-delimited JSON."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import re
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import yaml
from test_pipeline import assert_failed, assert_loaded, loaded

from redshift import make_certificate
from sandbox import (
    BUCKET,
    LIBRARY,
    LIBRARY_CONFIG,
    LIBRARY_PAGE,
    ROOT,
    SECRET,
    Sandbox,
    Source,
    answer,
)
from sequra_challenge import main

Answer = Callable[[BaseHTTPRequestHandler], None]
Records = list[dict[str, Any]]
THINGS: dict[str, Any] = {
    "public.things": {"key": "id", "columns": {"id": "integer not null", "name": "varchar(64)"}}
}
CANARY = "c4nary-T0ken"  # what must never be seen
DIGITS = b"0.1234567890123456789012345"  # more than a double holds


# --- helpers ------------------------------------------------------------------------------------


def things(*ids: int, name: str = "a") -> Records:
    return [{"id": number, "name": f"{name}{number}"} for number in ids]


def responds(status: int, document: object = "", **headers: str) -> Answer:
    """Answers with JSON, or with bytes as they are."""
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    return lambda handler: answer(handler, status, body, **headers)


def page(records: Records, following: object = None) -> Answer:
    return responds(200, {"results": records, "next": following})


@dataclass
class Api:
    """The sandbox's source as an API of things, and the program with a configuration for it."""

    sandbox: Sandbox
    folder: Path

    def config(self, tables: dict[str, Any] = THINGS, **source: Any) -> Path:
        """A configuration; a setting of the source that is None is left out."""
        source = {"url": self.sandbox.source.url, "records": "results", "next": "next"} | source
        sections = {
            "source": {name: value for name, value in source.items() if value is not None},
            "staging": {"bucket": BUCKET, "prefix": "things"},
            "redshift": {"secret": SECRET},
            "tables": tables,
        }
        path = self.folder / "things.yaml"
        path.write_text(yaml.safe_dump(sections))
        return path

    def load(
        self,
        *answers: Answer,
        arguments: tuple[str, ...] = (),
        tables: dict[str, Any] = THINGS,
        environment: dict[str, str] | None = None,
        **source: Any,
    ) -> CompletedProcess[str]:
        """Runs the program, to which the source gives these answers."""
        self.sandbox.source.answers = list(answers)
        config = self.config(tables, **source)
        return self.sandbox.run(
            "--config", config, *arguments, TMPDIR=str(self.folder), **environment or {}
        )

    def read(self, *answers: Answer, **settings: Any) -> CompletedProcess[str]:
        """The same without AWS."""
        return self.load(*answers, arguments=("--dry-run",), **settings)

    def table(self) -> list[tuple[int, str]]:
        """What is in the table."""
        rows = self.sandbox.query("SELECT id, name FROM public.things ORDER BY id")
        return [(row["id"], row["name"]) for row in rows]

    def archive(self) -> tuple[str, Records]:
        """The only raw response in the bucket: its key, and the records in its lines."""
        ((key, data),) = [item for item in self.sandbox.objects().items() if "/raw/" in item[0]]
        lines = gzip.decompress(data).decode().split("\n")
        assert lines.pop() == ""
        return key, [json.loads(line) for line in lines]


def rows_of(done: CompletedProcess[str]) -> list[tuple[int, str]]:
    """The rows in the first file that a dry run made."""
    assert done.returncode == 0, done.stderr
    found = re.search(r"^--   (.+\.csv\.gz)$", done.stdout, re.MULTILINE)
    assert found
    with gzip.open(found[1], "rt", newline="") as file:
        return [(int(row["id"]), row["name"]) for row in csv.DictReader(file)]


def pairs(records: Records) -> list[tuple[int, str]]:
    return [(record["id"], record["name"]) for record in records]


@pytest.fixture
def api(sandbox: Sandbox, tmp_path: Path) -> Api:
    return Api(sandbox, tmp_path)


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Source]:
    """Another server; only its address differs from the source's."""
    with Source() as other:
        yield other


# --- pages --------------------------------------------------------------------------------------


def test_all_pages_are_loaded_archived_and_replayed(api: Api) -> None:
    url = api.sandbox.source.url
    last = (
        b'{"id": 5, "name": null, "more": ["\xc3\xa9\\ud83d\\ude80\xe2\x80\xa8", %s, {}]}' % DIGITS
    )
    records = [*things(1, 2, 3, 4), json.loads(last)]
    done = api.load(
        page(records[:2], f"{url}?page=2"),
        page([], "?page=3"),  # relative to the page it stands on
        page(records[2:4], "/other/things?page=4"),
        responds(200, b'{"next": "more", "results": [%s]}' % last),
        page([], ""),
    )
    assert done.returncode == 0, done.stderr
    path = "/v5/launches"
    wanted = [path, f"{path}?page=2", f"{path}?page=3", "/other/things?page=4", "/other/more"]
    assert api.sandbox.source.requests == wanted
    assert api.table() == [*pairs(records[:4]), (5, None)]
    key, archived = api.archive()
    assert key.endswith("/response.ndjson.gz")
    assert DIGITS in gzip.decompress(api.sandbox.objects()[key])
    assert archived == records
    (audit,) = api.sandbox.query("SELECT raw, source, rows_loaded FROM public.etl_runs")
    assert audit == {"raw": f"s3://{BUCKET}/{key}", "source": url, "rows_loaded": 5}

    api.sandbox.query("DELETE FROM public.things RETURNING id")
    api.sandbox.source.requests.clear()
    done = api.load(arguments=("--source", f"s3://{BUCKET}/{key}"))
    assert done.returncode == 0, done.stderr
    assert api.sandbox.source.requests == []
    assert api.table() == [*pairs(records[:4]), (5, None)]


@pytest.mark.parametrize(
    ("settings", "documents"),
    [
        ({}, [{"results": things(1)}]),
        ({"next": None}, [{"results": things(1), "next": "http://localhost/ignored"}]),
        (
            {"records": "data.items", "next": "paging.links.next"},
            [
                {"data": {"items": things(1)}, "paging": {"links": {"next": "?page=2"}}},
                {"data": {"items": things(2)}, "paging": {}},
            ],
        ),
        ({"max_pages": 2}, [{"results": things(1), "next": "?2"}, {"results": things(2)}]),
        ({"records": None, "next": None}, [things(1)]),
    ],
    ids=["no next", "next not followed", "nested paths", "as many as allowed", "plain array"],
)
def test_other_shapes(api: Api, settings: dict[str, Any], documents: list[Any]) -> None:
    done = api.read(*(responds(200, document) for document in documents), **settings)
    assert rows_of(done) == pairs(things(*range(1, len(documents) + 1)))
    assert len(api.sandbox.source.requests) == len(documents)


@pytest.mark.parametrize(
    ("answers", "parts"),
    [
        ([page(things(1), "?2"), responds(200, b"<html>Busy")], ["HTML", "Busy"]),
        ([page(things(1), "?2"), responds(200, b'{"results": [{"id": 2')], ["JSON"]),
        ([responds(200, {"detail": "Not here"})], ["results", "Not here"]),
        ([page(things(1), "?2"), responds(200, {"results": {"id": 2}})], ["results"]),
        ([responds(200, things(1))], ["results"]),
        ([responds(200, {"results": [7]})], ["is not an object", "7"]),
        ([page([], "?2"), page([])], ["empty"]),
        ([page(things(1), 7)], ["next", "7"]),
        ([page(things(1), "?2"), responds(404)], ["HTTP 404"]),
    ],
    ids=[
        "HTML",
        "ends early",
        "no array",
        "an object",
        "the array itself",
        "no object",
        "nothing",
        "a number as next",
        "not found",
    ],
)
def test_a_page_that_is_wrong(api: Api, answers: list[Answer], parts: list[str]) -> None:
    assert_failed(api.read(*answers), *parts)
    assert len(api.sandbox.source.requests) == len(answers)


def test_a_loop_and_too_many_pages_end_the_run(api: Api) -> None:
    answers = [page(things(1), "?b"), page(things(2), "?c"), page(things(3), "?b")]
    assert_failed(api.read(*answers), "/v5/launches", "again")
    assert len(api.sandbox.source.requests) == 3
    answers = [page(things(number), f"?{number}") for number in range(9)]
    assert_failed(api.read(*answers, max_pages=4), "max_pages", "4")
    assert len(api.sandbox.source.requests) == 3 + 4


def test_a_record_that_moved_between_two_pages_is_kept_once(api: Api) -> None:
    tables = THINGS | {
        "public.parts": {
            "rows": "parts",
            "parent": "thing",
            "key": ["thing_id", "position"],
            "columns": {
                "thing.id": "integer not null",
                "position": "integer not null",
                "value": "varchar(8)",
            },
        }
    }
    early, late = ({"id": 2, "name": name, "parts": [name, "x"]} for name in ("early", "late"))
    first, last = ({"id": n, "name": "same", "parts": []} for n in (1, 3))
    pages = page([first, early], "?2"), page([late, last])
    done = api.load(*pages, tables=tables)
    assert done.returncode == 0, done.stderr
    kept = [(1, "same"), (2, "late"), (3, "same")]
    parts = [{"thing_id": 2, "value": "late"}, {"thing_id": 2, "value": "x"}]
    query = "SELECT thing_id, value FROM public.parts ORDER BY position"
    assert (api.table(), api.sandbox.query(query)) == (kept, parts)
    key, archived = api.archive()
    assert sorted(archived, key=lambda record: record["id"]) == [first, late, last]

    done = api.load(tables=tables, arguments=("--source", f"s3://{BUCKET}/{key}"))
    assert done.returncode == 0, done.stderr
    assert (api.table(), api.sandbox.query(query)) == (kept, parts)


def test_a_double_key_within_a_page_is_an_error(api: Api) -> None:
    done = api.read(page(things(1, 2), "?2"), page(things(3, 4, 3)))
    assert_failed(done, "public.things: more than one row has the key id=3")


# --- other hosts --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "following",
    [
        "http://localhost:{port}/v5/launches?2",
        "//localhost:{port}/v5/launches?2",
        "file:///etc/passwd",
        "s3://my-data-bucket/x",
        "http://[::1",
    ],
)
def test_a_next_page_elsewhere_is_refused(api: Api, following: str) -> None:
    port = api.sandbox.source.server.server_port
    done = api.read(page(things(1), following.format(port=port)), page(things(2)))
    assert_failed(done, "next")
    assert len(api.sandbox.source.requests) == 1
    assert "2.csv" not in done.stdout


def test_no_next_page_without_tls_after_one_with_it(api: Api, tmp_path: Path) -> None:
    certificate = make_certificate(tmp_path, "localhost")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.certificate, certificate.key)
    secure = Source()
    secure.server.socket = context.wrap_socket(secure.server.socket, server_side=True)
    with secure:
        port = secure.server.server_port
        plain = f"http://localhost:{port}/v5/launches?2"
        secure.answers = [page(things(1), f"https://localhost:{port}/v5/launches?2")]
        secure.answers += [page(things(2), plain), page(things(3))]
        done = api.read(
            arguments=("--source", f"https://localhost:{port}/v5/launches"),
            environment={"SSL_CERT_FILE": str(certificate.ca)},
        )
    assert_failed(done, "next", "https")
    assert len(secure.requests) == 2


HEADERS = {"Authorization": "Token ${LL2_TOKEN}", "X-Api-Key": "${LL2_TOKEN}", "X-Plain": "$5"}


def test_headers_go_to_the_source_and_nowhere_else(api: Api, other: Source) -> None:
    elsewhere = f"http://localhost:{other.server.server_port}/moved"
    other.answers = [page(things(3))]
    done = api.read(
        responds(307, Location="/here"),
        page(things(1), "?2"),
        responds(302, Location=elsewhere),
        headers=HEADERS,
        environment={"LL2_TOKEN": CANARY},
    )
    sent = {"Authorization": f"Token {CANARY}", "X-Api-Key": CANARY, "X-Plain": "$5"}
    for headers in api.sandbox.source.headers:
        assert headers | sent == headers
    assert len(api.sandbox.source.headers) == 3
    assert other.requests == ["/moved"], done.stderr
    assert not sent.keys() & other.headers[0].keys()
    assert CANARY not in str(other.headers) + done.stdout + done.stderr


# --- rate limits --------------------------------------------------------------------------------


def stated(done: CompletedProcess[str]) -> list[tuple[datetime, datetime]]:
    """When it was logged that the program waits, and until when."""
    line = r"^(\S+T)(\S+Z) WARNING .*429.* (\d\d:\d\d:\d\dZ)$"
    found = re.findall(line, done.stderr, re.MULTILINE)
    moment = datetime.fromisoformat
    return [(moment(day + begin), moment(day + end)) for day, begin, end in found]


def in_seconds(seconds: float) -> str:
    return format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)


def test_a_rate_limit_is_waited_for_until_the_time_that_the_log_says(api: Api) -> None:
    times: list[float] = []

    def timed(respond: Answer) -> Answer:
        def send(handler: BaseHTTPRequestHandler) -> None:
            times.append(time.monotonic())
            respond(handler)

        return send

    # The date is made when it is asked for; it has whole seconds.
    dated: Answer = lambda handler: responds(429, Retry_After=in_seconds(2))(handler)  # noqa: E731
    answers = responds(429, Retry_After="2"), page(things(1), "?2"), dated, page(things(2))
    done = api.read(*map(timed, answers), max_wait=3)  # for each request
    assert rows_of(done) == pairs(things(1, 2))
    first, _, second = (after - before for before, after in itertools.pairwise(times))
    assert 2 <= first < 3
    assert 1 <= second < 3
    waits = stated(done)
    assert len(waits) == 2, done.stderr
    assert all(timedelta(0) < end - begin <= timedelta(seconds=3) for begin, end in waits)


def test_more_than_max_wait_fails_at_once_and_names_both(api: Api) -> None:
    begun = time.monotonic()
    done = api.read(responds(429, Retry_After="3600"), page(things(1)), max_wait=900)
    assert_failed(done, "429", "3600", "900")
    assert time.monotonic() - begun < 10
    answers = [responds(429, Retry_After="1")] * 3
    done = api.read(*answers, page(things(1)), max_wait=2)  # in all
    assert_failed(done, "429", "max_wait")
    assert len(api.sandbox.source.requests) == 1 + 3


def test_many_short_waits_are_no_failed_tries(api: Api) -> None:
    done = api.read(*[responds(429, Retry_After="0")] * 8, page(things(1)))
    assert rows_of(done) == pairs(things(1))
    done = api.read(*[responds(503, Retry_After="0")] * 6, page(things(1)))
    assert_failed(done, "HTTP 503", "attempt 6")


def test_without_a_time_the_pauses_grow_within_max_wait(api: Api) -> None:
    begun = time.monotonic()
    answers = [responds(429), responds(429, Retry_After="soon")]
    done = api.read(*answers, page(things(1)), max_wait=60)
    assert rows_of(done) == pairs(things(1))
    first, second = (end - begin for begin, end in stated(done))
    assert first <= second + timedelta(seconds=1)
    done = api.read(*[responds(429)] * 9, max_wait=3)
    assert_failed(done, "429", "max_wait")
    assert time.monotonic() - begun < 20


def test_a_signal_ends_the_wait(api: Api) -> None:
    api.sandbox.source.answers = [responds(429, Retry_After="600")]
    process = subprocess.Popen(
        api.sandbox.command("--config", api.config(), "--dry-run"),
        env=api.sandbox.child_environment(TMPDIR=str(api.folder)),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr
    for line in process.stderr:
        if "429" in line:
            process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 143
    assert not list(api.folder.glob("sequra-*"))


# --- secrets ------------------------------------------------------------------------------------


def test_the_token_is_nowhere_but_in_the_requests(api: Api) -> None:
    secret = {"headers": HEADERS, "environment": {"LL2_TOKEN": CANARY}}
    runs = [
        api.load(
            responds(429, Retry_After="0"),
            responds(503, Retry_After="0"),
            page(things(1), "?2"),
            page(things(2)),
            arguments=("--verbose",),
            **secret,
        ),
        api.read(page(things(1)), **secret),
        api.read(responds(401, {"detail": "Invalid token"}), **secret),
        api.read(page(things(1), "http://localhost/x"), **secret),
        api.read(responds(302, Location="http://[::1"), **secret),
    ]
    assert [done.returncode for done in runs] == [0, 0, 1, 1, 1]
    assert all(h["X-Api-Key"] == CANARY for h in api.sandbox.source.headers)
    everything = "".join(done.stdout + done.stderr for done in runs).encode()
    for data in api.sandbox.objects().values():
        everything += gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    for table in ("public.things", "public.etl_runs"):
        everything += repr(api.sandbox.query(f"SELECT * FROM {table}")).encode()
    everything += repr(api.sandbox.redshift.statements).encode()
    assert b"public.things" in everything
    assert CANARY.encode() not in everything


@pytest.mark.parametrize("token", [f"{CANARY}\n", f"{CANARY}\nX-Other: 1", f"{CANARY}é🚀"])
def test_a_token_that_cannot_be_a_header_is_not_shown(api: Api, token: str) -> None:
    done = api.read(page(things(1)), headers=HEADERS, environment={"LL2_TOKEN": token})
    assert CANARY not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert (done.returncode, api.sandbox.source.requests) != (0, [])
    if done.returncode:
        assert "LL2_TOKEN" in done.stderr or "Authorization" in done.stderr


def test_a_variable_that_is_not_set_is_named(api: Api) -> None:
    headers = {"Authorization": "Token ${LL2_TOKEN}", "X-Key": "${LL2_A}-${LL2_TOKEN}"}
    done = api.read(page(things(1)), headers=headers, environment={"LL2_TOKEN": CANARY})
    assert_failed(done, "LL2_A", status=2)
    assert CANARY not in done.stderr
    assert api.sandbox.source.requests == []


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("records", ""),
        ("records", "data..items"),
        ("next", ["next"]),
        ("max_pages", 0),
        ("max_pages", "many"),
        ("max_wait", -1),
        ("headers", ["Authorization"]),
        ("headers", {"Authorization": ["Token"]}),
        ("headers", {"Not a name": "x"}),
        ("pages", 3),
    ],
)
def test_a_wrong_setting_is_named(api: Api, setting: str, value: object) -> None:
    with pytest.raises(main.ConfigError, match=rf"source\.{setting}"):
        main.load_config(api.config(**{setting: value}))


# --- newline-delimited JSON ---------------------------------------------------------------------

LINES = ['{"id": 1, "name": "a1"}', '{"id": 2, "name": "b\\n2"}', '{"id": 3, "name": "é🚀\u2028"}']
NDJSON = {
    "lines": "\n".join(LINES),
    "an end of line at the end": "\n".join(LINES) + "\n",
    "CRLF": "\r\n".join(LINES) + "\r\n",
    "blank lines": "\n \n" + "\n\n\t\n".join(LINES) + "\n\r\n\n",
    "byte order mark": "\ufeff" + "\n".join(LINES),
    "spaces": "\n".join(f" {line} \t" for line in LINES),
}


@pytest.mark.parametrize("text", NDJSON.values(), ids=NDJSON)
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzipped"])
def test_lines_are_records(tmp_path: Path, text: str, pack: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "response"
    path.write_bytes(pack(text.encode()))
    assert list(itertools.chain(*main.read_batches(path))) == [json.loads(line) for line in LINES]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": 3, "name": ', "record"),
        ('{"id": 3} {"id": 4}', "record"),
        ('{"id": oops}', "record"),
        ("[3]", "record 3 is not an object"),
        ("3", "record 3 is not an object"),
        ("null", "record 3 is not an object"),
        ("}", "record"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "response"
    path.write_text("\n".join([*LINES[:2], line, LINES[2]]))
    with pytest.raises(main.PipelineError, match=message) as caught:
        list(itertools.chain(*main.read_batches(path)))
    assert re.search(r"record (2|3)\b|line 3\b", str(caught.value))


def test_files_hold_the_records_themselves(api: Api) -> None:
    records = things(1, 2)
    for name, text in {
        "array.json": json.dumps(records),
        "lines.ndjson": "\r\n\n".join(map(json.dumps, records)),
    }.items():
        (api.folder / name).write_text(text)
        done = api.read(arguments=("--source", str(api.folder / name)))
        assert rows_of(done) == pairs(records)
    lines = "\n".join(map(json.dumps, records)).encode()
    assert rows_of(api.read(responds(200, lines), records=None, next=None)) == pairs(records)


# --- Launch Library 2, and the README's example ---------------------------------------------------


def test_launch_library_is_loaded_and_kept_up_to_date(sandbox: Sandbox) -> None:
    launches = json.loads(LIBRARY.read_bytes())
    arguments = "--config", LIBRARY_CONFIG, "--source", sandbox.library()
    done = sandbox.run(*arguments)
    assert done.returncode == 0, done.stderr
    assert " WARNING " not in done.stderr  # every field has its column
    assert len(sandbox.source.requests) == -(-len(launches) // LIBRARY_PAGE) == 3
    assert_loaded(sandbox, launches, LIBRARY_CONFIG)

    launches[3] |= {"net": "2030-01-01T00:00:00Z", "mission": None, "rocket": None, "pad": None}
    sandbox.source.answers = [page(launches[3:5])]
    second = loaded(sandbox, *arguments)
    rows = sandbox.query(f"SELECT id FROM public.ll2_launches WHERE _run_id = '{second}'")
    assert {row["id"] for row in rows} == {launch["id"] for launch in launches[3:5]}
    (row,) = sandbox.query("SELECT count(*), max(net) FROM public.ll2_launches")
    assert row == {"count": len(launches), "max": datetime(2030, 1, 1, tzinfo=UTC)}


def test_the_sandbox_shows_launch_library() -> None:
    command = [sys.executable, "tests/sandbox.py", "--config", "conf/launch_library.yaml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "public.ll2_launches 12 rows" in done.stderr
    for row in (r"\| SEC +\| Falcon 9 Block 5 \| DART", r"\| Launch Complex 39A +\| Kennedy"):
        assert re.search(row, done.stdout), done.stdout


def test_the_third_source_of_the_readme(tmp_path: Path, sandbox: Sandbox) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (example,) = [block for block in blocks if "api.spaceflightnewsapi.net" in block]
    config, articles = tmp_path / "news.yaml", tmp_path / "articles.json"
    config.write_text(example)
    article = {
        "id": 30_412,
        "title": "A probe on its way",
        "authors": [{"name": "Jane Doe", "socials": None}],
        "url": "https://example.org/news/1",
        "image_url": "https://example.org/news/1.jpg",
        "news_site": "Example",
        "summary": "",
        "published_at": "2026-02-03T04:05:06Z",
        "updated_at": "2026-02-03T04:10:06.120114Z",
        "featured": False,
        "launches": [{"launch_id": "59548105-347d-4477-8747-7fc3f91016c5", "provider": "LL2"}],
        "events": [],
    }
    articles.write_text(json.dumps([article]))
    done = sandbox.run("--config", config, "--dry-run", "--source", articles, TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert " WARNING " not in done.stderr
    assert "59548105-347d" in done.stdout
