"""The ChatML format: control tokens, chat template, encoding of conversations and prompts, the context window.

Training, evaluation and inference share this encoder. Text can never become a control token: control ids are inserted
directly, and all text between them is encoded with special tokens disabled. The Jinja template that is saved with the
tokenizer gives the same ids for text without control strings, which are the strings of special tokens. The template
neutralises control strings in content, so the model is also safe on other servers.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rorchat.errors import DataError, MismatchError
from rorchat.rows import ROLES, RejectedRow, is_trained
from rorchat.rows import check_messages as check_turns

END_OF_TEXT, IM_START, IM_END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
CONTROL_TOKENS = (END_OF_TEXT, IM_START, IM_END, PAD)
IGNORE_INDEX = -100  # labels with this value are ignored by the loss
VOCABULARY_MULTIPLE = 64  # reserved tokens pad the vocabulary to a multiple of this
#: What is left out of rows that are longer than the context window, as it is counted in row stats.
LAST_TURNS = "their last turns do not fit into the context window"
EARLY_MESSAGES = "early messages of the prompt were dropped"
REPLY_ENDS = "a reply was cut, so it does not train the model to stop"
MIN_REPLY_TOKENS = 16  # a prompt that leaves less room for a cut reply does not fit

# The template and the encoder apply the same rules:
#  - A conversation without a system message gets the persona's.
#  - Replies are stripped, so a reply starts exactly where generation starts and no token spans prompt and reply.
#  - Control strings in content get a space after `<`. They are not deleted, because deletion can create a new control
#    string (`<|im_<|im_end|>end|>`).
# `{% generation %}` marks the targets of the loss: each reply and the <|im_end|> that ends it.
_TEMPLATE = """\
{%- set control = CONTROL_STRINGS %}
{%- if SYSTEM_MESSAGE and messages[0]['role'] != 'system' %}
{%- set messages = [{'role': 'system', 'content': SYSTEM_MESSAGE}] + messages %}
{%- endif %}
{%- for message in messages %}
{%- if message['role'] not in ['system', 'user', 'assistant'] %}
{{- raise_exception("a message has the role '" + message['role'] + "'; allowed are system, user, assistant") }}
{%- endif %}
{%- set safe = namespace(content=message['content']) %}
{%- for token in control %}
{%- set safe.content = safe.content.replace(token, '< ' + token[1:]) %}
{%- endfor %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{- safe.content.strip() + '<|im_end|>' }}{% endgeneration %}
{%- else %}
{{- safe.content + '<|im_end|>' }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""


def reserved_token(number: int) -> str:
    """The name of a reserved token, which pads the vocabulary and can be used later."""
    return f"<|reserved_{number}|>"


def chat_template(control_strings: Sequence[str], system_message: str) -> str:
    """The Jinja template that is saved with a tokenizer: ChatML with a default system message and neutralised content.

    Args:
        control_strings: every special token of the tokenizer, including the reserved ones.
        system_message: the default for conversations without one; an empty string adds none.
    """

    def quoted(text: str) -> str:
        return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"

    listed = "[" + ", ".join(map(quoted, control_strings)) + "]"
    return _TEMPLATE.replace("CONTROL_STRINGS", listed).replace("SYSTEM_MESSAGE", quoted(system_message))


@dataclass(frozen=True)
class EncodedConversation:
    """`input_ids` (T,) and `labels` (T,), which are -100 except in replies, including their `<|im_end|>`.

    `dropped_turns` is the number of messages removed from the end because they did not fit. `untrained` has the start
    and the end, in `input_ids`, of every message that is marked with `"train": False`.
    """

    input_ids: list[int]
    labels: list[int]
    dropped_turns: int = 0
    untrained: tuple[tuple[int, int], ...] = ()

    def cuts(self) -> list[str]:
        """What was left out; see `RowStats.count_cut`."""
        return [LAST_TURNS] if self.dropped_turns else []


@dataclass(frozen=True)
class EncodedPrompt:
    """`input_ids` (T,) that end where the reply starts, and how much was dropped to fit the context window."""

    input_ids: list[int]
    dropped_turns: int = 0
    dropped_tokens: int = 0

    def notice(self) -> str:
        """A message for the user about what was dropped; empty if nothing was."""
        parts = []
        if self.dropped_turns:
            parts.append(f"the {self.dropped_turns} oldest messages do not fit into the context and were dropped")
        if self.dropped_tokens:
            parts.append(f"the message is too long: its first {self.dropped_tokens} tokens were dropped")
        return "; ".join(parts)


def check_messages(messages: Sequence[dict]) -> None:
    """Raises DataError unless `messages` is an optional system message followed by alternating user and assistant."""
    try:
        check_turns(messages)
    except RejectedRow as reject:
        raise DataError(f"This conversation cannot be encoded: {reject}.") from None


def encode_text(tokenizer, texts: list[str]) -> list[list[int]]:
    """Encodes texts with special tokens disabled, so no text can produce a control id."""
    # verbose=False: no warning about texts longer than the context window, because they are split into rows later
    options = {
        "add_special_tokens": False,
        "split_special_tokens": True,
        "return_attention_mask": False,
        "verbose": False,
    }
    return tokenizer(texts, **options)["input_ids"]


def token_id(tokenizer, token: str) -> int:
    """The id of a token, declared as one number; `convert_tokens_to_ids` is declared to return a number or a list."""
    return tokenizer.convert_tokens_to_ids(token)


@functools.lru_cache(maxsize=8)
def _system_message(render: Callable[..., str], template: str) -> str:
    rendered = render([{"role": "user", "content": ""}], chat_template=template, tokenize=False)
    head, tail = f"{IM_START}system\n", f"{IM_END}\n{IM_START}user"
    return rendered[len(head) : rendered.index(tail)] if rendered.startswith(head) else ""


def system_message(tokenizer) -> str:
    """The default system message of the tokenizer's chat template, taken from a rendered conversation.

    Raises:
        MismatchError: the tokenizer has no ChatML template.
    """
    template = tokenizer.chat_template
    if not isinstance(template, str) or IM_START not in template:
        raise MismatchError(
            f"The tokenizer of {tokenizer.name_or_path!r} has no ChatML template. Load it with "
            "rorchat.load_tokenizer(), which adds the control tokens and the template."
        )
    return _system_message(tokenizer.apply_chat_template, template)


@dataclass(frozen=True)
class _Turn:
    role: str
    ids: list[int]  # of "<|im_start|>role\ncontent<|im_end|>\n"
    n_header: int  # number of ids before the content
    is_trained: bool = True

    @property
    def is_target(self) -> bool:
        return self.is_trained and self.role == "assistant"


def _encode_turns(
    tokenizer, conversations: Sequence[Sequence[dict]], encode: Callable[[list[str]], list[list[int]]] | None = None
) -> list[list[_Turn]]:
    """Encodes the turns of all conversations in one call of the tokenizer, and adds the default system message."""
    default = system_message(tokenizer)
    complete = [
        [{"role": "system", "content": default}, *messages] if default and messages[0]["role"] != "system" else messages
        for messages in conversations
    ]
    # A role and its content are encoded as one text, so that content with leading spaces gives the same ids as the
    # rendered template. A reply is stripped and encoded on its own, so that its ids start where generation starts.
    texts = [
        message["content"].strip() if message["role"] == "assistant" else f"{message['role']}\n{message['content']}"
        for messages in complete
        for message in messages
    ]
    start, end = tokenizer.convert_tokens_to_ids([IM_START, IM_END])
    newline, assistant = encode_text(tokenizer, ["\n", "assistant\n"])
    headers = encode_text(tokenizer, [f"{role}\n" for role in ROLES])
    n_header = {role: 1 + len(ids) for role, ids in zip(ROLES, headers, strict=True)}
    encoded = iter(encode(texts) if encode else encode_text(tokenizer, texts))

    def turn(message: dict) -> _Turn:
        role, ids = message["role"], next(encoded)
        ids = [start, *(assistant if role == "assistant" else ()), *ids, end, *newline]
        return _Turn(role, ids, n_header[role], is_trained(message))

    return [[turn(message) for message in messages] for messages in complete]


def encode_conversations(
    tokenizer,
    conversations: Sequence[Sequence[dict]],
    max_length: int | None = None,
    encode: Callable[[list[str]], list[list[int]]] | None = None,
) -> list[EncodedConversation | None]:
    """Batched `encode_conversation`, with one call of the tokenizer.

    Args:
        encode: a faster equivalent of `encode_text`, such as `rorchat.tokens.encode.Encoder.encode_texts`.

    Returns:
        One entry per conversation; None if no reply that is learned fits into `max_length`.
    """
    newline = len(encode_text(tokenizer, ["\n"])[0])
    encoded: list[EncodedConversation | None] = []
    for turns in _encode_turns(tokenizer, conversations, encode):
        kept = len(turns)
        while kept and (
            turns[kept - 1].role != "assistant"
            or (max_length is not None and sum(len(turn.ids) for turn in turns[:kept]) > max_length)
        ):
            kept -= 1
        has_target = any(turn.is_target for turn in turns[:kept])
        encoded.append(_join_turns(turns[:kept], newline, len(turns) - kept) if has_target else None)
    return encoded


def _join_turns(turns: list[_Turn], newline: int, dropped_turns: int) -> EncodedConversation:
    """One conversation.

    Args:
        newline: number of tokens after the `<|im_end|>` of a turn.
        dropped_turns: number of turns that were removed after these.
    """
    input_ids: list[int] = []
    labels: list[int] = []
    untrained = []
    for turn in turns:
        if turn.is_target:
            reply = turn.ids[turn.n_header : len(turn.ids) - newline]  # including <|im_end|>
            labels += [IGNORE_INDEX] * turn.n_header + reply + [IGNORE_INDEX] * newline
        else:
            labels += [IGNORE_INDEX] * len(turn.ids)
        if not turn.is_trained:
            untrained.append((len(input_ids), len(input_ids) + len(turn.ids)))
        input_ids += turn.ids
    return EncodedConversation(input_ids, labels, dropped_turns, tuple(untrained))


def encode_conversation(tokenizer, messages: Sequence[dict], max_length: int | None = None) -> EncodedConversation:
    """Encodes a conversation for training. Only replies and the `<|im_end|>` after them have labels.

    Args:
        tokenizer: from `rorchat.load_tokenizer`, so that it has the control tokens and the ChatML template.
        messages: `[{"role": "system"|"user"|"assistant", "content": str}, ...]`, alternating user and assistant. A
            reply with `"train": False` has no labels.
        max_length: maximum number of tokens. Whole turns are removed from the end; the last one kept is a reply.

    Raises:
        DataError: the roles do not alternate, no reply is learned, or the first exchange is longer than `max_length`.
    """
    check_messages(messages)
    (encoded,) = encode_conversations(tokenizer, [messages], max_length)
    if encoded is None:
        if not any(message["role"] == "assistant" and is_trained(message) for message in messages):
            raise DataError("The conversation has no assistant message that is learned.")
        raise DataError(f"The first exchange of the conversation does not fit into {max_length} tokens.")
    return encoded


@dataclass(frozen=True)
class EncodedPreference:
    """Ids of a prompt, including the header of the reply, and of two replies, which end with `<|im_end|>` unless cut.

    `dropped_turns` is the number of early messages of the prompt, and `cut_replies` the number of replies whose end was
    removed, because the pair did not fit.
    """

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    dropped_turns: int = 0
    cut_replies: int = 0

    def cuts(self) -> list[str]:
        """What was left out; see `RowStats.count_cut`."""
        return [EARLY_MESSAGES] * (self.dropped_turns > 0) + [REPLY_ENDS] * (self.cut_replies > 0)


def encode_preferences(
    tokenizer, preferences: Sequence[dict], max_length: int | None = None
) -> list[EncodedPreference | RejectedRow]:
    """Encodes rows `{"prompt": [messages], "chosen": [message], "rejected": [message]}` in one call of the tokenizer.

    If the prompt with its longer reply exceeds `max_length`, the oldest exchanges of the prompt are dropped, as in
    `encode_prompt`. If a reply still does not fit, both replies are cut to the same maximum length: the rest of the
    context window. A cut reply has no `<|im_end|>`, so the model does not learn to stop there.

    Args:
        max_length: maximum number of tokens of prompt and reply.

    Returns:
        One entry per preference: a `RejectedRow` if the system message and the last user message leave less than
        MIN_REPLY_TOKENS for a reply that needs more, or if the replies are identical once they are cut.
    """
    newline = len(encode_text(tokenizer, ["\n"])[0])
    conversations = [[*row["prompt"], *row["chosen"], *row["rejected"]] for row in preferences]
    return [_encode_preference(turns, newline, max_length) for turns in _encode_turns(tokenizer, conversations)]


def _encode_preference(turns: list[_Turn], newline: int, max_length: int | None) -> EncodedPreference | RejectedRow:
    """Encodes one preference.

    Args:
        turns: the prompt, the chosen and the rejected reply.
        newline: number of tokens after the `<|im_end|>` of a turn.
    """
    *prompt, chosen, rejected = turns
    replies = [reply.ids[reply.n_header : len(reply.ids) - newline] for reply in (chosen, rejected)]
    longest = max(map(len, replies))
    dropped_turns = cut_replies = 0
    if max_length is not None:
        system = prompt[:1] if prompt[0].role == "system" else []
        room = max_length - chosen.n_header - sum(len(turn.ids) for turn in system)
        rest = _newest_exchanges(prompt[len(system) :], room - longest)
        dropped_turns = len(prompt) - len(system) - len(rest)
        prompt = [*system, *rest]
        reply_tokens = room - sum(len(turn.ids) for turn in rest)
        if reply_tokens < min(MIN_REPLY_TOKENS, longest):
            return RejectedRow(
                "over-long", f"the prompt leaves {max(0, reply_tokens)} of {max_length} tokens for a reply"
            )
        cut_replies = sum(len(ids) > reply_tokens for ids in replies)
        replies = [ids[:reply_tokens] for ids in replies]
        if replies[0] == replies[1]:
            return RejectedRow("identical chosen and rejected", f"in the {reply_tokens} tokens that fit")
    prompt_ids = [token for turn in prompt for token in turn.ids] + chosen.ids[: chosen.n_header]
    return EncodedPreference(prompt_ids, replies[0], replies[1], dropped_turns, cut_replies)


def _newest_exchanges(turns: list[_Turn], room: int) -> list[_Turn]:
    """The last message and as many complete exchanges before it as fit into `room` tokens."""
    while len(turns) > 1 and sum(len(turn.ids) for turn in turns) > room:
        turns = turns[2:]  # a user message and its reply
    return turns


def encode_prompt(tokenizer, messages: Sequence[dict], *, n_positions: int, max_new_tokens: int) -> EncodedPrompt:
    """Encodes a prompt for generation and truncates it to the context window.

    The system message and the newest complete exchanges are kept. If the last message alone is too long, its beginning
    is dropped.

    Args:
        messages: a conversation that ends with a user message. With an empty system message, the prompt has none, not
            even the default one.
        n_positions: the model's context length; no token ever reaches position `n_positions`.
        max_new_tokens: number of tokens reserved for the reply.

    Raises:
        DataError: the conversation is malformed or does not end with a user message.
        MismatchError: the context is too small for the system message and the reply.
    """
    check_messages(messages)
    if messages[-1]["role"] != "user":
        raise DataError(f"A prompt must end with a user message; the last message is from {messages[-1]['role']!r}.")
    (turns,) = _encode_turns(tokenizer, [messages])
    opening = [tokenizer.convert_tokens_to_ids(IM_START), *encode_text(tokenizer, ["assistant\n"])[0]]
    if messages[0]["role"] == "system" and not messages[0]["content"]:
        turns = turns[1:]
    system = turns[:1] if turns[0].role == "system" else []
    rest = turns[len(system) :]
    room = n_positions - max_new_tokens - len(opening) - sum(len(turn.ids) for turn in system)
    kept = _newest_exchanges(rest, room)
    rest, dropped = kept, len(rest) - len(kept)
    last = rest[-1]
    excess = max(0, sum(len(turn.ids) for turn in rest) - room)
    if excess:
        tail = len(encode_text(tokenizer, ["\n"])[0]) + 1
        if excess > len(last.ids) - last.n_header - tail:
            raise MismatchError(
                f"The context window of {n_positions} tokens is too small: the system message takes "
                f"{sum(len(turn.ids) for turn in system)} and the reply {max_new_tokens}. "
                "Shorten the system message or reduce max_new_tokens."
            )
        ids = last.ids[: last.n_header] + last.ids[last.n_header + excess :]
        rest = [_Turn("user", ids, last.n_header)]
    input_ids = [token for turn in (*system, *rest) for token in turn.ids] + opening
    return EncodedPrompt(input_ids, dropped_turns=dropped, dropped_tokens=excess)
