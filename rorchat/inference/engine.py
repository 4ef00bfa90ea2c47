"""Words out of a model: load a folder or a Hub id, answer conversations one by one or in batches, stream.

All prompts go through `encode_prompt`, so that no text becomes a control token and nothing passes the positions.
Generation itself is Transformers' `generate`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

from rorchat.chatml import END_OF_TEXT, PAD, encode_prompt, encode_text
from rorchat.errors import DataError, UsageError
from rorchat.model import check_fit, load_checkpoint
from rorchat.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase

Messages = Sequence[dict[str, str]]
DEFAULT_REPLY_DIVISOR = 4  # an answer gets at least a quarter of the positions, or what the caller asks for


@dataclass
class ChatModel:
    """A model with its tokenizer, ready to talk."""

    model: "GPT2LMHeadModel"
    tokenizer: "PreTrainedTokenizerBase"

    @property
    def n_positions(self) -> int:
        return self.model.config.n_positions


@dataclass(frozen=True)
class Reply:
    """What the model said. `stopped`: by itself, not by the limit. `notice`: what the window left out of the prompt.

    `ids` is all that was generated, the token that ended it included; `text` has no control tokens.
    """

    text: str
    stopped: bool
    tokens: int
    notice: str = ""
    ids: tuple[int, ...] = ()

    def closes_turn(self, end_of_turn: int) -> bool:
        """Whether it ends with `<|im_end|>`; one that ends with `<|endoftext|>` has stopped and left its turn open."""
        return self.ids[-1:] == (end_of_turn,)


def resolve_model_path(path: str) -> str:
    """A model's folder: a run's own folder stands for the `model/` in it. A Hub id stays as it is.

    Raises:
        DataError: what looks like a path leads nowhere.
    """
    # "runs/nope" could be a Hub id, but not where there is a folder "runs"
    local = path.startswith((".", "/", "~")) or ("/" in path and Path(path).parent.is_dir())
    if local and not Path(path).is_dir():
        raise DataError(f"No model folder {path}.")
    inside = Path(path) / "model"
    return str(inside) if (inside / "config.json").is_file() else path


def load_model(name_or_path: str, device: str | None = None, *, require_chat: bool = False) -> ChatModel:
    """A model to talk to, from a folder, a run's folder or the Hub.

    Args:
        device: "cuda", "cpu" ...; None takes a GPU where there is one.
        require_chat: refuse a model that was never taught to chat, such as the Hub's `gpt2`.

    Raises:
        DataError, RemoteError: nothing loadable is there.
        MismatchError: model and tokenizer do not belong together; or `require_chat`, and it cannot.
    """
    import torch

    folder = resolve_model_path(name_or_path)
    tokenizer = load_tokenizer(folder, require_chat=require_chat)
    model = load_checkpoint(folder, tokenizer)
    check_fit(model, tokenizer)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return ChatModel(model.to(device).eval(), tokenizer)


def as_messages(prompt: str | Messages) -> Messages:
    """A string is one message of the user."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _generation_arguments(chat: ChatModel, max_new_tokens: int | None, temperature: float | None, top_p: float | None):
    if temperature is not None and temperature < 0:
        raise UsageError(f"temperature is {temperature}: give 0 for the likeliest words or a positive number.")
    if temperature is not None and not math.isfinite(temperature):
        raise UsageError(f"temperature is {temperature}: give 0 for the likeliest words or a positive number.")
    if top_p is not None and not 0 < top_p <= 1:
        raise UsageError(f"top_p is {top_p}: it must lie in (0, 1].")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise UsageError(f"max_new_tokens is {max_new_tokens}: give a positive number.")
    arguments = {"max_new_tokens": max_new_tokens or chat.n_positions // DEFAULT_REPLY_DIVISOR, "max_length": None}
    if arguments["max_new_tokens"] >= chat.n_positions:
        raise UsageError(
            f"max_new_tokens is {max_new_tokens}, but the model has {chat.n_positions} positions for prompt and answer."
        )
    if temperature == 0:
        arguments |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    elif temperature is not None:
        arguments |= {"do_sample": True, "temperature": temperature}
    if top_p is not None and temperature != 0:
        arguments["top_p"] = top_p
    return arguments


def _generate(chat: ChatModel, prompts: Sequence[list[int]], arguments: dict, **more):
    """(B, P + N) ids for prompts padded on the left to one length P, and P."""
    import torch

    longest = max(map(len, prompts))
    pad = chat.tokenizer.convert_tokens_to_ids(PAD)
    input_ids = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in prompts], device=chat.model.device)
    attention_mask = torch.tensor(
        [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=chat.model.device
    )
    limit = min(arguments["max_new_tokens"], chat.n_positions - longest)
    arguments = {**arguments, "max_new_tokens": limit}
    with torch.inference_mode():
        output = chat.model.generate(input_ids, attention_mask=attention_mask, use_cache=True, **arguments, **more)
    return output, longest


def generate_ids(chat: ChatModel, prompts: Sequence[list[int]], arguments: dict) -> list[list[int]]:
    """What follows each prompt, up to and with the token that stops it; one batch.

    Args:
        prompts: encoded, each with room for `max_new_tokens` within the positions.
        arguments: of Transformers' `generate`.
    """
    output, width = _generate(chat, prompts, {**arguments, "max_length": None})
    stops = set(chat.model.generation_config.eos_token_id)
    rows = output[:, width:].tolist()
    return [row[: next((at for at, token in enumerate(row, 1) if token in stops), None)] for row in rows]


def generate_replies(
    chat: ChatModel,
    prompts: Sequence[str | Messages],
    *,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    batch_size: int = 64,
) -> list[Reply]:
    """The model's reply to each prompt, in the order of the prompts; batched by length.

    Args:
        prompts: conversations that end with the user, or single questions.
        max_new_tokens: at most that many tokens a reply; None for a quarter of the positions.
        temperature: 0 for the likeliest words; None for the model's own sampling preset.
    """
    arguments = _generation_arguments(chat, max_new_tokens, temperature, top_p)
    encoded = [
        encode_prompt(
            chat.tokenizer,
            as_messages(prompt),
            n_positions=chat.n_positions,
            max_new_tokens=arguments["max_new_tokens"],
        )
        for prompt in prompts
    ]
    stops = set(chat.model.generation_config.eos_token_id)
    replies: dict[int, Reply] = {}
    order = sorted(range(len(prompts)), key=lambda index: len(encoded[index].input_ids))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        output, width = _generate(chat, [encoded[index].input_ids for index in batch], arguments)
        for index, row in zip(batch, output[:, width:].tolist(), strict=True):
            end = next((at for at, token in enumerate(row) if token in stops), None)
            text = chat.tokenizer.decode(row[:end], skip_special_tokens=True)
            tokens = len(row) if end is None else end
            ids = tuple(row if end is None else row[: end + 1])
            replies[index] = Reply(text, end is not None, tokens, encoded[index].notice(), ids)
    return [replies[index] for index in range(len(prompts))]


def generate_text(chat: ChatModel, prompt: str | Messages, **settings) -> str:
    """The model's reply to a question or a conversation; settings as in `generate_replies`."""
    return generate_replies(chat, [prompt], **settings)[0].text


def stream_text(
    chat: ChatModel,
    prompt: str | Messages,
    *,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
) -> Iterator[str]:
    """The reply piece by piece, as it is generated."""
    from transformers import TextIteratorStreamer

    arguments = _generation_arguments(chat, max_new_tokens, temperature, top_p)
    encoded = encode_prompt(
        chat.tokenizer, as_messages(prompt), n_positions=chat.n_positions, max_new_tokens=arguments["max_new_tokens"]
    )
    streamer = TextIteratorStreamer(chat.tokenizer, skip_prompt=True, skip_special_tokens=True)
    failure: list[BaseException] = []

    def run() -> None:
        try:
            _generate(chat, [encoded.input_ids], arguments, streamer=streamer)
        except BaseException as error:  # handed to the reader, who would wait for ever otherwise
            failure.append(error)
            streamer.end()

    thread = Thread(target=run, daemon=True)
    thread.start()
    yield from streamer
    thread.join()
    if failure:
        raise failure[0]


def continue_texts(chat: ChatModel, texts: Sequence[str], max_new_tokens: int, temperature: float = 0.0) -> list[str]:
    """How the model goes on with each text, taken as the beginning of a document, not as a question."""
    start = chat.tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    arguments = _generation_arguments(chat, max_new_tokens, temperature, None)
    room = chat.n_positions - max_new_tokens - 1
    prompts = [[start, *ids[max(0, len(ids) - room) :]] for ids in encode_text(chat.tokenizer, list(texts))]
    output, width = _generate(chat, prompts, arguments)
    return [chat.tokenizer.decode(row, skip_special_tokens=True) for row in output[:, width:].tolist()]
