"""Faults: what is left when the source, S3, Redshift, the disk or a signal stops a run.

Every fault is a real one, in a real server or in the program's own process. After each of them
``World.check`` looks at everything that must hold: the tables, the audit rows, the sessions, the
temporary files, the exit status and the message.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import re
import shutil
import signal
import socket
import socketserver
import struct
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, Self

import pytest

from helpers import (
    AUDIT,
    CORES,
    IMPATIENT,
    LAUNCHES,
    SHIPPED,
    Answer,
    Done,
    FlakyProxy,
    Records,
    Things,
    act_once,
    assert_table,
    faulty_aws,
    launches,
    loaded,
    messages,
    refusing,
    relay,
    responds,
    serve,
    shipped_with,
)
from helpers import LOAD_TRIES as TRIES
from redshift import DropConnection, RedshiftError
from sandbox import BUCKET, NO_PAUSES, SECRET, USER, Process, Sandbox

ROWS = {LAUNCHES: 30, CORES: 38}  # of the sample
AWAY = 75  # EX_TEMPFAIL
KILLED = -signal.SIGKILL

Tables = dict[str, Records]
Point = tuple[str, int]  # "before" or "after", and the statement's index on its connection


# --- the world, and what must hold in it ---------------------------------------------------------


class World:
    """The sandbox, with the rows of an earlier run, whose source had a launch less.

    ``statements`` are those of a run into existing tables.
    """

    def __init__(self, sandbox: Sandbox, folder: Path, statements: list[str]) -> None:
        self.sandbox, self.folder, self.statements = sandbox, folder, statements
        self.last = len(statements) - 1
        self.temporary = folder / "tmp"
        self.temporary.mkdir()

    def tables(self) -> Tables:
        """All rows of the three tables; a table that does not exist is as good as an empty one."""
        with self.sandbox.redshift.connect() as connection, connection.transaction():
            rows: Tables = {LAUNCHES: [], CORES: [], AUDIT: []}
            for name in rows:
                if connection.execute("SELECT to_regclass(%s)", [name]).fetchone() != (None,):
                    sql = f"SELECT to_jsonb(t) FROM {name} AS t ORDER BY to_jsonb(t)::text"
                    rows[name] = [row for (row,) in connection.execute(sql.encode())]
            return rows

    def start(self, *arguments: str | Path, **options: Any) -> Process:
        """Starts a run, and remembers what the tables held before it."""
        self.before = self.tables()
        options = {"patch": NO_PAUSES, "TMPDIR": str(self.temporary)} | options
        return self.sandbox.start(*arguments, **options)

    def run(self, *arguments: str | Path, **options: Any) -> Done:
        return self.sandbox.finish(self.start(*arguments, **options))

    def check(self, done: Done, state: str, status: int = 0, *says: str) -> list[str]:
        """Checks all that must hold after a run, and returns its warnings.

        ``state`` is what the tables hold, "old", "new" or "either"; ``says`` are patterns that the
        message must have.
        """
        assert (done.returncode, done.stdout) == (status, ""), done.stderr
        errors = messages(done, "ERROR")
        assert bool(errors) == (status > 0), done.stderr
        error = "\n".join(errors)
        assert error.count("\n") < 3, error
        assert [pattern for pattern in says if not re.search(pattern, error)] == [], error
        leftovers = list(self.temporary.iterdir())
        assert status == KILLED or not leftovers
        for leftover in leftovers:
            shutil.rmtree(leftover)
        self.sessions_ended()
        temporary = "SELECT relname FROM pg_class WHERE relnamespace::regnamespace::text ~ 'temp_'"
        assert self.sandbox.query(temporary) == []
        now = self.tables()
        if state == "new" or (state == "either" and now != self.before):
            self.check_new(now)
        else:
            assert now == self.before
        return messages(done, "WARNING")

    def check_new(self, now: Tables) -> None:
        """The sample is in both tables with one new run id, which the audit table has once each."""
        (run_id,) = {row["_run_id"] for name in ROWS for row in now[name]}
        assert run_id not in {row["_run_id"] for rows in self.before.values() for row in rows}
        for name in ROWS:
            assert_table(self.sandbox, name, SHIPPED["tables"][name], launches())
        added = [row for row in now[AUDIT] if row not in self.before[AUDIT]]
        assert len(now[AUDIT]) == len(self.before[AUDIT]) + len(added)
        rows = sorted((row["table_name"], row["_run_id"], row["rows_loaded"]) for row in added)
        assert rows == [(name, run_id, ROWS[name]) for name in sorted(ROWS)]

    def sessions_ended(self) -> None:
        """Waits until the server is rid of the program's sessions."""
        sessions = f"SELECT pid FROM pg_stat_activity WHERE usename = '{USER}'"
        deadline = time.monotonic() + 60
        while self.sandbox.redshift.sessions or self.sandbox.query(sessions):
            assert time.monotonic() < deadline, "a session of the program is still there"
            time.sleep(0.01)

    def works(self) -> None:
        """A normal run does its work."""
        self.sandbox.redshift.hook = None
        self.sandbox.set_secret()
        self.check(self.run(), "new")


def copy_tables(sandbox: Sandbox, schema: str, to: str) -> None:
    for name in (LAUNCHES, CORES, AUDIT):
        old, new = (name.replace("public", it) for it in (schema, to))
        sql = f"CREATE TABLE {new} (LIKE {old} INCLUDING ALL); INSERT INTO {new} TABLE {old};"
        change(sandbox, f"{sql} ALTER TABLE {new} OWNER TO {USER}")


def change(sandbox: Sandbox, sql: str) -> None:
    """Runs statements as the database's superuser."""
    with sandbox.redshift.connect() as connection:
        connection.execute(sql.encode())


@pytest.fixture(scope="module")
def statements(running_sandbox: Sandbox) -> Iterator[list[str]]:
    """The statements of a second run; a copy of what the first left is kept meanwhile."""
    running_sandbox.reset()
    serve(running_sandbox, launches()[:-1])
    loaded(running_sandbox)
    change(running_sandbox, "CREATE SCHEMA earlier")
    copy_tables(running_sandbox, "public", "earlier")
    serve(running_sandbox, launches())
    running_sandbox.redshift.statements.clear()
    loaded(running_sandbox)
    yield [*running_sandbox.redshift.statements]
    change(running_sandbox, "DROP SCHEMA earlier CASCADE")


@pytest.fixture
def world(statements: list[str], sandbox: Sandbox, tmp_path: Path) -> World:
    copy_tables(sandbox, "earlier", "public")
    return World(sandbox, tmp_path, statements)


# --- AWS -----------------------------------------------------------------------------------------


def reset_upload(handler: Any) -> None:
    """Resets the TCP connection in the middle."""
    handler.rfile.read(1024)
    handler.close_connection = True
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(handler.connection.detach())


SLOW_DOWN, INTERNAL_ERROR = refusing(503, "SlowDown"), refusing(500, "InternalError")
DENIED = refusing(403, "AccessDenied")


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (SLOW_DOWN, r"\(SlowDown\) when calling the PutObject operation"),
        (reset_upload, "Connection"),
    ],
    ids=["5xx", "reset"],
)
def test_s3_fails(world: World, fault: Answer, says: str) -> None:
    """All of ten tries, and then nine, of which one fails in another way."""
    with faulty_aws(world.sandbox, *[fault] * 10) as aws:
        done = world.run(patch=IMPATIENT, **aws)
    world.check(done, "old", AWAY, rf"cannot write s3://{BUCKET}/spacex/\S+ as arn:aws:", says)
    with faulty_aws(world.sandbox, *[fault] * 8, INTERNAL_ERROR) as aws:
        world.check(world.run(patch=IMPATIENT, **aws), "new")


@pytest.mark.parametrize("allowed", [0, 1, 2, 4], ids=["part", "second table", "raw", "manifest"])
def test_s3_denies(world: World, allowed: int) -> None:
    with faulty_aws(world.sandbox, *[None] * allowed, DENIED) as aws:
        done = world.run(**aws)
    identity = "arn:aws:sts::123456789012:user/moto"
    url = rf"s3://{BUCKET}/spacex/\S+"
    says = rf"^stage: cannot write {url} as {identity}: .*\(AccessDenied\) .* PutObject operation"
    world.check(done, "old", 1, says)
    assert len(world.sandbox.objects()) >= allowed


def test_who_it_is_for_a_message_is_asked_once(world: World) -> None:
    with FlakyProxy(world.sandbox.aws, DENIED) as denied:
        identity = refusing(503, "ServiceUnavailable")
        with FlakyProxy(denied.url, None, *[identity] * 3, method="POST") as aws:
            done = world.run(AWS_ENDPOINT_URL=aws.url)
            assert len(aws.faults) == 2
    world.check(done, "old", 1, r"cannot write s3://\S+: .*AccessDenied")


@pytest.mark.parametrize("gone", ["launch_cores.0001.csv.gz", "launches/.*manifest.json"])
def test_staged_file_vanishes(world: World, gone: str) -> None:
    def delete() -> None:
        (key,) = [key for key in world.sandbox.staged() if re.search(gone, key)]
        world.sandbox.s3.delete_object(Bucket=BUCKET, Key=key)

    act_once(world.sandbox, "COPY", delete)
    world.check(world.run(), "old", 1, r"load: COPY for public\.launch\w+: ")


def test_secrets_manager_recovers(world: World) -> None:
    with faulty_aws(world.sandbox, *[INTERNAL_ERROR] * 2, method="POST") as aws:
        world.check(world.run(**aws), "new")


def test_a_password_that_is_rotated_meanwhile(world: World) -> None:
    """The secret is read, then changed; so the login is refused, and the secret read once more."""
    world.sandbox.set_secret(PASSWORD="0ld-Passw0rd")

    def rotate(handler: Any) -> None:
        handler.forward()
        world.sandbox.set_secret()

    with faulty_aws(world.sandbox, rotate, method="POST") as aws:
        world.check(world.run(**aws), "new")


# --- the connection to Redshift ------------------------------------------------------------------


class Forwarder(socketserver.ThreadingTCPServer):
    """A TCP port in front of another, closed until ``open``.

    The n-th connection is cut after ``cuts[n]`` bytes from the server, further ones never.
    """

    daemon_threads = True

    def __init__(self, port: int, *cuts: int) -> None:
        super().__init__(("127.0.0.1", 0), socketserver.BaseRequestHandler, False)
        self.server_bind()  # refuses connections: nobody listens yet
        self.target, self.port, self.cuts = port, self.server_address[1], list(cuts)
        self.accepted = threading.Event()

    def open(self) -> Self:
        self.server_activate()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def finish_request(self, client: Any, _: object) -> None:
        cut = self.cuts.pop(0) if self.cuts else 1 << 60
        server = socket.create_connection(("127.0.0.1", self.target))
        threading.Thread(target=relay, args=(client, server), daemon=True).start()
        self.accepted.set()
        relay(server, client, cut)

    def server_close(self) -> None:
        if self.accepted.is_set():
            self.shutdown()
        super().server_close()


def test_redshift_comes_late(world: World) -> None:
    with Forwarder(world.sandbox.redshift.port) as port:
        world.sandbox.set_secret(PORT=port.port)

        def open_soon(handler: Any) -> None:
            handler.forward()  # the secret; it was read for the first login, too
            threading.Timer(0.8, port.open).start()

        with faulty_aws(world.sandbox, None, open_soon, method="POST") as aws:
            arguments = shipped_with(world.folder, redshift={"connect_seconds": 20})
            done = world.run(*arguments, patch="", **aws)
    warnings = world.check(done, "new")
    assert warnings
    assert all("Connection refused, trying again in" in text for text in warnings)


AT = "cannot connect to Redshift at {HOST}:{PORT}, database {DATABASE}: "
AWAY_FROM: dict[str, tuple[dict[str, Any], str]] = {
    "no address": ({"HOST": "nowhere.invalid"}, "not known|resolution"),
    "paused": ({"PORT": 1}, "Connection refused"),
}


@pytest.mark.parametrize("case", AWAY_FROM)
def test_redshift_is_away(world: World, case: str) -> None:
    """That does not stop the download."""
    changes, reason = AWAY_FROM[case]
    world.sandbox.set_secret(**changes)
    done = world.run(*shipped_with(world.folder, redshift={"connect_seconds": 0}))
    where = AT.format_map(world.sandbox.secret() | changes)
    assert world.check(done, "old", AWAY, f"load: {where}", reason) == []
    assert len(world.sandbox.source.requests) == 1


# Bytes from the server: 1 is its yes to TLS, some 840 the handshake, 1,400 and more the log-in,
# 3,000 the answers to the first statements.
@pytest.mark.parametrize("cuts", [(0, 1, 500), (1000, 1500, 3000), (3500, 4000, 4500)])
def test_connection_breaks_within_an_answer(world: World, cuts: tuple[int, ...]) -> None:
    check = 1 << 20  # of the login before the download
    with Forwarder(world.sandbox.redshift.port, check, *cuts).open() as port:
        world.sandbox.set_secret(PORT=port.port)
        done = world.run()
        assert port.cuts == []
    assert len(world.check(done, "new")) == len(cuts)


STRANGER = "certificate verify failed: IP address mismatch"
TEXT = "S3cret-text"
SECRETS: dict[str, tuple[str | dict[str, Any], str]] = {
    "wrong password": ({"PASSWORD": TEXT}, AT + 'password .* failed for user "{USER}".*'),
    "wrong database": ({"DATABASE": "nowhere"}, AT + '.*database "nowhere" does not exist.*'),
    "wrong host": ({"HOST": "127.0.0.1"}, f"{AT}.*{STRANGER}.*"),
    "text": (TEXT, "{secret} is not a JSON object"),
    "list": (f'["{TEXT}"]', "{secret} is not a JSON object"),
    "empty": ("{}", "{secret} has no HOST, DATABASE, USER, PASSWORD, or none .*"),
    "lacking": ({"USER": None, "PASSWORD": ""}, "{secret} has no USER, PASSWORD, or none .*"),
    "port": ({"PORT": TEXT}, "{secret} has no PORT, or none .*"),
    "port too high": ({"PORT": 70_000}, "{secret} has no PORT, or none .*"),
    "host": ({"HOST": f"{TEXT}..eu-west-1.redshift.amazonaws.com"}, "{secret} .* HOST.*"),
    "lone surrogate": ({"PASSWORD": f"{TEXT}\ud800"}, "{secret} has no PASSWORD, or none .*"),
}


@pytest.mark.parametrize("case", SECRETS)
def test_secret_that_lets_nobody_in(world: World, case: str) -> None:
    """It is found before the download."""
    given, says = SECRETS[case]
    text, changes = ("", given) if isinstance(given, dict) else (given, {})
    world.sandbox.set_secret(text, **changes)
    done = world.run("--verbose")
    values = world.sandbox.secret() | changes
    says = says.format_map(values | {"secret": f"the secret {SECRET}"})
    assert world.check(done, "old", 1, f"^connect: {says}$") == []
    assert TEXT not in done.stderr
    assert world.sandbox.source.requests == []


def test_certificate_of_a_stranger_and_no_secret(world: World) -> None:
    says = "connect: cannot connect to Redshift at .*certificate verify failed"
    assert world.check(world.run(SSL_CERT_FILE=None), "old", 1, says) == []
    says = "connect: cannot read the secret no/such/secret as arn:aws:.*ResourceNotFoundException"
    config = shipped_with(world.folder, redshift={"secret": "no/such/secret"})
    world.check(world.run(*config), "old", 1, says)
    assert world.sandbox.source.requests == []


# --- the statements ------------------------------------------------------------------------------


class Interruptions:
    """A hook that acts at points of a run: one on each connection, in the order given.

    ``seen`` is what the tables held whenever the program came again.
    """

    def __init__(self, world: World, points: list[Point], act: Callable[[], object]) -> None:
        self.world, self.points, self.act = world, list(points), act
        self.index, self.connections = -1, 0
        self.acted = False
        self.seen: list[Tables] = []
        world.sandbox.redshift.hook = self

    def __call__(self, when: str, sql: str) -> None:
        if when == "before":
            self.index += 1
            if sql.startswith("SET statement_timeout"):
                self.index, self.acted = 0, False
                self.connections += 1
                if self.connections > 1:
                    self.seen.append(self.world.tables())
        if self.points and not self.acted and self.points[0] == (when, self.index):
            del self.points[0]
            self.acted = True
            self.act()


def drop() -> None:
    raise DropConnection


def test_connection_drops_at_each_statement(world: World) -> None:
    """At three statements a run, one each try, before one and after the other."""
    points = [(("before", "after")[n % 2], n) for n in range(len(world.statements))]
    for start in range(0, len(points), TRIES - 1):
        group = points[start : start + TRIES - 1]
        drops = Interruptions(world, group, drop)
        warnings = world.check(world.run(), "new")
        assert drops.points == []
        assert drops.connections == len(group) + 1
        assert len(warnings) == len(group)
        for point, seen in zip(group, drops.seen, strict=True):
            assert (seen == world.before) == (point != ("after", world.last))


def test_commit_loses_its_answer(world: World) -> None:
    """The run is in the tables already: it is recognised, and not loaded again."""
    Interruptions(world, [("after", world.last)], drop)
    done = world.run()
    assert len(world.check(done, "new")) == 1
    assert "only the answer to its commit was lost" in done.stderr
    assert " run: done: public.launches 30 rows, public.launch_cores 38 rows, " in done.stderr
    ran = Counter(sql.split()[0] for sql in world.sandbox.redshift.statements)
    assert (ran["COPY"], ran["DELETE"], ran["COMMIT"]) == (4, 2, 1)


def test_commit_loses_its_answer_in_the_last_try(world: World) -> None:
    Interruptions(world, [("before", world.last)] * (TRIES - 1) + [("after", world.last)], drop)
    world.check(world.run(), "new")


def test_the_last_failure_is_told_where_nothing_can_be_looked_up(world: World) -> None:
    world.sandbox.as_user(f"DROP TABLE {AUDIT}")
    Interruptions(world, [("before", 1)] * TRIES, drop)
    world.check(world.run(), "old", os.EX_TEMPFAIL, "load: SELECT .*: server socket closed")


@pytest.mark.parametrize("index", [0, 13, -1])
def test_connection_drops_every_time(world: World, index: int) -> None:
    index %= len(world.statements)
    drops = Interruptions(world, [("before", index)] * (TRIES + 2), drop)
    done = world.run()
    statement = re.escape(world.statements[index][:12])
    says = f"^load: {statement}.*: .*(BrokenPipe|closed|EOF|reset)"
    warnings = world.check(done, "old", AWAY, says)
    pauses = [float(text.rpartition("trying again in ")[2].removesuffix(" s")) for text in warnings]
    assert [2**n <= pause <= 2 ** (n + 1) for n, pause in enumerate(pauses)] == [True] * (TRIES - 1)
    assert drops.connections == TRIES + 1  # the last looks whether a commit's answer was lost
    world.works()


DROPPED = f"DROP TABLE {LAUNCHES}, {CORES}, {AUDIT}"
# What the tables lack, and where the connection drops while that is mended.
LACKING: list[tuple[str, list[Point]]] = [
    (DROPPED, [("before", 4)]),
    # A table that was made is not made again, so that the next one's statement is the fifth.
    (DROPPED, [("after", 4)] * 3),
    (DROPPED, [("before", 6), ("after", 4)]),
    (f"ALTER TABLE {LAUNCHES} DROP details, DROP crew", [("before", 4), *[("after", 4)] * 2]),
    (f"ALTER TABLE {CORES} DROP landpad, ADD landpad varchar(8)", [("before", 4), ("after", 4)]),
]


def test_connection_drops_while_tables_are_prepared(world: World) -> None:
    dropped: list[str] = []

    def note_and_drop() -> None:
        dropped.append(world.sandbox.redshift.statements[-1])
        drop()

    for sql, points in LACKING:
        change(world.sandbox, sql)
        Interruptions(world, points, note_and_drop)
        world.check(world.run(), "new")
        kind = "CREATE TABLE" if sql == DROPPED else "ALTER TABLE"
        assert [text[: len(kind)] for text in dropped] == [kind] * len(points)
        dropped.clear()


def test_server_ends_the_session(world: World) -> None:
    """As when a cluster is restarted or an administrator cancels the session."""
    sql = f"SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE usename = '{USER}'"
    points = [("before", 6), ("before", 18), ("after", 21)]
    Interruptions(world, points, lambda: world.sandbox.query(sql))
    assert len(world.check(world.run(), "new")) == 3


OTHER_WRITERS = {
    "update": f"UPDATE {LAUNCHES} SET name = 'other'",
    # Nothing that the program deletes: only that both read what the other writes.
    "insert": f"SELECT count(*) FROM {LAUNCHES};"
    f"INSERT INTO {LAUNCHES} SELECT * FROM earlier.launches LIMIT 1",
}


@pytest.mark.parametrize("statements", OTHER_WRITERS.values(), ids=OTHER_WRITERS)
def test_serializable_isolation_violation(world: World, statements: str) -> None:
    """Another session writes, and commits, before the program's first DELETE."""
    write = f"BEGIN ISOLATION LEVEL SERIALIZABLE; {statements}; COMMIT"
    act_once(world.sandbox, "DELETE", lambda: change(world.sandbox, write))
    (warning,) = world.check(world.run(), "new")
    assert re.search("1023. Serializable isolation violation on table .* trying again", warning)


SLOW = "reduce your request rate.,Status 503,Error SlowDown,CanRetry 1"
BROKEN = "We encountered an internal error. Please try again.,Status 500,Error InternalError,Rid A1"
ACCESS_DENIED = "S3ServiceException:Access Denied,Status 403,Error AccessDenied,Rid A1,CanRetry 1"
Refusal = tuple[str, str, str]  # a statement, and the code and message with which it is refused
TRANSIENT: list[list[Refusal]] = [
    [
        ("DELETE", "40P01", "deadlock detected"),
        ("INSERT", "XX000", "could not complete because of conflict with concurrent transaction"),
        ("SELECT column_name", "XX000", "could not open relation with OID 123456"),
    ],
    [
        ("COPY", "XX000", f"S3ServiceException:Please {SLOW}"),
        ("COPY", "XX000", f"Problem reading manifest file - S3ServiceException:{BROKEN}"),
    ],
]


def refuse(world: World, *refusals: Refusal) -> list[Refusal]:
    """Has statements refused, one after the other; returns what will still be refused."""
    left = list(refusals)

    def hook(when: str, sql: str) -> None:
        if when == "before" and left and sql.startswith(left[0][0]):
            raise RedshiftError(*left.pop(0)[1:])

    world.sandbox.redshift.hook = hook
    return left


@pytest.mark.parametrize("refusals", TRANSIENT, ids=["by the database", "by S3"])
def test_what_is_transient_is_tried_again(world: World, refusals: list[Refusal]) -> None:
    left = refuse(world, *refusals)
    warnings = world.check(world.run(), "new")
    assert left == []
    for warning, (_, _, message) in zip(warnings, refusals, strict=True):
        assert re.search(rf"{re.escape(message)}.*trying again in [\d.]+ s$", warning)


def test_access_denied_in_copy_is_not_tried_again(world: World) -> None:
    left = refuse(world, *[("COPY", "XX000", ACCESS_DENIED)] * 9)
    assert world.check(world.run(), "old", 1, ACCESS_DENIED) == []
    assert len(left) == 8


def test_a_warehouse_that_freezes(things: Things) -> None:
    """With its connection open, in the first COPY; the next try finds it well."""
    over = threading.Event()
    act_once(things.sandbox, "COPY", lambda: over.wait(60))
    short = {"patch": f"{NO_PAUSES}; ANSWER_MARGIN = 1"}
    try:
        (warning,) = things.load(("a", 1), redshift={"statement_seconds": 1}, options=short)
    finally:
        over.set()
    assert re.search("COPY .*timed out, trying again", warning)
    assert things.rows() == [("a", 1)]


# --- signals -------------------------------------------------------------------------------------


SIGNALS = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
MOMENTS = [
    *itertools.product(["start", "extract", "stage", "load"], SIGNALS),
    *itertools.product(["retry", "upload", "connect"], [signal.SIGTERM]),
]


@pytest.mark.parametrize(("phase", "number"), MOMENTS)
def test_signal_at_any_moment(world: World, number: int, phase: str) -> None:
    """A moment after the program came to a phase, or while it waits; it may come too late."""
    sandbox, reached, over = world.sandbox, threading.Event(), threading.Event()

    def requested(handler: BaseHTTPRequestHandler) -> None:
        reached.set()
        is_away = responds(503, Retry_After="100")
        (is_away if phase == "retry" else responds(200, launches()))(handler)

    def uploads(handler: Any) -> None:
        reached.set()
        if phase == "upload":
            over.wait(120)
        handler.forward()

    with contextlib.ExitStack() as stack:
        stack.callback(over.set)
        if phase in ("extract", "retry"):
            sandbox.source.answers = [requested]
        if phase == "connect":
            port = stack.enter_context(Forwarder(sandbox.redshift.port, *[0] * 9).open())
            port.accepted = reached
            sandbox.set_secret(PORT=port.port)
        if phase == "load":
            act_once(sandbox, "COPY", reached.set)
        faults = [uploads] * (phase in ("stage", "upload"))
        aws = stack.enter_context(faulty_aws(sandbox, *faults))
        process = world.start(patch="", plainly=phase == "start", **aws)
        assert phase == "start" or reached.wait(60)
        time.sleep(random.Random(f"{phase} {number}").uniform(0, 0.2))
        process.send_signal(number)
        done = sandbox.finish(process)
    status, says = done.returncode, [rf"^\w+: stopped by {signal.Signals(number).name}$"]
    if number == signal.SIGINT and done.stderr.endswith("KeyboardInterrupt\n"):
        status = -number  # Python's own, with another status while it starts
    assert status in {0, -number, 128 + number} - {128 + signal.SIGKILL}
    if status <= 0:  # before the program handles signals, or after all is done
        done, says = Done([], status, "", ""), []
    is_done = "either" if phase in ("start", "extract", "stage", "load") else "old"
    world.check(done, "new" if status == 0 else is_done, status, *says)
    world.works()


STATEMENTS = ["SET", "SELECT", "CREATE TEMP", "COPY", "LOCK", "DELETE", "INSERT", "COMMIT"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("statement", STATEMENTS)
def test_signal_at_each_kind_of_statement(world: World, number: int, statement: str) -> None:
    """Before it is run, or when it was; its answer is held back until the program has ended."""
    statements = [sql.startswith(statement) for sql in world.statements]
    # The one signal before the statement, the other after it, in turns.
    after = (STATEMENTS.index(statement) + (number == signal.SIGKILL)) % 2
    ready = threading.Event()
    ended: list[int] = []

    def kill() -> None:
        ready.wait()
        process.send_signal(number)
        ended.append(process.wait(60))

    Interruptions(world, [(("before", "after")[after], statements.index(True))], kill)
    process = world.start()
    ready.set()
    done = world.sandbox.finish(process)
    state = "new" if statement == "COMMIT" else "old"  # the server has got the COMMIT already
    world.check(done, state, KILLED if number == signal.SIGKILL else 128 + number)
    assert ended == [done.returncode]


# The program signals itself in a call from a module.
SIGNALLED = """
import platform
def signalled(*arguments, call={call}, **options):
    if {module!r} in sys._getframe(1).f_globals.get("__name__", ""):
        Path({mark!r}).touch()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
    return call(*arguments, **options)
{call} = signalled
"""


@pytest.mark.parametrize("call", ["platform.platform", "shutil.rmtree"])
def test_signal_that_nobody_hears(world: World, call: str) -> None:
    """The driver swallows under a bare except what the handler raises; or all else is done."""
    is_swallowed, mark = call == "platform.platform", world.folder / "signalled"
    module = "redshift_connector" if is_swallowed else "main"
    done = world.run(patch=SIGNALLED.format(call=call, module=module, mark=str(mark)))
    stopped = "old", 128 + signal.SIGTERM, ": stopped by SIGTERM$"
    world.check(done, *(stopped if is_swallowed else ("new",)))
    assert mark.exists()


# What is cached when signals begin to be handled.
PLATFORM_WHEN_HANDLED = """
import platform, signal, sys

def handle(number, handler, handle=signal.signal):
    if number == signal.SIGTERM and callable(handler):
        print("platform is", "" if platform._platform_cache else "not", "cached", file=sys.stderr)
    return handle(number, handler)

signal.signal = handle
"""


def test_the_driver_finds_the_platform_cached(world: World) -> None:
    (world.folder / "sitecustomize.py").write_text(PLATFORM_WHEN_HANDLED)
    done = world.run(plainly=True, PYTHONPATH=str(world.folder))
    assert re.findall("platform is (.*)", done.stderr)[0] == " cached"


# --- the disk ------------------------------------------------------------------------------------


@contextlib.contextmanager
def tiny_disk(folder: Path, kilobytes: int) -> Iterator[None]:
    """Mounts a file system of some kB, where the machine allows it."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this machine does not let the tests mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize(
    ("kilobytes", "step"), [(96, "extract"), (104, "transform"), (124, "(transform|stage)")]
)
def test_disk_is_full(world: World, kilobytes: int, step: str) -> None:
    """The response has 99 kB, the CSV files of the two tables some 12 kB.

    They may be gone when the response, much of which no table loads, is gzipped to 37 kB.
    """
    first, *others = launches()
    noise = {"noise": random.Random(1).randbytes(20_000).hex()}
    serve(world.sandbox, [first | noise, *others])
    full = f"^{step}: .*No space left on device.* in {re.escape(str(world.temporary))}$"
    with tiny_disk(world.temporary, kilobytes):
        world.check(world.run(), "old", 1, full)


def test_no_folder_can_be_written(world: World) -> None:
    limit = ("sh", "-c", 'ulimit -f 0; exec "$@"', "sh")
    done = world.run(wrapper=limit, PYTHONDONTWRITEBYTECODE="1")
    world.check(done, "old", 1, "No usable temporary directory found in ")


def test_temporary_folder_does_not_exist(world: World) -> None:
    """Python takes the next that it knows of, and so does the program."""
    used: list[Path] = []
    world.sandbox.redshift.hook = lambda *_: used.extend(world.temporary.iterdir())
    missing = str(world.folder / "missing")
    world.check(world.run(TMPDIR=missing, TEMP=str(world.temporary)), "new")
    assert used


def test_nobody_reads_the_log(world: World) -> None:
    process = world.start(plainly=True)
    assert process.stderr
    process.stderr.close()
    process.stderr = None
    # 120 is how Python says that it could not write what is left to its standard streams.
    assert process.wait(60) in (0, 120)
    world.check(Done([], 0, "", ""), "new")
