"""Of every row of random files, exactly the words that the row says are learned reach the model with labels."""

import csv
import io
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from types import SimpleNamespace

from support import as_jsonl, write

from rorchat.training.sft import load_conversations

FILES, ROWS = 100, 8
WORD = re.compile(r"w(\d+)n\d+")  # the number of its row, and of the word
#: (key of a turn, value, whether the turn is learned)
MARKS = [
    ("weight", 0, False), ("weight", 1, True), ("weight", 0.0, False), ("loss_weight", 0.0, False),
    ("train", False, False), ("train", True, True), ("training", False, False), ("trainable", "false", False),
    ("loss", False, False), ("loss_mask", 0, False), ("loss_mask", 1, True), ("masked", True, False),
    ("masked", False, True), ("weight", None, True),
]  # fmt: skip
UNCLEAR_MARKS = [("weight", 0.5), ("mask", 1), ("train_detail", [{"begin_offset": 0, "train": False}]), ("loss", "x")]
#: (column, value, whether the row is kept)
COLUMNS = [
    ("label", True, True), ("label", 1, True), ("label", "true", True), ("label", None, True), ("label", False, False),
    ("label", 0, False), ("label", "False", False), ("kto_tag", True, True), ("kto_tag", False, False),
    ("tools", [], True), ("tools", "[]", True), ("tools", None, True), ("tools", [{"name": "add"}], False),
    ("tools", '[{"name": "add"}]', False), ("functions", [{"name": "add"}], False), ("images", [], True),
    ("images", ["a.png"], False), ("audio", None, True), ("audio", "a.wav", False),
]  # fmt: skip
SYSTEM_COLUMNS = ("system", "system_prompt")
OTHER_PARTS = ({"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "image", "text": ""}, {"type": "audio"})


@dataclass
class Row:
    """A raw row, and what a reader has to make of it.

    Attributes:
        turns: (role, text, whether it is learned).
        kept: whether the row can be used.
    """

    number: int
    turns: list[tuple[str, str, bool]] = field(default_factory=list)
    columns: dict = field(default_factory=dict)
    kept: bool = True
    raw: object = None

    def words(self) -> tuple[list[str], list[str]]:
        """The words that are read, and those of them that are learned."""
        last = max(number for number, (role, _, _) in enumerate(self.turns) if role == "assistant")
        read = self.turns[: last + 1]
        learned = [text for role, text, is_learned in read if role == "assistant" and is_learned]
        return " ".join(text for _, text, _ in read).split(), " ".join(learned).split()

    def is_usable(self) -> bool:
        return self.kept and bool(self.words()[1])


class Generator:
    """Makes random files with rows of one shape each."""

    def __init__(self, seed: int):
        self.random, self.words, self.numbers = random.Random(seed), count(), count()
        self.capitals = False  # whether columns beside the turns begin with them

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def text(self, row: Row, least: int = 1) -> str:
        return " ".join(f"w{row.number}n{next(self.words)}" for _ in range(self.random.randint(least, least + 3)))

    def start(self, exchanges: int = 3) -> Row:
        row = Row(next(self.numbers))
        for _ in range(self.random.randint(1, exchanges)):
            row.turns += [("user", self.text(row), True), ("assistant", self.text(row), True)]
        return row

    def add_columns(self, row: Row) -> None:
        """Columns beside the turns; after the turns, which may begin with a system message."""
        columns = {}
        for column, value, kept in self.random.sample(COLUMNS, self.random.choice([0, 0, 1, 2])):
            if column not in columns:
                columns[column] = value
                row.kept &= kept
        if self.chance(0.3):
            text = self.text(row)
            columns[self.random.choice(SYSTEM_COLUMNS)] = text
            if row.turns[0][0] != "system":
                row.turns.insert(0, ("system", text, True))
        if self.chance(0.2):
            columns["notes"] = self.text(row, 8)  # in no place that is read
        row.columns = {name.title() if self.capitals else name: value for name, value in columns.items()}

    # -- shapes with a list of turns ---------------------------------------------------------------------------------

    def mark_turn(self, row: Row, turn: dict, number: int) -> dict:
        if self.chance(0.05):
            key, value = self.random.choice(UNCLEAR_MARKS)
            row.kept = False
            return {**turn, key: value}
        if self.chance(0.4):
            role, text, _ = row.turns[number]
            key, value, is_learned = self.random.choice(MARKS)
            row.turns[number] = (role, text, is_learned)
            return {**turn, key: value}
        return turn

    def in_parts(self, row: Row, text: str) -> object:
        if self.chance(0.7):
            return text
        parts: list = [{"type": "text", "text": word} for word in text.split()]
        if self.chance(0.1):
            parts.insert(self.random.randrange(len(parts) + 1), self.random.choice(OTHER_PARTS))
            row.kept = False
        return parts

    def turns(self, row: Row, keys: tuple[str, str], names: dict[str, str]) -> list[dict]:
        """The turns of a row as objects, with marks, parts, nulls, calls of tools, and a last turn of the user."""
        if "system" in names and self.chance(0.3):
            row.turns.insert(0, ("system", self.text(row), True))
        if self.chance(0.2):
            row.turns.append(("user", self.text(row), True))
        turns = []
        for number, (role, text, _) in enumerate(row.turns):
            turn = {keys[0]: names[role], keys[1]: self.in_parts(row, text)}
            turns.append(self.mark_turn(row, turn, number))
        if self.chance(0.05):
            turns[-1] |= self.random.choice([{"tool_calls": [{"name": "add"}], keys[1]: None}, {keys[1]: None}])
            row.kept = False
        if self.chance(0.05):
            turns.append({keys[0]: self.random.choice(["tool", "function_call", "observation"]), keys[1]: "5"})
            row.kept = False
        return turns

    def messages(self) -> Row:
        row = self.start()
        names = {"system": "system", "user": "user", "assistant": "assistant"}
        turns = self.turns(row, ("role", "content"), names)
        self.add_columns(row)
        row.raw = {"messages": turns, **row.columns}
        return row

    def sharegpt(self) -> Row:
        row = self.start()
        turns = self.turns(row, ("from", "value"), {"system": "system", "user": "human", "assistant": "gpt"})
        self.add_columns(row)
        row.raw = {"conversations": turns, **row.columns}
        return row

    def speakers(self) -> Row:
        row = self.start()
        turns = self.turns(row, ("speaker", "text"), {"user": "Anna", "assistant": "Ben"})
        self.add_columns(row)
        row.raw = {"dialogue": turns, **row.columns}
        return row

    def bare_list(self) -> Row:
        row = self.start()
        row.raw = self.turns(row, ("role", "content"), {"user": "user", "assistant": "assistant", "system": "system"})
        return row

    def pairs(self) -> Row:
        row = self.start()
        turns = []
        for number in range(0, len(row.turns), 2):
            turn = {"human": row.turns[number][1], "assistant": row.turns[number + 1][1]}
            turns.append(self.mark_turn(row, turn, number + 1))
        self.add_columns(row)
        row.raw = {"conversation": turns, **row.columns}
        return row

    def texts(self) -> Row:
        row = self.start()
        texts = [text for _, text, _ in row.turns]
        self.add_columns(row)
        row.raw = {"dialog": texts, **row.columns}
        return row

    # -- shapes with a question and its answer -----------------------------------------------------------------------

    def history(self, row: Row) -> dict:
        """The turns before the last exchange, as a column."""
        texts = [text for _, text, _ in row.turns[:-2]]
        pairs = [list(pair) for pair in zip(texts[::2], texts[1::2], strict=True)]
        return {"history": pairs} if pairs or self.chance(0.5) else {}

    def alpaca(self) -> Row:
        row = self.start()
        (_, question, _), (_, answer, _) = row.turns[-2:]
        instruction, _, about = question.partition(" ")
        history = self.history(row)
        self.add_columns(row)
        row.raw = {"instruction": instruction, "input": about, "output": answer, **history, **row.columns}
        return row

    def question(self) -> Row:
        row = self.start()
        (_, question, _), (_, answer, _) = row.turns[-2:]
        history = self.history(row)
        if self.chance(0.3):
            history["instruction"] = self.text(row)
            row.turns.insert(0, ("system", history["instruction"], True))
            row.raw = {"question": question, "answer": answer, **history}
            return row
        self.add_columns(row)
        row.raw = {"question": question, "answer": answer, **history, **row.columns}
        return row

    def completion(self) -> Row:
        row = self.start(exchanges=1)
        (_, question, _), (_, answer, _) = row.turns
        self.add_columns(row)
        row.raw = {"prompt": question, "completion": answer, **row.columns}
        return row

    def chat_completion(self) -> Row:
        row = self.start()
        turns = self.turns(row, ("role", "content"), {name: name for name in ("system", "user", "assistant")})
        cut = max(number for number, (role, _, _) in enumerate(row.turns) if role == "assistant")
        row.turns = [  # replies in a prompt are not learned
            (role, text, learned and (role != "assistant" or number >= cut))
            for number, (role, text, learned) in enumerate(row.turns)
        ]
        self.add_columns(row)
        row.raw = {"prompt": turns[:cut], "completion": turns[cut:], **row.columns}
        return row

    # -- tables with one message in each row, and numbered lines -------------------------------------------------------

    def tree_table(self, rows: list[Row]) -> list[dict]:
        table = []
        for row in rows:
            parent = None
            for number, (role, text, _) in enumerate(row.turns):
                name = f"{row.number}-{number}"
                shared = {"parent_id": parent, "role": "prompter" if role == "user" else role, "lang": "en"}
                table.append({"message_id": name, "text": text, "rank": 0, **shared})
                if role == "assistant":
                    table.append({"message_id": f"{name}b", "text": self.text(row), "rank": 1, **shared})
                parent = name
        self.random.shuffle(table)
        return table

    def utterance_table(self, rows: list[Row]) -> str:
        lines = ["conv_id,utterance_idx,context,prompt,speaker_idx,utterance,selfeval,tags"]
        for row in rows:
            about = self.text(row)
            for number, (role, text, _) in enumerate(row.turns):
                lines.append(f"hit:{row.number},{number + 1},sad,{about},{7 * (role == 'user')},{text},5|5|5_2|2|5,")
        return "\n".join(lines)

    def numbered_lines(self, rows: list[Row]) -> str:
        lines = []
        for row in rows:
            numbers, persona = count(1), self.text(row)
            texts = [text for _, text, _ in row.turns]
            lines.append(f"{next(numbers)} your persona: {persona}")
            for question, reply in zip(texts[::2], texts[1::2], strict=True):
                lines.append(f"{next(numbers)} {question}\t{reply}\t\t{self.text(row)}|{self.text(row)}")
            row.turns.insert(0, ("system", persona, True))
        return "\n".join(lines)


def write_rows(folder: Path, name: str, rows: list[Row], form: str) -> Path:
    raw = [row.raw for row in rows]
    if form == "json":
        return write(folder, f"{name}.json", json.dumps(raw))
    if form == "csv":
        table = io.StringIO()
        columns = dict.fromkeys(column for row in raw for column in row)
        writer = csv.DictWriter(table, list(columns))
        writer.writeheader()
        as_text = [{key: json.dumps(v) if isinstance(v, list) else v for key, v in row.items()} for row in raw]
        writer.writerows(as_text)
        return write(folder, f"{name}.csv", table.getvalue())
    return write(folder, f"{name}.jsonl", as_jsonl(raw))


#: (shape, source, formats)
SHAPES = [
    ("messages", "messages", ("jsonl", "json", "csv")),
    ("messages", "smoltalk", ("jsonl",)),
    ("messages", "ultrachat", ("jsonl",)),
    ("sharegpt", "messages", ("jsonl", "json", "csv")),
    ("messages", "oasst", ("jsonl",)),
    ("speakers", "messages", ("jsonl", "json")),
    ("bare_list", "messages", ("jsonl",)),
    ("pairs", "messages", ("jsonl",)),
    ("texts", "messages", ("jsonl", "csv")),
    ("texts", "dailydialog", ("jsonl",)),
    ("alpaca", "alpaca", ("jsonl", "json", "csv")),
    ("alpaca", "messages", ("jsonl",)),
    ("question", "messages", ("jsonl", "csv")),
    ("completion", "prompt_completion", ("jsonl", "csv")),
    ("chat_completion", "prompt_completion", ("jsonl", "json")),
]
TABLES = ("tree_table", "utterance_table", "numbered_lines")


def make_files(folder: Path) -> Iterator[tuple[str, list[Row]]]:
    """(spec, rows) of every file. Each has a row that can be used."""
    generator = Generator(seed=0)
    for number in range(FILES):
        name, generator.capitals = f"file{number}", generator.chance(0.3)
        if number % 6 == 5:
            table = TABLES[number // 6 % 3]
            rows = [generator.start() for _ in range(ROWS)]
            content = getattr(generator, table)(rows)
            suffix = {"tree_table": "jsonl", "utterance_table": "csv", "numbered_lines": "txt"}[table]
            yield f"messages={write(folder, f'{name}.{suffix}', content)}", rows
            continue
        shape, source, formats = SHAPES[number % len(SHAPES)]
        rows = [getattr(generator, shape)() for _ in range(ROWS)]
        while not rows[0].is_usable():
            rows[0] = getattr(generator, shape)()
        yield f"{source}={write_rows(folder, name, rows, generator.random.choice(formats))}", rows


def read_words(tokenizer, row: dict) -> tuple[list[str], list[str]]:
    learned = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    return tuple([match[0] for match in WORD.finditer(tokenizer.decode(ids))] for ids in (row["input_ids"], learned))


def test_of_every_row_exactly_the_words_that_are_meant_have_labels(tokenizer, tmp_path):
    files = list(make_files(tmp_path))
    arguments = SimpleNamespace(
        sources=[spec for spec, _ in files], persona=None, data_seed=0, validation_share=0.1, rows_per_source=None,
        replay_source=lambda: None,
    )  # fmt: skip
    split = load_conversations(arguments, tokenizer, 10_000)
    found = {}
    for row in (*split.train, *split.all_validation()):
        read, learned = read_words(tokenizer, row)
        (number,) = {WORD.fullmatch(word)[1] for word in read}
        found[int(number)] = (read, learned)
    for spec, rows in files:
        for row in rows:
            assert found.pop(row.number, None) == (row.words() if row.is_usable() else None), (spec, row)
    assert found == {}
    every = [row for _, rows in files for row in rows]
    kinds = Counter(row.is_usable() for row in every)
    partly = sum(row.is_usable() and ("assistant", False) in {turn[::2] for turn in row.turns} for row in every)
    assert len(every) == FILES * ROWS and min(kinds.values()) > 150 and partly > 50
    for stats, (_, rows) in zip(split.row_stats, files, strict=True):
        assert stats.kept == sum(row.is_usable() for row in rows)
        assert stats.rows_in == stats.kept + sum(stats.rejects.values()) == len(rows)
