"""Reading a source: other shapes and pages, other hosts, what is tried again, and headers."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import socket
import struct
import threading
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from helpers import (
    Answer,
    ConfigError,
    Fetch,
    PipelineError,
    page,
    responds,
    sizes,
    things,
    with_tls,
)
from sandbox import SAMPLE, Source

CANARY = "c4nary-T0ken"  # what must never be seen
HEADERS = {"Authorization": "Token ${LL2_TOKEN}", "X-Api-Key": "${LL2_TOKEN}", "X-Plain": "$HOME"}


@pytest.fixture
def fetch(fetch: Fetch) -> Fetch:
    """What the program reads from the source when that gives these pages."""
    return partial(fetch, records="results", next="next")


# --- shapes and pages ---------------------------------------------------------------------------


SHAPES: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "next not followed": ({"next": None}, [{"results": things(1), "next": "?2"}]),
    "nested": (
        {"records": "data.items", "next": "paging.links.next"},
        [
            {"data": {"items": things(1)}, "paging": {"links": {"next": "?page=2"}}},
            {"data": {"items": things(2)}, "paging": None},
        ],
    ),
    "all allowed": (
        {"max_pages": 2},
        [{"results": things(1), "next": "?2"}, {"results": things(2), "next": None}],
    ),
    "plain array": ({"records": None, "next": None}, [things(1)]),
}


@pytest.mark.parametrize("case", SHAPES)
def test_other_shapes(source: Source, fetch: Fetch, case: str) -> None:
    settings, documents = SHAPES[case]
    records = fetch(*(responds(200, document) for document in documents), **settings)
    assert records == things(*range(1, len(documents) + 1))
    assert len(source.requests) == len(documents)


# What the answers are, and what is said.
WRONG_PAGES: dict[str, tuple[list[Answer], str]] = {
    "HTML": ([page(things(1), "?2"), responds(200, b"<html>Busy")], "not JSON.*<html>Busy"),
    "cut": ([page(things(1), "?2"), responds(200, b'{"results": [{"id": 2')], "not JSON"),
    "gzip cut": ([responds(200, gzip.compress(b'{"results": []}')[:-9])], "/v5/launches: "),
    "gzip": ([responds(200, b"\x1f\x8b\x08" + b"\0" * 7 + b"\xff" * 9)], "/v5/launches: "),
    "no array": ([responds(200, {"detail": "Not here"})], "no array at source.records.*Not here"),
    "object": ([page(things(1), "?2"), responds(200, {"results": {"id": 2}})], "no array"),
    "array alone": ([responds(200, things(1))], "no array at source.records"),
    "number": (
        [page(things(1), "?2"), responds(200, {"results": [7], "next": None})],
        "is not an object: 7",
    ),
    "arrays": ([responds(200, {"results": [things(1)], "next": None})], "is not an object"),
    "number as next": ([page(things(1), 7)], "source.next.*7"),
    "not found": ([page(things(1), "?2"), responds(404)], "HTTP 404"),
    "a loop": (
        [page(things(1), "?b"), page(things(2), "?c"), page(things(3), "?b")],
        r"page 4, .*/v5/launches, was there before",
    ),
    "too many": (
        [page(things(number), f"?{number}") for number in range(4)],
        r"page 5, .* source\.max_pages",
    ),
}


@pytest.mark.parametrize("case", WRONG_PAGES)
def test_a_page_that_is_wrong(source: Source, fetch: Fetch, case: str) -> None:
    answers, message = WRONG_PAGES[case]
    with pytest.raises(PipelineError, match=message):
        fetch(*answers, max_pages=4)
    assert len(source.requests) == len(answers)


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


def test_a_server_is_trusted_by_its_certificate_and_pages_after_one_with_tls_have_it_too(
    source: Source,
    fetch: Fetch,
    pauses: list[float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    address, authority = with_tls(source, tmp_path)
    address += "/v5/launches"
    with pytest.raises(PipelineError, match=r"certificate.*, attempt 1$"):
        fetch(url=f"https://{address}")
    assert pauses == []
    monkeypatch.setenv("SSL_CERT_FILE", str(authority))
    pages = page(things(1), "?2"), page(things(2), f"http://{address}?3"), page(things(3))
    with pytest.raises(PipelineError, match=f"page 3, GET http://{address}"):
        fetch(*pages, url=f"https://{address}")
    assert len(source.requests) == 2


def test_headers_go_to_the_source_and_nowhere_else(
    source: Source, fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = f"{CANARY}-${{HOME}}"
    sent = {name: text.replace("${LL2_TOKEN}", token) for name, text in HEADERS.items()}
    monkeypatch.setenv("LL2_TOKEN", token)
    with Source() as other:
        elsewhere = other.url.replace("127.0.0.1", "localhost")
        other.answers = [responds(307, Location="/further"), page(things(2))]
        here, there = responds(307, Location="/here"), responds(302, Location=elsewhere)
        assert fetch(here, page(things(1), "?2"), there, headers=HEADERS) == things(1, 2)
    assert [headers | sent == headers for headers in source.headers] == [True] * 3
    assert len(other.headers) == 2
    assert not any(sent.keys() & headers.keys() for headers in other.headers)
    assert CANARY not in str(other.headers)


# --- what is tried again ------------------------------------------------------------------------


BODY = SAMPLE.read_bytes()


def sends(data: bytes, header: str, value: str) -> Answer:
    """Answers with this header and these bytes, and closes the connection."""

    def respond(handler: BaseHTTPRequestHandler) -> None:
        handler.protocol_version = "HTTP/1.1"
        handler.close_connection = True
        handler.send_response(200)
        handler.send_header(header, value)
        handler.end_headers()
        handler.wfile.write(data)

    return respond


def closed_at_once(handler: BaseHTTPRequestHandler) -> None:
    handler.close_connection = True


def reset_at_once(handler: BaseHTTPRequestHandler) -> None:
    closed_at_once(handler)
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(handler.connection.detach())


TWO_CHUNKS = b"4000\r\n%b\r\n4000\r\n%b" % (BODY[:0x4000], BODY[0x4000:0x5000])
BREAKS: dict[str, Answer] = {
    "half of a length": sends(BODY[:30_000], "Content-Length", str(len(BODY))),
    "half of the chunks": sends(TWO_CHUNKS, "Transfer-Encoding", "chunked"),
    "chunks without an end": sends(
        b"%x\r\n%b\r\n" % (len(BODY), BODY), "Transfer-Encoding", "chunked"
    ),
    "reset at once": reset_at_once,
    "closed at once": closed_at_once,
}


@pytest.mark.parametrize("fault", BREAKS.values(), ids=BREAKS)
def test_a_source_that_breaks_off_is_asked_again(
    source: Source, fetch: Fetch, pauses: list[float], fault: Answer
) -> None:
    assert len(fetch(fault, responds(200, BODY), records=None, next=None)) == 30
    assert (len(source.requests), len(pauses)) == (2, 1)


def test_an_answer_that_does_not_come_is_not_waited_for(fetch: Fetch, pauses: list[float]) -> None:
    over = threading.Event()

    def late(handler: BaseHTTPRequestHandler) -> None:
        over.wait(60)
        with contextlib.suppress(BrokenPipeError):
            page(things(2))(handler)

    try:
        with sizes(HTTP_TIMEOUT=(5, 1)):
            assert fetch(late, page(things(1))) == things(1)
    finally:
        over.set()
    assert len(pauses) == 1


# What Retry-After says, and the least and most seconds of the pause.
RETRY_AFTER: dict[str, tuple[str, float, float]] = {
    "seconds": ("7", 7, 7),
    "a date": (format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True), 2000, 3600),
    "a date that is over": ("Fri, 24 Mar 2006 22:30:00 GMT", 1, 2),
    "a word": ("soon", 1, 2),
    "less than nothing": ("-1", 1, 2),
    "no such year": ("Fri, 31 Dec 99999 23:59:59 GMT", 1, 2),
}


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("case", RETRY_AFTER)
def test_the_pause_that_is_asked_for(
    fetch: Fetch, pauses: list[float], caplog: pytest.LogCaptureFixture, case: str, status: int
) -> None:
    asked, least, most = RETRY_AFTER[case]
    answers = responds(status, Retry_After=asked), page(things(1))
    assert fetch(*answers, max_wait=4000) == things(1)
    (pause,) = pauses
    assert least <= pause <= most
    (message,) = caplog.messages
    again = r"trying again in ([\d.]+) s, at \d\d:\d\d:\d\dZ"
    said = re.fullmatch(rf"HTTP {status} [\w ]+, {again}", message)
    assert said, message
    assert float(said[1]) == pytest.approx(pause, abs=0.06)


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_without_a_time_the_pauses_grow_to_a_minute_and_differ(
    fetch: Fetch, pauses: list[float], status: int
) -> None:
    most = [2, 4, 8, 16, 32, *[60] * 7][: 12 if status == 429 else 5]
    assert fetch(*[responds(status)] * len(most), page(things(1))) == things(1)
    shares = [pause / limit for pause, limit in zip(pauses, most, strict=True)]
    assert 0.5 <= min(shares) < max(shares) <= 1


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 501])
def test_what_will_not_be_otherwise_is_not_asked_again(
    source: Source, fetch: Fetch, pauses: list[float], status: int
) -> None:
    with pytest.raises(PipelineError, match=rf"/v5/launches: HTTP {status} .*, attempt 1$"):
        fetch(responds(status, Retry_After="1"), page(things(1)))
    assert (len(source.requests), pauses) == (1, [])


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(
    ("asked", "max_wait", "waited"),
    [({"Retry_After": "3600"}, 900, []), ({"Retry_After": "90"}, 300, [90] * 3), ({}, 0, [])],
    ids=["too long", "too often", "not at all"],
)
def test_more_than_max_wait_in_all_is_not_waited(
    fetch: Fetch, pauses: list[float], status: int, asked: Any, max_wait: int, waited: list[float]
) -> None:
    said = rf"HTTP {status} .*again in {asked.get('Retry_After', '')}.*max_wait, {max_wait} s"
    with pytest.raises(PipelineError, match=said):
        fetch(*[responds(status, **asked)] * 5, max_wait=max_wait)
    assert pauses == waited


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


# --- headers and other secrets -------------------------------------------------------------------


FAULTS = {
    "401": responds(401, {"detail": "Invalid token"}),
    "bad redirect": responds(302, Location="http://[::1"),
    "redirect to nobody": responds(302, Location="http://localhost:1/"),
    "next elsewhere": page(things(1), "http://localhost:1/"),
    "no answer": closed_at_once,
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
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


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://127.0.0.1:99999/launches?token={}", '"http://127.0.0.1:99999/launches"'),
        ("http://user:{}@127.0.0.1:99999/launches", '"http://127.0.0.1:99999/launches"'),
        ("http:///launches?token={}", '"http:///launches"'),
        ("https://user:{}@launches..example.com/v5", "GET https://launches..example.com/v5"),
    ],
    ids=["port", "user", "no host", "dots"],
)
def test_a_wrong_url_is_shown_without_its_secrets(fetch: Fetch, url: str, shown: str) -> None:
    with pytest.raises(PipelineError) as caught:
        fetch(url=url.format(CANARY), records=None, next=None)
    assert shown in str(caught.value)
    assert CANARY not in str(caught.value)


# --- files --------------------------------------------------------------------------------------


def test_files_and_answers_can_be_lines_and_need_no_pages(fetch: Fetch, tmp_path: Path) -> None:
    lines = "\r\n\n".join(map(json.dumps, things(1, 2)))
    for name, text in {"array.json": json.dumps(things(1, 2)), "lines.ndjson": lines}.items():
        (tmp_path / name).write_text(text)
        assert fetch(url=str(tmp_path / name)) == things(1, 2)
    assert fetch(responds(200, lines.encode()), records=None, next=None) == things(1, 2)
