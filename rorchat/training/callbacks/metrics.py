"""What a run shows while it goes on: metrics.jsonl, samples.jsonl, a line a person can read; and when it must stop.

docs/metrics.md has every field of metrics.jsonl with its unit and formula.
"""

import json
import resource
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from rorchat.errors import DivergedError
from rorchat.jsonl import append_json_line, drop_partial_line

MIXTURE = "mixture/"  # how the share of a source is called in the flat logs that trackers get
MOST_SKIPS = 25  # in a row under fp16: the loss scale has then fallen from 65,536 below 1
WINDOWS = 5  # log lines whose median speed gives the time left


def peak_memory_bytes() -> int:
    """The most memory held so far: the device's on a GPU, else the process's resident set."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():  # 0 with --use_cpu
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes there, kilobytes here
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def spent_before(path: Path) -> tuple[float, float]:
    """(seconds, dollars) in the last record of a metrics file that has them; zeros where there is none."""
    if path.is_file():
        for line in reversed(path.read_text(encoding="utf-8").split("\n")):
            record = json.loads(line) if line else {}
            if "seconds" in record:
                return record["seconds"], record.get("dollars", 0.0)
    return 0.0, 0.0


@dataclass(frozen=True)
class Utilization:
    """What tokens a second are worth on this device.

    Args:
        flops_per_token: `rorchat.model.flops_per_token`: 6 N + 12 L d T, the head counted.
        peak_flops: FLOP/s of all devices of the run together, in the precision of its matrix products.
        peak: "known" from the table of devices, or "measured" on this one.
    """

    flops_per_token: float
    peak_flops: float
    peak: str

    def mfu(self, tokens_per_second: float) -> float:
        """Model FLOPs utilization: tokens/s x (6 N + 12 L d T) / peak FLOP/s, in 0 to 1."""
        return tokens_per_second * self.flops_per_token / self.peak_flops


class MetricsCallback(TrainerCallback):
    """Writes metrics.jsonl, one line a log step, and shows the progress: a bar on a terminal, plain lines in a log.

    The file only grows: a restart adds `{"event": "resumed", "step": N}`, which takes back the lines of later steps
    (`rorchat.report.drop_superseded_lines`). What is derived here is put into the logs before any tracker sees them
    (`completed`).

    Args:
        folder: the run's.
        count_tokens: tokens read after so many steps, over all processes.
        mixture: the share of every source in the rows of the steps from one to another; None where it is not known.
        price_per_hour: dollars an hour of the whole machine; 0 where nobody asked for the cost.
        measure: gives the work of a token and the peak of the devices; called once, when training begins.
    """

    def __init__(
        self,
        folder: Path,
        count_tokens: Callable[[int], int],
        mixture: Callable[[int, int], dict[str, float]] | None = None,
        price_per_hour: float = 0.0,
        measure: Callable[[], Utilization] | None = None,
    ):
        self.path, self.count_tokens, self.mixture = folder / "metrics.jsonl", count_tokens, mixture
        self.price_per_hour, self.measure, self.utilization = price_per_hour, measure, None
        self.matrix_learning_rate: float | None = None  # Muon's in the last step, told by the trainer
        self.bar, self.started, self.is_first = None, None, True
        self.from_weights = False  # told by the run: nothing but the weights went on
        self.interrupted = False  # told by the trainer: what ends is not the run
        self.new_phase: dict[str, object] = {}  # told by the run: what was appended to it at this start
        self.seconds_before = self.dollars_before = self.paused = 0.0
        self.skipped_steps = self.skipped_in_a_row = self.last_step = 0
        self.last_mixture = 0  # the step up to which shares were logged: a resumed run's speed begins later
        self.seconds_per_step: deque[float] = deque(maxlen=WINDOWS)

    # What is derived

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time that is no training time: it counts in `seconds`, not in `tokens_per_second`."""
        began = time.monotonic()
        yield
        self.paused += time.monotonic() - began

    def spent(self) -> dict[str, float]:
        """Seconds since the run began, over all restarts, and what they cost."""
        here = time.monotonic() - self.started if self.started is not None else 0.0
        spent = {"seconds": round(self.seconds_before + here, 2)}
        if self.price_per_hour:
            spent["dollars"] = round(self.dollars_before + here / 3600 * self.price_per_hour, 6)
        return spent

    def completed(self, logs: dict[str, float], step: int) -> dict[str, float]:
        """The Trainer's logs of a step with what we derive, flat, as trackers want them."""
        if "train_runtime" in logs:  # the Trainer's own summary of rows and seconds
            return logs
        logs = {**logs, "tokens": self.count_tokens(step)}
        if "loss" in logs:
            logs |= self._speed(step)
            if self.matrix_learning_rate is not None:
                logs["matrix_learning_rate"] = self.matrix_learning_rate
            if self.mixture and step > self.last_mixture:
                logs |= {MIXTURE + name: share for name, share in self.mixture(self.last_mixture, step).items()}
            self.last_step = self.last_mixture = step
        else:  # an evaluation: its time is no training time
            self.paused += logs.get("eval_seconds", logs.get("eval_runtime", 0.0))
        return logs | {"memory_bytes": peak_memory_bytes()} | self.spent()

    def _speed(self, step: int) -> dict[str, float]:
        now = time.monotonic()
        took = max(now - self.last_time - self.paused, 1e-9)
        self.last_time, self.paused = now, 0.0
        self.seconds_per_step.append(took / max(1, step - self.last_step))
        speed = (self.count_tokens(step) - self.count_tokens(self.last_step)) / took
        found = {"tokens_per_second": round(speed)}
        if self.utilization:
            found["mfu"] = round(self.utilization.mfu(speed), 5)
        if self.counts_skips:
            found["skipped_steps"], self.skipped_steps = self.skipped_steps, 0
        return found

    # When

    def on_train_begin(self, args, state, control, **kwargs):
        self.counts_skips = args.fp16
        if self.measure and self.utilization is None:
            self.utilization = self.measure()
        self.untold = self.utilization
        self.is_first = state.is_world_process_zero
        if self.is_first:
            drop_partial_line(self.path)
            self.seconds_before, self.dollars_before = spent_before(self.path)
        self.started = self.last_time = time.monotonic()
        self.last_step = self.last_mixture = state.global_step
        if not state.is_world_process_zero:
            return
        if state.global_step:
            resumed = {"event": "resumed", "step": state.global_step} | self.spent()
            append_json_line(self.path, resumed | ({"weights_only": True} if self.from_weights else {}))
        if self.new_phase:
            told = {"event": "new phase", "step": state.global_step, "tokens": self.count_tokens(state.global_step)}
            append_json_line(self.path, told | self.new_phase | self.spent())
        if sys.stderr.isatty():
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        if (
            self.counts_skips
        ):  # Accelerate's optimizer: the gradients were infinite, so the loss scale was halved instead
            skipped = bool(optimizer.step_was_skipped)
            self.skipped_steps += skipped
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
            if self.skipped_in_a_row == MOST_SKIPS:
                self.close()
                raise DivergedError(
                    f"{MOST_SKIPS} steps in a row, up to step {state.global_step + 1}, had gradients that are no "
                    "numbers at any loss scale. Lower learning_rate in a new output_dir, or train in --bf16 true."
                )

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(1)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or "train_runtime" in logs:
            return
        record = {"step": state.global_step, "tokens": logs["tokens"]}
        record |= {key: value for key, value in logs.items() if key not in ("epoch", "total_flos")}
        shares = {key: record.pop(key) for key in [*record] if key.startswith(MIXTURE)}
        if shares:
            record["mixture"] = {key.removeprefix(MIXTURE): round(share, 6) for key, share in shares.items()}
        if "mfu" in record and self.untold:
            record |= {"peak": self.untold.peak, "peak_flops": self.untold.peak_flops}
            record["flops_per_token"], self.untold = self.untold.flops_per_token, None
        append_json_line(self.path, record)
        self._show(record, args, state)

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    def close(self) -> None:
        """Takes the bar off the terminal."""
        if self.bar is not None:
            self.bar.close()

    # What a person reads

    def _show(self, record: dict, args, state) -> None:
        parts = [f"step {record['step']}/{state.max_steps}"]
        parts += [
            said.format(record[key])
            for key, said in (
                ("loss", "loss {:.3f}"),
                ("eval_loss", "validation loss {:.3f}"),
                ("eval_bits_per_byte", "bits/byte {:.3f}"),
                ("base_loss", "base loss {:.3f}"),
                ("base_bits_per_byte", "bits/byte {:.3f}"),
                ("rewards/accuracies", "preferred {:.2f}"),
                ("reward", "reward {:.3f}"),
                ("eval_reward", "validation reward {:.3f}"),
                ("eval_right", "right {:.1%}"),
                ("learning_rate", "lr {:.2e}"),
                ("tokens_per_second", "{:,} tokens/s"),
                ("mfu", "MFU {:.1%}"),
            )
            if key in record
        ]
        if record.get("skipped_steps"):
            parts.append(f"{record['skipped_steps']} steps skipped (infinite gradients)")
        if "loss" in record:
            parts.append(self._time_left(args, state))
        if "dollars" in record:
            parts.append(f"${record['dollars']:.2f}")
        if self.bar is None:
            print("  ".join(parts), file=sys.stderr, flush=True)  # noqa: T201
            return
        if "loss" in record:
            self.bar.set_postfix_str(f"loss {record['loss']:.3f}, {record['tokens_per_second']:,} tokens/s")
        self.bar.write("  ".join(parts), file=sys.stderr)

    def _time_left(self, args, state) -> str:
        """From the median speed of the last windows: the first one holds compilation and warm-up."""
        seconds = statistics.median(self.seconds_per_step) * (state.max_steps - state.global_step)
        to_come = []
        if args.eval_strategy == IntervalStrategy.STEPS:
            to_come.append((_multiples(state.global_step, state.max_steps, state.eval_steps), "evaluation"))
        if args.sample_prompts and args.sample_steps:
            to_come.append((_multiples(state.global_step, state.max_steps, args.sample_steps), "sampling"))
        said = ", ".join(f"{count} {name}{'s' * (count > 1)}" for count, name in to_come if count)
        return f"{timedelta(seconds=round(seconds))} left" + (f" without {said}" if said else "")


def _multiples(after: int, until: int, of: float) -> int:
    return int(until // of - after // of)
