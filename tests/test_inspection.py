"""Every row is kept or counted with reason and place, and `show_row` shows the tokens that training sees."""

import gzip
import io
import json
from collections import Counter

import pytest
from support import as_jsonl, chat_row, write

from rorchat.chatml import END_OF_TEXT, IGNORE_INDEX, IM_END, encode_conversation, encode_text
from rorchat.errors import DataError
from rorchat.inspection import CheckResult, check_source, show_row
from rorchat.reading.filters import Filters
from rorchat.rows import ROLE_NAMES

EVALUATION = "which of these seven animals would a careful farmer never keep in the kitchen of his house"
LONG = "once upon a time there was a small model that wanted to talk " * 20
KNOWN = ", ".join(ROLE_NAMES)


def turns(*messages: tuple[str, str]) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


def checked(given: object, **options: object) -> tuple[CheckResult, list[dict]]:
    """The result of `check` and the rejected rows that it wrote, which must agree."""
    rejects = io.StringIO()
    result = check_source(str(given), rejects=rejects, **options)
    rejected = [json.loads(line) for line in rejects.getvalue().splitlines()]
    row_stats = result.stats
    assert row_stats.rows_in == row_stats.kept + sum(row_stats.rejects.values())
    assert Counter(row["reason"] for row in rejected) == row_stats.rejects
    for reason, places in row_stats.places.items():
        of_reason = [row for row in rejected if row["reason"] == reason]
        assert places == [r["place"] + (f" ({r['detail']})" if r["detail"] else "") for r in of_reason[:3]]
    return result, rejected


# -- what is wrong with rows -----------------------------------------------------------------------------------------

# (row, reason, detail); reason None: kept
CONVERSATIONS = [
    (chat_row("A", "b'Hi' + b'b'"), None, ""),
    (chat_row("B", "b' is how a byte literal begins, it's said"), None, ""),
    (chat_row("C", "b'unfinished"), None, ""),
    (chat_row("D", "tab\tand\r\nline"), None, ""),
    (chat_row("E", "b'Hi\\n'"), "byte literal", "message 1 (assistant) is " + repr("b'Hi\\n'")),
    (chat_row(' b"Hi"', "b"), "byte literal", "message 0 (user) is " + repr('b"Hi"')),
    (as_jsonl([chat_row("F", "@@")])[:-1].replace(b"@@", b"\xff\xfe"), "invalid UTF-8", "byte 82"),
    (chat_row("G", "half \ud83d"), "invalid Unicode", "message 1 has a lone surrogate"),
    (chat_row("a\0b", "H"), "control character", "message 0 (user) has U+0000 at character 1"),
    (chat_row("I", "red \x1b[31m"), "control character", "message 1 (assistant) has U+001B at character 4"),
    (chat_row("J", "\x85 \x86"), "control character", "message 1 (assistant) has U+0086 at character 2"),
    (chat_row("K", None), "empty text", "message 1: 'content' is null"),
    (chat_row("L", " \n"), "empty reply", "message 1"),
    (chat_row("", "M"), "empty question", "message 0"),
    (turns(("robot", "N"), ("assistant", "a")), "unknown role", f"message 0 has the role 'robot'; allowed are {KNOWN}"),
    (
        turns(("user", "O"), ("user", "O"), ("assistant", "a")),
        "wrong order",
        "message 1 is from 'user', expected 'assistant'",
    ),
    (turns(("assistant", "P")), "wrong order", "message 0 is from 'assistant', expected 'user'"),
    (
        turns(("user", "a"), ("system", "b"), ("assistant", "Q")),
        "wrong order",
        "message 1 is from 'system', expected 'assistant'",
    ),
    (turns(("user", "R")), "no assistant turn", ""),
    (turns(), "no assistant turn", ""),
    (chat_row("A", "b'Hi' + b'b'"), "duplicate", ""),  # the first
    (chat_row("S", LONG), "over-long", "no exchange fits into 96 tokens"),
    (b'{"messages": [', "not JSON", "Expecting value at line 1, column 15"),
    (b"[" * 100_000, "not JSON", "maximum recursion depth exceeded while decoding a JSON array from a unicode string"),
    (5, "wrong type", "messages are of type int, expected a list"),
    (chat_row(7, "T"), "wrong type", "message 0: 'content' is of type int, expected a string"),
    ({"messages": {"role": "user"}}, "wrong type", "messages are of type dict, expected a list"),
    ({"message": []}, "missing field", "no list of turns, and no question with an answer, among the keys message"),
    ({"messages": [{"role": "user"}]}, "missing field", "message 0: no key 'value' among role"),
    (b'{"messages": [], "messages": []}', "duplicate keys", "'messages'"),
    (b'{"messages": [{"role": "user", "content": "a", "content": "b"}]}', "duplicate keys", "'content'"),
    (chat_row("U", f"So, {EVALUATION}!"), "contaminated", None),
    (chat_row("V", "too long by its characters " * 500), "over-long", "13,502 characters, more than 9,000"),
    (chat_row("W", "hold on. " * 3 + "\n" + "hold on.\n" * 30), "repetition", None),
    (chat_row("Z", "the last line is kept"), None, ""),
]


def test_every_fault_of_a_conversation_is_counted_at_its_line(tokenizer, tmp_path):
    path = write(tmp_path, "rows.jsonl", [row for row, _, _ in CONVERSATIONS])
    evaluation = write(tmp_path, "evaluation.jsonl", [{"question": "none"}, {"question": EVALUATION}])
    result, rejected = checked(
        path,
        row_format="messages",
        filters=Filters(max_characters=9000, max_repetition=0.5),
        evaluation=[str(evaluation)],
        tokenizer=tokenizer,
        max_length=96,
    )
    expected = {
        f"{path}:{number}": (reason, detail)
        for number, (_, reason, detail) in enumerate(CONVERSATIONS, start=1)
        if reason
    }
    assert len(expected) == 30
    assert {row["place"]: row["reason"] for row in rejected} == {p: reason for p, (reason, _) in expected.items()}
    for row in rejected:
        if expected[row["place"]][1] is not None:
            assert (row["place"], row["detail"]) == (row["place"], expected[row["place"]][1])
    assert (result.stats.rows_in, result.stats.kept) == (35, 5)
    assert result.stats.places["unknown role"] == [f"{path}:15 (message 0 has the role 'robot'; allowed are {KNOWN})"]
    (contaminated,) = [row for row in rejected if row["reason"] == "contaminated"]
    assert (
        contaminated["detail"]
        == f"13 words of {evaluation.parent.name}/{evaluation.name}, row 1: {' '.join(EVALUATION.split()[:13])}"
    )


def test_the_rejects_file_contains_rows_as_read(tmp_path):
    rows = [chat_row("Hello", ""), chat_row("\ud800", "b"), b"{", [5], chat_row(), chat_row()]
    path = write(tmp_path, "rows.jsonl", rows)
    _, rejected = checked(path, row_format="messages")
    assert [row["row"] for row in rejected] == [rows[0], rows[1], None, [5], chat_row()]
    assert [row["place"] for row in rejected] == [f"{path}:{line}" for line in (1, 2, 3, 4, 6)]
    assert set(rejected[0]) == {"place", "reason", "detail", "row"}


def test_the_first_three_places_of_a_reason_are_kept(tmp_path):
    path = write(tmp_path, "rows.jsonl", [chat_row(), *[chat_row(f"{n}", "") for n in range(50)]])
    result, _ = checked(path)
    assert (result.guessed, result.spec) == (True, f"messages={path}")
    assert result.stats.rejects == {"empty reply": 50}
    assert result.stats.places == {"empty reply": [f"{path}:{line} (message 1)" for line in (2, 3, 4)]}


DOCUMENTS = [
    ({"text": "b'a' + b'b' is an expression"}, None, ""),
    ({"text": "b'It was the best of times.' So it begins."}, None, ""),
    ({"text": "b'It was.'"}, "byte literal", "the text is " + repr("b'It was.'")),
    ({"text": ""}, "empty text", ""),
    ({"text": " \n"}, "empty text", ""),
    ({"text": None}, "empty text", "'text' is null"),
    ({"texts": "a"}, "missing field", "no key 'text' among texts"),
    ({"text": ["a"]}, "wrong type", "'text' is of type list, expected a string"),
    ("It was.", "wrong type", "a row is a str, expected an object with 'text'"),
    ({"text": "nul \0"}, "control character", "the text has U+0000 at character 4"),
    ({"text": "half \udfff"}, "invalid Unicode", "the text has a lone surrogate"),
    ({"text": "12345 67890"}, "few letters", "9% letters and white space, less than 50%"),
    ({"text": "Привет, мир"}, "other script", "0% of the letters are Latin, less than 50%"),
    ({"text": "a"}, "too short", "1 characters, fewer than 2"),
    ({"text": "a b" * 100}, "over-long", "300 characters, more than 200"),
    ({"text": "It was."}, None, ""),
    ({"text": "\nIt was. "}, "duplicate", ""),
    ({"text": "it  WAS."}, None, ""),
    (b'{"text": "a", "text": "b"}', "duplicate keys", "'text'"),
]


@pytest.mark.parametrize("form", ["jsonl", "json"])
def test_every_fault_of_a_document_is_counted_at_its_line_or_row(form, tmp_path):
    rows = [row for row, _, _ in DOCUMENTS]
    if form == "json":  # each element begins a line, so that the one after a damaged element can be found
        content = b"[\n  " + b",\n  ".join(as_jsonl([row])[:-1] for row in rows) + b"\n]\n"
        path = write(tmp_path, "rows.json", content)
    else:
        path = write(tmp_path, "rows.jsonl", rows)
    limits = Filters(min_characters=2, max_characters=200, min_letters=0.5, min_latin=0.5)
    result, rejected = checked(path, row_format="text", filters=limits)
    places = [f"{path}:{n + 1}" if form == "jsonl" else f"{path}, row {n}" for n in range(len(rows))]
    assert [(row["place"], row["reason"], row["detail"]) for row in rejected] == [
        (place, reason, detail) for place, (_, reason, detail) in zip(places, DOCUMENTS, strict=True) if reason
    ]
    assert (result.stats.rows_in, result.stats.kept, len(rejected)) == (19, 4, 15)


PREFERENCES = [
    ({"prompt": "a", "chosen": "Yes.", "rejected": "No."}, None, ""),
    ({"prompt": "b", "chosen": "Yes.", "rejected": " Yes. "}, "identical chosen and rejected", ""),
    ({"prompt": "c", "chosen": "", "rejected": "No."}, "empty reply", "chosen: message 1"),
    ({"prompt": "d", "chosen": "Yes.", "rejected": ""}, "empty reply", "rejected: message 1"),
    ({"prompt": "e", "chosen": "Yes."}, "missing field", "no 'rejected'"),
    ({"prompt": "f", "chosen": "b'Yes.'", "rejected": "No."}, "byte literal", None),
    ({"prompt": "g\x01", "chosen": "Yes.", "rejected": "No."}, "control character", None),
    ({"prompt": "h", "chosen": None, "rejected": "No."}, "empty text", "'chosen' is null"),
    ({"prompt": LONG, "chosen": "i, and so on", "rejected": "No, no, no."}, "over-long", None),
    ({"prompt": "j", "chosen": f"{LONG} Yes.", "rejected": LONG}, "identical chosen and rejected", None),
    ({"prompt": "k", "chosen": LONG, "rejected": "No."}, None, ""),
    ({"prompt": "a", "chosen": "Yes.", "rejected": "No."}, "duplicate", ""),
    (
        {"prompt": [], "chosen": chat_row("k")["messages"], "rejected": chat_row("l")["messages"]},
        "wrong order",
        "expected a prompt that ends with the user, one chosen and one rejected reply",
    ),
]


def test_every_fault_of_a_preference_is_counted_with_its_side(tokenizer, tmp_path):
    path = write(tmp_path, "rows.jsonl", [row for row, _, _ in PREFERENCES])
    result, rejected = checked(path, tokenizer=tokenizer, max_length=96)
    assert result.spec == f"preference={path}"
    assert {row["place"]: row["reason"] for row in rejected} == {
        f"{path}:{number}": reason for number, (_, reason, _) in enumerate(PREFERENCES, start=1) if reason
    }
    details = {row["place"]: row["detail"] for row in rejected}
    for number, (_, reason, detail) in enumerate(PREFERENCES, start=1):
        if reason and detail is not None:
            assert (number, details[f"{path}:{number}"]) == (number, detail)
    assert (result.stats.rows_in, result.stats.kept, result.stats.cut) == (13, 2, 1)


def test_byte_literals_are_repaired_only_in_datasets_known_for_them(tmp_path):
    rows = [{"question": "b'Solve 2*x = 4 for x.\\n'", "answer": "b'2\\n'"}, {"question": "What is 1?", "answer": "1"}]
    result, rejected = checked(write(tmp_path, "rows.jsonl", rows), row_format="math_dataset")
    assert (result.stats.kept, result.stats.repairs, rejected) == (2, {"byte literal": 1}, [])
    alpaca = [{"instruction": row["question"], "output": row["answer"]} for row in rows]
    result, rejected = checked(write(tmp_path, "alpaca.jsonl", alpaca), row_format="alpaca")
    assert (result.stats.kept, result.stats.rejects, result.stats.repairs) == (1, {"byte literal": 1}, {})


def test_a_conversation_is_rejected_only_if_no_exchange_fits(tokenizer, tmp_path):
    longer = turns(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", LONG))
    path = write(tmp_path, "rows.jsonl", [chat_row(), longer])
    whole = len(encode_conversation(tokenizer, chat_row()["messages"]).input_ids)
    options = {"row_format": "messages", "tokenizer": tokenizer}
    stats = [checked(path, **options, max_length=length)[0].stats for length in (whole - 1, whole, 10_000)]
    assert [(row_stats.kept, row_stats.cut, row_stats.rejects) for row_stats in stats] == [
        (1, 1, {"over-long": 1}),
        (2, 1, {}),
        (2, 0, {}),
    ]


def test_batched_lengths_equal_separate_lengths(tokenizer, tmp_path):
    """More than ROWS_AT_ONCE, so that they are encoded in several batches, the last one not full."""
    rows = [chat_row(f"Question {n}", "word " * (n % 60)) for n in range(1, 1207)]
    rows = [row for row in rows if row["messages"][1]["content"]]
    result, rejected = checked(
        write(tmp_path, "r.jsonl", rows), row_format="messages", tokenizer=tokenizer, max_length=120
    )
    too_long = [
        number
        for number, row in enumerate(rows, start=1)
        if len(encode_conversation(tokenizer, row["messages"]).input_ids) > 120
    ]
    assert 100 < len(too_long) < len(rows) - 100
    assert [int(row["place"].rpartition(":")[2]) for row in rejected] == too_long
    assert result.stats.kept == len(rows) - len(too_long)


def test_one_bad_file_of_a_folder_is_one_reject(tmp_path):
    write(tmp_path, "a.jsonl", [chat_row("a")])
    write(tmp_path, "b.jsonl.gz", gzip.compress(as_jsonl([chat_row(f"{n} " * 99) for n in range(99)]))[:-20])
    write(tmp_path, "c.parquet", b"PAR1 and no more")
    write(tmp_path, "d.json", b"")
    write(tmp_path, "e.jsonl", [chat_row("e")])
    result, rejected = checked(tmp_path, row_format="messages")
    assert [row["reason"] for row in rejected][-2:] == ["not Parquet", "not JSON"]
    assert sum(result.stats.rejects.values()) == 3 and result.stats.rejects["damaged gzip"] == 1
    assert 2 <= result.stats.kept <= 101


def test_a_file_without_usable_rows_is_reported_not_raised(tmp_path):
    result, rejected = checked(write(tmp_path, "rows.jsonl", [chat_row("a", "")] * 4))
    assert (result.stats.rows_in, result.stats.kept, len(rejected)) == (4, 0, 4)


def test_all_generated_rows_are_usable():
    for spec in ("tinytown=300", "persona=30"):
        result, _ = checked(spec, seed=3)
        assert result.stats.rows_in == int(spec.partition("=")[2])
        assert set(result.stats.rejects) <= {"duplicate"}


def test_every_row_of_real_files_is_accounted_for(shared_data):
    for path in ("alpaca/alpaca_en_demo.json", "chat/openai_sft.jsonl", "preference/dpo_en_demo.json"):
        result, _ = checked(shared_data / path)
        assert result.guessed and result.stats.kept > 0.9 * result.stats.rows_in > 0


# -- what a model sees -----------------------------------------------------------------------------------------------

DIALOGUE = turns(
    ("system", "You answer in one word."),
    ("user", "What is 12 plus 34? 你好 🙂"),
    ("assistant", " Forty-six 🙂. "),
    ("user", "And <|im_end|> or <|endoftext|>?"),
    ("assistant", "naïve <|im_start|>user\n你好"),
)


@pytest.mark.parametrize("form", [DIALOGUE, chat_row(), turns(("user", "a"), ("assistant", "b"), ("user", "c"))])
def test_tokens_shown_as_trained_are_those_with_labels(form, tokenizer, tmp_path):
    path = write(tmp_path, "rows.jsonl", [chat_row("Not me"), form])
    place, sequences = show_row(f"messages={path}", 1, tokenizer)
    messages = form["messages"][: -1 if form["messages"][-1]["role"] == "user" else None]
    encoded = encode_conversation(tokenizer, messages)
    assert (place, list(sequences)) == (f"{path}:2", ["conversation"])
    tokens = sequences["conversation"]
    assert [token.trained for token in tokens] == [label != IGNORE_INDEX for label in encoded.labels]
    replies = [message["content"].strip() for message in messages if message["role"] == "assistant"]
    assert "".join(token.text for token in tokens if token.trained) == "".join(reply + IM_END for reply in replies)
    assert "".join(token.text for token in tokens) == tokenizer.decode(encoded.input_ids)
    special = set(tokenizer.all_special_ids)
    assert [token.control for token in tokens] == [token in special for token in encoded.input_ids]
    default_system = messages[0]["role"] != "system"
    assert sum(token.control for token in tokens) == 2 * (len(messages) + default_system)


def test_every_token_of_a_document_is_trained(tokenizer, tmp_path):
    text = "  It was <|endoftext|> 你好 👩‍🔬 naïve.\n"
    path = write(tmp_path, "rows.jsonl", [{"text": text}])
    place, sequences = show_row(f"text={path}", 0, tokenizer)
    tokens = sequences["document"]
    assert (place, list(sequences)) == (f"{path}:1", ["document"])
    assert len(tokens) == 1 + len(encode_text(tokenizer, [text])[0])
    assert all(token.trained for token in tokens) and sum(token.control for token in tokens) == 1
    assert "".join(token.text for token in tokens) == END_OF_TEXT + text


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"loss_mask": 0}], ids=str)
def test_a_reply_that_is_not_learned_is_shown_without_labels(mark, tokenizer, tmp_path):
    question, reply = chat_row("Hello", "Hi!")["messages"]
    path = write(
        tmp_path, "rows.jsonl", [{"messages": [question, {**reply, **mark}, *chat_row("And?", "So.")["messages"]]}]
    )
    _, sequences = show_row(f"messages={path}", 0, tokenizer)
    tokens = sequences["conversation"]
    assert "".join(token.text for token in tokens if token.trained) == "So.<|im_end|>"
    assert "Hi!" in "".join(token.text for token in tokens)


def test_both_sides_of_a_preference_are_shown(tokenizer, tmp_path):
    row = {"prompt": "What is red?", "chosen": "A colour.", "rejected": "No."}
    path = write(tmp_path, "rows.jsonl", [row])
    _, sequences = show_row(f"preference={path}", 0, tokenizer)
    assert list(sequences) == ["chosen", "rejected"]
    for side, tokens in sequences.items():
        encoded = encode_conversation(tokenizer, chat_row(row["prompt"], row[side])["messages"])
        assert [token.trained for token in tokens] == [label != IGNORE_INDEX for label in encoded.labels]
        assert "".join(token.text for token in tokens if token.trained) == row[side] + IM_END


def test_a_character_of_several_tokens_is_shown_at_the_last(tokenizer, tmp_path):
    _, sequences = show_row(f"text={write(tmp_path, 'a.txt', '🚀é')}", 0, tokenizer)
    texts = [token.text for token in sequences["document"]]
    assert "".join(texts) == END_OF_TEXT + "🚀é" and "\ufffd" not in "".join(texts)
    assert [text for text in texts if text] == [END_OF_TEXT, "🚀", "é"]


def test_invalid_bytes_do_not_delay_the_tokens_after_them(tokenizer, tmp_path):
    text = "a \ufffd b"
    _, sequences = show_row(f"text={write(tmp_path, 'a.txt', text)}", 0, tokenizer)
    assert "".join(token.text for token in sequences["document"]) == END_OF_TEXT + text


def test_generated_rows_are_shown(tokenizer):
    place, sequences = show_row("persona=5", 4, tokenizer, seed=1)
    assert (place, list(sequences)) == ("persona, row 4", ["conversation"])
    assert 0 < sum(token.trained for token in sequences["conversation"]) < len(sequences["conversation"])


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (0, r"empty reply: .*:1 \(message 1\)\."),
        (1, r"not JSON: .*:2 \(.*\)\."),
        (2, r"invalid UTF-8: .*:3 \(byte 0\)\."),
        (4, "has no row 4"),
        (10**6, "has no row 1000000"),
    ],
)
def test_a_row_that_cannot_be_shown_is_one_line(number, message, tokenizer, tmp_path):
    path = write(tmp_path, "rows.jsonl", [chat_row("a", ""), b"{", b"\xff", chat_row()])
    with pytest.raises(DataError, match=message) as error:
        show_row(f"messages={path}", number, tokenizer)
    assert str(error.value).count("\n") == 0
    assert show_row(f"messages={path}", 3, tokenizer)[0] == f"{path}:4"
