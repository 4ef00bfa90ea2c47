"""Shared by several test files: texts, rows, files and stores, and the command line run in this process."""

import contextlib
import hashlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rorchat.mixture.plan import Plan
from rorchat.rows import CHECKS, ConvertedRow
from rorchat.sources.registry import SourceRows, find_source, list_sources, load_rows
from rorchat.tokens.store import TokenStore

ROOT = Path(__file__).resolve().parent.parent
RORCHAT = Path(sys.executable).with_name("rorchat")

SENTENCES = [
    "Once upon a time there was a small model that wanted to talk.",
    "The model lived in a house by the river, near the old mill.",
    "Every morning it read a book, and every evening it told a story.",
    "One day a teacher came and asked: how much is 12 plus 34?",
    "The model thought for a long time. Then it said: 12 plus 34 is 46.",
    "The teacher was happy and gave the model a red ball.",
    "What is the capital of Peru? The capital of Peru is Lima.",
    "Who are you? I am a small chat model, and I try my best.",
    "Hello! How can I help you today?",
    "Thank you very much. Goodbye, and see you soon!",
    "It was the best of times, it was the worst of times.",
    "A dog, a cat and a parrot went to the market to buy some bread.",
    "The baker sells bread, cake and cheese; the farmer sells apples.",
    "I don't know what you're talking about, but I'll find out.",
    "The quick brown fox jumps over the lazy dog.",
    "Numbers such as 0, 7, 19, 256, 1024 and 65536 are spelled digit by digit.",
    "Der Bäcker backt süße Brötchen für die Gäste aus Österreich.",
    "Le café est fermé, mais la crêperie à côté est ouverte.",
    "El niño comió una manzana en la montaña.",
    "Привет, мир! Как дела сегодня?",
    "你好,世界。今天天气很好。",
    "こんにちは、元気ですか。",
    "Emoji are bytes too: 🙂 🚀 👩‍🔬.",
    "Tabs\tand\nnew lines\n\nare text as well.",
    "def add(a, b):\n    return a + b\n",
    "She sells sea shells by the sea shore.",
    "In the evening the sailor took the boat back to the harbour.",
    "The painter painted the bridge green and the house yellow.",
    "There is nothing like a warm soup on a cold day.",
    "The library is next to the school, behind the park.",
    "Nobody knew where the key was, so they looked for it everywhere.",
    "If you add nothing to a number, the number stays as it is.",
]

TEXTS = [f"Document {number} says hello to the small model by the river, near the old mill." for number in range(300)]

SHARE = 0.2  # of the documents in the validation split
DOCUMENTS = [
    f"Document {n}: the {'very ' * (n % 7)}small model says “naïve café 你好 🙂” {n} times.\n" for n in range(120)
]
DOCUMENTS += ["  LEADING blanks and CAPITALS  ", "leading Blanks\nand capitals", "text that says <|endoftext|> itself"]
COPIES = [DOCUMENTS[3]] * 3  # texts that differ in blanks and capitals, as above, are not copies
DOCUMENTS += COPIES
KEPT = DOCUMENTS[: -len(COPIES)]

#: Sources with a function that converts raw rows.
CONVERTING = [name for name in list_sources() if find_source(name).convert]


def chat_row(question: object = "Hello", reply: object = "Hi!", *further: object, **more: object) -> dict:
    """A row of a conversation in which user and assistant alternate."""
    texts = enumerate((question, reply, *further))
    return {"messages": [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in texts], **more}


def json_lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def as_jsonl(rows: list) -> bytes:
    """JSON Lines; rows that are bytes are written unchanged."""
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


def write(folder: Path, name: str, content: str | bytes | list) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    content = as_jsonl(content) if isinstance(content, list) else content
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def convert_row(name: str, raw: object) -> dict:
    """A raw row of a source, converted to a valid row of its first kind, repaired or not."""
    source = find_source(name)
    row = source.convert(raw)
    row = row.row if isinstance(row, ConvertedRow) else row
    CHECKS[source.kinds[0]](row)
    return row


def read_source(spec: str, kind: str = "", allow_empty: bool = False) -> tuple[list[dict], SourceRows]:
    """All rows of a source, with a check that every raw row is counted as kept or rejected."""
    rows = load_rows(spec, kind or find_source(spec.partition("=")[0]).kinds[0], allow_empty=allow_empty)
    kept = list(rows)
    assert len(kept) == rows.stats.kept
    assert rows.stats.rows_in == rows.stats.kept + sum(rows.stats.rejects.values())
    return kept, rows


def write_documents(folder: Path, documents: list[str], name: str = "documents.jsonl") -> str:
    path = folder / name
    path.write_text(
        "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents), encoding="utf-8"
    )
    return f"text={path}"


def decode(store: TokenStore, split: str, tokenizer) -> list[str]:
    """The documents of a split, separated at the document starts that the store keeps for each shard."""
    documents = []
    for shard in store.manifest.shards:
        if shard.split == split:
            ids = np.load(store.folder / shard.file)
            starts = np.load(store.folder / shard.file.replace(".npy", ".docs.npy"))
            assert (ids[starts] == store.manifest.end_of_text_id).all()
            assert len(starts) == shard.documents
            documents += [
                tokenizer.decode(ids[start + 1 : end].tolist())
                for start, end in zip(starts, [*starts[1:], len(ids)], strict=True)
            ]
    return documents


def hash_files(folder: Path) -> dict[str, str]:
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    assert len(hashes) >= 5
    return hashes


def locate_rows(plan: Plan) -> np.ndarray:
    """(rows, 2): source, and row of the source, for every row of the plan."""
    return np.array([plan.locate(row) for row in range(plan.rows)])


def read_strict(path: Path) -> list[dict]:
    """Every line of a file; NaN and Infinity, which are not JSON, raise AssertionError."""

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text(encoding="utf-8").splitlines()]


def command(*arguments: object) -> subprocess.CompletedProcess:
    """Run `rorchat ...` in this process and capture its output."""
    import rorchat.cli

    out, err, code = io.StringIO(), io.StringIO(), 0
    arguments = [str(word) for word in arguments]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["rorchat", *arguments])
        try:
            rorchat.cli.main()
        except SystemExit as stopped:
            code = stopped.code or 0
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def succeeded(*arguments: object) -> str:
    done = command("data", *arguments)
    assert (done.returncode, done.stderr if done.returncode else "") == (0, "")
    return done.stdout


def refused(code: int, *arguments: object) -> str:
    """The single error line of a `rorchat data` command that fails with `code`; progress lines are ignored."""
    done = command("data", *arguments)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert (done.returncode, len(lines)) == (code, 1), done.stderr
    others = [line for line in done.stderr.splitlines() if line != lines[0]]
    assert [line for line in others if not re.match(r"tokenize |\w+=.* rows kept|  [\d,]+ rejected: ", line)] == []
    return lines[0]
