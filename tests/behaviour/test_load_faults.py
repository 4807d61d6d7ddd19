"""What the load survives, what it refuses, and when: of one small table, in the whole sandbox."""

from __future__ import annotations

import re
import signal
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

from helpers import LOAD_TRIES, TABLE, FlakyProxy, Things, messages, refusing
from redshift import RedshiftError
from sandbox import NO_PAUSES

Hook = Callable[[str, str], None]


def test_keys_that_differ_in_spaces_at_the_end_are_double(things: Things) -> None:
    """In two chunks, so that only the staging table shows it."""
    between = [(str(number), number) for number in range(20_000)]
    error = things.refused(("a", 1), *between, ("a  ", 2))
    assert re.search(rf'load: {TABLE}: more than one row has the key id="a"$', error)


def test_a_key_with_a_space_at_its_end_replaces_the_one_without(things: Things) -> None:
    things.load(("a", 1), ("b", 2), mode="upsert")
    things.load(("a ", 3), mode="upsert")
    assert things.rows() == [("a ", 3), ("b", 2)]


CONFLICT = "could not complete because of conflict with concurrent transaction"
SLOW_DOWN = "reduce your request rate.,Status 503,Error SlowDown,CanRetry 1"
INTERNAL = (
    "We encountered an internal error. Please try again.,Status 500,Error InternalError,Rid A1"
)
# A statement, and the code and message with which it is refused.
TRANSIENT = [
    ("DELETE", "40P01", "deadlock detected"),
    ("INSERT", "XX000", CONFLICT),
    ("SELECT column_name", "XX000", "could not open relation with OID 123456"),
    ("COPY", "XX000", f"S3ServiceException:Please {SLOW_DOWN}"),
    ("COPY", "XX000", f"Problem reading manifest file - S3ServiceException:{INTERNAL}"),
]


def refuse(*refusals: tuple[str, str, str]) -> tuple[Hook, list[tuple[str, str, str]]]:
    """A hook that refuses statements, one after the other, and what it will still refuse."""
    left = list(refusals)

    def hook(when: str, sql: str) -> None:
        if when == "before" and left and sql.startswith(left[0][0]):
            raise RedshiftError(*left.pop(0)[1:])

    return hook, left


def test_what_is_transient_is_tried_again(things: Things) -> None:
    things.load(("a", 1))
    for number, group in ((2, TRANSIENT[:3]), (3, TRANSIENT[3:])):
        things.sandbox.redshift.hook, left = refuse(*group)
        warnings = things.load(("a", number))
        assert left == []
        for warning, (_, _, message) in zip(warnings, group, strict=True):
            assert message in warning
            assert re.search(r"trying again in [\d.]+ s$", warning)
        assert things.rows() == [("a", number)]


def test_access_denied_in_copy_is_not_tried_again(things: Things) -> None:
    denied = "S3ServiceException:Access Denied,Status 403,Error AccessDenied,Rid A1,CanRetry 1"
    things.sandbox.redshift.hook, left = refuse(*[("COPY", "XX000", denied)] * 9)
    assert denied in things.refused(("a", 1))
    assert len(left) == 8


def test_the_pauses_between_the_tries_grow(things: Things) -> None:
    things.load(("a", 1))
    things.sandbox.redshift.hook, left = refuse(*[("DELETE", "XX000", CONFLICT)] * 9)
    done = things.run(("a", 2))
    assert (done.returncode, len(left)) == (75, 9 - LOAD_TRIES)
    first, second, third = map(float, re.findall(r"trying again in ([\d.]+) s", done.stderr))
    assert 1 <= first <= 2 <= second <= 4 <= third <= 8
    assert things.rows() == [("a", 1)]


def test_a_password_that_is_rotated_meanwhile(things: Things) -> None:
    """The secret is read, then changed; so the login is refused, and the secret read once more."""
    things.sandbox.set_secret(PASSWORD="0ld-Passw0rd")

    def rotate(handler: Any) -> None:
        handler.forward()
        things.sandbox.set_secret()

    with FlakyProxy(things.sandbox.aws, rotate, method="POST") as aws:
        things.load(("a", 1), options={"AWS_ENDPOINT_URL": aws.url})
    assert things.rows() == [("a", 1)]


def test_a_paused_cluster_does_not_stop_the_download(things: Things) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        things.sandbox.set_secret(PORT=closed.getsockname()[1])
        error = things.refused(("a", 1), status=75, redshift={"connect_seconds": 0})
    assert "load: cannot connect to Redshift" in error
    assert len(things.sandbox.source.requests) == 1


# Where redshift_connector asks for the platform, under a bare except.
SIGNALLED_IN_CONNECT = """
import os, platform, signal, sys, time

def ask(*arguments, ask=platform.platform, **options):
    if "redshift_connector" in sys._getframe(1).f_globals.get("__name__", ""):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
    return ask(*arguments, **options)

platform.platform = ask
"""


def test_a_signal_that_the_driver_swallows_ends_the_run(things: Things) -> None:
    things.load(("a", 1))
    done = things.run(("a", 2), options={"patch": SIGNALLED_IN_CONNECT})
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    (error,) = messages(done, "ERROR")
    assert error.endswith(": stopped by SIGTERM")
    assert things.rows() == [("a", 1)]


# What is cached when signals begin to be handled.
PLATFORM_WHEN_HANDLED = """
import platform, signal, sys

def handle(number, handler, handle=signal.signal):
    if number == signal.SIGTERM and callable(handler):
        print("platform is", "" if platform._platform_cache else "not", "cached", file=sys.stderr)
    return handle(number, handler)

signal.signal = handle
"""


def test_the_driver_finds_the_platform_cached(things: Things) -> None:
    (things.folder / "sitecustomize.py").write_text(PLATFORM_WHEN_HANDLED)
    done = things.run(("a", 1), options={"plainly": True, "PYTHONPATH": str(things.folder)})
    assert re.findall("platform is (.*)", done.stderr)[0] == " cached"


def test_a_warehouse_that_freezes(things: Things) -> None:
    """With its connection open, in the first COPY; the next try finds it well."""
    frozen, over = list[str](), threading.Event()

    def freeze(when: str, sql: str) -> None:
        if (when, sql[:4]) == ("before", "COPY") and not frozen:
            frozen.append(sql)
            over.wait(60)

    things.sandbox.redshift.hook = freeze
    short = {"patch": f"{NO_PAUSES}; ANSWER_MARGIN = 1"}
    try:
        (warning,) = things.load(("a", 1), redshift={"statement_seconds": 1}, options=short)
    finally:
        over.set()
    assert re.search("COPY .*timed out, trying again", warning)
    assert things.rows() == [("a", 1)]


def test_who_it_is_for_a_message_is_asked_once(things: Things) -> None:
    identity = refusing(503, "ServiceUnavailable")
    denied = FlakyProxy(things.sandbox.aws, refusing(403, "AccessDenied"))
    with denied, FlakyProxy(denied.url, None, *[identity] * 3, method="POST") as aws:
        error = things.refused(("a", 1), options={"AWS_ENDPOINT_URL": aws.url})
        assert len(aws.faults) == 2
    assert re.search(r"cannot write s3://\S+: .*AccessDenied", error)


ENCRYPTIONS = {
    "none": (None, None, None),
    "AES256": ("AES256", "AES256", None),
    "key": ("alias/things", "aws:kms", "alias/things"),
}


@pytest.mark.parametrize("case", ENCRYPTIONS)
def test_encryption_of_uploads(things: Things, case: str) -> None:
    kms_key, *expected = ENCRYPTIONS[case]
    sent: list[list[str | None]] = []

    def note(handler: Any) -> None:
        header = "x-amz-server-side-encryption"
        names = (header, f"{header}-aws-kms-key-id")
        sent.append([handler.headers.get(name) for name in names])
        handler.forward()

    with FlakyProxy(things.sandbox.aws, *[note] * 3) as aws:
        options = {"AWS_ENDPOINT_URL": aws.url}
        things.load(("a", 1), options=options, staging={"kms_key": kms_key})
        assert aws.faults == []
    assert sent == [expected] * 3  # a part, the response, the manifest


def copied_region(things: Things) -> set[str]:
    copies = [sql for sql in things.sandbox.redshift.statements if sql.startswith("COPY")]
    return {region for sql in copies for region in re.findall("REGION '(.*)'", sql)}


def test_a_bucket_in_another_region(things: Things) -> None:
    where = {"LocationConstraint": "us-west-2"}
    other = things.sandbox.client("s3", region_name="us-west-2")
    other.create_bucket(Bucket="things-elsewhere", CreateBucketConfiguration=where)
    things.load(("a", 1), staging={"bucket": "things-elsewhere"})
    assert copied_region(things) == {"us-west-2"}
    assert things.rows() == [("a", 1)]


def test_the_region_of_a_bucket_that_must_not_be_looked_at(things: Things) -> None:
    def deny(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(403)
        handler.send_header("x-amz-bucket-region", "eu-north-1")
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    with FlakyProxy(things.sandbox.aws, deny, method="HEAD") as aws:
        things.load(("a", 1), options={"AWS_ENDPOINT_URL": aws.url})
        assert aws.faults == []
    assert copied_region(things) == {"eu-north-1"}
