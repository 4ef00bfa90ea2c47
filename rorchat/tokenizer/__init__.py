"""Trains a byte-level BPE tokenizer with the ChatML control tokens, or loads one and adds them.

Every returned tokenizer contains the ChatML control tokens, reserved tokens up to a multiple of 64 and a chat template,
and loads with plain `AutoTokenizer`. No merge can produce a control token, because the splitting pattern separates `<|`
from the word that follows.
"""

import hashlib
import json
import os
import re
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path

from rorchat.chatml import (
    CONTROL_TOKENS,
    END_OF_TEXT,
    IM_END,
    IM_START,
    PAD,
    VOCABULARY_MULTIPLE,
    chat_template,
    encode_text,
    reserved_token,
    system_message,
)
from rorchat.errors import DataError, MismatchError, UsageError, shorten_error
from rorchat.hub_client import explain_failed_load
from rorchat.persona import Persona, load_persona
from rorchat.project_folder import find_last_run, is_project
from rorchat.sources.registry import CHAT_PREFIX, find_source, list_sources
from rorchat.tokenizer.training_text import BoundedText

# GPT-2's pattern, except that each digit is a separate token without the space before it. A number is therefore
# tokenized the same way everywhere, and sums can be learned digit by digit.
SPLIT_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
RESERVED_SLOTS = 12  # with the four control tokens, 16 special tokens
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")  # name or owner/name; any other string is a path
_REMEDY = (  # for a base model where a chat model is needed
    "Fine-tune it first with `rorchat sft --model {model}`, or let it continue a text: `rorchat complete {model} "
    '"Once upon a time"`.'
)
SMALLEST_VOCABULARY = 256 + len(CONTROL_TOKENS) + RESERVED_SLOTS


def train_tokenizer(
    texts: Iterable[str] | BoundedText,
    vocab_size: int,
    persona: Persona | None = None,
    max_characters: int = 1_000_000_000,
):
    """Trains a byte-level BPE tokenizer that includes the control tokens.

    Args:
        texts: documents, or a `BoundedText`, which limits and counts the characters itself.
        vocab_size: number of all tokens, including control and reserved tokens; a multiple of 64. If the texts yield
            too few merges, reserved tokens fill the vocabulary.
        persona: the persona whose system message the chat template contains; None for the default persona.
        max_characters: maximum number of characters, to bound memory. The last text is truncated. Ignored if `texts` is
            a `BoundedText`.

    Returns:
        A `PreTrainedTokenizerFast`.

    Raises:
        UsageError: `vocab_size` is not a multiple of 64 or too small; `max_characters` is not positive.
        DataError: the texts are empty.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size % VOCABULARY_MULTIPLE or vocab_size < SMALLEST_VOCABULARY:
        raise UsageError(
            f"vocab_size is {vocab_size}: it must be a multiple of {VOCABULARY_MULTIPLE} and at least "
            f"{-(-SMALLEST_VOCABULARY // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE} "
            "(256 bytes, the control tokens and the reserved tokens)."
        )
    special = [*CONTROL_TOKENS, *(reserved_token(number) for number in range(RESERVED_SLOTS))]
    text = texts if isinstance(texts, BoundedText) else BoundedText(texts, max_characters)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if not text.characters:
        raise DataError("There is no text to train a tokenizer on: give sources that contain text.")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, clean_up_tokenization_spaces=False)
    return _add_chatml(tokenizer, (persona or load_persona()).system, size=vocab_size)


def load_tokenizer(name_or_path: str, persona: Persona | None = None, *, require_chat: bool = False):
    """Loads a tokenizer from a folder or the Hub, with control tokens, a pad token and rorchat's chat template.

    A folder may contain the files of `save_pretrained` or GPT-2's original `vocab.json` and `merges.txt`. If control
    tokens are missing, they are added with reserved tokens up to a multiple of 64 (GPT-2: 50,257 to 50,304 tokens).
    A chat template that is not rorchat's is replaced, with a message on stderr: only rorchat's encodes as
    `rorchat.encode_conversation` does and keeps text from becoming control tokens. The system message of a replaced
    ChatML template is kept.

    Args:
        persona: replaces the system message of the chat template; None keeps it.
        require_chat: refuse models that were not trained to chat: the tokenizer has no `<|im_start|>` and `<|im_end|>`,
            or `run.json` says that the model was pretrained on documents only.

    Raises:
        DataError: there is no tokenizer, or it is not a byte-level BPE.
        MismatchError: `require_chat`, and the model was not trained to chat.
        RemoteError: the tokenizer is not on the Hub, or the Hub cannot be reached.
        PermissionDenied: the Hub denies access.
    """
    tokenizer = _load_any(name_or_path)
    sample = "Hello, naïve café! 你好 🙂\n\tx = 12345"
    if (
        len(tokenizer) < SMALLEST_VOCABULARY - RESERVED_SLOTS
        or tokenizer.decode(encode_text(tokenizer, [sample])[0]) != sample
    ):
        raise DataError(
            f"The tokenizer in {name_or_path!r} has {len(tokenizer)} tokens and does not reproduce text: "
            "rorchat needs a byte-level BPE such as GPT-2's, or one trained with `rorchat train-tokenizer`."
        )
    if require_chat and not {IM_START, IM_END} <= tokenizer.get_added_vocab().keys():
        raise MismatchError(
            f"The model {name_or_path!r} has no control tokens {IM_START} and {IM_END}: it was not trained to chat. "
            f"{_REMEDY.format(model=name_or_path)}"
        )
    if require_chat and was_trained_on_documents_only(name_or_path):
        raise MismatchError(
            f"The model {name_or_path!r} was pretrained on documents only, according to run.json: it was not trained "
            f"to chat. {_REMEDY.format(model=name_or_path)}"
        )
    default = _default_system_message(tokenizer)
    system = default if default is not None and persona is None else (persona or load_persona()).system
    is_foreign = tokenizer.chat_template is not None and (
        default is None or tokenizer.chat_template != chat_template(_control_strings(tokenizer), default)
    )
    if is_foreign and os.environ.get("RANK", "0") == "0":
        kept = f"the system message {textwrap.shorten(system, 100)!r}" if system else "no system message"
        print(f"{name_or_path}: its chat template is replaced by rorchat's, with {kept}", file=sys.stderr)  # noqa: T201
    if is_foreign or persona is not None or tokenizer.chat_template is None or not _has_control_tokens(tokenizer):
        tokenizer = _add_chatml(tokenizer, system)
    return tokenizer


def find_run(model: str) -> tuple[Path, dict] | None:
    """(run folder, run.json) for a run folder or its model, adapter or checkpoint folder; None if there is no run.

    For a project, it is the run of its last finished stage.
    """
    folder = Path(model)
    if is_project(folder):
        folder = find_last_run(folder) or folder
    if folder.name in ("model", "adapter") or folder.name.startswith("checkpoint-"):
        folder = folder.parent
    try:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_valid = isinstance(record, dict) and all(isinstance(record.get(key), dict) for key in ("settings", "inputs"))
    return (folder, record) if is_valid else None


def was_trained_on_documents_only(model: str) -> bool:
    """Whether `run.json`, and that of every earlier stage, shows that a model was trained on documents only."""
    run = find_run(model)
    if run is None or run[1].get("stage") != "pretrain" or not run[1].get("data"):
        return False
    _, record = run
    if any(_gives_conversations(source["source"]) for source in record["data"]):
        return False
    base = record["settings"].get("model")
    return not base or was_trained_on_documents_only(base)


def _gives_conversations(spec: str) -> bool:
    """Whether pretraining reads conversations from a source; imported shards count as documents."""
    name = spec.partition("=")[0]
    return name.removeprefix(CHAT_PREFIX) in list_sources() and "document" not in find_source(name).kinds


def _default_system_message(tokenizer) -> str | None:
    """The default system message of a ChatML template; None for any other template."""
    from jinja2 import TemplateError

    try:
        return system_message(tokenizer)
    except (MismatchError, TemplateError, TypeError, ValueError):  # a foreign template may raise anything
        return None


def _has_control_tokens(tokenizer) -> bool:
    """Whether all control tokens are special tokens, and eos and pad are the right ones."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return special >= set(CONTROL_TOKENS) and (tokenizer.eos_token, tokenizer.pad_token) == (END_OF_TEXT, PAD)


def _control_strings(tokenizer) -> list[str]:
    """The strings of all special tokens: first the control tokens, then the others, sorted by id."""
    added = sorted(tokenizer.added_tokens_decoder.items())
    return list(dict.fromkeys([*CONTROL_TOKENS, *(token.content for _, token in added if token.special)]))


def _load_any(name_or_path: str):
    from transformers import AutoTokenizer, GPT2Tokenizer

    folder = Path(name_or_path)
    if folder.is_dir():
        names = {path.name for path in folder.iterdir()}
        if "tokenizer.json" not in names and {"vocab.json", "merges.txt"} <= names:
            # Not GPT2TokenizerFast(vocab_file=..., ...): in transformers 5.23 it silently has one token
            return GPT2Tokenizer.from_pretrained(folder)
        if "tokenizer.json" not in names:
            raise DataError(
                f"No tokenizer in {folder}: it contains {', '.join(sorted(names)[:8]) or 'nothing'}. "
                "Expected tokenizer.json, or vocab.json and merges.txt."
            )
    elif folder.exists() or not HUB_ID.fullmatch(name_or_path):
        raise DataError(f"No tokenizer at {name_or_path}: give the folder of a tokenizer, or a Hub id such as 'gpt2'.")
    try:
        return AutoTokenizer.from_pretrained(name_or_path)
    except Exception as error:  # OSError, ValueError, or whatever a file of another form leads to
        if folder.is_dir():
            raise DataError(f"Cannot load a tokenizer from {name_or_path!r}: {shorten_error(error)}") from None
        raise explain_failed_load("a tokenizer", name_or_path, error) from None


def _add_chatml(tokenizer, system: str, size: int | None = None):
    """Adds control tokens, reserved tokens up to `size` or the next multiple of 64, and the chat template."""
    if IM_START in tokenizer.get_vocab() and IM_START not in tokenizer.get_added_vocab():
        raise MismatchError(f"{IM_START!r} is an ordinary token of this vocabulary, so it cannot be a control token.")
    tokenizer.add_special_tokens(
        {
            "eos_token": END_OF_TEXT,
            "bos_token": END_OF_TEXT,
            "unk_token": END_OF_TEXT,
            "pad_token": PAD,
            "extra_special_tokens": [IM_START, IM_END],
        }
    )
    reserved = [token for token in tokenizer.get_added_vocab() if token.startswith("<|reserved_")]
    target = size or -(-len(tokenizer) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    reserved += [reserved_token(len(reserved) + number) for number in range(target - len(tokenizer))]
    tokenizer.add_special_tokens({"extra_special_tokens": [IM_START, IM_END, *reserved]})
    # Generation needs padding on the left; training pads in its own collator. Only `init_kwargs` are saved.
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
    tokenizer.chat_template = chat_template(_control_strings(tokenizer), system)
    return tokenizer


def token_bytes(tokenizer) -> list[int]:
    """The number of UTF-8 bytes of each token, indexed by id; 0 for control and reserved tokens.

    Used for bits per byte. A byte-level token has one character per byte, so its length is the number of its bytes.
    """
    special = set(tokenizer.all_special_ids)
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    sizes = [0 if token_id in special or token is None else len(token) for token_id, token in enumerate(tokens)]
    for token_id, token in tokenizer.added_tokens_decoder.items():  # added tokens are plain text, not byte-level
        if token_id not in special:
            sizes[token_id] = 0 if token.special else len(token.content.encode())
    return sizes


def tokenizer_sha256(tokenizer) -> str:
    """A fingerprint of how text is encoded: equal for tokenizers with the same normalizer, splitting, merges and ids.

    The chat template is not included, so a token store stays valid when the system message changes.
    """
    backend = tokenizer.backend_tokenizer
    added = [f"{number} {token!r}" for number, token in sorted(backend.get_added_tokens_decoder().items())]
    sha256 = hashlib.sha256("\n".join(added).encode())
    for part in (backend.normalizer, backend.pre_tokenizer, backend.model):
        sha256.update(part.__getstate__() if part else b"none")  # its JSON; ten times as fast as `to_str`
    return sha256.hexdigest()


def chat_template_sha256(tokenizer) -> str:
    """A fingerprint of the chat template, including its default system message."""
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()


def byte_characters() -> dict[int, str]:
    """byte -> the character that represents it in a byte-level BPE: itself if printable, else U+0100 or above."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(others)}
