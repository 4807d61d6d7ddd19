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
import struct
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, Self

import psycopg
import pytest

from helpers import (
    AUDIT,
    CORES,
    IMPATIENT,
    LAUNCHES,
    Answer,
    Done,
    FlakyProxy,
    Records,
    launches,
    messages,
    refusing,
    relay,
    serve,
    shipped_with,
)
from helpers import LOAD_TRIES as TRIES
from redshift import DropConnection
from sandbox import BUCKET, NO_PAUSES, SAMPLE, SECRET, USER, Process, Sandbox, answer

ROWS = {LAUNCHES: 30, CORES: 38}  # of the sample
AWAY = 75  # EX_TEMPFAIL
KILLED = -signal.SIGKILL

Tables = dict[str, Records]
Point = tuple[str, int]  # "before" or "after", and the statement's index on its connection


# --- the world, and what must hold in it ---------------------------------------------------------


class World:
    """The sandbox, with the rows of an earlier run in the tables."""

    def __init__(self, sandbox: Sandbox, folder: Path) -> None:
        self.sandbox, self.folder = sandbox, folder
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        # What a run into existing tables leaves in them, and the statements that it runs.
        self.content: Tables = {}
        self.statements: list[str] = []

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
        assert without_meta(now) == self.content
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


def without_meta(tables: Tables) -> Tables:
    """The rows of the sample's tables, without what differs from run to run."""
    return {
        name: [{column: row[column] for column in row if column[0] != "_"} for row in tables[name]]
        for name in ROWS
    }


@pytest.fixture(scope="module")
def measured(running_sandbox: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Loads all but one launch, keeps a copy of these tables, and measures a second, whole run."""
    running_sandbox.reset()
    world = World(running_sandbox, tmp_path_factory.mktemp("measured"))
    serve(running_sandbox, launches()[:-1])
    assert world.run().returncode == 0
    with running_sandbox.redshift.connect() as connection:
        connection.execute("CREATE SCHEMA earlier")
        copy_tables(connection, "public", "earlier")
    running_sandbox.source.body = SAMPLE.read_bytes()
    running_sandbox.redshift.statements.clear()
    done = world.run()
    assert done.returncode == 0, done.stderr
    now = world.tables()
    assert {name: len(now[name]) for name in ROWS} == ROWS
    world.content, world.statements = without_meta(now), [*running_sandbox.redshift.statements]
    assert world.statements[-1] == "COMMIT"
    yield world
    with running_sandbox.redshift.connect() as connection:
        connection.execute("DROP SCHEMA earlier CASCADE")


def copy_tables(connection: psycopg.Connection[Any], schema: str, to: str) -> None:
    for name in (LAUNCHES, CORES, AUDIT):
        old, new = (name.replace("public", it) for it in (schema, to))
        sql = f"CREATE TABLE {new} (LIKE {old} INCLUDING ALL); INSERT INTO {new} TABLE {old};"
        connection.execute(f"{sql} ALTER TABLE {new} OWNER TO {USER}".encode())


@pytest.fixture
def empty_world(measured: World, sandbox: Sandbox, tmp_path: Path) -> World:
    """The world before the first run: no tables."""
    world = World(sandbox, tmp_path)
    world.content, world.statements = measured.content, measured.statements
    return world


@pytest.fixture
def world(empty_world: World) -> World:
    """The world after an earlier run, whose source had a launch less."""
    with empty_world.sandbox.redshift.connect() as connection:
        copy_tables(connection, "earlier", "public")
    return empty_world


# --- AWS -----------------------------------------------------------------------------------------


def reset_upload(handler: Any) -> None:
    """Resets the TCP connection in the middle."""
    handler.rfile.read(1024)
    handler.close_connection = True
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(handler.connection.detach())


SLOW_DOWN, INTERNAL_ERROR = refusing(503, "SlowDown"), refusing(500, "InternalError")


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
    with FlakyProxy(world.sandbox.aws, *[fault] * 10) as proxy:
        done = world.run(AWS_ENDPOINT_URL=proxy.url, patch=IMPATIENT)
        assert proxy.faults == []
        world.check(done, "old", AWAY, rf"cannot write s3://{BUCKET}/spacex/\S+ as arn:aws:", says)
        proxy.faults = [*[fault] * 8, INTERNAL_ERROR]
        world.check(world.run(AWS_ENDPOINT_URL=proxy.url, patch=IMPATIENT), "new")
        assert proxy.faults == []


@pytest.mark.parametrize("allowed", [0, 1, 2, 4], ids=["part", "second table", "raw", "manifest"])
def test_s3_denies(world: World, allowed: int) -> None:
    with FlakyProxy(world.sandbox.aws, *[None] * allowed, refusing(403, "AccessDenied")) as proxy:
        done = world.run(AWS_ENDPOINT_URL=proxy.url)
    identity = "arn:aws:sts::123456789012:user/moto"
    url = rf"s3://{BUCKET}/spacex/\S+"
    says = rf"^stage: cannot write {url} as {identity}: .*\(AccessDenied\) .* PutObject operation"
    world.check(done, "old", 1, says)
    assert len(world.sandbox.objects()) >= allowed


@pytest.mark.parametrize("gone", ["launch_cores.0001.csv.gz", "launches/.*manifest.json"])
def test_staged_file_vanishes(world: World, gone: str) -> None:
    def delete(_: str, sql: str) -> None:
        for key in world.sandbox.objects() if sql.startswith("COPY") else ():
            if re.search(gone, key):
                world.sandbox.s3.delete_object(Bucket=BUCKET, Key=key)

    world.sandbox.redshift.hook = delete
    world.check(world.run(), "old", 1, r"load: COPY for public\.launch\w+: ")


def test_secrets_manager_recovers(world: World) -> None:
    with FlakyProxy(world.sandbox.aws, *[INTERNAL_ERROR] * 2, method="POST") as aws:
        world.check(world.run(AWS_ENDPOINT_URL=aws.url), "new")
        assert aws.faults == []


# --- the connection to Redshift ------------------------------------------------------------------


class Forwarder:
    """A TCP port in front of another, closed until ``open``.

    The n-th connection is cut after ``cuts[n]`` bytes from the server, further ones never.
    """

    def __init__(self, port: int, *cuts: int) -> None:
        self.target, self.cuts = port, list(cuts)
        self.accepted = threading.Event()
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))  # refuses connections: nobody listens yet
        self.port = self.socket.getsockname()[1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()

    def open(self) -> Self:
        self.socket.listen()
        threading.Thread(target=self.accept, daemon=True).start()
        return self

    def accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.socket.accept()
                cut = self.cuts.pop(0) if self.cuts else 1 << 60
                server = socket.create_connection(("127.0.0.1", self.target))
                for arguments in ((client, server), (server, client, cut)):
                    threading.Thread(target=relay, args=arguments, daemon=True).start()
                self.accepted.set()


def test_redshift_comes_late(world: World) -> None:
    with Forwarder(world.sandbox.redshift.port) as port:
        world.sandbox.set_secret(PORT=port.port)

        def open_soon(handler: Any) -> None:
            handler.forward()  # the secret; it was read for the first login, too
            threading.Timer(0.8, port.open).start()

        with FlakyProxy(world.sandbox.aws, None, open_soon, method="POST") as aws:
            arguments = shipped_with(world.folder, redshift={"connect_seconds": 20})
            done = world.run(*arguments, patch="", AWS_ENDPOINT_URL=aws.url)
    warnings = world.check(done, "new")
    assert warnings
    assert all("Connection refused, trying again in" in text for text in warnings)


AT = "cannot connect to Redshift at {HOST}:{PORT}, database {DATABASE}: "


def test_redshift_has_no_address(world: World) -> None:
    world.sandbox.set_secret(HOST="nowhere.invalid")
    done = world.run(*shipped_with(world.folder, redshift={"connect_seconds": 0}))
    where = AT.format_map(world.sandbox.secret() | {"HOST": "nowhere.invalid"})
    assert world.check(done, "old", AWAY, f"load: {where}", "not known|resolution") == []


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
    last = len(world.statements) - 1
    points = [(("before", "after")[n % 2], n) for n in range(last + 1)]
    for start in range(0, last + 1, TRIES - 1):
        group = points[start : start + TRIES - 1]
        drops = Interruptions(world, group, drop)
        warnings = world.check(world.run(), "new")
        assert drops.points == []
        assert drops.connections == len(group) + 1
        assert len(warnings) == len(group)
        for point, seen in zip(group, drops.seen, strict=True):
            assert (seen == world.before) == (point != ("after", last))


def test_commit_loses_its_answer(world: World) -> None:
    """The run is in the tables already: it is recognised, and not loaded again."""
    statements: list[str] = []

    def drop_commit(when: str, sql: str) -> None:
        statements.append(f"{when} {sql}")
        if statements.count("after COMMIT") == 1 and sql == "COMMIT":
            drop()

    world.sandbox.redshift.hook = drop_commit
    done = world.run()
    assert len(world.check(done, "new")) == 1
    assert "only the answer to its commit was lost" in done.stderr
    assert " run: done: public.launches 30 rows, public.launch_cores 38 rows, " in done.stderr
    ran = Counter(sql.split()[1] for sql in statements if sql.startswith("after"))
    assert (ran["COPY"], ran["DELETE"], ran["COMMIT"]) == (4, 2, 1)


@pytest.mark.parametrize("index", [0, 13, -1])
def test_connection_drops_every_time(world: World, index: int) -> None:
    index %= len(world.statements)
    drops = Interruptions(world, [("before", index)] * (TRIES + 2), drop)
    done = world.run()
    statement = re.escape(world.statements[index][:12])
    says = f"^load: {statement}.*: .*(BrokenPipe|closed|EOF|reset)"
    assert len(world.check(done, "old", AWAY, says)) == TRIES - 1
    assert drops.connections == TRIES + 1  # the last looks whether a commit's answer was lost
    world.works()


def test_commit_loses_its_answer_in_the_last_try(world: World) -> None:
    last = len(world.statements) - 1
    Interruptions(world, [("before", last)] * (TRIES - 1) + [("after", last)], drop)
    world.check(world.run(), "new")


def interrupted(world: World, *points: Point) -> list[str]:
    """The statements at which the connection dropped in a run, which succeeds all the same."""
    dropped: list[str] = []

    def note_and_drop() -> None:
        dropped.append(world.sandbox.redshift.statements[-1])
        drop()

    Interruptions(world, [*points], note_and_drop)
    world.check(world.run(), "new")
    assert len(dropped) == len(points)
    return dropped


def test_connection_drops_while_tables_are_made(empty_world: World) -> None:
    # A table that was made is not made again, so that the next one's statement is the fifth.
    for points in ([("before", 4)], [("after", 4)] * 3, [("before", 6), ("after", 4)]):
        dropped = interrupted(empty_world, *points)
        assert all(sql.startswith("CREATE TABLE") for sql in dropped)
        empty_world.sandbox.reset()


def test_connection_drops_while_tables_are_altered(world: World) -> None:
    for changes, *points in (
        (f"{LAUNCHES} DROP details, DROP crew", ("before", 4), ("after", 4), ("after", 4)),
        (f"{CORES} DROP landpad, ADD landpad varchar(8)", ("before", 4), ("after", 4)),
    ):
        with world.sandbox.redshift.connect() as connection:
            connection.execute(f"ALTER TABLE {changes}".encode())
        assert all(sql.startswith("ALTER TABLE") for sql in interrupted(world, *points))


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
    written: list[str] = []

    def write(when: str, sql: str) -> None:
        if (when, sql[:6]) == ("before", "DELETE") and not written:
            written.append(sql)
            with world.sandbox.redshift.connect() as connection:
                begin = "BEGIN ISOLATION LEVEL SERIALIZABLE"
                connection.execute(f"{begin}; {statements}; COMMIT".encode())

    world.sandbox.redshift.hook = write
    (warning,) = world.check(world.run(), "new")
    assert re.search("1023. Serializable isolation violation on table .* trying again", warning)


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
        if phase == "retry":
            answer(handler, 503, Retry_After="100")
        else:
            answer(handler, 200, SAMPLE.read_bytes())

    def uploads(handler: Any) -> None:
        reached.set()
        if phase == "upload":
            over.wait(120)
        handler.forward()

    def copies(_: str, sql: str) -> None:
        if phase == "load" and sql.startswith("COPY"):
            reached.set()

    with contextlib.ExitStack() as stack:
        stack.callback(over.set)
        if phase in ("extract", "retry"):
            sandbox.source.answers = [requested]
        if phase == "connect":
            port = stack.enter_context(Forwarder(sandbox.redshift.port, *[0] * 9).open())
            port.accepted = reached
            sandbox.set_secret(PORT=port.port)
        sandbox.redshift.hook = copies
        faults = [uploads] * (phase in ("stage", "upload"))
        aws = stack.enter_context(FlakyProxy(sandbox.aws, *faults)).url
        process = world.start(patch="", plainly=phase == "start", AWS_ENDPOINT_URL=aws)
        assert phase == "start" or reached.wait(60)
        time.sleep(random.Random(f"{phase} {number}").uniform(0, 0.2))
        process.send_signal(number)
        done = sandbox.finish(process)
    status, says = done.returncode, [rf"^\w+: stopped by {signal.Signals(number).name}$"]
    if number == signal.SIGINT and done.stderr.endswith("KeyboardInterrupt\n"):
        status = -number  # Python's own, with another status while it starts
    if status <= 0:  # before the program handles signals, or after all is done
        assert status in {0, -number}
        done, says = Done([], status, "", ""), []
    else:
        assert number != signal.SIGKILL
        assert status == 128 + number
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


SIGNALLED_WHEN_DONE = """
def rmtree(*arguments, remove=shutil.rmtree, **options):
    Path({!r}).touch()
    os.kill(os.getpid(), signal.SIGTERM)
    remove(*arguments, **options)
shutil.rmtree = rmtree
"""


def test_signal_while_the_temporary_folder_is_removed(world: World) -> None:
    """All is done by then but this, which is done as well."""
    signalled = world.folder / "signalled"
    world.check(world.run(patch=SIGNALLED_WHEN_DONE.format(str(signalled))), "new")
    assert signalled.exists()


# --- the disk ------------------------------------------------------------------------------------


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a file system of some kB, where the machine allows it."""
    with contextlib.ExitStack() as at_end:

        def mount(kilobytes: int) -> Path:
            folder = tmp_path / f"disk{kilobytes}"
            folder.mkdir()
            command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
            if subprocess.run(command, capture_output=True, check=False).returncode:
                pytest.skip("this machine does not let the tests mount a file system")
            at_end.callback(lambda: subprocess.run(["umount", folder], check=True))
            return folder

        yield mount


@pytest.mark.parametrize(
    ("kilobytes", "step"), [(96, "extract"), (104, "transform"), (124, "(transform|stage)")]
)
def test_disk_is_full(
    world: World, tiny_disk: Callable[[int], Path], kilobytes: int, step: str
) -> None:
    """The response has 99 kB, the CSV files of the two tables some 12 kB.

    They may be gone when the response, much of which no table loads, is gzipped to 37 kB.
    """
    first, *others = launches()
    noise = {"noise": random.Random(1).randbytes(20_000).hex()}
    serve(world.sandbox, [first | noise, *others])
    world.temporary = tiny_disk(kilobytes)
    full = f"^{step}: .*No space left on device.* in {re.escape(str(world.temporary))}$"
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
