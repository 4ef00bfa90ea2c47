"""What a checkpoint of 125M parameters with AdamW costs: seconds to save one, and to verify it.

    python scripts/bench/checkpoint.py

Four steps of `recipes/pretrain.py`, one checkpoint each, in a folder that is removed: 5 GB while it runs. The batch is
tiny, for only the saving is timed.
"""

import runpy
import statistics
import sys
import tempfile
import time
from pathlib import Path

from rorchat.training.checkpoint import Checkpoints
from rorchat.training.resume import ResumableTrainer

ROOT = Path(__file__).parents[2]


def main() -> None:
    seconds, save = [], ResumableTrainer._save_checkpoint

    def timed(trainer, *arguments) -> None:
        started = time.perf_counter()
        save(trainer, *arguments)
        seconds.append(time.perf_counter() - started)

    ResumableTrainer._save_checkpoint = timed
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "sources": "tinytown=200", "tokenizer": f"{folder}/tokenizer", "size": "13x14x896", "block_size": 64,
            "per_device_train_batch_size": 2, "global_batch_tokens": 128, "max_steps": 4, "save_steps": 1,
            "eval_strategy": "no", "output_dir": f"{folder}/run",
        }  # fmt: skip
        words = ["--sources", "tinytown=200", "--vocab_size", "512", "--output_dir", settings["tokenizer"]]
        runpy.run_path(str(ROOT / "recipes" / "tokenizer.py"))["main"](words)
        argv = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
        runpy.run_path(str(ROOT / "recipes" / "pretrain.py"))["main"](argv)
        newest = Checkpoints(settings["output_dir"]).committed()[0]
        started = time.perf_counter()
        newest.verify()
        verified = time.perf_counter() - started
    print(f"{newest.bytes / 1e9:.2f} GB: saved in {statistics.median(seconds):.1f} s", end=" ")
    print(f"({min(seconds):.1f} to {max(seconds):.1f}), verified in {verified:.1f} s")


if __name__ == "__main__":
    sys.exit(main())
