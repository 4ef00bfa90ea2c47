"""UltraFeedback binarized: 61k preferences, scored by GPT-4. Cui et al. 2023, arXiv:2310.01377.

Reads the format of Zephyr, and copies with the replies as plain texts.
"""

from rorchat.sources import preference

KIND = "preference"
LICENCE = "MIT"
SIZE = "61,135 training pairs"
HUB = {"path": "HuggingFaceH4/ultrafeedback_binarized", "split": "train_prefs"}
FILES = ("**/train_prefs-*.parquet", "*train*.jsonl", "*train*.json", "*train*.parquet")
RAW = [
    {
        "prompt": "What is red?",
        "prompt_id": "6e8a",
        "chosen": [{"content": "What is red?", "role": "user"}, {"content": "A colour.", "role": "assistant"}],
        "rejected": [{"content": "What is red?", "role": "user"}, {"content": "No.", "role": "assistant"}],
        "score_chosen": 8.0,
        "score_rejected": 2.0,
    },
    {"prompt": "What is red?", "chosen": "A colour.", "rejected": "No."},
]
convert = preference.convert
