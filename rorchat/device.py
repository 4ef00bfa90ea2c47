"""MODEL: what a device can do: peak FLOP/s by precision, memory, bandwidth, price.

The figures stand in `devices.yaml`, which may be edited or extended by a file of one's own; what a table cannot know,
the CPU of this machine or a GPU that is not in it, is measured.
"""

import functools
import math
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

from rorchat.errors import UsageError, did_you_mean
from rorchat.yaml_file import read_yaml

DEVICES = Path(__file__).with_name("devices.yaml")
PRECISIONS = ("bf16", "fp16", "fp32")
MATMUL_SHARE = 0.65  # of the peak, in the products of a GPT-2; see docs/planning.md
CPU = "cpu"
#: (rows, inner, columns) of the products that are timed: one of GPT-2 124M, and one that fills a large GPU
PRODUCTS = ((2048, 768, 3072), (8192, 8192, 8192))
MEASURING_SECONDS = 0.2  # for each product, at most ten of it
_NUMBERS = ("memory_gb", "bandwidth_gb_s", "matmul_share", "dollars_per_hour")
_KEYS = (*_NUMBERS, "peak_tflops", "torch_names")


@dataclass(frozen=True)
class Device:
    """One GPU, or the CPU of this machine. What is None or missing is not known.

    `peak_flops` is dense, per second, by precision; `bandwidth` is in bytes a second; `matmul_share` is an assumption.
    """

    name: str
    memory_bytes: int | None = None
    bandwidth: float | None = None
    peak_flops: dict[str, float] = field(default_factory=dict)
    matmul_share: float = MATMUL_SHARE
    dollars_per_hour: float | None = None
    torch_names: tuple[str, ...] = ()

    @property
    def is_cpu(self) -> bool:
        return self.name == CPU

    @property
    def precision(self) -> str:
        """What training computes in: bf16 where there are units for it, else fp16 on a GPU, else fp32."""
        if self.is_cpu:
            import torch

            return "bf16" if torch.cpu._is_amx_tile_supported() else "fp32"
        return next((name for name in PRECISIONS if name in self.peak_flops), "fp32")


def read_devices(path: str | Path | None = None) -> dict[str, Device]:
    """The devices by name: those of rorchat, and those of `path`, which replace the ones they share a name with.

    Raises:
        UsageError: the file cannot be read, or says something that no device has.
    """
    devices = _read(DEVICES)
    return devices | _read(Path(path)) if path else devices


def _read(path: Path) -> dict[str, Device]:
    table = read_yaml(path, "devices file", UsageError, example=DEVICES)
    if not all(isinstance(entry, dict) for entry in table.values()):
        raise UsageError(f"{path} must hold `NAME: {{memory_gb: ..., peak_tflops: ...}}` lines, as {DEVICES} does.")
    return {str(name): _device(str(name), entry, path) for name, entry in table.items()}


def _device(name: str, entry: dict, path: Path) -> Device:
    for key in entry:
        if key not in _KEYS:
            raise UsageError(f"{path}: {name}: unknown key {key!r}.{did_you_mean(str(key), _KEYS)}")
    peaks = entry.get("peak_tflops", {})
    if not isinstance(peaks, dict) or set(peaks) - set(PRECISIONS):
        raise UsageError(f"{path}: {name}: peak_tflops is {peaks!r}; expected figures for {', '.join(PRECISIONS)}.")
    figures = {key: entry[key] for key in _NUMBERS if key in entry}
    for key, value in {**figures, **{f"peak_tflops.{key}": value for key, value in peaks.items()}}.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
            raise UsageError(f"{path}: {name}: {key} is {value!r}; expected a positive number.")
    if figures.get("matmul_share", 1) > 1:
        raise UsageError(f"{path}: {name}: matmul_share is {figures['matmul_share']}: a share is at most 1.")
    return Device(
        name=name,
        memory_bytes=round(figures["memory_gb"] * 1e9) if "memory_gb" in figures else None,
        bandwidth=figures["bandwidth_gb_s"] * 1e9 if "bandwidth_gb_s" in figures else None,
        peak_flops={precision: peak * 1e12 for precision, peak in peaks.items()},
        matmul_share=figures.get("matmul_share", MATMUL_SHARE),
        dollars_per_hour=figures.get("dollars_per_hour"),
        torch_names=tuple(map(str, entry.get("torch_names", ()))),
    )


def find_device(name: str, path: str | Path | None = None) -> Device:
    """The device of that name, in any case; `cpu` has this machine's memory, unless the file says another.

    Raises:
        UsageError: there is none; names the nearest.
    """
    devices = read_devices(path)
    by_case = {known.lower(): known for known in devices}
    if name.lower() not in by_case:
        near = [known for known in devices if known.lower().startswith(name.lower())] or devices
        raise UsageError(
            f"No device {name!r}.{did_you_mean(name.upper(), near)} Known: {', '.join(devices)}. "
            "To add one, give a file like rorchat/devices.yaml with --devices."
        )
    device = devices[by_case[name.lower()]]
    return _with_own_memory(device) if device.is_cpu else device


def _with_own_memory(device: Device) -> Device:
    if device.memory_bytes:
        return device
    return Device(**{**vars(device), "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")})


def detect_device(path: str | Path | None = None) -> Device:
    """The first GPU of this machine, or its CPU. Of a GPU that the table lacks, only name and memory are known."""
    import torch

    if not torch.cuda.is_available():
        return find_device(CPU, path)
    name = torch.cuda.get_device_name()
    named = match_torch_name(name, read_devices(path))
    return named or Device(name, memory_bytes=torch.cuda.get_device_properties(0).total_memory)


def match_torch_name(torch_name: str, devices: dict[str, Device]) -> Device | None:
    """The device that torch calls so. To the last letter: an L40 is no L4, and a laptop's RTX 4090 no RTX 4090."""
    for device in devices.values():
        if any(re.search(rf"(?<!\w){re.escape(known)}$", torch_name) for known in device.torch_names):
            return device
    return None


@functools.cache
def get_peak_flops(precision: str, on_gpu: bool = True) -> tuple[float, str]:
    """FLOP/s of dense products on this machine's device, which MFU is a share of, and "known" or "measured".

    Known for the GPUs of the table; else the best of up to ten matrix products, within half a second, once a process.

    Args:
        precision: "bf16", "fp16" or "fp32".
        on_gpu: of the GPU, if there is one; else of the CPU.
    """
    import torch

    if precision not in PRECISIONS:
        raise UsageError(f"No precision {precision!r}. Known: {', '.join(PRECISIONS)}.")
    on_gpu = on_gpu and torch.cuda.is_available()
    known = detect_device().peak_flops.get(precision) if on_gpu else None
    return (known, "known") if known else (_measured_flops(precision, "cuda" if on_gpu else CPU), "measured")


def _measured_flops(precision: str, where: str) -> float:
    import torch

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    best = 0.0
    for rows, inner, columns in PRODUCTS:
        flops = 2.0 * rows * inner * columns
        if best and flops / best > MEASURING_SECONDS / 4:
            break  # the smaller one has kept this device busy
        left = torch.randn(rows, inner, device=where).to(dtype)
        right = torch.randn(inner, columns, device=where).to(dtype)
        best = max(best, flops / _best_seconds(lambda a=left, b=right: a @ b, where))
    return best


@functools.cache
def measure_bandwidth() -> float:
    """Bytes a second that this machine's CPU reads and writes while it copies 128 MB."""
    import torch

    source = torch.ones(2**25, device=CPU)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best_seconds(lambda: target.copy_(source), CPU)


def _best_seconds(work, where: str) -> float:
    """The shortest of up to ten times, after one that warms up."""
    import torch

    def timed() -> float:
        started = time.perf_counter()
        work()
        if where == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    timed()
    times, until = [], time.perf_counter() + MEASURING_SECONDS
    while not times or (len(times) < 10 and time.perf_counter() < until):
        times.append(timed())
    return min(times)
