"""Measures how fast this machine trains, in a few seconds, with the kernels that training uses."""

import subprocess
import sys
import time
from dataclasses import dataclass, field

import numpy as np

from rorchat.device import Device, detect_device
from rorchat.model import Shape, flops_per_token, parse_shape
from rorchat.plan.budget import Request, make_plan
from rorchat.plan.probe import measure_speed
from rorchat.plan.scaling import format_size

#: Sizes whose speed is measured; that of others is interpolated by their FLOPs per token.
PROBED_SIZES = {True: ("2x2x64", "4x4x128", "6x6x384"), False: ("6x6x384", "12x12x768")}  # {is_cpu: sizes}
PROBED_VOCABULARY = 2048
ROWS = 8  # of a step
MAX_CPU_FLOPS = 4e10  # of a measured micro-batch on a CPU: a second or less


@dataclass
class Machine:
    """The speed of this machine.

    Attributes:
        startup_seconds: from the start of a training command to its first step, without its data.
        points: (FLOPs per token, seconds per token) of the measured sizes, in rising order.
    """

    device: Device
    gpus: int
    startup_seconds: float
    block_size: int
    points: list[tuple[float, float]] = field(default_factory=list)

    def seconds_per_token(self, shape: Shape, vocabulary: int) -> float:
        """Seconds per token of a training step, interpolated between the measured sizes in the logarithm of both.

        Beyond the largest measured size, the time grows in proportion to the FLOPs.
        """
        flops = flops_per_token(shape, vocabulary, self.block_size)
        known, seconds = np.log(np.array(self.points)).T
        if flops > np.exp(known[-1]):
            return float(np.exp(seconds[-1]) * flops / np.exp(known[-1]))
        return float(np.exp(np.interp(np.log(flops), known, seconds)))


def measure_machine(block_size: int) -> Machine:
    """Measures the start of a training command and the training speed of a few sizes."""
    device = detect_device()
    gpus = 0 if device.is_cpu else _count_gpus()
    machine = Machine(device, max(1, gpus), measure_startup(), block_size)
    for size in PROBED_SIZES[device.is_cpu]:
        shape = parse_shape(size)
        seconds = measure_seconds_per_token(device, shape, PROBED_VOCABULARY, block_size)
        machine.points.append((flops_per_token(shape, PROBED_VOCABULARY, block_size), seconds / machine.gpus))
    machine.points.sort()
    return machine


def measure_startup() -> float:
    """Seconds that a process needs to import what a training command imports."""
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", "import rorchat.training.sft"], check=True, capture_output=True)
    return time.monotonic() - started


def choose_rows(device: Device, shape: Shape, vocabulary: int, block_size: int) -> int:
    """Rows of a measured micro-batch: all ROWS of a step, or on a CPU a half, a quarter or an eighth of them."""
    rows, flops_of_row = ROWS, block_size * flops_per_token(shape, vocabulary, block_size)
    while device.is_cpu and rows > 1 and rows * flops_of_row > MAX_CPU_FLOPS:
        rows //= 2
    return rows


def measure_seconds_per_token(
    device: Device, shape: Shape, vocabulary: int, block_size: int, optimizer: str = "muon"
) -> float:
    """Seconds per token of a step of ROWS rows, on one device of this machine.

    On a CPU, fewer rows of a large model are measured: the time of a row hardly depends on their number there.
    """
    rows = choose_rows(device, shape, vocabulary, block_size)
    plan = make_plan(request_steps(device, shape, vocabulary, block_size, rows, optimizer))
    return measure_speed(plan).seconds_per_token(plan)


def request_steps(
    device: Device, shape: Shape, vocabulary: int, block_size: int, micro_batch: int = ROWS, optimizer: str = "muon"
) -> Request:
    """Steps of ROWS rows, computed in micro-batches."""
    batch = ROWS * block_size
    return Request(
        device, tokens=batch * 1000, size=format_size(shape), vocabulary=vocabulary, block_size=block_size,
        optimizer=optimizer, global_batch_tokens=batch, micro_batch=micro_batch,
    )  # fmt: skip


def _count_gpus() -> int:
    import torch

    return torch.cuda.device_count()
