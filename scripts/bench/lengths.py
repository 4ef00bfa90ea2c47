"""Measures the lengths of real conversations and pairs, from which the works `sft` and `dpo` are made (lengths.json).

    python scripts/bench/lengths.py DATA DATA/gpt2_tokenizer        # prints the content of lengths.json

DATA is a folder of datasets in their original formats, with the files in CHAT and PREFERENCE. The rows are encoded as
for training, in a window of 1,024 tokens; only their lengths are kept. The sample is deterministic: of all rows sorted
by length, those at positions (k + 1/2) / n for k from 0 to n - 1.
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
#: Files of conversations and the sources that read them. They contain no evaluation set and no duplicates, except that
#: dialogues_text.txt and train.zip have the same dialogues in another order.
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


def segment_lengths(labels: list[int]) -> list[int]:
    """Numbers of context, supervised, context, ... tokens in a row."""
    return [len(list(part)) for _, part in groupby(labels, key=lambda label: label != IGNORE_INDEX)]


def read_conversation_lengths(spec: str, tokenizer, window: int) -> list[list[int]]:
    """Segment lengths of the conversations of a source that have at least one exchange within the window."""
    encoded = encode_conversations(tokenizer, [row["messages"] for row in load_rows(spec, "conversation")], window)
    return [segment_lengths(row.labels) for row in encoded if row is not None]


def read_pair_lengths(spec: str, tokenizer, window: int) -> list[list[int]]:
    """[prompt, chosen, rejected] lengths of the pairs of a source that fit into the window without being cut."""
    rows = list(load_rows(spec, "preference"))
    sides = [
        encode_conversations(tokenizer, [[*row["prompt"], *row[side]] for row in rows])
        for side in ("chosen", "rejected")
    ]
    lengths = []
    for better, worse in zip(*sides, strict=True):
        # the last three segments: end of the prompt, reply, and the final line end, which is not supervised
        *_, chosen, end = segment_lengths(better.labels)
        *_, rejected, _ = segment_lengths(worse.labels)
        if max(len(better.labels), len(worse.labels)) <= window:
            lengths.append([len(better.labels) - chosen - end, chosen, rejected])
    return lengths


def read_all_conversations(data: Path, tokenizer, window: int) -> Iterator[tuple[str, list[list[int]]]]:
    """(file, segment lengths of its conversations) for every file in CHAT."""
    for file, source in CHAT.items():
        yield file, read_conversation_lengths(f"{source}={data / file}", tokenizer, window)


def sample_evenly(rows: list[list[int]], number: int) -> list[list[int]]:
    """A sample of the rows, evenly spaced in the order of their lengths."""
    ordered = sorted(rows, key=lambda row: (sum(row), row))
    return [ordered[(2 * k + 1) * len(ordered) // (2 * number)] for k in range(number)]


@exits_with_one_line
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with the files in CHAT and PREFERENCE")
    parser.add_argument("tokenizer", help="folder or Hub id")
    arguments = parser.parse_args(argv)
    tokenizer = load_tokenizer(arguments.tokenizer)
    conversations = [row for _, rows in read_all_conversations(arguments.data, tokenizer, WINDOW) for row in rows]
    pairs = [
        row
        for file, source in PREFERENCE.items()
        for row in read_pair_lengths(f"{source}={arguments.data / file}", tokenizer, WINDOW)
    ]
    kept = {
        "command": "python scripts/bench/lengths.py DATA DATA/gpt2_tokenizer",
        "window": WINDOW,
        "conversations": sample_evenly(conversations, CONVERSATIONS),
        "conversations_drawn_from": len(conversations),
        "pairs": sample_evenly(pairs, PAIRS),
        "pairs_drawn_from": len(pairs),
    }
    print("{\n" + ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in kept.items()) + "\n}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
