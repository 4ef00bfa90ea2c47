"""Measured seconds in place of assumed ones: a few steps on random tokens, on the path that training takes."""

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
from rorchat.plan.cost import seconds_per_token
from rorchat.plan.scaling import size_name

STEPS = 3  # after one that warms up
LONGEST_STEP = 120.0  # seconds: a micro-batch that would take longer is cut to one row


@dataclass(frozen=True)
class Probe:
    """What was measured: medians of three steps, in seconds."""

    micro_batch: int
    micro_step: float  # forward and backward
    update: float  # the optimizer
    spread: float  # of the micro-steps: longest less shortest

    def seconds_per_token(self, plan: Plan) -> float:
        """Of the planned run, over all devices, were every one as fast as this one."""
        rows = plan.global_batch_tokens // plan.setup.block_size
        return (self.micro_step * rows / self.micro_batch + self.update * plan.setup.gpus) / (
            plan.global_batch_tokens * plan.setup.gpus
        )


class _Vocabulary:
    """As much of a tokenizer as a model is built from."""

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size

    def convert_tokens_to_ids(self, tokens: str | list[str]) -> int | list[int]:
        return 0 if isinstance(tokens, str) else [0] * len(tokens)


def check_probe(plan: Plan) -> None:
    """Raises UsageError where the plan is for another device than this machine has."""
    here = detect_device()
    if here.name != plan.setup.device.name:
        raise UsageError(
            f"--probe measures this machine, which has {here.name}; the plan is for {plan.setup.device.name}. "
            f"Leave --probe out, or plan for --device {here.name}."
        )


def probe(plan: Plan) -> Probe:
    """Trains the planned model for three steps of one micro-batch, after one that warms up.

    Says beforehand on stderr how long that will take by the model of speed.
    """
    check_probe(plan)
    each = _assumed_seconds(plan, plan.micro_batch)
    micro_batch = plan.micro_batch if each <= LONGEST_STEP else 1
    each = _assumed_seconds(plan, micro_batch)
    print(  # noqa: T201
        f"probe: {1 + STEPS} steps of {size_name(plan.shape)} on {micro_batch} x {plan.setup.block_size} tokens, about "
        f"{(1 + STEPS) * each:.0f} s if the assumed speed is right",
        file=sys.stderr,
    )
    micro_step, update = _step(plan, micro_batch)
    times = [(_timed(micro_step), _timed(update)) for _ in range(1 + STEPS)][1:]
    steps, updates = zip(*times, strict=True)
    return Probe(micro_batch, statistics.median(steps), statistics.median(updates), max(steps) - min(steps))


def _assumed_seconds(plan: Plan, micro_batch: int) -> float:
    tokens = micro_batch * plan.setup.block_size
    return tokens * plan.setup.gpus * seconds_per_token(plan.setup, plan.shape, micro_batch, plan.global_batch_tokens)


def _step(plan: Plan, micro_batch: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """Forward and backward of a micro-batch, and the optimizer's step, as training does them."""
    import torch

    from rorchat.training.kernels.lm_head_loss import patch_gelu, patch_lm_head_loss
    from rorchat.training.optim import build_optimizer
    from rorchat.training.runtime import keep_freed_memory

    keep_freed_memory()
    setup = plan.setup
    where = "cpu" if setup.device.is_cpu else "cuda"
    model = build_model(size_name(plan.shape), _Vocabulary(setup.vocabulary), setup.block_size).to(where).train()
    if setup.gradient_checkpointing:
        model.activation_checkpointing_enable()
    patch_lm_head_loss(model, compiled=setup.kernels == "compiled", whole_rows=True)
    patch_gelu(model)
    optimizer = build_optimizer(model, setup.optimizer, learning_rate=1e-4, matrix_learning_rate=1e-4, weight_decay=0.1)
    ids = torch.randint(setup.vocabulary, (micro_batch, setup.block_size), device=where)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(setup.precision)
    scale = 2.0**10 if setup.precision == "fp16" else 1.0

    def micro_step() -> None:
        with torch.autocast(where, dtype) if dtype else contextlib.nullcontext():
            loss = model(input_ids=ids, labels=ids).loss
        (loss * scale).backward()
        _wait(where)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        _wait(where)

    return micro_step, update


def _wait(where: str) -> None:
    import torch

    if where == "cuda":
        torch.cuda.synchronize()


def _timed(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
