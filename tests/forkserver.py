"""Runs the program without starting Python for it: a process that has its packages forks.

Each run is a process of its own, with its own arguments, environment, folder, pipes and signals,
and ends as Python ends. What it does not show is what happens while Python starts and imports, nor
what Python reads then from its environment, such as PYTHONPATH. Other than Python, it can change
something in the program before that runs: a constant, or what a package does.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import boto3

MAIN = Path(__file__).resolve().parent.parent / "sequra_challenge" / "main.py"
INT = struct.Struct("i")
SERVICES = ("s3", "secretsmanager", "sns", "sts")


class Forked:
    """A run, with those parts of Popen's interface that the tests use."""

    def __init__(self, command: list[str], status: socket.socket, out: int, err: int) -> None:
        self.args, self._status = command, status
        self.stdout, self.stderr = (os.fdopen(pipe, encoding="utf-8") for pipe in (out, err))
        self.pid: int = INT.unpack(status.recv(INT.size))[0]
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        if not select.select([self._status], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        # The status stays there, for another thread that waits as well.
        (status,) = INT.unpack(self._status.recv(INT.size, socket.MSG_PEEK))
        self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        with ThreadPoolExecutor(2) as pool, self.stdout, self.stderr:
            out, err = (pool.submit(pipe.read) for pipe in (self.stdout, self.stderr))
            try:
                self.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill()
                raise
            return out.result(), err.result()


class ForkServer:
    """The process that forks; it ends with the context, or with the process that entered it."""

    def __enter__(self) -> Self:
        # Of this kind, because it keeps requests of several threads apart.
        self.socket, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
        kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, __file__],
                env=kept | {"OPENBLAS_NUM_THREADS": "1"},  # a thread would not be in the forks
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
            )
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
        self.process.wait()

    def start(
        self, command: list[str], cwd: Path | None, environment: dict[str, str], patch: str
    ) -> Forked:
        """Starts a run with the arguments of a command line ``python main.py …``."""
        request = json.dumps([command[2:], str(cwd or Path.cwd()), environment, patch])
        ours, status = socket.socketpair()
        (read_out, out), (read_err, err) = os.pipe(), os.pipe()
        with status:
            socket.send_fds(self.socket, [request.encode()], [status.fileno(), out, err])
        os.close(out)
        os.close(err)
        return Forked(command, ours, read_out, read_err)


# --- the process that forks ----------------------------------------------------------------------


def serve() -> Any:
    """Forks for each request and returns, in the fork, what it is to run."""
    control = socket.socket(fileno=os.dup(0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends when nobody can ask any more
    while True:
        request, descriptors, *_ = socket.recv_fds(control, 1 << 20, 3)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG if request else 0)[0]:
                pass
        if not request:
            sys.exit()
        if os.fork() == 0:
            # Who waits for the program, to tell how it ended.
            control.close()
            status, *pipes = descriptors
            program = os.fork()
            if not program:
                os.close(status)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                for number, descriptor in enumerate([os.open(os.devnull, os.O_RDONLY), *pipes]):
                    os.dup2(descriptor, number)
                    os.close(descriptor)
                return json.loads(request)
            for descriptor in pipes:
                os.close(descriptor)
            os.write(status, INT.pack(program))
            os.write(status, INT.pack(os.waitpid(program, 0)[1]))
            os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)


def run() -> None:
    """What ``python main.py`` does, once its packages and their data are read."""
    sys.path[0] = str(MAIN.parent.parent)
    from sequra_challenge import main

    main.import_packages()
    del sys.modules[main.__name__]
    boto3.setup_default_session()
    models = boto3.DEFAULT_SESSION._session.get_component("data_loader")
    models.load_data("endpoints")
    for service, kind in itertools.product(SERVICES, ("service-2", "endpoint-rule-set-1")):
        models.load_service_model(service, kind)
    code = compile(MAIN.read_bytes(), str(MAIN), "exec")
    arguments, folder, environment, patch = serve()
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - a pipe now
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None
    sys.argv = [str(MAIN), *arguments]
    sys.path[0] = str(MAIN.parent)
    program = sys.modules["__main__"] = types.ModuleType("__main__")
    program.__file__ = str(MAIN)
    if patch:
        program.__name__ = "main"  # so that it waits to be told to run
        sys.modules["main"] = program
    try:
        exec(code, program.__dict__)
        exec(patch, program.__dict__)
        sys.exit(program.main())
    except SystemExit as end:
        leave(int(end.code or 0))


def leave(status: int) -> None:
    """Ends as Python does, without its taking all packages apart, which is most of that time."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        status = 120
    os._exit(status)


if __name__ == "__main__":
    run()
