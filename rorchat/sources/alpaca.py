"""Stanford Alpaca: 52k instructions with answers by text-davinci-003. Taori et al. 2023."""

from rorchat.sources._rows import Reject, message, text_of

KIND = "conversation"
LICENCE = "CC BY-NC 4.0 (not for commercial use)"
HUB = {"path": "tatsu-lab/alpaca", "split": "train"}
FILES = ("alpaca_data.json", "*.json", "*.jsonl", "*.parquet")
RAW = [
    {"instruction": "Name a primary colour.", "input": "", "output": "Red."},
    {"instruction": "Translate into French.", "input": "Good day", "output": "Bonjour"},
    {"instruction": "What is the capital of Peru?", "input": "<noinput>", "output": "Lima."},
]


def convert(row: dict) -> dict:
    """{"instruction", "input", "output"} -> one exchange; the input follows the instruction after an empty line."""
    instruction, output = text_of(row, "instruction").strip(), text_of(row, "output")
    # 59 of 5,000 rows say so where others leave it empty: "<noinput>", "No input.", "[noinput]", "No input needed"
    given = text_of(row, "input").strip() if row.get("input") is not None else ""
    if "".join(filter(str.isalpha, given)).lower() in ("noinput", "noinputneeded", "noinputrequired"):
        given = ""
    if not instruction:
        raise Reject("empty question", "instruction")
    return {
        "messages": [
            message("user", f"{instruction}\n\n{given}" if given else instruction),
            message("assistant", output),
        ]
    }
