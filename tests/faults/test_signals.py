"""SIGTERM and SIGINT while a run trains, saves or evaluates: a checkpoint, exit code 75, and the same end. And SAVE."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from faults.harness import ENVIRONMENT, ROOT, verified_steps, weights

from rorchat.errors import MismatchError
from rorchat.lock import alone


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


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="a process is put on one core")
def test_signals_at_random_times_end_within_five_seconds_and_lose_nothing(bench, whole):
    """From outside, at times that nobody chose: in the imports, in preparation, in training, in a save."""
    chance = random.Random(0)
    for _ in range(6):
        out = bench.fresh()
        code = None
        for _ in range(3):
            process = subprocess.Popen(
                [sys.executable, "recipes/pretrain.py", *bench.argv(out, max_steps=8)],
                cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                preexec_fn=lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}),  # one thread, as `whole`
            )  # fmt: skip
            time.sleep(chance.uniform(1, 9))
            process.send_signal(chance.choice([signal.SIGTERM, signal.SIGINT]))
            sent = time.monotonic()
            code = process.wait(timeout=30)
            assert time.monotonic() - sent < 5
            assert code in (0, 75, 130, -signal.SIGTERM, -signal.SIGINT)
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
    with alone(out):
        done = bench.run(out)
        assert done.code == 78 and "is in use by process" in done.said and "Traceback" not in done.said
        with pytest.raises(MismatchError, match="in use by process"), alone(out):
            pass
    assert bench.run(out).code == 0  # a lock whose holder is gone is none
