"""The process in which strangers' SQL runs (helpers/sql.py is its script), as its owner sees it: started, asked, killed when it hangs."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import weakref
from dataclasses import asdict, replace
from pathlib import Path

from helpers import sql
from helpers.sql import Limits, Result, SqlError, check_text, problem

LIMITS = Limits()
START_SECONDS = 30  # the worker starts in 0.05 s; a laptop's virus scanner may add seconds


def run_untrusted(sql: str, path: str | Path, limits: Limits = LIMITS) -> Result:
    """Runs one SELECT in a fresh process (about 0.05 s more); a `Worker` spares that. Raises SqlError."""
    with Worker(path, limits) as worker:
        return worker.run(sql)


class Worker(contextlib.AbstractContextManager):
    """A process that runs one query after another on the database at `path`, killed and replaced when one hangs.

    A context manager. Threads may share one: their queries run in turn. The process starts with the first query. A fork of
    the process that holds it starts one of its own.
    """

    def __init__(self, path: str | Path, limits: Limits = LIMITS):
        self.path, self.limits = Path(path).resolve(), limits
        self._process: subprocess.Popen | None = None
        self._lock = threading.Lock()
        _workers.add(self)

    def run(self, sql: str, seconds: float | None = None) -> Result:
        """Runs one SELECT (`seconds`: with another time limit than the worker's). Raises SqlError, at the latest a second or so after the limit."""
        check_text(sql, self.limits)
        limits = self.limits if seconds is None else replace(self.limits, seconds=seconds, kill_seconds=seconds + 1)
        with self._lock:
            # An end of its own accord isn't told from an end between two queries, by other hands: each query has two goes
            answer = self._run(sql, limits) or self._run(sql, limits)
        if answer is None:
            raise problem("crashed")
        return Result(answer["columns"], [tuple(row) for row in answer["rows"]], answer["truncated"])

    def _run(self, sql: str, limits: Limits) -> dict | None:
        if self._process is None or self._process.poll() is not None:  # none yet, or ended by something else
            self.close()
            self._start()
        return self._ask({"sql": sql, "seconds": limits.seconds}, limits)

    def close(self) -> None:
        """Ends the process; a later `run` starts a new one."""
        process, self._process = self._process, None
        if process:
            process.kill()
            process.communicate()  # waits for it and closes the pipes, whatever is still in them

    def __exit__(self, *_) -> None:
        self.close()

    def __reduce__(self):
        """A copy starts a process of its own. (datasets pickles what a filter's function names, this module and its workers included.)"""
        return Worker, (self.path, self.limits)

    def _let_go(self) -> None:
        """In a fork: the process and its pipes are the parent's alone."""
        process, self._process, self._lock = self._process, None, threading.Lock()
        if process:
            process.returncode = 0  # not this process's child: nothing to wait for
            with open(os.devnull, "r+b") as nothing:  # not closed, as whoever closes the files later would close another's
                for pipe in (process.stdin, process.stdout):
                    os.dup2(nothing.fileno(), pipe.fileno(), inheritable=False)

    def _start(self) -> None:
        # -I -S: no course folder, no site-packages on its path (a .pth there can import torch). A bare environment:
        # tokens and keys are no business of a process that runs what strangers type. PATH: conda's Python on Windows finds
        # its SQLite there.
        keep = ("PATH", "SYSTEMROOT", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", sql.__file__, "--worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in keep if name in os.environ},
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
        )
        try:
            if self._ask({"path": str(self.path), "limits": asdict(self.limits)}, replace(self.limits, kill_seconds=START_SECONDS)) is None:
                raise problem("crashed")
        except SqlError:
            self.close()
            raise

    def _ask(self, message: dict, limits: Limits) -> dict | None:
        """Sends a line, returns the line that comes back; None where the process ended by itself. Raises SqlError."""
        process, late = self._process, threading.Event()

        def stop():
            late.set()
            process.kill()  # which ends the readline below

        timer = threading.Timer(limits.kill_seconds, stop)
        timer.start()
        line = b""
        try:
            with contextlib.suppress(OSError):  # it died before it read the question
                process.stdin.write(json.dumps(message).encode() + b"\n")
                process.stdin.flush()
                line = process.stdout.readline(10 * self.limits.result_bytes)  # JSON writes é as \u00e9
        finally:
            timer.cancel()
            timer.join()  # from here on it can't fire into the next query
            if late.is_set() or not line.endswith(b"\n"):  # or the reader was interrupted, by Ctrl-C
                self.close()
        if not line.endswith(b"\n"):
            if late.is_set():
                raise problem("killed", limits=limits)
            return None
        answer = json.loads(line, object_hook=lambda o: bytes.fromhex(o["hex"]) if "hex" in o else o)
        if "reason" in answer:
            raise SqlError(answer["message"], answer["reason"])
        return answer


_workers: weakref.WeakSet[Worker] = weakref.WeakSet()


def _after_fork() -> None:
    for worker in list(_workers):
        worker._let_go()


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_after_fork)
