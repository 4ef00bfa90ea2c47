"""Measures how full packed rows are: tokens / (rows x window), for each file and for all files together.

    python scripts/bench/packing.py DATA DATA/gpt2_tokenizer
    python scripts/bench/packing.py DATA DATA/gpt2_tokenizer --windows 1024 --write docs/benchmarks.md

DATA is a folder of datasets as in lengths.py. Conversations are encoded as for training: turns beyond the window are
cut, and conversations whose first exchange does not fit are left out. Each way must contain every conversation once:

    one a row   padding to the window
    TRL         pack_dataset with the strategy "bfd", which packs every 1,000 conversations separately
    rorchat     rorchat.mixture.packing.pack
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from lengths import WINDOW, read_all_conversations
from run import replace_sections
from training import one_row_each

from rorchat.errors import exits_with_one_line
from rorchat.tokenizer import load_tokenizer

WINDOWS = (256, 512, WINDOW)
SECTION = "packing"
HEADING = f"""\
### {SECTION}: tokens / (rows x window)

`python scripts/bench/packing.py DATA DATA/gpt2_tokenizer`. A small file cannot fill its last row."""


def pack_trl(lengths: Sequence[int], window: int) -> list[list[int]]:
    """Rows of `trl.pack_dataset`, from a dataset in which every token is the number of its conversation."""
    from datasets import Dataset, disable_progress_bars
    from trl import pack_dataset

    disable_progress_bars()
    numbered = Dataset.from_dict({"input_ids": [[number] * length for number, length in enumerate(lengths)]})
    packed = pack_dataset(numbered, window)
    return [list(dict.fromkeys(row)) for row in packed["input_ids"]]


def pack_rorchat(lengths: Sequence[int], window: int) -> list[list[int]]:
    from rorchat.mixture.packing import pack

    return pack(lengths, window)


WAYS = {"one a row": one_row_each, "TRL": pack_trl, "rorchat": pack_rorchat}


def density(pack: Callable[[Sequence[int], int], list[list[int]]], lengths: Sequence[int], window: int) -> float:
    """Tokens / (rows x window).

    Raises:
        ValueError: A conversation is missing or repeated, or a row is longer than the window.
    """
    rows = pack(lengths, window)
    if sorted(number for row in rows for number in row) != list(range(len(lengths))):
        raise ValueError(f"{pack.__name__}: the rows do not contain each of the {len(lengths)} conversations once")
    longest = max(sum(lengths[number] for number in row) for row in rows)
    if longest > window:
        raise ValueError(f"{pack.__name__}: a row has {longest} tokens, but the window is {window}")
    return sum(lengths) / (len(rows) * window)


def table(lengths_of: dict[str, list[int]], window: int) -> str:
    """Markdown table of one window.

    Args:
        lengths_of: Tokens of every conversation, by file.
    """
    everything = [length for lengths in lengths_of.values() for length in lengths]
    lines = [
        f"| window {window:,} | conversations | tokens | {' | '.join(WAYS)} |",
        "|" + "---|" * (3 + len(WAYS)),
    ]
    for name, lengths in {**lengths_of, "**all together**": everything}.items():
        if not lengths:
            lines.append(f"| {name} | 0 | 0 | {' | '.join(['none fits'] * len(WAYS))} |")
            continue
        densities = [f"{density(pack, lengths, window):.2%}" for pack in WAYS.values()]
        lines.append(f"| {name} | {len(lengths):,} | {sum(lengths):,} | {' | '.join(densities)} |")
    return "\n".join(lines)


@exits_with_one_line
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with the files in CHAT of lengths.py")
    parser.add_argument("tokenizer", help="folder or Hub id")
    parser.add_argument("--windows", type=int, nargs="+", default=WINDOWS)
    parser.add_argument("--write", type=Path, metavar="FILE.md", help=f"replace the section {SECTION!r} in this file")
    arguments = parser.parse_args(argv)
    if arguments.write:
        replace_sections(arguments.write, {SECTION: ""})  # fails now rather than after measuring
    tokenizer = load_tokenizer(arguments.tokenizer)
    tables = []
    for window in arguments.windows:
        lengths_by_file = read_all_conversations(arguments.data, tokenizer, window)
        tables.append(table({name: [sum(row) for row in rows] for name, rows in lengths_by_file}, window))
    text = "\n\n".join([HEADING, *tables])
    print(text)
    if arguments.write:
        arguments.write.write_text(replace_sections(arguments.write, {SECTION: text}), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
