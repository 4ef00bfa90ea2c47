"""rorchat: from raw text to your own chat model, stock GPT-2 from the first byte to the Hub.

The way of the data, which is also the order in which modules may import each other (`STAGES`):

    raw text -> chat -> tokens -> model -> words -> scores -> training -> report -> hub

Importing `rorchat` is cheap: the public names below load what they need on first use.
"""

import importlib
import logging

__version__ = "0.1.0"

# bitsandbytes says at every import on a CPU that it has no 4-bit kernel, which nothing here asks for
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

#: The way of the data. A module imports only from stages before its own (tests/test_layout.py).
STAGES = (
    "errors",  # exit codes, and what a failure says
    "files",  #           atomic writes, fsync, sha256, a lock for a folder
    "jsonl",  #           JSON lines files
    "yaml_file",  #      a YAML file -> its values
    "stories",  # the YAML files of the stories, by name
    "persona",  # RAW DATA  who the model is: system message, identity conversations, probes
    "rows",  # RAW DATA  the kinds of rows, and what makes a row unusable
    "reading",  # RAW DATA  files -> raw rows
    "sources",  # RAW DATA  one file per dataset: raw row -> document, conversation or preference
    "chatml",  # CHAT      control tokens, template, conversation -> (input_ids, labels), context window
    "tokenizer",  # TOKENS    train a BPE, load one, add the control tokens
    "tokens",  # TOKENS    text -> shards -> mixture -> rows
    "mixture",  # TOKENS    token stores -> mixed rows -> batches
    "inspection",  # TOKENS    what is wrong with data, and what a model sees of a row
    "device",  # MODEL     what a GPU or CPU can do: peaks, memory, price
    "adapter",  # MODEL     LoRA adapters in a folder: verify, load, merge into their base
    "model",  # MODEL     sizes, from scratch or from a checkpoint, FLOPs
    "inference",  # WORDS     load, generate, stream, talk
    "evaluation",  # SCORES    loss, bits per byte, chat behaviour, held-out questions
    "training",  # TRAINING  pretrain, sft, dpo, grpo
    "plan",  #           budget -> shape, tokens, memory, hours, money
    "report",  #           run folders -> curves, tables, samples
    "hub",  # HUB       verify, push, pull back, verify again
    "recipes",  #           one launched command per stage, and the settings of the stories
    "cli",  #           `rorchat ...`
)

_HOMES = {
    "RorchatError": "rorchat.errors",
    "encode_conversation": "rorchat.chatml",
    "encode_prompt": "rorchat.chatml",
    "train_tokenizer": "rorchat.tokenizer",
    "load_tokenizer": "rorchat.tokenizer",
    "load_model": "rorchat.inference.engine",
    "generate_text": "rorchat.inference.engine",
    "stream_text": "rorchat.inference.engine",
}

__all__ = ["STAGES", "__version__", *_HOMES]


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'rorchat' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
