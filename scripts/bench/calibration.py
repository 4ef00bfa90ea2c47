"""Measures the current speed of this machine and describes it, as JSON on stdout.

    python scripts/bench/calibration.py [--quick]

Matrix products in FLOP/s (best of ten, with the shapes of an MLP matrix and the vocabulary head for 2,048 tokens), a
memory copy in bytes/s (bytes read and written), and a Python loop in rounds/s.
"""

import json
import platform
import re
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

SHAPES = ((2048, 768, 3072), (2048, 768, 50304))
COPIED_BYTES = 10**9
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16")
LIBRARIES = ("torch", "transformers", "accelerate", "rorchat")


def best_seconds(work, repeats: int) -> float:
    def once() -> float:
        started = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - started

    once()  # allocates
    return min(once() for _ in range(repeats))


def matrix_product(shape: tuple[int, int, int], dtype: torch.dtype, repeats: int, device: str) -> float:
    """FLOP/s of (m, k) @ (k, n)."""
    m, k, n = shape
    draw = torch.Generator(device).manual_seed(0)
    a = torch.randn(m, k, generator=draw, device=device).to(dtype)
    b = torch.randn(k, n, generator=draw, device=device).to(dtype)
    out = torch.empty(m, n, dtype=dtype, device=device)
    return 2 * m * k * n / best_seconds(lambda: torch.mm(a, b, out=out), repeats)


def memory_copy(count: int, repeats: int, device: str) -> float:
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * count / best_seconds(lambda: target.copy_(source), repeats)


def python_loop(rounds: int = 10**6) -> float:
    def loop() -> None:
        total = 0
        for number in range(rounds):
            total += number

    return rounds / best_seconds(loop, 5)


def measure(quick: bool) -> dict[str, float]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = ((64, 64, 64),) if quick else SHAPES
    rates = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        for shape in shapes:
            rates[f"{name} {'x'.join(map(str, shape))}"] = matrix_product(shape, dtype, 10, device)
    rates["memory copy"] = memory_copy(10**6 if quick else COPIED_BYTES, 5, device)
    rates["python loop"] = python_loop()
    return rates


def describe_machine() -> dict[str, object]:
    cpu, flags = platform.processor(), set()
    if Path("/proc/cpuinfo").is_file():
        about = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        model = re.search(r"model name\s*:\s*(.+)", about)
        cpu = model.group(1) if model else cpu
        words = re.search(r"flags\s*:\s*(.+)", about)
        flags = set(words.group(1).split()) if words else flags
    return {
        "cpu": cpu,
        "flags": [flag for flag in FLAGS if flag in flags],
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES},
    }


if __name__ == "__main__":
    print(json.dumps({"machine": describe_machine(), "calibration": measure("--quick" in sys.argv)}))
