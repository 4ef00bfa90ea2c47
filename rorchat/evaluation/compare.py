"""Compares several models: questions with known answers, chat behaviour, and the loss on a validation text."""

from collections.abc import Sequence

import torch

from rorchat.chatml import END_OF_TEXT, encode_text, system_message, token_id
from rorchat.errors import MismatchError
from rorchat.evaluation.base_text import find_base_text
from rorchat.evaluation.behaviour import MEASURES, measure_behaviour
from rorchat.evaluation.loss import Loss, compute_dataset_loss, gzip_bits_per_byte
from rorchat.evaluation.scores import Scores, score_chat
from rorchat.inference.engine import ChatModel, load_model, resolve_model_path
from rorchat.lineage import find_persona, list_trained_sources
from rorchat.mixture.collators import collate_padded
from rorchat.model import check_fit
from rorchat.sources.registry import load_rows
from rorchat.tokenizer import load_tokenizer, token_bytes, tokenizer_sha256
from rorchat.tokens.store import TokenStore, store_folder

UNTRAINED = "untrained"
TINYTOWN = "tinytown"
BATCH_TOKENS = 4096


def compare_models(
    models: Sequence[tuple[str, str]],
    *,
    untrained: bool = False,
    text: str | None = None,
    ask: bool = True,
    tinytown: bool | None = None,
    persona: str | None = None,
) -> tuple[list[Scores], list[str]]:
    """Measures models side by side.

    Models that were trained on Tinytown are asked its questions and the probes of their persona. Of other chat models,
    the behaviour is measured as in the gate. Base models only get a loss.

    Args:
        models: (name, folder or Hub id).
        untrained: adds a first column for the first model's architecture with random weights.
        text: measures loss and bits per byte on this text: a source, or a token store, of which the validation split is
            used. By default, on the validation split of each model's own pretraining, if its run names one.
        ask: False measures losses only.
        tinytown: True asks every model Tinytown's questions, False none; by default, the records of the runs decide.
        persona: the persona file; by default that of the model's run.

    Returns:
        One column of scores per model, and lines that say what was measured and why.
    """
    documents, notes = [], []
    if text:
        documents = load_validation_documents(text, load_tokenizer(resolve_model_path(models[0][1])))
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
        scores, note = Scores(name, folder), ""
        if ask:
            scores, note = _measure_replies(chat, name, folder, persona, tinytown)
        loss, text_note = (compute_document_loss(chat, documents), "") if text else _compute_base_loss(chat, folder)
        note = "; ".join(filter(None, (note, text_note)))
        if loss:
            scores.loss, scores.bits_per_byte, scores.on_base_text = loss.per_token, loss.bits_per_byte, not text
        columns.append(scores)
        if note:
            notes.append(f"{name}: {note}")
    return columns, notes


def _measure_replies(
    chat: ChatModel, name: str, folder: str, persona_file: str | None, tinytown: bool | None
) -> tuple[Scores, str]:
    """Asks Tinytown's questions or the gate's prompts. Returns the scores, and what was asked and why."""
    trained = find_persona(folder, persona_file)
    probes = f"the probes of {trained.persona.name} ({trained.origin})"
    sources = list_trained_sources(folder)
    if tinytown or (tinytown is None and TINYTOWN in sources):
        reason = "it was trained on tinytown" if TINYTOWN in sources else "--tinytown was given"
        scores = score_chat(chat, name, folder, trained.persona)
        return scores, f"asked Tinytown's questions ({reason}) and {probes}"
    reason = "it was not trained on tinytown" if sources else "there is no record of its training"
    reason = "--no_tinytown was given" if tinytown is False else f"{reason}; --tinytown asks them"
    left_out = f"not asked Tinytown's questions ({reason})"
    if not _can_chat(folder):
        return Scores(name, folder), f"{left_out}, and no others, because it is a base model"
    values = measure_behaviour(chat, name, trained.persona).measures
    if system_message(chat.tokenizer) != trained.persona.system:
        values = {measure: value for measure, value in values.items() if MEASURES[measure].unit != "probes"}
        probes = f"without {probes}, whose system message is not the model's"
    behaviour = {measure: value.value for measure, value in values.items() if value.value is not None}
    return Scores(name, folder, behaviour=behaviour), f"{left_out}, but the gate's prompts, {probes}"


def _can_chat(model: str) -> bool:
    try:
        load_tokenizer(resolve_model_path(model), require_chat=True)
    except MismatchError:
        return False
    return True


def _compute_base_loss(chat: ChatModel, model: str) -> tuple[Loss | None, str]:
    """The loss on the validation split of a model's pretraining, and which text that is."""
    text = find_base_text(None, model, chat.tokenizer, chat.n_positions)
    if text is None:
        return None, "no loss, because no pretraining run with token stores was found: give --text"
    pad = chat.tokenizer.pad_token_id
    loss = compute_dataset_loss(
        chat.model,
        text.rows,
        lambda batch: collate_padded(batch, pad),
        torch.tensor(token_bytes(chat.tokenizer)),
        batch_size=max(1, BATCH_TOKENS // chat.n_positions),
    )
    return loss, f"loss on {text.describe()}"


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
