"""Cosmopedia: textbooks, stories and articles written by Mixtral-8x7B-Instruct. Ben Allal et al. 2024, Hugging Face.

`HUB` has the first file of each of the eight parts (auto_math_text, khanacademy, openstax, stanford, stories,
web_samples_v1, web_samples_v2, wikihow), which share their columns. The prompt is not used.
"""

from rorchat.rows import get_text

KIND = "document"
LICENCE = "Apache-2.0"
SIZE = "about 30 million texts"
HUB = {"path": "HuggingFaceTB/cosmopedia", "data_files": "data/*/train-00000-of-*.parquet", "split": "train"}
FILES = ("train-*.parquet", "data/*/train-*.parquet", "*/train-*.parquet", "*.parquet", "*.jsonl")
RAW = [
    {
        "prompt": "Write a story for young children about a squirrel.",
        "text_token_length": 8,
        "text": "Once upon a time, Pip the squirrel found a nut.",
        "seed_data": "ultrachat",
        "format": "story_children",
        "audience": "young_children",
    }
]


def convert(row: dict) -> dict:
    """{"prompt", "text", ...} -> {"text"}, without the leading space of the generator."""
    return {"text": get_text(row, "text").strip()}
