"""A process follows its launcher or script, and no other parent. Whole runs are in tests/faults and tests/cli."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import ROOT

from rorchat.training import launcher
from rorchat.training.callbacks import signals
from rorchat.training.launcher import (
    PARENT_ENDED,
    SHUTDOWN_SECONDS,
    TORCHRUN_ID,
    catches_sigterm,
    follow,
    get_parent_signal,
    set_parent_signal,
    waits_for_children,
    warn_about_deaf_parent,
    warn_about_save_time,
)

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
#: Follows its parent, writes "follows" or "alone" to a file, and "ended" when its parent has ended.
CHILD = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from rorchat.training.launcher import PARENT_ENDED, find_waiting_parent, follow
path = Path(sys.argv[1])
signal.signal(PARENT_ENDED, lambda *_: path.write_text("ended") and os._exit(0))
parent = find_waiting_parent()
follow(parent)
path.write_text(f"{{'follows' if parent else 'alone'}} {{os.getpid()}}")
time.sleep(60)
"""
#: A launcher as that of Accelerate for one process: it waits, and passes no signal on.
LAUNCHER = "import subprocess, sys; subprocess.Popen([sys.executable, *sys.argv[1:]]).wait()"


@pytest.mark.parametrize(
    ("command", "is_launcher"),
    [
        ("/env/bin/python /env/bin/accelerate launch --quiet recipes/sft.py", True),
        ("python -m accelerate.commands.launch recipes/sft.py", True),
        ("/usr/bin/python3 -u -m torch.distributed.run --nproc_per_node 2 train.py", True),
        ("python /env/bin/torchrun --standalone recipes/sft.py", True),
        ("/env/bin/python /env/bin/rorchat sft --num_processes 2", True),
        ("python -m rorchat.cli run my-project", True),
        ("python train_all.py", False),
        ("tmux new-session -d", False),
        ("/sbin/init", False),
        ("python -m pytest tests", False),
        ("", False),
    ],
)
def test_launchers_are_known_by_their_command(command, is_launcher):
    assert waits_for_children(command.split(" "), is_script=True) == is_launcher


@pytest.mark.parametrize("shell", ["bash -c", "/bin/sh run.sh", "-bash", "zsh", "/usr/bin/dash run.sh"])
@pytest.mark.parametrize("is_script", [True, False])
def test_a_shell_waits_only_if_it_runs_a_script(shell, is_script):
    assert waits_for_children(shell.split(" "), is_script=is_script) == is_script


def start(kind: str, tmp_path: Path) -> tuple[subprocess.Popen, Path]:
    """A parent of some kind, and the file that its child writes."""
    child, state = tmp_path / "child.py", tmp_path / "state"
    child.write_text(CHILD)
    if kind.startswith("bash"):
        script = f"{sys.executable} {child} {state}" + (" & wait" if kind == "bash &" else "; true")
        return subprocess.Popen(["bash", "-c", script], start_new_session=True), state
    (tmp_path / kind).write_text(LAUNCHER)
    return subprocess.Popen([sys.executable, tmp_path / kind, child, state], start_new_session=True), state


def read_when(state: Path, word: str) -> str:
    deadline = time.monotonic() + 20
    while not (state.is_file() and state.read_text(encoding="utf-8").startswith(word)):
        assert time.monotonic() < deadline, state.read_text(encoding="utf-8") if state.is_file() else "no child"
        time.sleep(0.01)
    return state.read_text(encoding="utf-8")


@linux_only
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("kind", ["accelerate", "torchrun", "bash"])
def test_a_child_notices_the_end_of_a_launcher_that_passes_no_signal_on(kind, number, tmp_path):
    parent, state = start(kind, tmp_path)
    read_when(state, "follows")
    parent.send_signal(number)
    parent.wait()
    read_when(state, "ended")


@linux_only
@pytest.mark.parametrize("kind", ["bash &", "daemon.py"])
def test_a_process_in_the_background_and_that_of_any_program_outlive_their_parent(kind, tmp_path):
    parent, state = start(kind, tmp_path)
    process = int(read_when(state, "alone").split()[1])
    parent.kill()
    parent.wait()
    time.sleep(0.1)
    assert state.read_text().startswith("alone")
    os.kill(process, signal.SIGKILL)  # it still runs


@linux_only
def test_a_parent_that_ended_before_the_request_is_noticed_too(monkeypatch):
    received, before = [], get_parent_signal()
    handler = signal.signal(PARENT_ENDED, lambda number, _: received.append(number))
    try:
        follow(None)
        assert (get_parent_signal(), received) == (before, [])
        follow(os.getppid())
        assert (get_parent_signal(), received) == (PARENT_ENDED, [])
        follow(os.getppid() + 1)
        assert received == [PARENT_ENDED]
    finally:
        set_parent_signal(before)
        signal.signal(PARENT_ENDED, handler)


@linux_only
def test_handled_signals_are_left_as_they_were(monkeypatch):
    monkeypatch.setattr(signals, "find_waiting_parent", os.getppid)
    before = get_parent_signal(), signal.getsignal(PARENT_ENDED)
    with pytest.raises(SystemExit) as stopped, signals.handle_signals():  # noqa: PT012
        assert get_parent_signal() == PARENT_ENDED and signal.getsignal(PARENT_ENDED) != before[1]
        os.kill(os.getpid(), PARENT_ENDED)  # before training
    assert stopped.value.code == 75
    assert (get_parent_signal(), signal.getsignal(PARENT_ENDED)) == before


@pytest.mark.parametrize(
    ("received", "exits"),
    [
        ([signal.SIGTERM, signal.SIGTERM], [143]),
        ([signal.SIGINT, signal.SIGTERM], [143]),
        ([signal.SIGTERM, PARENT_ENDED], []),  # the launcher passed the signal on, and has ended before its processes
        ([PARENT_ENDED, PARENT_ENDED], []),
        ([PARENT_ENDED, signal.SIGTERM], []),  # the first one that somebody has sent
        ([PARENT_ENDED, signal.SIGTERM, signal.SIGTERM], [143]),
    ],
)
def test_the_end_of_a_launcher_is_no_second_signal(received, exits, tmp_path, monkeypatch):
    ended = []
    monkeypatch.setattr(signals, "REPEAT_SECONDS", -1.0)
    monkeypatch.setattr(signals.os, "_exit", ended.append)
    callback = signals.SignalCallback(tmp_path)
    for number in received:
        callback.receive(number)
    assert ended == exits


def test_a_message_that_nobody_can_read_does_not_end_the_run(tmp_path, monkeypatch):
    def fail(*_):
        raise BrokenPipeError

    monkeypatch.setattr(signals.os, "write", fail)
    callback = signals.SignalCallback(tmp_path)
    callback.receive(signal.SIGTERM)
    assert callback.received == signal.SIGTERM


@linux_only
def test_the_first_process_of_a_container_must_catch_sigterm(monkeypatch):
    with subprocess.Popen(["sleep", "60"]) as deaf:
        assert not catches_sigterm(deaf.pid)
        deaf.kill()
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    assert catches_sigterm(os.getpid())
    signal.signal(signal.SIGTERM, before)
    monkeypatch.setattr(launcher, "catches_sigterm", lambda process: False)
    assert "loses the steps since the last checkpoint. Start it with `rorchat`" in warn_about_deaf_parent(1)
    assert warn_about_deaf_parent(77) == warn_about_deaf_parent(None) == ""


@pytest.mark.parametrize(
    ("environment", "seconds", "warning"),
    [
        ({}, (20, 5), ""),
        ({}, (28, 5), "Slurm and Kubernetes kill a process (Docker after 10 s) 30 s after a signal"),
        ({TORCHRUN_ID: "x"}, (28, 5), f"torchrun kills a process 30 s after a signal, .* set {SHUTDOWN_SECONDS}=70"),
        ({TORCHRUN_ID: "x", SHUTDOWN_SECONDS: "600"}, (300, 5), ""),
        ({TORCHRUN_ID: "x", SHUTDOWN_SECONDS: "600"}, (700, 5), "torchrun kills a process 600 s after"),
        ({SHUTDOWN_SECONDS: "600"}, (28, 5), "terminationGracePeriodSeconds or --stop-timeout to 70 s"),
    ],
)
def test_a_save_that_a_launcher_would_interrupt_is_told(environment, seconds, warning, monkeypatch):
    for name in (TORCHRUN_ID, SHUTDOWN_SECONDS):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    told = warn_about_save_time(*seconds)
    assert bool(told) == bool(warning) and all(part in told for part in warning.split(" .* ")), told
