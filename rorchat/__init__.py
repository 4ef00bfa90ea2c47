"""rorchat: from raw text to your own chat model, stock GPT-2 from the first byte to the Hub.

Data flows in this order, in which modules may also import each other (`STAGES`):

    raw text -> chat -> tokens -> model -> words -> scores -> training -> report -> hub

Importing `rorchat` is cheap: a public name imports its module on first use.
"""

import importlib

__version__ = "0.1.0"

#: The modules in the order in which data flows. A module imports only from earlier stages (tests/test_layout.py).
STAGES = (
    "errors",  # exceptions with exit codes, and one-line messages
    "console",  # messages and progress bars of libraries
    "files",  # atomic writes, fsync, sha256, folder locks
    "jsonl",  # JSON Lines files
    "yaml_file",  # a YAML file -> its values
    "stories",  # the files of the stories, found by name
    "persona",  # raw data: system message, conversations about the model, probes
    "rows",  # raw data: the kinds of rows, and reasons to reject one
    "validation_split",  # raw data: the hash that decides between training and validation
    "reading",  # raw data: files -> raw rows
    "sources",  # raw data: one file per dataset: raw row -> document, conversation or preference
    "chatml",  # chat: control tokens, template, conversation -> (input_ids, labels), context window
    "tokenizer",  # tokens: train a BPE, load a tokenizer, add the control tokens
    "tokens",  # tokens: text -> shards in a token store
    "mixture",  # tokens: token stores -> mixed rows -> batches
    "inspection",  # tokens: problems of a dataset, and a row as the model gets it
    "device",  # model: peak FLOPS, memory and price of a GPU or CPU
    "adapter",  # model: LoRA adapters in a folder: verify, load, merge
    "model",  # model: sizes, from scratch or from a checkpoint, FLOPs
    "inference",  # words: load, generate, stream, chat
    "evaluation",  # scores: loss, bits per byte, chat behaviour, questions with known answers
    "training",  # training: pretrain, sft, dpo, grpo
    "plan",  # budget -> size, tokens, memory, hours, price
    "reporting",  # run folders -> curves, tables, samples
    "hub",  # verify, push, download, verify again
    "recipes",  # the training commands, and the settings of the stories
    "cli",  # the command `rorchat`
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
