"""CodeAlpaca: 20k instructions about code with answers by text-davinci-003. Chaudhary 2023."""

from rorchat.sources import alpaca

KIND = "conversation"
LICENCE = "CC BY-NC 4.0 in its repository, CC BY 4.0 on the Hub (not for commercial use)"
SIZE = "20,022 rows"
HUB = {"path": "sahil2801/CodeAlpaca-20k", "split": "train"}
FILES = ("code_alpaca_20k.json", "code_alpaca_*.json", "*.json", "*.jsonl", "*.parquet")
RAW = [
    {"instruction": "Write a function that adds two numbers.", "input": "", "output": "def add(a, b):\n  return a + b"},
    {"instruction": "Find the error.", "input": "print('Hello)", "output": "A quotation mark is missing."},
]
convert = alpaca.convert
