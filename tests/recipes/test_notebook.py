"""Recipes called from Python, in a notebook too: `train` raises exceptions, `main` exits like the command.

tests/docs/test_python_page.py runs the functions of `rorchat.api` in a notebook.
"""

import signal

import nbclient
import nbformat
import preloaded
import pytest

from rorchat.errors import DataError, MismatchError, UsageError
from rorchat.recipes import pretrain, sft
from rorchat.recipes import tokenizer as tokenizer_recipe

TRAIN = """
from rorchat.recipes import pretrain

flags = ["--sources", "tinytown=200", "--tokenizer", {tokenizer!r}, "--size", "2x2x32", "--block_size", "64",
         "--per_device_train_batch_size", "2", "--global_batch_tokens", "512", "--validation_share", "0.05",
         "--bf16", "false", "--output_dir", "run"]
metrics = pretrain.main([*flags, "--max_steps", "2"])
print(sorted(name for name in metrics if name in ("eval_loss", "eval_bits_per_byte")))
"""
AGAIN = """
from rorchat import RorchatError

try:
    pretrain.train([*flags, "--max_steps", "3"])
except RorchatError as error:
    print(type(error).__name__, error.exit_code)
"""


def test_a_recipe_trains_in_a_notebook_and_raises_there(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.executable", preloaded.client("python"))  # of the kernel
    cells = [nbformat.v4.new_code_cell(source) for source in (TRAIN.format(tokenizer=str(saved)), AGAIN)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    printed = ["".join(output.text for output in cell.outputs if output.get("name") == "stdout") for cell in cells]
    assert "['eval_bits_per_byte', 'eval_loss']" in printed[0]
    assert printed[1] == "MismatchError 78\n"


def test_a_recipe_called_from_python_raises(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="Unknown option --modl"):
        sft.train(["--modl", "x"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").touch()
    with pytest.raises(MismatchError, match="contains another tokenizer or other files"):
        tokenizer_recipe.train(["--sources", "tinytown=20", "--output_dir", "out"])


def test_main_ends_with_one_line_and_the_exit_code(capsys):
    with pytest.raises(SystemExit) as stopped:
        sft.main(["--modl", "x"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: Unknown option --modl. Did you mean 'model'? See --help.\n"


def test_a_recipe_that_failed_releases_its_folder_and_signals(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--sources", "text=none.txt", "--tokenizer", str(saved), "--size", "2x2x32", "--block_size", "64"]
    flags += ["--per_device_train_batch_size", "2", "--global_batch_tokens", "128", "--max_steps", "1"]
    before, errors = signal.getsignal(signal.SIGINT), []  # a notebook keeps the traceback, and with it the run
    for _ in range(2):
        with pytest.raises(DataError, match="none.txt") as error:
            pretrain.train([*flags, "--output_dir", "run"])
        errors.append(error)
        assert signal.getsignal(signal.SIGINT) is before
