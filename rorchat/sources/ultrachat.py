"""UltraChat: 208k dialogues of several turns with ChatGPT, cleaned for Zephyr. Ding et al. 2023, arXiv:2305.14233.

The Hub's ultrachat_200k (columns prompt, prompt_id, messages), or the original release with its bare list of texts.
"""

from rorchat.rows import message
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


def convert(row: dict) -> dict:
    """Either form -> messages; a last question nobody answers is left out."""
    if isinstance(row, dict) and isinstance(row.get("data"), list):
        row = [message(("user", "assistant")[number % 2], text) for number, text in enumerate(row["data"])]
    return messages.convert(row)
