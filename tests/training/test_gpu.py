"""A run never trains on the CPU by mistake, nor on a GPU that PyTorch does not serve. The GPU is simulated."""

import re
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import patch_environment
from support import command

from rorchat.errors import UsageError
from rorchat.training import gpu
from rorchat.training.arguments import parse
from rorchat.training.gpu import check_gpu, find_wanted_gpu, has_kernels, require_no_gpu_wanted, run_first_kernel
from rorchat.training.launcher import TORCHRUN_ID
from rorchat.training.pretrain import PretrainArguments
from rorchat.training.sft import SFTArguments

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="tests a machine without a GPU")
FLAGS = ["--sources", "tinytown=9", "--output_dir", "x", "--bf16", "false"]
LAUNCHED = {TORCHRUN_ID: "1", "ACCELERATE_MIXED_PRECISION": "no"}  # as `accelerate launch` with ddp.yaml sets them
INFORMATION = "Model: \t\t Tesla V100-SXM2-16GB\nIRQ:   \t\t 62\nGPU UUID: \t GPU-1234\n"


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """A machine without a driver, and an environment without the variables of launchers; its folders may be filled."""
    for name in ("CUDA_VISIBLE_DEVICES", "ACCELERATE_USE_CPU", *LAUNCHED):
        monkeypatch.delenv(name, raising=False)
    tools = tmp_path / "tools"
    tools.mkdir()
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setattr(gpu, "NVIDIA_DRIVER", tmp_path / "nvidia")
    return SimpleNamespace(tools=tools, driver=tmp_path / "nvidia")


def install_driver(machine) -> None:
    (machine.driver / "gpus" / "0000:00:1e.0").mkdir(parents=True)
    (machine.driver / "gpus" / "0000:00:1e.0" / "information").write_text(INFORMATION)


def install_tool(machine, script: str) -> None:
    tool = machine.tools / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, ""),
        ({"CUDA_VISIBLE_DEVICES": "0"}, "CUDA_VISIBLE_DEVICES is 0, which names a GPU"),
        ({"CUDA_VISIBLE_DEVICES": "GPU-1234,GPU-5678"}, "CUDA_VISIBLE_DEVICES is GPU-1234,GPU-5678"),
        (LAUNCHED, "The configuration of accelerate launch is for GPUs"),
        (LAUNCHED | {"CUDA_VISIBLE_DEVICES": "-1,-1"}, ""),  # cpu.yaml
        ({"CUDA_VISIBLE_DEVICES": ""}, ""),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, ""),  # Slurm, for a job without GPUs
        ({TORCHRUN_ID: "1"}, ""),  # torchrun starts processes on CPUs too
        ({"ACCELERATE_MIXED_PRECISION": "no"}, ""),  # one process: a CPU or a GPU
    ],
)
def test_variables_say_whether_a_gpu_is_wanted(environment, wanted, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = find_wanted_gpu()
    assert found.startswith(wanted) and bool(found) == bool(wanted)


def test_a_gpu_of_the_driver_is_wanted_unless_it_is_hidden(machine, monkeypatch):
    machine.driver.mkdir()  # a driver without a GPU
    assert find_wanted_gpu() == ""
    install_driver(machine)
    assert find_wanted_gpu() == "This machine has a GPU (Tesla V100-SXM2-16GB)"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert find_wanted_gpu() == ""


@pytest.mark.parametrize(
    ("script", "name"),
    [
        ('echo "GPU 0: Tesla T4 (UUID: GPU-12)"; echo "GPU 1: Tesla T4 (UUID: GPU-34)"', "Tesla T4"),
        ('echo "GPU 0: NVIDIA GeForce RTX 4090"', "NVIDIA GeForce RTX 4090"),
        ('echo "NVIDIA-SMI has failed because it couldn\'t communicate with the NVIDIA driver."; exit 9', ""),
        ("exit 127", ""),
    ],
)
def test_a_gpu_that_nvidia_smi_lists_is_wanted(script, name, machine):
    install_tool(machine, script)
    assert find_wanted_gpu() == (f"This machine has a GPU ({name})" if name else "")


def fail(message: str, kind: type = RuntimeError):
    def raising(*_):
        raise kind(message)

    return raising


@pytest.mark.parametrize(
    ("cuda", "init", "reason"),
    [
        (None, None, f"its build {torch.__version__} is for CPUs only"),
        (
            "13.0",
            fail("The NVIDIA driver on your system is too old (found version 12020). Please update " + "it " * 200),
            "The NVIDIA driver on your system is too old (found version 12020).",
        ),
        ("13.0", fail("Found no NVIDIA driver on your system."), "Found no NVIDIA driver on your system (PyTorch"),
        ("13.0", lambda: None, "it finds no device; in a container, start it with --gpus all"),
    ],
)
def test_a_wanted_gpu_that_is_missing_is_refused_with_the_reason(cuda, init, reason, machine, monkeypatch):
    install_driver(machine)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "init", init)
    with pytest.raises(UsageError) as refused:
        require_no_gpu_wanted()
    message = str(refused.value)
    assert message.startswith("This machine has a GPU (Tesla V100-SXM2-16GB), but PyTorch finds none that it can use: ")
    assert reason in message and message.endswith("or train on the CPU with --use_cpu true.") and "\n" not in message
    assert ("whl/cu126" in message) == (cuda is not None) and len(message) < 600


@needs_no_gpu
@pytest.mark.parametrize(("device", "is_told"), [([], True), (["--device", "T4"], False)])
def test_a_plan_for_the_cpu_of_a_machine_with_a_gpu_says_so(device, is_told, machine):
    flags = ["--tokens", 1e6, "--size", "demo", "--vocabulary", 1024, "--block_size", 256, "--yaml", *device]
    assert command("plan", *flags).stderr == ""
    install_driver(machine)
    done = command("plan", *flags)
    assert done.returncode == 0, done.stderr
    (*_, line) = done.stderr.splitlines() or [""]
    told = "warning: This machine has a GPU (Tesla V100-SXM2-16GB), but PyTorch finds none that it can use: "
    assert line.startswith(told) == is_told and ("This plan is for the CPU" in line) == is_told


@needs_no_gpu
@pytest.mark.parametrize("kind", [PretrainArguments, SFTArguments])
def test_settings_are_refused_where_a_gpu_is_wanted_and_accepted_for_the_cpu(kind, machine, monkeypatch):
    flags = [*FLAGS, "--max_steps", "3"] + (["--model", "gpt2"] if kind is SFTArguments else [])
    assert parse(kind, flags).device.type == "cpu"  # a machine without a GPU needs no setting
    install_driver(machine)
    with pytest.raises(UsageError, match="--use_cpu true"):
        parse(kind, flags)
    assert parse(kind, [*flags, "--use_cpu", "true"]).device.type == "cpu"
    with patch_environment(ACCELERATE_USE_CPU="true"):  # accelerate launch --cpu
        assert parse(kind, flags).device.type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not parse(kind, flags).on_gpu


CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
CUDA_12_6 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]


@pytest.mark.parametrize(
    ("built_for", "capability", "served"),
    [
        (CUDA_13, (7, 0), False),  # V100
        (CUDA_12_6, (7, 0), True),
        (CUDA_13, (6, 0), False),  # P100
        (CUDA_12_6, (6, 1), True),  # GTX 1080: code for sm_60
        (CUDA_13, (7, 5), True),  # T4
        (CUDA_13, (8, 9), True),  # L4: code for sm_86
        (["sm_86"], (8, 0), False),
        (CUDA_12_6, (12, 0), False),  # RTX 5090
        (CUDA_13, (12, 1), True),
        (["sm_75", "compute_75"], (9, 0), True),  # compiled when it is loaded
        (["sm_90a"], (9, 0), True),
        (["sm_90a"], (10, 0), False),
        (["sm_100a"], (10, 3), False),
        (["gfx90a", "gfx942"], (9, 4), True),  # AMD: not known
        ([], (7, 0), True),
    ],
)
def test_kernels_run_on_later_devices_of_the_same_generation(built_for, capability, served):
    assert has_kernels(built_for, capability) == served


@pytest.fixture
def v100(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100-SXM2-16GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: CUDA_13)


def test_a_gpu_without_kernels_is_refused_with_the_build_that_has_them(v100):
    with pytest.raises(UsageError, match=r"no kernels for Tesla V100-SXM2-16GB \(sm_70\), only for sm_75, .*whl/cu126"):
        check_gpu(torch.device("cuda"), torch.float16)


def test_a_first_kernel_that_fails_is_refused(v100, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: CUDA_12_6)
    monkeypatch.setattr(gpu, "run_first_kernel", fail("CUDA error: no kernel image is available.\nFor debugging ..."))
    with pytest.raises(UsageError) as refused:
        check_gpu(torch.device("cuda"), torch.float16)
    assert re.match(r"A first kernel in torch.float16 fails on Tesla V100.*: CUDA error: no kernel", str(refused.value))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_kernel_draws_no_random_numbers(dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    before = torch.get_rng_state()
    run_first_kernel(torch.device("cpu"), dtype)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_the_gpu_is_tried_in_the_precision_of_the_run(precision, monkeypatch):
    tried = []
    monkeypatch.setattr("rorchat.training.arguments.check_gpu", lambda device, dtype: tried.append(dtype))
    arguments = SimpleNamespace(on_gpu=True, device=torch.device("cuda"), precision=precision, n_gpu=1)
    PretrainArguments.check_devices(arguments)
    arguments.on_gpu = False
    PretrainArguments.check_devices(arguments)
    assert tried == [{"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]]
