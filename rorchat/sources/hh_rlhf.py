"""HH-RLHF: 161k pairs of dialogues about being helpful and harmless. Bai et al. 2022, arXiv:2204.05862.

Both sides are a whole dialogue in one string, and differ in the last reply. Part of it is offensive on purpose. The
test files are evaluation sets, and are read only if the path names them.
"""

import re

from rorchat.rows import RejectedRow, RepairedRow, get_text, message

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


def convert(row: dict) -> dict | RepairedRow:
    """{"chosen", "rejected"} -> the prompt that both share and two replies; a role's turns in a row are joined."""
    (chosen, joined), (rejected, joined_too) = (_turns(get_text(row, side)) for side in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise RejectedRow("different prompts", "chosen and rejected do not share all but their last message")
    pair = {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}
    return RepairedRow(pair, "turns of one speaker joined") if joined or joined_too else pair


def _turns(dialogue: str) -> tuple[list[dict], bool]:
    before, *parts = re.split(r"\n\n(Human|Assistant):", dialogue)
    if before.strip() or not parts:
        raise RejectedRow("wrong order", "a dialogue does not begin with '\\n\\nHuman:'")
    turns: list[dict] = []
    joined = False
    for speaker, said in zip(parts[::2], parts[1::2], strict=True):
        if turns and turns[-1]["role"] == _ROLES[speaker]:
            turns[-1]["content"], joined = f"{turns[-1]['content']}\n\n{said.strip()}".strip(), True
        else:
            turns.append(message(_ROLES[speaker], said.strip()))
    return turns, joined
