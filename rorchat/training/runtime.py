"""What a training process takes from its machine: the fast precision, all cores, kept memory, compiled code."""

import ctypes
import importlib.util
import os
import sys

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h of glibc


def best_precision(on_gpu: bool) -> dict[str, bool]:
    """bf16 or fp16, whichever the device computes fast, or neither.

    bf16 from compute capability 8.0, fp16 with a loss scale below (a T4 only emulates bf16), and on a CPU bf16 where it
    has matrix units for it (AMX), else float32.
    """
    if on_gpu:
        modern = torch.cuda.get_device_capability()[0] >= 8
        return {"bf16": modern, "fp16": not modern}
    return {"bf16": torch.cpu._is_amx_tile_supported(), "fp16": False}


def can_compile(on_gpu: bool) -> bool:
    """Whether torch.compile is taken without being asked for: on a GPU with Triton (from compute capability 7.0)."""
    return on_gpu and torch.cuda.get_device_capability()[0] >= 7 and importlib.util.find_spec("triton") is not None


def use_all_cores() -> None:
    """Takes back the single thread that `accelerate launch` gives a process on a CPU.

    It sets OMP_NUM_THREADS=1 unless told otherwise (accelerate 1.15, commands/launch.py), which halves the speed of two
    cores and says nothing. Any other number is taken as meant.
    """
    if os.environ.get("OMP_NUM_THREADS") == "1" and not torch.cuda.is_available():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def keep_freed_memory() -> None:
    """Lets the C library keep what a step frees, for the next step, in place of giving it back to the system.

    glibc returns every large tensor as it is freed, so that gradients and activations are faulted in and zeroed again
    in each step: a tenth of the time of a step on a CPU. Nothing happens where the C library is another one.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None and not torch.cuda.is_available():
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
