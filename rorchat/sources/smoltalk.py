"""SmolTalk: 1 million conversations, mostly synthetic, behind SmolLM2. Ben Allal et al. 2025, arXiv:2502.02737."""

from rorchat.sources import messages

KIND = "conversation"
LICENCE = "Apache-2.0"
SIZE = "1,043,917 training conversations"
HUB = {"path": "HuggingFaceTB/smoltalk", "name": "all", "split": "train"}
FILES = ("**/all/train-*.parquet", "**/train-*.parquet", "*.parquet", "*.jsonl")
RAW = [
    {
        "messages": [{"content": "What is red?", "role": "user"}, {"content": "A colour.", "role": "assistant"}],
        "source": "smol-magpie-ultra",
    }
]
convert = messages.convert
