"""`rorchat data`: what each command prints and leaves, and that a mistake is one line on stderr and an exit code."""

import contextlib
import io
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer

import rorchat
import rorchat.cli
from rorchat.chatml import END_OF_TEXT, encode_conversation, encode_text
from rorchat.cli.data import _bracketed, _coloured
from rorchat.doctor import SeenToken
from rorchat.sources import LOSS, available, find, kinds_of
from rorchat.tokenizer import token_bytes
from rorchat.tokens.mixture import prepare_stores
from rorchat.tokens.phases import read_mixture
from rorchat.tokens.store import TokenStore

RORCHAT = Path(sys.executable).with_name("rorchat")
TEXTS = [f"Document {number} says hello to the small model by the river, near the old mill." for number in range(300)]
SHARE = ("--validation-share", 0.1)
COMMANDS = {
    "list": [],
    "check": [
        "--as", "--rejects", "--tokenizer", "--max-length", "--against", "--min-characters", "--max-characters",
        "--max-repetition", "--min-letters", "--min-latin",
    ],
    "show": ["--tokenizer", "--row", "--as"],
    "prepare": [
        "--tokenizer", "--out", "--workers", "--validation-share", "--seed", "--persona", "--against",
        "--min-characters", "--max-characters", "--max-repetition", "--min-letters", "--min-latin",
    ],
    "verify": [],
    "adopt": ["--tokenizer", "--out"],
    "plan": [
        "--tokenizer", "--train-tokens", "--stores", "--block-size", "--validation-share", "--seed", "--persona",
        "--out",
    ],
}  # fmt: skip


def rorchat_data(*words: object) -> subprocess.CompletedProcess:
    """`rorchat data ...` in this process, as a terminal would run it, with what it wrote."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    words = [str(word) for word in words]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["rorchat", "data", *words])
        try:
            rorchat.cli.main()
        except SystemExit as stopped:
            code = stopped.code
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def succeeded(*words: object) -> str:
    done = rorchat_data(*words)
    assert (done.returncode, done.stderr if done.returncode else "") == (0, "")
    return done.stdout


def refused(code: int, *words: object) -> str:
    """The one line on stderr of a command that fails with `code`; what preparing says of its progress is no error."""
    done = rorchat_data(*words)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert (done.returncode, len(lines)) == (code, 1), done.stderr
    others = [line for line in done.stderr.splitlines() if line != lines[0]]
    assert [line for line in others if not re.match(r"tokenize |\w+=.* rows kept|  [\d,]+ rejected: ", line)] == []
    return lines[0]


def written(folder: Path, name: str, content: str | list) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content))
    return path


def exchange(question: str = "Hello", reply: str = "Hi!") -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]}


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def texts(tmp_path) -> Path:
    return written(tmp_path, "texts.jsonl", [{"text": text} for text in TEXTS])


@pytest.fixture
def store(texts, saved, tmp_path) -> Path:
    succeeded("prepare", f"text={texts}", "--tokenizer", saved, "--out", tmp_path / "store", *SHARE)
    return tmp_path / "store"


def cells_of(line: str) -> list[str]:
    """The cells of a line of a Markdown table."""
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


# -- list and help ---------------------------------------------------------------------------------------------------


def test_the_list_names_every_source_with_its_licence_size_and_what_the_loss_counts():
    lines = [line for line in succeeded("list").splitlines() if line.startswith("|")]
    rows = {cells[0]: cells for cells in (cells_of(line) for line in lines)}
    assert set(available()) == {name for name in rows if name.strip("-: ") and name != "source"}
    for name in available():
        module = find(name)
        assert rows[name][2:] == [
            ", ".join(kinds_of(name)),
            rows[name][3],
            module.SIZE,
            module.LICENCE,
            "; ".join(LOSS[kind] for kind in kinds_of(name)),
        ]
        home = "generated" if hasattr(module, "generate") else module.HUB["path"] if module.HUB else "your files"
        assert rows[name][3] == home


def test_the_list_ends_with_the_sources_that_have_restrictions():
    last = succeeded("list").splitlines()[-1]
    named = last.partition(": ")[2].rstrip(".").split(", ")
    told = [name for name in available() if re.search("not for commercial use|^unstated", find(name).LICENCE)]
    assert named == told and "alpaca" in named and "pile" in named


def test_every_command_is_tried_here():
    group = typer.main.get_command(rorchat.cli.data.app)
    assert set(group.commands) == set(COMMANDS)
    for name, options in COMMANDS.items():
        spelled = {option for parameter in group.commands[name].params for option in parameter.opts}
        assert {option for option in spelled if option.startswith("--")} == {*options, "--help"} - {"--help"}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_every_command_mentions_each_option(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    said = succeeded(name, "--help")
    assert [option for option in [*COMMANDS[name], "--help"] if option not in said] == []


# -- check -----------------------------------------------------------------------------------------------------------


def test_check_as_a_user_runs_it(tmp_path):
    rows = [exchange(), exchange("a", ""), exchange(), exchange("b", "c")]
    path = written(tmp_path, "rows.jsonl", rows)
    done = subprocess.run(
        [RORCHAT, "data", "check", path, "--rejects", tmp_path / "rejects.jsonl"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "read as 'messages'; another shape with --as",
        f"messages={path}: 2 of 4 rows kept",
        f"  1 rejected: empty reply, first at {path}:2 (message 1)",
        f"  1 rejected: duplicate, first at {path}:3",
        f"rejects  {tmp_path / 'rejects.jsonl'}",
    ]
    rejects = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert [(reject["place"], reject["row"]) for reject in rejects] == [(f"{path}:2", rows[1]), (f"{path}:3", rows[2])]


def test_check_takes_a_shape_filters_evaluation_sets_and_a_length(saved, tmp_path):
    question = "which of these seven animals would a careful farmer never keep in the kitchen of his house"
    rows = [
        {"prompt": "a", "completion": "short"},
        {"prompt": "What is red?", "completion": "word " * 300},
        {"prompt": question, "completion": "The cow is what he would not keep."},
        {"prompt": "What is the capital of Peru?", "completion": "The capital of Peru is Lima."},
        {"prompt": "And of Chile?", "completion": "12345678901234567890123"},
        {"prompt": "And of Russia?", "completion": "Москва, столица России"},
        {"prompt": "And again?", "completion": "Yes, again.\n" * 9},
    ]
    path = written(tmp_path, "rows.jsonl", rows)
    evaluation = written(tmp_path, "evaluation.jsonl", [{"question": question}])
    said = succeeded(
        "check", path, "--as", "prompt_completion", "--tokenizer", saved, "--max-length", 200, "--against", evaluation,
        "--min-characters", 10, "--max-characters", 10_000, "--max-repetition", 0.5, "--min-letters", 0.6,
        "--min-latin", 0.6,
    )  # fmt: skip
    counts = re.findall(r"  (\d+) rejected: ([\w -]+), first at [^(]*:(\d+)", said)
    assert {reason: (int(count), int(line)) for count, reason, line in counts} == {
        "too short": (1, 1),
        "over-long": (1, 2),
        "contaminated": (1, 3),
        "few letters": (1, 5),
        "other script": (1, 6),
        "repetition": (1, 7),
    }
    assert f"prompt_completion={path}: 1 of 7 rows kept" in said and "read as" not in said
    assert "over-long, first at" in said and "10,000" not in said  # by its tokens, not its 1,500 characters
    assert "1 of 7" in succeeded("check", path, "--as", "prompt_completion", "--min-characters", 1000)


def test_check_and_prepare_tell_what_of_an_evaluation_set_is_not_compared(texts, saved, tmp_path):
    rows = [{"question": " ".join(f"word{number}" for number in range(20))}, {"question": "too short"}]
    evaluation = written(tmp_path, "evaluation.jsonl", rows)
    told = f"against {evaluation}: 20 words of 1 rows\n  1 of 2 rows have no string of 13 words: not compared\n"
    assert told in succeeded("check", texts, "--against", evaluation)
    words = ("prepare", f"text={texts}", "--tokenizer", saved, "--out", tmp_path / "store", *SHARE)
    assert told in rorchat_data(*words, "--against", evaluation).stderr
    written(tmp_path, "short.jsonl", rows[1:])
    assert "nothing would be compared" in refused(65, "check", texts, "--against", tmp_path / "short.jsonl")


def test_a_file_whose_name_is_no_utf8_is_told(tmp_path):
    with open(os.fsencode(tmp_path) + b"/caf\xe9.jsonl", "w") as file:
        file.write('{"text": "a"}\n5\n')
    done = subprocess.run(
        [RORCHAT, "data", "check", f"text={tmp_path}"],
        capture_output=True,
        text=True,
        env=os.environ | {"LC_ALL": "C.UTF-8"},
    )
    assert (done.returncode, done.stderr) == (0, "") and "caf\\udce9.jsonl:2" in done.stdout


def test_check_tells_of_licences_and_repairs(tmp_path):
    path = written(tmp_path, "rows.jsonl", [{"question": "b'Solve 2*x = 4.'", "answer": "b'2'"}])
    assert "1 of them repaired: byte literal" in succeeded("check", f"math_dataset={path}")
    path = written(tmp_path, "rows.jsonl", [{"instruction": "a", "input": "", "output": "b"}])
    assert "licence: CC BY-NC 4.0 (not for commercial use)" in succeeded("check", f"alpaca={path}")


def test_a_file_without_a_usable_row_is_counted_and_ends_with_65(tmp_path):
    path = written(tmp_path, "rows.jsonl", [exchange("a", "")] * 3)
    assert refused(65, "check", path) == f"error: No row of messages={path} can be used."
    assert "3 rejected: empty reply" in rorchat_data("check", path).stdout


def test_what_is_checked_is_never_overwritten_by_its_rejects(tmp_path):
    path = written(tmp_path, "folder/rows.jsonl", [exchange()])
    before = path.read_bytes()
    for source, rejects in ((path, path), (f"messages={path}", path), (path.parent, path.parent / "rejects.jsonl")):
        assert "choose another place" in refused(2, "check", source, "--rejects", rejects)
    link = tmp_path / "link.jsonl"
    link.symlink_to(path)
    assert "choose another place" in refused(2, "check", path, "--rejects", link)
    assert path.read_bytes() == before and [file.name for file in path.parent.iterdir()] == ["rows.jsonl"]


# -- show ------------------------------------------------------------------------------------------------------------


def test_show_puts_what_is_trained_in_brackets(saved, tokenizer, tmp_path):
    path = written(tmp_path, "rows.jsonl", [exchange("Not me"), exchange("Hello", "Hi!\nThere.")])
    encoded = encode_conversation(tokenizer, exchange("Hello", "Hi!\nThere.")["messages"])
    head, _, shown = succeeded("show", path, "--tokenizer", saved, "--row", 1).partition("\n")
    trained = sum(label != -100 for label in encoded.labels)
    assert head == f"{path}:2, conversation: {len(encoded.input_ids)} tokens, {trained} of them trained"
    (bracketed,) = re.findall("⟦(.*?)⟧", shown, re.DOTALL)
    assert bracketed.replace("|", "").replace("⏎", "") == "Hi!\nThere.<im_end>"
    assert shown.count("\033") == 0
    plain = re.sub(r"(?<!<)\|(?!>)|[⟦⟧⏎]", "", shown)
    assert plain.rstrip("\n") == tokenizer.decode(encoded.input_ids).rstrip("\n")


def test_show_draws_a_bar_between_tokens_and_brackets_around_stretches():
    tokens = [SeenToken(text, trained, False) for text, trained in (("a", 0), ("b\n", 1), ("c", 1), ("d", 0), ("e", 1))]
    assert _bracketed(tokens) == "a⟦b⏎\n|c⟧d⟦e⟧"
    assert _bracketed([]) == ""


def test_on_a_terminal_what_is_trained_is_green(saved, tokenizer, tmp_path):
    path = written(tmp_path, "rows.jsonl", [exchange("Hello", "Hi!\nThere.")])
    words = [RORCHAT, "data", "show", path, "--tokenizer", saved]
    environment = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    control, terminal = pty.openpty()
    done = subprocess.run(words, stdout=terminal, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # the terminal's end
        while piece := os.read(control, 2**16):
            shown += piece
    os.close(control)
    assert (done.returncode, done.stderr) == (0, "")
    shown = shown.decode().replace("\r\n", "\n")
    painted = re.findall("\033\\[([\\d;]+)m(?:\033\\[1m)?([^\033]*)\033\\[0m", shown)
    green = "".join(text for colour, text in painted if colour in ("30;48;5;114", "30;48;5;157"))
    assert green.replace("⏎", "") == "Hi!There.<|im_end|>"
    grey = "".join(text for colour, text in painted if colour in ("37;48;5;238", "37;48;5;242"))
    assert grey.endswith("<|im_start|>assistant⏎⏎") and "⟦" not in shown


def test_neighbouring_tokens_have_different_shades_and_control_tokens_are_bold():
    tokens = [SeenToken("a", True, False), SeenToken("b", True, False), SeenToken("<|im_end|>", True, True)]
    colours = re.findall("\033\\[30;48;5;(\\d+)m(\033\\[1m)?(a|b|<\\|im_end\\|>)\033\\[0m", _coloured(tokens))
    assert colours == [("114", "", "a"), ("157", "", "b"), ("114", "\033[1m", "<|im_end|>")]


def test_show_gives_documents_and_both_sides_of_a_preference(saved, tmp_path):
    path = written(tmp_path, "rows.jsonl", [{"prompt": "What is red?", "chosen": "A colour.", "rejected": "No."}])
    said = succeeded("show", path, "--tokenizer", saved)
    assert re.findall(r", (\w+): \d+ tokens", said) == ["chosen", "rejected"]
    path = written(tmp_path, "letter.txt", "Dear reader")
    head, _, shown = succeeded("show", path, "--tokenizer", saved).partition("\n")
    count, trained = re.findall(r"(\d+) tokens, (\d+) of them", head)[0]
    assert count == trained and shown.startswith("⟦<|endoftext|>|") and shown.endswith("⟧\n")


# -- prepare and verify ----------------------------------------------------------------------------------------------


def test_prepare_and_verify_as_a_user_runs_them(texts, saved, tmp_path, tokenizer):
    words = [RORCHAT, "data", "prepare", f"text={texts}", "--tokenizer", saved, "--out", tmp_path / "store"]
    done = subprocess.run([*map(str, words), "--validation-share", "0.1"], capture_output=True, text=True)
    assert done.returncode == 0
    assert f"text={texts}: 300 of 300 rows kept" in done.stderr
    manifest = TokenStore(tmp_path / "store").manifest
    train, validation = (manifest.total(split, "documents") for split in ("train", "validation"))
    assert train + validation == 300 and 10 < validation < 60
    tokens = sum(len(ids) + 1 for ids in encode_text(tokenizer, TEXTS))
    assert manifest.total("train", "tokens") + manifest.total("validation", "tokens") == tokens
    told = [
        f"train: {train:,} documents, {manifest.total('train', 'tokens'):,} tokens",
        f"validation: {validation:,} documents, {manifest.total('validation', 'tokens'):,} tokens",
        f"store  {tmp_path / 'store'}",
    ]
    assert done.stdout.splitlines() == told
    verified = succeeded("verify", tmp_path / "store").splitlines()
    assert verified == [*told, "every byte of 2 shards is as it was written"]


def test_prepare_takes_filters_evaluation_sets_workers_and_a_persona(saved, tmp_path):
    question = "which of these seven animals would a careful farmer never keep in the kitchen of his house"
    evaluation = written(tmp_path, "evaluation.jsonl", [{"question": question}])
    rows = [{"text": text} for text in [*TEXTS, "short", "12345678901234567890", f"So, {question}?", TEXTS[0]]]
    path = written(tmp_path, "rows.jsonl", rows)
    done = rorchat_data(
        "prepare", f"text={path}", "--tokenizer", saved, "--out", tmp_path / "store", *SHARE, "--workers", 2,
        "--min-characters", 10, "--min-letters", 0.5, "--against", evaluation,
    )  # fmt: skip
    assert done.returncode == 0
    manifest = TokenStore(tmp_path / "store").manifest
    assert manifest.rejects == {"contaminated": 1, "duplicate": 1, "few letters": 1, "too short": 1}
    assert manifest.rows_in == manifest.kept + 4 == 304
    persona = written(tmp_path, "persona.yaml", Path(rorchat.__file__).with_name("persona.yaml").read_text())
    said = succeeded(
        "prepare", "persona=200", "--tokenizer", saved, "--out", tmp_path / "p", "--persona", persona, *SHARE
    )
    assert said.splitlines()[-1] == f"store  {tmp_path / 'p'}"


def test_a_finished_store_is_found_and_one_of_other_settings_is_refused(store, texts, saved):
    words = ("prepare", f"text={texts}", "--tokenizer", saved, "--out", store)
    assert rorchat_data(*words, *SHARE).stderr == ""
    assert "validation_share 0.1, now 0.2" in refused(78, *words, "--validation-share", 0.2)


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)


DAMAGE = {
    "flipped": flipped,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "empty": lambda path: path.write_bytes(b""),
    "not numpy": lambda path: path.write_bytes(b"x" * 500),
    "missing": Path.unlink,
    "other type": lambda path: np.save(path, np.load(path).astype(np.float32)),
    "longer": lambda path: np.save(path, np.concatenate([np.load(path)] * 2)),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", ["train-00000.npy", "validation-00000.npy", "train-00000.docs.npy", "blocks.npy"])
def test_a_damaged_store_is_one_line_that_names_the_file(damage, file, store):
    DAMAGE[damage](store / file)
    line = refused(65, "verify", store)
    assert str(store / file) in line and f"Delete {store} to prepare it again." in line


def test_several_damaged_files_are_counted(store):
    for file in ("train-00000.npy", "validation-00000.npy", "train-00000.docs.npy"):
        flipped(store / file)
    assert refused(65, "verify", store).count("And 2 more.") == 1


@pytest.mark.parametrize("content", [None, "", "{", "[]", "5", '{"source": "a"}'])
def test_a_store_without_a_readable_manifest_is_none(content, store):
    (store / "manifest.json").unlink()
    if content is not None:
        (store / "manifest.json").write_text(content)
    assert str(store) in refused(65, "verify", store)


# -- adopt -----------------------------------------------------------------------------------------------------------


def shards_of(folder: Path, **arrays: np.ndarray) -> Path:
    folder.mkdir(exist_ok=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return folder


def tokenized(tokenizer, texts: list[str]) -> np.ndarray:
    """As nanoGPT-style projects do it: every text behind an <|endoftext|>, uint16."""
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    return np.array([token for ids in encode_text(tokenizer, texts) for token in (end, *ids)], dtype=np.uint16)


def test_adopted_shards_are_the_arrays_and_train_like_any_store(tokenizer, saved, tmp_path):
    arrays = {
        "corpus_train_000001": tokenized(tokenizer, TEXTS[:100]),
        "corpus_train_000002": tokenized(tokenizer, TEXTS[100:250])[5:],  # a shard may begin inside a document
        "corpus_val_000000": tokenized(tokenizer, TEXTS[250:]),
    }
    shards = shards_of(tmp_path / "shards", **arrays)
    said = succeeded("adopt", shards, "--tokenizer", saved, "--out", tmp_path / "adopted")
    store = TokenStore(tmp_path / "adopted")
    train = np.concatenate([arrays["corpus_train_000001"], arrays["corpus_train_000002"]])
    assert store.slice("train", 0, store.tokens("train")).tolist() == train.tolist()
    held_out = arrays["corpus_val_000000"]
    assert store.slice("validation", 0, store.tokens("validation")).tolist() == held_out.tolist()
    sizes = np.array(token_bytes(tokenizer))
    assert store.manifest.total("train", "utf8_bytes") == sizes[train].sum()
    assert said.splitlines() == [
        f"train: 249 documents, {len(train):,} tokens",
        f"validation: 50 documents, {len(held_out):,} tokens",
        f"store  {tmp_path / 'adopted'}",
    ]
    assert "every byte of 3 shards" in succeeded("verify", tmp_path / "adopted")
    mixture = written(tmp_path, "mixture.yaml", f"sources: {{a: 'store={tmp_path / 'adopted'}'}}\n")
    (prepared,) = prepare_stores(read_mixture(mixture), tokenizer, tmp_path / "stores", 64, validation_share=0.1)
    assert prepared.slice("train", 10, 90).tolist() == train[10:90].tolist()
    assert prepared.manifest.kept == prepared.manifest.rows_in == 299


@pytest.mark.parametrize("names", [("train", "val"), ("edufineweb_train_000001", "edufineweb_val_000000")])
def test_real_stories_in_gpt2_ids_are_adopted(names, gpt2_tokenizer, shared_data, tmp_path):
    text = (shared_data / "tinystories" / "tinystories_sample_2mb.txt").read_text()
    stories = [story.strip() for story in text.split("<|endoftext|>")[:60]]
    arrays = [tokenized(gpt2_tokenizer, part) for part in (stories[:50], stories[50:])]
    assert arrays[0].max() == 50256 and arrays[0].dtype == np.uint16
    shards = shards_of(tmp_path / "shards", **dict(zip(names, arrays, strict=True)))
    said = succeeded("adopt", shards, "--tokenizer", shared_data / "gpt2_tokenizer", "--out", tmp_path / "adopted")
    assert said.startswith(f"train: 50 documents, {len(arrays[0]):,} tokens\nvalidation: 10 documents, ")
    store = TokenStore(tmp_path / "adopted")
    assert store.slice("train", 0, len(arrays[0])).tolist() == arrays[0].tolist()
    assert store.manifest.total("train", "utf8_bytes") == sum(len(story.encode()) for story in stories[:50])


GOOD = np.array([0, 1, 2, 3], dtype=np.uint16)  # 0 is the <|endoftext|> of the tests' tokenizer
ADOPTED_BADLY = {
    "an id beyond the vocabulary": (78, {"train": np.array([0, 1, 384], dtype=np.uint16), "val": GOOD}, "384 at 2"),
    "no end of text": (78, {"train": GOOD, "val": GOOD[1:]}, "No <|endoftext|> (id 0)"),
    "another type": (65, {"train": GOOD.astype(np.int64), "val": GOOD.astype(np.int64)}, "int64"),
    "big endian": (65, {"train": GOOD.astype(">u2"), "val": GOOD.astype(">u2")}, ">u2"),
    "another shape": (65, {"train": GOOD.reshape(2, 2), "val": GOOD}, "(2, 2)"),
    "a scalar": (65, {"train": np.uint16(5), "val": GOOD}, "()"),
    "an empty array": (65, {"train": GOOD[:0], "val": GOOD}, "(0,)"),
    "two types": (65, {"train": GOOD, "val": GOOD.astype(np.uint32)}, "uint16, uint32"),
    "no validation": (65, {"train": GOOD}, "no validation array"),
    "no training": (65, {"val": GOOD}, "no train array"),
    "no array": (65, {}, "no .npy file"),
    "objects": (65, {"train": np.array([{}]), "val": GOOD}, "train.npy cannot be read"),
}


@pytest.mark.parametrize("case", ADOPTED_BADLY)
def test_shards_that_do_not_fit_are_one_line_and_leave_nothing(case, tokenizer, saved, tmp_path):
    assert tokenizer.convert_tokens_to_ids(END_OF_TEXT) == 0 and len(tokenizer) == 384
    code, arrays, said = ADOPTED_BADLY[case]
    shards = shards_of(tmp_path / "shards", **arrays)
    assert said in refused(code, "adopt", shards, "--tokenizer", saved, "--out", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"not numpy at all", "archive", "folder"])
def test_a_shard_that_is_no_array_is_one_line(content, saved, tmp_path):
    shards = shards_of(tmp_path / "shards", val=GOOD)
    if content == "folder":
        (shards / "train.npy").mkdir()
    elif content == "archive":
        np.savez(shards / "train.npz", a=GOOD)
        (shards / "train.npz").rename(shards / "train.npy")
    else:
        (shards / "train.npy").write_bytes(content)
    assert "train.npy" in refused(65, "adopt", shards, "--tokenizer", saved, "--out", tmp_path / "out")


def test_a_check_names_the_files_of_a_folder_that_are_not_read_and_rows_of_another_shape(tmp_path):
    (tmp_path / "train-1.jsonl").write_text(json.dumps({"text": "It was."}) + "\n")
    (tmp_path / "other.txt").write_text("Left alone.")
    said = succeeded("check", f"prose={tmp_path}")
    assert "1 of 1 rows kept" in said and "1 other files of the folder are not read: other.txt" in said
    rows = [{"text": f"It was {n}."} for n in range(40)] + [{"else": n} for n in range(10)]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "10 rows are of another shape than 'text'" in succeeded("check", tmp_path / "mixed.jsonl")


def test_only_the_word_val_makes_an_array_validation(saved, tmp_path):
    names = ("retrieval_000", "interval", "values_train", "corpus_train", "my-val-0", "val", "validation_1", "a_valid")
    shards = shards_of(tmp_path / "shards", **dict.fromkeys(names, GOOD))
    succeeded("adopt", shards, "--tokenizer", saved, "--out", tmp_path / "out")
    manifest = TokenStore(tmp_path / "out").manifest
    assert (manifest.total("train", "documents"), manifest.total("validation", "documents")) == (4, 4)


def test_shards_are_not_adopted_where_a_store_is_being_made(saved, tmp_path):
    from rorchat.tokens.prepare import alone

    shards = shards_of(tmp_path / "shards", train=GOOD, val=GOOD)
    (tmp_path / ".out.unfinished").mkdir()
    (tmp_path / ".out.unfinished" / "part-00000.json").write_text("{}")
    with alone(tmp_path / "out"):
        assert "another process" in refused(78, "adopt", shards, "--tokenizer", saved, "--out", tmp_path / "out")
    assert (tmp_path / ".out.unfinished" / "part-00000.json").exists()


def test_a_folder_that_is_there_is_never_adopted_into(saved, tmp_path):
    shards = shards_of(tmp_path / "shards", train=GOOD, val=GOOD)
    (tmp_path / "out").mkdir()
    assert "exists" in refused(2, "adopt", shards, "--tokenizer", saved, "--out", tmp_path / "out")
    assert "No folder" in refused(65, "adopt", tmp_path / "none", "--tokenizer", saved, "--out", tmp_path / "new")


# -- plan ------------------------------------------------------------------------------------------------------------


def test_plan_prints_and_draws_what_a_mixture_comes_to(texts, store, saved, tmp_path):
    said = f"sources: {{a: 'text={texts}', b: 'store={store}'}}\nphases: [{{share: 100%, weights: {{a: 1, b: 3}}}}]\n"
    mixture = written(tmp_path, "mixture.yaml", said)
    picture = tmp_path / "plan.png"
    words = ("--tokenizer", saved, "--stores", tmp_path / "stores", "--block-size", 32, *SHARE)
    told = succeeded("plan", mixture, *words, "--train-tokens", 3210, "--out", picture)
    assert told.startswith("mixture: 3,200 tokens in 100 rows of 32\n") and told.endswith(f"picture  {picture}\n")
    assert re.findall(r"^    (\w) +([\d,]+) tokens .*of all", told, re.MULTILINE) == [("a", "800"), ("b", "2,400")]
    header = picture.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n" and min(np.frombuffer(header[16:24], dtype=">u4")) > 300
    assert (tmp_path / "stores" / "a" / "manifest.json").is_file()
    assert "--train-tokens 31 is less than one row" in refused(2, "plan", mixture, *words, "--train-tokens", 31)
    assert "PNG" in refused(2, "plan", mixture, *words, "--train-tokens", 3210, "--out", tmp_path / "plan.xyz")


def test_plan_makes_the_stores_of_the_persona_and_the_seed_that_the_run_will_have(saved, tmp_path):
    persona = (Path(rorchat.__file__).parent / "persona.yaml").read_text().replace("RorChat", "Zebulon")
    written(tmp_path, "zebulon.yaml", persona)
    mixture = written(tmp_path, "mixture.yaml", "sources: {me: persona=100}\n")
    words = ("plan", mixture, "--tokenizer", saved, "--stores", tmp_path / "stores", "--block-size", 32, *SHARE)
    more = ("--train-tokens", 3200, "--persona", tmp_path / "zebulon.yaml")
    succeeded(*words, *more, "--seed", 5)
    assert TokenStore(tmp_path / "stores" / "me").manifest.seed == 5
    assert "what it was made of (files, persona, " in refused(78, *words, "--train-tokens", 3200, "--seed", 5)
    assert "seed 5, now 0" in refused(78, *words, *more)


MIXTURES = {
    "not YAML": ("sources: {a: [", "is not YAML"),
    "a tab": ("\tsources: 1", "is not YAML"),
    "a key twice": ("sources: {a: text=x, a: text=y}", "a"),
    "empty": ("", "mixture.yaml"),
    "a list": ("- a", "mixture.yaml"),
    "no sources": ("phases: [{share: 100%}]", "no sources"),
    "an unknown key": ("sources: {a: text=x}\nphase: 1", "phase"),
    "an unknown source": ("sources: {a: nosuch=x}", "No source named 'nosuch'"),
    "shares over one": ("sources: {a: text=x}\nphases: [{share: 80%, weights: {a: 1}}, {share: 0.4}]", "120 %"),
    "a negative weight": ("sources: {a: text=x}\nweights: {a: -1}", "a"),
    "a weight of nothing": ("sources: {a: text=x}\nweights: {b: 1}", "b"),
}


@pytest.mark.parametrize("case", MIXTURES)
def test_a_mixture_that_cannot_be_read_is_one_line(case, saved, tmp_path):
    content, said = MIXTURES[case]
    mixture = written(tmp_path, "mixture.yaml", content)
    words = ("--tokenizer", saved, "--stores", tmp_path / "stores", "--train-tokens", 3200, "--block-size", 32)
    line = refused(2, "plan", mixture, *words)
    assert said in line
    assert "Cannot read the mixture" in refused(2, "plan", tmp_path / "none.yaml", *words)
    (tmp_path / "latin.yaml").write_bytes(b"sources: \xff")
    assert "Cannot read the mixture" in refused(2, "plan", tmp_path / "latin.yaml", *words)


# -- mistakes --------------------------------------------------------------------------------------------------------

# (words, exit code, what the line says); {rows} is a good file, {tok} the tokenizer, {out} a new folder
PREPARE, SHOW = "prepare text={rows} --tokenizer {tok} --out {out}", "show {rows} --tokenizer {tok}"
MISTAKES = [
    ("check nosuch", 2, "No source named 'nosuch'"),
    ("check alpacca={rows}", 2, "Did you mean 'alpaca'?"),
    ("check {out}/none.jsonl", 65, "No file or folder"),
    ("check text={out}/none.jsonl", 65, "No file or folder"),
    ("check text", 2, "give a file or folder"),
    ("check tinytown", 2, "say how many rows"),
    ("check tinytown=-5", 2, "say how many rows"),
    ("check {rows} --as nosuch", 2, "No source named 'nosuch'"),
    ("check text={rows} --as messages", 2, "names its source already"),
    ("check {rows} --max-length 100", 2, "--tokenizer and --max-length go together"),
    ("check {rows} --tokenizer {tok}", 2, "--tokenizer and --max-length go together"),
    ("check {rows} --tokenizer {tok} --max-length 0", 2, "--max-length is 0"),
    ("check {rows} --tokenizer {tok} --max-length -5", 2, "--max-length is -5"),
    ("check {rows} --tokenizer {out} --max-length 5", 65, "No tokenizer at"),
    ("check {rows} --min-characters -1", 2, "min_characters is -1"),
    ("check {rows} --min-characters 9 --max-characters 8", 2, "no text fits"),
    ("check {rows} --max-repetition 1.5", 2, "max_repetition is 1.5"),
    ("check {rows} --min-letters 2", 2, "min_letters is 2.0"),
    ("check {rows} --min-latin -0.1", 2, "min_latin is -0.1"),
    ("check {rows} --min-latin nan", 2, "min_latin is nan"),
    ("check {rows} --against {out}", 65, "{out}"),
    ("check {rows} --rejects {out}/none/r.jsonl", 74, "{out}/none/r.jsonl"),
    (SHOW + " --row -1", 2, "--row is -1"),
    (SHOW + " --row 300", 65, "has no row 300"),
    ("show {out}.jsonl --tokenizer {tok}", 65, "No file or folder"),
    ("show {rows} --tokenizer {out}", 65, "No tokenizer at"),
    ("show {rows} --tokenizer {rows}", 65, "No tokenizer at"),
    (PREPARE + " --workers 0", 2, "--workers is 0"),
    (PREPARE + " --validation-share 1", 2, "--validation-share is 1.0"),
    (PREPARE + " --validation-share -0.5", 2, "--validation-share is -0.5"),
    (PREPARE + " --validation-share nan", 2, "--validation-share is nan"),
    (PREPARE + " --validation-share 1e-9", 65, "no validation documents"),
    (PREPARE + " --persona {out}/none.yaml", 65, "none.yaml"),
    (PREPARE + " --against {out}", 65, "{out}"),
    (PREPARE + " --min-letters 7", 2, "min_letters is 7.0"),
    ("prepare nosuch={rows} --tokenizer {tok} --out {out}", 2, "No source named 'nosuch'"),
    ("prepare preference={rows} --tokenizer {tok} --out {out}", 2, "gives preferences"),
    ("prepare text={out} --tokenizer {tok} --out {out}", 65, "No file or folder"),
    ("prepare messages={rows} --tokenizer {tok} --out {out}", 65, "missing field"),
    ("verify {out}", 65, "is no token store"),
    ("verify {rows}", 65, "is no token store"),
    ("plan {rows} --tokenizer {tok} --train-tokens -1 --stores {out}", 2, "rows.jsonl"),
    (
        "plan {mixture} --tokenizer {tok} --train-tokens 999 --stores {out} --block-size 9 --validation-share 3",
        2,
        "--validation-share is 3.0",
    ),
    ("plan {mixture} --tokenizer {tok} --train-tokens 999 --stores {out} --block-size 1", 2, "--block-size 1"),
    ("plan {mixture} --tokenizer {out} --train-tokens 9999 --stores {out}", 65, "No tokenizer at"),
]


@pytest.mark.parametrize(("words", "code", "said"), MISTAKES)
def test_a_mistake_is_one_line_with_its_exit_code(words, code, said, saved, tmp_path):
    rows = written(tmp_path, "rows.jsonl", [{"text": text} for text in TEXTS])
    names = {"rows": rows, "tok": saved, "out": tmp_path / "out"}
    names["mixture"] = written(tmp_path, "mixture.yaml", f"sources: {{a: 'text={rows}'}}\n")
    line = refused(code, *(word.format(**names) for word in words.split()))
    assert said.format(**names) in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words", ["check", "check a --bogus", "show a", "plan a --train-tokens x", "nosuch", "prepare"]
)
def test_what_the_command_line_itself_refuses_is_no_traceback(words):
    done = rorchat_data(*words.split())
    assert (done.returncode, done.stdout, done.stderr.count("Traceback")) == (2, "", 0)
    assert "Error" in done.stderr


@pytest.mark.parametrize(
    "words", ["check {missing}", "prepare text={missing} --tokenizer {saved} --out {missing}.store"]
)
def test_a_mistake_is_one_line_in_a_process_of_its_own_too(words, saved, tmp_path):
    missing = tmp_path / "missing.jsonl"
    words = words.format(missing=missing, saved=saved).split()
    done = subprocess.run([RORCHAT, "data", *words], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (65, "")
    assert done.stderr == f"error: No file or folder {missing}.\n"
