"""What checkpoints cost: a training of 124M parameters without any, and the same one with one every 50 steps.

    python scripts/bench/checkpoint.py [STEPS]

Each is `recipes/pretrain.py` in a process of its own, with AdamW and 4 x 512 tokens a step, of a tokenizer as large as
GPT-2's and of Tinytown's texts. The two take turns, step by step, so that a machine that slows down slows both: some
twelve minutes for 50 steps on two cores, 12 GB of memory and 5 GB of disk. A turn is a step and, where one is due, its
checkpoint, until it is on the disk.
"""

import json
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from material import tokenizer_of
from works import WORKS

from rorchat.training.checkpointing.checkpoint import Checkpoints

ROOT = Path(__file__).parents[2]
EVERY = 50


def train(folder: str, name: str, steps: int, *flags: str) -> None:
    """One run in this process, which waits for a line on stdin before each step; what it took goes to a file."""
    from transformers import TrainerCallback

    from rorchat.training.checkpointing.trainer_mixin import CheckpointMixin
    from rorchat.training.stage import StageTrainer

    found = {"saves": [], "turns": []}

    class Turns(TrainerCallback):
        began = None

        def end(self):
            if self.began is not None:
                found["turns"].append(time.perf_counter() - self.began)
            print("done", flush=True)

        def on_step_begin(self, args, state, control, **kwargs):
            self.end()
            sys.stdin.readline()
            self.began = time.perf_counter()

        def on_train_end(self, args, state, control, **kwargs):
            self.end()
            sys.stdin.readline()  # what comes then would slow down the other's last step

    save, begin = CheckpointMixin._save_checkpoint, StageTrainer.begin_stage

    def timed(trainer, *arguments) -> None:
        started = time.perf_counter()
        save(trainer, *arguments)
        found["saves"].append(time.perf_counter() - started)

    def clocked(trainer, *arguments, **options) -> None:
        begin(trainer, *arguments, **options)
        trainer.add_callback(Turns())

    CheckpointMixin._save_checkpoint, StageTrainer.begin_stage = timed, clocked
    argv = ["--sources", "tinytown=20000", "--tokenizer", f"{folder}/tokenizer", "--token_store", f"{folder}/tokens"]
    argv += ["--size", "124m", "--block_size", "512", "--per_device_train_batch_size", "4", "--eval_strategy", "no"]
    argv += ["--global_batch_tokens", "2048", "--max_steps", str(steps), "--optimizer", "adamw", *flags]
    runpy.run_path(str(ROOT / "recipes" / "pretrain.py"))["main"]([*argv, "--output_dir", f"{folder}/{name}"])
    Path(folder, f"{name}.json").write_text(json.dumps(found))


def take_turns(runs: list[subprocess.Popen], steps: int) -> None:
    """Lets the runs step one after the other, from where each waits for its first turn."""
    for _ in range(steps):
        for run in runs:
            run.stdin.write("step\n")
            run.stdin.flush()
            _await_turn(run)


def _await_turn(run: subprocess.Popen) -> None:
    for line in run.stdout:
        if line.strip() == "done":
            return
    raise SystemExit(f"a run ended with {run.wait()} before its last step")


def main(steps: int) -> None:
    sides = {"without": ["--save_strategy", "no"], "with": ["--save_steps", str(EVERY)]}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer_of(WORKS["124m"]).save_pretrained(f"{folder}/tokenizer")
        command = [sys.executable, __file__, folder]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
        runs = []
        for name, flags in sides.items():  # the second one finds the token store of the first
            runs.append(subprocess.Popen([*command, name, str(steps), *flags], **pipes))
            _await_turn(runs[-1])
        take_turns(runs, steps)
        for run in runs:
            run.communicate()
        found = {name: json.loads(Path(folder, f"{name}.json").read_text()) for name in sides}
        newest = Checkpoints(f"{folder}/with").committed()[0]
        started = time.perf_counter()
        newest.verify()
        verified = time.perf_counter() - started
    show(found, steps, newest.bytes, verified)


def show(found: dict[str, dict], steps: int, size: int, verified: float) -> None:
    totals = {name: sum(side["turns"]) for name, side in found.items()}
    for name, side in found.items():
        print(f"{name:8} {totals[name]:7.1f} s, {statistics.median(side['turns']):.2f} s a step (median of {steps})")
    saves = found["with"]["saves"]
    print(f"{100 * (totals['with'] / totals['without'] - 1):+.1f} % for {len(saves)} checkpoints", end=" ")
    print(f"of {size / 1e9:.2f} GB, {statistics.median(saves):.1f} s each", end=" ")
    print(f"and {100 * sum(saves) / totals['without']:.1f} % in all; verified in {verified:.1f} s")


if __name__ == "__main__":
    if len(sys.argv) > 2:
        train(sys.argv[1], sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
    else:
        main(int(sys.argv[1]) if len(sys.argv) == 2 else EVERY)
