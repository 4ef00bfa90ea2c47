"""HH-RLHF: 161k preferences between helpful and harmless replies. Bai et al. 2022, arXiv:2204.05862.

Each side is a whole dialogue in one string; the two differ in the last reply. Part of the text is deliberately
offensive. The test files are evaluation sets and only read if the path names them.
"""

import re

from rorchat.rows import ConvertedRow, RejectedRow, get_text, message

KIND = "preference"
LICENCE = "MIT"
SIZE = "160,800 training pairs"
HUB = {"path": "Anthropic/hh-rlhf", "split": "train"}
FILES = ("**/train.jsonl", "**/train-*.parquet")
RAW = [
    {
        "chosen": "\n\nHuman: What is red?\n\nAssistant: A colour.",
        "rejected": "\n\nHuman: What is red?\n\nAssistant: No.",
    },
]
_ROLES = {"Human": "user", "Assistant": "assistant"}


def convert(row: dict) -> dict | ConvertedRow:
    """{"chosen", "rejected"} -> the shared prompt and two replies. Consecutive turns of one role are joined."""
    chosen, was_joined = _split_turns(get_text(row, "chosen"))
    rejected, was_joined_too = _split_turns(get_text(row, "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise RejectedRow("different prompts", "chosen and rejected differ before their last message")
    pair = {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}
    return ConvertedRow(pair, repairs=("turns of one speaker joined",)) if was_joined or was_joined_too else pair


def _split_turns(dialogue: str) -> tuple[list[dict], bool]:
    """(messages, whether turns were joined) of a dialogue."""
    before, *parts = re.split(r"\n\n(Human|Assistant):", dialogue)
    if before.strip() or not parts:
        raise RejectedRow("wrong order", "a dialogue does not begin with '\\n\\nHuman:'")
    turns: list[dict] = []
    was_joined = False
    for speaker, text in zip(parts[::2], parts[1::2], strict=True):
        if turns and turns[-1]["role"] == _ROLES[speaker]:
            turns[-1]["content"], was_joined = f"{turns[-1]['content']}\n\n{text.strip()}".strip(), True
        else:
            turns.append(message(_ROLES[speaker], text.strip()))
    return turns, was_joined
