"""The row format of a path is guessed from its rows; an unknown format is an error of one line."""

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from support import as_jsonl, chat_row, write

from rorchat.errors import DataError, UsageError
from rorchat.inspection.guess import guess_files, guess_row_format, resolve_spec
from rorchat.sources.registry import find_source, list_sources, load_rows

HUMAN, GPT = {"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi!"}
ALPACA = [{"instruction": f"Name colour {n}.", "input": "", "output": "Red."} for n in range(5)]
PAIRS = [{"prompt": f"What is red, {n}?", "chosen": "A colour.", "rejected": "No."} for n in range(5)]
FORMATTED = {
    "rows.jsonl": ("messages", as_jsonl([chat_row(f"Hello {n}") for n in range(5)])),
    "rows.json": ("messages", json.dumps([chat_row(f"Hello {n}") for n in range(5)], indent=2)),
    "sharegpt.json": ("messages", json.dumps([{"conversations": [HUMAN, GPT]}] * 5)),
    "bare.jsonl": ("messages", as_jsonl([chat_row()["messages"]] * 3)),
    "packed.jsonl.gz": ("messages", gzip.compress(as_jsonl([chat_row()] * 3))),
    "dialogues.ndjson": ("messages", as_jsonl([chat_row()] * 3)),
    "kto.jsonl": ("messages", as_jsonl([chat_row("a", f"{n}", label=n > 1) for n in range(5)])),
    "pairs.jsonl": ("preference", as_jsonl(PAIRS)),
    "lists.json": (
        "preference",
        json.dumps(
            [{"prompt": "Hello", "chosen": chat_row()["messages"], "rejected": chat_row(reply="No.")["messages"]}]
        ),
    ),
    "instructions.json": ("alpaca", json.dumps(ALPACA)),
    "instructions.csv": ("alpaca", "instruction,input,output\nName a colour.,,Red.\nName a pet.,,A dog.\n"),
    "instructions.tsv": ("alpaca", "instruction\tinput\toutput\nName a colour.\t\tRed.\nName a pet.\t\tA dog.\n"),
    "ranked.jsonl": ("preference", as_jsonl([{**ALPACA[0], "chosen": "Red.", "rejected": "No."}])),
    "completions.jsonl": ("prompt_completion", as_jsonl([{"prompt": "What is red?", "completion": "A colour."}])),
    "responses.jsonl": ("prompt_completion", as_jsonl([{"prompt": "What is red?", "response": "A colour."}])),
    "texts.jsonl": ("text", as_jsonl([{"text": f"It was {n}."} for n in range(5)])),
    "texts.csv": ("text", "text\nIt was.\nIt was not.\n"),
    "letter.txt": ("text", "Dear reader,\n\nit was.\n"),
    "notes.md": ("text", "# Notes\n\nIt was.\n"),
    "stories.txt": ("text", "It was.\n<|endoftext|>\nIt was not.\n<|endoftext|>\n"),
    "TinyStories-train.txt": ("tinystories", "It was.\n<|endoftext|>\nIt was not.\n<|endoftext|>\n"),
    "tiny-stories/a.txt": ("tinystories", "It was.\n<|endoftext|>\nIt was not.\n<|endoftext|>\n"),
    "FineWebEdu2/rows.jsonl": ("fineweb_edu", as_jsonl(find_source("fineweb_edu").raw)),
    "compiled/rows.jsonl": ("text", as_jsonl([{"text": "It was."}])),  # contains "pile", but not at the start of a word
    "smol-smoltalk/rows.jsonl": ("smol_smoltalk", as_jsonl([chat_row()])),
    "trees.jsonl": ("oasst", as_jsonl(find_source("oasst").raw[:1])),
    "chats.jsonl": ("moss", as_jsonl(find_source("moss").raw)),
    "mbpp.jsonl": ("mbpp", as_jsonl(find_source("mbpp").raw)),
    "files.jsonl": ("the_stack", as_jsonl(find_source("the_stack").raw)),
    "dialogs.jsonl": ("dailydialog", as_jsonl(find_source("dailydialog").raw[1:])),
    "half_bad.jsonl": ("messages", as_jsonl([chat_row()] * 3 + [b"{", b"5", b"\xff", {"text": "a"}])),
    "all_faulty.jsonl": ("messages", as_jsonl([chat_row("Hello", "")] * 3)),  # the right format, but unusable
}


@pytest.mark.parametrize("name", FORMATTED)
def test_the_row_format_is_guessed_from_the_rows(name, tmp_path, monkeypatch):
    shape, content = FORMATTED[name]
    write(tmp_path, name, content)
    monkeypatch.chdir(tmp_path)  # tmp_path contains the name of this test
    assert guess_row_format(Path(name)) == shape
    assert resolve_spec(name) == (f"{shape}={name}", True)
    assert resolve_spec(name, "text") == (f"text={name}", False)


def test_the_format_of_parquet_files_and_folders_is_guessed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([chat_row()] * 3), "rows.parquet")
    assert guess_row_format(Path("rows.parquet")) == "messages"
    for number in range(3):
        write(tmp_path, f"folder/{number}.jsonl", PAIRS)
    assert guess_row_format(Path("folder")) == "preference"


@pytest.mark.parametrize("name", [name for name in list_sources() if find_source(name).convert])
def test_a_dataset_named_in_the_path_is_preferred(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [raw for raw in find_source(name).raw if isinstance(raw, dict)][:1]
    guessed = guess_row_format(write(Path(), f"{name}/rows.jsonl", rows * 3))
    assert guessed == name or find_source(guessed).kinds[0] == find_source(name).kinds[0]


LINES = "he said it was fine .\n" * 39 + "he said it was \x1b[31m red .\n"  # as one document, it is rejected


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("my_folder/a.txt", "text"),  # although BookCorpus reads 39 of its 40 lines
        ("my_folder/train.txt", "text"),
        ("bookcorpus/a.txt", "bookcorpus"),
        ("my_folder/dialogues_text.txt", "dailydialog"),
    ],
)
def test_a_dataset_is_guessed_only_if_the_files_carry_a_mark_of_it(name, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write(Path(), name, LINES.replace("said", "said __eou__") if source == "dailydialog" else LINES)
    assert guess_row_format(path) == guess_row_format(path.parent) == source


def test_files_in_other_encodings_do_not_change_the_guess(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, encoding in enumerate(["latin-1", "cp1251", "utf-16", "utf-8"]):
        text = "Привет, мир!\n" if encoding == "cp1251" else "Die Gäste aus Österreich.\n"
        write(Path(), f"mine/{number}.txt", (text * 50).encode(encoding))
    write(Path(), "mine/cover.png", b"\x89PNG")
    assert guess_row_format(Path("mine")) == "text"


REAL = {
    "alpaca/alpaca_5000.json": "alpaca",
    "alpaca/seed_tasks.jsonl": "alpaca",
    "code_alpaca/code_alpaca_2k.json": "code_alpaca",
    "books": "books",
    "c4/en/c4-train.00000-of-01024.json.gz": "c4",
    "chat/axolotl_sharegpt_conversation.json": "messages",
    "chat/deita_subset_test_sft.parquet": "messages",
    "chat/dolly_hhrlhf_train_small.jsonl": "prompt_completion",
    "chat/moss003_original_example.json": "moss",
    "chat/openai_sft.jsonl": "messages",
    "chat/tulu3_oasst1_sft_sample.jsonl": "oasst",
    "cornell_movie_dialogs": "cornell_movie_dialogs",
    "dailydialog/dialogues_text.txt": "dailydialog",
    "dailydialog/train.zip": "dailydialog",
    "fineweb_edu/sample.parquet": "fineweb_edu",
    "gsm8k/train.jsonl": "gsm8k",
    "math_dataset/hf_byte_literals.jsonl": "math_dataset",
    "mbpp/mbpp.jsonl": "mbpp",
    "natural_questions/nq-train-00.jsonl.gz": "natural_questions",
    "openbookqa": "openbookqa",
    "pile/pile_sample.jsonl.zst": "pile",
    "preference/dpo_en_demo.json": "preference",
    "preference/hh_rlhf_harmless_base_test.jsonl.gz": "hh_rlhf",
    "preference/ultrafeedback_train_1000.jsonl": "ultrafeedback",
    "python_code": "code_search_net",
    "tinyshakespeare": "tiny_shakespeare",
    "tinystories/tinystories_sample.txt": "tinystories",
    "wikitext2": "wikitext",
}


@pytest.mark.parametrize("path", REAL)
def test_the_format_of_real_files_is_guessed(path, shared_data):
    assert guess_row_format(shared_data / path) == REAL[path]


@pytest.mark.parametrize(
    "content",
    [{"unknown.jsonl": [{"a": 1}] * 5}, {"empty.jsonl": b""}, {"broken.json": b"{"}, {"a.jpg": b"\xff\xd8"}, {}],
    ids=["unknown", "empty", "broken", "jpg", "empty folder"],
)
def test_an_unknown_row_format_is_an_error_of_one_line(content, tmp_path):
    for name, rows in content.items():
        write(tmp_path, name, rows)
    path = tmp_path / next(iter(content), "")
    with pytest.raises(DataError, match="Name the format before the path") as error:
        guess_row_format(path)
    assert error.value.exit_code == 65
    assert str(error.value).count("\n") == 0 and str(path) in str(error.value)


def test_the_error_says_why_files_are_not_read_as_text(tmp_path):
    write(tmp_path, "a.txt", ("Привет, мир! " * 20).encode("cp1251"))
    with pytest.raises(DataError, match=r"\(not read: a.txt \(.*invalid UTF-8: convert it to UTF-8\)\). Name"):
        guess_row_format(tmp_path)
    write(tmp_path, "b.png", b"\x89PNG")
    with pytest.raises(DataError, match="known format .*b.png cannot be read: unknown suffix .png, not text: a PNG"):
        guess_row_format(tmp_path / "b.png")


def test_missing_paths_and_unknown_formats_have_different_errors(tmp_path):
    path = write(tmp_path, "rows.jsonl", [chat_row()])
    with pytest.raises(DataError, match="No file or folder .*nothing.jsonl"):
        resolve_spec(str(tmp_path / "nothing.jsonl"))
    with pytest.raises(UsageError, match="No source named 'mesages'. Did you mean 'messages'"):
        resolve_spec(str(path), "mesages")
    with pytest.raises(UsageError, match="already names its source"):
        resolve_spec(f"text={path}", "messages")
    assert resolve_spec(f"text={path}") == (f"text={path}", False)
    assert resolve_spec("tinytown=5") == ("tinytown=5", False)


QA = ("my question", "reply")


def test_two_unknown_text_columns_are_named_in_the_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "faq.csv", "my question,reply\nWhat is red?,A colour.\n")
    first, second = (f"'messages=faq.csv:user={a}:assistant={b}'" for a, b in (QA, QA[::-1]))
    expected = f"Name the columns of the question and the answer: {first}; or, the other way round, {second}."
    with pytest.raises(DataError, match=expected) as failure:
        guess_row_format(Path("faq.csv"))
    assert "\n" not in str(failure.value)
    with pytest.raises(DataError, match=expected):
        list(load_rows("messages=faq.csv", "conversation"))
    with pytest.raises(UsageError, match="names columns without a source: write 'messages=faq.csv:user="):
        resolve_spec("faq.csv:user=my question:assistant=reply")


def test_a_file_named_as_the_prefix_of_a_source_does_not_hide_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "chat", "Hello")
    assert resolve_spec("chat:tinytown=5") == ("chat:tinytown=5", False)


# -- messages are no documents, and the likeliest source is quoted --------------------------------------------------

MESSAGES = [
    {"text": "What is red?", "role": "prompter", "message_id": "a"},
    {"text": "A colour.", "parent_id": "a", "message_id": "b"},
    {"text": "What is red?", "replies": [{"text": "A colour."}]},
    {"content": "Hello", "role": "user"},
    {"text": "Hello", "speaker": "Assistant"},
    {"text": "Hello", "reply_to": None, "user": "Ann"},
    {"Text": "Hello", "Parent_ID": 7},
]


@pytest.mark.parametrize("row", MESSAGES, ids=[" ".join(row) for row in MESSAGES])
def test_messages_of_a_tree_are_not_taken_for_documents(row, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write(Path(), "rows.jsonl", [row] * 5)
    try:
        assert guess_row_format(path) != "text"
    except DataError as error:
        assert "known format" in str(error)
    assert resolve_spec("rows.jsonl", "text") == ("text=rows.jsonl", False)


DOCUMENTS = [
    {"text": "It was.", "author": "Ann"},
    {"text": "It was.", "role": "Engineer"},
    {"text": "It was.", "replies": 12},
    {"text": "It was.", "speaker": "Hamlet"},
]


@pytest.mark.parametrize("row", DOCUMENTS, ids=[" ".join(row) for row in DOCUMENTS])
def test_other_columns_beside_a_text_do_not_matter(row, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert guess_row_format(write(Path(), "rows.jsonl", [row] * 5)) == "text"


def test_the_messages_of_openassistant_are_a_source_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    messages = find_source("oasst").raw[1]
    assert guess_row_format(write(Path(), "rows.jsonl", messages * 5)) == "oasst"


UNREADABLE = [
    ({"messages": "Hello", "id": 5}, "messages (wrong type: messages are of type str, expected a list)"),
    ({"prompt": 5, "completion": "A colour."}, "prompt_completion (wrong type: 'prompt' is of type int"),
    ({"prompt": "What?", "chosen": 5, "rejected": "No."}, "preference (wrong type: 'chosen' is of type int"),
    ({"instruction": "Say it.", "input": "", "output": ["A"]}, "alpaca (wrong type: 'output' is of type list"),
    ({"text": 5, "meta": {}}, "text (wrong type: 'text' is of type int, expected a string)"),
]


@pytest.mark.parametrize(("row", "quoted"), UNREADABLE, ids=[quoted.split()[0] for _, quoted in UNREADABLE])
def test_the_likeliest_source_is_quoted(row, quoted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as failure:
        guess_row_format(write(Path(), "rows.jsonl", [row] * 5))
    assert f"No row of rows.jsonl has a known format; the likeliest is {quoted}" in str(failure.value)


def test_a_dataset_that_reads_little_of_a_folder_is_not_guessed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Path(), "mine/mbpp.jsonl", find_source("mbpp").raw)
    write(Path(), "mine/chats.jsonl", [chat_row(f"Hello {n}") for n in range(200)])
    assert guess_row_format(Path("mine")) == "messages"


# -- folders of several formats -------------------------------------------------------------------------------------

MIXED = {
    "alpaca.json": json.dumps(ALPACA),
    "chats/a.jsonl": as_jsonl([chat_row(f"Hello {n}") for n in range(5)]),
    "chats/b.jsonl": as_jsonl([chat_row(f"Good morning {n}") for n in range(5)]),
    "letter.txt": "Dear reader,\n\nit was.\n",
    "pairs.jsonl": as_jsonl(PAIRS),
    "dialogues_text.txt": "Hello . __eou__ Hi ! __eou__\n" * 3,
    "numbers.jsonl": as_jsonl([{"a": 1}] * 4),
}


def write_mixed(folder: Path, *names: str) -> Path:
    for name in names or MIXED:
        write(folder, name, MIXED[name])
    return folder


def test_each_file_of_a_mixed_folder_is_guessed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "mine/cover.png", b"\x89PNG")
    guesses = guess_files(write_mixed(Path("mine")))
    assert {str(file.relative_to("mine")): name for file, name in guesses.items()} == {
        "alpaca.json": "alpaca", "chats/a.jsonl": "messages", "chats/b.jsonl": "messages", "letter.txt": "text",
        "pairs.jsonl": "preference", "dialogues_text.txt": "dailydialog", "numbers.jsonl": "",
    }  # fmt: skip


@pytest.mark.parametrize(
    "names",
    [("chats/a.jsonl", "chats/b.jsonl"), ("letter.txt",), ("chats/a.jsonl", "numbers.jsonl")],
)
def test_a_folder_of_one_format_is_one_source(names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_mixed(Path("mine"), *names)
    assert guess_files(folder) == {folder: guess_row_format(folder)}


@pytest.mark.parametrize("path", ["cornell_movie_dialogs", "books", "openbookqa", "dailydialog", "wikitext2"])
def test_a_folder_that_is_mostly_one_dataset_is_one_source(path, shared_data):
    folder = shared_data / path
    assert guess_files(folder) == {folder: guess_row_format(folder)}


def test_the_error_about_a_folder_is_that_of_its_guess(tmp_path):
    with pytest.raises(DataError, match="Name the format before the path"):
        guess_files(write_mixed(tmp_path, "numbers.jsonl"))


def test_a_folder_of_many_datasets_is_not_one_of_them(shared_data, tmp_path):
    for path in ("books", "tinyshakespeare", "chat", "python_code"):
        (tmp_path / path).symlink_to(shared_data / path)
    (tmp_path / "notes.txt").write_text("It was.")
    names = set(guess_files(tmp_path).values())
    assert {"books", "tiny_shakespeare", "messages", "code_search_net", "text"} < names
