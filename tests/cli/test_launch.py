"""`rorchat pretrain | sft | ...`: flags of launcher and recipe, one process or several, exit codes and signals."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from accelerate.commands.launch import launch_command_parser
from recipe_commands import ENVIRONMENT, command, inside, metrics_of, refused, succeeded
from support import ROOT, RORCHAT

from rorchat.cli.launch import RECIPE_FLAGS, split_flags
from rorchat.errors import UsageError
from rorchat.model import build_model, save_model
from rorchat.stories import ACCELERATE_FOLDER
from rorchat.training.arguments import StageParser
from rorchat.training.dpo import DPOArguments
from rorchat.training.grpo import GRPOArguments
from rorchat.training.pretrain import PretrainArguments
from rorchat.training.sft import SFTArguments

TINY = [
    "--sources", "tinytown=200", "--size", "2x2x32", "--block_size", 64, "--per_device_train_batch_size", 2,
    "--global_batch_tokens", 512, "--logging_steps", 1, "--validation_share", 0.05, "--bf16", "false",
    "--eval_strategy", "no", "--lr_scheduler_type", "constant",
]  # fmt: skip


@pytest.mark.parametrize("arguments", [PretrainArguments, SFTArguments, DPOArguments, GRPOArguments])
def test_flags_that_launcher_and_recipe_share_belong_to_the_recipe(arguments):
    launcher = {action.dest for action in launch_command_parser()._actions}
    recipe = {action.dest for action in StageParser(arguments)._actions}
    assert launcher & recipe <= RECIPE_FLAGS


def test_launcher_flags_are_taken_out_with_their_values():
    arguments = [
        "--num_processes",
        "2",
        "--config",
        "my.yaml",
        "--mixed-precision=no",
        "--learning_rate",
        "1e-3",
        "--cpu",
    ]
    launcher, recipe = split_flags(arguments)
    assert launcher == ["--num_processes=2", "--mixed_precision=no", "--cpu"]
    assert recipe == ["--config", "my.yaml", "--learning_rate", "1e-3"]


def test_of_a_launcher_flag_that_is_given_twice_the_last_value_counts_and_is_told(capsys):
    """`rorchat pretrain --num_processes 1 "$@"`, as scripts do."""
    flags = ["--num_processes", "1", "--cpu", "--num-processes=2", "--cpu", "--seed", "3"]
    assert split_flags(flags) == (["--num_processes=2", "--cpu"], ["--seed", "3"])
    assert capsys.readouterr().err == "--num_processes is given twice: the last value counts, 2\n"


def test_a_launcher_flag_without_a_value_takes_none():
    with pytest.raises(UsageError, match="--cpu takes no value: leave out 'false'"):
        split_flags(["--cpu=false"])


@pytest.mark.parametrize("flag", ["--accelerate_config", "--config_file"])
def test_launcher_configurations_have_names(flag, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert split_flags([flag, "ddp"])[0] == [f"--config_file={ACCELERATE_FOLDER / 'ddp.yaml'}"]
    (tmp_path / "ddp").touch()
    assert split_flags([flag, "ddp"])[0] == ["--config_file=ddp"]
    with pytest.raises(UsageError, match="No launcher configuration 'dpp'. Did you mean 'ddp'.* fsdp"):
        split_flags([flag, "dpp"])
    with pytest.raises(UsageError, match="needs a value"):
        split_flags([flag])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["sft", "--config", "demo/sftt.yaml"], 2, "Did you mean 'demo/sft.yaml'"),
        (["sft", "--config", "dem/sft.yaml"], 2, "Did you mean 'demo'"),
        (["dpo", "--modl", "x"], 2, "Unknown option --modl. Did you mean 'model'"),
        (["sft", "--model", "./none", "--sources", "tinytown=10", "--output_dir", "x"], 65, "No model folder ./none"),
        (["sft", "--num_processes"], 2, "--num_processes needs a value"),
        (["sft", "--num_processes", "0"], 2, "--num_processes is 0: give a positive number"),
        (["sft", "--mixed_precision", "fp8"], 2, "accelerate launch: "),
        (
            ["sft", "--num_processes", "two"],
            2,
            "accelerate launch: argument --num_processes/--num-processes: invalid int",
        ),
        (
            ["sft", "--mixed_precision", "foo"],
            2,
            "accelerate launch: argument --mixed_precision/--mixed-precision: invalid",
        ),
    ],
)
def test_a_failure_is_one_line_with_the_exit_code_of_the_recipe(arguments, code, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(inside("rorchat", *arguments), code, message)


def test_help_shows_rorchat_settings_first_and_help_all_every_setting():
    shown = succeeded(command("rorchat", "sft", "--help")).stdout
    assert shown.startswith("usage: rorchat sft ") and shown.index("--replay") < shown.index("--max_steps")
    assert "--adafactor" not in shown and "--torch_compile" not in shown
    every = succeeded(command("rorchat", "sft", "--help_all")).stdout
    assert "--torch_compile" in every and "--replay" in every


@pytest.fixture(scope="module")
def tokenizer_folder(tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("launcher", [["--cpu"], ["--num_processes", 2]], ids=["one", "two"])
@pytest.mark.slow
def test_processes_of_the_launcher_train_and_keep_the_exit_code(launcher, tokenizer_folder, tmp_path):
    flags = [*launcher, *TINY, "--tokenizer", tokenizer_folder, "--output_dir", tmp_path / "run"]
    done = succeeded(command("rorchat", "pretrain", *flags, "--max_steps", 2))
    assert "Traceback" not in done.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["processes"] == (2 if len(launcher) == 2 else 1)
    assert len([record for record in metrics_of(tmp_path / "run") if "loss" in record]) == 2
    refused(command("rorchat", "pretrain", *flags, "--max_steps", 3), 78, "max_steps 2, now 3")


@pytest.mark.parametrize(
    ("rorchat", "launcher"), [("rorchat", []), (RORCHAT, ["--num_processes", 2])], ids=["here", "two"]
)
def test_a_signal_saves_once_and_exits_with_75(rorchat, launcher, tokenizer_folder, tmp_path):
    """Two processes are started without preloaded.py, as a user does."""
    flags = [*launcher, *TINY, "--tokenizer", tokenizer_folder, "--output_dir", tmp_path / "run"]
    process = start_training([rorchat, "pretrain", *flags, "--max_steps", 100_000], tmp_path / "run")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert errors.count("SIGTERM: ") == (2 if launcher else 1) and "Traceback" not in errors
    assert [line for line in errors.splitlines() if line.startswith("error:")][0].startswith("error: Stopped at step")
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 1


def test_a_signal_saves_a_checkpoint_of_fine_tuning(tokenizer, tmp_path):
    save_model(build_model("1x2x32", tokenizer, 256), tokenizer, tmp_path / "base")
    flags = ["--model", tmp_path / "base", "--sources", "tinytown=100", "--validation_share", 0.1, "--bf16", "false"]
    flags += ["--per_device_train_batch_size", 2, "--logging_steps", 1, "--eval_strategy", "no", "--max_steps", 5000]
    run = tmp_path / "run"
    process = start_training(["rorchat", "sft", *flags, "--output_dir", run], run)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75 and "Traceback" not in errors, errors
    (checkpoint,) = run.glob("checkpoint-*")
    step = checkpoint.name.partition("-")[2]
    assert f"error: Stopped at step {step}, which is saved: run the same command again to resume." in errors


@pytest.fixture
def subreaper():
    """Orphans become children of this process, which can then wait for their exit codes."""
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
    yield
    ctypes.CDLL(None).prctl(36, 0)


#: The program itself, not that of preloaded.py.
ACCELERATE = [RORCHAT.with_name("accelerate"), "launch", "--quiet", "--config_file"]
TWO = ["--num_processes", 2, "--main_process_port", 0]


@pytest.mark.skipif(sys.platform != "linux", reason="Linux signals the end of a parent")
@pytest.mark.parametrize(
    ("starter", "number"),
    [
        pytest.param([*ACCELERATE, ACCELERATE_FOLDER / "one_process.yaml", "recipes/pretrain.py"], signal.SIGTERM),
        pytest.param(
            [*ACCELERATE, ACCELERATE_FOLDER / "cpu.yaml", *TWO, "recipes/pretrain.py"],
            signal.SIGTERM,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            [*ACCELERATE, ACCELERATE_FOLDER / "cpu.yaml", *TWO, "recipes/pretrain.py"],
            signal.SIGKILL,
            marks=pytest.mark.slow,
        ),
        pytest.param(["bash", "-c", '"$0" pretrain "$@"; true', RORCHAT], signal.SIGTERM, marks=pytest.mark.slow),
    ],
    ids=["accelerate", "accelerate, two", "accelerate, two killed", "bash"],
)
def test_the_end_of_what_started_a_run_saves_a_checkpoint(starter, number, subreaper, tokenizer_folder, tmp_path):
    flags = [*TINY, "--tokenizer", tokenizer_folder, "--output_dir", tmp_path / "run", "--max_steps", 100_000]
    process = start_training([*starter, *flags], tmp_path / "run")
    ranks = [child.pid for child in psutil.Process(process.pid).children(recursive=True) if is_rank(child)]
    assert len(ranks) == (2 if TWO[0] in starter else 1)
    process.send_signal(number)
    process.wait(timeout=60)
    codes = [wait_for_orphan(rank) for rank in ranks]
    _, errors = process.communicate()
    assert set(codes) <= {75, None}, errors
    assert None not in codes or number == signal.SIGTERM  # None: the launcher has passed the signal on and waited
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 1


@pytest.mark.slow
@pytest.mark.skipif(
    subprocess.run(["unshare", "--pid", "--fork", "true"], capture_output=True).returncode != 0,
    reason="needs a process namespace",
)
@pytest.mark.parametrize("script", ['"$0" pretrain "$@"', 'cd / && exec "$0" pretrain "$@"'])
def test_the_first_process_of_a_container_saves_a_checkpoint(script, tokenizer_folder, tmp_path):
    """As `docker stop` does with CMD ["bash", "-c", "rorchat ..."]: bash replaces itself with its last command."""
    flags = [*TINY, "--tokenizer", tokenizer_folder, "--output_dir", tmp_path / "run", "--max_steps", 100_000]
    unshare = ["unshare", "--pid", "--fork", "--mount-proc", "bash", "-c", script, RORCHAT]
    process = start_training([*unshare, *flags], tmp_path / "run")
    (first,) = psutil.Process(process.pid).children()
    first.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 1


def start_training(command: list, run: Path) -> subprocess.Popen:
    """Starts a command, and waits for the second step of its run."""
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=ENVIRONMENT
    )
    deadline = time.monotonic() + 120
    log = run / "metrics.jsonl"
    while not (log.is_file() and '"step": 2' in log.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    return process


def is_rank(process: psutil.Process) -> bool:
    return any(word.endswith(("recipes/pretrain.py", "bin/rorchat")) for word in process.cmdline())


def wait_for_orphan(process: int) -> int | None:
    """The exit code of a process whose parent was killed; None if its parent has waited for it."""
    try:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    except ChildProcessError:
        return None


@pytest.mark.slow
def test_accelerate_launches_a_recipe_as_a_module(tokenizer_folder, tmp_path):
    flags = [*TINY, "--tokenizer", tokenizer_folder, "--output_dir", tmp_path / "run", "--max_steps", 1]
    launcher = ["--quiet", "--cpu", "--num_processes", 1, "--mixed_precision", "no"]
    launch = ["python", "-m", "accelerate.commands.launch", *launcher, "-m", "rorchat.recipes.pretrain"]
    succeeded(command(*launch, *flags))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["finished"]
