"""A tiny training run that can be interrupted and damaged about a hundred times a minute, and helpers to inspect it.

``sandbox.run`` runs a recipe in a fork of a process that has already imported everything (fork_server.py, which also
lists the faults). All runs share the settings in FLAGS: 8 steps of 4 rows of 32 tokens, a checkpoint every 2 steps.
"""

import errno
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

import preloaded
import pytest

from rorchat.files import file_sha256
from rorchat.training.checkpointing.checkpoint import STAGING, TRASH, DamagedCheckpoint
from rorchat.training.checkpointing.recovery import Checkpoints

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
FLAGS = {
    "sources": ["tinytown=60"], "validation_share": 0.2, "size": "2x2x32", "block_size": 32,
    "per_device_train_batch_size": 2, "global_batch_tokens": 128, "max_steps": 8, "logging_steps": 3,
    "eval_strategy": "no", "save_steps": 2, "optimizer": "muon", "bf16": False,
}  # fmt: skip


@dataclass(frozen=True)
class Result:
    """Exit code of a run (minus the signal that killed it) and the file with its stdout and stderr."""

    code: int
    log: Path

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8") if self.log.is_file() else ""


class ForkServer:
    """A process that has imported torch and the recipes once and forks for every run."""

    def __init__(self, logs: Path):
        self.process = subprocess.Popen(
            [preloaded.client("python"), str(HERE / "fork_server.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=ROOT,
        )  # fmt: skip
        self.logs, self.numbers = logs, itertools.count()

    def run(self, argv: list[str], **job: object) -> Result:
        """Run a recipe to its end; `job` holds the keys that fork_server.py documents."""
        log = self._send(argv, **job)
        return Result(self._receive()["code"], log)

    def start(self, argv: list[str]) -> int:
        """Start pretraining and return its process id, for tests that send signals. Call `wait` before the next run."""
        self._send(argv, signals=True)
        return self._receive()["pid"]

    def start_launcher(self, argv: list[str], **job: object) -> tuple[int, Path]:
        """Start pretraining below a launcher; return its id and the log. Kill it, then call `wait_for_orphans`."""
        log = self._send(argv, launcher=True, **job)
        return self._receive()["pid"], log

    def wait_for_orphans(self) -> list[int]:
        """Return the exit codes of the ranks of a launcher that was killed."""
        assert select.select([self.process.stdout], [], [], 60)[0], "the ranks still run"
        return self._receive()["codes"]

    def wait(self, pid: int) -> tuple[int, float]:
        """Return exit code and CPU seconds of the started run, which is killed after a minute."""
        if not select.select([self.process.stdout], [], [], 60)[0]:
            os.kill(pid, signal.SIGKILL)
        answer = self._receive()
        return answer["code"], answer["cpu_seconds"]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=20)

    def _send(self, argv: list[str], **job: object) -> Path:
        log = self.logs / f"{next(self.numbers)}.log"
        self.process.stdin.write(json.dumps({"argv": argv, "log": str(log), **job}) + "\n")
        self.process.stdin.flush()
        return log

    def _receive(self) -> dict:
        return json.loads(self.process.stdout.readline())


class Sandbox:
    """Runs recipes with FLAGS in one temporary folder; all runs share a tokenizer and a token store."""

    def __init__(self, server: ForkServer, folder: Path, tokenizer: Path):
        self.server, self.folder, self.tokenizer = server, folder, tokenizer
        self.store = folder / "store"
        self.numbers = itertools.count()

    def argv(self, out: Path, **flags: object) -> list[str]:
        """Command line of a run; a flag that is None is left out, a list is several values."""
        flags = FLAGS | {"tokenizer": self.tokenizer, "token_store": self.store} | flags | {"output_dir": out}
        argv = []
        for name, value in flags.items():
            values = value if isinstance(value, list) else [value]
            if value is not None:
                argv += [f"--{name}", *(str(v).lower() if isinstance(v, bool) else str(v) for v in values)]
        return argv

    def run(
        self, out: Path, fault: dict | None = None, dropout: float = 0, stage: str = "pretrain", processes: int = 1,
        **flags: object,
    ) -> Result:  # fmt: skip
        """Run the recipe of `stage` to its end in the folder `out`."""
        argv = self.argv(out, **flags)
        return self.server.run(argv, stage=stage, fault=fault, dropout=dropout, processes=processes)

    def new_folder(self, copy_of: Path | None = None) -> Path:
        """Path of a folder that no run has used yet; it exists only if it is a copy."""
        out = self.folder / f"run-{next(self.numbers)}"
        if copy_of:
            shutil.copytree(copy_of, out)
        return out

    def operations(self, out: Path, fault: dict, **options: object) -> list[str]:
        """File operations during a save or a copy (see fork_server.py), of a run in `out` that must succeed."""
        path = self.folder / "operations.json"
        path.unlink(missing_ok=True)
        result = self.run(out, fault | {"count": str(path)}, **options)
        assert result.code == 0, result.output
        return json.loads(path.read_text(encoding="utf-8"))


def weights_sha256(run: Path) -> str:
    return file_sha256(run / "model" / "model.safetensors")


def verified_steps(run: Path) -> list[int]:
    """Steps of the intact checkpoints, newest first."""
    return [checkpoint.step for checkpoint in Checkpoints(run).committed() if _is_intact(checkpoint)]


def _is_intact(checkpoint) -> bool:
    try:
        checkpoint.verify()
    except DamagedCheckpoint:
        return False
    return True


def kill_during_save(
    sandbox: Sandbox,
    start: Path,
    expected: Path,
    every: int = 1,
    only: tuple[str, ...] = (),
    processes: int = 1,
    **fault,
) -> dict[str, str]:
    """Kill copies of the run `start` during the save of step 6, which also removes a checkpoint, and resume them.

    After each kill, the newest intact checkpoint must be of step 4 or 6, and the resumed run must end with the weights
    of the run `expected`.

    Args:
        every: Kill at every n-th file operation of the save.
        only: Names of the operations at which to kill; all by default.

    Returns:
        What is wrong, by operation.
    """
    fault["during"] = 6
    operations = sandbox.operations(sandbox.new_folder(start), fault, processes=processes)
    print(f"{len(operations)} operations", *operations, sep="\n")  # noqa: T201
    chosen = [(n, name) for n, name in enumerate(operations, 1) if not only or name.split()[0] in only][::every]
    assert chosen
    wrong = {}
    for number, operation in chosen:
        out = sandbox.new_folder(start)
        killed = sandbox.run(out, fault | {"kill_at": number}, processes=processes)
        newest = max(verified_steps(out), default=0)
        resumed = sandbox.run(out, {key: fault[key] for key in fault if key == "no_rename"}, processes=processes)
        was_killed = killed.code == -signal.SIGKILL if processes == 1 else killed.code != 0
        if not was_killed or newest not in (4, 6) or resumed.code or weights_sha256(out) != weights_sha256(expected):
            wrong[f"{number} {operation}"] = f"{killed.code}, step {newest}, {resumed.code}: {resumed.output}"
        shutil.rmtree(out)
    return wrong


def leftovers(run: Path) -> list[str]:
    return [path.name for path in run.iterdir() if path.name.startswith((STAGING, TRASH))]


def fail_in_turn(sandbox: Sandbox, operations: list[str], every: int, fault: dict, **flags) -> dict[str, object]:
    """Train a run in which every second save (or copy to the mirror) fails, each at another file operation.

    The run must end as one without failures, and the folder must have an intact checkpoint of that step or of the one
    before after each failure, and of the last step at the end.

    Args:
        operations: those of one save or copy; the run fails at every n-th.
        fault: {"during": None} or {"mirroring": None}.

    Returns:
        What is wrong, by operation.
    """
    numbers = range(1, len(operations) + 1)[::every]
    steps, copies = 4 + 2 * len(numbers), sandbox.new_folder()
    expected, out = sandbox.new_folder(), sandbox.new_folder()
    result = sandbox.run(expected, max_steps=steps, save_strategy="no", save_steps=None)
    assert result.code == 0, result.output
    fault = fault | {"fail_in_turn": [*numbers], "copies": str(copies), "errno": errno.ENOSPC}
    result = sandbox.run(out, fault, max_steps=steps, save_steps=1, **flags)
    assert result.code == 0, result.output
    assert weights_sha256(out) == weights_sha256(expected)
    target = flags.get("mirror", out)
    assert verified_steps(target)[0] == steps and not leftovers(target)
    wrong = {}
    for step, number in zip(range(5, steps, 2), numbers, strict=True):
        newest = max(verified_steps(copies / str(step)), default=0) if (copies / str(step)).is_dir() else "no failure"
        if newest not in (step - 1, step):
            wrong[f"{number} {operations[number - 1]}"] = newest
    return wrong


def snapshot_operations(sandbox: Sandbox, out: Path, fault: dict, **flags: object) -> list[tuple[str, Path]]:
    """The states in which a SIGKILL at some file operation can leave a folder, as copies that one run makes.

    Args:
        out: A run that stopped after step 4; it is resumed.
        fault: {"during": 6} for states of the run's folder, {"mirroring": 6} for those of the mirror.

    Returns:
        (the first operation before which the folder is in that state, the copy, named after the operation's number)
    """
    copies = sandbox.new_folder()
    operations = sandbox.operations(out, fault | {"snapshots": str(copies)}, **flags)
    states, before = [], None
    for number, operation in enumerate(operations, 1):
        files = read_files(copies / str(number))
        if files != before:
            states.append((operation, copies / str(number)))
        before = files
    return states


def read_files(folder: Path) -> dict[str, bytes | None]:
    """Content by path; None for a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory):
    server = ForkServer(tmp_path_factory.mktemp("logs"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def sandbox(fork_server, tokenizer, tmp_path_factory) -> Sandbox:
    folder = tmp_path_factory.mktemp("sandbox")
    tokenizer.save_pretrained(folder / "tokenizer")
    return Sandbox(fork_server, folder, folder / "tokenizer")


@pytest.fixture(scope="session")
def uninterrupted(sandbox) -> Path:
    """A finished run with checkpoints of steps 6 and 8. Shared by all tests: copy it before you change it."""
    out = sandbox.new_folder()
    result = sandbox.run(out)
    assert result.code == 0, result.output
    return out


@pytest.fixture(scope="session")
def stopped_at_4(sandbox) -> Path:
    """A run killed before its third save, with checkpoints of steps 2 and 4. Copy it before you change it."""
    out = sandbox.new_folder()
    result = sandbox.run(out, {"kill_at": 1, "during": 6})
    assert result.code == -9, result.output
    assert verified_steps(out) == [4, 2]
    return out


@pytest.fixture(scope="session")
def chat_base(sandbox) -> Path:
    """A pretrained model with 256 positions that has seen conversations, as SFT and DPO require."""
    out = sandbox.new_folder()
    sources = ["tinytown=60", "persona=60"]
    result = sandbox.run(out, block_size=256, max_steps=2, global_batch_tokens=512, sources=sources)
    assert result.code == 0, result.output
    return out
