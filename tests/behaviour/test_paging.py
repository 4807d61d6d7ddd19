"""Sources that answer page by page, rate limits, headers, and newline-delimited JSON."""

from __future__ import annotations

import gzip
import itertools
import json
import re
import signal
import ssl
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers import (
    Answer,
    ConfigError,
    Done,
    PipelineError,
    Records,
    assert_failed,
    assert_table,
    fetch_records,
    load_config,
    read_records,
    responds,
    without_pauses,
)
from redshift import make_certificate
from sandbox import (
    BUCKET,
    LIBRARY,
    LIBRARY_CONFIG,
    LIBRARY_PAGE,
    LIBRARY_QUESTIONS,
    ROOT,
    SECRET,
    Sandbox,
    Source,
)

Fetch = Callable[..., Records]
Load = Callable[..., Done]

THINGS: dict[str, Any] = {
    "public.things": {"key": "id", "columns": {"id": "integer not null", "name": "varchar(64)"}}
}
CANARY = "c4nary-T0ken"  # what must never be seen
HEADERS = {"Authorization": "Token ${LL2_TOKEN}", "X-Api-Key": "${LL2_TOKEN}", "X-Plain": "$HOME"}
DIGITS = b"0.1234567890123456789012345"  # more than a double holds


# --- helpers ------------------------------------------------------------------------------------


def things(*ids: int) -> Records:
    return [{"id": number, "name": f"a{number}"} for number in ids]


def page(records: Records, following: object = None) -> Answer:
    return responds(200, {"results": records, "next": following})


def write_config(folder: Path, url: str, tables: Any = None, **source: Any) -> Path:
    """A configuration for an API of things; a setting of the source that is None is left out."""
    source = {"url": url, "records": "results", "next": "next"} | source
    sections = {
        "source": {name: value for name, value in source.items() if value is not None},
        "staging": {"bucket": BUCKET, "prefix": "things"},
        "redshift": {"secret": SECRET},
        "tables": tables or THINGS,
    }
    path = folder / "things.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


@pytest.fixture
def source() -> Iterator[Source]:
    with Source() as source:
        yield source


@pytest.fixture
def fetch(source: Source, tmp_path: Path) -> Fetch:
    """What the program reads from the source when that gives these answers."""

    def fetch(*answers: Answer, url: str = source.url, **settings: Any) -> Records:
        source.answers = list(answers)
        return fetch_records(load_config(write_config(tmp_path, url, **settings)), tmp_path)

    return fetch


@pytest.fixture
def load(sandbox: Sandbox, tmp_path: Path) -> Load:
    """Runs the program, to which the sandbox's source gives these answers."""

    def load(
        *answers: Answer,
        arguments: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
        **settings: Any,
    ) -> Done:
        sandbox.source.answers = list(answers)
        config = write_config(tmp_path, sandbox.source.url, **settings)
        environment = {"TMPDIR": str(tmp_path)} | (environment or {})
        return sandbox.run("--config", config, *arguments, **environment)

    return load


def rows_of(sandbox: Sandbox) -> Records:
    return sandbox.query("SELECT id, name FROM public.things ORDER BY id")


def archive(sandbox: Sandbox) -> tuple[str, bytes]:
    """The URL of the only raw response in the bucket, and its text."""
    ((key, data),) = [item for item in sandbox.objects().items() if "/raw/" in item[0]]
    return f"s3://{BUCKET}/{key}", gzip.decompress(data)


# --- pages --------------------------------------------------------------------------------------


def test_all_pages_are_loaded_archived_and_replayed(sandbox: Sandbox, load: Load) -> None:
    url = sandbox.source.url
    awkward = b'"\xc3\xa9\\ud83d\\ude80\\n\xe2\x80\xa8"'
    last = b'{"id": 5, "name": "a5", "more": [%s, %s, {}]}' % (awkward, DIGITS)
    records = [*things(1, 2, 3, 4), json.loads(last)]
    done = load(
        page(records[:2], f"{url}?page=2"),
        page([], "?page=3"),  # relative to the page it stands on
        page(records[2:4], "/other/things?page=4"),
        responds(200, b'{"next": "more", "results": [%s]}' % last),
        page([], ""),
    )
    assert done.returncode == 0, done.stderr
    path = "/v5/launches"
    wanted = [path, f"{path}?page=2", f"{path}?page=3", "/other/things?page=4", "/other/more"]
    assert sandbox.source.requests == wanted
    assert rows_of(sandbox) == things(1, 2, 3, 4, 5)
    raw, text = archive(sandbox)
    assert raw.endswith("/response.ndjson.gz")
    assert [json.loads(line) for line in text.splitlines()] == records
    assert DIGITS in text
    (audit,) = sandbox.query("SELECT raw, source, rows_loaded FROM public.etl_runs")
    assert audit == {"raw": raw, "source": url, "rows_loaded": 5}

    sandbox.query("DELETE FROM public.things RETURNING id")
    sandbox.source.requests.clear()
    done = load(arguments=("--source", raw))
    assert done.returncode == 0, done.stderr
    assert sandbox.source.requests == []
    assert rows_of(sandbox) == things(1, 2, 3, 4, 5)


@pytest.mark.parametrize(
    ("settings", "documents"),
    [
        ({}, [{"results": things(1)}]),
        ({"next": None}, [{"results": things(1), "next": "?2"}]),
        (
            {"records": "data.items", "next": "paging.links.next"},
            [
                {"data": {"items": things(1)}, "paging": {"links": {"next": "?page=2"}}},
                {"data": {"items": things(2)}, "paging": None},
            ],
        ),
        ({"max_pages": 2}, [{"results": things(1), "next": "?2"}, {"results": things(2)}]),
        ({"records": None, "next": None}, [things(1)]),
        ({"records": None}, [things(1)]),
    ],
    ids=["no next", "next not followed", "nested", "all allowed", "plain array", "next of none"],
)
def test_other_shapes(
    source: Source, fetch: Fetch, settings: dict[str, Any], documents: list[Any]
) -> None:
    records = fetch(*(responds(200, document) for document in documents), **settings)
    assert records == things(*range(1, len(documents) + 1))
    assert len(source.requests) == len(documents)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([page(things(1), "?2"), responds(200, b"<html>Busy")], "not JSON.*<html>Busy"),
        ([page(things(1), "?2"), responds(200, b'{"results": [{"id": 2')], "not JSON"),
        ([responds(200, gzip.compress(b'{"results": []}')[:-9])], "/v5/launches: "),
        ([responds(200, b"\x1f\x8b\x08" + b"\0" * 7 + b"\xff" * 9)], "/v5/launches: "),
        ([responds(200, {"detail": "Not here"})], "no array at source.records.*Not here"),
        ([page(things(1), "?2"), responds(200, {"results": {"id": 2}})], "no array"),
        ([responds(200, things(1))], "no array at source.records"),
        ([page(things(1), "?2"), responds(200, {"results": [7]})], "is not an object: 7"),
        ([responds(200, {"results": [things(1)]})], "is not an object"),
        ([page([], "?2"), page([])], "is empty"),
        ([page(things(1), 7)], "source.next.*7"),
        ([page(things(1), "?2"), responds(404)], "HTTP 404"),
    ],
    ids=[
        "HTML",
        "ends early",
        "gzip ends early",
        "broken gzip",
        "no array",
        "an object",
        "the array itself",
        "a number",
        "arrays",
        "nothing",
        "a number as next",
        "not found",
    ],
)
def test_a_page_that_is_wrong(
    source: Source, fetch: Fetch, answers: list[Answer], message: str
) -> None:
    with pytest.raises(PipelineError, match=message):
        fetch(*answers)
    assert len(source.requests) == len(answers)


def test_a_loop_and_too_many_pages_end_the_run(source: Source, fetch: Fetch) -> None:
    with pytest.raises(PipelineError, match=r"page 4, .*/v5/launches, was there before"):
        fetch(page(things(1), "?b"), page(things(2), "?c"), page(things(3), "?b"))
    assert len(source.requests) == 3
    source.requests.clear()
    with pytest.raises(PipelineError, match=r"page 5, .* source\.max_pages"):
        fetch(*(page(things(number), f"?{number}") for number in range(9)), max_pages=4)
    assert len(source.requests) == 4


def test_a_record_that_moved_between_two_pages_is_kept_once(sandbox: Sandbox, load: Load) -> None:
    parts = {
        "rows": "parts",
        "parent": "thing",
        "key": ["thing_id", "position"],
        "columns": {
            "thing.id": "integer not null",
            "position": "integer not null",
            "value": "varchar(8)",
        },
    }
    tables = THINGS | {"public.parts": parts}
    first, early, late, last = (
        {"id": number, "name": name, "parts": [name, "x"]}
        for number, name in ((1, "same"), (2, "early"), (2, "late"), (3, "same"))
    )
    kept: list[dict[str, Any]] = [first, late, last]

    def assert_kept(done: Done) -> None:
        assert done.returncode == 0, done.stderr
        assert rows_of(sandbox) == [{n: r[n] for n in ("id", "name")} for r in kept]
        query = "SELECT thing_id, value FROM public.parts ORDER BY thing_id, position"
        values = [{"thing_id": r["id"], "value": value} for r in kept for value in r["parts"]]
        assert sandbox.query(query) == values

    assert_kept(load(page([first, early], "?2"), page([late, last]), tables=tables))
    raw, text = archive(sandbox)
    assert sorted(map(json.loads, text.splitlines()), key=lambda r: r["id"]) == kept
    assert_kept(load(tables=tables, arguments=("--source", raw)))


def test_a_double_key_within_a_page_is_an_error(sandbox: Sandbox, load: Load) -> None:
    done = load(page(things(1, 2), "?2"), page(things(3, 4, 3)))
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
        "http://127.0.0.1:99999/x",
    ],
)
def test_a_next_page_elsewhere_is_refused(source: Source, fetch: Fetch, following: str) -> None:
    following = following.format(port=source.server.server_port)
    with pytest.raises(PipelineError, match=re.escape(following.partition("?")[0][-12:])):
        fetch(page(things(1), following), page(things(2)))
    assert len(source.requests) == 1


def test_no_next_page_without_tls_after_one_with_it(
    source: Source, fetch: Fetch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = make_certificate(tmp_path, "localhost")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.ca))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.certificate, certificate.key)
    source.server.socket = context.wrap_socket(source.server.socket, server_side=True)
    address = f"localhost:{source.server.server_port}/v5/launches"
    pages = page(things(1), "?2"), page(things(2), f"http://{address}?3"), page(things(3))
    with pytest.raises(PipelineError, match=f"page 3, http://{address}"):
        fetch(*pages, url=f"https://{address}")
    assert len(source.requests) == 2


def test_headers_go_to_the_source_and_nowhere_else(
    source: Source, fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = f"{CANARY}-${{HOME}}"
    sent = {"Authorization": f"Token {token}", "X-Api-Key": token, "X-Plain": "$HOME"}
    monkeypatch.setenv("LL2_TOKEN", token)
    with Source() as other:
        elsewhere = other.url.replace("127.0.0.1", "localhost")
        other.answers = [responds(307, Location="/further"), page(things(2))]
        pages = (
            responds(307, Location="/here"),
            page(things(1), "?2"),
            responds(302, Location=elsewhere),
        )
        assert fetch(*pages, headers=HEADERS) == things(1, 2)
    assert [headers | sent == headers for headers in source.headers] == [True] * 3
    assert len(other.headers) == 2
    assert not any(sent.keys() & headers.keys() for headers in other.headers)
    assert CANARY not in str(other.headers)


# --- rate limits --------------------------------------------------------------------------------


def timed(times: list[float], respond: Answer) -> Answer:
    def send(handler: BaseHTTPRequestHandler) -> None:
        times.append(time.time())
        respond(handler)

    return send


def dated(handler: BaseHTTPRequestHandler) -> None:
    """429 with a date, which has whole seconds, about 2 s from now."""
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)
    responds(429, Retry_After=date)(handler)


def test_a_rate_limit_is_waited_for_until_the_time_that_the_log_says(
    fetch: Fetch, caplog: pytest.LogCaptureFixture
) -> None:
    times: list[float] = []
    answers = responds(429, Retry_After="2"), page(things(1), "?2"), dated, page(things(2))
    assert fetch(*(timed(times, answer) for answer in answers), max_wait=3) == things(1, 2)
    assert 2 <= times[1] - times[0] < 3
    assert 1 <= times[3] - times[2] < 3
    logged = [record.getMessage() for record in caplog.records if "429" in record.getMessage()]
    assert len(logged) == 2
    for message, came in zip(logged, times[1::2], strict=True):
        stated = re.search(r"\d\d:\d\d:\d\d(?=Z)", message)
        assert stated, message
        moment = datetime.combine(datetime.fromtimestamp(came, UTC), datetime.min.time(), UTC)
        clock = timedelta(
            seconds=sum(map(int.__mul__, (3600, 60, 1), map(int, stated[0].split(":"))))
        )
        assert -1 <= came - (moment + clock).timestamp() < 2


@pytest.fixture
def pauses() -> Iterator[list[float]]:
    """The pauses, which are not made."""
    with without_pauses() as sleep:
        pauses: list[float] = []
        sleep.side_effect = pauses.append
        yield pauses


def test_more_than_max_wait_fails_at_once_and_names_both(fetch: Fetch, pauses: list[float]) -> None:
    with pytest.raises(PipelineError, match=r"429.*3600.*max_wait, 900 s"):
        fetch(responds(429, Retry_After="3600"), page(things(1)))
    assert pauses == []


def test_max_wait_is_for_all_waits_of_a_request(source: Source, fetch: Fetch) -> None:
    with pytest.raises(PipelineError, match=r"429.*max_wait, 3 s"):
        fetch(*[responds(429, Retry_After="2")] * 3, max_wait=3)
    assert len(source.requests) == 2


def test_without_a_time_the_pauses_grow(fetch: Fetch, pauses: list[float]) -> None:
    answers = [responds(429), responds(429, Retry_After="soon"), *[responds(429)] * 3]
    assert fetch(*answers, page(things(1))) == things(1)
    assert len(pauses) == 5
    assert all(0.9 < later / before < 4.1 for before, later in itertools.pairwise(pauses))
    assert pauses[-1] > 4 * pauses[0]
    with pytest.raises(PipelineError, match=r"429.*max_wait"):
        fetch(responds(429), page(things(1)), max_wait=0)


def test_rate_limits_and_other_failures_do_not_count_as_each_other(
    source: Source, fetch: Fetch, pauses: list[float]
) -> None:
    limited, failed = responds(429, Retry_After="1"), responds(503, Retry_After="1")
    assert fetch(*[limited] * 8, page(things(1))) == things(1)
    assert fetch(*[limited] * 5, *[failed] * 5, page(things(1))) == things(1)
    source.requests.clear()
    with pytest.raises(PipelineError, match=r"HTTP 503.*attempt 6"):
        fetch(*[failed] * 9)
    assert len(source.requests) == 6
    source.requests.clear()
    with pytest.raises(PipelineError, match="HTTP 503"):
        fetch(*[limited] * 7, *[failed] * 9)
    assert len(source.requests) == 7 + 6


def test_a_signal_ends_the_wait(sandbox: Sandbox, tmp_path: Path) -> None:
    sandbox.source.answers = [responds(429, Retry_After="600")]
    config = write_config(tmp_path, sandbox.source.url)
    process = sandbox.start("--config", config, "--dry-run", plainly=True, TMPDIR=str(tmp_path))
    assert process.stderr
    for line in process.stderr:
        if "429" in line:
            process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 143
    assert not list(tmp_path.glob("sequra-*"))


# --- secrets ------------------------------------------------------------------------------------


def test_the_token_is_nowhere_but_in_the_requests(sandbox: Sandbox, load: Load) -> None:
    headers = {"Authorization": HEADERS["Authorization"]}
    settings = {"headers": headers, "environment": {"LL2_TOKEN": CANARY}}
    done = load(
        responds(429, Retry_After="1"),
        page(things(1), "?2"),
        page(things(2)),
        arguments=("--verbose",),
        **settings,
    )
    assert done.returncode == 0, done.stderr
    echo = responds(200, {"detail": f"Invalid token: {CANARY}"})
    failed = load(echo, arguments=("--verbose",), **settings)
    assert_failed(failed, "Invalid token")
    assert [sent["Authorization"] for sent in sandbox.source.headers] == [f"Token {CANARY}"] * 4
    everything = f"{done.stdout}{done.stderr}{failed.stdout}{failed.stderr}"
    everything += repr(sandbox.redshift.statements)
    for name in ("public.things", "public.etl_runs"):
        everything += repr(sandbox.query(f"SELECT * FROM {name}"))
    for data in sandbox.objects().values():
        everything += repr(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)
    assert "a2" in everything
    assert CANARY not in everything


@pytest.mark.parametrize(
    "fault",
    [
        responds(401, {"detail": "Invalid token"}),
        responds(302, Location="http://[::1"),
        responds(302, Location="http://localhost:1/"),
        page(things(1), "http://localhost:1/"),
        lambda handler: setattr(handler, "close_connection", True),
    ],
    ids=["401", "bad redirect", "redirect to nobody", "next elsewhere", "no answer"],
)
@pytest.mark.usefixtures("pauses")
def test_no_failure_shows_the_token(
    fetch: Fetch, fault: Answer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LL2_TOKEN", CANARY)
    with pytest.raises(PipelineError) as caught:
        fetch(*[fault] * 6, headers=HEADERS)
    assert CANARY not in f"{caught.value}{caplog.text}"


@pytest.mark.parametrize("token", [f"{CANARY}\n", f"{CANARY}\nX-Other: 1", f"{CANARY} é🚀", ""])
def test_a_token_that_cannot_be_sent_is_not_shown_but_its_header_is(
    source: Source, fetch: Fetch, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setenv("LL2_TOKEN", token)
    with pytest.raises(ConfigError, match=r"source\.headers\.X-Api-Key") as caught:
        fetch(page(things(1)), headers={"X-Api-Key": "${LL2_TOKEN}"})
    assert CANARY not in str(caught.value)
    assert source.requests == []


def test_a_variable_that_is_not_set_is_named(sandbox: Sandbox, load: Load) -> None:
    headers = {"Authorization": "Token ${LL2_TOKEN}", "X-Key": "${LL2_A}-${LL2_TOKEN}"}
    done = load(page(things(1)), headers=headers, environment={"LL2_TOKEN": CANARY})
    assert_failed(done, "source.headers.X-Key", "${LL2_A}", status=2)
    assert CANARY not in done.stderr
    assert sandbox.source.requests == []


@pytest.mark.parametrize(
    ("setting", "value"),
    [
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
def test_a_wrong_setting_is_named(tmp_path: Path, setting: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"source\.{setting}"):
        load_config(write_config(tmp_path, "https://example.org", **{setting: value}))


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
    assert list(read_records(path)) == [json.loads(line) for line in LINES]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": 3, "name": ', "not JSON after record 2"),
        ('{"id": 3} {"id": 4}', "not JSON after record 2: Extra data"),
        ('{"id": oops}', "not JSON after record 2.*oops"),
        ("}", "not JSON after record 2"),
        ("[3]", "record 3 is not an object"),
        ("null", "record 3 is not an object"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "response"
    path.write_text("\n\n".join([*LINES[:2], line, LINES[2]]))
    with pytest.raises(PipelineError, match=message):
        list(read_records(path))


def test_files_hold_the_records_themselves_and_answers_can_be_lines(
    fetch: Fetch, tmp_path: Path
) -> None:
    lines = "\r\n\n".join(map(json.dumps, things(1, 2)))
    for name, text in {"array.json": json.dumps(things(1, 2)), "lines.ndjson": lines}.items():
        (tmp_path / name).write_text(text)
        assert fetch(url=str(tmp_path / name)) == things(1, 2)
    assert fetch(responds(200, lines.encode()), records=None, next=None) == things(1, 2)


# --- Launch Library 2, and the README's example ---------------------------------------------------


def test_launch_library_is_loaded_and_kept_up_to_date(sandbox: Sandbox) -> None:
    launches = json.loads(LIBRARY.read_bytes())
    arguments = "--config", LIBRARY_CONFIG, "--source", sandbox.library()
    done = sandbox.run(*arguments)
    assert done.returncode == 0, done.stderr
    assert "WARNING transform" not in done.stderr  # every field has its column
    assert len(sandbox.source.requests) == -(-len(launches) // LIBRARY_PAGE) == 3
    for launch in launches:
        body = launch["pad"]["location"]["celestial_body"]
        assert body["mass"] == 5972168e18
        body["mass"] = 5972168 * 10**18  # as PostgreSQL shows it
    ((name, table),) = yaml.safe_load(LIBRARY_CONFIG.read_bytes())["tables"].items()
    assert_table(sandbox, name, table, launches)
    flights, pads = (sandbox.query(sql) for sql in LIBRARY_QUESTIONS.values())
    assert [(f["mission"], f["status"]) for f in flights[::11]] == [
        ("FalconSat", "Failure"),
        ("Dragonfly", "TBD"),
    ]
    assert [pad["launches"] for pad in pads] == [7, 3, 1, 1]

    launches[3] |= {"net": "2030-01-01T00:00:00Z", "mission": None, "rocket": None, "pad": None}
    sandbox.source.answers = [page(launches[3:5])]
    query = "SELECT id, net, _run_id FROM public.ll2_launches"
    (first,) = {row["_run_id"] for row in sandbox.query(query)}
    done = sandbox.run(*arguments)
    assert done.returncode == 0, done.stderr
    rows = sandbox.query(query)
    assert len(rows) == len(launches)
    renewed = {row["id"]: row["net"] for row in rows if row["_run_id"] != first}
    assert renewed.keys() == {launch["id"] for launch in launches[3:5]}
    assert max(renewed.values()) == datetime(2030, 1, 1, tzinfo=UTC)


def test_the_sandbox_shows_launch_library() -> None:
    command = [sys.executable, "tests/sandbox.py", "--config", "conf/launch_library.yaml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pages 3, records 12" in done.stderr
    for row in (r"\| MIN +\| Falcon 9 Block 5 \| IXPE", r"\| Launch Complex 39A +\| Kennedy"):
        assert re.search(row, done.stdout), done.stdout


def test_the_third_source_of_the_readme(sandbox: Sandbox, tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (example,) = [block for block in blocks if "api.spaceflightnewsapi.net" in block]
    config, articles = tmp_path / "news.yaml", tmp_path / "articles.json"
    config.write_text(textwrap.dedent(example))
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
    arguments = "--config", config, "--dry-run", "--source", articles
    done = sandbox.run(*arguments, TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    assert "59548105-347d" in done.stdout
