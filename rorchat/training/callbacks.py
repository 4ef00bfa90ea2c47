"""What a run shows while it goes on: metrics.jsonl, samples.jsonl, and a line a person can read."""

import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback


def peak_memory_bytes() -> int:
    """The most memory held so far: the device's on a GPU, else the process's resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def append_line(path: Path, record: dict) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")


class Metrics(TrainerCallback):
    """Writes metrics.jsonl, one line a log step, and shows the progress: a bar on a terminal, plain lines in a log.

    Args:
        folder: the run's.
        count_tokens: tokens read after so many steps, over all processes.
    """

    def __init__(self, folder: Path, count_tokens: Callable[[int], int]):
        self.path, self.count_tokens = folder / "metrics.jsonl", count_tokens
        self.bar = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = self.last_time = time.monotonic()
        self.last_step = state.global_step
        self.paused = 0.0
        if state.is_world_process_zero and sys.stderr.isatty():
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(1)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or "train_runtime" in logs:
            return
        record = {"step": state.global_step, "tokens": self.count_tokens(state.global_step)}
        record |= {key: value for key, value in logs.items() if key not in ("epoch", "total_flos")}
        now = time.monotonic()
        if "loss" in logs:
            read = self.count_tokens(state.global_step) - self.count_tokens(self.last_step)
            took = now - self.last_time - self.paused
            record["tokens_per_second"] = round(read / took)
            self.seconds_left = took / (state.global_step - self.last_step) * (state.max_steps - state.global_step)
            self.last_step, self.last_time, self.paused = state.global_step, now, 0.0
        else:  # an evaluation: its time is no training time
            self.paused += logs.get("eval_seconds", logs.get("eval_runtime", 0.0))
        record |= {"memory_bytes": peak_memory_bytes(), "seconds": round(now - self.started, 2)}
        append_line(self.path, record)
        self._show(record, state)

    def _show(self, record: dict, state) -> None:
        parts = [f"step {record['step']}/{state.max_steps}"]
        parts += [
            f"{name} {record[key]:{form}}"
            for key, name, form in (
                ("loss", "loss", ".3f"),
                ("eval_loss", "validation loss", ".3f"),
                ("eval_bits_per_byte", "bits/byte", ".3f"),
                ("rewards/accuracies", "preferred", ".2f"),
                ("learning_rate", "lr", ".2e"),
            )
            if key in record
        ]
        if "tokens_per_second" in record:
            parts.append(f"{record['tokens_per_second']:,} tokens/s")
        if "loss" in record:
            parts.append(f"{timedelta(seconds=round(self.seconds_left))} left")
        line = "  ".join(parts)
        if self.bar is not None:
            self.bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)  # noqa: T201

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()


class Samples(TrainerCallback):
    """Writes what the model says to fixed prompts to samples.jsonl, before the first step and after the last.

    Args:
        speak: gives the model's words for each prompt, in order.
    """

    def __init__(self, folder: Path, prompts: Sequence[str], speak: Callable[[Sequence[str]], list[str]]):
        self.path, self.prompts, self.speak = folder / "samples.jsonl", list(prompts), speak

    def _write(self, state) -> None:
        if state.is_world_process_zero and self.prompts:
            for prompt, text in zip(self.prompts, self.speak(self.prompts), strict=True):
                append_line(self.path, {"step": state.global_step, "prompt": prompt, "text": text})

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self._write(state)

    def on_train_end(self, args, state, control, **kwargs):
        self._write(state)
