"""What checkpoints cost: a training of 124M parameters without any, and the same one with one every 50 steps.

    python scripts/bench/checkpoint.py [STEPS]

Each is `recipes/pretrain.py` in a process of its own, with AdamW and 4 x 512 tokens a step, of a tokenizer as large as
GPT-2's and of Tinytown's texts: some seven minutes a run of 50 steps on two cores, and 5 GB of disk while it runs. Its
time is that of its steps and saves together.
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

from rorchat.training.checkpoint import Checkpoints

ROOT = Path(__file__).parents[2]
EVERY = 50


def train(folder: str, name: str, steps: int, *flags: str) -> None:
    """One run in this process; what it took goes to a file."""
    from transformers import TrainerCallback

    from rorchat.training.resume import ResumableTrainer
    from rorchat.training.trainer import StageTrainer

    found = {"saves": [], "steps": []}

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.began = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            found["steps"].append(time.perf_counter() - self.began)

    save, begin = ResumableTrainer._save_checkpoint, StageTrainer.begin_stage

    def timed(trainer, *arguments) -> None:
        started = time.perf_counter()
        save(trainer, *arguments)
        found["saves"].append(time.perf_counter() - started)

    def clocked(trainer, *arguments, **options) -> None:
        begin(trainer, *arguments, **options)
        trainer.add_callback(Clock())

    ResumableTrainer._save_checkpoint, StageTrainer.begin_stage = timed, clocked
    argv = ["--sources", "tinytown=20000", "--tokenizer", f"{folder}/tokenizer", "--token_store", f"{folder}/tokens"]
    argv += ["--size", "124m", "--block_size", "512", "--per_device_train_batch_size", "4", "--eval_strategy", "no"]
    argv += ["--global_batch_tokens", "2048", "--max_steps", str(steps), "--optimizer", "adamw", *flags]
    runpy.run_path(str(ROOT / "recipes" / "pretrain.py"))["main"]([*argv, "--output_dir", f"{folder}/{name}"])
    found["seconds"] = sum(found["steps"]) + sum(found["saves"])
    Path(folder, f"{name}.json").write_text(json.dumps(found))


def main(steps: int) -> None:
    sides = {"without": ["--save_strategy", "no"], "with": ["--save_steps", str(EVERY)]}
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer_of(WORKS["124m"]).save_pretrained(f"{folder}/tokenizer")
        for name, flags in sides.items():
            subprocess.run([sys.executable, __file__, folder, name, str(steps), *flags], check=True, cwd=ROOT)
            found[name] = json.loads(Path(folder, f"{name}.json").read_text())
        newest = Checkpoints(f"{folder}/with").committed()[0]
        started = time.perf_counter()
        newest.verify()
        verified = time.perf_counter() - started
    for name, side in found.items():
        print(f"{name:8} {side['seconds']:7.1f} s, {statistics.median(side['steps']):.2f} s a step (median of {steps})")
    ratio = found["with"]["seconds"] / found["without"]["seconds"]
    saves = found["with"]["saves"]
    spent = sum(saves) / found["without"]["seconds"]
    print(f"{100 * (ratio - 1):+.1f} % for {len(saves)} checkpoints of {newest.bytes / 1e9:.2f} GB,", end=" ")
    print(f"{statistics.median(saves):.1f} s each and {100 * spent:.1f} % in all; verified in {verified:.1f} s")


if __name__ == "__main__":
    if len(sys.argv) > 2:
        train(sys.argv[1], sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
    else:
        main(int(sys.argv[1]) if len(sys.argv) == 2 else 2 * EVERY)
