"""Loads a model and generates replies to conversations, in batches or as a stream, and continuations of documents.

Every prompt is encoded by `encode_prompt`, so that text never becomes a control token and no sequence exceeds the
context window. Generation itself is Transformers' `generate`.
"""

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

from rorchat.chatml import END_OF_TEXT, PAD, encode_prompt, encode_text, token_id
from rorchat.errors import DataError, DivergedError, UsageError, did_you_mean
from rorchat.model import check_fit, load_checkpoint
from rorchat.project_folder import find_last_run, is_project
from rorchat.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase

Messages = Sequence[dict[str, str]]
#: The models of the Hub that rorchat can start from and whose names have no owner. Asking the Hub for any other name of
#: this form, most often a misspelt one, would take a minute without a network.
MODELS_WITHOUT_OWNER = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")
DEFAULT_REPLY_DIVISOR = 4  # by default, a reply may use a quarter of the context window


@dataclass
class ChatModel:
    """A model with its tokenizer."""

    model: "GPT2LMHeadModel"
    tokenizer: "PreTrainedTokenizerBase"

    @property
    def n_positions(self) -> int:
        """The context window in tokens."""
        return self.model.config.n_positions

    @property
    def stop_ids(self) -> set[int]:
        """The ids of the tokens that end a generation."""
        return set(self.model.generation_config.eos_token_id)

    def __repr__(self) -> str:  # a notebook would show every layer
        size = f"{self.model.num_parameters():,} parameters, {self.n_positions} positions"
        return f"ChatModel({size}, on {self.model.device})"

    def chat(
        self,
        prompt: "str | Messages",
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
    ) -> str:
        """Returns the reply to a question, or to a conversation that ends with a user message.

        Args:
            prompt: a question, or messages such as `[{"role": "user", "content": "Hello"}]`.
            max_new_tokens: token limit of the reply; None for a quarter of the context window.
            temperature: 0 for the most likely reply, always the same; None for the model's own setting.
            top_p: nucleus sampling: draw from the most likely tokens whose probabilities add up to this; None for the
                model's own setting.

        Raises:
            UsageError: a setting is out of range.
            DataError, MismatchError: the conversation is malformed or does not fit into the context window.
        """
        return generate_text(self, prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)

    def complete(
        self,
        text: str,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = 0.0,
        top_p: float | None = None,
    ) -> str:
        """Returns a continuation of a text, which is read as the beginning of a document, not as a question.

        The settings are those of `chat`, except that the most likely continuation is the default.
        """
        return continue_texts(self, [text], max_new_tokens, temperature, top_p)[0]


@dataclass(frozen=True)
class Reply:
    """A generated reply.

    Attributes:
        text: the reply without control tokens.
        stopped: True if the model ended the reply, False if the token limit did.
        tokens: number of tokens, without the token that ended the reply.
        notice: says what was left out of the prompt because it did not fit; empty if nothing was.
        ids: all generated token ids, including the one that ended the reply.
    """

    text: str
    stopped: bool
    tokens: int
    notice: str = ""
    ids: tuple[int, ...] = ()


def locate_model(path: str) -> str:
    """The folder of a model: `model/` inside a run folder, else the folder itself. A Hub id is returned unchanged."""
    inner = Path(path) / "model"
    return str(inner) if (inner / "config.json").is_file() else path


def resolve_model_path(path: str) -> str:
    """As `locate_model`, for a model that must be there; of a project, that of its last finished stage.

    Raises:
        DataError: a local path does not exist, or is a run or a project that has no model yet; or the name can be that
            of neither a folder nor a model of the Hub.
    """
    # "runs/nope" could be a Hub id, unless there is a folder "runs"
    is_local = path.startswith((".", "/", "~")) or path.count("/") > 1 or ("/" in path and Path(path).parent.is_dir())
    if is_local and not Path(path).is_dir():
        raise DataError(f"No model folder {path}.")
    if "/" not in path and not Path(path).exists() and path not in MODELS_WITHOUT_OWNER:
        raise DataError(
            f"No model folder {path}.{did_you_mean(path, MODELS_WITHOUT_OWNER)} Models of the Hub have names of the "
            "form OWNER/NAME."
        )
    if is_project(Path(path)):
        last = find_last_run(Path(path))
        if last is None:
            raise DataError(f"The project {path} has no finished stage, so it has no model yet: rorchat run {path}")
        return str(last / "model")
    place = Path(locate_model(path))
    if inner := sorted(place.glob("*/model/config.json")):
        runs = ", ".join(str(config.parent.parent) for config in inner)
        raise DataError(f"{path} contains several models: give one of {runs}.")
    if (place / "run.json").is_file() and not (place / "config.json").is_file():
        project = place.absolute().parent.parent
        again = f"rorchat run {project}" if is_project(project) else "the command that started it"
        raise DataError(f"{path} is a run that has not finished, so it has no model yet. Resume it with {again}.")
    return str(place)


def load_model(name_or_path: str, device: str | None = None, *, require_chat: bool = False) -> ChatModel:
    """Loads a model with its tokenizer from a model folder, a run folder or the Hub.

    Args:
        device: "cuda", "cpu", ...; None uses a GPU if there is one.
        require_chat: refuse a base model, which was not trained to chat.

    Raises:
        DataError, RemoteError: the model or the tokenizer cannot be loaded.
        MismatchError: the tokenizer is not the model's, or `require_chat` is set and the model is a base model.
    """
    import torch

    folder = resolve_model_path(name_or_path)
    tokenizer = load_tokenizer(folder, require_chat=require_chat)
    model = load_checkpoint(folder, tokenizer)
    check_fit(model, tokenizer)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)  # type: ignore[arg-type]  # mypy expects `self`, because `to` is decorated
    return ChatModel(model.eval(), tokenizer)


def to_messages(prompt: str | Messages) -> Messages:
    """Converts a string to a conversation with one user message. A conversation is returned unchanged."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _build_generate_kwargs(
    chat: ChatModel, max_new_tokens: int | None, temperature: float | None, top_p: float | None
) -> dict[str, Any]:
    """Arguments of Transformers' `generate`.

    Raises:
        UsageError: a setting is out of range.
    """
    if temperature is not None and not (temperature >= 0 and math.isfinite(temperature)):
        raise UsageError(f"temperature is {temperature}: give 0 for greedy decoding, or a positive number.")
    if top_p is not None and not 0 < top_p <= 1:
        raise UsageError(f"top_p is {top_p}: give a number above 0 and at most 1.")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise UsageError(f"max_new_tokens is {max_new_tokens}: give a positive number.")
    limit = max_new_tokens or chat.n_positions // DEFAULT_REPLY_DIVISOR
    if limit >= chat.n_positions:
        raise UsageError(
            f"max_new_tokens is {max_new_tokens}, but prompt and reply share a context window of {chat.n_positions} "
            "tokens: give a smaller number."
        )
    kwargs: dict[str, Any] = {"max_new_tokens": limit, "max_length": None}
    if temperature == 0:
        return kwargs | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature is not None:
        kwargs |= {"do_sample": True, "temperature": temperature}
    if top_p is not None:
        kwargs["top_p"] = top_p
    return kwargs


def _generate(
    chat: ChatModel, prompts: Sequence[list[int]], kwargs: dict[str, Any], **more: Any
) -> "tuple[Tensor, int]":
    """Generates one batch. Prompts are padded on the left to the longest, of length P.

    Returns:
        (ids (B, P + N) of prompts and N generated tokens, P).
    """
    import torch

    longest = max(map(len, prompts))
    pad = token_id(chat.tokenizer, PAD)
    device = chat.model.device
    input_ids = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in prompts], device=device)
    attention_mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
    limit = min(kwargs["max_new_tokens"], chat.n_positions - longest)
    kwargs = {**kwargs, "max_new_tokens": limit}
    try:
        with torch.inference_mode():
            # for mypy: `generate` is declared for a protocol that GPT-2 does not satisfy, and returns a union
            output: Tensor = chat.model.generate(  # type: ignore[misc, assignment]
                input_ids, attention_mask=attention_mask, use_cache=True, **kwargs, **more
            )
    except RuntimeError as error:
        if "probability tensor contains" not in str(error):  # the message of torch.multinomial
            raise
        raise DivergedError(
            "No reply can be sampled: the model's predictions are not finite. Its training has diverged, or the "
            "temperature is too low for its precision."
        ) from None
    return output, longest


def _cut_after_stop(ids: list[int], stop_ids: set[int]) -> list[int]:
    """The ids up to and including the first stop token."""
    return ids[: next((end for end, token in enumerate(ids, 1) if token in stop_ids), None)]


def generate_ids(chat: ChatModel, prompts: Sequence[list[int]], kwargs: dict[str, Any]) -> list[list[int]]:
    """Generates one batch: the continuation of each prompt, including the token that ended it.

    Args:
        prompts: token ids of each prompt, which must leave room for `max_new_tokens` in the context window.
        kwargs: arguments of Transformers' `generate`.
    """
    output, width = _generate(chat, prompts, {**kwargs, "max_length": None})
    return [_cut_after_stop(row, chat.stop_ids) for row in output[:, width:].tolist()]


def generate_replies(
    chat: ChatModel,
    prompts: Sequence[str | Messages],
    *,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    batch_size: int = 64,
) -> list[Reply]:
    """Generates a reply to each prompt, in batches of prompts of similar length.

    Args:
        prompts: questions, or conversations that end with a user message.
        max_new_tokens: token limit of a reply; None for a quarter of the context window.
        temperature: 0 for greedy decoding; None for the model's own generation config.
        top_p: nucleus sampling; None for the model's own generation config.

    Returns:
        The replies, in the order of `prompts`.
    """
    kwargs = _build_generate_kwargs(chat, max_new_tokens, temperature, top_p)
    encoded = [
        encode_prompt(
            chat.tokenizer, to_messages(prompt), n_positions=chat.n_positions, max_new_tokens=kwargs["max_new_tokens"]
        )
        for prompt in prompts
    ]
    stop_ids = chat.stop_ids
    replies: dict[int, Reply] = {}
    order = sorted(range(len(prompts)), key=lambda index: len(encoded[index].input_ids))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        output, width = _generate(chat, [encoded[index].input_ids for index in batch], kwargs)
        for index, row in zip(batch, output[:, width:].tolist(), strict=True):
            ids = _cut_after_stop(row, stop_ids)
            stopped = ids[-1] in stop_ids
            tokens = len(ids) - stopped
            (text,) = chat.tokenizer.batch_decode([ids[:tokens]], skip_special_tokens=True)
            replies[index] = Reply(text, stopped, tokens, encoded[index].notice(), tuple(ids))
    return [replies[index] for index in range(len(prompts))]


def generate_text(chat: ChatModel, prompt: str | Messages, **settings: Any) -> str:
    """Returns the text of the model's reply to a question or a conversation; settings as in `generate_replies`."""
    return generate_replies(chat, [prompt], **settings)[0].text


def stream_text(
    chat: ChatModel,
    prompt: str | Messages,
    *,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
) -> Generator[str, None, None]:
    """Yields the text of the reply in pieces as it is generated; settings as in `generate_replies`."""
    kwargs = _build_generate_kwargs(chat, max_new_tokens, temperature, top_p)
    encoded = encode_prompt(
        chat.tokenizer, to_messages(prompt), n_positions=chat.n_positions, max_new_tokens=kwargs["max_new_tokens"]
    )
    yield from _stream(chat, encoded.input_ids, kwargs)


def stream_continuation(
    chat: ChatModel,
    text: str,
    *,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
) -> Generator[str, None, None]:
    """Continues a text as the beginning of a document, and yields what follows it; settings as in `generate_replies`.

    Of a text that is too long for the context window, the model reads the end.
    """
    kwargs = _build_generate_kwargs(chat, max_new_tokens, temperature, top_p)
    (prompt,) = _encode_beginnings(chat, [text], kwargs["max_new_tokens"])
    yield from _stream(chat, prompt, kwargs)


def _stream(chat: ChatModel, prompt: list[int], kwargs: dict[str, Any]) -> Generator[str, None, None]:
    """Yields the text that follows a prompt, in pieces as it is generated in another thread.

    If the caller stops early, by an exception such as KeyboardInterrupt or by closing the iterator, the thread ends
    after the token that it computes. It is no daemon: the interpreter must not exit while a thread is inside torch.
    """
    import torch
    from transformers import StoppingCriteriaList, TextIteratorStreamer

    streamer = TextIteratorStreamer(chat.tokenizer, skip_prompt=True, skip_special_tokens=True)
    failures: list[BaseException] = []
    stopped = Event()

    def is_stopped(input_ids: "Tensor", *_: object, **__: object) -> "Tensor":
        return input_ids.new_full((len(input_ids),), stopped.is_set(), dtype=torch.bool)

    def run() -> None:
        try:
            criteria = StoppingCriteriaList([is_stopped])
            _generate(chat, [prompt], kwargs, streamer=streamer, stopping_criteria=criteria)
        except BaseException as error:  # re-raised in the caller's thread, which would otherwise wait forever
            failures.append(error)
            streamer.end()

    thread = Thread(target=run)
    thread.start()
    try:
        yield from streamer
    finally:
        stopped.set()
        thread.join()
    if failures:
        raise failures[0]


def continue_texts(
    chat: ChatModel,
    texts: Sequence[str],
    max_new_tokens: int | None = None,
    temperature: float | None = 0.0,
    top_p: float | None = None,
) -> list[str]:
    """Continues each text as the beginning of a document, not as a user message. Returns the continuations.

    Settings as in `generate_replies`, but greedy by default.
    """
    kwargs = _build_generate_kwargs(chat, max_new_tokens, temperature, top_p)
    output, width = _generate(chat, _encode_beginnings(chat, texts, kwargs["max_new_tokens"]), kwargs)
    return chat.tokenizer.batch_decode(output[:, width:].tolist(), skip_special_tokens=True)


def _encode_beginnings(chat: ChatModel, texts: Sequence[str], max_new_tokens: int) -> list[list[int]]:
    """Encodes beginnings of documents: `<|endoftext|>` and as much of the end of each text as leaves room."""
    start, room = token_id(chat.tokenizer, END_OF_TEXT), chat.n_positions - max_new_tokens - 1
    return [[start, *ids[max(0, len(ids) - room) :]] for ids in encode_text(chat.tokenizer, list(texts))]
