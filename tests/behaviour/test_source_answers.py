"""What the program takes for a whole and true answer of the source, and what it refuses."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import re
import signal
import socket
import threading
import zlib
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from helpers import (
    Answer,
    ConfigError,
    Fetch,
    Load,
    PipelineError,
    Records,
    assert_failed,
    relay,
    responds,
    things,
    with_tls,
)
from sandbox import Handler, LocalServer, Sandbox, Source, answer


def lines(records: Records) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


# --- coded answers ------------------------------------------------------------------------------

FIFTY = things(*range(50))
HALVES = lines(FIFTY[:45]), lines(FIFTY[45:])


def flushed() -> bytes:
    """Gzip that is cut where the encoder was flushed, after 45 of 50 lines."""
    encoder = zlib.compressobj(wbits=31)
    return encoder.compress(HALVES[0]) + encoder.flush(zlib.Z_SYNC_FLUSH)


def damaged(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


MEMBERS = [gzip.compress(half) for half in HALVES]
WHOLE = {
    "one member": gzip.compress(b"".join(HALVES)),
    "two members": b"".join(MEMBERS),
    "zeros behind": b"".join(MEMBERS) + bytes(9),
}
BROKEN = {
    "cut at a flush": flushed(),
    "no trailer": WHOLE["one member"][:-8],
    "half a trailer": WHOLE["one member"][:-3],
    "wrong checksum": damaged(WHOLE["one member"], -6),
    "wrong length": damaged(WHOLE["one member"], -1),
    "second member damaged": MEMBERS[0] + damaged(MEMBERS[1], 12),
    "second member's header damaged": MEMBERS[0] + damaged(MEMBERS[1], 0),
    "second member cut": MEMBERS[0] + MEMBERS[1][:-9],
    "garbage behind": WHOLE["one member"] + b"garbage",
    "not coded": b"".join(HALVES),
    "nothing": b"",
}


def coded(body: bytes, framing: str, coding: str = "gzip") -> Answer:
    def respond(handler: BaseHTTPRequestHandler) -> None:
        handler.protocol_version = "HTTP/1.1"
        handler.close_connection = True
        handler.send_response(200)
        handler.send_header("Content-Encoding", coding)
        handler.send_header("Connection", "close")
        if framing == "length":
            handler.send_header("Content-Length", str(len(body)))
        if framing == "chunked":
            handler.send_header("Transfer-Encoding", "chunked")
            body_ = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
        handler.end_headers()
        handler.wfile.write(body_ + b"0\r\n\r\n" if framing == "chunked" else body)

    return respond


FRAMINGS = ["length", "chunked", "until closed"]


@pytest.mark.parametrize("body", BROKEN.values(), ids=BROKEN)
def test_a_coded_answer_that_broke_off_is_asked_for_again(
    source: Source, fetch: Fetch, pauses: list[float], body: bytes
) -> None:
    for tried, framing in enumerate(FRAMINGS, 1):
        assert fetch(coded(body, framing), responds(200, FIFTY)) == FIFTY
        assert (len(source.requests), len(pauses)) == (2 * tried, tried)
    with pytest.raises(PipelineError, match="attempt 6"):
        fetch(*[coded(body, framing)] * 9)


@pytest.mark.parametrize("body", WHOLE.values(), ids=WHOLE)
def test_a_coded_answer_is_read(source: Source, fetch: Fetch, body: bytes) -> None:
    for framing, coding in itertools.product(FRAMINGS, ["gzip", "x-gzip", "GZIP"]):
        assert fetch(coded(body, framing, coding)) == FIFTY
    assert {sent["Accept-Encoding"] for sent in source.headers} == {"gzip"}


def test_a_gzipped_file_that_is_served_coded_or_not(fetch: Fetch) -> None:
    packed = gzip.compress(lines(FIFTY))
    for body, coding in ((packed, "identity"), (gzip.compress(packed), "gzip"), (lines(FIFTY), "")):
        assert fetch(coded(body, "length", coding)) == FIFTY


@pytest.mark.parametrize("coding", ["br", "deflate", "zstd", "gzip, gzip", "gzip, br"])
def test_other_codings_are_refused(source: Source, fetch: Fetch, coding: str) -> None:
    with pytest.raises(PipelineError, match=re.escape(coding)):
        fetch(*[coded(zlib.compress(lines(FIFTY)), "length", coding)] * 9)
    assert len(source.requests) == 1


def test_an_answer_that_is_cut_is_loaded_whole(sandbox: Sandbox, load: Load) -> None:
    answers = coded(flushed(), "chunked"), coded(WHOLE["two members"], "chunked")
    done = load(*answers)
    assert done.returncode == 0, done.stderr
    assert sandbox.query("SELECT id, name FROM public.things ORDER BY id") == FIFTY


# --- status and redirects -----------------------------------------------------------------------

ALIKE = {
    "203": responds(203, FIFTY),
    "204": responds(204, b"", Content_Length="0"),
    "206": responds(206, FIFTY, Content_Range="bytes 0-9/100"),
    "300": responds(300, FIFTY, Location="/other"),
    "302 without a location": responds(302, FIFTY),
    "304": responds(304, b"", Content_Length="0"),
}


@pytest.mark.parametrize("respond", ALIKE.values(), ids=ALIKE)
def test_only_200_is_an_answer(source: Source, fetch: Fetch, respond: Answer) -> None:
    with pytest.raises(PipelineError, match=r"HTTP (203|204|206|300|302|304) "):
        fetch(respond, respond)
    assert len(source.requests) == 1


@pytest.mark.parametrize("status", [408, 520, 523])
def test_a_passing_failure_is_asked_again(fetch: Fetch, pauses: list[float], status: int) -> None:
    assert fetch(responds(status), responds(200, FIFTY)) == FIFTY
    assert len(pauses) == 1


def test_a_redirect_to_a_url_without_tls_is_refused(
    source: Source, fetch: Fetch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, authority = with_tls(source, tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority))
    with Source("/", lines(FIFTY)) as other:
        plain = f"http://localhost:{other.server.server_port}/x?key=v4lue"
        with pytest.raises(PipelineError, match=r"http://localhost.*TLS") as caught:
            fetch(responds(302, Location=plain), url=f"https://{address}/")
        assert other.requests == []
    assert "v4lue" not in str(caught.value)


# --- URLs that the source names -----------------------------------------------------------------

CANARY = "c4nary-T0ken"


def forged(good: str, evil: str) -> dict[str, str]:
    """URLs that some parsers take for one host and some for the other."""
    return {
        "backslash": rf"http://{evil}\@{good}/y",
        "two backslashes": rf"http://{evil}\\@{good}/y",
        "backslash in the path": rf"http://{good}\y",
        "space": f"http://{evil} @{good}/y",
        "space in the path": f"http://{good}/a b",
        "line feed": f"http://{good}/a\nb",
        "tab": f"http://{evil}\t@{good}/y",
        "NUL": f"http://{good}/\0",
        "NEL": f"http://{good}/\x85",
        "no-break space": f"http://{good}/\xa0",
    }


@pytest.mark.parametrize("kind", forged("", ""))
@pytest.mark.parametrize("place", ["next", "Location", "url"])
def test_a_url_that_two_parsers_read_differently_is_refused(
    source: Source, fetch: Fetch, kind: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKEN", CANARY)
    with Source("/", lines(FIFTY)) as evil:
        hosts = (f"127.0.0.1:{server.server.server_port}" for server in (source, evil))
        url = forged(*hosts)[kind]
        if place in ("Link", "Location") and re.search(r"[\n\0]", url):
            return  # no header can have it
        settings: dict[str, Any] = {"headers": {"Authorization": "Token ${TOKEN}"}}
        header = url.encode().decode("latin-1")  # as http.server encodes it
        answers = {
            "next": [responds(200, {"r": FIFTY, "next": url})],
            "Link": [responds(200, FIFTY, Link=f'<{header}>; rel="next"')],
            "Location": [responds(302, Location=header)],
            "url": [],
        }[place]
        settings |= {"next": {"records": "r", "next": "next"}, "Link": {"next": "Link"}}.get(
            place, {}
        )
        with pytest.raises((PipelineError, ConfigError)) as caught:
            fetch(*answers, url=url if place == "url" else None, **settings)
        assert evil.requests == []
    assert len(source.requests) == (place != "url")
    assert str(caught.value).replace("\n", " ").isprintable()
    assert CANARY not in str(caught.value)


# --- the next page, or none ---------------------------------------------------------------------


ENDS: dict[str, tuple[str, Any, bool]] = {
    "optional and missing": ("next?", {"r": things(1)}, True),
    "optional and null": ("next?", {"r": things(1), "next": None}, True),
    "empty": ("next", {"r": things(1), "next": ""}, True),
    "missing": ("next", {"r": things(1), "nxt": "?2"}, False),
    "null above": ("a.next", {"r": things(1), "a": None}, True),
    "missing below": ("a.next", {"r": things(1), "a": {}}, False),
    "optional and missing above": ("a.next?", {"r": things(1)}, True),
    "array": ("next", things(1), False),
    "array and optional": ("next?", things(1), True),
    "false": ("next", {"r": things(1), "next": False}, False),
    "object": ("next", {"r": things(1), "next": {}}, False),
    "cursor": ("next", {"r": things(1), "next": "cursor"}, False),
    "neither URL nor path": ("next", {"r": things(1), "next": "x/y?z"}, False),
}


@pytest.mark.parametrize(("following", "document", "ends"), ENDS.values(), ids=ENDS)
def test_the_end_of_the_pages(fetch: Fetch, following: str, document: Any, ends: bool) -> None:
    records = "r" if isinstance(document, dict) else None
    message = rf"no (URL or cursor at source\.next|{following} \(source\.next\))"
    told = contextlib.nullcontext() if ends else pytest.raises(PipelineError, match=message)
    with told:
        assert fetch(*[responds(200, document)] * 2, records=records, next=following) == things(1)


LINK = '</v5/launches?page=2>; rel="next", </v5/launches?page=9>; rel="last"'
UNFOLLOWED: dict[str, tuple[dict[str, Any], Any, bool]] = {
    "array": ({}, FIFTY, True),
    "records": ({"records": "r"}, {"r": FIFTY}, True),
    "another style": ({"records": "r", "next": "next"}, {"r": FIFTY, "next": None}, False),
}


@pytest.mark.parametrize(("settings", "document", "warns"), UNFOLLOWED.values(), ids=UNFOLLOWED)
def test_a_link_to_a_next_page_that_is_not_followed_is_told(
    fetch: Fetch, caplog: pytest.LogCaptureFixture, settings: Any, document: Any, warns: bool
) -> None:
    assert fetch(responds(200, document, Link=LINK), responds(200, document), **settings) == FIFTY
    assert [r.levelname for r in caplog.records if "Link" in r.message] == ["WARNING"] * warns
    caplog.clear()
    assert fetch(responds(200, document, Link='</>; rel="prev"'), **settings) == FIFTY
    assert caplog.records == []


# --- answers that never end ---------------------------------------------------------------------


def drips(first: bytes, drop: bytes) -> Answer:
    """Sends the beginning of an answer, and then drop after drop until nobody listens."""

    def respond(handler: BaseHTTPRequestHandler) -> None:
        handler.close_connection = True
        with contextlib.suppress(OSError):
            handler.wfile.write(first)
            while True:
                handler.wfile.write(drop)
                threading.Event().wait(0.02)  # no sleep, which other tests mock

    return respond


ENDLESS = {
    "body": drips(b"HTTP/1.1 200 OK\r\nContent-Length: 999999999\r\n\r\n[", b" "),
    "headers": drips(b"HTTP/1.1 200 OK\r\nX-Endless: ", b"x"),
    "status line": drips(b"HTTP/1.1 200 ", b"x"),
    "100": drips(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "error body": drips(b"HTTP/1.1 404 Not Found\r\nContent-Length: 999999999\r\n\r\n", b"x"),
    "redirect body": drips(
        b"HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 99999\r\n\r\n", b"x"
    ),
}


@pytest.fixture
def short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program's timer is ten times as fast."""

    def setitimer(which: int, *seconds: float, set_: Any = signal.setitimer) -> None:
        set_(which, *(second / 10 for second in seconds))

    monkeypatch.setattr(signal, "setitimer", setitimer)


@pytest.mark.parametrize("respond", ENDLESS.values(), ids=ENDLESS)
@pytest.mark.usefixtures("short_limits")
def test_an_answer_that_never_ends_is_given_up(
    source: Source, fetch: Fetch, respond: Answer
) -> None:
    with pytest.raises(PipelineError, match=r"answer_seconds, 5 s|HTTP 404"):
        fetch(*[respond] * 9, answer_seconds=5)
    assert len(source.requests) == 1


def test_a_run_ends_although_the_source_does_not(load: Load) -> None:
    assert_failed(load(ENDLESS["headers"], answer_seconds=1), "source.answer_seconds")


@pytest.mark.usefixtures("short_limits")
def test_the_limit_is_for_one_answer_and_not_for_the_waits(fetch: Fetch) -> None:
    busy = responds(503, Retry_After="1")
    assert fetch(busy, responds(200, FIFTY), answer_seconds=8) == FIFTY


# --- proxies ------------------------------------------------------------------------------------


class Proxy(LocalServer):
    """A proxy that connects to whatever CONNECT names."""

    def __init__(self) -> None:
        proxy = self
        self.connects: list[str] = []

        class Connects(Handler):
            def do_CONNECT(self) -> None:
                proxy.connects.append(self.path)
                host, _, port = self.path.partition(":")
                with socket.create_connection((host, int(port))) as there:
                    answer(self, 200)
                    threading.Thread(target=relay, args=(self.connection, there)).start()
                    relay(there, self.connection)

        super().__init__(Connects)


@pytest.mark.parametrize("trusted", [True, False], ids=["trusted", "not trusted"])
def test_an_own_authority_holds_through_a_proxy(
    source: Source,
    fetch: Fetch,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pauses: list[float],
    trusted: bool,
) -> None:
    address, authority = with_tls(source, tmp_path)
    for name in ("NO_PROXY", "no_proxy", "https_proxy", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
    told: Any = pytest.raises(PipelineError, match=r"certificate verify failed.*attempt 1$")
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(authority))
        told = contextlib.nullcontext()
    with Proxy() as proxy, told:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        assert fetch(responds(200, FIFTY), url=f"https://{address}/") == FIFTY
    assert proxy.connects == [address]
    assert pauses == []


# --- waiting ------------------------------------------------------------------------------------

NONSENSE = ["Fri, 31 Dec 99999999999 23:59:59 GMT", "9" * 5000, "1e3", "\xb2"]


@pytest.mark.parametrize("wait", NONSENSE)
def test_a_wait_that_is_none(fetch: Fetch, pauses: list[float], wait: str) -> None:
    assert fetch(responds(503, Retry_After=wait), responds(200, FIFTY)) == FIFTY
    (pause,) = pauses
    assert 1 <= pause <= 2


def test_a_wait_without_end_is_refused(fetch: Fetch, pauses: list[float]) -> None:
    for wait in ("9" * 30, "Fri, 31 Dec 9999 23:59:59 GMT"):
        with pytest.raises(PipelineError, match=r"source\.max_wait"):
            fetch(responds(503, Retry_After=wait), responds(200, FIFTY))
    assert pauses == []
