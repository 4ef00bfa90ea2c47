"""Runs recipes and `rorchat ...` as commands, in another process or in this one."""

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import preloaded
import pytest
from support import ROOT

import rorchat.cli
from rorchat.errors import exits_with_one_line

#: In which `python`, `rorchat`, `accelerate` and `trl` start at once (preloaded.py); `sys.executable` is a new process.
ENVIRONMENT = {
    **os.environ,
    "PATH": os.pathsep.join([os.environ[preloaded.FOLDER], str(Path(sys.executable).parent), os.environ["PATH"]]),
    "PYTHONPATH": str(ROOT),
}

#: `rorchat` for `python -c`, with short replies: those of a model after a few steps would not end.
SHORT_REPLIES = """
from rorchat.cli import main
from rorchat.evaluation import behaviour, scores
behaviour.MAX_REPLY_TOKENS = scores.MAX_REPLY_TOKENS = 8
main()
"""


def command(*arguments: object, **more) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(word) for word in arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**ENVIRONMENT, **more},
        timeout=600,
    )


def recipe(name: str, *flags: object) -> subprocess.CompletedProcess:
    """Runs a recipe in a new process."""
    return command(sys.executable, f"recipes/{name}.py", *flags)


def inside(name: str, *flags: object) -> subprocess.CompletedProcess:
    """Runs a recipe or `rorchat ...` in this process; returns its output and exit code."""
    arguments = [str(flag) for flag in flags]
    output, errors, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(output):
        try:
            if name == "rorchat":
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(sys, "argv", ["rorchat", *arguments])
                    rorchat.cli.main()
            else:
                exits_with_one_line(runpy.run_path(str(ROOT / "recipes" / f"{name}.py"))["main"])(arguments)
        except SystemExit as stop:
            code = stop.code or 0
    return subprocess.CompletedProcess([name, *arguments], code, output.getvalue(), errors.getvalue())


def launch(name: str, *flags: object, processes: int = 1) -> subprocess.CompletedProcess:
    launcher = ["--cpu", "--num_processes", 1, "--mixed_precision", "no"]
    if processes > 1:  # accelerate 1.15 ignores the number with --cpu
        config = ["--config_file", "recipes/accelerate/cpu.yaml"]
        launcher = [*config, "--num_processes", processes, "--main_process_port", 0]
    return command("accelerate", "launch", "--quiet", *launcher, f"recipes/{name}.py", *flags)


def succeeded(done: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def refused(done: subprocess.CompletedProcess, code: int, *messages: str) -> None:
    """Asserts the exit code, one line that starts with "error:", and no traceback."""
    assert done.returncode == code, done.stderr[-3000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr[-3000:]
    for message in messages:
        assert message in lines[0]


def metrics_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


# Variable of a story -> path in the folder of real data; corpus_prose replaces Cosmopedia
VARIABLES = {
    "PILE": "pile/pile_sample.jsonl.zst",
    "DAILYDIALOG": "dailydialog",
    "CORNELL": "cornell_movie_dialogs",
    "NATURAL_QUESTIONS": "natural_questions/natural_questions_openbook_short.jsonl",
    "OPENBOOKQA": "openbookqa",
    "MATHEMATICS": "math_dataset",
    "MBPP": "mbpp/mbpp.jsonl",
    "C4": "c4/c4-sample.00000-of-00001.json.gz",
    "COSMOPEDIA": "corpus_prose/train-00000-of-00006.parquet",
    "ALPACA": "alpaca",
    "PYTHON_CODE": "python_code/cosqa-dev.json",
    "ULTRAFEEDBACK": "preference/ultrafeedback_train_1000.jsonl",
    "HH_RLHF": "preference/hh_rlhf_harmless_base_test.jsonl.gz",
}
