"""Recipes and `rorchat ...` as commands: in a process of their own, or in this one."""

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

import rorchat.cli
from rorchat.errors import exits_with_one_line

ENVIRONMENT = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(ROOT),
}


def command(*words: object, **more) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**ENVIRONMENT, **more},
        timeout=600,
    )


def recipe(name: str, *flags: object) -> subprocess.CompletedProcess:
    return command(sys.executable, f"recipes/{name}.py", *flags)


def inside(name: str, *flags: object) -> subprocess.CompletedProcess:
    """A recipe's `main` or `rorchat ...` in this process: what it wrote to stderr, and its exit code."""
    words = [str(flag) for flag in flags]
    said, code = io.StringIO(), 0
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            if name == "rorchat":
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(sys, "argv", ["rorchat", *words])
                    rorchat.cli.main()
            else:
                exits_with_one_line(runpy.run_path(str(ROOT / "recipes" / f"{name}.py"))["main"])(words)
        except SystemExit as stopped:
            code = stopped.code
    return subprocess.CompletedProcess([name, *words], code, "", said.getvalue())


def launch(name: str, *flags: object, processes: int = 1) -> subprocess.CompletedProcess:
    where = ["--cpu", "--num_processes", 1, "--mixed_precision", "no"]
    if processes > 1:  # with --cpu, accelerate 1.15 starts one whatever the number
        where = ["--config_file", "recipes/accelerate/cpu.yaml", "--num_processes", processes, "--main_process_port", 0]
    return command("accelerate", "launch", "--quiet", *where, f"recipes/{name}.py", *flags)


def succeeded(done: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def refused(done: subprocess.CompletedProcess, code: int, *said: str) -> None:
    """One line that begins with "error:", the exit code, and no traceback."""
    assert done.returncode == code, done.stderr[-3000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr[-3000:]
    for words in said:
        assert words in lines[0]


def metrics_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# Variable of a story -> where it lies in the folder of real data; corpus_prose stands in for Cosmopedia
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
