"""Stanford Alpaca: 52k instructions with answers by text-davinci-003. Taori et al. 2023."""

from rorchat.sources._rows import exchange, instruction_of, text_of

KIND = "conversation"
LICENCE = "CC BY-NC 4.0 (not for commercial use)"
SIZE = "52,002 rows"
HUB = {"path": "tatsu-lab/alpaca", "split": "train"}
FILES = ("alpaca_data.json", "*.json", "*.jsonl", "*.parquet")
RAW = [
    {"instruction": "Name a primary colour.", "input": "", "output": "Red."},
    {"instruction": "Translate into French.", "input": "Good day", "output": "Bonjour"},
    {"instruction": "What is the capital of Peru?", "input": "<noinput>", "output": "Lima."},
]


def convert(row: dict) -> dict:
    """{"instruction", "input", "output"} -> one exchange; the input follows the instruction after an empty line."""
    return exchange(instruction_of(row), text_of(row, "output"))
