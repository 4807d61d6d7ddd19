"""How long the program waits for Redshift, what it tries again, and how far it works ahead."""

from __future__ import annotations

import contextlib
import gzip
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import PipelineError, Records, connect, is_tried_again, stage_chunks, things
from sandbox import Sandbox


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


CODES = {
    "another loader was faster": ("40001 40P01 55P03", True),
    "it made the table or the column at the same moment": ("23505 42701 42710 42P07", True),
    "no room for a connection, it goes, it broke": ("53300 53400 57P01 57P03 08006", True),
    "will not be otherwise": ("28000 42501 22001 3D000 57014 XX000", False),
}


@pytest.mark.parametrize("case", CODES)
def test_what_redshift_may_do_when_asked_again(case: str) -> None:
    codes, expected = CODES[case]
    again = {code: is_tried_again(code) for code in codes.split()}
    assert again == dict.fromkeys(codes.split(), expected)


def test_no_more_than_some_chunks_are_ahead_of_what_writes_them(tmp_path: Path) -> None:
    part = tmp_path / "public.things.0001.csv.gz"
    os.mkfifo(part)  # nobody can write to it as long as nobody reads
    taken: list[int] = []
    begun = threading.Event()

    def chunks() -> Iterator[Records]:
        for number in range(50):
            taken.append(number)
            begun.set()
            yield things(number)

    thread = threading.Thread(target=stage_chunks, args=(chunks(), tmp_path), daemon=True)
    thread.start()
    assert begun.wait(60)
    thread.join(0.5)
    ahead = len(taken)
    assert thread.is_alive()
    assert len(gzip.decompress(part.read_bytes()).splitlines()) == 1 + 50
    assert ahead < 10
