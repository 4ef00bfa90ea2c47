"""Runs the tutorials: every bash and Python block, in order, in one folder.

Each tutorial runs as one bash script. Training commands get `--max_steps`, and in blocks labelled `gpu` `--smoke`;
`evaluate` and `gate` ask for short replies; nothing else is changed. Blocks labelled `several-gpus` need more than one
GPU and are only parsed (test_readme.py).
"""

import subprocess
from pathlib import Path

import pytest
from markdown_support import Block, read_blocks
from recipe_commands import ENVIRONMENT, SHORT_REPLIES
from support import ROOT

TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
NOT_RUN = "several-gpus"
PRELUDE = """
set -euo pipefail
rorchat() {
    local -a more=()
    case "$1" in
        pretrain | sft | dpo | grpo)
            more=($EXTRA_FLAGS)
            [[ " $* " != *" --smoke "* ]] || more=() ;;
        evaluate | gate)
            python -c "$SHORT_REPLIES" "$@"
            return ;;
    esac
    command rorchat "$@" "${more[@]}"
}
"""
FLAGS = {"": "--max_steps 4 --logging_steps 2", "gpu": "--smoke"}


def as_script(blocks: list[Block]) -> str:
    """The blocks of a tutorial as one bash script."""
    parts = [PRELUDE]
    for block in blocks:
        if block.language == "python":
            parts.append(f"python - <<'END_OF_PYTHON'\n{block.code}END_OF_PYTHON\n")
        elif block.language == "bash" and block.label != NOT_RUN:
            parts.append(f"EXTRA_FLAGS='{FLAGS[block.label]}'\n{block.code}")
    return "\n".join(parts)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The folder in which all tutorials run: later ones continue where the first one ended."""
    return tmp_path_factory.mktemp("tutorials")


@pytest.fixture(scope="module")
def run_tutorial(folder):
    """Runs a tutorial, after the first one, in `folder`; the same tutorial only once."""
    done: dict[Path, str] = {}

    def run(tutorial: Path) -> str:
        if TUTORIALS[0] not in done and tutorial != TUTORIALS[0]:
            run(TUTORIALS[0])
        if tutorial not in done:
            process = subprocess.run(
                ["bash", "-c", as_script(read_blocks(tutorial))],
                cwd=folder,
                env=ENVIRONMENT | {"SHORT_REPLIES": SHORT_REPLIES},
                capture_output=True,
                text=True,
                timeout=900,
            )
            assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-2000:]
            done[tutorial] = process.stdout
        return done[tutorial]

    return run


def test_there_are_tutorials_and_their_blocks_can_be_run():
    assert len(TUTORIALS) >= 5
    for tutorial in TUTORIALS:
        blocks = read_blocks(tutorial)
        assert blocks, tutorial
        assert {block.language for block in blocks} <= {"bash", "python"}, tutorial
        assert {block.label for block in blocks} <= {*FLAGS, NOT_RUN}, tutorial


@pytest.mark.slow
@pytest.mark.parametrize("tutorial", TUTORIALS, ids=lambda path: path.stem)
def test_every_block_of_a_tutorial_runs(tutorial, run_tutorial):
    run_tutorial(tutorial)


@pytest.mark.slow
def test_the_first_tutorial_ends_with_a_report_and_a_model(folder, run_tutorial):
    output = run_tutorial(TUTORIALS[0])
    assert "held-out questions" in output
    for name in ("report.md", "curves.png", "scores.json", "sft/model/model.safetensors", "pretrain/metrics.jsonl"):
        assert (folder / "runs" / "first" / name).is_file()


@pytest.mark.slow
def test_the_second_tutorial_finds_the_two_bad_rows(folder, run_tutorial):
    run_tutorial(next(path for path in TUTORIALS if path.stem == "02-your-own-data"))
    assert "empty reply" in (folder / "rejected.jsonl").read_text()
