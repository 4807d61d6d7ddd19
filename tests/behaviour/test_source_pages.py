"""The usual ways of paging, of asking by POST, and of answering with nothing, with a file or a no.

The servers here answer as the real ones do: GitHub, Slack, an API of numbered pages, one of
offsets, r/SpaceX's queries and GraphQL.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest

from helpers import (
    Answer,
    ConfigError,
    Done,
    Fetch,
    Load,
    PipelineError,
    Records,
    arrays_config,
    load_config,
    responds,
    things,
)
from sandbox import BUCKET, Sandbox, Source


def lines(records: Records) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def ids(sandbox: Sandbox) -> list[int]:
    return [row["id"] for row in sandbox.query("SELECT id FROM public.things ORDER BY id")]


def error(done: Done, status: int = 1) -> str:
    """The message that the run failed with; there is no traceback."""
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.partition(" ERROR ")[2]


SEVEN = things(*range(7))
Reply = tuple[Any, dict[str, str]]  # a document, and headers


def serving(reply: Callable[[dict[str, str], Any], Reply]) -> Answer:
    """Answers with what ``reply`` makes of the query and of the body that was sent."""

    def respond(handler: BaseHTTPRequestHandler) -> None:
        query = dict(parse_qsl(urlsplit(handler.path).query))
        sent = handler.rfile.read() if handler.command == "POST" else b"null"
        document, headers = reply(query, json.loads(sent))
        responds(200, document, **headers)(handler)

    return respond


# --- servers ------------------------------------------------------------------------------------


def github(query: dict[str, str], _: Any) -> Reply:
    """An array; a Link header unless there is one page."""
    number, size = int(query.get("page", 1)), int(query.get("per_page", 3))
    last = -(-len(SEVEN) // size)
    links = {"prev": number - 1, "next": number + 1, "last": last, "first": 1}
    shown = [
        f'<http://{{host}}/v5/launches?per_page={size}&page={to}>; rel="{rel}"'
        for rel, to in links.items()
        if 1 <= to <= last and to != number
    ]
    return SEVEN[(number - 1) * size : number * size], {"Link": ", ".join(shown)} if shown else {}


def semicolons(query: dict[str, str], _: Any) -> Reply:
    """A URL with a semicolon, and attributes on both sides of ``rel``."""
    number = int(query.get("page", 1))
    link = f'</v5/launches?a;b&page={number + 1}>; title="more; of it"; rel="next"; x=y'
    records = SEVEN[number * 3 - 3 : number * 3]
    return records, {"Link": link} if number < 3 else {}


def slack(query: dict[str, str], _: Any) -> Reply:
    """Cursors with characters that a query has to quote; an empty one at the end."""
    cursors = {"": 0, "dXNlcjpV+MDYx/==": 3, "a&b=c d": 6}
    start = cursors[query.get("cursor", "")]
    following = {at: cursor for cursor, at in cursors.items()}.get(start + 3, "")
    return {
        "ok": True,
        "members": SEVEN[start : start + 3],
        "response_metadata": {"next_cursor": following},
    }, {}


def numbered(first: int) -> Callable[[dict[str, str], Any], Reply]:
    def reply(query: dict[str, str], _: Any) -> Reply:
        start = (int(query.get("page", first)) - first) * 3
        return {"items": SEVEN[start : start + 3]}, {}

    return reply


def offsets(most: int) -> Callable[[dict[str, str], Any], Reply]:
    def reply(query: dict[str, str], _: Any) -> Reply:
        start, size = int(query.get("offset", 0)), min(most, int(query.get("limit", 3)))
        return {"items": SEVEN[start : start + size]}, {}

    return reply


def spacex(_: dict[str, str], body: Any) -> Reply:
    number, size = body["options"].get("page", 1), body["options"]["limit"]
    more = number * size < len(SEVEN)
    page = {
        "docs": SEVEN[(number - 1) * size : number * size],
        "totalDocs": len(SEVEN),
        "limit": size,
        "page": number,
        "hasNextPage": more,
        "nextPage": number + 1 if more else None,
    }
    return page, {}


def graphql(_: dict[str, str], body: Any) -> Reply:
    start = int(body["variables"].get("after") or 0)
    nodes = SEVEN[start : start + 3]
    info = {"endCursor": str(start + len(nodes)) if start + 3 < len(SEVEN) else None}
    return {"data": {"things": {"nodes": nodes, "pageInfo": info}}}, {}


SPACEX_BODY = '{"query": {"upcoming": false}, "options": {"limit": 3, "sort": {"id": 1}}}'
GRAPHQL_BODY = json.dumps(
    {"query": "query($after: String) { things(after: $after) { … } }", "variables": {"first": 3}}
)
# Server, settings, query of the URL, what is asked for.
STYLES: dict[str, tuple[Callable[..., Reply], dict[str, Any], str, list[str]]] = {
    "Link": (github, {"next": "Link"}, "?per_page=3", ["per_page=3", "page=2", "page=3"]),
    "Link with a semicolon": (
        semicolons,
        {"next": "Link"},
        "?a;b",
        ["a;b", "a;b&page=2", "a;b&page=3"],
    ),
    "Link of one page": (github, {"next": "Link"}, "?per_page=9", ["per_page=9"]),
    "cursor": (
        slack,
        {"records": "members", "next": "response_metadata.next_cursor", "next_param": "cursor"},
        "?limit=3&types=a,b;c",
        [
            "limit=3&types=a,b;c",
            "limit=3&types=a,b;c&cursor=dXNlcjpV%2BMDYx%2F%3D%3D",
            "limit=3&types=a,b;c&cursor=a%26b%3Dc+d",
        ],
    ),
    "pages": (
        numbered(1),
        {"records": "items", "next": "+1", "next_param": "page"},
        "",
        ["", "page=2", "page=3", "page=4"],
    ),
    "pages from 0": (
        numbered(0),
        {"records": "items", "next": "+1", "next_param": "page"},
        "?page=0&x=1",
        ["page=0", "page=1", "page=2", "page=3"],
    ),
    "offset": (
        offsets(9),
        {"records": "items", "next": "+3", "next_param": "offset"},
        "?limit=3",
        ["limit=3", "offset=3", "offset=6", "offset=9"],
    ),
    "offset from 3": (
        offsets(9),
        {"records": "items", "next": "+3", "next_param": "offset"},
        "?offset=3&limit=3",
        ["offset=3", "offset=6", "offset=9"],
    ),
    "body": (
        spacex,
        {"body": SPACEX_BODY, "records": "docs", "next": "nextPage", "next_param": "options.page"},
        "",
        ["", "", ""],
    ),
    "body counted": (
        spacex,
        {"body": SPACEX_BODY, "records": "docs", "next": "+1", "next_param": "options.page"},
        "",
        ["", "", "", ""],
    ),
    "GraphQL": (
        graphql,
        {
            "body": GRAPHQL_BODY,
            "records": "data.things.nodes",
            "next": "data.things.pageInfo.endCursor",
            "next_param": "variables.after",
        },
        "",
        ["", "", ""],
    ),
}


def localised(source: Source, reply: Callable[..., Reply]) -> Answer:
    """The server whose links name this host."""

    def with_host(query: dict[str, str], body: Any) -> Reply:
        document, headers = reply(query, body)
        host = urlsplit(source.url).netloc
        return document, {name: value.format(host=host) for name, value in headers.items()}

    return serving(with_host)


@pytest.mark.parametrize("style", STYLES)
def test_all_pages(source: Source, fetch: Fetch, pauses: list[float], style: str) -> None:
    reply, settings, query, wanted = STYLES[style]
    serve, limited = localised(source, reply), responds(429, Retry_After="3")
    records = fetch(serve, limited, *[serve] * 9, url=source.url + query, **settings)
    assert records == (SEVEN[3:] if "from 3" in style else SEVEN)
    asked = [urlsplit(path).query for path in source.requests]
    if len(wanted) > 1:
        assert pauses == [3]
        assert asked.pop(1) == asked[1]  # the one that was refused
    assert len(asked) == len(wanted)
    assert [part in found for part, found in zip(wanted, asked, strict=True)] == [True] * len(asked)
    if "body" in settings:
        bodies = [json.loads(body) for body in source.posted]
        pages = [body.get("options", {}).get("page") for body in bodies]
        if style == "body":
            assert pages == [None, 2, 2, 3]
        assert bodies[0]["query"] == json.loads(settings["body"])["query"]
        assert {sent["Content-Type"] for sent in source.headers} == {"application/json"}


def test_pages_are_counted_from_end_to_end(sandbox: Sandbox, load: Load) -> None:
    settings = {"records": "items", "next": "+3", "next_param": "offset"}
    done = load(*[serving(offsets(3))] * 5, **settings)
    assert done.returncode == 0, done.stderr
    assert ids(sandbox) == [*range(7)]
    assert "pages 4, records 7" in done.stderr


def test_queries_are_posted_from_end_to_end(sandbox: Sandbox, load: Load) -> None:
    settings = dict(STYLES["body"][1]) | {"body": SPACEX_BODY.replace("false", '"${WHICH}"')}
    done = load(*[serving(spacex)] * 5, environment={"WHICH": 'a"\\b'}, **settings)
    assert done.returncode == 0, done.stderr
    assert ids(sandbox) == [*range(7)]
    assert [json.loads(body)["query"] for body in sandbox.source.posted] == [
        {"upcoming": 'a"\\b'}
    ] * 3
    assert 'a"' not in done.stderr


REFUSED: dict[str, tuple[dict[str, Any], list[Answer], str]] = {
    "an offset beyond a cap": (
        {"records": "items", "next": "+3", "next_param": "offset"},
        [serving(offsets(2))] * 9,
        r"page 2.*follows 2 records",
    ),
    "a page that is ignored": (
        {"records": "items", "next": "+1", "next_param": "pge"},
        [serving(numbered(1))] * 9,
        "page 2.*source.next_param",
    ),
    "a cursor that is ignored": (
        {"records": "r", "next": "next", "next_param": "cursr"},
        [responds(200, {"r": SEVEN, "next": "abc"})] * 9,
        "page 3.*was there before",
    ),
    "a cursor that is no text": (
        {"records": "r", "next": "next", "next_param": "cursor"},
        [responds(200, {"r": SEVEN, "next": {"a": 1}})],
        "source.next.*a",
    ),
    "a cursor that is true": (
        {"records": "r", "next": "next", "next_param": "cursor"},
        [responds(200, {"r": SEVEN, "next": True})],
        "source.next.*true",
    ),
    "a Link elsewhere": (
        {"next": "Link"},
        [responds(200, SEVEN, Link='<http://localhost:1/>; rel="next"')],
        "page 2.*another host",
    ),
    "a Link in a circle": (
        {"next": "Link"},
        [responds(200, SEVEN, Link='</v5/launches>; rel="next"')],
        "page 2.*was there before",
    ),
    "too many pages": (
        {"records": "items", "next": "+1", "next_param": "page", "max_pages": 2},
        [serving(numbered(1))] * 9,
        r"page 3.*source\.max_pages",
    ),
    "errors in an answer": (
        {"records": "data.x", "body": "{}"},
        [responds(200, {"data": {"x": SEVEN}, "errors": [{"message": "no such field"}]})],
        "errors.*no such field",
    ),
    "a redirect of a POST": (
        {"records": "r", "body": "{}"},
        [responds(307, Location="/elsewhere"), responds(200, {"r": SEVEN})],
        "redirect.*/elsewhere",
    ),
    "a redirect of a POST to GET": (
        {"records": "r", "body": "{}"},
        [responds(302, Location="/elsewhere"), responds(200, {"r": SEVEN})],
        "redirect.*/elsewhere",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_pages_that_are_refused(source: Source, fetch: Fetch, kind: str) -> None:
    settings, answers, message = REFUSED[kind]
    with pytest.raises(PipelineError, match=message):
        fetch(*answers, **settings)


def test_a_post_is_asked_again_and_its_errors_may_be_empty(
    source: Source, fetch: Fetch, pauses: list[float]
) -> None:
    answers = responds(503), responds(200, {"data": SEVEN, "errors": []})
    assert fetch(*answers, body='{"a": 1}', records="data") == SEVEN
    assert source.posted == [b'{"a": 1}'] * 2
    # A body without records: the answer is the array itself.
    assert fetch(responds(200, SEVEN), body="{}") == SEVEN
    # Without a body, errors is a field like any other.
    assert fetch(responds(200, {"r": SEVEN, "errors": [1]}), records="r") == SEVEN


def test_fields_that_are_called_as_the_styles_are(fetch: Fetch) -> None:
    for name in ("Link", "+1", "next?", "a.b"):
        escaped = re.sub(r"^(Link|\+1)$|(?=[.?])", lambda found: "\\" + found[0], name)
        page = {"r": SEVEN[:3], name: "?2"}, {"r": SEVEN[3:], name: None}
        records = fetch(*(responds(200, p) for p in page), records="r", next=escaped)
        assert records == SEVEN


# --- nothing ------------------------------------------------------------------------------------

EMPTY: dict[str, tuple[Answer, dict[str, Any]]] = {
    "an array": (responds(200, []), {}),
    "no line": (responds(200, b""), {}),
    "blank lines": (responds(200, b"\n \n"), {}),
    "a page": (responds(200, {"r": [], "next": None}), {"records": "r", "next": "next"}),
    "an empty page first": (responds(200, {"items": []}), STYLES["pages"][1]),
}


@pytest.mark.parametrize("kind", EMPTY)
def test_an_empty_answer(sandbox: Sandbox, load: Load, kind: str) -> None:
    respond, settings = EMPTY[kind]
    parts = {
        "rows": "parts",
        "parent": "thing",
        "key": ["thing_id", "position"],
        "columns": {"thing.id": "integer", "position": "integer"},
    }
    table: dict[str, Any] = {
        "key": "id",
        "mode": "upsert",
        "columns": {"id": "integer", "name": "varchar(9)"},
    }
    tables = {"public.things": table, "public.parts": parts | {"mode": "upsert"}}
    assert "empty" in error(load(respond, tables=tables, **settings))
    table["min_rows"] = 0
    done = load(respond, tables=tables, **settings)
    assert done.returncode == 0, done.stderr
    assert "public.things 0 rows (+0)" in done.stderr
    assert len(sandbox.query("SELECT * FROM public.etl_runs")) == 2

    sandbox.query("INSERT INTO public.things VALUES (1, 'a1') RETURNING id")
    assert load(respond, tables=tables, **settings).returncode == 0
    assert ids(sandbox) == [1]
    table["mode"] = "replace"
    assert "max_shrink" in error(load(respond, tables=tables, **settings))
    assert ids(sandbox) == [1]
    table["max_shrink"] = 1
    done = load(respond, tables=tables, **settings)
    assert done.returncode == 0, done.stderr
    assert ids(sandbox) == []


def test_every_table_of_records_has_to_allow_an_empty_answer(fetch: Fetch, load: Load) -> None:
    more = {"public.others": {"key": "id", "columns": {"id": "integer"}}}
    things_ = {"public.things": {"key": "id", "columns": {"id": "integer"}, "min_rows": 0}}
    assert "empty" in error(load(responds(200, []), tables=things_ | more))


# --- variables in the URL ------------------------------------------------------------------------


def test_a_variable_in_the_url(sandbox: Sandbox, load: Load) -> None:
    url = sandbox.source.url.replace("launches", "${TEAM}") + "?since=${SINCE}"
    settings = {"url": url, "arguments": ("--verbose",)}
    done = load(responds(200, SEVEN), environment={"TEAM": "t34m", "SINCE": "2026"}, **settings)
    assert done.returncode == 0, done.stderr
    assert sandbox.source.requests == ["/v5/t34m?since=2026"]
    assert "/v5/${TEAM}\n" in done.stderr
    assert "t34m" not in done.stderr
    (audit,) = sandbox.query("SELECT source FROM public.etl_runs")
    assert audit["source"].endswith("/v5/${TEAM}")
    done = load(responds(200, SEVEN), environment={"TEAM": "t34m"}, **settings)
    message = error(done, status=2)
    assert "source.url: ${SINCE} is not set" in message
    assert "TEAM" not in message


# --- files --------------------------------------------------------------------------------------

PAGE = {"count": 7, "next": "http://localhost:1/", "results": SEVEN}
ONE = {"id": 1, "name": "a1", "parts": [{"id": 2}, {"id": 3}]}
FILES: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "a page": (PAGE, {"records": "results", "next": "next"}, SEVEN),
    "a page below": ({"data": PAGE}, {"records": "data.results"}, SEVEN),
    "a page, but records is not set": (PAGE, {}, "set it to results$"),
    "a page with another name": (PAGE, {"records": "data"}, "set it to results$"),
    "the records though records is set": (SEVEN, {"records": "results"}, SEVEN),
    "lines though records is set": (lines(SEVEN), {"records": "results"}, SEVEN),
    "one record": (ONE, {}, [ONE]),
    "one record though records is set": (lines([ONE]), {"records": "results"}, [ONE]),
    "two objects": (b'{"id": 1}\n{"id": 2}', {}, things(1, 2)),
}


@pytest.mark.parametrize("indent", [None, 2], ids=["one line", "indented"])
@pytest.mark.parametrize(
    ("kind", "place"),
    # An answer with settings is asked for page by page.
    [(k, p) for k in FILES for p in ("file", "gzip", "answer") if p != "answer" or not FILES[k][1]],
)
def test_a_file_is_read_like_an_answer(
    source: Source, fetch: Fetch, tmp_path: Path, kind: str, place: str, indent: int | None
) -> None:
    document, settings, wanted = FILES[kind]
    body = document if isinstance(document, bytes) else json.dumps(document, indent=indent).encode()
    path = tmp_path / "source.json"
    path.write_bytes(gzip.compress(body) if place == "gzip" else body)
    url = source.url if place == "answer" else str(path)
    tables = {"public.things": {"key": "id", "columns": {"id": "integer", "name": "varchar(9)"}}}
    if isinstance(wanted, str):
        with pytest.raises(PipelineError, match=wanted):
            fetch(responds(200, body), url=url, tables=tables, **settings)
    else:
        records = fetch(responds(200, body), url=url, tables=tables, **settings)
        assert [record["id"] for record in records] == [record["id"] for record in wanted]
    assert len(source.requests) == (place == "answer")


def test_a_page_in_s3(sandbox: Sandbox, load: Load) -> None:
    sandbox.s3.put_object(Bucket=BUCKET, Key="page.json", Body=json.dumps(PAGE).encode())
    done = load(url=f"s3://{BUCKET}/page.json", records="results", next="next")
    assert done.returncode == 0, done.stderr
    assert ids(sandbox) == [*range(7)]
    assert sandbox.source.requests == []


def test_a_replay_of_one_record_that_has_the_records_name(sandbox: Sandbox, load: Load) -> None:
    """A raw response holds records, also where one of them looks like a page."""
    record = {"id": 1, "name": "a1", "results": SEVEN}
    settings = {"records": "results", "next": "next"}
    done = load(responds(200, {"results": [record], "next": None}), **settings)
    assert done.returncode == 0, done.stderr
    (raw,) = (f"s3://{BUCKET}/{key}" for key in sandbox.objects() if "/raw/" in key)
    done = load(arguments=("--source", raw), **settings)
    assert done.returncode == 0, done.stderr
    assert ids(sandbox) == [1]


# --- what the server said ------------------------------------------------------------------------

SAID: dict[str, tuple[bytes, str]] = {
    "text": (b"No such\n\n   launch\t", "HTTP 404 Not Found: No such launch, attempt 1"),
    "JSON": (b'{"detail": "x"}', 'HTTP 404 Not Found: {"detail": "x"}, attempt 1'),
    "long": (b"x" * 100_000, "x" * 200 + "…, attempt 1"),
    "nothing": (b"", "HTTP 404 Not Found, attempt 1"),
    "not UTF-8": (b"caf\xe9", "caf\ufffd"),
    "escapes": (b"\x1b[31m\x00", r"\x1b[31m\x00"),
}


@pytest.mark.parametrize("kind", SAID)
def test_a_4xx_shows_what_the_server_said(sandbox: Sandbox, load: Load, kind: str) -> None:
    body, shown = SAID[kind]
    assert shown in error(load(responds(404, body)))


def test_a_4xx_that_is_coded_or_breaks_off(fetch: Fetch) -> None:
    packed = responds(404, gzip.compress(b"No such launch"), Content_Encoding="gzip")
    with pytest.raises(PipelineError, match="Not Found: No such launch, attempt 1"):
        fetch(packed)
    for header in ({"Content_Length": "99"}, {"Content_Encoding": "gzip"}):
        with pytest.raises(PipelineError, match="HTTP 404 Not Found"):
            fetch(responds(404, b"No such", **header))


# --- settings -----------------------------------------------------------------------------------

FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "next_param alone": ({"next_param": "page"}, "source.next_param"),
    "a number alone": ({"next": "+1"}, "source.next: .*next_param"),
    "Link with next_param": ({"next": "Link", "next_param": "page"}, "source.next_param"),
    "a step of 0": ({"next": "+0", "next_param": "page"}, "source.next"),
    "body that is no JSON": ({"body": "{query: 1}"}, "source.body"),
    "body that is no object": ({"body": "[1]"}, "source.body"),
    "body with NaN": ({"body": '{"a": NaN}'}, "source.body"),
    "a path that the body cannot have": (
        {"body": '{"a": 1}', "next": "n", "next_param": "a.page"},
        "source.next_param",
    ),
    "a variable outside of a text": ({"body": '{"a": ${KEY}}'}, "source.body"),
    "a variable that is not set": ({"body": '{"a": "${NOT_SET}"}'}, r"source.body: \$\{NOT_SET"),
    "a body for a file": ({"url": "launches.json", "body": "{}"}, "source.body"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_settings_that_do_not_fit(tmp_path: Path, kind: str) -> None:
    settings, message = FAULTS[kind]
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(arrays_config(tmp_path, **{"url": "https://example.org/", **settings}))
    assert "unknown key" not in str(caught.value)
