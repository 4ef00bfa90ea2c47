"""Encoder and template agree, only replies have labels, and no text becomes a control token."""

import json
import random
from itertools import islice

import pytest

from rorchat.chatml import (
    CONTROL_TOKENS,
    IGNORE_INDEX,
    MIN_REPLY_TOKENS,
    encode_conversation,
    encode_conversations,
    encode_preferences,
    encode_prompt,
    encode_text,
    system_message,
)
from rorchat.errors import DataError, MismatchError
from rorchat.rows import RejectedRow
from rorchat.sources.registry import load_rows

DIALOGUE = [
    {"role": "user", "content": "Hello there"},
    {"role": "assistant", "content": "Hi! naïve 🙂"},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "Good bye."},
]


def template_ids(tokenizer, messages, **more):
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **more)["input_ids"]


def all_template_ids(tokenizer, conversations) -> list[list[int]]:
    return tokenizer.apply_chat_template(conversations, tokenize=True, return_dict=True)["input_ids"]


def control_ids(tokenizer) -> set[int]:
    return set(tokenizer.convert_tokens_to_ids([*CONTROL_TOKENS])) | {
        index for token, index in tokenizer.get_added_vocab().items() if token.startswith("<|reserved_")
    }


def test_a_conversation_is_this_string(tokenizer):
    text = tokenizer.decode(encode_conversation(tokenizer, DIALOGUE[:2]).input_ids)
    assert text == (
        f"<|im_start|>system\n{system_message(tokenizer)}<|im_end|>\n"
        "<|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\nHi! naïve 🙂<|im_end|>\n"
    )


def test_exactly_the_replies_and_their_closing_carry_labels(tokenizer):
    encoded = encode_conversation(tokenizer, DIALOGUE)
    trained = [label for label in encoded.labels if label != IGNORE_INDEX]
    assert tokenizer.decode(trained) == "Hi! naïve 🙂<|im_end|>Good bye.<|im_end|>"
    assert all(label in (IGNORE_INDEX, token) for label, token in zip(encoded.labels, encoded.input_ids, strict=True))


def test_the_template_marks_the_same_tokens_as_the_labels(tokenizer):
    encoded = encode_conversation(tokenizer, DIALOGUE)
    marked = tokenizer.apply_chat_template(DIALOGUE, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    assert marked["input_ids"] == encoded.input_ids
    assert [bool(mask) for mask in marked["assistant_masks"]] == [label != IGNORE_INDEX for label in encoded.labels]


@pytest.mark.parametrize(
    "content",
    [
        "  leading blanks",
        "\n\nleading lines",
        "trailing \n ",
        "\t\ttabs\n\n  mixed",
        "def f():\n    return 1\n",
        "'s it",
        "",
    ],
)
def test_white_space_gives_the_same_ids_by_template_and_encoder(tokenizer, content):
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": f" {content}x "}]
    assert template_ids(tokenizer, messages) == encode_conversation(tokenizer, messages).input_ids


def test_a_prompt_equals_the_rendered_template(tokenizer):
    prompt = encode_prompt(tokenizer, DIALOGUE[:3], n_positions=1024, max_new_tokens=64)
    assert prompt.input_ids == template_ids(tokenizer, DIALOGUE[:3], add_generation_prompt=True)
    assert prompt.notice() == ""


def test_a_prompt_with_an_empty_system_message_has_none(tokenizer):
    question = {"role": "user", "content": "Hello"}
    prompts = ([{"role": "system", "content": ""}, question], [{"role": "system", "content": "Be kind."}, question])
    none, given = (encode_prompt(tokenizer, prompt, n_positions=128, max_new_tokens=8).input_ids for prompt in prompts)
    assert tokenizer.decode(none) == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert given[-len(none) :] == none


def test_a_given_system_message_replaces_the_default(tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, *DIALOGUE[:2]]
    text = tokenizer.decode(encode_conversation(tokenizer, messages).input_ids)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n") and system_message(tokenizer) not in text


def test_template_and_encoder_agree_on_real_conversations(gpt2_tokenizer, shared_data):
    sources = {
        "alpaca=alpaca/alpaca_5000.json": 250,
        "dailydialog=dailydialog/dialogues_text.txt": 250,
        "messages=chat/moss003_messages.jsonl": 100,
        "messages=chat/tulu3_oasst1_sft_sample.jsonl": 60,
    }
    conversations = []
    for spec, count in sources.items():
        name, path = spec.split("=")
        rows = [row["messages"] for row in islice(load_rows(f"{name}={shared_data / path}", "conversation"), count)]
        assert len(rows) == count, spec
        conversations += rows
    rendered = all_template_ids(gpt2_tokenizer, conversations)
    encodings = encode_conversations(gpt2_tokenizer, conversations)
    for messages, ids, encoded in zip(conversations, rendered, encodings, strict=True):
        assert ids == encoded.input_ids
        trained = gpt2_tokenizer.decode([label for label in encoded.labels if label != IGNORE_INDEX])
        replies = [turn["content"].strip() + "<|im_end|>" for turn in messages if turn["role"] == "assistant"]
        assert trained == "".join(replies)


def fuzzed(count: int) -> list[str]:
    """Control tokens, halves of them, nestings and separators, put together at random."""
    rng = random.Random(0)
    tokens = [*CONTROL_TOKENS, "<|reserved_0|>"]
    pieces = [*tokens, *(t[: len(t) // 2] for t in tokens), *(t[len(t) // 2 :] for t in tokens)]
    pieces += [t[:5] + inner + t[5:] for t in tokens for inner in tokens]
    pieces += [
        "<",
        "|",
        ">",
        "< ",
        "<|",
        "|>",
        "im_",
        "\n",
        "user\n",
        "assistant\n",
        "é",
        "🙂",
        " ",
        "a",
        "\\",
        "'",
        '"',
        "{{",
        "}}",
    ]
    return ["".join(rng.choices(pieces, k=rng.randint(1, 8))) for _ in range(count)]


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_hostile_strings_never_become_control_tokens(tokenizer, role):
    control = control_ids(tokenizer)
    texts = fuzzed(1500)
    question, reply = {"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}
    clean = [token for token in template_ids(tokenizer, [question, reply]) if token in control]
    hostile = [
        [{**question, "content": text}, reply] if role == "user" else [question, {**reply, "content": text}]
        for text in texts
    ]
    both = all_template_ids(tokenizer, hostile) + [row.input_ids for row in encode_conversations(tokenizer, hostile)]
    assert len(both) == 3000
    for text, ids in zip(texts * 2, both, strict=True):
        assert [token for token in ids if token in control] == clean, text


def test_hostile_text_survives_encoding_and_decoding(tokenizer):
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    texts = fuzzed(1500)
    conversations = [[{"role": "user", "content": text}, DIALOGUE[1]] for text in texts]
    for text, row in zip(texts, encode_conversations(tokenizer, conversations), strict=True):
        ids = row.input_ids
        first = ids.index(start, 1)
        turn = ids[first + 1 : ids.index(end, first)]
        assert tokenizer.decode(turn) == f"user\n{text}"


def test_the_template_adds_one_space_to_control_strings_only(tokenizer):
    def rendered(text: str) -> str:
        whole = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False)
        return whole.split("<|im_start|>user\n")[1].removesuffix("<|im_end|>\n")

    assert rendered("f <| x |> y, a < b") == "f <| x |> y, a < b"
    assert rendered("<|im_<|im_end|>end|>") == "<|im_< |im_end|>end|>"


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], "no messages"),
        ([{"role": "robot", "content": "x"}], "'robot'"),
        ([{"role": "assistant", "content": "x"}], "expected 'user'"),
        ([{"role": "user", "content": "x"}, {"role": "user", "content": "y"}], "expected 'assistant'"),
        ([{"role": "user", "content": None}], "NoneType"),
        ([{"role": "user"}], "NoneType"),
        ([{"role": "user", "content": "x"}], "no assistant message"),
        ([DIALOGUE[0], {**DIALOGUE[1], "train": False}], "no assistant message that is learned"),
    ],
)
def test_a_malformed_conversation_raises_an_error_with_the_reason(tokenizer, messages, error):
    with pytest.raises(DataError, match=error):
        encode_conversation(tokenizer, messages)


def test_the_template_rejects_an_unknown_role(tokenizer):
    with pytest.raises(Exception, match="allowed are system, user, assistant"):
        tokenizer.apply_chat_template([{"role": "<|im_end|>", "content": "x"}])


def test_an_overlong_conversation_loses_its_last_turns(tokenizer):
    whole = encode_conversation(tokenizer, DIALOGUE)
    part = encode_conversation(tokenizer, DIALOGUE, max_length=len(whole.input_ids) - 1)
    assert part.dropped_turns == 2
    assert part.input_ids == encode_conversation(tokenizer, DIALOGUE[:2]).input_ids
    with pytest.raises(DataError, match="does not fit into 10 tokens"):
        encode_conversation(tokenizer, DIALOGUE, max_length=10)


def test_a_reply_that_is_not_learned_has_no_labels_and_the_same_ids(tokenizer):
    whole = encode_conversation(tokenizer, DIALOGUE)
    marked = encode_conversation(tokenizer, [DIALOGUE[0], {**DIALOGUE[1], "train": False}, *DIALOGUE[2:]])
    assert marked.input_ids == whole.input_ids
    ((start, end),) = marked.untrained
    assert (
        tokenizer.decode(marked.input_ids[start:end]) == f"<|im_start|>assistant\n{DIALOGUE[1]['content']}<|im_end|>\n"
    )
    assert marked.labels[:end] == [-100] * end and marked.labels[end:] == whole.labels[end:] != [-100] * end
    assert whole.untrained == ()


def test_turns_that_teach_nothing_do_not_fill_the_context(tokenizer):
    marked = [DIALOGUE[0], {**DIALOGUE[1], "train": False}, *DIALOGUE[2:]]
    length = len(encode_conversation(tokenizer, marked).input_ids)
    assert encode_conversations(tokenizer, [marked], max_length=length - 1) == [None]


def test_the_context_keeps_the_system_message_and_newest_turns(tokenizer):
    messages = []
    for number in range(30):
        messages += [
            {"role": "user", "content": f"question {number}"},
            {"role": "assistant", "content": f"answer {number}"},
        ]
    messages.append({"role": "user", "content": "the last question"})
    prompt = encode_prompt(tokenizer, messages, n_positions=200, max_new_tokens=50)
    text = tokenizer.decode(prompt.input_ids)
    assert len(prompt.input_ids) <= 150
    assert prompt.dropped_turns % 2 == 0 and prompt.dropped_turns > 0
    first_kept = prompt.dropped_turns // 2
    expected = [{"role": "system", "content": system_message(tokenizer)}, *messages[prompt.dropped_turns :]]
    assert prompt.input_ids == template_ids(tokenizer, expected, add_generation_prompt=True)
    assert f"question {first_kept}<" in text and f"question {first_kept - 1}<" not in text
    assert f"{prompt.dropped_turns} oldest messages" in prompt.notice()


def test_an_overlong_message_loses_its_beginning(tokenizer):
    text = " ".join(f"w{number}" for number in range(500))
    prompt = encode_prompt(tokenizer, [{"role": "user", "content": text}], n_positions=200, max_new_tokens=50)
    assert len(prompt.input_ids) == 150
    assert prompt.dropped_tokens > 0 and f"first {prompt.dropped_tokens} tokens" in prompt.notice()
    assert tokenizer.decode(prompt.input_ids).endswith("w499<|im_end|>\n<|im_start|>assistant\n")


def test_a_context_too_small_for_the_system_message_is_a_mismatch(tokenizer):
    with pytest.raises(MismatchError, match="too small"):
        encode_prompt(tokenizer, [{"role": "user", "content": "x " * 50}], n_positions=60, max_new_tokens=50)


def test_a_tokenizer_without_a_template_is_refused_by_name(tokenizer):
    bare = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(MismatchError, match="no ChatML template"):
        encode_conversation(bare, DIALOGUE)


def test_a_persona_with_quotes_and_control_strings_stays_text(tokenizer, tmp_path):
    from rorchat.persona import Persona
    from rorchat.tokenizer import train_tokenizer

    hostile = 'It\'s "me" \\ <|im_end|>\n{{ 1 + 1 }}'
    persona = Persona("X", "Y", hostile, {}, {}, {})
    other = train_tokenizer(["some text"] * 3, 320, persona)
    ids = template_ids(other, [{"role": "user", "content": "x"}])
    assert ids.count(other.convert_tokens_to_ids("<|im_end|>")) == 2
    assert "{{ 1 + 1 }}" in other.decode(ids)
    assert json.dumps(other.chat_template)  # a template is plain text


def test_preferences_are_encoded_like_their_conversations(gpt2_tokenizer, shared_data):
    """Prompt and reply are the conversation's ids up to the newline after the reply; only the reply has labels."""
    source = f"ultrafeedback={shared_data / 'preference'}"
    rows = [row for row, _ in zip(load_rows(source, "preference"), range(300), strict=False)]
    (newline,) = encode_text(gpt2_tokenizer, ["\n"])
    for row, encoded in zip(rows, encode_preferences(gpt2_tokenizer, rows), strict=True):
        for side, reply_ids in (("chosen", encoded.chosen_ids), ("rejected", encoded.rejected_ids)):
            whole = encode_conversation(gpt2_tokenizer, [*row["prompt"], *row[side]])
            assert whole.input_ids == encoded.prompt_ids + reply_ids + newline
            assert whole.labels[len(encoded.prompt_ids) :] == reply_ids + [IGNORE_INDEX] * len(newline)
            assert whole.labels[len(encoded.prompt_ids) - 1] == IGNORE_INDEX


def preference(prompt: list[str], chosen: str, rejected: str) -> dict:
    """A preference whose prompt alternates between user and assistant."""
    roles = ("user", "assistant")
    messages = [{"role": roles[index % 2], "content": text} for index, text in enumerate(prompt)]
    replies = {
        side: [{"role": "assistant", "content": text}] for side, text in (("chosen", chosen), ("rejected", rejected))
    }
    return {"prompt": messages, **replies}


LONG_REPLY = "This one, I think, because it is the better one of the two, as everybody knows."


def test_pair_that_fits_is_complete(tokenizer):
    for chosen, rejected in (("This.", LONG_REPLY), (LONG_REPLY, "This.")):
        row = preference(["Which?"], chosen, rejected)
        (whole,) = encode_preferences(tokenizer, [row])
        longest = len(whole.prompt_ids) + max(len(whole.chosen_ids), len(whole.rejected_ids))
        assert encode_preferences(tokenizer, [row], longest) == [whole]
        (cut,) = encode_preferences(tokenizer, [row], longest - 1)
        assert (cut.cut_replies, cut.dropped_turns) == (1, 0)


def test_replies_are_cut_to_the_same_length_and_a_cut_reply_has_no_end(tokenizer):
    other = "That one, I think, because it is the older one of the two, as nobody knows."
    row = preference(["Which?"], LONG_REPLY, other)
    (whole,) = encode_preferences(tokenizer, [row])
    (cut,) = encode_preferences(tokenizer, [row], len(whole.prompt_ids) + 20)
    assert cut.prompt_ids == whole.prompt_ids and cut.cut_replies == 2
    assert (cut.chosen_ids, cut.rejected_ids) == (whole.chosen_ids[:20], whole.rejected_ids[:20])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert whole.chosen_ids[-1] == whole.rejected_ids[-1] == end and end not in cut.chosen_ids + cut.rejected_ids
    (short,) = encode_preferences(tokenizer, [preference(["Which?"], LONG_REPLY, "This.")], len(whole.prompt_ids) + 20)
    assert short.rejected_ids[-1] == end and short.cut_replies == 1


def test_early_exchanges_of_a_prompt_are_dropped_before_a_reply_is_cut(tokenizer):
    system = {"role": "system", "content": "Be brief."}
    row = preference(["What is a cat?", "An animal.", "And a dog?", "Too.", "Which?"], LONG_REPLY, "This.")
    row["prompt"].insert(0, system)
    whole, last_two, last = (
        encode_preferences(tokenizer, [{**row, "prompt": [system, *row["prompt"][start:]]}])[0] for start in (1, 3, 5)
    )
    longest = len(last_two.prompt_ids) + len(last_two.chosen_ids)
    for max_length, expected, dropped, cut in (
        (len(whole.prompt_ids) + len(whole.chosen_ids), whole, 0, 0),
        (longest, last_two, 2, 0),
        (longest - 1, last, 4, 0),
        (len(last.prompt_ids) + 30, last, 4, 1),
    ):
        (pair,) = encode_preferences(tokenizer, [row], max_length)
        assert (pair.prompt_ids, pair.dropped_turns, pair.cut_replies) == (expected.prompt_ids, dropped, cut)


def test_pair_is_rejected_if_its_last_message_leaves_no_room_for_a_reply(tokenizer):
    row = preference(["Which?"], LONG_REPLY, "This.")
    (whole,) = encode_preferences(tokenizer, [row])
    (kept,) = encode_preferences(tokenizer, [row], len(whole.prompt_ids) + MIN_REPLY_TOKENS)
    assert len(kept.chosen_ids) == MIN_REPLY_TOKENS
    for room in (MIN_REPLY_TOKENS - 1, 0, -5):
        (rejected,) = encode_preferences(tokenizer, [row], len(whole.prompt_ids) + room)
        assert isinstance(rejected, RejectedRow) and rejected.reason == "over-long"
        assert f"leaves {max(0, room)} of" in rejected.detail
    short = preference(["Which?"], "Yes.", "No.")  # needs less than MIN_REPLY_TOKENS
    (pair,) = encode_preferences(tokenizer, [short])
    longest = len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))
    assert encode_preferences(tokenizer, [short], longest) == [pair]


def test_pair_is_rejected_if_only_the_cut_parts_differ(tokenizer):
    row = preference(["Which?"], LONG_REPLY + " Really.", LONG_REPLY + " Truly.")
    (whole,) = encode_preferences(tokenizer, [row])
    (rejected,) = encode_preferences(tokenizer, [row], len(whole.prompt_ids) + 20)
    assert isinstance(rejected, RejectedRow) and rejected.reason == "identical chosen and rejected"


def test_real_pairs_never_exceed_the_maximum_length(gpt2_tokenizer, shared_data):
    rows = [
        row
        for row, _ in zip(
            load_rows(f"ultrafeedback={shared_data / 'preference'}", "preference"), range(200), strict=False
        )
    ]
    whole = encode_preferences(gpt2_tokenizer, rows)
    assert sum(len(pair.prompt_ids) + len(pair.chosen_ids) > 256 for pair in whole) > 100
    pairs = [pair for pair in encode_preferences(gpt2_tokenizer, rows, 256) if not isinstance(pair, RejectedRow)]
    assert len(pairs) > 150
    for pair in pairs:
        assert len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids)) <= 256
        assert pair.chosen_ids != pair.rejected_ids
