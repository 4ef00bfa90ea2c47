"""UltraChat: 208k multi-turn dialogues with ChatGPT, cleaned for Zephyr. Ding et al. 2023, arXiv:2305.14233.

Reads ultrachat_200k of the Hub (columns prompt, prompt_id, messages), and the original release with its list of texts.
"""

from rorchat.rows import ConvertedRow, alternate_turns
from rorchat.sources import messages

KIND = "conversation"
LICENCE = "MIT"
SIZE = "207,865 training dialogues"
HUB = {"path": "HuggingFaceH4/ultrachat_200k", "split": "train_sft"}
FILES = ("**/train_sft-*.parquet", "*.parquet", "*.jsonl")
RAW = [
    {
        "prompt": "What is red?",
        "prompt_id": "f0e37e9f7800261167ce91143f98f511f768847236f133f2d0aed60b444ed57d",
        "messages": [{"content": "What is red?", "role": "user"}, {"content": "A colour.", "role": "assistant"}],
    },
    {"id": "0", "data": ["What is red?", "A colour.", "And sour?", "A taste."]},
]


def convert(row: dict) -> dict | ConvertedRow:
    """Either format -> messages, without an unanswered question at the end."""
    if isinstance(row, dict) and isinstance(row.get("data"), list):
        return messages.convert(alternate_turns(row["data"]))
    return messages.convert(row)
