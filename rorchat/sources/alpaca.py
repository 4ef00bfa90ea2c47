"""Stanford Alpaca: 52k instructions with answers by text-davinci-003. Taori et al. 2023.

Also reads the 175 seed tasks of Self-Instruct, from which it was generated. They have the same fields one level deeper.
"""

from rorchat.rows import RejectedRow, exchange, get_instruction, get_text

KIND = "conversation"
LICENCE = "CC BY-NC 4.0 (not for commercial use)"
SIZE = "52,002 rows"
HUB = {"path": "tatsu-lab/alpaca", "split": "train"}
FILES = ("alpaca_data.json", "*.json", "*.jsonl", "*.parquet")
RAW = [
    {"instruction": "Name a primary colour.", "input": "", "output": "Red."},
    {"instruction": "Translate into French.", "input": "Good day", "output": "Bonjour"},
    {"instruction": "What is the capital of Peru?", "input": "<noinput>", "output": "Lima."},
    {"id": "seed_task_0", "instruction": "Name a colour.", "instances": [{"input": "", "output": "Red."}]},
]


def convert(row: dict) -> dict:
    """{"instruction", "input", "output"} -> one question and answer; the input follows the instruction.

    For a seed task, {"instruction", "instances": [{"input", "output"}]}, the first instance is used.
    """
    if isinstance(row, dict) and isinstance(row.get("instances"), list):
        if not row["instances"] or not isinstance(row["instances"][0], dict):
            raise RejectedRow("missing field", "no object in 'instances'")
        row = {**row, **row["instances"][0]}
    return exchange(get_instruction(row), get_text(row, "output"))
