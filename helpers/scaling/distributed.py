"""Training in several processes on this machine's processor: torchrun starts them, gloo carries what they tell each other (DDP, FSDP).

What each process found out about itself is written down and compared: two that are silently one are an error here. What they do: helpers/scaling/process.py.
"""

import contextlib
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from helpers import training
from helpers.files import CourseError, write_whole
from helpers.runtime import ROOT
from helpers.scaling import process, spread
from helpers.scaling.process import Plan

KINDS = {"ddp": "MULTI_CPU", "fsdp": "FSDP"}  # every process has the whole model, or its part; what Accelerate or torch then calls it
LOOPBACK = {"linux": "lo", "darwin": "lo0"}  # gloo's messages stay on this machine


def run(folder: Path, processes: int = 2, plan: Plan | None = None, port: int | None = None, kill: tuple[int, int] | None = None, minutes: float = 20) -> dict:
    """Trains by the plan in so many processes, going on from the folder's last checkpoint; losses of all steps, and what the processes say of themselves.

    `port` is where they meet (None: a free one). `kill`: (process, step): that one is killed once it has done that step, as a lost machine would be.
    CourseError for a batch that can't be shared out, a port in use, a process that died, or fewer processes than were asked for.
    """
    plan, folder = plan or Plan(), Path(folder).resolve()
    if plan.kind not in KINDS:
        raise CourseError(f"Unknown kind {plan.kind!r}: {' or '.join(KINDS)}.")
    spread.split(plan.batch, processes)
    port, text = check_port(port) if port else free_port(), json.dumps(dataclasses.asdict(plan))
    kept = folder / "plan.json"
    if training.last_checkpoint(folder) and not (kept.exists() and kept.read_text(encoding="utf-8") == text):
        raise CourseError(f"{folder.name}/ holds another run's checkpoints, of other settings: take an empty folder.")
    for old in folder.glob("process-*"):
        old.unlink()
    write_whole(kept, text)
    words = ["-m", "helpers.scaling.process", str(folder)]
    if processes > 1:
        words = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_addr", "127.0.0.1", "--master_port", str(port), *words]
    quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": "", "COURSE_PROFILE": "", "COURSE_PROGRESS": "0", "USE_LIBUV": "0"}
    where = {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))), "GLOO_SOCKET_IFNAME": LOOPBACK.get(sys.platform, "")}
    with open(folder / "log.txt", "w", encoding="utf-8") as log:
        environment = {name: value for name, value in (os.environ | quiet | where).items() if value or name in quiet}
        started = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        ended = _watch(started, folder, kill, time.monotonic() + 60 * minutes)
    if ended != 0:
        raise CourseError(_what_ended_it(folder, ended, processes))
    return _together(folder, processes, plan)


def free_port() -> int:
    """A port that no program listens at."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def check_port(port: int) -> int:
    """The port, if processes can meet there; CourseError if a program listens at it, or there is none of that number."""
    with socket.socket() as one:
        try:
            one.bind(("127.0.0.1", port))
        except (OSError, OverflowError):
            raise CourseError(f"Port {port} is in use or can't be had: give another one (port=…), or none, and a free one is taken.") from None
    return port


def _watch(started: subprocess.Popen, folder: Path, kill, until: float) -> int | None:
    """Waits for the end: the exit status, None if it took too long. Whatever comes, no process is left behind."""
    try:
        while started.poll() is None:
            if time.monotonic() > until:
                return None
            if kill and (done := process.said(folder, kill[0])) and done["step"] >= kill[1]:
                os.kill(done["pid"], getattr(signal, "SIGKILL", signal.SIGTERM))
                kill = None
            time.sleep(0.05)
        return started.returncode
    finally:
        if started.poll() is None:
            end(started)


def end(started: subprocess.Popen) -> None:
    """Ends a program and all that it started: asked first, since launchers then end their own, and killed if it won't."""
    import psutil

    with contextlib.suppress(psutil.Error):
        family = psutil.Process(started.pid).children(recursive=True)
        started.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            started.wait(process.PATIENCE)
        for one in family:
            with contextlib.suppress(psutil.Error):
                one.kill()
        psutil.wait_procs(family, timeout=10)  # on a busy machine even a killed one takes its time
    started.kill()
    started.wait()


def _what_ended_it(folder: Path, ended: int | None, processes: int) -> str:
    """The sentence for a run that didn't finish: which process ended first and how, and what is kept."""
    kept = training.last_checkpoint(folder)
    then = f"the checkpoint of step {kept.name.split('-')[1]} is kept: run it again to go on from there" if kept else "there was no checkpoint yet: run it again"
    if ended is None:
        return f"The run took too long and was stopped; {then}."
    log = (folder / "log.txt").read_text(encoding="utf-8", errors="replace")
    if "EADDRINUSE" in log or "address already in use" in log.lower():
        return "Another program took the port before the processes could meet there: run it again."
    told = [said["error"] for rank in range(processes) if (said := process.said(folder, rank)) and said.get("error")]
    root = log[log.rfind("Root Cause") :] if "Root Cause" in log else ""
    dead = re.search(r"rank\s*:\s*(\d+).*?exitcode\s*:\s*(-\d+)", root, re.S)
    if dead:
        return f"Process {dead[1]} of {processes} (they count from 0) was ended by signal {-int(dead[2])}, and torchrun ended the others; {then}."
    return f"{told[0] if told else 'A process ended with an error, which log.txt in the folder shows.'} ({then[0].upper()}{then[1:]}.)"


def _together(folder: Path, processes: int, plan: Plan) -> dict:
    """What all processes said, as one result; CourseError where they weren't as many, or not of the kind, that was asked for."""
    found = [one for rank in range(processes) if (one := process.said(folder, rank))]
    check_really(found, processes, plan.kind)
    whole = {name: found[0][name] for name in ("losses", "type", "backend", "from_step")} | {"processes": len(found)}
    return whole | {"seconds": max(one["seconds"] for one in found)} | {name: [one[name] for one in found] for name in ("parameters", "examples")}


def check_really(said: list[dict], processes: int, kind: str) -> None:
    """CourseError unless there really were so many processes, each knowing of all, spread in the way that was asked for, with the same losses."""
    found = sorted((one["rank"], one["world_size"]) for one in said)
    if found != [(rank, processes) for rank in range(processes)]:
        raise CourseError(f"Asked for {processes} processes, and those that ran say (number, of how many): {found}. A comparison would compare one process with itself.")
    types = {one["type"] for one in said}
    if types != {KINDS[kind] if processes > 1 else "NO"}:
        raise CourseError(f"Asked for {kind} in {processes} processes, and they ran as {', '.join(sorted(types))}.")
    if any(one["losses"] != said[0]["losses"] for one in said):
        raise CourseError("The processes report different losses: they weren't one training.")
