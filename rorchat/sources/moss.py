"""MOSS-003: about 1.1 million dialogues with ChatGPT, English and Chinese. Sun et al. 2024.

The release has one JSON object per dialogue, with role marks in the texts. The system prompt, according to which the
model is MOSS, and the model's thoughts and tool commands are not used.
"""

import re

from rorchat.rows import RejectedRow, get_text, message

KIND = "conversation"
LICENCE = "CC BY-NC 4.0 in its repository, CC BY 4.0 on the Hub (not for commercial use)"
SIZE = "1,074,551 dialogues without plugins"
HUB = None
FILES = ("**/*.json", "**/*.jsonl")
RAW = [
    {
        "conversation_id": "1",
        "meta_instruction": "You are an AI assistant whose name is MOSS.\n",
        "num_turns": 1,
        "chat": {
            "turn_1": {
                "Human": "<|Human|>: What is red?<eoh>\n",
                "Inner Thoughts": "<|Inner Thoughts|>: None<eot>\n",
                "Commands": "<|Commands|>: None<eoc>\n",
                "Tool Responses": "<|Results|>: None<eor>\n",
                "MOSS": "<|MOSS|>: A colour.<eom>\n",
            }
        },
    }
]
_MARKS = re.compile(r"^\s*<\|(?:Human|MOSS)\|>:\s*|\s*<eo[hm]>\s*$")


def convert(row: dict) -> dict:
    """{"chat": {"turn_1": {"Human", "MOSS", ...}, ...}} -> messages."""
    chat = row.get("chat") if isinstance(row, dict) else None
    if not isinstance(chat, dict):
        raise RejectedRow("missing field" if isinstance(row, dict) else "wrong type", "no object 'chat' in the row")
    turns = []
    for number in range(1, len(chat) + 1):
        for speaker, role in (("Human", "user"), ("MOSS", "assistant")):
            turns.append(message(role, _MARKS.sub("", get_text(chat.get(f"turn_{number}"), speaker))))
    return {"messages": turns}
