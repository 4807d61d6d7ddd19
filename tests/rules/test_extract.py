"""One answer of a source: what is whole and true, what is tried again, what is sent and shown."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import os
import re
import signal
import socket
import struct
import threading
import zlib
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from helpers import (
    CANARY,
    PAGED,
    Answer,
    ConfigError,
    Fetch,
    PipelineError,
    drips,
    json_lines,
    page,
    relay,
    responds,
    sends,
    sizes,
    things,
    with_tls,
)
from sandbox import SAMPLE, Handler, LocalServer, Source, answer

TOKEN = "${LL2_TOKEN}"
HEADERS = {"Authorization": f"Token {TOKEN}", "X-Api-Key": TOKEN, "X-Plain": "$HOME"}
FIFTY = things(*range(50))
WHOLE = responds(200, FIFTY)

# --- answers that break off ---------------------------------------------------------------------

LINES, HALVES = json_lines(FIFTY), (json_lines(FIFTY[:45]), json_lines(FIFTY[45:]))
PACKED, MEMBERS = gzip.compress(LINES), [gzip.compress(half) for half in HALVES]
CODED = {"one member": PACKED, "two members": b"".join(MEMBERS), "zeros behind": PACKED + bytes(9)}
FRAMINGS = ["length", "chunked", "until closed"]


def coded(body: bytes, framing: str = "length", coding: str = "gzip") -> Answer:
    chunk = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
    framed = {
        "length": b"Content-Length: %d\r\n\r\n%b" % (len(body), body),
        "chunked": b"Transfer-Encoding: chunked\r\n\r\n%b0\r\n\r\n" % chunk,
        "until closed": b"\r\n" + body,
    }[framing]
    head = f"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Encoding: {coding}\r\n"
    return sends(head.encode(), framed)


def flushed() -> bytes:
    """Gzip that is cut where the encoder was flushed, after 45 of 50 lines."""
    encoder = zlib.compressobj(wbits=31)
    return encoder.compress(HALVES[0]) + encoder.flush(zlib.Z_SYNC_FLUSH)


def damaged(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


def closed_at_once(handler: BaseHTTPRequestHandler) -> None:
    handler.close_connection = True


def reset_at_once(handler: BaseHTTPRequestHandler) -> None:
    closed_at_once(handler)
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(handler.connection.detach())


BROKEN = {
    "cut at a flush": flushed(),
    "no trailer": PACKED[:-8],
    "half a trailer": PACKED[:-3],
    "wrong checksum": damaged(PACKED, -6),
    "wrong length": damaged(PACKED, -1),
    "second member damaged": MEMBERS[0] + damaged(MEMBERS[1], 12),
    "second member's header damaged": MEMBERS[0] + damaged(MEMBERS[1], 0),
    "second member cut": MEMBERS[0] + MEMBERS[1][:-9],
    "garbage behind": PACKED + b"garbage",
    "not coded": LINES,
    "nothing": b"",
}
BODY = SAMPLE.read_bytes()
LENGTH = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(BODY)
CHUNKS = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
BREAKS: dict[str, list[Answer]] = {
    name: [coded(body, framing) for framing in FRAMINGS] for name, body in BROKEN.items()
} | {
    "half of a length": [sends(LENGTH, BODY[:30_000])],
    "half of the chunks": [sends(CHUNKS, b"4000\r\n%b\r\n4000\r\n" % BODY[:0x4000], BODY[:0x1000])],
    "chunks without an end": [sends(CHUNKS, b"%x\r\n%b\r\n" % (len(BODY), BODY))],
    "reset at once": [reset_at_once],
    "closed at once": [closed_at_once],
}


@pytest.mark.parametrize("faults", BREAKS.values(), ids=BREAKS)
def test_an_answer_that_breaks_off_is_asked_for_again(
    source: Source, fetch: Fetch, pauses: list[float], faults: list[Answer]
) -> None:
    for tried, fault in enumerate(faults, 1):
        assert fetch(fault, WHOLE) == FIFTY
        assert (len(source.requests), len(pauses)) == (2 * tried, tried)
    with pytest.raises(PipelineError, match="attempt 6"):
        fetch(*faults[:1] * 9)


@pytest.mark.parametrize("body", CODED.values(), ids=CODED)
def test_a_coded_answer_is_read(source: Source, fetch: Fetch, body: bytes) -> None:
    for framing, coding in itertools.product(FRAMINGS, ["gzip", "x-gzip", "GZIP"]):
        assert fetch(coded(body, framing, coding)) == FIFTY
    assert {sent["Accept-Encoding"] for sent in source.headers} == {"gzip"}


def test_a_gzipped_file_that_is_served_coded_or_not(fetch: Fetch) -> None:
    for body, coding in ((PACKED, "identity"), (gzip.compress(PACKED), "gzip"), (LINES, "")):
        assert fetch(coded(body, coding=coding)) == FIFTY


@pytest.mark.parametrize("coding", ["br", "deflate", "zstd", "gzip, gzip", "gzip, br"])
def test_other_codings_are_refused(source: Source, fetch: Fetch, coding: str) -> None:
    with pytest.raises(PipelineError, match=re.escape(coding)):
        fetch(coded(zlib.compress(LINES), coding=coding), WHOLE)
    assert len(source.requests) == 1


# --- answers that do not come, or do not end ----------------------------------------------------


def test_an_answer_that_does_not_come_is_not_waited_for(fetch: Fetch, pauses: list[float]) -> None:
    over = threading.Event()

    def late(handler: BaseHTTPRequestHandler) -> None:
        over.wait(20)
        with contextlib.suppress(OSError):
            responds(200, [])(handler)

    try:
        with sizes(HTTP_TIMEOUT=(5, 0.2)):
            assert fetch(late, WHOLE) == FIFTY
    finally:
        over.set()
    assert len(pauses) == 1


ENDLESS = {
    "body": drips(b"HTTP/1.1 200 OK\r\nContent-Length: 999999999\r\n\r\n[", b" "),
    "headers": drips(b"HTTP/1.1 200 OK\r\nX-Endless: ", b"x"),
    "status line": drips(b"HTTP/1.1 200 ", b"x"),
    "100": drips(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "error body": drips(b"HTTP/1.1 404 Not Found\r\nContent-Length: 99999\r\n\r\n", b"x"),
    "redirect": drips(b"HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 99999\r\n\r\n", b"x"),
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


@pytest.mark.usefixtures("short_limits")
def test_the_limit_is_for_one_answer_and_not_for_the_waits(fetch: Fetch) -> None:
    assert fetch(responds(503, Retry_After="1"), WHOLE, answer_seconds=8) == FIFTY


# --- what is tried again ------------------------------------------------------------------------

# What Retry-After says, and the least and most seconds of the pause.
RETRY_AFTER: dict[str, tuple[str, float, float]] = {
    "seconds": ("7", 7, 7),
    "a date": (format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True), 2000, 3600),
    "a date that is over": ("Fri, 24 Mar 2006 22:30:00 GMT", 1, 2),
    "a word": ("soon", 1, 2),
    "less than nothing": ("-1", 1, 2),
    "no such year": ("Fri, 31 Dec 99999 23:59:59 GMT", 1, 2),
    "no year at all": ("Fri, 31 Dec 99999999999 23:59:59 GMT", 1, 2),
    "too many digits": ("9" * 5000, 1, 2),
    "an exponent": ("1e3", 1, 2),
    "a digit that is none": ("\xb2", 1, 2),
}


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("case", RETRY_AFTER)
def test_the_pause_that_is_asked_for(
    fetch: Fetch, pauses: list[float], caplog: pytest.LogCaptureFixture, case: str, status: int
) -> None:
    asked, least, most = RETRY_AFTER[case]
    assert fetch(responds(status, Retry_After=asked), WHOLE, max_wait=4000) == FIFTY
    (pause,) = pauses
    assert least <= pause <= most
    (message,) = caplog.messages
    again = r"trying again in ([\d.]+) s, at \d\d:\d\d:\d\dZ"
    said = re.fullmatch(rf"HTTP {status} [\w ]+, {again}", message)
    assert said, message
    assert float(said[1]) == pytest.approx(pause, abs=0.06)


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504, 520, 523])
def test_without_a_time_the_pauses_grow_to_a_minute_and_differ(
    fetch: Fetch, pauses: list[float], status: int
) -> None:
    most = [2, 4, 8, 16, 32, *[60] * 7][: 12 if status == 429 else 5]
    assert fetch(*[responds(status)] * len(most), WHOLE) == FIFTY
    shares = [pause / limit for pause, limit in zip(pauses, most, strict=True)]
    assert 0.5 <= min(shares) < max(shares) <= 1


# What Retry-After says, what may be waited, what is, and what would come next.
TOO_LONG: dict[str, tuple[dict[str, str], int, list[int], str]] = {
    "too long": ({"Retry_After": "3600"}, 900, [], "3600"),
    "too often": ({"Retry_After": "90"}, 300, [90] * 3, "90"),
    "not at all": ({}, 0, [], r"\d"),
    "for ever": ({"Retry_After": "9" * 30}, 900, [], r"\d+"),
    "until the last day": ({"Retry_After": "Fri, 31 Dec 9999 23:59:59 GMT"}, 900, [], r"\d+"),
}


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(("asked", "max_wait", "waited", "again"), TOO_LONG.values(), ids=TOO_LONG)
def test_more_than_max_wait_in_all_is_not_waited(
    fetch: Fetch,
    pauses: list[float],
    status: int,
    asked: dict[str, str],
    max_wait: int,
    waited: list[int],
    again: str,
) -> None:
    said = rf"HTTP {status} .*again in {again}\..*max_wait, {max_wait} s"
    with pytest.raises(PipelineError, match=said):
        fetch(*[responds(status, **asked)] * 5, max_wait=max_wait)
    assert pauses == waited


ONCE = {status: responds(status, Retry_After="1") for status in (400, 401, 403, 404, 410, 501)} | {
    203: responds(203, FIFTY),
    204: responds(204, b"", Content_Length="0"),
    206: responds(206, FIFTY, Content_Range="bytes 0-9/100"),
    300: responds(300, FIFTY, Location="/other"),
    302: responds(302, FIFTY),  # without a location
    304: responds(304, b"", Content_Length="0"),
}


@pytest.mark.parametrize("status", ONCE)
def test_what_will_not_be_otherwise_is_not_asked_again(
    source: Source, fetch: Fetch, pauses: list[float], status: int
) -> None:
    with pytest.raises(PipelineError, match=rf"/v5/launches: HTTP {status} "):
        fetch(ONCE[status], WHOLE)
    assert (len(source.requests), pauses) == (1, [])


def test_rate_limits_and_other_failures_do_not_count_as_each_other(
    source: Source, fetch: Fetch, pauses: list[float]
) -> None:
    limited, failed = responds(429, Retry_After="1"), responds(503, Retry_After="1")
    assert fetch(*[limited] * 8, WHOLE) == FIFTY
    assert fetch(*[limited] * 5, *[failed] * 5, WHOLE) == FIFTY
    for limits in (0, 7):
        source.requests.clear()
        with pytest.raises(PipelineError, match=rf"HTTP 503.*attempt {limits + 6}$"):
            fetch(*[limited] * limits, *[failed] * 9)
        assert len(source.requests) == limits + 6


def test_a_post_is_asked_again(source: Source, fetch: Fetch, pauses: list[float]) -> None:
    assert fetch(responds(503), WHOLE, body='{"a": 1}') == FIFTY
    assert source.posted == [b'{"a": 1}'] * 2


# --- hosts --------------------------------------------------------------------------------------


def test_a_server_is_trusted_by_its_certificate_and_pages_after_one_with_tls_have_it_too(
    source: Source,
    fetch: Fetch,
    pauses: list[float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    address, authority = with_tls(source, tmp_path)
    address += "/v5/launches"
    with pytest.raises(PipelineError, match="certificate"):
        fetch(url=f"https://{address}")
    assert pauses == []
    monkeypatch.setenv("SSL_CERT_FILE", str(authority))
    pages = page(things(1), "?2"), page(things(2), f"http://{address}?3"), page(things(3))
    with pytest.raises(PipelineError, match=f"page 3, GET http://{address}"):
        fetch(*pages, url=f"https://{address}", **PAGED)
    assert len(source.requests) == 2


def test_a_redirect_to_a_url_without_tls_is_refused(
    source: Source, fetch: Fetch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, authority = with_tls(source, tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority))
    with Source() as other:
        plain = f"http://localhost:{other.server.server_port}/x?key={CANARY}"
        with pytest.raises(PipelineError, match=r"http://localhost.*TLS") as caught:
            fetch(responds(302, Location=plain), url=f"https://{address}/")
        assert other.requests == []
    assert CANARY not in str(caught.value)


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
    told: Any = pytest.raises(PipelineError, match=r"certificate verify failed")
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(authority))
        told = contextlib.nullcontext()
    with Proxy() as proxy, told:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        assert fetch(WHOLE, url=f"https://{address}/") == FIFTY
    assert proxy.connects == [address]
    assert pauses == []


def forged(good: str, evil: str) -> dict[str, str]:
    """URLs that some parsers take for one host and some for the other."""
    return {
        "backslash": rf"http://{evil}\@{good}/y",
        "two backslashes": rf"http://{evil}\\@{good}/y",
        "backslash in the path": rf"http://{good}\y",
        "space": f"http://{evil} @{good}/y",
        "space in the path": f"http://{good}/a b",
        "tab": f"http://{evil}\t@{good}/y",
        "NEL": f"http://{good}/\x85",
        "no-break space": f"http://{good}/\xa0",
        # which no header can have
        "line feed": f"http://{good}/a\nb",
        "NUL": f"http://{good}/\0",
    }


@pytest.mark.parametrize(
    ("place", "kind"),
    [
        *itertools.product(["next", "url"], forged("", "")),
        *itertools.product(["Location", "Link"], [*forged("", "")][:-2]),
    ],
)
def test_a_url_that_two_parsers_read_differently_is_refused(
    source: Source, fetch: Fetch, kind: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LL2_TOKEN", CANARY)
    with Source() as evil:
        hosts = (f"127.0.0.1:{server.server.server_port}" for server in (source, evil))
        url = forged(*hosts)[kind]
        header = url.encode().decode("latin-1")  # as http.server encodes it
        answers: dict[str, tuple[Answer, dict[str, str]]] = {
            "next": (page(FIFTY, url), PAGED),
            "Link": (responds(200, FIFTY, Link=f'<{header}>; rel="next"'), {"next": "Link"}),
            "Location": (responds(302, Location=header), {}),
            "url": (WHOLE, {"url": url}),
        }
        given, settings = answers[place]
        with pytest.raises((PipelineError, ConfigError)) as caught:
            fetch(given, headers=HEADERS, **settings)
        assert evil.requests == []
    assert len(source.requests) == (place != "url")
    assert str(caught.value).replace("\n", " ").isprintable()
    assert CANARY not in str(caught.value)


# --- headers and other secrets ------------------------------------------------------------------


def test_headers_go_to_the_source_and_nowhere_else(
    source: Source, fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = f"{CANARY}-${{HOME}}"
    sent = {name: text.replace(TOKEN, token) for name, text in HEADERS.items()}
    monkeypatch.setenv("LL2_TOKEN", token)
    with Source() as other:
        elsewhere = other.url.replace("127.0.0.1", "localhost")
        other.answers = [responds(307, Location="/further"), page(things(2))]
        here, there = responds(307, Location="/here"), responds(302, Location=elsewhere)
        answers = here, page(things(1), "?2"), there
        assert fetch(*answers, headers=HEADERS, **PAGED) == things(1, 2)
    assert [headers | sent == headers for headers in source.headers] == [True] * 3
    assert len(other.headers) == 2
    assert not any(sent.keys() & headers.keys() for headers in other.headers)
    assert CANARY not in str(other.headers)


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
        fetch(*[fault] * 6, headers=HEADERS, **PAGED)
    assert CANARY not in f"{caught.value}{caplog.text}"


@pytest.mark.parametrize("token", [f"{CANARY}\n", f"{CANARY}\nX-Other: 1", f"{CANARY} é🚀", ""])
def test_a_token_that_cannot_be_sent_is_not_shown_but_its_header_is(
    source: Source, fetch: Fetch, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setenv("LL2_TOKEN", token)
    with pytest.raises(ConfigError, match=r"source\.headers\.X-Api-Key") as caught:
        fetch(WHOLE, headers={"X-Api-Key": TOKEN})
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
        fetch(url=url.format(CANARY))
    assert shown in str(caught.value)
    assert CANARY not in str(caught.value)


# --- what the server said -----------------------------------------------------------------------

NO_SUCH = "HTTP 404 Not Found: No such launch"
SAID: dict[str, tuple[Answer, str]] = {
    "text": (responds(404, b"No such\n\n   launch\t"), NO_SUCH),
    "JSON": (responds(404, {"detail": "x"}), 'HTTP 404 Not Found: {"detail": "x"}'),
    "long": (responds(404, b"x" * 100_000), "x" * 200 + "…"),
    "half a secret": (responds(404, b"x" * 195 + b"S3cret-T0ken"), f"{'x' * 195}***"),
    "a 5xx": (responds(501, b"busy"), "HTTP 501 Not Implemented"),
    "nothing": (responds(404), "HTTP 404 Not Found"),
    "not UTF-8": (responds(404, b"caf\xe9"), "caf\ufffd"),
    "coded": (responds(404, gzip.compress(b"No such launch"), Content_Encoding="gzip"), NO_SUCH),
    "cut": (responds(404, b"No such", Content_Length="99"), "HTTP 404 Not Found: No such"),
    "not coded": (responds(404, b"No such", Content_Encoding="gzip"), "HTTP 404 Not Found"),
}


@pytest.mark.parametrize("kind", SAID)
def test_a_4xx_shows_what_the_server_said(fetch: Fetch, kind: str) -> None:
    respond, shown = SAID[kind]
    with pytest.raises(PipelineError, match=re.escape(shown) + "$"):
        fetch(respond, headers={"X-Token": "S3cret-T0ken"})
