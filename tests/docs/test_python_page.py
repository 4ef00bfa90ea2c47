"""Runs docs/python.md as a notebook: every Python block is a cell."""

import nbclient
import nbformat
import pytest
from markdown_support import read_blocks
from support import ROOT

PAGE = ROOT / "docs" / "python.md"
#: Shortens the training of the page; nothing else is changed.
FIRST_CELL = """
import functools, rorchat
for name in ("pretrain", "sft"):
    setattr(rorchat, name, functools.partial(getattr(rorchat, name), max_steps=4))
"""


@pytest.fixture(scope="module")
def cells(tmp_path_factory) -> dict[str, nbformat.NotebookNode]:
    """The executed cells by their code. The first exception ends the notebook and fails the test."""
    sources = [block.code for block in read_blocks(PAGE) if block.language == "python"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in (FIRST_CELL, *sources)])
    folder = tmp_path_factory.mktemp("notebook")
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    return {cell.source: cell for cell in notebook.cells}


def read_output(cells: dict[str, nbformat.NotebookNode], part_of_source: str, stream: str) -> str:
    (cell,) = (cell for source, cell in cells.items() if part_of_source in source)
    return "".join(output.text for output in cell.outputs if output.get("name") == stream)


@pytest.mark.slow
def test_every_block_runs_and_shows_its_result(cells):
    assert len(cells) > 9
    assert "'vocab_size': 768" in read_output(cells, "train_tokenizer(", "stdout")
    assert "held-out questions" in read_output(cells, "rorchat.evaluate(", "stdout")
    assert "runs/python/report.md" in read_output(cells, "rorchat.report(", "stdout")
    assert "nothing was uploaded" in read_output(cells, "rorchat.push(", "stdout")
    assert "runs/python/try-smoke 3" in read_output(cells, "smoke=True", "stdout")
    assert "UsageError unknown setting 'sorces'. Did you mean 'sources'?" in read_output(cells, "sorces", "stdout")
    (pictures,) = (cell.outputs[-1]["data"] for source, cell in cells.items() if "Image(" in source)
    assert "image/png" in pictures


@pytest.mark.slow
def test_training_shows_a_progress_bar_in_a_notebook(cells):
    shown = read_output(cells, "pretrained = rorchat.pretrain(", "stderr")
    assert "4/4 [" in shown and "step 4/4" in shown
