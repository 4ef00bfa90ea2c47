"""Two runs compared: their logs, weights and states, to the bit."""

import json
from pathlib import Path

import torch
from transformers.trainer_pt_utils import safe_globals

from rorchat.jsonl import read_json_lines
from rorchat.report import drop_superseded_lines
from rorchat.training.checkpointing.checkpoint import Checkpoints

STEPS = 24
NOT_ALIKE = {
    "seconds", "tokens_per_second", "mfu", "memory_bytes", "peak", "peak_flops", "flops_per_token", "eval_seconds",
    "eval_runtime", "eval_samples_per_second", "eval_steps_per_second",
}  # fmt: skip
RAMP = """\
sources: {town: tinytown=60, self: persona=60}
phases:
  - {share: 40%, weights: {town: 1}}
  - {share: 40%, ramp_to: {self: 1}, replay: 20%}
  - {share: 20%}
"""


def log_of(run) -> list[dict]:
    lines = [line for line in drop_superseded_lines(read_json_lines(run / "metrics.jsonl")) if "event" not in line]
    return [{key: value for key, value in line.items() if key not in NOT_ALIKE} for line in lines]


def state_of(run, steps: int = STEPS) -> dict:
    """Everything in the last checkpoint that a run goes on with."""
    folder = Checkpoints(run).committed()[0].folder
    assert folder.name == f"checkpoint-{steps}"
    with safe_globals():  # numpy's, in the random state
        found = {
            name: torch.load(folder / name, weights_only=True)
            for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")
        }
    return found | {"state": json.loads((folder / "run_state_0.json").read_text())}


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool((a == b).all()) if hasattr(a, "all") else a == b


def flipped(place: float):
    def flip(path: Path) -> None:
        size = path.stat().st_size
        with path.open("r+b") as file:
            file.seek(at := min(int(size * place), size - 1))
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1 << at % 8]))

    return flip
