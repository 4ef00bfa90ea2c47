"""Runs the commands of a project one after the other: `rorchat run FOLDER`."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rorchat.errors import WITHIN_PROJECT, DataError, Interrupted, RorchatError, UsageError
from rorchat.files import folder_lock, to_json, write_atomically
from rorchat.plan.show import format_duration
from rorchat.project_folder import PLAN, RUNS, SCRIPT, measure_progress
from rorchat.training.launcher import PARENT_ENDED, set_parent_signal

TIMES = "times.json"  # in the folder of all runs
STOPPED = {128 + number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}  # before training began
GATE, GATE_FAILED = "gate", 70
AFTER_A_FAILED_GATE = ("report",)  # commands that run all the same: they only describe the model


class StageFailed(RorchatError):
    """A command of the project ended with an error, which it has printed. `times` are those of the commands so far."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code
        self.times: list[StageTime] = []


@dataclass(frozen=True)
class Step:
    """One command of run.sh.

    Attributes:
        words: the command, beginning with "rorchat".
        line: its line in run.sh.
        seconds: planned duration; 0 if it is not in plan.json.
    """

    words: tuple[str, ...]
    line: int
    seconds: float = 0.0

    @property
    def name(self) -> str:
        """The name of the stage: that of its config file, or the command."""
        if "--config" in self.words[:-1]:
            return Path(self.words[self.words.index("--config") + 1]).stem
        return self.words[1]


def read_steps(folder: Path) -> list[Step]:
    """The commands of a project's run.sh.

    A command is a line that begins with `rorchat`; a backslash continues it on the next line. Comments, `set` and `cd`
    are skipped.

    Raises:
        UsageError: the folder has no run.sh, or it has a line of another kind.
    """
    if not folder.is_dir():
        raise UsageError(f"No folder {folder}: give the folder of a project that `rorchat new` has made.")
    script = folder / SCRIPT
    if not script.is_file():
        raise UsageError(f"{folder} has no {SCRIPT}: give the folder of a project that `rorchat new` has made.")
    planned = _read_planned_seconds(folder)
    steps = []
    for number, text in _join_lines(script.read_text(encoding="utf-8")):
        words = shlex.split(text, comments=True)
        if not words or words[0] in ("set", "cd"):
            continue
        if words[0] != "rorchat" or len(words) < 2 or {"|", "||", "&&", ">", "&", ";"} & set(words):
            raise UsageError(
                f"{script}:{number}: `rorchat run` runs only plain commands that begin with rorchat. Run the script "
                f"itself instead: bash {script}"
            )
        step = Step(tuple(words), number)
        steps.append(Step(step.words, number, planned.get(step.name, 0.0)))
    if not steps:
        raise UsageError(f"{script} has no command that begins with rorchat.")
    return steps


def _join_lines(text: str) -> Iterator[tuple[int, str]]:
    """(number of its first line, command) with lines that end in a backslash joined."""
    pending, first = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        first = first or number
        if line.endswith("\\"):
            pending += line[:-1] + " "
            continue
        yield first, pending + line
        pending, first = "", 0
    if pending:
        yield first, pending


def _read_planned_seconds(folder: Path) -> dict[str, float]:
    path = folder / PLAN
    if not path.is_file():
        return {}
    try:
        stages = json.loads(path.read_text(encoding="utf-8"))["stages"]
        return {stage["name"]: float(stage["seconds"]) for stage in stages}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read ({error!r}): delete it to run without planned times.") from None


@dataclass(frozen=True)
class StageTime:
    """How long a stage was planned to take and took, in seconds; of a resumed one, all its starts together."""

    name: str
    planned: float
    seconds: float


class _Times:
    """The time that every stage took, kept in the project's folder so that a resumed stage adds to it."""

    def __init__(self, folder: Path):
        self.runs, self.path = folder / RUNS, folder / RUNS / TIMES
        self.seconds: dict[str, float] = {}
        with contextlib.suppress(OSError, ValueError):
            self.seconds = dict(json.loads(self.path.read_text(encoding="utf-8")))

    def measure(self, name: str, task: Callable[[], int]) -> int:
        """Calls a task, adds its time unless the stage had finished before, and returns its result."""
        progress, started = measure_progress(self.runs / name), time.monotonic()
        result = task()
        if progress < 1 or name not in self.seconds:
            before = self.seconds.get(name, 0.0) if progress else 0.0
            self.seconds[name] = before + time.monotonic() - started
        self.runs.mkdir(exist_ok=True)
        write_atomically(self.path, to_json(self.seconds, indent=2) + "\n")
        return result


def run_project(folder: Path, *, anyway: bool = False, show: Callable[[str], object] = print) -> list[StageTime]:
    """Runs every command of the project, each in a separate process, in the project's folder.

    Training commands resume or, if they have finished, end at once; so a project that was stopped anywhere is resumed
    by running it again.

    Args:
        anyway: continue if the gate fails.
        show: called with each line of progress.

    Raises:
        UsageError: run.sh is missing, or has a line that cannot be run.
        MismatchError: another process runs this project.
        StageFailed: a command failed. It has the exit code of the command.
        Interrupted: a signal stopped a command, which has saved a checkpoint.
    """
    steps = read_steps(folder)
    with folder_lock(folder.absolute()):
        return _run_steps(steps, folder, anyway, show)


def _run_steps(steps: list[Step], folder: Path, anyway: bool, show: Callable[[str], object]) -> list[StageTime]:
    clock, times = _Times(folder), []
    failure: RorchatError | None = None
    for number, step in enumerate(steps, 1):
        if failure and step.name not in AFTER_A_FAILED_GATE:
            continue
        head = f"[{number}/{len(steps)}] {step.name}"
        show(f"{head}: {shlex.join(step.words)}{_format_left(steps[number - 1 :], folder)}")
        code = clock.measure(step.name, partial(run_command, step.words, folder))
        times.append(StageTime(step.name, step.seconds, clock.seconds[step.name]))
        if code and not (anyway and _is_failed_gate(step, code)):
            failure = _failure(step, code, folder)
        if code and not _is_failed_gate(step, code):
            break
        show(f"{head}: {_describe_end(times[-1], failed=bool(code))}")
    if isinstance(failure, StageFailed):
        failure.times = times
    if failure:
        raise failure
    return times


def _is_failed_gate(step: Step, code: int) -> bool:
    return code == GATE_FAILED and step.name == GATE


def _describe_end(stage: StageTime, *, failed: bool) -> str:
    planned = f" (planned: {format_duration(stage.planned / 3600)})" if stage.planned else ""
    return f"{'failed after' if failed else 'done in'} {format_duration(stage.seconds / 3600)}{planned}"


def _format_left(steps: list[Step], folder: Path) -> str:
    """The planned time of the first step, and of all of them, without what an earlier start has done."""
    left = [step.seconds * (1 - measure_progress(folder / RUNS / step.name)) for step in steps]
    if not steps[0].seconds:
        return ""
    first = f"about {format_duration(left[0] / 3600)}" if left[0] else "already finished"
    return f"  ({first}; {format_duration(sum(left) / 3600)} until everything is done)"


def _failure(step: Step, code: int, folder: Path) -> RorchatError:
    again = f"rorchat run {folder}"
    if code == Interrupted.exit_code or code in STOPPED:
        return Interrupted(f"{step.name} was stopped. Resume with: {again}")
    if _is_failed_gate(step, code):
        return StageFailed(
            "The gate failed: the model does not behave well enough to be published, see the error above. More data "
            "or time help, and for the persona more rows of `persona=` in midtrain.yaml and sft.yaml. To continue "
            f"although it failed: {again} --anyway",
            code,
        )
    return StageFailed(f"{step.name} failed with exit code {code}; its error is above. After a fix: {again}", code)


def run_command(words: tuple[str, ...], folder: Path) -> int:
    """Runs a command to its end and returns its exit code. Signals that would stop this process are passed on to it."""
    command = [sys.executable, "-m", "rorchat.cli", *words[1:]]
    environment = os.environ | {WITHIN_PROJECT: "1"}
    # if this process is killed, the command ends too, which would else hold its folder; training saves a checkpoint
    process = subprocess.Popen(
        command, cwd=folder, env=environment, preexec_fn=partial(set_parent_signal, PARENT_ENDED)
    )
    with _forward_signals(process):
        code = process.wait()
    return 128 - code if code < 0 else code


@contextlib.contextmanager
def _forward_signals(process: subprocess.Popen) -> Iterator[None]:
    """Passes SIGTERM and SIGHUP on; Ctrl-C in a terminal reaches the command directly."""

    def forward(number: int, _frame: object) -> None:
        if number != signal.SIGINT or not os.isatty(0):
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)

    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    before = {number: signal.signal(number, forward) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
