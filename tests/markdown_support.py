"""Reads Markdown files: their fenced code blocks, their prose, and the commands in them."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from support import ROOT

_FENCE = re.compile(r"^```(?P<language>\w*)[ ]?(?P<label>[\w-]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced code block: ```` ```bash gpu ```` has the language `bash` and the label `gpu`."""

    language: str
    label: str
    code: str


def list_pages() -> list[Path]:
    """README, CONTRIBUTING, CHANGELOG and every page below docs/."""
    return [ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")] + sorted(ROOT.glob("docs/**/*.md"))


def read_blocks(page: Path) -> list[Block]:
    return [Block(**match.groupdict()) for match in _FENCE.finditer(page.read_text(encoding="utf-8"))]


def read_prose(page: Path) -> str:
    """The text without code blocks; lines keep their content, not their numbers."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def split_commands(code: str) -> Iterator[list[str]]:
    """The simple commands of a bash block, as lists of words; here-documents and comments are skipped."""
    code = re.sub(r"<<'?(\w+)'?\n.*?^\1$", "", code, flags=re.MULTILINE | re.DOTALL)
    for line in code.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in lexer:
            if set(word) <= set("|&;"):
                if words:
                    yield words
                words = []
            else:
                words.append(word)
        if words:
            yield words
