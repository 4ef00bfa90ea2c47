"""Refuses to train on the CPU if a GPU is there or asked for, and on a GPU that this build of PyTorch does not serve.

With an old driver, or a build of PyTorch without CUDA, `torch.cuda.is_available()` is false: without these checks, a
run that was meant for a GPU would train on the CPU. A machine that has no GPU, and on which nothing asks for one, needs
no setting.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn import functional as F

from rorchat.errors import UsageError, shorten_error
from rorchat.training.launcher import TORCHRUN_ID

NVIDIA_DRIVER = Path("/proc/driver/nvidia")  # one folder for each GPU of the driver, even if torch cannot use it
HIDDEN = ("", "-1", "nodevfiles", "none", "void")  # values of CUDA_VISIBLE_DEVICES, also of Slurm, for no GPU
PAGE = "docs/scaling.md, Which build of PyTorch"
OLD_BUILD = "pip install torch --index-url https://download.pytorch.org/whl/cu126"  # for CUDA 12.6, with sm_50 to sm_90


def asks_for_cpu() -> bool:
    """Whether `accelerate launch --cpu` has started this process: then Transformers chooses the CPU."""
    from accelerate.utils import parse_flag_from_env  # here, because `rorchat plan` does without it

    return parse_flag_from_env("ACCELERATE_USE_CPU")


def require_no_gpu_wanted() -> None:
    """Raises UsageError if this process cannot use a GPU, although the machine has one or its launcher names one."""
    if problem := describe_unusable_gpu():
        raise UsageError(f"{problem}. Mend this ({PAGE}), or train on the CPU with --use_cpu true.")


def describe_unusable_gpu() -> str:
    """Which GPU is wanted, and why PyTorch cannot use it, in one line without a full stop; "" if none is wanted."""
    wanted = "" if torch.cuda.is_available() else find_wanted_gpu()
    return f"{wanted}, but PyTorch finds none that it can use: {explain_missing_gpu()}" if wanted else ""


def warn_about_unusable_gpu() -> None:
    """Says that a plan is for the CPU, although the machine has a GPU."""
    if problem := describe_unusable_gpu():
        message = f"warning: {problem}. This plan is for the CPU; to plan for the GPU, mend this first ({PAGE})"
        print(message, file=sys.stderr)  # noqa: T201


def find_wanted_gpu() -> str:
    """What says that this run should use a GPU, as the beginning of a sentence; "" if nothing does."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        if visible.split(",")[0].strip().lower() in HIDDEN:
            return ""  # hidden on purpose, as by recipes/accelerate/cpu.yaml
        return f"CUDA_VISIBLE_DEVICES is {visible}, which names a GPU"
    # accelerate 1.15 starts several processes only for the GPUs of its configuration, or of the machine
    if TORCHRUN_ID in os.environ and "ACCELERATE_MIXED_PRECISION" in os.environ:
        return "The configuration of accelerate launch is for GPUs"
    name = find_nvidia_gpu()
    return f"This machine has a GPU ({name})" if name else ""


def find_nvidia_gpu() -> str:
    """The name of the first GPU that NVIDIA's driver or its tool nvidia-smi lists; "" if there is none."""
    for file in sorted(NVIDIA_DRIVER.glob("gpus/*/information")):
        if model := re.search(r"^Model:\s*(.+)$", file.read_text(encoding="utf-8", errors="replace"), re.MULTILINE):
            return model[1]
    tool = shutil.which("nvidia-smi")  # under WSL, the driver is not in /proc
    if tool is None:
        return ""
    try:
        listed = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
    first = re.search(r"^GPU \d+: (.+?)(?: \(UUID.*)?$", listed, re.MULTILINE)
    return first[1] if first else ""


def explain_missing_gpu() -> str:
    """Why `torch.cuda.is_available()` is false, in one line without a full stop."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"its build {torch.__version__} is for CPUs only"
    try:
        torch.cuda.init()
        reason = "it finds no device; in a container, start it with --gpus all"
    except (RuntimeError, AssertionError) as error:
        reason = shorten_error(error).rstrip(".")
    return f"{reason} (PyTorch {torch.__version__}; for older drivers: {OLD_BUILD})"


def check_gpu(device: torch.device, dtype: torch.dtype) -> None:
    """Runs a first small kernel on a GPU, before any data is prepared.

    Raises:
        UsageError: the build of PyTorch has no kernels for this device, or the kernel fails.
    """
    name = torch.cuda.get_device_name(device)
    capability, built_for = torch.cuda.get_device_capability(device), torch.cuda.get_arch_list()
    if not has_kernels(built_for, capability):
        raise UsageError(
            f"PyTorch {torch.__version__} has no kernels for {name} (sm_{capability[0]}{capability[1]}), only for "
            f"{', '.join(built_for)}. Install the build for CUDA 12.6, which has them for P100 and V100: {OLD_BUILD}. "
            "Or train on the CPU with --use_cpu true."
        )
    try:
        run_first_kernel(device, dtype)
    except RuntimeError as error:
        raise UsageError(
            f"A first kernel in {dtype} fails on {name}: {shorten_error(error).rstrip('.')}. Update its driver, "
            f"install another build of PyTorch ({PAGE}), or train on the CPU with --use_cpu true."
        ) from None


def has_kernels(built_for: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether a build of PyTorch has kernels for a device.

    Code for sm_80 runs on all devices 8.x from 8.0 on, that for sm_90a only on 9.0, and compute_90 is compiled on any
    later device.

    Args:
        built_for: the result of `torch.cuda.get_arch_list()`. Without names of NVIDIA's, as on AMD's GPUs, nothing is
            known, and the result is True.
        capability: (major, minor).
    """
    known = [known for name in built_for if (known := re.fullmatch(r"(sm|compute)_(\d+)(\d)(\w?)", name))]
    for kind, *version, suffix in (match.groups() for match in known):
        major, minor = map(int, version)
        if (major, minor) == capability:
            return True
        if kind == "compute" and not suffix and (major, minor) < capability:
            return True
        if kind == "sm" and suffix != "a" and major == capability[0] and minor < capability[1]:
            return True
    return not known


def run_first_kernel(device: torch.device, dtype: torch.dtype) -> None:
    """Attention and its gradient on a few numbers: matrix products, elementwise kernels and a reduction."""
    query = torch.ones(1, 2, 16, 64, device=device, dtype=dtype, requires_grad=True)  # (B, H, T, D)
    F.scaled_dot_product_attention(query, query, query, is_causal=True).sum().backward()
    torch.cuda.synchronize(device)
