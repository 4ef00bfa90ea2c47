"""Writes metrics.jsonl and shows the progress of a run.

docs/metrics.md lists every field of metrics.jsonl with its unit and formula.
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
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from rorchat.console import shows_bars
from rorchat.errors import DivergedError
from rorchat.jsonl import append_json_line, drop_partial_line

MIXTURE = "mixture/"  # prefix of the share of a source in the flat logs that trackers receive
MAX_SKIPPED_STEPS = 25  # consecutive, under fp16; by then, the loss scale has fallen from 65,536 to below 1
RAISED = "raised"  # origin of a peak
SPEED_WINDOW = 5  # log lines; the remaining time is estimated from their median speed
#: Fields of a record that a progress line shows, in this order.
PROGRESS_FIELDS = {
    "loss": "loss {:.3f}",
    "eval_loss": "validation loss {:.3f}",
    "eval_bits_per_byte": "bits/byte {:.3f}",
    "base_loss": "base loss {:.3f}",
    "base_bits_per_byte": "bits/byte {:.3f}",
    "rewards/accuracies": "chosen preferred {:.0%}",
    "reward": "reward {:.3f}",
    "eval_reward": "validation reward {:.3f}",
    "eval_right": "right answers {:.1%}",
    "learning_rate": "learning rate {:.2e}",
    "tokens_per_second": "{:,} tokens/s",
    "mfu": "MFU {:.1%}",
}


def peak_memory_bytes() -> int:
    """Peak memory so far in bytes: allocated on the GPU, or the resident set size of the process without a GPU."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():  # 0 with --use_cpu
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes on macOS, kilobytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def read_elapsed(path: Path) -> tuple[float, float]:
    """(seconds, dollars) from the last record of metrics.jsonl with these fields; zeros if there is none."""
    if path.is_file():
        for line in reversed(path.read_text(encoding="utf-8").split("\n")):
            record = json.loads(line) if line else {}
            if "seconds" in record:
                return record["seconds"], record.get("dollars", 0.0)
    return 0.0, 0.0


@dataclass(frozen=True)
class Utilization:
    """Converts tokens per second to model FLOPs utilization.

    Args:
        flops_per_token: 6 N + 12 L d T, see `rorchat.model.flops_per_token`; includes the vocabulary head.
        peak_flops: peak FLOP/s summed over all devices of the run, in the precision of the matrix products.
        peak: "known" if it comes from the table of devices, "measured" if it was measured on this device, "raised" if
            training was faster than that.
    """

    flops_per_token: float
    peak_flops: float
    peak: str

    def describe_raised_peak(self) -> str:
        return f"peak raised to {self.peak_flops / 1e12:.3g} TFLOP/s, which this run has reached"

    def mfu(self, tokens_per_second: float) -> float:
        """Model FLOPs utilization, from 0 to 1."""
        return tokens_per_second * self.flops_per_token / self.peak_flops


@dataclass(frozen=True)
class StartEvents:
    """What metrics.jsonl records about the start of a resumed run.

    Args:
        weights_only: whether only the weights of the checkpoint were loaded.
        new_phase: names of the sources of the mixture that was appended; empty if there is none.
    """

    weights_only: bool = False
    new_phase: tuple[str, ...] = ()


class MetricsCallback(TrainerCallback):
    """Writes one line per logging step to metrics.jsonl. Shows a progress bar on a terminal or in a notebook, and plain
    lines in a log.

    The file is append-only: a resumed run adds `{"event": "resumed", "step": N}`, which supersedes the earlier
    lines of steps after N. Derived values are added to the logs before trackers receive them (`complete`).

    Args:
        folder: the run folder.
        tokens_after: takes a step and returns the number of tokens read up to it, summed over all processes.
        mixture_shares: takes two steps and returns the share of every source in the rows read between them; None
            without a mixture.
        price_per_hour: dollars per hour of the whole machine; 0 if the cost is not reported.
        measure_utilization: returns FLOPs per token and the peak of the devices. Called when training begins, and with
            `repeat=True` when training is faster than this peak.
        start: the events to record when the run resumes.
    """

    def __init__(
        self,
        folder: Path,
        tokens_after: Callable[[int], int],
        mixture_shares: Callable[[int, int], dict[str, float]] | None = None,
        price_per_hour: float = 0.0,
        measure_utilization: Callable[..., Utilization] | None = None,
        start: StartEvents | None = None,
    ):
        self.path, self.tokens_after, self.mixture_shares = folder / "metrics.jsonl", tokens_after, mixture_shares
        self.price_per_hour, self.measure_utilization = price_per_hour, measure_utilization
        self.start = start or StartEvents()
        self.utilization: Utilization | None = None
        self.peak_is_logged = False
        self.bar: tqdm | None = None
        self.start_time: float | None = None
        self.last_time = 0.0  # of the last log line
        self.is_main_process = True
        self.counts_skipped_steps = False
        self.seconds_before = self.dollars_before = self.paused_seconds = 0.0
        self.skipped_steps = self.skipped_in_a_row = self.last_step = 0
        self.last_mixture = 0  # step of the last logged shares; checkpoints save it, so that no step is omitted
        self.seconds_per_step: deque[float] = deque(maxlen=SPEED_WINDOW)

    # Derived values

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Excludes the time in this context from `tokens_per_second`, but not from `seconds`."""
        began = time.monotonic()
        yield
        self.paused_seconds += time.monotonic() - began

    def elapsed(self) -> dict[str, float]:
        """Seconds since training began, summed over all starts of the run, and their cost in dollars."""
        seconds = time.monotonic() - self.start_time if self.start_time is not None else 0.0
        elapsed = {"seconds": round(self.seconds_before + seconds, 2)}
        if self.price_per_hour:
            elapsed["dollars"] = round(self.dollars_before + seconds / 3600 * self.price_per_hour, 6)
        return elapsed

    def complete(self, logs: dict[str, float], step: int, matrix_learning_rate: float | None = None) -> dict:
        """Adds the derived values to the Trainer's logs of a step. The result is flat, as trackers expect."""
        if "train_runtime" in logs:  # the Trainer's summary at the end
            return logs
        logs = {**logs, "tokens": self.tokens_after(step)}
        if "loss" in logs:
            logs |= self._speed(step)
            if matrix_learning_rate is not None:
                logs["matrix_learning_rate"] = matrix_learning_rate
            if self.mixture_shares and step > self.last_mixture:
                shares = self.mixture_shares(self.last_mixture, step)
                logs |= {MIXTURE + name: share for name, share in shares.items()}
            self.last_step = self.last_mixture = step
        else:  # an evaluation, whose time is not training time
            self.paused_seconds += logs.get("eval_seconds", logs.get("eval_runtime", 0.0))
        return logs | {"memory_bytes": peak_memory_bytes()} | self.elapsed()

    def _speed(self, step: int) -> dict[str, float]:
        now = time.monotonic()
        seconds = max(now - self.last_time - self.paused_seconds, 1e-9)
        self.last_time, self.paused_seconds = now, 0.0
        self.seconds_per_step.append(seconds / max(1, step - self.last_step))
        tokens_per_second = (self.tokens_after(step) - self.tokens_after(self.last_step)) / seconds
        speed: dict[str, float] = {"tokens_per_second": round(tokens_per_second)}
        if self.utilization:
            if self.utilization.mfu(tokens_per_second) > 1:
                self._raise_peak(tokens_per_second)
            speed["mfu"] = round(self.utilization.mfu(tokens_per_second), 5)
        if self.counts_skipped_steps:
            speed["skipped_steps"], self.skipped_steps = self.skipped_steps, 0
        return speed

    def _raise_peak(self, tokens_per_second: float) -> None:
        """Raises a peak that training has exceeded: measures it again, and takes the speed of training if necessary."""
        assert self.utilization and self.measure_utilization
        with self.pause():
            again = self.measure_utilization(repeat=True)
        peak_flops = max(again.peak_flops, tokens_per_second * again.flops_per_token)
        self.utilization = Utilization(again.flops_per_token, peak_flops, RAISED)
        self.peak_is_logged = False

    # Events

    def record_event(self, step: int, event: str, **values: object) -> None:
        """Appends an event to metrics.jsonl, on the main process only."""
        record = {"step": step, "event": event, "tokens": self.tokens_after(step), **values}
        if self.is_main_process:
            append_json_line(self.path, record | self.elapsed())

    def on_train_begin(self, args, state, control, **kwargs):
        self.counts_skipped_steps = args.fp16
        if self.measure_utilization and self.utilization is None:
            self.utilization = self.measure_utilization()
        self.peak_is_logged = False
        self.is_main_process = state.is_world_process_zero
        if self.is_main_process:
            drop_partial_line(self.path)
            self.seconds_before, self.dollars_before = read_elapsed(self.path)
        self.start_time = self.last_time = time.monotonic()
        self.last_step = self.last_mixture = state.global_step
        if not self.is_main_process:
            return
        if state.global_step:
            resumed = {"event": "resumed", "step": state.global_step} | self.elapsed()
            append_json_line(self.path, resumed | ({"weights_only": True} if self.start.weights_only else {}))
        if self.start.new_phase:
            self.record_event(state.global_step, "new phase", sources=[*self.start.new_phase])
        if shows_bars():
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        if not self.counts_skipped_steps:
            return
        skipped = bool(optimizer.step_was_skipped)  # Accelerate: gradients overflowed, and the loss scale was halved
        self.skipped_steps += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if self.skipped_in_a_row == MAX_SKIPPED_STEPS:
            self.close()
            raise DivergedError(
                f"The gradients of {MAX_SKIPPED_STEPS} consecutive steps, up to step {state.global_step + 1}, are NaN "
                "or infinite at every loss scale. Lower learning_rate in a new output_dir, or train with --bf16 true."
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
        if "mfu" in record and self.utilization and not self.peak_is_logged:
            record |= {"peak": self.utilization.peak, "peak_flops": self.utilization.peak_flops}
            record["flops_per_token"], self.peak_is_logged = self.utilization.flops_per_token, True
        append_json_line(self.path, record)
        self._show(record, args, state)

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    def close(self) -> None:
        """Removes the progress bar from the terminal."""
        if self.bar is not None:
            self.bar.close()

    # Progress

    def _show(self, record: dict, args, state) -> None:
        parts = [f"step {record['step']}/{state.max_steps}"]
        parts += [form.format(record[key]) for key, form in PROGRESS_FIELDS.items() if key in record]
        if record.get("skipped_steps"):
            parts.append(f"{record['skipped_steps']} steps skipped (infinite gradients)")
        if record.get("peak") == RAISED and self.utilization:
            parts.append(self.utilization.describe_raised_peak())
        if "loss" in record and state.global_step < state.max_steps:
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
        """The remaining time, from the median speed of the last log lines: the first line includes warm-up."""
        seconds = statistics.median(self.seconds_per_step) * (state.max_steps - state.global_step)
        pending = []
        if args.eval_strategy == IntervalStrategy.STEPS:
            pending.append((state.eval_steps, "evaluation", "evaluations"))
        if args.sample_prompts and args.sample_steps:
            pending.append((args.sample_steps, "set of samples", "sets of samples"))
        counts = [(_count_multiples(state.global_step, state.max_steps, of), *names) for of, *names in pending]
        extras = " and ".join(f"{count} {one if count == 1 else many}" for count, one, many in counts if count)
        return f"{format_seconds(seconds)} left" + (f", plus {extras}" if extras else "")


def format_seconds(seconds: float) -> str:
    """A duration with its two largest units, such as "6 s", "3 min 20 s" or "2 h 5 min"."""
    left = round(seconds)
    parts: list[str] = []
    for unit, length in (("days", 86_400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, length)
        if count and len(parts) < 2:
            parts.append(f"{count} {'day' if unit == 'days' and count == 1 else unit}")
        elif parts:
            break
    return " ".join(parts) or "0 s"


def _count_multiples(after: int, until: int, of: float) -> int:
    """The number of multiples of `of` in (after, until]."""
    return int(until // of - after // of)
