"""Measures the cost of checkpoints: 124M parameters, with a checkpoint every 50 steps and without.

    python scripts/bench/checkpoint.py [STEPS]

Both runs are `recipes/pretrain.py` in separate processes, with AdamW, 4 x 512 tokens per step, a vocabulary as large as
that of GPT-2, and the texts of Tinytown. They alternate step by step, so that a slow machine slows both. 50 steps take
about 12 minutes on two cores, 12 GB of memory and 5 GB of disk. A turn is a step and, if one is due, its checkpoint.
"""

import json
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from material import make_tokenizer
from works import WORKS

from rorchat.training.checkpointing.recovery import Checkpoints

ROOT = Path(__file__).parents[2]
EVERY = 50


def train(folder: str, name: str, steps: int, *flags: str) -> None:
    """Run the recipe in this process, waiting for a line on stdin before each step, and write the seconds to a file."""
    from transformers import TrainerCallback

    from rorchat.training.checkpointing.trainer_mixin import CheckpointMixin
    from rorchat.training.stage import StageTrainer

    seconds = {"saves": [], "turns": []}

    class Turns(TrainerCallback):
        turn_start = None

        def end(self):
            if self.turn_start is not None:
                seconds["turns"].append(time.perf_counter() - self.turn_start)
            print("done", flush=True)

        def on_step_begin(self, args, state, control, **kwargs):
            self.end()
            sys.stdin.readline()
            self.turn_start = time.perf_counter()

        def on_train_end(self, args, state, control, **kwargs):
            self.end()
            sys.stdin.readline()  # saving the model would slow down the last step of the other run

    save, begin = CheckpointMixin._save_checkpoint, StageTrainer.__init__

    def timed(trainer, *arguments) -> None:
        started = time.perf_counter()
        save(trainer, *arguments)
        seconds["saves"].append(time.perf_counter() - started)

    def clocked(trainer, *arguments, **options) -> None:
        begin(trainer, *arguments, **options)
        trainer.add_callback(Turns())

    CheckpointMixin._save_checkpoint, StageTrainer.__init__ = timed, clocked
    argv = ["--sources", "tinytown=20000", "--tokenizer", f"{folder}/tokenizer", "--token_store", f"{folder}/tokens"]
    argv += ["--size", "124m", "--block_size", "512", "--per_device_train_batch_size", "4", "--eval_strategy", "no"]
    argv += ["--global_batch_tokens", "2048", "--max_steps", str(steps), "--optimizer", "adamw", *flags]
    runpy.run_path(str(ROOT / "recipes" / "pretrain.py"))["main"]([*argv, "--output_dir", f"{folder}/{name}"])
    Path(folder, f"{name}.json").write_text(json.dumps(seconds), encoding="utf-8")


def take_turns(runs: list[subprocess.Popen], steps: int) -> None:
    """Let the runs, which wait for their first turn, step alternately."""
    for _ in range(steps):
        for run in runs:
            run.stdin.write("step\n")
            run.stdin.flush()
            _await_turn(run)


def _await_turn(run: subprocess.Popen) -> None:
    for line in run.stdout:
        if line.strip() == "done":
            return
    raise SystemExit(f"A run ended with exit code {run.wait()} before its last step.")


def main(steps: int) -> None:
    sides = {"without": ["--save_strategy", "no"], "with": ["--save_steps", str(EVERY)]}
    with tempfile.TemporaryDirectory() as folder:
        make_tokenizer(WORKS["124m"]).save_pretrained(f"{folder}/tokenizer")
        command = [sys.executable, __file__, folder]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
        runs = []
        for name, flags in sides.items():  # the second run uses the token store of the first
            runs.append(subprocess.Popen([*command, name, str(steps), *flags], **pipes))
            _await_turn(runs[-1])
        take_turns(runs, steps)
        for run in runs:
            run.communicate()
        seconds = {name: json.loads(Path(folder, f"{name}.json").read_text(encoding="utf-8")) for name in sides}
        newest = Checkpoints(f"{folder}/with").committed()[0]
        started = time.perf_counter()
        newest.verify()
        verified = time.perf_counter() - started
    show(seconds, steps, newest.bytes, verified)


def show(seconds: dict[str, dict], steps: int, size: int, verified: float) -> None:
    totals = {name: sum(side["turns"]) for name, side in seconds.items()}
    for name, side in seconds.items():
        print(f"{name:8} {totals[name]:7.1f} s, {statistics.median(side['turns']):.2f} s per step (median of {steps})")
    saves = seconds["with"]["saves"]
    print(f"{100 * (totals['with'] / totals['without'] - 1):+.1f} % for {len(saves)} checkpoints", end=" ")
    print(f"of {size / 1e9:.2f} GB, {statistics.median(saves):.1f} s each", end=" ")
    print(f"and {100 * sum(saves) / totals['without']:.1f} % in all; verified in {verified:.1f} s")


if __name__ == "__main__":
    if len(sys.argv) > 2:
        train(sys.argv[1], sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
    else:
        main(int(sys.argv[1]) if len(sys.argv) == 2 else EVERY)
