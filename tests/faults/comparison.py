"""Bitwise comparison of two runs: logs and checkpoint states. And a bit flip for corruption tests."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from transformers.trainer_pt_utils import safe_globals

from rorchat.jsonl import read_json_lines
from rorchat.reporting.runs import drop_superseded_lines
from rorchat.training.checkpointing.recovery import Checkpoints

#: Metrics that depend on a clock or the machine.
MEASURED = {
    "seconds", "tokens_per_second", "mfu", "memory_bytes", "peak", "peak_flops", "flops_per_token", "eval_seconds",
    "eval_runtime", "eval_samples_per_second", "eval_steps_per_second",
}  # fmt: skip
#: A mixture whose weights change during the run.
RAMP = """\
sources: {town: tinytown=60, self: persona=60}
phases:
  - {share: 40%, weights: {town: 1}}
  - {share: 40%, ramp_to: {self: 1}, replay: 20%}
  - {share: 20%}
"""


def read_log(run: Path) -> list[dict]:
    """Lines of metrics.jsonl without events, without lines that a resume replaced, and without measured values."""
    lines = [line for line in drop_superseded_lines(read_json_lines(run / "metrics.jsonl")) if "event" not in line]
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


def load_state(run: Path, step: int) -> dict:
    """Optimizer, schedule, random states and trainer state of the newest checkpoint, which must be of `step`."""
    folder = Checkpoints(run).committed()[0].folder
    assert folder.name == f"checkpoint-{step}"
    with safe_globals():  # the random state contains NumPy arrays
        state = {
            name: torch.load(folder / name, weights_only=True)
            for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")
        }
    return state | {"run_state": json.loads((folder / "run_state_0.json").read_text(encoding="utf-8"))}


def states_equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(states_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(states_equal, a, b))
    return bool((a == b).all()) if hasattr(a, "all") else a == b


def flip_bit(position: float) -> Callable[[Path], None]:
    """A function that flips one bit of a file; `position` is a share of its size."""

    def flip(path: Path) -> None:
        size = path.stat().st_size
        with path.open("r+b") as file:
            file.seek(offset := min(int(size * position), size - 1))
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 1 << offset % 8]))

    return flip
