"""The table of devices, names in torch, and measured peaks."""

import os
import subprocess
import sys
import time

import pytest

from rorchat import device as device_module
from rorchat.device import (
    DEVICES_FILE,
    detect_device,
    find_device,
    get_peak_flops,
    match_torch_name,
    measure_bandwidth,
    read_devices,
)
from rorchat.errors import UsageError


def test_every_gpu_has_all_figures_and_no_emulated_precision():
    devices = read_devices()
    gpus = {name: device for name, device in devices.items() if name != "cpu"}
    assert len(gpus) >= 20
    for device in gpus.values():
        assert device.memory_bytes >= 16e9 and device.bandwidth >= 3e11 and 0 < device.dollars_per_hour < 10
        assert device.peak_flops["fp16"] > device.peak_flops["fp32"] > 8e12
        assert device.torch_names
    assert {name for name, device in gpus.items() if device.precision == "fp16"} == {"T4", "V100", "V100-32", "P100"}
    assert devices["A100-80"].peak_flops["bf16"] == 312e12 and devices["H100"].peak_flops["bf16"] == 989e12


@pytest.mark.parametrize(
    ("torch_name", "name"),
    [
        ("Tesla T4", "T4"),
        ("Tesla V100-SXM2-32GB", "V100-32"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40", None),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA A40", "A40"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX6000-Ada"),
        ("NVIDIA H100 NVL", "H100-NVL"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA A100 80GB PCIe", "A100-80"),
        ("NVIDIA A100-SXM4-40GB", "A100-40"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ],
)
def test_a_torch_name_is_matched_to_its_end(torch_name, name):
    device = match_torch_name(torch_name, read_devices())
    assert (device and device.name) == name


def test_a_users_file_adds_and_replaces_devices(tmp_path):
    path = tmp_path / "devices.yaml"
    path.write_text("T4: {memory_gb: 15, peak_tflops: {fp16: 60}}\nMine: {memory_gb: 8, dollars_per_hour: 0.1}\n")
    assert find_device("t4", path).peak_flops == {"fp16": 60e12}
    assert find_device("t4", path).bandwidth is None
    assert find_device("mine", path).memory_bytes == 8e9
    assert find_device("L4", path) == find_device("L4")
    assert find_device("T4").memory_bytes == 16e9


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("T4: {memory: 16}", "unknown key 'memory'. Did you mean 'memory_gb'?"),
        ("T4: {memory_gb: 0}", "T4: memory_gb is 0; expected a positive number"),
        ("T4: {memory_gb: .nan}", "memory_gb is nan"),
        ("T4: {memory_gb: true}", "memory_gb is True"),
        ("T4: {peak_tflops: {int8: 130}}", "expected figures for bf16, fp16, fp32"),
        ("T4: {peak_tflops: {fp16: -1}}", "peak_tflops.fp16 is -1"),
        ("T4: {matmul_share: 65}", "expected a share of at most 1"),
        ("T4: 16", "must be"),
        ("- T4", "devices.yaml"),
        ("T4: {", "is not YAML"),
    ],
)
def test_an_invalid_file_is_refused_in_one_line(tmp_path, text, message):
    path = tmp_path / "devices.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as refused:
        read_devices(path)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_an_unknown_device_is_refused_with_the_available_ones(tmp_path):
    with pytest.raises(UsageError, match="No device 'A100'. Did you mean 'A100-[48]0'.*Available: T4, V100"):
        find_device("A100")
    with pytest.raises(UsageError, match="Cannot read the devices .*none.yaml: No such file"):
        read_devices(tmp_path / "none.yaml")


def test_the_cpu_has_the_memory_of_this_machine(tmp_path):
    assert find_device("cpu").memory_bytes == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    path = tmp_path / "devices.yaml"
    path.write_text("cpu: {memory_gb: 4}\n")
    assert find_device("cpu", path).memory_bytes == 4e9


def test_the_peak_of_a_cpu_is_measured_once_and_quickly(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    get_peak_flops.cache_clear()
    started = time.process_time()
    flops, source = get_peak_flops("fp32")
    assert time.process_time() - started < 3  # of CPU, over two threads
    assert source == "measured" and 1e9 < flops < 1e14
    monkeypatch.setattr(device_module, "measure_flops", lambda precision, where: 1 / 0)
    assert get_peak_flops("fp32") == (flops, "measured")
    assert 1e8 < measure_bandwidth() < 1e13
    with pytest.raises(UsageError, match="No precision 'tf32'"):
        get_peak_flops("tf32")


@pytest.mark.parametrize("fastest", [1, 3, 5])
def test_the_measured_peak_is_that_of_the_fastest_product(monkeypatch, fastest):
    """Every product runs at 1e12 FLOP/s, but one, as on a CPU whose caches suit one shape, at 1.5e12."""
    speeds, timed = [1.5e12 if index == fastest else 1e12 for index in range(7)], []

    def time_product(work, where: str) -> float:
        left, right = work.args
        timed.append((*left.shape, right.shape[1]))
        return 2.0 * left.shape[0] * left.shape[1] * right.shape[1] / speeds[len(timed) - 1]

    monkeypatch.setattr(device_module, "time_fastest", time_product)
    assert device_module.measure_flops("fp32", "cpu") == pytest.approx(1.5e12)
    assert timed == [*device_module.TIMED_PRODUCTS[:-1]]  # the last one would take a second


def test_a_product_that_takes_long_is_not_timed(monkeypatch):
    timed = []
    monkeypatch.setattr(device_module, "time_fastest", lambda work, where: timed.append(work) or 0.5)
    assert device_module.measure_flops("fp32", "cpu") == 2 * 512 * 256 * 1024 / 0.5 and len(timed) == 1


def test_listed_gpus_are_known_and_others_are_measured(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100-SXM4-80GB")
    get_peak_flops.cache_clear()
    assert detect_device() == find_device("A100-80")
    assert get_peak_flops("bf16") == (312e12, "known")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA B300 SXM6 AC")
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: type("Properties", (), {"total_memory": 5})()
    )
    monkeypatch.setattr(device_module, "measure_flops", lambda precision, where: 7e14)
    get_peak_flops.cache_clear()
    assert detect_device().name == "NVIDIA B300 SXM6 AC" and detect_device().memory_bytes == 5
    assert get_peak_flops("bf16") == (7e14, "measured")
    get_peak_flops.cache_clear()


def test_reading_the_table_imports_no_torch():
    code = "import sys, rorchat.device as d; d.find_device('T4'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert DEVICES_FILE.is_file()
