"""Pages: all styles of asking for the next one, where they end, what is refused; and files.

The servers here answer as the real ones do: GitHub, Slack, APIs of numbered pages and of offsets,
r/SpaceX's queries and GraphQL.
"""

from __future__ import annotations

import gzip
import json
import re
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
import yaml

from helpers import PAGED, Answer, Fetch, PipelineError, json_lines, page, responds, things
from sandbox import SAMPLE, Source

SEVEN = things(*range(7))

# --- documents ----------------------------------------------------------------------------------

DOCUMENTS = yaml.safe_load((SAMPLE.parent / "pages.yaml").read_text("utf-8"))


def served(document: Any) -> Answer:
    return responds(200, document.encode() if isinstance(document, str) else document)


@pytest.mark.parametrize("case", DOCUMENTS["read"])
def test_what_is_read(source: Source, fetch: Fetch, case: str) -> None:
    pages, settings = (DOCUMENTS["read"][case].get(name, {}) for name in ("pages", "settings"))
    records = fetch(*map(served, pages), **settings)
    assert records == [{"id": number} for number in range(1, len(pages) + 1)]
    assert len(source.requests) == len(pages)


# Settings, answers, what is said.
REFUSED: dict[str, tuple[dict[str, Any], list[Answer], str]] = {
    "not found": (PAGED, [page(things(1), "?2"), responds(404)], "HTTP 404"),
    "gzip cut": (PAGED, [responds(200, gzip.compress(b'{"results": []}')[:-9])], "/v5/launches: "),
    "gzip": (PAGED, [responds(200, b"\x1f\x8b\x08" + bytes(7) + b"\xff" * 9)], "/v5/launches: "),
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
    "a POST redirected": ({"body": "{}"}, [responds(307, Location="/else")], "redirect.*/else"),
    "a POST made GET": ({"body": "{}"}, [responds(302, Location="/else")], "redirect.*/else"),
} | {
    name: (case["settings"], [*map(served, case["pages"])], case["said"])
    for name, case in DOCUMENTS["refused"].items()
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(source: Source, fetch: Fetch, case: str) -> None:
    settings, answers, said = REFUSED[case]
    with pytest.raises(PipelineError, match=said):
        fetch(*answers, **settings)
    assert len(source.requests) == len(answers)


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
        fetch(page(things(1), following), page(things(2)), **PAGED)
    assert len(source.requests) == 1


LINK = '</v5/launches?page=2>; rel="next", </v5/launches?page=9>; rel="last"'
UNFOLLOWED: dict[str, tuple[dict[str, Any], Any, bool]] = {
    "array": ({}, SEVEN, True),
    "records": ({"records": "results"}, {"results": SEVEN}, True),
    "another style": (PAGED, {"results": SEVEN, "next": None}, False),
}


@pytest.mark.parametrize(("settings", "document", "warns"), UNFOLLOWED.values(), ids=UNFOLLOWED)
def test_a_link_to_a_next_page_that_is_not_followed_is_told(
    fetch: Fetch, caplog: pytest.LogCaptureFixture, settings: Any, document: Any, warns: bool
) -> None:
    assert fetch(responds(200, document, Link=LINK), responds(200, document), **settings) == SEVEN
    assert [r.levelname for r in caplog.records if "Link" in r.message] == ["WARNING"] * warns
    caplog.clear()
    assert fetch(responds(200, document, Link='</>; rel="prev"'), **settings) == SEVEN
    assert caplog.records == []


# --- styles -------------------------------------------------------------------------------------


def asked(handler: BaseHTTPRequestHandler) -> Any:
    """What was posted, or the parameters of the URL."""
    if handler.command == "POST":
        return json.loads(handler.rfile.read())
    return dict(parse_qsl(urlsplit(handler.path).query))


def github(handler: BaseHTTPRequestHandler) -> None:
    """An array, and the whole URLs of the pages around in the header Link."""
    number = int(asked(handler).get("page", 1))
    url = f"http://{handler.headers['Host']}/v5/launches?per_page=3&page="
    around = {"prev": number - 1, "next": number + 1, "last": 3, "first": 1}
    links = [f'<{url}{to}>; rel="{rel}"' for rel, to in around.items() if 1 <= to <= 3]
    responds(200, SEVEN[number * 3 - 3 : number * 3], Link=", ".join(links))(handler)


def semicolons(handler: BaseHTTPRequestHandler) -> None:
    """A URL with a semicolon, and attributes on both sides of ``rel``."""
    number = int(asked(handler).get("page", 1))
    link = f'</v5/launches?a;b&page={number + 1}>; title="more; of it"; rel="next"; x=y'
    headers = {"Link": link} if number < 3 else {}
    responds(200, SEVEN[number * 3 - 3 : number * 3], **headers)(handler)


def slack(handler: BaseHTTPRequestHandler) -> None:
    """Cursors with characters that a query has to quote; an empty one at the end."""
    cursors = ["", "dXNlcjpV+MDYx/==", "a&b=c d", ""]
    number = cursors.index(asked(handler).get("cursor", ""))
    members, following = SEVEN[number * 3 : number * 3 + 3], cursors[number + 1]
    document = {"members": members, "response_metadata": {"next_cursor": following}}
    responds(200, document)(handler)


def counted(name: str, first: int, each: int) -> Answer:
    """Three records, from the one that a number in the URL means."""

    def respond(handler: BaseHTTPRequestHandler) -> None:
        start = (int(asked(handler).get(name, first)) - first) * each
        responds(200, {"items": SEVEN[start : start + 3]})(handler)

    return respond


def spacex(handler: BaseHTTPRequestHandler) -> None:
    options = asked(handler)["options"]
    number, size = options.get("page", 1), options["limit"]
    following = number + 1 if number * size < len(SEVEN) else None
    docs = SEVEN[number * size - size : number * size]
    responds(200, {"docs": docs, "page": number, "nextPage": following})(handler)


def graphql(handler: BaseHTTPRequestHandler) -> None:
    start = int(asked(handler)["variables"].get("after") or 0)
    info = {"endCursor": str(start + 3) if start + 3 < len(SEVEN) else None}
    nodes = SEVEN[start : start + 3]
    responds(200, {"data": {"things": {"nodes": nodes, "pageInfo": info}}})(handler)


SLACK = {"records": "members", "next": "response_metadata.next_cursor", "next_param": "cursor"}
COUNTED = {"records": "items", "next": "+1", "next_param": "page"}
OFFSET = {"records": "items", "next": "+3", "next_param": "offset"}
QUERY = {
    "body": '{"query": {"upcoming": "${WHICH}"}, "options": {"limit": 3, "sort": {"id": 1}}}',
    "records": "docs",
    "next": "nextPage",
    "next_param": "options.page",
}
GRAPHQL = {
    "body": '{"query": "{ things(who: \\"${WHICH}\\", after: $after) { … } }", "variables": {}}',
    "records": "data.things.nodes",
    "next": "data.things.pageInfo.endCursor",
    "next_param": "variables.after",
}
# Server, settings; what the URL has, and has for each page after the first.
STYLES: dict[str, tuple[Answer, dict[str, str], str, list[str]]] = {
    "Link": (github, {"next": "Link"}, "per_page=3", ["per_page=3&page=2", "per_page=3&page=3"]),
    "Link with a semicolon": (semicolons, {"next": "Link"}, "a;b", ["a;b&page=2", "a;b&page=3"]),
    "cursor": (
        slack,
        SLACK,
        "limit=3&types=a,b;c",
        [
            "limit=3&types=a,b;c&cursor=dXNlcjpV%2BMDYx%2F%3D%3D",
            "limit=3&types=a,b;c&cursor=a%26b%3Dc+d",
        ],
    ),
    "pages": (counted("page", 1, 3), COUNTED, "", ["page=2", "page=3", "page=4"]),
    "pages from 0": (
        counted("page", 0, 3),
        COUNTED,
        "page=0&x=1",
        ["x=1&page=1", "x=1&page=2", "x=1&page=3"],
    ),
    "offset": (counted("offset", 0, 1), OFFSET, "", ["offset=3", "offset=6", "offset=9"]),
    "offset from 3": (counted("offset", 0, 1), OFFSET, "offset=3", ["offset=6", "offset=9"]),
    "body": (spacex, QUERY, "", ["", ""]),
    "body counted": (spacex, QUERY | {"next": "+1"}, "", ["", "", ""]),
    "GraphQL": (graphql, GRAPHQL, "", ["", ""]),
}


@pytest.mark.parametrize("style", STYLES)
def test_all_pages(
    source: Source,
    fetch: Fetch,
    pauses: list[float],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    style: str,
) -> None:
    """The request for the second page is refused once."""
    serve, settings, query, more = STYLES[style]
    monkeypatch.setenv("WHICH", 'a"\\b')
    limited = responds(429, Retry_After="3")
    records = fetch(
        serve, limited, *[serve] * 9, url=f"{source.url}?{query}".strip("?"), **settings
    )
    assert records == (SEVEN[3:] if "from 3" in style else SEVEN)
    assert [urlsplit(path).query for path in source.requests] == [query, more[0], *more]
    assert pauses == [3]
    if "body" in settings:
        assert {sent["Content-Type"] for sent in source.headers} == {"application/json"}
        queries = [json.loads(body)["query"] for body in source.posted]
        assert [json.dumps(query).count(r"a\"\\b") for query in queries] == [1] * len(source.posted)
        assert 'a"' not in caplog.text
    if settings is QUERY:
        pages = [json.loads(body)["options"].get("page") for body in source.posted]
        assert pages == [None, 2, 2, 3]


# --- files --------------------------------------------------------------------------------------

PAGE = {"count": 7, "next": "http://localhost:1/", "results": SEVEN}
ONE = {"id": 1, "name": "a1", "parts": [{"id": 2}, {"id": 3}]}
A_LINE_EACH = b'{"results": [\n{"id": 1},\n{"id": 2}\n]}'
TWO_OBJECTS = b'{"id": 1}\r\n\n{"id": 2}'
FILES: dict[str, tuple[Any, dict[str, str], Any]] = {
    "an array": (SEVEN, {}, SEVEN),
    "a page": (PAGE, PAGED, SEVEN),
    "a page with what could be a key": ({"id": 9} | PAGE, {"records": "results"}, SEVEN),
    "a page with a record a line": (A_LINE_EACH, {"records": "results"}, [{"id": 1}, {"id": 2}]),
    "a page below": ({"data": PAGE}, {"records": "data.results"}, SEVEN),
    "a page, but records is not set": (PAGE, {}, "set it to results"),
    "a page with another name": (PAGE, {"records": "data"}, "set it to results"),
    "the records though records is set": (SEVEN, {"records": "results"}, SEVEN),
    "lines though records is set": (json_lines(SEVEN), {"records": "results"}, SEVEN),
    "one record": (ONE, {}, [ONE]),
    "one record though records is set": (json_lines([ONE]), {"records": "results"}, [ONE]),
    "two objects": (TWO_OBJECTS, {}, [{"id": 1}, {"id": 2}]),
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
    given = responds(200, body), {"url": source.url if place == "answer" else str(path)} | settings
    if isinstance(wanted, str):
        with pytest.raises(PipelineError, match=wanted):
            fetch(given[0], **given[1])
    else:
        assert fetch(given[0], **given[1]) == wanted
    assert len(source.requests) == (place == "answer")
