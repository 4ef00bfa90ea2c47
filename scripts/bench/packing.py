"""How full the rows of fine-tuning are: tokens / (rows x window), file by file and over all files together.

    python scripts/bench/packing.py DATA DATA/gpt2_tokenizer
    python scripts/bench/packing.py DATA DATA/gpt2_tokenizer --windows 1024 --write docs/benchmarks.md

DATA is a folder of datasets laid out as lengths.py says. The conversations are encoded as for training: in each window
the last turns of longer ones are cut, and those whose first exchange does not fit are left out. Three ways to make rows
of them, each of which must hold every conversation once:

    one a row   what padding to the window comes to
    TRL         pack_dataset with its strategy "bfd", which packs every 1,000 conversations by themselves
    rorchat     rorchat.mixture.packing.pack
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from lengths import WINDOW, conversations_in
from run import updated
from training import one_a_row

from rorchat.errors import exits_with_one_line
from rorchat.tokenizer import load_tokenizer

WINDOWS = (256, 512, WINDOW)
SECTION = "packing"
HEADING = f"""\
### {SECTION}: tokens / (rows x window)

`python scripts/bench/packing.py DATA DATA/gpt2_tokenizer`. A small file alone cannot fill its last row."""


def trl(lengths: Sequence[int], window: int) -> list[list[int]]:
    """The rows of `trl.pack_dataset`, by a dataset in which every token is its conversation's number."""
    from datasets import Dataset, disable_progress_bars
    from trl import pack_dataset

    disable_progress_bars()
    numbered = Dataset.from_dict({"input_ids": [[number] * length for number, length in enumerate(lengths)]})
    packed = pack_dataset(numbered, window)
    return [list(dict.fromkeys(row)) for row in packed["input_ids"]]


def rorchat(lengths: Sequence[int], window: int) -> list[list[int]]:
    from rorchat.mixture.packing import pack

    return pack(lengths, window)


WAYS = {"one a row": one_a_row, "TRL": trl, "rorchat": rorchat}


def density(pack: Callable[[Sequence[int], int], list[list[int]]], lengths: Sequence[int], window: int) -> float:
    """Tokens / (rows x window).

    Raises:
        ValueError: a conversation is missing or there twice, or a row is longer than the window.
    """
    rows = pack(lengths, window)
    if sorted(number for row in rows for number in row) != list(range(len(lengths))):
        raise ValueError(f"{pack.__name__}: the rows do not hold each of the {len(lengths)} conversations once")
    longest = max(sum(lengths[number] for number in row) for row in rows)
    if longest > window:
        raise ValueError(f"{pack.__name__}: a row has {longest} tokens, in a window of {window}")
    return sum(lengths) / (len(rows) * window)


def table(lengths_of: dict[str, list[int]], window: int) -> str:
    """The Markdown of one window.

    Args:
        lengths_of: tokens of every conversation, by file.
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
        found = [f"{density(pack, lengths, window):.2%}" for pack in WAYS.values()]
        lines.append(f"| {name} | {len(lengths):,} | {sum(lengths):,} | {' | '.join(found)} |")
    return "\n".join(lines)


@exits_with_one_line
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a folder laid out as in CHAT of lengths.py")
    parser.add_argument("tokenizer", help="a folder or a Hub id")
    parser.add_argument("--windows", type=int, nargs="+", default=WINDOWS)
    parser.add_argument("--write", type=Path, metavar="FILE.md", help=f"replace the section {SECTION!r} in this file")
    arguments = parser.parse_args(argv)
    if arguments.write:
        updated(arguments.write, {SECTION: ""})  # before the minutes, not after
    tokenizer = load_tokenizer(arguments.tokenizer)
    tables = []
    for window in arguments.windows:
        found = conversations_in(arguments.data, tokenizer, window)
        tables.append(table({name: [sum(row) for row in rows] for name, rows in found}, window))
    text = "\n\n".join([HEADING, *tables])
    print(text)
    if arguments.write:
        arguments.write.write_text(updated(arguments.write, {SECTION: text}), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
