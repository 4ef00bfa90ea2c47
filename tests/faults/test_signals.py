"""SIGTERM, SIGINT and the file SAVE make a run save a checkpoint, wherever it is; a stopped run exits with 75."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from faults.harness import ENVIRONMENT, FLAGS, ROOT, verified_steps, weights_sha256

from rorchat.errors import WITHIN_PROJECT, MismatchError
from rorchat.files import folder_lock
from rorchat.training.callbacks import signals
from rorchat.training.callbacks.signals import SignalCallback
from rorchat.training.checkpointing.checkpoint import STAGING


@pytest.mark.parametrize("where", ["forward", "save", "evaluate"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_a_checkpoint_and_the_run_resumes(sandbox, uninterrupted, where, number):
    out = sandbox.new_folder()
    flags = {"eval_strategy": "steps", "eval_steps": 4} if where == "evaluate" else {}
    result = sandbox.run(out, {"signal": int(number), "at": 4, "where": where}, **flags)
    assert result.code == 75, result.output
    assert f"{number.name}: saving a checkpoint" in result.output and "Traceback" not in result.output
    assert verified_steps(out)[0] == 5
    assert sandbox.run(out, **flags).code == 0
    assert weights_sha256(out) == weights_sha256(uninterrupted)


def test_a_second_ctrl_c_ends_the_step_in_a_notebook_and_not_the_process(tmp_path, monkeypatch):
    monkeypatch.setattr(signals, "REPEAT_SECONDS", -1.0)  # launchers repeat a signal at once
    monkeypatch.setattr(signals, "is_interactive", lambda: True)
    callback = signals.SignalCallback(tmp_path)
    callback.receive(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        callback.receive(signal.SIGINT)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("trains", [True, False])
def test_a_signal_whose_exception_python_ignores_ends_the_run_all_the_same(trains, tmp_path):
    began = False
    with pytest.raises(SystemExit) as ended, signals.handle_signals():  # noqa: PT012
        weakref.finalize(tmp := SignalCallback(tmp_path), signal.raise_signal, signal.SIGINT)
        del tmp  # the handler raises in the finalizer
        if trains:
            SignalCallback(tmp_path).on_train_begin(None, None, None)
            began = True
    assert ended.value.code == 75 and not began and SignalCallback.active is None
    with signals.handle_signals():
        SignalCallback(tmp_path).on_train_begin(None, None, None)  # a later run of the same process


@pytest.mark.parametrize("on_terminal", [True, False])
@pytest.mark.parametrize("within_project", [True, False])
def test_the_notice_of_a_signal_is_one_line_or_replaced_by_the_last_one(
    on_terminal, within_project, tmp_path, monkeypatch
):
    written = []
    monkeypatch.setattr(os, "isatty", lambda stream: on_terminal)
    monkeypatch.setattr(os, "write", lambda stream, content: written.append(content.decode()))
    if within_project:
        monkeypatch.setenv(WITHIN_PROJECT, "1")
    callback = signals.SignalCallback(tmp_path)
    callback.receive(signal.SIGINT)
    callback.on_train_end(None, None, None)
    notice = "SIGINT: saving a checkpoint after this step; send it again to stop at once"
    expected = [notice, "\r\x1b[K"] if on_terminal else [] if within_project else [f"{notice}\n"]
    assert written == expected


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_a_forked_worker_says_nothing_about_a_signal(number, code, capfd):
    with signals.handle_signals():
        if not (worker := os.fork()):
            os.kill(os.getpid(), number)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == code
    assert capfd.readouterr().err == ""


# Each of the following returns the step of a run if it is saving (evaluating, running long enough), or else None.


def saving(out: Path) -> int | None:
    return next((int(path.name.partition("-")[2]) for path in (out / STAGING).glob("checkpoint-*")), None)


def evaluating(out: Path) -> int | None:
    """With EVALUATING, the last line of metrics.jsonl is of a training step while that step is evaluated."""
    log = (out / "metrics.jsonl").read_text() if (out / "metrics.jsonl").is_file() else ""
    last = json.loads(log.splitlines()[-1]) if log.endswith("\n") else {}
    return last["step"] if "loss" in last and "event" not in last else None


def running_for(seconds: float) -> Callable[[Path], int | None]:
    deadline = time.monotonic() + seconds
    return lambda out: 0 if time.monotonic() > deadline else None


def interrupt(process: psutil.Process, out: Path, moment: Callable[[Path], int | None], number: int):
    """Suspend the process at a moment and send it a signal.

    Returns:
        The step and the CPU seconds used until then, or None if the process ended before the moment.
    """
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
EVALUATING = {"logging_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 1}


def test_signals_at_any_moment_end_the_run_in_five_seconds(sandbox, uninterrupted):
    """A run is interrupted again and again until it finishes. CPU seconds count, since the machine may be busy."""
    chance = random.Random(0)
    moments = ["any"] * 5 + ["saving", "evaluating"] * 3
    chance.shuffle(moments)
    runs, slowest = [sandbox.new_folder()], 0.0
    for moment in moments:
        hit = None
        while hit is None:
            if (runs[-1] / "model").exists():
                runs.append(sandbox.new_folder())
            at = {"any": running_for(chance.uniform(0.0, 0.5)), "saving": saving, "evaluating": evaluating}[moment]
            process = psutil.Process(sandbox.server.start(sandbox.argv(runs[-1], **EVALUATING)))
            hit = interrupt(process, runs[-1], at, chance.choice([signal.SIGTERM, signal.SIGINT]))
            code, computed = sandbox.server.wait(process.pid)
            step, before = hit or (None, computed)
            slowest = max(slowest, computed - before)
            if not step:
                assert code in (0, 75, 130, -signal.SIGTERM, -signal.SIGINT)
            elif step == STEPS:  # the last step: there is nothing left to stop
                assert code == 0
            else:
                assert code == 75 and verified_steps(runs[-1])[0] == step + 1
    print(f"{len(moments)} signals, {len(runs)} runs, the slowest exit after {slowest:.2f} s")  # noqa: T201
    assert slowest < 5
    for out in runs:
        assert sandbox.run(out, **EVALUATING).code == 0
        assert weights_sha256(out) == weights_sha256(uninterrupted)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux signals the end of a parent")
@pytest.mark.parametrize(("moment", "processes"), [("training", 1), ("saving", 1), ("training", 2)])
def test_the_end_of_a_launcher_saves_a_checkpoint_and_the_run_resumes(sandbox, moment, processes):
    out, flags = sandbox.new_folder(), {"max_steps": 100_000, "lr_scheduler_type": "constant", "save_steps": 5}
    launcher, log = sandbox.server.start_launcher(sandbox.argv(out, **flags), processes=processes)
    deadline = time.monotonic() + 60
    while not (saving(out) if moment == "saving" else (out / "metrics.jsonl").is_file()):
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.001)
    os.kill(launcher, signal.SIGKILL)
    assert sandbox.server.wait_for_orphans() == [75] * processes, log.read_text()
    assert log.read_text().count("the process that started this one has ended: saving a checkpoint") == processes
    (step, *_) = verified_steps(out)
    assert f"Stopped at step {step}, which is saved" in log.read_text()
    result = sandbox.run(out, {"signal": int(signal.SIGTERM), "at": step + 1, "where": "forward"}, **flags)
    assert result.code == 75 and verified_steps(out)[0] == step + 2, result.output


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="a process is put on one core")
def test_signals_during_the_start_end_the_program_in_five_seconds(sandbox, uninterrupted):
    """During imports and preparation, in a subprocess."""
    chance, out = random.Random(0), sandbox.new_folder()
    for seconds in (0.5, 2.0, 4.0):
        command = [sys.executable, "recipes/pretrain.py", *sandbox.argv(out, max_steps=8)]
        process = psutil.Popen(
            command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            preexec_fn=lambda: os.sched_setaffinity(0, {max(os.sched_getaffinity(0))}),  # hence one thread
        )  # fmt: skip
        time.sleep(seconds)
        number, before = chance.choice([signal.SIGTERM, signal.SIGINT]), process.cpu_times()
        process.send_signal(number)
        result, until = (0,), time.monotonic() + 60
        while not result[0] and time.monotonic() < until:
            time.sleep(0.01)
            result = os.wait4(process.pid, os.WNOHANG)
        assert result[0], "it did not end within a minute"
        _, status, used = result
        code = os.waitstatus_to_exitcode(status)
        assert code in (0, 75, 130, -number)
        # 0: a library caught the KeyboardInterrupt during an import, or the run had finished
        assert code == 0 or used.ru_utime + used.ru_stime - before.user - before.system < 5
    assert sandbox.run(out).code == 0
    assert weights_sha256(out) == weights_sha256(uninterrupted)


def test_the_file_save_requests_a_checkpoint_and_is_removed(sandbox, uninterrupted):
    out = sandbox.new_folder()
    result = sandbox.run(out, {"kill_at": 1, "during": 4}, save_steps=4)
    assert result.code == -9 and verified_steps(out) == []
    (out / "SAVE").touch()
    (out / "run.json").touch()
    result = sandbox.run(out, {"kill_at": 1, "during": 4}, save_steps=4)
    assert verified_steps(out) == [1] and not (out / "SAVE").exists()


def test_a_folder_in_use_is_refused_with_the_process_that_uses_it(sandbox):
    out = sandbox.new_folder()
    with folder_lock(out):
        result = sandbox.run(out)
        assert result.code == 78 and "is in use by process" in result.output and "Traceback" not in result.output
        with pytest.raises(MismatchError, match="in use by process"), folder_lock(out):
            pass
    assert sandbox.run(out).code == 0  # the lock was released
