"""SIGTERM and SIGINT while a run trains, saves or evaluates: a checkpoint, exit code 75, and the same end. And SAVE."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from faults.harness import ENVIRONMENT, FLAGS, ROOT, verified_steps, weights

from rorchat.errors import MismatchError
from rorchat.files import folder_lock
from rorchat.training.checkpointing.checkpoint import STAGING


@pytest.mark.parametrize("where", ["forward", "save", "evaluate"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_ends_the_same(bench, whole, where, number):
    out = bench.fresh()
    flags = {"eval_strategy": "steps", "eval_steps": 4} if where == "evaluate" else {}
    done = bench.run(out, {"signal": int(number), "at": 4, "where": where}, **flags)
    assert done.code == 75, done.said
    assert f"{number.name}: a checkpoint is saved" in done.said and "Traceback" not in done.said
    assert verified_steps(out)[0] == 5
    assert bench.run(out, **flags).code == 0
    assert weights(out) == weights(whole)


# Moments: the step that a run is at, None while the moment has not come.


def saving(out: Path) -> int | None:
    return next((int(path.name.partition("-")[2]) for path in (out / STAGING).glob("checkpoint-*")), None)


def evaluating(out: Path) -> int | None:
    """With `LOOKING` the last line is a training step's as long as that step is evaluated."""
    written = (out / "metrics.jsonl").read_text() if (out / "metrics.jsonl").is_file() else ""
    last = json.loads(written.splitlines()[-1]) if written.endswith("\n") else {}
    return last["step"] if "loss" in last and "event" not in last else None


def waited(seconds: float) -> Callable[[Path], int | None]:
    until = time.monotonic() + seconds
    return lambda out: 0 if time.monotonic() > until else None


def interrupt(process: psutil.Process, out: Path, moment: Callable[[Path], int | None], number: int):
    """Sends a signal at a moment, for which the process is frozen, and gives the step and the seconds that it had
    computed until then; None where it ended before."""
    with contextlib.suppress(psutil.NoSuchProcess):
        while process.status() != psutil.STATUS_ZOMBIE:
            if moment(out) is not None:
                process.suspend()
                while process.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):
                    time.sleep(0.001)
                if (step := moment(out)) is not None:
                    process.send_signal(number)
                used = process.cpu_times()
                process.resume()
                if step is not None:
                    return step, used.user + used.system
            time.sleep(0.001)


STEPS = FLAGS["max_steps"]
LOOKING = {"logging_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 1}


def test_sixteen_signals_in_a_save_in_an_evaluation_and_at_any_time_end_in_five_seconds_and_lose_nothing(bench, whole):
    """Each run is interrupted until it ends. Seconds are those that the process computes: the machine may be busy."""
    chance = random.Random(0)
    moments = ["any"] * 8 + ["saving", "evaluating"] * 4
    chance.shuffle(moments)
    runs, slowest = [bench.fresh()], 0.0
    for moment in moments:
        hit = None
        while hit is None:
            if (runs[-1] / "model").exists():
                runs.append(bench.fresh())
            at = {"any": waited(chance.uniform(0.0, 0.5)), "saving": saving, "evaluating": evaluating}[moment]
            process = psutil.Process(bench.server.start(bench.argv(runs[-1], **LOOKING)))
            hit = interrupt(process, runs[-1], at, chance.choice([signal.SIGTERM, signal.SIGINT]))
            code, computed = bench.server.wait(process.pid)
            step, before = hit or (None, computed)
            slowest = max(slowest, computed - before)
            if not step:
                assert code in (0, 75, 130, -signal.SIGTERM, -signal.SIGINT)
            elif step == STEPS:  # there is none after which it could stop
                assert code == 0
            else:
                assert code == 75 and verified_steps(runs[-1])[0] == step + 1
    print(f"{len(moments)} signals, {len(runs)} runs, the slowest exit after {slowest:.2f} s")  # noqa: T201
    assert slowest < 5
    for out in runs:
        assert bench.run(out, **LOOKING).code == 0
        assert weights(out) == weights(whole)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="a process is put on one core")
def test_four_signals_while_a_program_starts_end_it_in_five_seconds_and_lose_nothing(bench, whole):
    """In the imports and in the preparation, of a process of its own."""
    chance, out = random.Random(0), bench.fresh()
    for seconds in (0.5, 1.5, 3.0, 4.5):
        command = [sys.executable, "recipes/pretrain.py", *bench.argv(out, max_steps=8)]
        process = psutil.Popen(
            command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            preexec_fn=lambda: os.sched_setaffinity(0, {max(os.sched_getaffinity(0))}),  # one thread, as `whole`
        )  # fmt: skip
        time.sleep(seconds)
        number, before = chance.choice([signal.SIGTERM, signal.SIGINT]), process.cpu_times()
        process.send_signal(number)
        done, until = (0,), time.monotonic() + 60
        while not done[0] and time.monotonic() < until:
            time.sleep(0.01)
            done = os.wait4(process.pid, os.WNOHANG)
        assert done[0], "it did not end within a minute"
        _, status, used = done
        code = os.waitstatus_to_exitcode(status)
        assert code in (0, 75, 130, -number)
        # 0: a library caught the KeyboardInterrupt of an import, or the run had ended
        assert code == 0 or used.ru_utime + used.ru_stime - before.user - before.system < 5
    assert bench.run(out).code == 0
    assert weights(out) == weights(whole)


def test_a_file_save_in_the_folder_saves_and_goes_away(bench, whole):
    out = bench.fresh()
    done = bench.run(out, {"kill_at": 1, "during": 4}, save_steps=4)
    assert done.code == -9 and verified_steps(out) == []
    (out / "SAVE").touch()
    (out / "run.json").touch()
    done = bench.run(out, {"kill_at": 1, "during": 4}, save_steps=4)
    assert verified_steps(out) == [1] and not (out / "SAVE").exists()


def test_a_folder_that_a_run_holds_is_refused_to_another_with_its_holder(bench):
    out = bench.fresh()
    with folder_lock(out):
        done = bench.run(out)
        assert done.code == 78 and "is in use by process" in done.said and "Traceback" not in done.said
        with pytest.raises(MismatchError, match="in use by process"), folder_lock(out):
            pass
    assert bench.run(out).code == 0  # a lock whose holder is gone is none
