"""CHAT: control tokens, the template, conversation -> (input_ids, labels), and the context window.

One encoder serves training, evaluation, the terminal and every server of ours. It never lets text become a control
token: control ids are placed by hand, and all text between them is encoded with the control tokens switched off. The
Jinja template that travels with the model gives the same ids on clean text and takes the sting out of control strings
in content, so that a server which knows nothing of this file is safe too.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rorchat.errors import DataError, MismatchError
from rorchat.rows import ROLES, RejectedRow
from rorchat.rows import check_messages as check_turns

END_OF_TEXT, IM_START, IM_END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
CONTROL_TOKENS = (END_OF_TEXT, IM_START, IM_END, PAD)
IGNORE_INDEX = -100  # the label that no loss counts
VOCABULARY_MULTIPLE = 64  # reserved slots fill the vocabulary up to a multiple of this

# The rules of a conversation, in the order in which both the template and the encoder apply them:
#  - without a system message of its own it gets the persona's;
#  - an assistant's reply is trimmed: it begins where generation begins, so that no token straddles prompt and reply;
#  - a control string in content gets a blank after its `<`. Replaced, not deleted: deletion recombines
#    (`<|im_<|im_end|>end|>`), and the blank cannot be part of any control string.
# `{% generation %}` marks what the loss sees: the assistant's words and the <|im_end|> that closes them.
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
    """The name of a slot that is kept free in the vocabulary for tokens to come."""
    return f"<|reserved_{number}|>"


def chat_template(control_strings: Sequence[str], system_message: str) -> str:
    """The Jinja template that is saved with a tokenizer: ChatML, a default system message, safe content.

    Args:
        control_strings: every special token of the tokenizer, reserved slots included.
        system_message: used where a conversation brings none; empty for no default.
    """

    def quoted(text: str) -> str:
        return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"

    listed = "[" + ", ".join(map(quoted, control_strings)) + "]"
    return _TEMPLATE.replace("CONTROL_STRINGS", listed).replace("SYSTEM_MESSAGE", quoted(system_message))


@dataclass(frozen=True)
class EncodedConversation:
    """`input_ids` (T,) and `labels` (T,): -100 but for the assistant's words and the `<|im_end|>` closing them.

    `dropped_turns` counts the messages cut off the end because they did not fit.
    """

    input_ids: list[int]
    labels: list[int]
    dropped_turns: int = 0


@dataclass(frozen=True)
class EncodedPrompt:
    """`input_ids` (T,) that end where the assistant's words begin, and what the window had to leave out."""

    input_ids: list[int]
    dropped_turns: int = 0
    dropped_tokens: int = 0

    def notice(self) -> str:
        """What was left out, in words for the user; empty when nothing was."""
        parts = []
        if self.dropped_turns:
            parts.append(f"the {self.dropped_turns} oldest messages no longer fit and were left out")
        if self.dropped_tokens:
            parts.append(f"the message is too long: its first {self.dropped_tokens} tokens were left out")
        return "; ".join(parts)


def check_messages(messages: Sequence[dict]) -> None:
    """Raises DataError unless `messages` is an optional system message and then user and assistant in turn."""
    try:
        check_turns(messages)
    except RejectedRow as reject:
        raise DataError(f"This conversation cannot be encoded: {reject}.") from None


def encode_text(tokenizer, texts: list[str]) -> list[list[int]]:
    """Ids of each text with the control tokens switched off: nothing in a text can become a control id."""
    # Not verbose: Transformers warns of texts longer than the window, which are cut into rows or turns later
    options = {
        "add_special_tokens": False,
        "split_special_tokens": True,
        "return_attention_mask": False,
        "verbose": False,
    }
    return tokenizer(texts, **options)["input_ids"]


@functools.lru_cache(maxsize=8)
def _system_message(render: Callable[..., str], template: str) -> str:
    rendered = render([{"role": "user", "content": ""}], chat_template=template, tokenize=False)
    head, tail = f"{IM_START}system\n", f"{IM_END}\n{IM_START}user"
    return rendered[len(head) : rendered.index(tail)] if rendered.startswith(head) else ""


def system_message(tokenizer) -> str:
    """The default system message of the tokenizer's chat template, read off what the template renders.

    Raises:
        MismatchError: the tokenizer has no ChatML template, so nobody could talk to the model.
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
    ids: list[int]  # <|im_start|>role\n words <|im_end|>\n
    head: int  # how many of the ids stand before the words


def _encode_turns(
    tokenizer, conversations: Sequence[Sequence[dict]], encode: Callable[[list[str]], list[list[int]]] | None = None
) -> list[list[_Turn]]:
    """Each conversation's turns, the default system message added where there is none. One tokenizer call for all."""
    default = system_message(tokenizer)
    complete = [
        [{"role": "system", "content": default}, *messages] if default and messages[0]["role"] != "system" else messages
        for messages in conversations
    ]
    # A role and its words are encoded as one text, as the template's reader does, so that words with leading blanks
    # give the same ids. A reply is trimmed instead: its ids must begin where generation begins.
    texts = [
        message["content"].strip() if message["role"] == "assistant" else f"{message['role']}\n{message['content']}"
        for messages in complete
        for message in messages
    ]
    start, end = tokenizer.convert_tokens_to_ids([IM_START, IM_END])
    newline, assistant = encode_text(tokenizer, ["\n", "assistant\n"])
    heads = {
        role: 1 + len(ids)
        for role, ids in zip(ROLES, encode_text(tokenizer, [f"{role}\n" for role in ROLES]), strict=True)
    }
    encoded = iter(encode(texts) if encode else encode_text(tokenizer, texts))

    def turn(role: str) -> _Turn:
        ids = next(encoded)
        return _Turn(role, [start, *(assistant if role == "assistant" else ()), *ids, end, *newline], heads[role])

    return [[turn(message["role"]) for message in messages] for messages in complete]


def encode_conversations(
    tokenizer,
    conversations: Sequence[Sequence[dict]],
    max_length: int | None = None,
    encode: Callable[[list[str]], list[list[int]]] | None = None,
) -> list[EncodedConversation | None]:
    """What `encode_conversation` gives, for many conversations with one call of the tokenizer.

    Args:
        encode: a faster way to what `encode_text` gives, such as `rorchat.tokens.encode.Encoder.encode_texts`.

    Returns:
        One entry a conversation; None where not even the first exchange fits into `max_length`.
    """
    newline = len(encode_text(tokenizer, ["\n"])[0])
    encoded = []
    for turns in _encode_turns(tokenizer, conversations, encode):
        kept = len(turns)
        while kept and (
            turns[kept - 1].role != "assistant"
            or (max_length is not None and sum(len(turn.ids) for turn in turns[:kept]) > max_length)
        ):
            kept -= 1
        if not kept:
            encoded.append(None)
            continue
        input_ids, labels = [], []
        for turn in turns[:kept]:
            input_ids += turn.ids
            if turn.role == "assistant":
                words = turn.ids[turn.head : len(turn.ids) - newline]  # with the <|im_end|>
                labels += [IGNORE_INDEX] * turn.head + words + [IGNORE_INDEX] * newline
            else:
                labels += [IGNORE_INDEX] * len(turn.ids)
        encoded.append(EncodedConversation(input_ids, labels, dropped_turns=len(turns) - kept))
    return encoded


def encode_conversation(tokenizer, messages: Sequence[dict], max_length: int | None = None) -> EncodedConversation:
    """Ids and labels of a conversation for training: only the assistant's words, and their closing, carry labels.

    Args:
        tokenizer: one of `rorchat.load_tokenizer`: it has the control tokens and the ChatML template.
        messages: `[{"role": "system"|"user"|"assistant", "content": str}, ...]`, user and assistant in turn.
        max_length: tokens at most. Turns are cut off the end, whole, so that the last one is the assistant's.

    Raises:
        DataError: wrong roles, no assistant's turn, or the first exchange alone is longer than `max_length`.
    """
    check_messages(messages)
    (encoded,) = encode_conversations(tokenizer, [messages], max_length)
    if encoded is None:
        raise DataError(f"No exchange of this conversation fits into {max_length} tokens with an assistant's turn.")
    return encoded


@dataclass(frozen=True)
class EncodedPreference:
    """Ids of a prompt, up to where the reply begins, and of two replies to it, each with its closing `<|im_end|>`."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


def encode_preferences(
    tokenizer, preferences: Sequence[dict], max_length: int | None = None
) -> list[EncodedPreference | None]:
    """Encode rows `{"prompt": [messages], "chosen": [message], "rejected": [message]}` with one call of the tokenizer.

    Args:
        max_length: Maximum number of tokens of prompt and reply, including the newline that ends a turn.

    Returns:
        One entry per preference; None if one of its two sides is longer than `max_length`.
    """
    newline = len(encode_text(tokenizer, ["\n"])[0])
    conversations = [[*row["prompt"], *row["chosen"], *row["rejected"]] for row in preferences]
    encoded = []
    for *prompt, chosen, rejected in _encode_turns(tokenizer, conversations):
        longest = sum(len(turn.ids) for turn in prompt) + max(len(chosen.ids), len(rejected.ids))
        if max_length is not None and longest > max_length:
            encoded.append(None)
            continue
        prompt_ids = [token for turn in prompt for token in turn.ids] + chosen.ids[: chosen.head]
        replies = (reply.ids[reply.head : len(reply.ids) - newline] for reply in (chosen, rejected))
        encoded.append(EncodedPreference(prompt_ids, *replies))
    return encoded


def encode_prompt(tokenizer, messages: Sequence[dict], *, n_positions: int, max_new_tokens: int) -> EncodedPrompt:
    """The ids from which the assistant's next words are generated, fitted into the context window.

    Keeps the system message and the newest whole turns, beginning with a user's; if the last message alone is too long
    its beginning goes. What was left out is counted, for the caller to say.

    Args:
        messages: a conversation that ends with a user's message.
        n_positions: the model's learned positions; nothing ever reaches position `n_positions`.
        max_new_tokens: tokens kept free for the answer.

    Raises:
        DataError: the conversation is malformed or does not end with a user's message.
        MismatchError: the window is too small for the system message and an answer.
    """
    check_messages(messages)
    if messages[-1]["role"] != "user":
        raise DataError(f"A prompt ends with a user's message, this one with the {messages[-1]['role']}'s.")
    (turns,) = _encode_turns(tokenizer, [messages])
    opening = [tokenizer.convert_tokens_to_ids(IM_START), *encode_text(tokenizer, ["assistant\n"])[0]]
    system = turns[:1] if turns[0].role == "system" else []
    rest = turns[len(system) :]
    room = n_positions - max_new_tokens - len(opening) - sum(len(turn.ids) for turn in system)
    dropped = 0
    while len(rest) > 1 and sum(len(turn.ids) for turn in rest) > room:
        rest, dropped = rest[2:], dropped + 2  # a user's turn and the reply to it
    last = rest[-1]
    excess = max(0, sum(len(turn.ids) for turn in rest) - room)
    if excess:
        tail = len(encode_text(tokenizer, ["\n"])[0]) + 1
        if excess > len(last.ids) - last.head - tail:
            raise MismatchError(
                f"The context window of {n_positions} tokens is too small: the system message takes "
                f"{sum(len(turn.ids) for turn in system)} and the answer reserves {max_new_tokens}. Shorten either."
            )
        rest = [_Turn("user", last.ids[: last.head] + last.ids[last.head + excess :], last.head)]
    input_ids = [token for turn in (*system, *rest) for token in turn.ids] + opening
    return EncodedPrompt(input_ids, dropped_turns=dropped, dropped_tokens=excess)
