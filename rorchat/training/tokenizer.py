"""Trains a byte-level BPE tokenizer on the text of sources."""

import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from rorchat.errors import MismatchError, UsageError
from rorchat.files import to_json
from rorchat.persona import load_persona
from rorchat.sources.base import RowStats
from rorchat.sources.registry import iterate_texts
from rorchat.tokenizer import train_tokenizer
from rorchat.tokenizer.training_text import BoundedText
from rorchat.training.arguments import DataArguments
from rorchat.training.next_step import describe_next, list_next_commands
from rorchat.training.pinning import find_pins
from rorchat.training.result import TokenizerResult

METRICS_FILE = "tokenizer_training.json"


@dataclass
class TokenizerArguments(DataArguments):
    """Settings of `recipes/tokenizer.py`."""

    vocab_size: int = field(default=32_768, metadata={"help": "Vocabulary size, a multiple of 64."})
    max_characters: int = field(default=1_000_000_000, metadata={"help": "Maximum characters to read; bounds memory."})
    output_dir: str = field(default="", metadata={"help": "The folder for the tokenizer."})

    def __post_init__(self):
        self.check_data()
        if self.max_characters < 1:
            raise UsageError(f"max_characters is {self.max_characters}: it must be at least 1.")
        if not self.output_dir:
            raise UsageError("No output folder: give --output_dir runs/my-tokenizer")


def run_tokenizer_training(arguments: TokenizerArguments) -> TokenizerResult:
    """Trains a tokenizer and saves it with its settings.

    Raises:
        MismatchError: the output folder contains another tokenizer or other files.
    """
    folder = Path(arguments.output_dir)
    config = folder / "config.yaml"
    if os.environ.get("RANK", "0") != "0":
        return TokenizerResult({}, folder)  # the first process trains it
    if folder.is_dir() and any(folder.iterdir()):
        if not config.is_file() or yaml.safe_load(config.read_text(encoding="utf-8")) != arguments.given:
            raise MismatchError(
                f"The output folder {folder} contains another tokenizer or other files. "
                "Choose another output_dir, or delete the folder."
            )
        print(f"{folder}: already trained with these settings; delete the folder to train again")  # noqa: T201
        _print_next_step(folder)
        metrics = json.loads((folder / METRICS_FILE).read_text(encoding="utf-8"))
        metrics.pop("sources", None)
        return TokenizerResult(metrics, folder)
    started = time.monotonic()
    persona = load_persona(arguments.persona)
    arguments.pin_sources(find_pins(arguments.sources, {}))
    text = BoundedText(
        iterate_texts(arguments.sources, arguments.data_seed, persona, report=_print_unread_rows),
        arguments.max_characters,
        show=True,
    )
    tokenizer = train_tokenizer(text, arguments.vocab_size, persona)
    tokenizer.save_pretrained(folder)
    metrics = {
        "vocab_size": len(tokenizer),
        "characters": text.characters,
        "utf8_bytes": text.utf8_bytes,
        "stopped_at_max_characters": text.stopped,
        "seconds": round(time.monotonic() - started, 1),
    }
    (folder / METRICS_FILE).write_text(
        to_json({"sources": arguments.sources} | metrics, indent=2) + "\n", encoding="utf-8"
    )
    config.write_text(yaml.safe_dump(arguments.given), encoding="utf-8")
    print(  # noqa: T201
        f"{folder}: {len(tokenizer):,} tokens, trained on {text.characters:,} characters "
        f"({text.utf8_bytes:,} UTF-8 bytes) in {metrics['seconds']} s "
        f"({'stopped at max_characters' if text.stopped else 'all of the text was read'})"
    )
    _print_next_step(folder)
    return TokenizerResult(metrics, folder)


def _print_unread_rows(stats: RowStats) -> None:
    """Prints the counts of a source if not all of it was read as it is."""
    lines = str(stats)
    if "\n" in lines:
        print(lines, file=sys.stderr)  # noqa: T201


def _print_next_step(folder: Path) -> None:
    print(f"tokenizer in {folder}", describe_next(list_next_commands("train-tokenizer", folder)), sep="\n")  # noqa: T201
