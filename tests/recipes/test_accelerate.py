"""recipes/accelerate: every file is read by accelerate's own loader, and started as far as a machine without GPUs goes.

One process and several on a CPU run to the end. FSDP and DeepSpeed stop where they need GPUs, or DeepSpeed itself;
what of them works without is tested without them.
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
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from recipe_commands import ENVIRONMENT, inside, metrics_of, refused, succeeded
from support import ROOT

from rorchat.errors import UsageError
from rorchat.training.distributed import check_sharding, gather_model

FILES = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))
# What accelerate's loader finds in each: how it distributes, over how many processes and machines
MEANT = {
    "cpu": ("MULTI_GPU", 2, 1),
    "ddp": ("MULTI_GPU", 8, 1),
    "deepspeed_zero2": ("DEEPSPEED", 8, 1),
    "deepspeed_zero3": ("DEEPSPEED", 8, 1),
    "fsdp": ("FSDP", 8, 1),
    "multi_node": ("MULTI_GPU", 16, 2),
    "one_gpu": ("NO", 1, 1),
    "one_process": ("NO", 1, 1),
}
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where there is no GPU")


def config(name: str) -> Path:
    return ROOT / "recipes" / "accelerate" / f"{name}.yaml"


def launching(name: str, *flags: str):
    """The launcher's arguments after it has read a file, as it has them when it starts processes."""
    words = ["--config_file", str(config(name)), *flags, "recipes/pretrain.py"]
    arguments, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ",".join([*defaults.deepspeed_config, "mixed_precision"])
    return arguments


@pytest.fixture(scope="module")
def words(tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("words") / "tokenizer"
    tokenizer.save_pretrained(folder)
    return folder


def small(words: Path, output: Path, *more: object) -> list[str]:
    flags = [
        "--sources", "tinytown=200", "--tokenizer", words, "--size", "2x2x32", "--block_size", 64,
        "--per_device_train_batch_size", 2, "--global_batch_tokens", 512, "--max_steps", 5, "--logging_steps", 1,
        "--validation_share", 0.05, "--bf16", "false", "--eval_steps", 5, "--lr_scheduler_type", "constant",
        "--output_dir", output, *more,
    ]  # fmt: skip
    return list(map(str, flags))


def launch(name: str, *words: object, flags: tuple = ()) -> subprocess.Popen:
    command = ["accelerate", "launch", "--quiet", "--config_file", config(name), *flags, "recipes/pretrain.py", *words]
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=ENVIRONMENT
    )


def ended(process: subprocess.Popen) -> subprocess.CompletedProcess:
    out, said = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, said)


def results(run: Path) -> tuple[list[float], float, int]:
    """(the losses of five steps, the validation loss, validation tokens)"""
    losses = [record["loss"] for record in metrics_of(run) if "loss" in record]
    metrics = json.loads((run / "run.json").read_text())["metrics"]
    return losses, metrics["eval_loss"], metrics["eval_tokens"]


@pytest.fixture(scope="module")
def alone(words, tmp_path_factory) -> tuple[list[float], float, int]:
    """What one process without a launcher comes to."""
    output = tmp_path_factory.mktemp("alone") / "run"
    assert inside("pretrain", *small(words, output)).returncode == 0
    return results(output)


def check_equal(found: tuple, alone: tuple) -> None:
    assert len(found[0]) == 5 and found[0][0] != found[0][4]
    assert found[0] == pytest.approx(alone[0], rel=1e-5)
    assert found[1] == pytest.approx(alone[1], rel=1e-5)
    assert found[2] == alone[2]


def test_there_is_a_file_for_every_way_of_launching():
    assert {path.stem for path in FILES} == set(MEANT)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_accelerate_reads_every_file_as_it_is_meant(path):
    found = load_config_from_file(str(path))
    assert (found.distributed_type.value, found.num_processes, found.num_machines) == MEANT[path.stem]
    assert found.mixed_precision == "no", "precision is the recipe's affair"
    text = path.read_text()
    assert text.startswith("# ") and (path.stem == "one_process" or "# To change: " in text)
    assert path.stem == "one_process" or f"recipes/accelerate/{path.stem}.yaml" in text


class TestPlugins:
    """What accelerate makes of a file for the processes that it starts."""

    def test_fsdp_shards_every_block_with_the_second_version(self):
        with patch_environment(**prepare_multi_gpu_env(launching("fsdp", "--main_process_port", "0"))):
            plugin = FullyShardedDataParallelPlugin()
        assert (plugin.fsdp_version, plugin.reshard_after_forward, plugin.cpu_ram_efficient_loading) == (2, True, False)
        assert plugin.transformer_cls_names_to_wrap == ["GPT2Block"]
        assert plugin.state_dict_type.name == "FULL_STATE_DICT"

    @pytest.mark.parametrize("stage", [2, 3])
    def test_deepspeed_shards_as_its_file_says_and_takes_the_rest_from_the_recipe(self, stage):
        _, environment = prepare_deepspeed_cmd_env(launching(f"deepspeed_zero{stage}", "--main_process_port", "0"))
        with patch_environment(**environment):
            made = DeepSpeedPlugin().deepspeed_config
        assert made["zero_optimization"]["stage"] == stage
        assert made["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] == (stage == 3)
        assert made["zero_optimization"]["offload_optimizer"]["device"] == "none"
        for name in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
            assert made[name] == "auto"
        assert made["gradient_clipping"] == "auto"

    def test_multi_node_divides_its_processes_among_machines(self):
        arguments = launching("multi_node", "--main_process_ip", "10.0.0.1", "--machine_rank", "1")
        prepare_multi_gpu_env(arguments)
        assert (arguments.nnodes, arguments.nproc_per_node, arguments.node_rank) == ("2", "8", 1)
        assert arguments.rdzv_endpoint == "10.0.0.1:29500"

    def test_cpu_hides_the_gpus(self):
        assert prepare_multi_gpu_env(launching("cpu"))["CUDA_VISIBLE_DEVICES"] == "-1,-1"


class TestPrecision:
    """The recipe's own bf16 or fp16 counts, whatever the launcher says, and the launcher's only where it has none."""

    @pytest.mark.parametrize(
        ("launcher", "bf16", "counts"), [("no", True, "bf16"), ("no", False, "no"), ("fp16", True, "bf16")]
    )
    def test_accelerator_has_the_precision_of_the_recipe(self, launcher, bf16, counts, chat, tmp_path, monkeypatch):
        from transformers import Trainer, TrainingArguments

        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
        arguments = TrainingArguments(str(tmp_path), bf16=bf16, use_cpu=True, report_to="none")
        assert Trainer(chat.model, arguments).accelerator.mixed_precision == counts


def test_two_processes_on_a_cpu_come_to_what_one_comes_to(words, alone, tmp_path):
    succeeded(ended(launch("cpu", *small(words, tmp_path / "run"))))
    check_equal(results(tmp_path / "run"), alone)
    tokens = [record["tokens"] for record in metrics_of(tmp_path / "run") if "loss" in record]
    assert tokens == [512, 1024, 1536, 2048, 2560]


@pytest.mark.slow
@needs_no_gpu
def test_two_machines_come_to_what_one_comes_to(words, alone, tmp_path):
    """Two launchers on this machine, of one process each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ("--num_processes", 2, "--main_process_port", port, "--machine_rank")
    nodes = [launch("multi_node", *small(words, tmp_path / "run"), flags=(*flags, rank)) for rank in (0, 1)]
    for node in nodes:
        succeeded(ended(node))
    check_equal(results(tmp_path / "run"), alone)


@pytest.mark.slow
@needs_no_gpu
@pytest.mark.parametrize(("name", "flags"), [("one_gpu", ()), ("ddp", ("--num_processes", 2))])
def test_the_files_for_gpus_run_on_cpus_where_there_are_none(name, flags, words, alone, tmp_path):
    succeeded(ended(launch(name, *small(words, tmp_path / "run"), flags=flags)))
    check_equal(results(tmp_path / "run"), alone)


class TestSharding:
    @pytest.mark.slow
    @needs_no_gpu
    def test_fsdp_starts_and_says_that_it_needs_gpus(self, words, tmp_path):
        done = ended(launch("fsdp", *small(words, tmp_path / "run"), flags=("--num_processes", 1)))
        assert done.returncode != 0
        assert [line for line in done.stderr.splitlines() if line.startswith("error:")] == [
            "error: FSDP needs GPUs, and there is none here. To try several processes on CPUs: "
            "recipes/accelerate/cpu.yaml."
        ]
        assert not (tmp_path / "run").exists()

    @pytest.mark.slow
    @pytest.mark.parametrize("stage", [2, 3])
    def test_deepspeed_is_started_where_it_is_installed(self, stage, words, tmp_path):
        try:
            import deepspeed  # noqa: F401

            pytest.skip("DeepSpeed is installed: this says what happens where it is not")
        except ImportError:
            done = ended(launch(f"deepspeed_zero{stage}", *small(words, tmp_path / "run")))
            assert done.returncode != 0 and "DeepSpeed is not installed" in done.stderr

    @pytest.mark.parametrize(
        ("environment", "how"),
        [
            ({"ACCELERATE_USE_FSDP": "true"}, "FSDP"),
            ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, "ZeRO-2"),
            ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "ZeRO-3"),
        ],
    )
    def test_muon_is_refused_in_one_line(self, environment, how, words, tmp_path, monkeypatch):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        done = inside("pretrain", *small(words, tmp_path / "run", "--optimizer", "muon"))
        refused(done, 2, "muon", f"cannot be sharded by {how}", "--optimizer adamw")

    def test_checkpoints_in_pieces_are_refused(self, monkeypatch):
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        arguments = {"fsdp": None, "deepspeed": None, "optimizer": "adamw"}
        check_sharding(SimpleNamespace(**arguments, save_strategy="no"))
        with pytest.raises(UsageError, match="save_strategy is steps.*--save_strategy no"):
            check_sharding(SimpleNamespace(**arguments, save_strategy="steps"))

    @pytest.mark.slow
    def test_a_sharded_model_has_the_loss_and_gradients_of_a_whole_one_and_can_be_put_together(self):
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "tests/sharded.py"]
        environment = ENVIRONMENT | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            [sys.executable, *words], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300
        )
        found = json.loads(succeeded(done).stdout.splitlines()[-1])
        assert found["sharded"] == found["parameters"] == 28
        assert found["loss"] < 1e-6 and found["gradients"] < 1e-5 and found["logits"] < 1e-6
        assert 0 <= found["norm"] < 1e-5
        assert found["type"] == "GPT2LMHeadModel"

    def test_under_zero_3_weights_are_gathered_by_deepspeed(self, chat, monkeypatch):
        """DeepSpeed's part is played by a stand-in that gives parameters their weights for as long as it is entered."""
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

    def test_a_model_that_is_not_sharded_is_whole_as_it_is(self, chat):
        assert gather_model(chat.model) is chat.model


@needs_no_gpu
def test_processes_without_a_gpu_meet(monkeypatch):
    from rorchat.training.distributed import use_gloo_on_cpu

    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    use_gloo_on_cpu()
    assert "ACCELERATE_USE_CPU" not in os.environ
    monkeypatch.setenv("WORLD_SIZE", "2")
    use_gloo_on_cpu()
    assert os.environ["ACCELERATE_USE_CPU"] == "true"
