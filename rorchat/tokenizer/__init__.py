"""TOKENS: train a byte-level BPE with the control tokens in it, or load one and add them.

Whatever comes out has real control tokens, reserved slots up to a multiple of 64, a chat template, and loads with plain
`AutoTokenizer`. A control token is never made of text: the splitting pattern cuts between `<|` and a word, so that no
sequence of merges can spell one.
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
from rorchat.errors import DataError, MismatchError, RemoteError, UsageError
from rorchat.persona import Persona, load_persona
from rorchat.sources.registry import CHAT_PREFIX, find_source, list_sources
from rorchat.tokenizer.text import BoundedText

# GPT-2's pattern but for numbers: each digit is a token, and never with the blank before it, so that a number is
# spelled the same everywhere and a sum can be learned digit by digit.
SPLIT_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
RESERVED_SLOTS = 12  # with the four control tokens: 16 in a tokenizer trained here
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")  # name or owner/name; any other string is a path
SMALLEST_VOCABULARY = 256 + len(CONTROL_TOKENS) + RESERVED_SLOTS


def train_tokenizer(
    texts: Iterable[str] | BoundedText,
    vocab_size: int,
    persona: Persona | None = None,
    max_characters: int = 1_000_000_000,
):
    """A byte-level BPE tokenizer with the control tokens in it from birth.

    Args:
        texts: documents; or a `BoundedText`, which brings its own bound and tells afterwards what was read.
        vocab_size: all tokens, control tokens and reserved slots included; a multiple of 64. Where the texts give
            fewer merges, reserved slots fill the rest and the size stays.
        persona: whose system message the chat template carries; None for the default persona.
        max_characters: how much text is counted, which bounds memory: a billion is plenty. The last text is cut there.

    Raises:
        UsageError: `vocab_size` is no multiple of 64 or has no room for the bytes; `max_characters` is not positive.
        DataError: the texts are empty.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size % VOCABULARY_MULTIPLE or vocab_size < SMALLEST_VOCABULARY:
        raise UsageError(
            f"vocab_size is {vocab_size}: it must be a multiple of {VOCABULARY_MULTIPLE} and at least "
            f"{-(-SMALLEST_VOCABULARY // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE} "
            "(256 bytes, the control tokens, the reserved slots)."
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
        raise DataError("There is no text to train a tokenizer on.")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, clean_up_tokenization_spaces=False)
    return _add_chatml(tokenizer, (persona or load_persona()).system, size=vocab_size)


def load_tokenizer(name_or_path: str, persona: Persona | None = None, *, require_chat: bool = False):
    """A tokenizer from a folder or the Hub that has the control tokens, a pad of its own and rorchat's chat template.

    A folder may hold what `save_pretrained` writes or GPT-2's original `vocab.json` and `merges.txt`. What lacks the
    control tokens (GPT-2's own has 50,257 tokens) gets them, and reserved slots up to a multiple of 64 (50,304).
    Another chat template is replaced, which is said on stderr: ours alone encodes as `rorchat.encode_conversation`
    does and lets no text become a control token. The system message of another ChatML template stays the default one.

    Args:
        persona: replaces the chat template's system message; None leaves it as it is.
        require_chat: for what only a chat model can do: refuse a tokenizer that comes without `<|im_start|>` and
            `<|im_end|>`, and one of a model that has them but was pretrained on documents alone, by its run's record.

    Raises:
        DataError: nothing loadable is there, or what is there is not a byte-level BPE.
        MismatchError: `require_chat`, and the model was never taught to chat.
        RemoteError: it is not on the Hub, or the Hub cannot be reached.
    """
    tokenizer = _load_any(name_or_path)
    sample = "Hello, naïve café! 你好 🙂\n\tx = 12345"
    if (
        len(tokenizer) < SMALLEST_VOCABULARY - RESERVED_SLOTS
        or tokenizer.decode(encode_text(tokenizer, [sample])[0]) != sample
    ):
        raise DataError(
            f"The tokenizer in {name_or_path!r} has {len(tokenizer)} tokens and does not give text back unchanged: "
            "rorchat needs a byte-level BPE such as GPT-2's or one of `recipes/tokenizer.py`."
        )
    if require_chat and not {IM_START, IM_END} <= tokenizer.get_added_vocab().keys():
        raise MismatchError(
            f"The model {name_or_path!r} has no control tokens {IM_START} and {IM_END}: it was never taught to chat. "
            "Teach it first, with recipes/sft.py, or give a chat model."
        )
    if require_chat and _saw_documents_alone(name_or_path):
        raise MismatchError(
            f"The model {name_or_path!r} was pretrained on documents alone, as run.json says: it was never taught to "
            "chat. Teach it first, with recipes/sft.py, or give a chat model."
        )
    found = _default_system_message(tokenizer)
    system = found if found is not None and persona is None else (persona or load_persona()).system
    foreign = tokenizer.chat_template is not None and (
        found is None or tokenizer.chat_template != chat_template(_control_strings(tokenizer), found)
    )
    if foreign and os.environ.get("RANK", "0") == "0":
        said = f"the system message {textwrap.shorten(system, 100)!r}" if system else "no system message"
        print(f"{name_or_path}: its chat template gives way to rorchat's, with {said}", file=sys.stderr)  # noqa: T201
    if foreign or persona is not None or tokenizer.chat_template is None or not _has_control_tokens(tokenizer):
        tokenizer = _add_chatml(tokenizer, system)
    return tokenizer


def find_run(model: str) -> tuple[Path, dict] | None:
    """(folder, run.json) of the run that a folder is, or of which it is the model, adapter or a checkpoint."""
    folder = Path(model)
    if folder.name in ("model", "adapter") or folder.name.startswith("checkpoint-"):
        folder = folder.parent
    try:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_whole = isinstance(record, dict) and all(isinstance(record.get(key), dict) for key in ("settings", "inputs"))
    return (folder, record) if is_whole else None


def _saw_documents_alone(model: str) -> bool:
    """Whether records say that a model was made from random weights and no conversation; False where none says so."""
    found = find_run(model)
    if found is None or found[1].get("stage") != "pretrain" or not found[1].get("data"):
        return False
    _, record = found
    began_with = record["settings"].get("model")
    if any(_gives_conversations(source["source"]) for source in record["data"]):
        return False
    return not began_with or _saw_documents_alone(began_with)


def _gives_conversations(spec: str) -> bool:
    """Whether pretraining reads conversations of a source; shards that were made elsewhere are documents."""
    name = spec.partition("=")[0]
    return name.removeprefix(CHAT_PREFIX) in list_sources() and "document" not in find_source(name).kinds


def _default_system_message(tokenizer) -> str | None:
    """What a ChatML template says where a conversation has no system message; None for any other template."""
    from jinja2 import TemplateError

    try:
        return system_message(tokenizer)
    except (MismatchError, TemplateError, TypeError, ValueError):  # a template of others raises what it likes
        return None


def _has_control_tokens(tokenizer) -> bool:
    """Whether every control token is one that no text can become, and texts end and are padded with the right ones."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return special >= set(CONTROL_TOKENS) and (tokenizer.eos_token, tokenizer.pad_token) == (END_OF_TEXT, PAD)


def _control_strings(tokenizer) -> list[str]:
    """Every string that would become a special token: the control tokens first, then by number."""
    added = sorted(tokenizer.added_tokens_decoder.items())
    return list(dict.fromkeys([*CONTROL_TOKENS, *(token.content for _, token in added if token.special)]))


def _load_any(name_or_path: str):
    from transformers import AutoTokenizer, GPT2Tokenizer

    folder = Path(name_or_path)
    if folder.is_dir():
        names = {path.name for path in folder.iterdir()}
        if "tokenizer.json" not in names and {"vocab.json", "merges.txt"} <= names:
            # Not GPT2TokenizerFast(vocab_file=..., merges_file=...): in transformers 5.23 that silently has one token
            return GPT2Tokenizer.from_pretrained(folder)
        if "tokenizer.json" not in names:
            raise DataError(
                f"No tokenizer in {folder}: it holds {', '.join(sorted(names)[:8]) or 'nothing'}. "
                "Expected tokenizer.json, or vocab.json and merges.txt."
            )
    elif folder.exists() or not HUB_ID.fullmatch(name_or_path):
        raise DataError(f"No tokenizer at {name_or_path}: give a folder that holds one, or a Hub id such as 'gpt2'.")
    try:
        return AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        said = " ".join(str(error).split())[:200]
        if folder.is_dir():
            raise DataError(f"Cannot load a tokenizer from {name_or_path!r}: {said}") from None
        raise RemoteError(
            f"Cannot load a tokenizer from {name_or_path!r}: there is no such folder here, and the Hub says: {said}"
        ) from None


def _add_chatml(tokenizer, system: str, size: int | None = None):
    """Gives a tokenizer control tokens, reserved slots up to `size` or the next multiple of 64, and the template."""
    if IM_START in tokenizer.get_vocab() and IM_START not in tokenizer.get_added_vocab():
        raise MismatchError(f"{IM_START!r} is an ordinary token of this vocabulary: it can't serve as a control token.")
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
    # Generation continues at the right end; training pads by its own collator. Only `init_kwargs` are saved.
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
    tokenizer.chat_template = chat_template(_control_strings(tokenizer), system)
    return tokenizer


def token_bytes(tokenizer) -> list[int]:
    """UTF-8 bytes of each token, 0 for control tokens and reserved slots: what bits per byte divides by.

    Returns:
        One number per id. Byte-level tokens spell each byte as one character, so no lossy decoding is involved.
    """
    special = set(tokenizer.all_special_ids)
    spelled = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    sizes = [0 if token_id in special or token is None else len(token) for token_id, token in enumerate(spelled)]
    for token_id, token in tokenizer.added_tokens_decoder.items():  # these are spelled plainly
        if token_id not in special:
            sizes[token_id] = 0 if token.special else len(token.content.encode())
    return sizes


def tokenizer_sha256(tokenizer) -> str:
    """A fingerprint of what ids mean: the same for two tokenizers that encode all text alike.

    The chat template is no part of it, so that a new system message does not disown a token store.
    """
    backend = tokenizer.backend_tokenizer
    added = [f"{number} {token!r}" for number, token in sorted(backend.get_added_tokens_decoder().items())]
    sha256 = hashlib.sha256("\n".join(added).encode())
    for part in (backend.normalizer, backend.pre_tokenizer, backend.model):
        sha256.update(
            part.__getstate__() if part else b"none"
        )  # what would be pickled: its JSON, in a tenth of the time
    return sha256.hexdigest()


def chat_template_sha256(tokenizer) -> str:
    """A fingerprint of how conversations are written: the chat template with its default system message."""
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()


def byte_characters() -> dict[int, str]:
    """byte -> the character that represents it in a byte-level BPE: itself if printable, else one from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + at) for at, byte in enumerate(others)}
