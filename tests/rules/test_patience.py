"""How long the program waits, what it tries again, and how far it works ahead."""

from __future__ import annotations

import contextlib
import gzip
import os
import socket
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from helpers import (
    PipelineError,
    Records,
    connect,
    fetch_records,
    is_tried_again,
    load_config,
    page,
    responds,
    sizes,
    stage_chunks,
    things,
    things_config,
    without_pauses,
)
from redshift import make_certificate
from sandbox import Sandbox, Source


@pytest.fixture
def source() -> Iterator[Source]:
    with Source() as source:
        yield source


@pytest.fixture
def pauses() -> Iterator[list[float]]:
    """The pauses, which are not made."""
    with without_pauses() as pauses:
        yield pauses


def test_pauses_for_a_source_grow_to_a_minute_and_differ(
    source: Source, pauses: list[float], tmp_path: Path
) -> None:
    source.answers = [*[responds(429)] * 12, page(things(1))]
    assert fetch_records(load_config(things_config(tmp_path, source.url)), tmp_path) == things(1)
    most = [2, 4, 8, 16, 32, 60, 60, 60, 60, 60, 60, 60]
    shares = [pause / limit for pause, limit in zip(pauses, most, strict=True)]
    assert 0.5 <= min(shares) < max(shares) <= 1


def test_a_broken_content_coding_is_tried_again(
    source: Source, pauses: list[float], tmp_path: Path
) -> None:
    source.answers = [responds(200, b"no gzip", Content_Encoding="gzip"), page(things(1))]
    assert fetch_records(load_config(things_config(tmp_path, source.url)), tmp_path) == things(1)
    assert len(pauses) == 1


def test_an_answer_that_does_not_come_is_not_waited_for(
    source: Source, pauses: list[float], tmp_path: Path
) -> None:
    over = threading.Event()

    def late(handler: BaseHTTPRequestHandler) -> None:
        over.wait(20)
        with contextlib.suppress(BrokenPipeError):
            page(things(2))(handler)

    source.answers = [late, page(things(1))]
    try:
        with sizes(HTTP_TIMEOUT=(5, 0.2)):
            config = load_config(things_config(tmp_path, source.url))
            assert fetch_records(config, tmp_path) == things(1)
    finally:
        over.set()
    assert len(pauses) == 1


def test_a_certificate_that_nobody_trusts_ends_the_run(
    source: Source, pauses: list[float], tmp_path: Path
) -> None:
    certificate = make_certificate(tmp_path, "localhost")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.certificate, certificate.key)
    source.server.socket = context.wrap_socket(source.server.socket, server_side=True)
    url = f"https://localhost:{source.server.server_port}/"
    with pytest.raises(PipelineError, match=r"certificate.*, attempt 1$"):
        fetch_records(load_config(things_config(tmp_path, url)), tmp_path)
    assert pauses == []


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(104, [1, 2, 4, 8, 15, 15, 15, 15, 15, 14]), (6, [1, 2, 3]), (0, [])],
    ids=["long", "short", "not at all"],
)
def test_pauses_for_redshift_grow_to_a_quarter_of_a_minute(
    pauses: list[float], seconds: int, expected: list[float]
) -> None:
    """The last is as long as is left, and then it is tried once more."""
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    login = {"HOST": "127.0.0.1", "PORT": port, "DATABASE": "dev", "USER": "u", "PASSWORD": "p"}
    with pytest.raises(PipelineError, match=f"cannot connect to Redshift at 127.0.0.1:{port}"):
        connect(login, seconds)
    assert pauses == pytest.approx(expected, abs=0.5)


def test_a_statement_may_take_longer_than_to_connect(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(sandbox.redshift.ca))
    with contextlib.closing(connect(sandbox.secret(), 60)) as connection:
        assert connection._usock.gettimeout() > 3600  # statement_seconds


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ("40001 55P03", True),  # another loader was faster
        ("23505 42701 42P07", True),  # it made the table or the column at the same moment
        ("53300 53400 57P01 57P03 08006", True),  # no room for a connection, it goes, it broke
        ("28000 42501 22001 3D000 57014 XX000", False),
    ],
    ids=["other loader", "made twice", "server goes", "will not be otherwise"],
)
def test_what_redshift_may_do_when_asked_again(codes: str, expected: bool) -> None:
    assert {code: is_tried_again(code) for code in codes.split()} == dict.fromkeys(
        codes.split(), expected
    )


def test_no_more_than_some_chunks_are_ahead_of_what_writes_them(tmp_path: Path) -> None:
    part = tmp_path / "public.things.0001.csv.gz"
    os.mkfifo(part)  # nobody can write to it as long as nobody reads
    taken: list[int] = []

    def chunks() -> Iterator[Records]:
        for number in range(50):
            taken.append(number)
            yield things(number)

    thread = threading.Thread(target=stage_chunks, args=(chunks(), tmp_path), daemon=True)
    thread.start()
    thread.join(0.5)
    ahead = len(taken)
    assert thread.is_alive()
    assert len(gzip.decompress(part.read_bytes()).splitlines()) == 1 + 50
    assert 0 < ahead < 10
