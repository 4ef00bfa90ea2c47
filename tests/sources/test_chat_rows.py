"""Rows of published chat datasets are converted exactly, or rejected with a reason."""

import json

import pytest
from support import chat_row, convert_row, json_lines, read_source, write

from rorchat.errors import DataError
from rorchat.rows import RejectedRow
from rorchat.sources.registry import find_source, load_rows


def turns(*contents: str) -> list[dict]:
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(contents)]


def rejected(name: str, raw: object) -> str:
    with pytest.raises(RejectedRow) as refusal:
        convert_row(name, raw)
    return refusal.value.reason


SIMPLIFIED_NQ, ORIGINAL_NQ = find_source("natural_questions").raw[1:3]
# (source, a row of the Hub's Parquet or of another release, the converted row)
HUB_ROWS = [
    ("alpaca", {"instruction": "I", "input": "in", "output": "O", "text": "Below is"}, chat_row("I\n\nin", "O")),
    (
        "alpaca",
        {"instruction": "I", "instances": [{"input": "in", "output": "O"}, {"input": "", "output": "P"}]},
        chat_row("I\n\nin", "O"),
    ),
    ("code_alpaca", {"output": "O", "instruction": "I", "input": ""}, chat_row("I", "O")),
    (
        "cornell_movie_dialogs",
        {"movieID": "m0", "utterance": {"text": ["Yes - sure\x97", "Well?", "No."], "LineID": ["L1", "L2", "L3"]}},
        chat_row("Yes - sure—", "Well?"),
    ),
    ("gsm8k", {"question": "Q", "answer": "2*3=<<2*3=6>>6\n#### 6"}, chat_row("Q", "2*3=6\nThe answer is 6.")),
    ("gsm8k", {"question": "Q", "answer": "All.\n#### 1,050"}, chat_row("Q", "All.\nThe answer is 1,050.")),
    ("math_dataset", {"question": "b'Is 4 prime?\\n'", "answer": "b'False\\n'"}, chat_row("Is 4 prime?", "False")),
    (
        "mbpp",
        {
            "task_id": 927,
            "text": "Height of a tree.",
            "code": "def h(n):\r\n\treturn 0",
            "test_list": ["assert h(root) == 1"],
            "test_setup_code": "root = Node(1) \r\nroot.left = Node(2)",
            "challenge_test_list": [],
        },
        chat_row(
            "Height of a tree.\n\nYour code should pass these tests:\n\n"
            "root = Node(1) \nroot.left = Node(2)\nassert h(root) == 1",
            "```python\ndef h(n):\n\treturn 0\n```",
        ),
    ),
    (
        "natural_questions",
        {
            "id": "5225754983651766092",
            "question": {"text": "who", "tokens": ["who"]},
            "annotations": {
                "id": ["1", "2"],
                "short_answers": [
                    {"start_token": [], "end_token": [], "text": []},
                    {"start_token": [3, 9], "end_token": [4, 10], "text": ["Ann ( 9 )", "Bob"]},
                ],
                "yes_no_answer": [-1, -1],
            },
        },
        chat_row("who", "Ann (9), Bob"),
    ),
    (
        "natural_questions",
        {**ORIGINAL_NQ, "annotations": [{"short_answers": [], "yes_no_answer": "NO"}]},
        chat_row("when did they land", "No"),
    ),
    ("natural_questions", ORIGINAL_NQ, chat_row("when did they land", "July 20")),
    ("natural_questions", SIMPLIFIED_NQ, chat_row("when did they land", "July 20")),
    (
        "natural_questions",
        {"context": "Context: A.\n\nQuestion: a\nAnswer: ", "answer": "b", "aliases": ["c"]},
        chat_row("A.\n\na", "b"),
    ),
    (
        "openbookqa",
        {"id": "1", "question_stem": "Red is", "choices": {"text": ["a colour", "sour"], "label": ["A", "B"]}}
        | {"answerKey": "A"},
        chat_row("Red is\n\nA. a colour\nB. sour", "A. a colour"),
    ),
    ("smoltalk", {"messages": [{"role": "system", "content": " "}, *turns("a", "b")]}, chat_row("a", "b")),
    (
        "smol_smoltalk",
        {"messages": [{"role": "system", "content": "Be brief."}, *turns("a", "b")], "source": "smol-rewrite"},
        {"messages": [{"role": "system", "content": "Be brief."}, *turns("a", "b")]},
    ),
    ("ultrachat", {"prompt": "a", "prompt_id": "1", "messages": turns("a", "b", "c", "d")}, chat_row(*"abcd")),
    ("ultrachat", {"id": "0", "data": ["a", "b", "c"]}, chat_row("a", "b")),
    (
        "ultrafeedback",
        {"prompt": "a", "chosen": turns("a", "b"), "rejected": turns("a", "c"), "score_chosen": 8.0},
        {"prompt": turns("a"), "chosen": turns("a", "b")[1:], "rejected": turns("a", "c")[1:]},
    ),
    (
        "hh_rlhf",
        {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nAssistant: c", "rejected": "\n\nHuman: a\n\nAssistant: d"},
        {"prompt": turns("a"), "chosen": turns("a", "b\n\nc")[1:], "rejected": turns("a", "d")[1:]},
    ),
    ("prompt_completion", {"prompt": turns("a"), "completion": turns("a", "b")[1:]}, chat_row("a", "b")),
    (
        "prompt_completion",  # replies in the prompt are not learned, as in TRL
        {"prompt": turns("a", "b", "c"), "completion": turns("c", "d")[1:]},
        {"messages": [turns("a")[0], {**turns("a", "b")[1], "train": False}, *turns("c", "d")]},
    ),
    ("prompt_completion", {"prompt": "a ### b", "response": "c"}, chat_row("a ### b", "c")),
    (
        "prompt_completion",
        {"prompt": "### Instruction:\na\n\n### Input:\nb\n\n### Response:", "completion": "c"},
        chat_row("a\n\nb", "c"),
    ),
    (
        "messages",
        {"conversations": [{"from": who, "value": who} for who in ("system", "user", "chatgpt", "human", "bing")]},
        {
            "messages": [
                {"role": role, "content": who}
                for role, who in zip(
                    ("system", "user", "assistant", "user", "assistant"),
                    ("system", "user", "chatgpt", "human", "bing"),
                    strict=True,
                )
            ]
        },
    ),
]


@pytest.mark.parametrize(("name", "raw", "row"), HUB_ROWS, ids=[f"{n}-{i}" for i, (n, *_) in enumerate(HUB_ROWS)])
def test_published_row_formats_are_convert_row(name, raw, row):
    assert convert_row(name, raw) == row


# (source, raw row, reason)
REJECTED = [
    ("alpaca", {"instruction": "I", "instances": []}, "missing field"),
    ("cornell_movie_dialogs", {"lines": [{"speaker": "a", "text": text} for text in "bc"]}, "no messages"),
    ("cornell_movie_dialogs", {"utterance": {"text": ["na\ufffdve", "b"]}}, "replacement character"),
    ("cornell_movie_dialogs", {"utterance": {"text": ["a\x81", "b"]}}, "control character"),  # no Windows-1252
    ("hh_rlhf", {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"})
    + ("different prompts",),
    ("hh_rlhf", {"chosen": "Human: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}, "wrong order"),
    ("mbpp", {"text": "a", "code": "b", "task_id": 510, "test_list": []}, "evaluation split"),
    ("mbpp", {"text": "a", "code": "b", "test_list": []}, "missing field"),
    ("mbpp", {"text": "a", "code": " ", "task_id": 511, "test_list": []}, "empty reply"),
    ("mbpp", {"text": " ", "code": "b", "task_id": 511, "test_list": ["assert b"]}, "empty question"),
    ("moss", {"chat": {"turn_2": {"Human": "<|Human|>: a<eoh>", "MOSS": "<|MOSS|>: b<eom>"}}}, "wrong type"),
    ("messages", {"message_id": "a", "parent_id": None, "role": "prompter", "text": "b"}, "missing field"),
    ("natural_questions", {"question": "a", "answer": []}, "no short answer"),
    ("natural_questions", {"question_text": "a", "document_text": "a"}, "missing field"),
    ("openbookqa", {"Question Stem": "a", "Choices": "(A) b (B) c", "Answer Key": "C"}, "missing field"),
    ("preference", {"messages": turns("a", "b"), "label": True}, "missing field"),
    ("prompt_completion", {"prompt": "a", "completion": " "}, "empty reply"),
    ("smoltalk", {"messages": [*turns("a", "b"), {"role": "system", "content": "c"}, *turns("d", "e")]}, "wrong order"),
    ("smoltalk", {"messages": [*turns("a", "b"), {"role": "tool", "content": "c"}]}, "tool call"),
    ("ultrachat", {"data": ["a", " "]}, "empty reply"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "raw", "reason"), REJECTED, ids=[f"{n}-{r}" for n, _, r in REJECTED])
def test_unusable_rows_are_rejected_with_their_reason(name, raw, reason):
    assert rejected(name, raw) == reason


def test_kto_rows_are_rejected_as_preferences(shared_data):
    with pytest.raises(DataError, match=r"300 missing field.*a reply with a label \(KTO\) is not a pair of replies"):
        list(load_rows(f"preference={shared_data / 'preference' / 'kto_en_demo.json'}", "preference"))


def oasst(key: str, text: str, parent: str | None = None, role: str = "", **more: object) -> dict:
    role = role or ("prompter" if parent is None else "assistant")
    return {"message_id": key, "parent_id": parent, "message_tree_id": key[0], "text": text, "role": role, **more}


OASST_FLAT = [
    oasst("a", "Hello"),
    oasst("a1", "worse", "a", rank=1),
    oasst("a2", "deleted", "a", rank=0, deleted=True),
    oasst("a3", "spam", "a", rank=0, labels={"name": ["quality", "spam"], "value": [1.0, 0.6], "count": [1, 3]}),
    oasst("a5", "refused", "a", rank=0, review_result=False),
    oasst("a4", "best", "a", rank=0, labels={"name": ["spam"], "value": [0.1], "count": [3]}),
    oasst("a6", "unranked", "a"),
    oasst("a7", "And?", "a4", "prompter"),
    oasst("a8", "So.", "a7", rank=None),
    oasst("a9", "Unanswered?", "a8", "prompter"),
]
HELLO = chat_row("Hello", "best", "And?", "So.")


def tree_of(flat: list[dict], parent: str | None = None) -> list[dict]:
    """Flat messages in the nested format of the release, with labels as objects."""
    nested = []
    for row in (row for row in flat if row["parent_id"] == parent):
        labels = row.get("labels")
        as_objects = {n: {"value": v} for n, v in zip(labels["name"], labels["value"], strict=True)} if labels else {}
        nested.append({**row, "labels": as_objects, "replies": tree_of(flat, row["message_id"])})
    return nested


def test_oasst_follows_the_best_usable_replies(tmp_path):
    (tree,) = tree_of(OASST_FLAT)
    other = [oasst("b", "Bye"), oasst("b1", "Bye!", "b", rank=0)]
    broken = [
        oasst("c1", "lost its question", "c"),
        oasst("d", "spam", labels={"name": ["spam"], "value": [1.0]}),
    ]
    flat = write(tmp_path, "oasst_ready.messages.jsonl", json_lines(*OASST_FLAT, *other) + "{\n" + json_lines(*broken))
    rows, loaded = read_source(f"oasst={flat}")
    assert rows == [HELLO, chat_row("Bye", "Bye!")]
    assert (loaded.stats.rows_in, loaded.stats.rejects) == (5, {"not JSON": 1, "missing field": 2})
    assert [place.split(" ")[0] for place in loaded.stats.places["missing field"]] == [f"{flat}:14", f"{flat}:15"]
    nested = write(tmp_path, "oasst_ready.trees.jsonl", json_lines({"message_tree_id": "a", "prompt": tree}))
    assert read_source(f"oasst={nested}")[0] == [HELLO]
    assert read_source(f"oasst={tmp_path}")[0] == [HELLO]  # of a folder with both, the trees


def test_oasst_does_not_loop_on_circular_parents():
    circle = [
        oasst("a", "Hello"),
        oasst("a1", "Hi!", "a"),
        oasst("a", "Hello?", "a1", "prompter"),
    ]
    assert convert_row("oasst", circle) == chat_row("Hello", "Hi!")


def test_moss_turns_have_no_role_marks_and_keep_their_order(shared_data):
    path = shared_data / "chat" / "moss003_original_example.json"
    ((row,), _) = read_source(f"moss={path}")
    contents = [turn["content"] for turn in row["messages"]]
    assert len(contents) == 12 and contents[0] == "重新编排一首有关人工智能的歌曲"
    assert not [content for content in contents if "<|" in content or "<eo" in content]
    raw = json.loads(path.read_text())["chat"]
    ten = {"chat": {f"turn_{n}": {**raw["turn_1"], "Human": f"<|Human|>: {n}<eoh>\n"} for n in range(11, 0, -1)}}
    assert [turn["content"] for turn in convert_row("moss", ten)["messages"][::2]] == [str(n) for n in range(1, 12)]
