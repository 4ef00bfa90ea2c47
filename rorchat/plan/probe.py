"""Measures the speed of training: a few steps on random tokens, with the kernels that training uses."""

import contextlib
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from rorchat.device import detect_device
from rorchat.errors import UsageError
from rorchat.model import build_model
from rorchat.plan.budget import Plan
from rorchat.plan.cost import estimate_seconds_per_token
from rorchat.plan.scaling import format_size

STEPS = 3  # after one warm-up step
MAX_STEP_SECONDS = 120.0  # a micro-batch that would take longer is reduced to one row


@dataclass(frozen=True)
class Probe:
    """Medians of three measured steps, in seconds.

    Attributes:
        micro_batch: rows of a micro-batch.
        micro_step: forward and backward pass of one micro-batch.
        update: the optimizer step.
        spread: longest minus shortest micro-step.
    """

    micro_batch: int
    micro_step: float
    update: float
    spread: float

    def seconds_per_token(self, plan: Plan) -> float:
        """Returns the seconds per token of the planned run on all its devices, each as fast as the measured one."""
        rows = plan.global_batch_tokens // plan.setup.block_size
        return (self.micro_step * rows / self.micro_batch + self.update * plan.setup.gpus) / (
            plan.global_batch_tokens * plan.setup.gpus
        )


class _Vocabulary:
    """The part of a tokenizer that `build_model` needs."""

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size

    def convert_tokens_to_ids(self, tokens: str | list[str]) -> int | list[int]:
        return 0 if isinstance(tokens, str) else [0] * len(tokens)


def measure_speed(plan: Plan) -> Probe:
    """Trains the planned model for three steps of one micro-batch, after a warm-up step.

    Prints the expected duration to stderr before it starts.

    Raises:
        UsageError: the plan is for a device that this machine does not have.
    """
    device = detect_device()
    if device.name != plan.setup.device.name:
        raise UsageError(
            f"--probe measures this machine, which has {device.name}, but the plan is for {plan.setup.device.name}: "
            f"leave --probe out, or plan for --device {device.name}."
        )
    micro_batch = plan.micro_batch if _estimate_micro_step(plan, plan.micro_batch) <= MAX_STEP_SECONDS else 1
    seconds = (1 + STEPS) * _estimate_micro_step(plan, micro_batch)
    print(  # noqa: T201
        f"probe: {1 + STEPS} steps of {format_size(plan.shape)} on {micro_batch} x {plan.setup.block_size} tokens, "
        f"about {seconds:.0f} s at the assumed speed",
        file=sys.stderr,
    )
    micro_step, update = build_step(plan, micro_batch)
    times = [(_time(micro_step), _time(update)) for _ in range(1 + STEPS)][1:]
    micro_steps, updates = zip(*times, strict=True)
    return Probe(
        micro_batch, statistics.median(micro_steps), statistics.median(updates), max(micro_steps) - min(micro_steps)
    )


def _estimate_micro_step(plan: Plan, micro_batch: int) -> float:
    """Seconds of one micro-batch on one device at the assumed speed."""
    tokens = micro_batch * plan.setup.block_size * plan.setup.gpus
    return tokens * estimate_seconds_per_token(plan.setup, plan.shape, micro_batch, plan.global_batch_tokens)


def build_step(plan: Plan, micro_batch: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """(forward and backward pass of a micro-batch, optimizer step), with the kernels that training uses."""
    import torch

    from rorchat.training.kernels.lm_head_loss import patch_gelu, patch_lm_head_loss
    from rorchat.training.optim import build_optimizer
    from rorchat.training.runtime import keep_freed_memory

    keep_freed_memory()
    setup = plan.setup
    torch_device = "cpu" if setup.device.is_cpu else "cuda"
    model = build_model(format_size(plan.shape), _Vocabulary(setup.vocabulary), setup.block_size)
    model.to(torch_device)  # type: ignore[arg-type]  # mypy expects `self`, because `to` is decorated
    model.train()
    if setup.gradient_checkpointing:
        model.activation_checkpointing_enable()
    patch_lm_head_loss(model, compiled=setup.kernels == "compiled", whole_rows=True)
    patch_gelu(model)
    optimizer = build_optimizer(model, setup.optimizer, learning_rate=1e-4, matrix_learning_rate=1e-4, weight_decay=0.1)
    ids = torch.randint(setup.vocabulary, (micro_batch, setup.block_size), device=torch_device)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(setup.precision)
    scale = 2.0**10 if setup.precision == "fp16" else 1.0

    def micro_step() -> None:
        with torch.autocast(torch_device, dtype) if dtype else contextlib.nullcontext():
            loss = model(input_ids=ids, labels=ids).loss
        (loss * scale).backward()
        _synchronize(torch_device)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        _synchronize(torch_device)

    return micro_step, update


def _synchronize(torch_device: str) -> None:
    import torch

    if torch_device == "cuda":
        torch.cuda.synchronize()


def _time(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
