"""Smol-SmolTalk: 460k conversations of SmolTalk for models under 1B. Ben Allal et al. 2025, arXiv:2502.02737."""

from rorchat.sources import messages

KIND = "conversation"
LICENCE = "Apache-2.0"
SIZE = "460,341 training conversations"
HUB = {"path": "HuggingFaceTB/smol-smoltalk", "split": "train"}
FILES = ("**/train-*.parquet", "*.parquet", "*.jsonl")
RAW = [
    {
        "messages": [{"content": "What is red?", "role": "user"}, {"content": "A colour.", "role": "assistant"}],
        "source": "smol-magpie-ultra-short",
    }
]
convert = messages.convert
