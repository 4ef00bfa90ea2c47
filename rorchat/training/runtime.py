"""Settings of the training process that depend on the machine: precision, threads, memory, compilation."""

import ctypes
import importlib.util
import os
import sys

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h of glibc


def best_precision(on_gpu: bool) -> dict[str, bool]:
    """The values of the settings `bf16` and `fp16` that are fastest on the device.

    On a GPU bf16 from compute capability 8.0, otherwise fp16 with a loss scale (a T4 only emulates bf16). On a CPU bf16
    if it has matrix units for it (AMX), otherwise float32.
    """
    if on_gpu:
        modern = torch.cuda.get_device_capability()[0] >= 8
        return {"bf16": modern, "fp16": not modern}
    return {"bf16": torch.cpu._is_amx_tile_supported(), "fp16": False}


def can_compile(on_gpu: bool) -> bool:
    """Whether torch.compile is the default: on a GPU that Triton supports, from compute capability 7.0."""
    return on_gpu and torch.cuda.get_device_capability()[0] >= 7 and importlib.util.find_spec("triton") is not None


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
