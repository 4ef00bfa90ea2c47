"""rorchat: train your own chat model, from raw text to the Hugging Face Hub. The model is always a stock GPT-2.

In the order of the work:

    rorchat.new               your data and hours -> a project: a folder with the settings of all stages
    rorchat.run               a project -> a chat model

or stage by stage:

    rorchat.train_tokenizer   text -> a tokenizer
    rorchat.pretrain          documents -> a base model, which continues texts
    rorchat.sft               a base model and conversations -> a chat model
    rorchat.dpo               pairs of a better and a worse reply -> a chat model that prefers the better ones
    rorchat.grpo              questions with known answers -> a chat model that is rewarded for right replies
    rorchat.load              a model to talk to: `.chat("Hello")`, `.complete("Once upon a time")`
    rorchat.evaluate          the scores of several models, as a table
    rorchat.gate              does a chat model stop, repeat itself, know who it is?
    rorchat.report            a report with curves about one or more runs
    rorchat.push              a model with a model card on the Hub

`help(rorchat.sft)` shows the settings of a stage. The functions run in this process, return their results, and raise
`rorchat.RorchatError`. docs/python.md shows all of them at work. Importing `rorchat` is quick: a public name imports
its module on first use.

Parts of the stages: `encode_conversation` and `encode_prompt` (chat format), `load_tokenizer`, `load_model`,
`generate_text` and `stream_text`. `STAGES` lists the modules in the order in which data flows through them.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rorchat.api.models import evaluate, gate, load, push, report
    from rorchat.api.project import new, run
    from rorchat.api.training import dpo, grpo, pretrain, sft, train_tokenizer
    from rorchat.chatml import encode_conversation, encode_prompt
    from rorchat.errors import RorchatError
    from rorchat.inference.engine import generate_text, load_model, stream_text
    from rorchat.tokenizer import load_tokenizer

__version__ = "0.1.0"

#: The modules in the order in which data flows. A module imports only from earlier stages (tests/test_layout.py).
STAGES = (
    "errors",  # exceptions with exit codes, and one-line messages
    "console",  # messages and progress bars of libraries
    "files",  # atomic writes, fsync, sha256, folder locks
    "jsonl",  # JSON Lines files
    "hub_client",  # errors of the Hub's client
    "yaml_file",  # a YAML file -> its values
    "stories",  # the files of the stories, found by name
    "project_folder",  # where a project keeps its runs, and how far they have come
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
    "precision",  # model: which precision is fastest here
    "device",  # model: peak FLOPS, memory and price of a GPU or CPU
    "adapter",  # model: LoRA adapters in a folder: verify, load, merge
    "model",  # model: sizes, from scratch or from a checkpoint, FLOPs
    "inference",  # replies: load, generate, stream, chat
    "lineage",  # scores: the runs behind a model, and their sources and persona
    "evaluation",  # scores: loss, bits per byte, chat behaviour, questions with known answers
    "training",  # training: pretrain, sft, dpo, grpo
    "plan",  # budget -> size, tokens, memory, hours, price
    "project",  # your data, hours and machine -> a story made to measure, and its run
    "reporting",  # run folders -> curves, tables, samples
    "hub",  # verify, push, download, verify again
    "recipes",  # the training commands, and the settings of the stories
    "api",  # the commands as Python functions
    "cli",  # the command `rorchat`
)

_HOMES = {
    "new": "rorchat.api.project",
    "run": "rorchat.api.project",
    "train_tokenizer": "rorchat.api.training",
    "pretrain": "rorchat.api.training",
    "sft": "rorchat.api.training",
    "dpo": "rorchat.api.training",
    "grpo": "rorchat.api.training",
    "load": "rorchat.api.models",
    "evaluate": "rorchat.api.models",
    "gate": "rorchat.api.models",
    "report": "rorchat.api.models",
    "push": "rorchat.api.models",
    "RorchatError": "rorchat.errors",
    "encode_conversation": "rorchat.chatml",
    "encode_prompt": "rorchat.chatml",
    "load_tokenizer": "rorchat.tokenizer",
    "load_model": "rorchat.inference.engine",
    "generate_text": "rorchat.inference.engine",
    "stream_text": "rorchat.inference.engine",
}

# written out for type checkers, which do not read _HOMES
__all__ = [
    "new", "run", "train_tokenizer", "pretrain", "sft", "dpo", "grpo", "load", "evaluate", "gate", "report", "push",
    "RorchatError", "encode_conversation", "encode_prompt", "load_tokenizer", "load_model", "generate_text",
    "stream_text", "STAGES", "__version__",
]  # fmt: skip


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'rorchat' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
