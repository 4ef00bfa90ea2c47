"""A tiny run that can be killed, starved and poisoned a hundred times a minute, and what it must come to."""

import hashlib
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rorchat.training.checkpointing.checkpoint import Checkpoints

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
FLAGS = {
    "sources": ["tinytown=60"], "validation_share": 0.2, "size": "2x2x32", "block_size": 32,
    "per_device_train_batch_size": 2, "global_batch_tokens": 128, "max_steps": 8, "logging_steps": 3,
    "eval_strategy": "no", "save_steps": 2, "optimizer": "muon", "bf16": False,
}  # fmt: skip


class Server:
    """A process that has imported everything, and forks for every run."""

    def __init__(self, logs: Path):
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "fork_server.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=ROOT,
        )  # fmt: skip
        self.logs, self.numbers = logs, itertools.count()

    def run(
        self,
        argv: list[str],
        stage: str = "pretrain",
        fault: dict | None = None,
        dropout: float = 0,
        processes: int = 1,
    ) -> "Done":
        log = self.logs / f"{next(self.numbers)}.log"
        job = {"argv": argv, "stage": stage, "fault": fault, "log": str(log), "dropout": dropout}
        job["processes"] = processes
        self._send(job)
        return Done(self._answer()["code"], log)

    def start(self, argv: list[str]) -> int:
        """A run that somebody sends signals to: its process. Nothing else runs until `wait` has its end."""
        log = self.logs / f"{next(self.numbers)}.log"
        self._send({"argv": argv, "stage": "pretrain", "log": str(log), "signals": True})
        return self._answer()["pid"]

    def wait(self, pid: int) -> tuple[int, float]:
        """(exit code, seconds of computing) of what was started; killed, which is another code, after a minute."""
        if not select.select([self.process.stdout], [], [], 60)[0]:
            os.kill(pid, signal.SIGKILL)
        done = self._answer()
        return done["code"], done["cpu_seconds"]

    def _send(self, job: dict) -> None:
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()

    def _answer(self) -> dict:
        return json.loads(self.process.stdout.readline())


class Done:
    def __init__(self, code: int, log: Path):
        self.code, self.log = code, log

    @property
    def said(self) -> str:
        return self.log.read_text() if self.log.is_file() else ""


class Bench:
    """Runs of one tiny setting; `start` is a folder in which each begins."""

    def __init__(self, server: Server, folder: Path, tokenizer: Path):
        self.server, self.folder, self.tokenizer = server, folder, tokenizer
        self.numbers = itertools.count()

    def argv(self, out: Path, **flags) -> list[str]:
        given = FLAGS | {"tokenizer": str(self.tokenizer), "token_store": str(self.folder / "store")} | flags
        words = []
        for name, value in given.items():
            if value is None:
                continue
            values = value if isinstance(value, list) else [value]
            words += [f"--{name}", *(str(each).lower() if isinstance(each, bool) else str(each) for each in values)]
        return [*words, "--output_dir", str(out)]

    def run(self, out: Path, fault: dict | None = None, dropout: float = 0, stage="pretrain", processes=1, **flags):
        argv = self.argv(out, **flags)
        return self.server.run(argv, stage=stage, fault=fault, dropout=dropout, processes=processes)

    def fresh(self, of: Path | None = None) -> Path:
        """A folder for a run of its own, with a copy of another's."""
        out = self.folder / f"run-{next(self.numbers)}"
        if of:
            shutil.copytree(of, out)
        return out


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def weights(run: Path) -> str:
    return sha256(run / "model" / "model.safetensors")


def verified_steps(run: Path) -> list[int]:
    """The steps of the checkpoints that verify, the newest first."""
    return [each.step for each in Checkpoints(run).committed() if _verifies(each)]


def _verifies(checkpoint) -> bool:
    from rorchat.training.checkpointing.checkpoint import Damaged

    try:
        checkpoint.verify()
        return True
    except Damaged:
        return False


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("logs"))
    yield server
    server.process.stdin.close()
    server.process.wait(timeout=20)


@pytest.fixture(scope="module")
def bench(server, tokenizer, tmp_path_factory) -> Bench:
    folder = tmp_path_factory.mktemp("bench")
    tokenizer.save_pretrained(folder / "tokenizer")
    return Bench(server, folder, folder / "tokenizer")


@pytest.fixture(scope="module")
def whole(bench) -> Path:
    """A run that nothing interrupted."""
    out = bench.fresh()
    done = bench.run(out)
    assert done.code == 0, done.said
    return out


@pytest.fixture(scope="module")
def at_four(bench) -> Path:
    """A run that was killed before its third save, with the checkpoints of steps 2 and 4."""
    out = bench.fresh()
    done = bench.run(out, {"kill_at": 1, "during": 6})
    assert done.code == -9, done.said
    return out
