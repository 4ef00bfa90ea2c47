"""How long real conversations and pairs are: the lengths with which the works `sft` and `dpo` are made (lengths.json).

    python scripts/bench/lengths.py DATA DATA/gpt2_tokenizer        # prints what lengths.json is to hold

DATA is a folder of datasets in their original formats, laid out as in CHAT and PREFERENCE. The rows are encoded as for
training, in a window of 1,024 tokens, and counted; no word of them is kept. Of the rows of all files, sorted by length,
those are drawn that stand at (k + 1/2) / n for k from 0 to n - 1: no luck is in the draw, and the longest row
has its share.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from rorchat.chatml import IGNORE_INDEX, encode_conversations
from rorchat.errors import exits_with_one_line
from rorchat.sources.registry import load_rows
from rorchat.tokenizer import load_tokenizer

WINDOW = 1024
CONVERSATIONS, PAIRS = 96, 32
#: Files of conversations, and the source that reads each. No evaluation set is among them, and no file that is part of
#: another one but dialogues_text.txt, of which train.zip has the same dialogues in another order.
CHAT = {
    "alpaca/alpaca_5000.json": "alpaca",
    "alpaca/alpaca_en_demo.json": "alpaca",
    "alpaca/alpaca_tiny.json": "alpaca",
    "alpaca/instruction-data.json": "alpaca",
    "alpaca/seed_tasks.jsonl": "alpaca",
    "chat/axolotl_sharegpt_conversation.json": "messages",
    "chat/deita_subset_test_sft.parquet": "messages",
    "chat/dolly_hhrlhf_train_small.jsonl": "prompt_completion",
    "chat/moss003_messages.jsonl": "messages",
    "chat/moss003_original_example.json": "moss",
    "chat/openai_sft.jsonl": "messages",
    "chat/tulu3_oasst1_sft_sample.jsonl": "messages",
    "code_alpaca/code_alpaca_2k.json": "code_alpaca",
    "cornell_movie_dialogs/movie_conversations.txt": "cornell_movie_dialogs",
    "dailydialog/dialogues_text.txt": "dailydialog",
    "dailydialog/train.zip": "dailydialog",
    "gsm8k/train.jsonl": "gsm8k",
    "preference/kto_en_demo.json": "messages",
}
PREFERENCE = {
    "preference/dpo_en_demo.json": "preference",
    "preference/instruction-data-with-preference.json": "preference",
    "preference/tulu3_preference_sample.jsonl": "preference",
    "preference/ultrafeedback_train_1000.jsonl": "ultrafeedback",
}


def stretches(labels: list[int]) -> list[int]:
    """How many tokens are context, then supervised, then context, and so on; their sum is the row's length."""
    return [len(list(part)) for _, part in groupby(labels, key=lambda label: label != IGNORE_INDEX)]


def conversations_of(spec: str, tokenizer, window: int) -> list[list[int]]:
    """The stretches of every conversation of a source that has an exchange in the window."""
    encoded = encode_conversations(tokenizer, [row["messages"] for row in load_rows(spec, "conversation")], window)
    return [stretches(row.labels) for row in encoded if row is not None]


def pairs_of(spec: str, tokenizer, window: int) -> list[list[int]]:
    """[prompt, chosen, rejected] tokens of every pair of a source of which both sides fit into the window."""
    rows = list(load_rows(spec, "preference"))
    sides = [
        encode_conversations(tokenizer, [[*row["prompt"], *row[side]] for row in rows])
        for side in ("chosen", "rejected")
    ]
    found = []
    for better, worse in zip(*sides, strict=True):
        # the last three stretches: the prompt's end, the reply, and the line end behind it, which is not trained
        *_, chosen, end = stretches(better.labels)
        *_, rejected, _ = stretches(worse.labels)
        if max(len(better.labels), len(worse.labels)) <= window:
            found.append([len(better.labels) - chosen - end, chosen, rejected])
    return found


def conversations_in(data: Path, tokenizer, window: int) -> Iterator[tuple[str, list[list[int]]]]:
    """(file, stretches of its conversations) of every file of CHAT."""
    for file, source in CHAT.items():
        yield file, conversations_of(f"{source}={data / file}", tokenizer, window)


def drawn(rows: list[list[int]], number: int) -> list[list[int]]:
    """So many of the rows, evenly over their lengths."""
    ordered = sorted(rows, key=lambda row: (sum(row), row))
    return [ordered[(2 * k + 1) * len(ordered) // (2 * number)] for k in range(number)]


@exits_with_one_line
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a folder laid out as in CHAT and PREFERENCE")
    parser.add_argument("tokenizer", help="a folder or a Hub id")
    arguments = parser.parse_args(argv)
    tokenizer = load_tokenizer(arguments.tokenizer)
    conversations = [row for _, rows in conversations_in(arguments.data, tokenizer, WINDOW) for row in rows]
    pairs = [
        row
        for file, source in PREFERENCE.items()
        for row in pairs_of(f"{source}={arguments.data / file}", tokenizer, WINDOW)
    ]
    kept = {
        "command": "python scripts/bench/lengths.py DATA DATA/gpt2_tokenizer",
        "window": WINDOW,
        "conversations": drawn(conversations, CONVERSATIONS),
        "conversations_drawn_from": len(conversations),
        "pairs": drawn(pairs, PAIRS),
        "pairs_drawn_from": len(pairs),
    }
    print("{\n" + ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in kept.items()) + "\n}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
