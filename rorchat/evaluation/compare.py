"""Compares several models on the same questions and the same validation text."""

from collections.abc import Sequence

import torch

from rorchat.chatml import END_OF_TEXT, encode_text, token_id
from rorchat.errors import MismatchError
from rorchat.evaluation.loss import Loss, compute_dataset_loss, gzip_bits_per_byte
from rorchat.evaluation.scores import Scores, score_chat
from rorchat.inference.engine import ChatModel, load_model, resolve_model_path
from rorchat.mixture.collators import collate_padded
from rorchat.model import check_fit
from rorchat.persona import load_persona
from rorchat.sources.registry import load_rows
from rorchat.tokenizer import load_tokenizer, token_bytes, tokenizer_sha256
from rorchat.tokens.store import TokenStore, store_folder

UNTRAINED = "untrained"
BATCH_TOKENS = 4096


def compare_models(
    models: Sequence[tuple[str, str]], *, untrained: bool, text: str | None, ask: bool, persona: str | None
) -> tuple[list[Scores], list[str]]:
    """Returns (one column of scores per model, lines to print below the table).

    Args:
        models: (name, folder or Hub id).
        untrained: adds a first column for the first model's architecture with random weights.
        text: measures loss and bits per byte on this text: a source, or a token store, of which the validation split is
            used.
        ask: asks Tinytown's questions and the persona probes.
        persona: the persona file; None for the default persona.
    """
    documents, notes = [], []
    if text:
        documents = load_validation_documents(text, load_tokenizer(resolve_model_path(models[0][1])))
    if documents:
        content = "\n".join(documents).encode()
        notes.append(
            f"validation text: {len(documents):,} documents, {len(content):,} bytes; gzip -9 needs "
            f"{gzip_bits_per_byte(content):.3f} bits per byte"
        )
    columns = []
    for name, folder in ([(UNTRAINED, models[0][1])] if untrained else []) + list(models):
        chat = load_model(folder)
        if name == UNTRAINED:
            chat = _randomize(chat)
        scores = score_chat(chat, name, folder, load_persona(persona)) if ask else Scores(name, folder)
        if documents:
            loss = compute_document_loss(chat, documents)
            scores.loss, scores.bits_per_byte = loss.per_token, loss.bits_per_byte
        columns.append(scores)
    return columns, notes


def _randomize(chat: ChatModel) -> ChatModel:
    """Returns a model of the same architecture with random weights."""
    from transformers import GPT2LMHeadModel, set_seed

    set_seed(0)
    model = GPT2LMHeadModel(chat.model.config)
    model.to(chat.model.device)  # type: ignore[arg-type]  # mypy expects `self`, because `to` is decorated
    model.generation_config = chat.model.generation_config
    return ChatModel(model.eval(), chat.tokenizer)


def load_validation_documents(text: str, tokenizer) -> list[str]:
    """The validation documents of a token store, or all documents of a source.

    Raises:
        MismatchError: the store was written with another tokenizer, so its tokens cannot be decoded.
    """
    folder = store_folder(text)
    if not folder:
        return [row["text"] for row in load_rows(text, "document")]
    store = TokenStore(folder)
    if store.manifest.tokenizer_sha256 != tokenizer_sha256(tokenizer):
        raise MismatchError(
            f"The token store {text} was written with another tokenizer than the first model's, so it cannot be "
            "decoded. List a model with the store's tokenizer first, or give the text as a source."
        )
    ids = store.slice("validation", 0, store.tokens("validation"))
    starts = (ids == store.manifest.end_of_text_id).nonzero()[0].tolist() + [len(ids)]
    return [tokenizer.decode(ids[start + 1 : end]) for start, end in zip(starts, starts[1:], strict=False)]


def compute_document_loss(chat: ChatModel, documents: Sequence[str]) -> Loss:
    """The loss over whole documents, each with `<|endoftext|>` before it.

    Documents longer than the context window are cut into rows that overlap by one token, so that every token but the
    first is predicted exactly once.
    """
    check_fit(chat.model, chat.tokenizer)
    start, width = token_id(chat.tokenizer, END_OF_TEXT), chat.n_positions
    rows = []
    for ids in encode_text(chat.tokenizer, list(documents)):
        document = torch.tensor([start, *ids])
        for first in range(0, len(document) - 1, width - 1):
            row = document[first : first + width]
            rows.append({"input_ids": row, "labels": row})
    rows.sort(key=lambda row: len(row["input_ids"]))
    pad = chat.tokenizer.pad_token_id
    return compute_dataset_loss(
        chat.model,
        rows,
        lambda batch: collate_padded(batch, pad),
        torch.tensor(token_bytes(chat.tokenizer)),
        batch_size=max(1, BATCH_TOKENS // width),
    )
