"""The prompts of samples.jsonl if the user gives none: from the validation split, which the model is not trained on."""

import re
from collections.abc import Iterator, Sequence
from itertools import chain, islice, zip_longest

from datasets import Dataset

from rorchat.chatml import IM_END, IM_START, encode_prompt, token_id
from rorchat.errors import MismatchError
from rorchat.inference.engine import DEFAULT_REPLY_DIVISOR, to_messages
from rorchat.sources.registry import split_spec
from rorchat.tokens.store import TokenStore

PROMPTS = 3
CANDIDATES = 50  # documents of a source, or rows, that are looked at
PROMPT_TOKENS = 64  # of a document, which are more than WORDS words
WORDS = 8
MAX_CHARACTERS = 200  # of a user message: samples are shown in a table
WHO_ARE_YOU = "Who are you?"


def first_words(stores: Sequence[TokenStore], tokenizer) -> list[str]:
    """The first words of three validation documents, of different sources if there are several.

    Stores of conversations have no documents to continue; without any other store, the result is empty.
    """
    sources = [_beginnings(store, tokenizer) for store in stores if store.manifest.kind == "document"]
    texts = chain.from_iterable(zip_longest(*(islice(source, PROMPTS) for source in sources)))
    return list(dict.fromkeys(text for text in texts if text))[:PROMPTS]


def _beginnings(store: TokenStore, tokenizer) -> Iterator[str]:
    starts = store.documents("validation").tolist()
    for start, end in islice(zip(starts, starts[1:], strict=False), CANDIDATES):
        ids = store.slice("validation", start + 1, min(end, start + 1 + PROMPT_TOKENS))  # without <|endoftext|>
        text = tokenizer.decode(ids, skip_special_tokens=True).strip()
        beginning = re.match(rf"(\S+\s+){{{WORDS - 1}}}\S+(?=\s)", text)
        if beginning:
            yield beginning[0]
        elif len(text) > 2 * WORDS and not re.search(r"\s", text):  # a language without spaces
            yield text[: 2 * WORDS]


def user_messages(
    validation: Dataset, tokenizer, sources: Sequence[str], n_positions: int, reply_tokens: int | None = None
) -> list[str]:
    """The first user messages of three validation rows, and "Who are you?" if a source is about the persona.

    Messages that do not fit into the context window together with a reply are left out.

    Args:
        validation: encoded rows of a chat stage; their ids are in `input_ids`, `prompt_ids` or `prompt`.
        sources: specs of the sources of the stage.
        reply_tokens: tokens of a reply; None for the default of the engine.
    """

    def fits(message: str) -> bool:
        room = reply_tokens or n_positions // DEFAULT_REPLY_DIVISOR
        try:
            prompt = encode_prompt(tokenizer, to_messages(message), n_positions=n_positions, max_new_tokens=room)
        except MismatchError:  # not even the system message fits
            return False
        return not prompt.notice()

    column = next(name for name in ("input_ids", "prompt_ids", "prompt") if name in validation.column_names)
    count = min(CANDIDATES, len(validation))
    rows = validation.select([index * len(validation) // count for index in range(count)])
    messages = [message for ids in rows[column] if (message := _first_user_message(ids, tokenizer))]
    messages.sort(key=lambda message: len(message) > MAX_CHARACTERS)  # stable: long ones come last
    chosen = [*islice(filter(fits, dict.fromkeys(messages)), PROMPTS)]
    is_about_persona = any(split_spec(spec)[0].about_persona for spec in sources)
    if is_about_persona and WHO_ARE_YOU not in chosen and fits(WHO_ARE_YOU):
        chosen.append(WHO_ARE_YOU)
    return chosen


def _first_user_message(ids: Sequence[int], tokenizer) -> str:
    """The text of the first user message of an encoded conversation; empty if its beginning was dropped."""
    start, end = token_id(tokenizer, IM_START), token_id(tokenizer, IM_END)
    turn: list[int] = []
    for token in ids:
        if token == start:
            turn = []
        elif token == end:
            role, _, text = tokenizer.decode(turn).partition("\n")
            if role == "user":
                return text.strip()
        else:
            turn.append(token)
    return ""
