"""What a device can do: peak FLOP/s by precision, memory, bandwidth and price.

The figures come from `devices.yaml`, which a user's file can extend. The CPU of this machine, and GPUs that are not
listed, are measured.
"""

import functools
import math
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from rorchat.errors import UsageError, did_you_mean
from rorchat.precision import PRECISIONS, choose_precision, measure_precisions
from rorchat.yaml_file import read_yaml

DEVICES_FILE = Path(__file__).with_name("devices.yaml")
MATMUL_SHARE = 0.65  # share of the peak that the matrix products of a GPT-2 reach; see docs/planning.md
CPU = "cpu"
#: (rows, inner, columns) of the matrix products that are timed, from small to large: a device may be fastest at any of
#: them, a CPU where the matrices fit into its caches. The last one fills a large GPU.
TIMED_PRODUCTS = (
    (512, 256, 1024), (1024, 1024, 1024), (2048, 512, 2048), (2048, 768, 3072), (3072, 2048, 768), (4096, 1024, 4096),
    (8192, 8192, 8192),
)  # fmt: skip
TIMING_SECONDS = 0.1  # per product, for at most ten repetitions
_NUMBER_KEYS = ("memory_gb", "bandwidth_gb_s", "matmul_share", "dollars_per_hour")
_KEYS = (*_NUMBER_KEYS, "peak_tflops", "torch_names")


@dataclass(frozen=True)
class Device:
    """One GPU, or the CPU of this machine. Unknown figures are None or missing.

    Attributes:
        bandwidth: memory bandwidth in bytes per second.
        peak_flops: {precision: dense FLOP/s}.
        matmul_share: assumed share of the peak that matrix products reach.
        torch_names: suffixes of `torch.cuda.get_device_name()` that identify the device.
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
        """The precision used for training: bf16 if a GPU computes it fast, else fp16; that of this CPU is measured."""
        if self.is_cpu:
            return choose_precision(measure_precisions(CPU))
        return next((name for name in PRECISIONS if name in self.peak_flops), "fp32")


def read_devices(path: str | Path | None = None) -> dict[str, Device]:
    """{name: device} from `devices.yaml` and the file `path`, whose entries replace those of the same name.

    Raises:
        UsageError: the file cannot be read or has an invalid entry.
    """
    devices = _read_file(DEVICES_FILE)
    return devices | _read_file(Path(path)) if path else devices


def _read_file(path: Path) -> dict[str, Device]:
    table = read_yaml(path, "devices file", UsageError, example=DEVICES_FILE)
    if not all(isinstance(entry, dict) for entry in table.values()):
        raise UsageError(
            f"{path}: every entry must be `NAME: {{memory_gb: ..., peak_tflops: ...}}`, as in {DEVICES_FILE}."
        )
    return {str(name): _parse_device(str(name), entry, path) for name, entry in table.items()}


def _parse_device(name: str, entry: dict, path: Path) -> Device:
    for key in entry:
        if key not in _KEYS:
            raise UsageError(f"{path}: {name}: unknown key {key!r}.{did_you_mean(str(key), _KEYS)}")
    peaks = entry.get("peak_tflops", {})
    if not isinstance(peaks, dict) or set(peaks) - set(PRECISIONS):
        raise UsageError(f"{path}: {name}: peak_tflops is {peaks!r}; expected figures for {', '.join(PRECISIONS)}.")
    numbers = {key: entry[key] for key in _NUMBER_KEYS if key in entry}
    for key, value in {**numbers, **{f"peak_tflops.{key}": value for key, value in peaks.items()}}.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
            raise UsageError(f"{path}: {name}: {key} is {value!r}; expected a positive number.")
    if numbers.get("matmul_share", 1) > 1:
        raise UsageError(f"{path}: {name}: matmul_share is {numbers['matmul_share']}; expected a share of at most 1.")
    return Device(
        name=name,
        memory_bytes=round(numbers["memory_gb"] * 1e9) if "memory_gb" in numbers else None,
        bandwidth=numbers["bandwidth_gb_s"] * 1e9 if "bandwidth_gb_s" in numbers else None,
        peak_flops={precision: peak * 1e12 for precision, peak in peaks.items()},
        matmul_share=numbers.get("matmul_share", MATMUL_SHARE),
        dollars_per_hour=numbers.get("dollars_per_hour"),
        torch_names=tuple(map(str, entry.get("torch_names", ()))),
    )


def find_device(name: str, path: str | Path | None = None) -> Device:
    """The device with this name, ignoring case. `cpu` has the memory of this machine unless the file says otherwise.

    Raises:
        UsageError: there is no such device; the message names the closest ones.
    """
    devices = read_devices(path)
    names = {known.lower(): known for known in devices}
    if name.lower() not in names:
        close = [known for known in devices if known.lower().startswith(name.lower())] or devices
        raise UsageError(
            f"No device {name!r}.{did_you_mean(name.upper(), close)} Available: {', '.join(devices)}. "
            "To add one, pass a file like rorchat/devices.yaml as --devices."
        )
    device = devices[names[name.lower()]]
    if device.is_cpu and not device.memory_bytes:
        return replace(device, memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return device


def detect_device(path: str | Path | None = None) -> Device:
    """The first GPU of this machine, or its CPU. For a GPU that is not listed, only name and memory are known."""
    import torch

    if not torch.cuda.is_available():
        return find_device(CPU, path)
    name = torch.cuda.get_device_name()
    known = match_torch_name(name, read_devices(path))
    return known or Device(name, memory_bytes=torch.cuda.get_device_properties(0).total_memory)


def match_torch_name(torch_name: str, devices: dict[str, Device]) -> Device | None:
    """The device with this name in torch. The end of the name must match: an L40 is not an L4."""
    for device in devices.values():
        if any(re.search(rf"(?<!\w){re.escape(known)}$", torch_name) for known in device.torch_names):
            return device
    return None


@functools.cache
def get_peak_flops(precision: str, on_gpu: bool = True) -> tuple[float, str]:
    """The peak FLOP/s of dense matrix products on this machine, the denominator of MFU.

    The peak of a GPU that is listed in `devices.yaml` is known. Otherwise it is measured with `measure_flops`, once per
    process, in about half a second. Other processes on the machine slow the measurement down, so it may be too low.

    Args:
        precision: "bf16", "fp16" or "fp32".
        on_gpu: whether to use the GPU, if there is one, instead of the CPU.

    Returns:
        (FLOP/s, "known" or "measured").
    """
    import torch

    if precision not in PRECISIONS:
        raise UsageError(f"No precision {precision!r}. Available: {', '.join(PRECISIONS)}.")
    on_gpu = on_gpu and torch.cuda.is_available()
    known = detect_device().peak_flops.get(precision) if on_gpu else None
    return (known, "known") if known else (measure_flops(precision, "cuda" if on_gpu else CPU), "measured")


def measure_flops(precision: str, torch_device: str) -> float:
    """FLOP/s of the fastest of the TIMED_PRODUCTS."""
    import torch

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    best = 0.0
    for rows, inner, columns in TIMED_PRODUCTS:
        flops = 2.0 * rows * inner * columns
        if best and flops / best > TIMING_SECONDS / 2:
            break  # this device is slow: the smaller products already use it fully
        left = torch.randn(rows, inner, device=torch_device).to(dtype)
        right = torch.randn(inner, columns, device=torch_device).to(dtype)
        best = max(best, flops / time_fastest(partial(torch.matmul, left, right), torch_device))
    return best


@functools.cache
def measure_bandwidth() -> float:
    """Memory bandwidth of the CPU in bytes per second, reads plus writes, while it copies 128 MB."""
    import torch

    source = torch.ones(2**25, device=CPU)
    target = torch.empty_like(source)
    return 2 * source.nbytes / time_fastest(lambda: target.copy_(source), CPU)


def time_fastest(work: Callable[[], object], torch_device: str) -> float:
    """The duration in seconds of the fastest of up to ten runs of `work`, after one warm-up run."""
    import torch

    def run() -> float:
        started = time.perf_counter()
        work()
        if torch_device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    run()
    times: list[float] = []
    deadline = time.perf_counter() + TIMING_SECONDS
    while not times or (len(times) < 10 and time.perf_counter() < deadline):
        times.append(run())
    return min(times)
