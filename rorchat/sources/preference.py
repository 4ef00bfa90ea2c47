"""Your own preferences: a prompt with a chosen and a rejected reply, in the formats of most datasets.

Strings (`{"prompt", "chosen", "rejected"}`), message lists that share their prompt (UltraFeedback binarized, Tulu 3),
LLaMA-Factory's `{"conversations", "chosen", "rejected"}`, and Alpaca rows with `chosen` and `rejected`. The replies may
also have the names of TRL's Stack Exchange data (`response_j`, `response_k`) or OpenAI's (`columns.py`).
"""

from rorchat.reading.messages import normalize_messages
from rorchat.rows import RejectedRow, get_instruction, get_text, message
from rorchat.sources.base import OWN_FILES

KIND = "preference"
LICENCE = OWN_FILES
SIZE = "your files"
HUB = None
FILES = ("**/*",)
RAW = [
    {"prompt": "What is red?", "chosen": "A colour.", "rejected": "No."},
    {
        "prompt": "What is red?",
        "chosen": [{"role": "user", "content": "What is red?"}, {"role": "assistant", "content": "A colour."}],
        "rejected": [{"role": "user", "content": "What is red?"}, {"role": "assistant", "content": "No."}],
    },
    {
        "conversations": [{"from": "human", "value": "What is red?"}],
        "chosen": {"from": "gpt", "value": "A colour."},
        "rejected": {"from": "gpt", "value": "No."},
    },
    {"instruction": "What is it?", "input": "red", "output": "A colour.", "chosen": "A colour.", "rejected": "No."},
]


def convert(row: dict) -> dict:
    """Any of the formats -> {"prompt": [messages], "chosen": [message], "rejected": [message]}."""
    for side in ("chosen", "rejected"):
        if not isinstance(row, dict) or side not in row:
            is_kto = isinstance(row, dict) and "label" in row
            hint = ": a reply with a label (KTO) is not a pair of replies" if is_kto else ""
            raise RejectedRow("missing field", f"no {side!r}{hint}")
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, list) and isinstance(rejected, list):
        return _convert_lists(row, normalize_messages(chosen), normalize_messages(rejected))
    if "conversations" in row:
        return {
            "prompt": normalize_messages(row["conversations"]),
            "chosen": normalize_messages([chosen]),
            "rejected": normalize_messages([rejected]),
        }
    if "instruction" in row and "prompt" not in row:
        prompt = [message("user", get_instruction(row))]
    elif isinstance(row.get("prompt"), list):
        prompt = normalize_messages(row["prompt"])
    else:
        prompt = [message("user", get_text(row, "prompt"))]
    return {
        "prompt": prompt,
        "chosen": [message("assistant", get_text(row, "chosen"))],
        "rejected": [message("assistant", get_text(row, "rejected"))],
    }


def _convert_lists(row: dict, chosen: list[dict], rejected: list[dict]) -> dict:
    if isinstance(row.get("prompt"), list):
        return {"prompt": normalize_messages(row["prompt"]), "chosen": chosen, "rejected": rejected}
    if isinstance(row.get("prompt"), str) and len(chosen) == len(rejected) == 1:
        return {"prompt": [message("user", row["prompt"])], "chosen": chosen, "rejected": rejected}
    if chosen[:-1] != rejected[:-1]:
        raise RejectedRow("different prompts", "chosen and rejected differ before their last message")
    return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}
