"""Which precision is fastest on this machine: measured on matrix products, because no flag of a processor says it.

In bf16, a 124M model trains 2.8 times as fast as in float32 on an AMD EPYC with AVX512-BF16, half as fast on an Intel
Xeon without AMX, and a tenth as fast on an EPYC without AVX-512.
"""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Work = Callable[[], object]

PRECISIONS = ("bf16", "fp16", "fp32")
GAIN = 1.1  # a shorter format must be this much faster than float32, because it rounds more
SCALED_GAIN = 1.5  # and fp16 this much faster than bf16, because its gradients need a loss scale
SECONDS = 0.4
#: (rows, limit on the width) of the products, from cheap to realistic: where bf16 is only emulated, it can be a hundred
#: times as slow as float32, so that the first one must be small.
SIZES = ((32, 128), (128, 384), (512, 1280))
ROUNDS = 4
HOPELESS = 4.0  # times the duration of the fastest, after which a precision is not timed again
DEFAULT_WIDTH = 768


def choose_precision(speeds: Mapping[str, float]) -> str:
    """The precision to train in.

    Args:
        speeds: {precision: FLOP/s}; at least "fp32".
    """
    short = {name: speed for name, speed in speeds.items() if name != "fp32" and speed >= GAIN * speeds["fp32"]}
    if not short:
        return "fp32"
    scaled = short.get("fp16", 0.0) >= SCALED_GAIN * short.get("bf16", 0.0)
    return "fp16" if scaled else "bf16"


@functools.cache
def measure_precisions(device: str, width: int = DEFAULT_WIDTH) -> dict[str, float]:
    """The speed of every precision on a device, in at most half a second: {precision: FLOP/s}.

    Timed are the products of two linear layers of GPT-2, width to 4 * width, forward and backward under autocast, as
    in training, on one core of a CPU.

    Args:
        device: "cpu" or a CUDA device.
        width: of the model, `n_embd`.
    """
    import torch

    names = [name for name in PRECISIONS if name != "fp16" or device != "cpu"]  # the loss scale of fp16 needs a GPU
    levels = []
    with torch.random.fork_rng([device] if device != "cpu" else []):  # the run's random numbers must not depend on this
        for rows, limit in SIZES:
            inputs = torch.randn(rows, min(width, limit), device=device, requires_grad=True)
            layers = [
                torch.randn(4 * inputs.shape[1], inputs.shape[1], device=device, requires_grad=True) for _ in "12"
            ]
            flops = 6.0 * rows * sum(layer.numel() for layer in layers)
            levels.append((flops, {name: partial(_run_layers, inputs, layers, name) for name in names}))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several would wait for each other beside other work
    try:
        return compare_speeds(levels, partial(_time, device=device))
    finally:
        torch.set_num_threads(threads)


def compare_speeds(
    levels: Sequence[tuple[float, Mapping[str, Work]]], measure: Callable[[Work], float], seconds: float = SECONDS
) -> dict[str, float]:
    """The highest FLOP/s of each alternative, by name.

    The alternatives take turns, and the fastest of a few runs of each counts, so that other work on the machine, which
    comes and goes, slows all of them or none. The work grows as long as time is left. An alternative that is hopelessly
    slow keeps the figure that it has.

    Args:
        levels: (FLOPs, {name: work with as many FLOPs}), from little work to much.
        measure: the duration of one run of a work, in seconds.
        seconds: limit on the duration of the whole comparison; the first level is always run.
    """
    deadline, speeds = time.perf_counter() + seconds, dict.fromkeys(levels[0][1], 0.0)
    took, flops_before = 0.0, math.inf
    for flops, works in levels:
        begun = time.perf_counter()
        if begun + took * flops / flops_before > deadline:
            break
        alive = [name for name, speed in speeds.items() if speed * HOPELESS >= max(speeds.values())]
        for name in alive:
            measure(works[name])  # the first run of each loads libraries and warms caches up
        rounds = [[measure(works[name]) for name in alive] for _ in range(ROUNDS)]
        times = dict(zip(alive, map(min, *rounds), strict=True))
        speeds |= {name: max(speeds[name], flops / duration) for name, duration in times.items()}
        took, flops_before = time.perf_counter() - begun, flops
    return speeds


def _run_layers(inputs: "Tensor", layers: "list[Tensor]", precision: str) -> None:
    """A forward and backward pass of the inputs through each of the layers."""
    import torch
    from torch.nn import functional as F

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    with torch.autocast(inputs.device.type, dtype) if dtype else contextlib.nullcontext():
        outputs = [F.linear(inputs, layer) for layer in layers]
    torch.autograd.grad(outputs, [inputs, *layers], [output.detach() for output in outputs])


def _time(work: Work, device: str) -> float:
    import torch

    started = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
