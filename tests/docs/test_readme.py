"""README and docs: length, links, and that every command, flag, source and file that they name exists."""

import dataclasses
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import typer.main
from markdown_support import list_pages, read_blocks, read_prose, split_commands
from support import ROOT
from typer.core import TyperCommand, TyperGroup

import rorchat
from rorchat.cli import app
from rorchat.cli.launch import split_flags
from rorchat.sources.registry import list_sources
from rorchat.stories import STORIES_FOLDER
from rorchat.training.dpo import DPOArguments
from rorchat.training.grpo import GRPOArguments
from rorchat.training.pretrain import PretrainArguments
from rorchat.training.sft import SFTArguments
from rorchat.training.tokenizer import TokenizerArguments

PAGES = list_pages()
MAX_LINE, MAX_TABLE_ROW, MAX_README = 120, 700, 120
SETTINGS = {
    "train-tokenizer": TokenizerArguments,
    "tokenizer": TokenizerArguments,
    "pretrain": PretrainArguments,
    "sft": SFTArguments,
    "dpo": DPOArguments,
    "grpo": GRPOArguments,
}
PARSER_FLAGS = {"config", "help", "help_all"}
SCRIPT_FLAGS = {"ablate"}  # of scripts/bench/run.py
#: Names that stand for the reader's own files and folders, or for old ones (CHANGELOG and LOG name what is gone).
HISTORICAL = {"CHANGELOG.md", "LOG.md"}

ids = [page.relative_to(ROOT).as_posix() for page in PAGES]
each_page = pytest.mark.parametrize("page", PAGES, ids=ids)


def normalize(flag: str) -> str:
    return flag.removeprefix("--").split("=")[0].replace("-", "_")


@cache
def setting_names(command: str) -> set[str]:
    names = {field.name for field in dataclasses.fields(SETTINGS[command])}
    return names | {f"no_{name}" for name in names} | PARSER_FLAGS


def check_training_command(command: str, words: list[str]) -> None:
    """Raises AssertionError for a flag that neither the recipe nor the launcher knows, and for an unknown source."""
    _, words = split_flags(words)
    flags = {normalize(word) for word in words if word.startswith("--")}
    assert flags <= setting_names(command), f"{command}: no flag {sorted(flags - setting_names(command))}"
    for at, word in enumerate(words):
        if word != "--sources":
            continue
        for spec in words[at + 1 :]:
            if spec.startswith("--"):
                break
            name = spec.partition("=")[0].removeprefix("chat:")
            assert name in ("store", "...", *list_sources()), f"{command}: no source {name!r}"


def check_rorchat_command(words: list[str]) -> None:
    """Raises AssertionError for an unknown sub-command or flag."""
    command: TyperCommand | TyperGroup = typer.main.get_command(app)
    words = list(words)
    while isinstance(command, TyperGroup) and words and not words[0].startswith("-"):
        name = words.pop(0)
        if name == "...":
            return
        assert name in command.commands, f"no command {name!r}; there are {', '.join(command.commands)}"
        command = command.commands[name]
    if command.context_settings.get("ignore_unknown_options"):
        check_training_command(command.name, words)
    else:
        known = {normalize(flag) for option in command.params for flag in (*option.opts, *option.secondary_opts)}
        flags = {normalize(word) for word in words if word.startswith("--")} - {"help"}
        assert flags <= known, f"rorchat {command.name}: no flag {sorted(flags - known)}"


def check_command(words: list[str]) -> bool:
    """Checks one shell command; returns whether it is a command of rorchat."""
    while words and re.fullmatch(r"\w+=\S*", words[0]):
        words = words[1:]  # variables
    if not words:
        return False
    for word in words:
        path = word.split("::")[0]
        if re.match(r"(recipes|scripts|tests)/[\w/.-]+\.\w+$", path):
            assert (ROOT / path).is_file(), f"no file {path}"
        elif re.match(r"[\w-]+/[\w-]+\.yaml$", path) and (STORIES_FOLDER / path).parent.is_dir():
            assert (STORIES_FOLDER / path).is_file(), f"no file {path} in the package"
    if words[0] == "rorchat":
        check_rorchat_command(words[1:])
        return True
    recipe = next((at for at, word in enumerate(words) if re.fullmatch(r"recipes/\w+\.py", word)), None)
    if words[0] in ("python", "accelerate") and recipe is not None:
        check_training_command(Path(words[recipe]).stem, words[recipe + 1 :])
        return True
    return False


def inline_code(page: Path) -> list[str]:
    """Code spans of the prose, outside of the sections that scripts/bench/run.py writes."""
    prose = re.sub(r"<!-- bench:.*?<!-- end", "", read_prose(page), flags=re.DOTALL)
    return [" ".join(span.replace("\\|", "|").split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose)]


def inline_commands(page: Path) -> Iterator[list[str]]:
    """`rorchat ...` in the prose; `rorchat checkpoint list | verify` gives both commands."""
    for span in inline_code(page):
        if not re.match(r"(rorchat|python recipes/|accelerate launch recipes/|bash recipes/) ?\S", span):
            continue
        first, *others = (part.split() for part in span.split(" | "))
        yield shlex.split(" ".join(first))
        for words in others:
            yield [*first[:-1], *words]


@cache
def command_flags(group: TyperGroup) -> set[str]:
    """Flags of all commands below a group, normalized."""
    names = {"help", "version"}
    for command in group.commands.values():
        if isinstance(command, TyperGroup):
            names |= command_flags(command)
        names |= {normalize(flag) for option in command.params for flag in (*option.opts, *option.secondary_opts)}
    return names


def is_flag(flag: str) -> bool:
    """Whether a command of rorchat, a recipe or the launcher of Accelerate has this flag."""
    name = normalize(flag)
    known = command_flags(typer.main.get_command(app)).union(*(setting_names(command) for command in SETTINGS))
    return name in known | SCRIPT_FLAGS or bool(split_flags([f"--{name}", "cpu"])[0])


def test_readme_is_one_page():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= MAX_README


def test_readme_lists_the_stages_in_order():
    table = (ROOT / "README.md").read_text(encoding="utf-8").split("## How data flows")[1].split("\n## ")[0]
    cells = [line.split("|")[2] for line in table.splitlines() if line.startswith("|")][2:]
    assert [name for cell in cells for name in re.findall(r"`(\w+)/?`", cell)] == list(rorchat.STAGES)


@each_page
def test_no_line_is_too_long(page):
    for line in read_prose(page).splitlines():
        limit = MAX_TABLE_ROW if line.lstrip().startswith("|") else MAX_LINE
        assert len(line) <= limit or len(line.split()) == 1, line


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@each_page
def test_every_link_resolves(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", read_prose(page)):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", read_prose(file), re.MULTILINE)
            assert anchor in {slug(heading) for heading in headings}, target


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in HISTORICAL], ids=lambda page: page.stem)
def test_every_command_and_flag_exists(page):
    commands = [
        words for block in read_blocks(page) if block.language == "bash" for words in split_commands(block.code)
    ]
    for words in [*commands, *inline_commands(page)]:
        check_command(words)


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in HISTORICAL], ids=lambda page: page.stem)
def test_every_flag_in_the_prose_exists(page):
    for span in inline_code(page):
        for flag in re.findall(r"(?<!\S)--\w[\w-]*", span):
            if span.startswith("--") and not is_flag(flag):
                raise AssertionError(f"no command has the flag {flag}")


def test_commands_are_found_and_wrong_ones_are_noticed():
    blocks = [block for page in PAGES for block in read_blocks(page) if block.language == "bash"]
    commands = [words for block in blocks for words in split_commands(block.code)]
    assert sum(words[0] == "rorchat" for words in commands) > 80
    for wrong in (
        "rorchat pretrian --config demo/pretrain.yaml",
        "rorchat pretrain --train_token 5",
        "rorchat data plan mixture.yaml --trainn_tokens 5",
        "rorchat sft --config demo/stf.yaml",
        "rorchat sft --sources alpacca=x.json",
        "accelerate launch recipes/sft.py --modell gpt2",
    ):
        with pytest.raises(AssertionError):
            check_command(shlex.split(wrong))


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in HISTORICAL], ids=lambda page: page.stem)
def test_every_named_file_of_the_repository_exists(page):
    names = re.findall(r"`((?:rorchat|recipes|scripts|tests|docs)/[\w/.-]+)`", read_prose(page))
    names += [f"tests/faults/{name}" for name in re.findall(r"`(test_\w+\.py)`", read_prose(page))]
    for name in names:
        assert (ROOT / name).exists() or "NAME" in name or "FILE" in name, name


def test_every_page_is_on_the_map():
    page = ROOT / "docs" / "README.md"
    linked = {(page.parent / target).resolve() for target in re.findall(r"\]\(([^)\s#]+)", read_prose(page))}
    assert {path for path in PAGES if path.parent.name in ("docs", "tutorials")} - linked == {page}


def test_the_python_example_of_the_metrics_page_runs(capsys):
    (block,) = (block for block in read_blocks(ROOT / "docs" / "metrics.md") if block.language == "python")
    exec(compile(block.code, "docs/metrics.md", "exec"), {})
    assert "'stop_rate': 0.5" in capsys.readouterr().out
