"""Your own pairs of prompt and completion (or response), as texts or as lists of messages (TRL's format).

From a prompt in the Alpaca template ("### Instruction: ... ### Response:"), as in dolly_hhrlhf, the template is
removed. Replies in a prompt are not learned, as in TRL.
"""

import re

from rorchat.reading.messages import normalize_messages
from rorchat.rows import ConvertedRow, RejectedRow, get_text, message
from rorchat.sources.base import OWN_FILES
from rorchat.sources.messages import trim

KIND = "conversation"
LICENCE = OWN_FILES
SIZE = "your files"
HUB = None
FILES = ("**/*",)
RAW = [
    {"prompt": "What is red?", "completion": "A colour."},
    {"prompt": "### Instruction:\nWhat is red?\n\n### Response:\n", "response": "A colour."},
    {"prompt": [{"role": "user", "content": "Red?"}], "completion": [{"role": "assistant", "content": "A colour."}]},
]
_TEMPLATE = re.compile(
    r"(?:Below is an instruction[^\n]*\n\n)?### Instruction:\n(.*?)(?:\n\n### Input:\n(.*?))?\n\n### Response:\s*", re.S
)


def convert(row: dict) -> dict | ConvertedRow:
    """{"prompt", "completion"} or {"prompt", "response"} -> messages."""
    if not isinstance(row, dict):
        raise RejectedRow("wrong type", f"a row is a {type(row).__name__}, expected an object with 'prompt'")
    reply = "response" if "completion" not in row and "response" in row else "completion"
    if isinstance(row.get("prompt"), list) and isinstance(row.get(reply), list):
        return trim([*map(_unlearn, normalize_messages(row["prompt"])), *normalize_messages(row[reply])])
    prompt = get_text(row, "prompt")
    if template := _TEMPLATE.fullmatch(prompt):
        prompt = "\n\n".join(part.strip() for part in template.groups() if part)
    return {"messages": [message("user", prompt.strip()), message("assistant", get_text(row, reply).strip())]}


def _unlearn(turn: dict) -> dict:
    """A turn of a prompt: a reply in it is not learned."""
    return message(turn["role"], turn["content"], train=False) if turn["role"] == "assistant" else turn
