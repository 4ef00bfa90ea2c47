"""SIGTERM and SIGINT while a run trains, saves or evaluates: a checkpoint, exit code 75, and the same end. And SAVE."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from faults.harness import ENVIRONMENT, FLAGS, ROOT, verified_steps, weights

from rorchat.errors import MismatchError
from rorchat.lock import alone
from rorchat.training.checkpoint import STAGING


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


def interrupt(process: subprocess.Popen, out: Path, moment: Callable[[Path], int | None], number: int) -> int | None:
    """Sends a signal at a moment, for which the process is frozen, and gives the step; None where it ended before."""
    while process.poll() is None:
        if moment(out) is not None:
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            if (step := moment(out)) is not None:
                process.send_signal(number)
            process.send_signal(signal.SIGCONT)
            if step is not None:
                return step
        time.sleep(0.002)
    return None


STEPS = FLAGS["max_steps"]
LOOKING = {"logging_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 1}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="a process is put on one core")
def test_twenty_signals_at_random_end_within_five_seconds_and_lose_nothing(bench, whole):
    """From outside: twelve at any time, in the imports, in preparation, in training; four in a save, four in an
    evaluation. Each run is interrupted until it ends."""
    chance = random.Random(0)
    moments = ["any"] * 12 + ["saving", "evaluating"] * 4
    chance.shuffle(moments)
    runs, slowest = [bench.fresh()], 0.0
    for moment in moments:
        step = None
        while step is None:
            if (runs[-1] / "model").exists():
                runs.append(bench.fresh())
            at = {"any": waited(chance.uniform(0.5, 9)), "saving": saving, "evaluating": evaluating}[moment]
            process = subprocess.Popen(
                [sys.executable, "recipes/pretrain.py", *bench.argv(runs[-1], **LOOKING)],
                cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                preexec_fn=lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}),  # one thread, as `whole`
            )  # fmt: skip
            step = interrupt(process, runs[-1], at, chance.choice([signal.SIGTERM, signal.SIGINT]))
            begun = time.monotonic()
            code = process.wait(timeout=30)
            slowest = max(slowest, time.monotonic() - begun)
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
    with alone(out):
        done = bench.run(out)
        assert done.code == 78 and "is in use by process" in done.said and "Traceback" not in done.said
        with pytest.raises(MismatchError, match="in use by process"), alone(out):
            pass
    assert bench.run(out).code == 0  # a lock whose holder is gone is none
