"""What a run trains on, in one line; torch.compile where it works. There is no GPU: it is simulated."""

import re
from types import SimpleNamespace

import pytest
import torch

from rorchat.training import pretrain, runtime
from rorchat.training.arguments import parse
from rorchat.training.dpo import DPOArguments
from rorchat.training.grpo import GRPOArguments
from rorchat.training.pretrain import PretrainArguments
from rorchat.training.run_folder import RunFolder
from rorchat.training.runtime import describe_runtime, find_compile_problem, find_precision, works_compiled
from rorchat.training.sft import SFTArguments

FLAGS = ["--sources", "tinytown=9", "--max_steps", "3", "--use_cpu", "true"]
MODEL = ["--model", "gpt2"]


@pytest.mark.parametrize(
    ("kind", "flags", "attention"),
    [
        (PretrainArguments, [], "SDPA (flash)"),
        (SFTArguments, MODEL, "SDPA (flash, by sequence)"),
        (DPOArguments, MODEL, "SDPA (flash, by sequence)"),
        (GRPOArguments, MODEL, "SDPA (flash)"),
    ],
)
def test_every_stage_says_what_it_trains_on(kind, flags, attention, tmp_path):
    arguments = parse(kind, [*FLAGS, *flags, "--output_dir", str(tmp_path)])
    threads = torch.get_num_threads()
    figures = r"\((bf16|fp32) [\d.,]+, (bf16|fp32) [\d.,]+ GFLOP/s on one core\)"
    expected = rf"device: CPU with {threads} threads?, (bf16|fp32) {figures}, {re.escape(attention)}, eager, 1 process"
    assert re.fullmatch(expected, describe_runtime(arguments))
    given = parse(kind, [*FLAGS, *flags, "--output_dir", str(tmp_path), "--bf16", "false"])
    assert ", fp32, SDPA" in describe_runtime(given)


@pytest.mark.parametrize(
    ("record", "kept"),
    [
        ('{"device": "cpu", "precision": "bf16"}', "bf16"),
        ('{"device": "cpu", "precision": "fp32"}', "fp32"),
        ('{"device": "cuda", "precision": "bf16"}', None),
        ('{"device": "cpu", "precision": "int8"}', None),
        ('{"device": "cpu"}', None),
        ("[]", None),
        ("{", None),
    ],
)
def test_a_resumed_run_keeps_its_precision_on_a_device_of_the_same_kind(record, kept, tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "measure_precisions", lambda device, width: {"bf16": float(width), "fp32": 64.0})
    assert find_precision(tmp_path, "cpu", 128)[0] == "bf16" and find_precision(tmp_path, "cpu", 64)[0] == "fp32"
    (tmp_path / "run.json").write_text(record, encoding="utf-8")
    expected = (kept, "as before") if kept else ("fp32", "bf16 6.4e-08, fp32 6.4e-08 GFLOP/s on one core")
    assert find_precision(tmp_path, "cpu", 64) == expected


def test_a_start_prints_the_line_once(tmp_path, capsys):
    arguments = parse(SFTArguments, [*FLAGS, *MODEL, "--output_dir", str(tmp_path / "run")])
    with RunFolder(arguments, "sft", {}) as run:
        run.begin()
        run.finish({"metrics": {}})
    assert capsys.readouterr().err.splitlines() == [describe_runtime(arguments)]
    with RunFolder(arguments, "sft", {}):  # finished: nothing is trained
        assert "device:" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("capability", "precision", "layout", "attention"),
    [
        ((8, 0), "bf16", "packed", "flash attention of variable length"),
        ((7, 5), "fp16", "packed", "SDPA (memory-efficient, by sequence)"),
        ((8, 0), "fp32", "packed", "SDPA (memory-efficient, by sequence)"),
        ((8, 0), "bf16", "full", "SDPA (memory-efficient)"),
    ],
)
def test_the_line_of_a_gpu_has_its_name_and_kernel(capability, precision, layout, attention, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *_, **__: 2)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device, dtype: zeros(*size))
    arguments = SimpleNamespace(
        device=torch.device("cuda"),
        precision=precision,
        row_layout=layout,
        is_compiled=True,
        world_size=8,
        precision_reason="as before",
    )
    expected = f"device: NVIDIA A100-SXM4-80GB, {precision} (as before), {attention}, torch.compile, 8 processes"
    assert describe_runtime(arguments) == expected


def break_compiler(monkeypatch, error: Exception) -> None:
    def compile_model(function, **_):
        def call(*_):
            raise error

        return call

    monkeypatch.setattr(torch, "compile", compile_model)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            RuntimeError("Triton Error [CUDA]: device kernel image is invalid"),
            "Triton Error [CUDA]: device kernel image",
        ),
        (FileNotFoundError(2, "No such file or directory", "gcc"), "'gcc'"),
        (ImportError("cannot import name 'triton_key'"), "cannot import name 'triton_key'"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_without_a_working_triton_the_run_is_eager_and_says_so_once(error, reason, monkeypatch, capsys):
    break_compiler(monkeypatch, error)
    problem = find_compile_problem(torch.device("cpu"))
    assert reason in problem and "\n" not in problem
    monkeypatch.setattr(runtime, "find_compile_problem", lambda device: problem)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert not works_compiled(on_gpu=True)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"torch.compile does not work on Tesla T4 ({problem}): training in eager mode, which is slower"
    monkeypatch.setenv("RANK", "1")
    assert not works_compiled(on_gpu=True) and capsys.readouterr().err == ""


def test_a_working_compiler_is_used_and_on_a_cpu_nothing_is_tried(monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    assert find_compile_problem(torch.device("cpu")) == ""
    break_compiler(monkeypatch, RuntimeError("not called"))
    assert works_compiled(on_gpu=False) and capsys.readouterr().err == ""


@pytest.mark.parametrize("works", [True, False])
def test_pretraining_compiles_only_if_that_works(works, monkeypatch, tmp_path):
    monkeypatch.setattr(pretrain, "works_compiled", lambda on_gpu: works)
    arguments = parse(PretrainArguments, [*FLAGS, "--compile", "true", "--output_dir", str(tmp_path)])
    assert (arguments.compile, arguments.is_compiled) == (works, works)
    assert not parse(PretrainArguments, [*FLAGS, "--output_dir", str(tmp_path)]).compile
