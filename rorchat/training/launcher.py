"""The process that started this one: a launcher or script that waits for it, or a person, whose jobs outlive the shell.

`accelerate launch` starts a single process and waits for it: a signal that ends the launcher does not reach the
process, which would train on unnoticed. Linux signals a process when its parent ends, if the process asks for it
(`PR_SET_PDEATHSIG`, prctl(2)). This module does not import torch.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

#: The signal that Linux sends when the parent ends. Without a handler, it ends the process. Not SIGTERM: of a launcher
#: that passes SIGTERM on and then ends, it would be the second one, which stops a run at once.
PARENT_ENDED = signal.SIGUSR2
#: Programs and modules of Python that start training processes and wait for them.
LAUNCHERS = {
    "accelerate", "accelerate-launch", "accelerate.commands.launch", "torchrun", "torch.distributed.run",
    "torch.distributed.launch", "deepspeed", "deepspeed.launcher.launch", "rorchat", "rorchat.cli",
}  # fmt: skip
SHELLS = {"sh", "bash", "dash", "ksh", "zsh", "ash"}
LAUNCHER_WORDS = 5  # the name of a launcher is among the first words: `python -u -m torch.distributed.run`
TORCHRUN_ID = "TORCHELASTIC_RUN_ID"  # set for the processes of torchrun, and of Accelerate for several processes
SHUTDOWN_SECONDS = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
USUAL_GRACE = 30.0  # seconds between a signal and the kill: the default of torchrun, Kubernetes and Slurm
_SET_SIGNAL, _GET_SIGNAL = 1, 2  # PR_SET_PDEATHSIG and PR_GET_PDEATHSIG


def find_waiting_parent() -> int | None:
    """The id of the parent process if it is a launcher or a script that waits for this process, else None.

    Jobs of an interactive shell, and those that a script has put into the background, are meant to outlive their
    parent.
    """
    if sys.platform != "linux":
        return None
    parent = os.getppid()
    try:
        words = Path(f"/proc/{parent}/cmdline").read_text(encoding="utf-8", errors="replace").split("\0")
        shares_group = os.getpgid(parent) == os.getpgrp()
    except OSError:  # it has ended, or is outside of this container
        return None
    # getsignal before any handler is installed: the shell of a script starts `command &` with SIGINT ignored
    is_foreground = signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
    return parent if waits_for_children(words, is_script=shares_group and is_foreground) else None


def waits_for_children(words: Sequence[str], *, is_script: bool) -> bool:
    """Whether a program waits for the processes that it starts.

    Args:
        words: its command line.
        is_script: of a shell, whether it runs a script: in which a process stays in the group of its shell. In an
            interactive shell, which controls jobs, every job has a process group of its own.
    """
    if Path(words[0]).name.lstrip("-") in SHELLS:
        return is_script
    return any(Path(word).name in LAUNCHERS for word in words[:LAUNCHER_WORDS])


def follow(parent: int | None) -> None:
    """Lets Linux send PARENT_ENDED to this process when its parent ends; sent at once if that has happened."""
    if parent is None:
        return
    set_parent_signal(PARENT_ENDED)
    if os.getppid() != parent:  # it ended before the call above
        os.kill(os.getpid(), PARENT_ENDED)


def get_parent_signal() -> int:
    """The signal that this process gets when its parent ends; 0 for none."""
    number = ctypes.c_int(0)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_GET_SIGNAL, ctypes.byref(number))
    return number.value


def set_parent_signal(number: int) -> None:
    """Sets the signal that this process gets when its parent ends; 0 for none."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_SIGNAL, number)


def warn_about_deaf_parent(parent: int | None) -> str:
    """A warning if the parent is the first process of a container and ignores SIGTERM, else an empty string.

    The kernel ends all processes of a container with its first one, so that none can save a checkpoint.
    """
    if parent != 1 or catches_sigterm(parent):
        return ""
    return (
        "warning: the first process of this container has started this one and ignores SIGTERM, so a stopped container "
        "loses the steps since the last checkpoint. Start it with `rorchat` itself, or with `exec rorchat` in a script "
        "(docs/reliability.md, In a container)"
    )


def catches_sigterm(process: int) -> bool:
    """Whether a process has a handler for SIGTERM; True if that cannot be read."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return True
    caught = next((line.split()[1] for line in lines if line.startswith("SigCgt:")), "ffffffff")
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


def warn_about_save_time(save_seconds: float, step_seconds: float) -> str:
    """A warning if a process would be killed before it has saved a checkpoint after a signal, else an empty string.

    Args:
        save_seconds: of the last checkpoint.
        step_seconds: of a step, which is completed first.
    """
    has_torchrun = TORCHRUN_ID in os.environ
    grace = float(os.environ.get(SHUTDOWN_SECONDS, USUAL_GRACE)) if has_torchrun else USUAL_GRACE
    needed = save_seconds + step_seconds
    if needed <= grace:
        return ""
    enough = 10 * int(needed / 5 + 1)  # twice as long
    killer, remedy = "torchrun kills a process", f"set {SHUTDOWN_SECONDS}={enough}, or start with `rorchat`, which does"
    if not has_torchrun:
        killer = "Slurm and Kubernetes kill a process (Docker after 10 s)"
        remedy = f"raise KillWait, terminationGracePeriodSeconds or --stop-timeout to {enough} s"
    return (
        f"warning: a checkpoint takes {save_seconds:.0f} s and a step {step_seconds:.0f} s, but {killer} {grace:.0f} s "
        f"after a signal, before the checkpoint is complete: {remedy}"
    )
