"""Settings of the training process that depend on the machine: precision, threads, memory, compilation."""

import contextlib
import ctypes
import importlib.util
import json
import os
import sys
from pathlib import Path

import torch
from torch.nn import functional as F

from rorchat.errors import shorten_error
from rorchat.precision import DEFAULT_WIDTH, choose_precision, measure_precisions
from rorchat.training.kernels.attention import describe_attention

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h of glibc


def find_precision(run: Path, device: str, width: int | None) -> tuple[str, str]:
    """The precision of a run that leaves it open, and the reason in a few words.

    A run that resumes keeps its precision on a device of the same kind. Otherwise the fastest one is measured.

    Args:
        run: the folder of the run, which may not exist yet.
        device: "cpu" or "cuda".
        width: of the model; None if it is not known yet.
    """
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # reported when the folder is opened
        record = json.loads((run / "run.json").read_text(encoding="utf-8"))
        if record["device"] == device and record["precision"] in DTYPES:
            return record["precision"], "as before"
    speeds = measure_precisions(device, width or DEFAULT_WIDTH)
    figures = ", ".join(
        f"{name} {speed / 1e9:,.3g}" for name, speed in sorted(speeds.items(), key=lambda item: -item[1])
    )
    return choose_precision(speeds), f"{figures} GFLOP/s{' on one core' if device == 'cpu' else ''}"


def can_compile(on_gpu: bool) -> bool:
    """Whether torch.compile is the default: on a GPU that Triton supports, from compute capability 7.0."""
    return on_gpu and torch.cuda.get_device_capability()[0] >= 7 and importlib.util.find_spec("triton") is not None


def works_compiled(on_gpu: bool) -> bool:
    """Whether torch.compile works; if not, says so.

    On a GPU, a small function is compiled: Triton may not serve the device or driver, or lack a C compiler, and fails
    only when it is used. On a CPU nothing is tried, because torch.compile is used there only if it is asked for.
    """
    if not on_gpu:
        return True
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    problem = find_compile_problem(device)
    if problem and os.environ.get("RANK", "0") == "0":
        name = torch.cuda.get_device_name(device)
        message = f"torch.compile does not work on {name} ({problem}): training in eager mode, which is slower"
        print(message, file=sys.stderr)  # noqa: T201
    return not problem


def find_compile_problem(device: torch.device) -> str:
    """Why torch.compile fails on a device, in one line; "" if it works."""
    try:
        numbers = torch.ones(64, device=device, requires_grad=True)
        torch.compile(F.gelu, dynamic=False)(numbers).sum().backward()
    except Exception as error:  # of Inductor, Triton, the C compiler or CUDA
        return shorten_error(error) or type(error).__name__
    return ""


def describe_runtime(arguments) -> str:
    """What a run trains on, in one line that every start prints: device, precision, attention, compilation, processes.

    Args:
        arguments: the settings of a stage, after all checks.
    """
    device, threads = arguments.device, torch.get_num_threads()
    name = f"CPU with {threads} thread{'s' if threads > 1 else ''}" if device.type == "cpu" else device.type
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    attention = describe_attention(device, DTYPES[arguments.precision], arguments.row_layout)
    kernels = "torch.compile" if arguments.is_compiled else "eager"
    processes = "1 process" if arguments.world_size == 1 else f"{arguments.world_size} processes"
    reason = f" ({arguments.precision_reason})" if arguments.precision_reason else ""
    return f"device: {name}, {arguments.precision}{reason}, {attention}, {kernels}, {processes}"


def use_all_cores() -> None:
    """Uses all cores if `accelerate launch` has limited the process to one thread.

    accelerate 1.15 (commands/launch.py) sets OMP_NUM_THREADS=1 on a CPU unless it is set, which halves the speed on two
    cores. Any other value is respected.
    """
    if os.environ.get("OMP_NUM_THREADS") == "1" and not torch.cuda.is_available():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory for the next step instead of returning it to the system.

    Otherwise every large tensor is returned as it is freed, and gradients and activations cause page faults in every
    step: a tenth of a step's time on a CPU. Has no effect with other C libraries.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None and not torch.cuda.is_available():
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
