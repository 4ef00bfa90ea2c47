"""recipes/accelerate: Accelerate reads every file, and starts it as far as a machine without GPUs allows.

Runs with one or several processes on a CPU train to the end. FSDP and DeepSpeed stop where they need a GPU or the
DeepSpeed package; the parts that need neither are tested separately.
"""

import contextlib
import copy
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin, patch_environment
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)
from recipe_commands import ENVIRONMENT, command, inside, metrics_of, refused, succeeded
from support import ROOT

from rorchat.errors import UsageError
from rorchat.stories import ACCELERATE_FOLDER
from rorchat.training import gpu
from rorchat.training.distributed import check_sharding, gather_model
from rorchat.training.gpu import find_wanted_gpu
from rorchat.training.launcher import TORCHRUN_ID

FILES = sorted(ACCELERATE_FOLDER.glob("*.yaml"))
# File -> (distributed type, processes, machines)
EXPECTED = {
    "cpu": ("MULTI_GPU", 2, 1),
    "ddp": ("MULTI_GPU", 8, 1),
    "deepspeed_zero2": ("DEEPSPEED", 8, 1),
    "deepspeed_zero3": ("DEEPSPEED", 8, 1),
    "fsdp": ("FSDP", 8, 1),
    "multi_node": ("MULTI_GPU", 16, 2),
    "one_gpu": ("NO", 1, 1),
    "one_process": ("NO", 1, 1),
}
ON_CPU = ("--use_cpu", "true")
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="tests a machine without a GPU")


def config(name: str) -> Path:
    return ACCELERATE_FOLDER / f"{name}.yaml"


def launcher_arguments(name: str, *flags: str):
    """The launcher's arguments after it has read a configuration."""
    flags_and_script = ["--config_file", str(config(name)), *flags, "recipes/pretrain.py"]
    arguments, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(flags_and_script))
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ",".join([*defaults.deepspeed_config, "mixed_precision"])
    return arguments


@pytest.fixture(scope="module")
def tokenizer_folder(tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("accelerate") / "tokenizer"
    tokenizer.save_pretrained(folder)
    return folder


def tiny_run(tokenizer_folder: Path, output: Path, *more: object) -> list[str]:
    """Flags of a pretraining run of five steps."""
    flags = [
        "--sources", "tinytown=200", "--tokenizer", tokenizer_folder, "--size", "2x2x32", "--block_size", 64,
        "--per_device_train_batch_size", 2, "--global_batch_tokens", 512, "--max_steps", 5, "--logging_steps", 1,
        "--validation_share", 0.05, "--bf16", "false", "--eval_steps", 5, "--lr_scheduler_type", "constant",
        "--output_dir", output, *more,
    ]  # fmt: skip
    return list(map(str, flags))


def launch(name: str, *recipe_flags: object, flags: tuple = ()) -> subprocess.Popen:
    launcher = ["accelerate", "launch", "--quiet", "--config_file", config(name), *flags]
    command = [*launcher, "recipes/pretrain.py", *recipe_flags]
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=ENVIRONMENT
    )


def wait(process: subprocess.Popen) -> subprocess.CompletedProcess:
    out, errors = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, errors)


def read_results(run: Path) -> tuple[list[float], float, int]:
    """(losses of five steps, validation loss, validation tokens)"""
    losses = [record["loss"] for record in metrics_of(run) if "loss" in record]
    metrics = json.loads((run / "run.json").read_text())["metrics"]
    return losses, metrics["eval_loss"], metrics["eval_tokens"]


@pytest.fixture(scope="module")
def one_process(tokenizer_folder, tmp_path_factory) -> tuple[list[float], float, int]:
    """The results of one process without a launcher."""
    output = tmp_path_factory.mktemp("one_process") / "run"
    assert inside("pretrain", *tiny_run(tokenizer_folder, output)).returncode == 0
    return read_results(output)


def check_equal(results: tuple, one_process: tuple) -> None:
    assert len(results[0]) == 5 and results[0][0] != results[0][4]
    assert results[0] == pytest.approx(one_process[0], rel=1e-5)
    assert results[1] == pytest.approx(one_process[1], rel=1e-5)
    assert results[2] == one_process[2]


def test_there_is_a_file_for_every_way_of_launcher_arguments():
    assert {path.stem for path in FILES} == set(EXPECTED)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_accelerate_reads_every_file_as_expected(path):
    config = load_config_from_file(str(path))
    assert (config.distributed_type.value, config.num_processes, config.num_machines) == EXPECTED[path.stem]
    assert config.mixed_precision == "no", "the recipe chooses the precision"
    text = path.read_text()
    assert text.startswith("# ") and (path.stem == "one_process" or "# To change: " in text)
    assert path.stem == "one_process" or f"--accelerate_config {path.stem}" in text


class TestPlugins:
    """What Accelerate passes to the processes that it starts."""

    def test_fsdp2_shards_every_block(self):
        with patch_environment(**prepare_multi_gpu_env(launcher_arguments("fsdp", "--main_process_port", "0"))):
            plugin = FullyShardedDataParallelPlugin()
        assert (plugin.fsdp_version, plugin.reshard_after_forward, plugin.cpu_ram_efficient_loading) == (2, True, False)
        assert plugin.transformer_cls_names_to_wrap == ["GPT2Block"]
        assert plugin.state_dict_type.name == "FULL_STATE_DICT"

    @pytest.mark.parametrize("stage", [2, 3])
    def test_deepspeed_takes_the_stage_from_its_file_and_the_rest_from_the_recipe(self, stage):
        _, environment = prepare_deepspeed_cmd_env(
            launcher_arguments(f"deepspeed_zero{stage}", "--main_process_port", "0")
        )
        with patch_environment(**environment):
            config = DeepSpeedPlugin().deepspeed_config
        assert config["zero_optimization"]["stage"] == stage
        assert config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] == (stage == 3)
        assert config["zero_optimization"]["offload_optimizer"]["device"] == "none"
        for name in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
            assert config[name] == "auto"
        assert config["gradient_clipping"] == "auto"

    def test_multi_node_divides_processes_among_machines(self):
        arguments = launcher_arguments("multi_node", "--main_process_ip", "10.0.0.1", "--machine_rank", "1")
        prepare_multi_gpu_env(arguments)
        assert (arguments.nnodes, arguments.nproc_per_node, arguments.node_rank) == ("2", "8", 1)
        assert arguments.rdzv_endpoint == "10.0.0.1:29500"

    def test_cpu_hides_the_gpus(self):
        assert prepare_multi_gpu_env(launcher_arguments("cpu"))["CUDA_VISIBLE_DEVICES"] == "-1,-1"


class TestPrecision:
    """The precision of the recipe takes precedence over that of the launcher."""

    @pytest.mark.parametrize(
        ("launcher", "bf16", "expected"), [("no", True, "bf16"), ("no", False, "no"), ("fp16", True, "bf16")]
    )
    def test_accelerator_has_the_precision_of_the_recipe(self, launcher, bf16, expected, chat, tmp_path, monkeypatch):
        from transformers import Trainer, TrainingArguments

        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
        arguments = TrainingArguments(str(tmp_path), bf16=bf16, use_cpu=True, report_to="none")
        assert Trainer(chat.model, arguments).accelerator.mixed_precision == expected


@pytest.mark.slow
def test_two_processes_on_a_cpu_equal_one(tokenizer_folder, one_process, tmp_path):
    succeeded(wait(launch("cpu", *tiny_run(tokenizer_folder, tmp_path / "run"))))
    check_equal(read_results(tmp_path / "run"), one_process)
    tokens = [record["tokens"] for record in metrics_of(tmp_path / "run") if "loss" in record]
    assert tokens == [512, 1024, 1536, 2048, 2560]


@pytest.mark.slow
@needs_no_gpu
def test_two_machines_equal_one_process(tokenizer_folder, one_process, tmp_path):
    """Two launchers on this machine with one process each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ("--num_processes", 2, "--main_process_port", port, "--machine_rank")
    nodes = [
        launch("multi_node", *tiny_run(tokenizer_folder, tmp_path / "run", *ON_CPU), flags=(*flags, rank))
        for rank in (0, 1)
    ]
    for node in nodes:
        succeeded(wait(node))
    check_equal(read_results(tmp_path / "run"), one_process)


@pytest.mark.slow
@needs_no_gpu
@pytest.mark.parametrize(("name", "flags"), [("one_gpu", ()), ("ddp", ("--num_processes", 2))])
def test_configurations_for_gpus_run_on_cpus_if_asked_to(name, flags, tokenizer_folder, one_process, tmp_path):
    succeeded(wait(launch(name, *tiny_run(tokenizer_folder, tmp_path / "run", *ON_CPU), flags=flags)))
    check_equal(read_results(tmp_path / "run"), one_process)


@pytest.mark.slow
@needs_no_gpu
@pytest.mark.parametrize(("name", "flags"), [("one_gpu", ()), ("ddp", ("--num_processes", 2))])
def test_configurations_for_gpus_are_refused_without_a_gpu(name, flags, tokenizer_folder, tmp_path):
    done = wait(launch(name, *tiny_run(tokenizer_folder, tmp_path / "run"), flags=flags))
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode != 0 and len(errors) == 1 and "--use_cpu true" in errors[0], done.stderr[-2000:]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "wants_gpu"),
    [("one_gpu", True), ("ddp", True), ("multi_node", True), ("fsdp", True), ("cpu", False), ("one_process", False)],
)
def test_only_configurations_for_gpus_ask_for_one(name, wants_gpu, tmp_path, monkeypatch):
    """What the processes of each configuration see, on a machine without a GPU."""
    monkeypatch.setattr(gpu, "NVIDIA_DRIVER", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))  # without nvidia-smi
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    arguments = launcher_arguments(name, "--main_process_port", "0", "--main_process_ip", "127.0.0.1")
    if arguments.num_processes == 1:
        _, environment = prepare_simple_launcher_cmd_env(arguments)
    else:
        environment = prepare_multi_gpu_env(arguments) | {TORCHRUN_ID: "none"}
    with patch_environment(**environment):
        assert bool(find_wanted_gpu()) == wants_gpu


class TestSharding:
    @pytest.mark.slow
    @needs_no_gpu
    def test_fsdp_without_gpus_is_refused(self, tokenizer_folder, tmp_path):
        done = wait(launch("fsdp", *tiny_run(tokenizer_folder, tmp_path / "run"), flags=("--num_processes", 1)))
        assert done.returncode != 0
        assert [line for line in done.stderr.splitlines() if line.startswith("error:")] == [
            "error: FSDP needs GPUs, and there is none. To try several processes on CPUs: --accelerate_config cpu."
        ]
        assert not (tmp_path / "run").exists()

    @pytest.mark.slow
    @pytest.mark.parametrize("stage", [2, 3])
    def test_deepspeed_that_is_not_installed_is_reported(self, stage, tokenizer_folder, tmp_path):
        try:
            import deepspeed  # noqa: F401

            pytest.skip("tests an environment without DeepSpeed")
        except ImportError:
            done = wait(launch(f"deepspeed_zero{stage}", *tiny_run(tokenizer_folder, tmp_path / "run")))
            assert done.returncode != 0 and "DeepSpeed is not installed" in done.stderr

    @pytest.mark.parametrize(
        ("environment", "method"),
        [
            ({"ACCELERATE_USE_FSDP": "true"}, "FSDP"),
            ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, "ZeRO-2"),
            ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "ZeRO-3"),
        ],
    )
    def test_muon_with_sharding_is_refused(self, environment, method, tokenizer_folder, tmp_path, monkeypatch):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        done = inside("pretrain", *tiny_run(tokenizer_folder, tmp_path / "run", "--optimizer", "muon"))
        refused(done, 2, "muon", f"cannot be sharded by {method}", "--optimizer adamw")

    def test_sharded_checkpoints_are_refused(self, monkeypatch):
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        arguments = {"fsdp": None, "deepspeed": None, "optimizer": "adamw"}
        check_sharding(SimpleNamespace(**arguments, save_strategy="no"))
        with pytest.raises(UsageError, match="save_strategy is steps.*--save_strategy no"):
            check_sharding(SimpleNamespace(**arguments, save_strategy="steps"))

    @pytest.mark.slow
    def test_a_sharded_model_has_the_loss_and_gradients_of_a_whole_one(self):
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "tests/sharded.py"]
        done = command("python", *launch, CUDA_VISIBLE_DEVICES="")
        difference = json.loads(succeeded(done).stdout.splitlines()[-1])
        assert difference["sharded"] == difference["parameters"] == 28
        assert difference["loss"] < 1e-6 and difference["gradients"] < 1e-5 and difference["logits"] < 1e-6
        assert 0 <= difference["norm"] < 1e-5
        assert difference["type"] == "GPT2LMHeadModel"

    def test_zero_3_gathers_the_weights_through_deepspeed(self, chat, monkeypatch):
        """A stand-in for DeepSpeed restores the weights of parameters while its context is entered."""
        model = copy.deepcopy(chat.model)
        full = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

        @contextlib.contextmanager
        def gathered(parameters):
            assert len(parameters) == len(full)
            for name, parameter in model.named_parameters():
                parameter.data = full[name].clone()
            yield
            for parameter in parameters:
                parameter.data = torch.empty(0)

        for number, parameter in enumerate(model.parameters()):
            parameter.ds_id, parameter.data = number, torch.empty(0)
        monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace())
        monkeypatch.setitem(sys.modules, "deepspeed.zero", SimpleNamespace(GatheredParameters=gathered))
        whole = gather_model(model)
        ids = torch.arange(20)[None]
        with torch.no_grad():
            assert torch.equal(whole(ids).logits, chat.model(ids).logits)
        assert all(parameter.numel() == 0 for parameter in model.parameters())

    def test_a_model_that_is_not_sharded_is_returned_unchanged(self, chat):
        assert gather_model(chat.model) is chat.model


@needs_no_gpu
def test_several_processes_without_a_gpu_use_gloo(monkeypatch):
    from rorchat.training.distributed import use_gloo_on_cpu

    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    use_gloo_on_cpu()
    assert "ACCELERATE_USE_CPU" not in os.environ
    monkeypatch.setenv("WORLD_SIZE", "2")
    use_gloo_on_cpu()
    assert os.environ["ACCELERATE_USE_CPU"] == "true"
