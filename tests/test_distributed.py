"""Several processes on one processor: that there really are as many, that they train as one does, and what is said when one dies."""

import json
import os
import socket
import time

import pytest

from helpers.files import CourseError
from helpers.scaling import distributed
from helpers.scaling import process as worker
from helpers.scaling.process import Plan

SHORT = Plan(layers=2, steps=4, batch=4)
# Two layers of thirty give losses near 8 to 24: equal to a millionth of that
CLOSE = {"rel": 1e-5}


def process(rank: int, world: int = 2, kind: str = "MULTI_CPU", losses=(1.0, 0.5)) -> dict:
    return {"rank": rank, "world_size": world, "type": kind, "losses": list(losses)}


NOT_REALLY = {
    "one ran, though two were asked for": ([process(0, 1, "NO")], 2, "ddp", "compare one process with itself"),
    "two ran, each by itself": ([process(0, 1, "NO"), process(1, 1, "NO")], 2, "ddp", "(0, 1), (1, 1)"),
    "two of the same number": ([process(0), process(0)], 2, "ddp", "(0, 2), (0, 2)"),
    "nobody": ([], 2, "ddp", "(number, of how many): []"),
    "DDP for FSDP, as Accelerate gives on a processor": ([process(0), process(1)], 2, "fsdp", "Asked for fsdp in 2 processes, and they ran as MULTI_CPU"),
    "losses that differ": ([process(0), process(1, losses=(1.0, 0.6))], 2, "ddp", "they weren't one training"),
}


@pytest.mark.parametrize("what", NOT_REALLY)
def test_what_only_looks_like_two_processes_is_an_error(what):
    said, processes, kind, words = NOT_REALLY[what]
    with pytest.raises(CourseError) as error:
        distributed.check_really(said, processes, kind)
    assert words in str(error.value)


def test_two_processes_of_the_kind_asked_for_pass():
    distributed.check_really([process(0), process(1)], 2, "ddp")
    distributed.check_really([process(0, kind="FSDP"), process(1, kind="FSDP")], 2, "fsdp")
    distributed.check_really([process(0, 1, "NO")], 1, "fsdp")


def test_a_port_in_use_is_told_before_anything_starts(tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(CourseError, match=f"Port {port} is in use or can't be had: give another one"):
            distributed.run(tmp_path, port=port)
    assert not list(tmp_path.iterdir())
    assert distributed.check_port(distributed.free_port()) > 1023


@pytest.mark.parametrize("port", [70000, -1])
def test_a_port_that_no_machine_has_is_told(port):
    with pytest.raises(CourseError, match=f"Port {port} is in use or can't be had"):
        distributed.check_port(port)


def test_a_batch_that_cannot_be_shared_out_and_an_unknown_kind_are_told(tmp_path):
    with pytest.raises(CourseError, match="3 GPUs can't share 4 examples a step evenly"):
        distributed.run(tmp_path, 3)
    with pytest.raises(CourseError, match="Unknown kind 'magic': ddp or fsdp"):
        distributed.run(tmp_path, plan=Plan(kind="magic"))
    assert not list(tmp_path.iterdir())


def checkpoint(folder):
    (folder / "checkpoint-2").mkdir()
    (folder / "checkpoint-2" / "trainer_state.json").write_text("{}", encoding="utf-8")
    (folder / "checkpoint-2" / "optimizer.pt").touch()


def test_checkpoints_of_other_settings_are_not_gone_on_with(tmp_path):
    checkpoint(tmp_path)
    (tmp_path / "plan.json").write_text(json.dumps({"batch": 8}), encoding="utf-8")
    with pytest.raises(CourseError, match="holds another run's checkpoints, of other settings: take an empty folder"):
        distributed.run(tmp_path)


TORCHRUN = """
Root Cause (first observed failure):
[0]:
  time      : 2026-11-30_01:00:00
  host      : somewhere
  rank      : 1 (local_rank: 1)
  exitcode  : {} (pid: 4711)
"""
ENDS = {  # log.txt, what process 0 wrote of itself, whether there is a checkpoint, and what is said
    "killed": (TORCHRUN.format(-9), {}, True, "Process 1 of 2 (they count from 0) was ended by signal 9, and torchrun ended the others; the checkpoint of step 2 is kept: run it again"),
    "killed early": (TORCHRUN.format(-9), {"error": "Process 0 stopped with RuntimeError."}, False, "was ended by signal 9, and torchrun ended the others; there was no checkpoint yet"),
    "an error of its own": (TORCHRUN.format(1), {"error": "Process 0 stopped with ValueError."}, True, "Process 0 stopped with ValueError. (The checkpoint of step 2 is kept"),
    "an error that nobody wrote down": ("", {}, False, "A process ended with an error, which log.txt in the folder shows."),
    "the port went to another": ("DistNetworkError: ... EADDRINUSE, message: address already in use", {}, False, "Another program took the port"),
}


@pytest.mark.parametrize("what", ENDS)
def test_how_a_run_ended_is_told_in_a_sentence(what, tmp_path):
    log, said, kept, words = ENDS[what]
    (tmp_path / "log.txt").write_text(log, encoding="utf-8")
    worker.tell(tmp_path, 0, **said)
    if kept:
        checkpoint(tmp_path)
    assert words in distributed._what_ended_it(tmp_path, 1, 2)


def test_a_run_that_hangs_is_ended_with_a_sentence_and_nothing_is_left_behind(tmp_path, monkeypatch):
    """A stand-in for torchrun that writes its number and then waits for ever."""
    waits = f"import json, os, time; json.dump({{'rank': 0, 'pid': os.getpid(), 'step': 0}}, open(r'{tmp_path / 'process-0.json'}', 'w')); time.sleep(600)"
    real = distributed.subprocess.Popen
    monkeypatch.setattr(distributed.subprocess, "Popen", lambda command, **more: real([command[0], "-c", waits], **more))
    start = time.monotonic()
    with pytest.raises(CourseError, match="The run took too long and was stopped; there was no checkpoint yet"):
        distributed.run(tmp_path, minutes=0.05)
    assert time.monotonic() - start < 60
    if (tmp_path / "process-0.json").exists():
        pid = json.loads((tmp_path / "process-0.json").read_text(encoding="utf-8"))["pid"]
        with pytest.raises(OSError):
            os.kill(pid, 0)


def test_labels_cover_the_answer_and_its_end_alone(tokenizer):
    ids, labels, mask = worker.batch_of([{"question": "How many?", "sql": "SELECT 1"}, {"question": "How many flights left JFK in July?", "sql": "SELECT 2"}], tokenizer)
    assert ids.shape == labels.shape == mask.shape and ids.shape[0] == 2
    for row, answer in enumerate(("SELECT 1", "SELECT 2")):
        learnt = labels[row][labels[row] != -100]
        assert tokenizer.decode(learnt).startswith(answer) and tokenizer.convert_tokens_to_ids("<|im_end|>") in learnt.tolist()
    assert mask[0].sum() < mask[1].sum() and (labels[mask == 0] == -100).all()


# ---------------------------------------------------------------- really


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two processes, uninterrupted."""
    return distributed.run(tmp_path_factory.mktemp("two"), 2, SHORT)


@pytest.mark.slow
def test_two_processes_train_as_one_does(two, tmp_path):
    one = distributed.run(tmp_path, 1, SHORT)
    assert (one["processes"], one["type"], one["examples"]) == (1, "NO", [4])
    assert (two["processes"], two["type"], two["backend"], two["examples"]) == (2, "MULTI_CPU", "gloo", [2, 2])
    assert two["losses"] == pytest.approx(one["losses"], **CLOSE) and len(set(one["losses"])) == SHORT.steps


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="a process is killed in another way there")
def test_a_killed_process_ends_the_run_in_a_sentence_and_it_goes_on_from_its_checkpoint(two, tmp_path):
    with pytest.raises(CourseError, match=r"Process 1 of 2 .* was ended by signal 9.*the checkpoint of step 2 is kept"):
        distributed.run(tmp_path, 2, SHORT, kill=(1, 3))
    died = (tmp_path / "process-1.json").stat().st_mtime  # the last that it wrote
    assert time.time() - died < 2 * worker.PATIENCE  # no hang, on a busy machine either
    pids = [json.loads((tmp_path / f"process-{rank}.json").read_text(encoding="utf-8"))["pid"] for rank in range(2)]
    for pid in pids:
        with pytest.raises(OSError):
            os.kill(pid, 0)  # both are gone
    again = distributed.run(tmp_path, 2, SHORT)
    assert again["from_step"] == 2 and again["losses"] == pytest.approx(two["losses"], **CLOSE)


@pytest.mark.slow
def test_fsdp_cuts_the_weights_in_two_and_trains_as_one_process_does(tmp_path):
    plan = Plan(kind="fsdp", layers=2, steps=2, batch=4)
    one, both = (distributed.run(tmp_path / str(n), n, plan) for n in (1, 2))
    assert (both["type"], both["backend"]) == ("FSDP", "gloo") and both["losses"] == pytest.approx(one["losses"], **CLOSE)
    assert one["parameters"] == [35_392_320] and both["parameters"] == [17_696_160] * 2  # a part each; together the whole
    assert one["losses"][1] < one["losses"][0]
