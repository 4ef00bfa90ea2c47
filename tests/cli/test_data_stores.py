"""`rorchat data prepare`, `verify`, `import` and `plan`: their output, files and refusals."""

import re
import subprocess
from pathlib import Path

import numpy as np
import preloaded
import pytest
from support import TEXTS, command, refused, succeeded, write

import rorchat
from rorchat.chatml import END_OF_TEXT, encode_text
from rorchat.mixture.mixture_file import read_mixture
from rorchat.mixture.stores import prepare_stores
from rorchat.tokenizer import token_bytes
from rorchat.tokens.store import TokenStore

SHARE = ("--validation_share", 0.1)


@pytest.fixture
def texts(tmp_path) -> Path:
    return write(tmp_path, "texts.jsonl", [{"text": text} for text in TEXTS])


@pytest.fixture
def store(texts, saved, tmp_path) -> Path:
    succeeded("prepare", f"text={texts}", "--tokenizer", saved, "--out", tmp_path / "store", *SHARE)
    return tmp_path / "store"


# -- prepare and verify ----------------------------------------------------------------------------------------------


def test_prepare_and_verify_print_documents_and_tokens(texts, saved, tmp_path, tokenizer):
    arguments = [
        preloaded.client("rorchat"),
        "data",
        "prepare",
        f"text={texts}",
        "--tokenizer",
        saved,
        "--out",
        tmp_path / "store",
    ]
    done = subprocess.run([*map(str, arguments), "--validation_share", "0.1"], capture_output=True, text=True)
    assert done.returncode == 0
    assert f"text={texts}: 300 of 300 rows kept" in done.stderr
    manifest = TokenStore(tmp_path / "store").manifest
    train, validation = (manifest.total(split, "documents") for split in ("train", "validation"))
    assert train + validation == 300 and 10 < validation < 60
    tokens = sum(len(ids) + 1 for ids in encode_text(tokenizer, TEXTS))
    assert manifest.total("train", "tokens") + manifest.total("validation", "tokens") == tokens
    expected = [
        f"train: {train:,} documents, {manifest.total('train', 'tokens'):,} tokens",
        f"validation: {validation:,} documents, {manifest.total('validation', 'tokens'):,} tokens",
        f"store  {tmp_path / 'store'}",
    ]
    next_step = f"next: rorchat pretrain --sources store={tmp_path / 'store'} --tokenizer ... --train_tokens ... "
    assert done.stdout.splitlines() == [*expected, f"{next_step}--output_dir ..."]
    verified = succeeded("verify", tmp_path / "store").splitlines()
    assert verified == [*expected, "all 2 shards are valid"]


def test_prepare_accepts_filters_evaluation_sets_workers_and_a_persona(saved, tmp_path):
    question = "which of these seven animals would a careful farmer never keep in the kitchen of his house"
    evaluation = write(tmp_path, "evaluation.jsonl", [{"question": question}])
    rows = [{"text": text} for text in [*TEXTS, "short", "12345678901234567890", f"So, {question}?", TEXTS[0]]]
    path = write(tmp_path, "rows.jsonl", rows)
    done = command("data",
        "prepare", f"text={path}", "--tokenizer", saved, "--out", tmp_path / "store", *SHARE, "--workers", 2,
        "--min_characters", 10, "--min_letters", 0.5, "--against", evaluation,
    )  # fmt: skip
    assert done.returncode == 0
    manifest = TokenStore(tmp_path / "store").manifest
    assert manifest.rejects == {"contaminated": 1, "duplicate": 1, "few letters": 1, "too short": 1}
    assert manifest.rows_in == manifest.kept + 4 == 304
    persona = write(tmp_path, "persona.yaml", Path(rorchat.__file__).with_name("persona.yaml").read_text())
    output = succeeded(
        "prepare", "persona=200", "--tokenizer", saved, "--out", tmp_path / "p", "--persona", persona, *SHARE
    )
    assert output.splitlines()[-2] == f"store  {tmp_path / 'p'}"


def test_check_and_prepare_count_evaluation_rows_that_are_not_compared(texts, saved, tmp_path):
    rows = [{"question": " ".join(f"word{number}" for number in range(20))}, {"question": "too short"}]
    evaluation = write(tmp_path, "evaluation.jsonl", rows)
    expected = f"against {evaluation}: 20 words of 1 rows\n  1 of 2 rows have no string of 13 words: not compared\n"
    assert expected in succeeded("check", texts, "--against", evaluation)
    arguments = ("prepare", f"text={texts}", "--tokenizer", saved, "--out", tmp_path / "store", *SHARE)
    assert expected in command("data", *arguments, "--against", evaluation).stderr
    write(tmp_path, "short.jsonl", rows[1:])
    assert "nothing would be compared" in refused(65, "check", texts, "--against", tmp_path / "short.jsonl")


def test_a_finished_store_is_reused_or_refused_if_settings_differ(store, texts, saved):
    arguments = ("prepare", f"text={texts}", "--tokenizer", saved, "--out", store)
    assert command("data", *arguments, *SHARE).stderr == ""
    assert "validation_share 0.1, now 0.2" in refused(78, *arguments, "--validation_share", 0.2)


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
def test_verify_names_the_damaged_file_in_one_line(damage, file, store):
    DAMAGE[damage](store / file)
    line = refused(65, "verify", store)
    assert str(store / file) in line and f"Delete {store} to prepare it again." in line


def test_several_damaged_files_are_counted(store):
    for file in ("train-00000.npy", "validation-00000.npy", "train-00000.docs.npy"):
        flipped(store / file)
    assert refused(65, "verify", store).count("And 2 more.") == 1


@pytest.mark.parametrize("content", [None, "", "{", "[]", "5", '{"source": "a"}'])
def test_a_folder_without_a_readable_manifest_is_not_a_store(content, store):
    (store / "manifest.json").unlink()
    if content is not None:
        (store / "manifest.json").write_text(content)
    assert str(store) in refused(65, "verify", store)


# -- import ----------------------------------------------------------------------------------------------------------


def save_shards(folder: Path, **arrays: np.ndarray) -> Path:
    folder.mkdir(exist_ok=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return folder


def tokenized(tokenizer, texts: list[str]) -> np.ndarray:
    """The format of nanoGPT: every text after an <|endoftext|>, uint16."""
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    return np.array([token for ids in encode_text(tokenizer, texts) for token in (end, *ids)], dtype=np.uint16)


def test_imported_shards_are_read_as_a_token_store(tokenizer, saved, tmp_path):
    arrays = {
        "corpus_train_000001": tokenized(tokenizer, TEXTS[:100]),
        "corpus_train_000002": tokenized(tokenizer, TEXTS[100:250])[5:],  # a shard may begin inside a document
        "corpus_val_000000": tokenized(tokenizer, TEXTS[250:]),
    }
    shards = save_shards(tmp_path / "shards", **arrays)
    output = succeeded("import", shards, "--tokenizer", saved, "--out", tmp_path / "imported")
    store = TokenStore(tmp_path / "imported")
    train = np.concatenate([arrays["corpus_train_000001"], arrays["corpus_train_000002"]])
    assert store.slice("train", 0, store.tokens("train")).tolist() == train.tolist()
    validation = arrays["corpus_val_000000"]
    assert store.slice("validation", 0, store.tokens("validation")).tolist() == validation.tolist()
    sizes = np.array(token_bytes(tokenizer))
    assert store.manifest.total("train", "utf8_bytes") == sizes[train].sum()
    assert output.splitlines()[:3] == [
        f"train: 249 documents, {len(train):,} tokens",
        f"validation: 50 documents, {len(validation):,} tokens",
        f"store  {tmp_path / 'imported'}",
    ]
    assert "all 3 shards" in succeeded("verify", tmp_path / "imported")
    mixture = write(tmp_path, "mixture.yaml", f"sources: {{a: 'store={tmp_path / 'imported'}'}}\n")
    (prepared,) = prepare_stores(read_mixture(mixture), tokenizer, tmp_path / "stores", 64, validation_share=0.1)
    assert prepared.slice("train", 10, 90).tolist() == train[10:90].tolist()
    assert prepared.manifest.kept == prepared.manifest.rows_in == 299


@pytest.mark.parametrize("names", [("train", "val"), ("edufineweb_train_000001", "edufineweb_val_000000")])
def test_real_gpt2_shards_are_imported(names, gpt2_tokenizer, shared_data, tmp_path):
    text = (shared_data / "tinystories" / "tinystories_sample_2mb.txt").read_text()
    stories = [story.strip() for story in text.split("<|endoftext|>")[:60]]
    arrays = [tokenized(gpt2_tokenizer, part) for part in (stories[:50], stories[50:])]
    assert arrays[0].max() == 50256 and arrays[0].dtype == np.uint16
    shards = save_shards(tmp_path / "shards", **dict(zip(names, arrays, strict=True)))
    output = succeeded("import", shards, "--tokenizer", shared_data / "gpt2_tokenizer", "--out", tmp_path / "imported")
    assert output.startswith(f"train: 50 documents, {len(arrays[0]):,} tokens\nvalidation: 10 documents, ")
    store = TokenStore(tmp_path / "imported")
    assert store.slice("train", 0, len(arrays[0])).tolist() == arrays[0].tolist()
    assert store.manifest.total("train", "utf8_bytes") == sum(len(story.encode()) for story in stories[:50])


GOOD = np.array([0, 1, 2, 3], dtype=np.uint16)  # 0 is the <|endoftext|> of the tests' tokenizer
BAD_SHARDS = {
    "an id beyond the vocabulary": (
        78,
        {"train": np.array([0, 1, 384], dtype=np.uint16), "val": GOOD},
        "id 384 at position 2",
    ),
    "no end of text": (78, {"train": GOOD, "val": GOOD[1:]}, "no <|endoftext|> (id 0)"),
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


@pytest.mark.parametrize("case", BAD_SHARDS)
def test_unusable_shards_are_refused_in_one_line_and_leave_no_files(case, tokenizer, saved, tmp_path):
    assert tokenizer.convert_tokens_to_ids(END_OF_TEXT) == 0 and len(tokenizer) == 384
    code, arrays, message = BAD_SHARDS[case]
    shards = save_shards(tmp_path / "shards", **arrays)
    assert message in refused(code, "import", shards, "--tokenizer", saved, "--out", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"not numpy at all", "archive", "folder", "short head"])
def test_a_shard_that_is_not_an_array_is_refused_in_one_line(content, saved, tmp_path):
    shards = save_shards(tmp_path / "shards", val=GOOD)
    if content == "folder":
        (shards / "train.npy").mkdir()
    elif content == "short head":
        whole = (shards / "val.npy").read_bytes()
        (shards / "train.npy").write_bytes(whole[:8] + bytes([whole[8] ^ 64]) + whole[9:])
    elif content == "archive":
        np.savez(shards / "train.npz", a=GOOD)
        (shards / "train.npz").rename(shards / "train.npy")
    else:
        (shards / "train.npy").write_bytes(content)
    assert "train.npy" in refused(65, "import", shards, "--tokenizer", saved, "--out", tmp_path / "out")


def test_only_names_with_the_word_val_are_validation_shards(saved, tmp_path):
    names = ("retrieval_000", "interval", "values_train", "corpus_train", "my-val-0", "val", "validation_1", "a_valid")
    shards = save_shards(tmp_path / "shards", **dict.fromkeys(names, GOOD))
    succeeded("import", shards, "--tokenizer", saved, "--out", tmp_path / "out")
    manifest = TokenStore(tmp_path / "out").manifest
    assert (manifest.total("train", "documents"), manifest.total("validation", "documents")) == (4, 4)


def test_import_is_refused_while_the_store_is_locked(saved, tmp_path):
    from rorchat.files import folder_lock

    shards = save_shards(tmp_path / "shards", train=GOOD, val=GOOD)
    (tmp_path / ".out.unfinished").mkdir()
    (tmp_path / ".out.unfinished" / "part-00000.json").write_text("{}")
    with folder_lock(tmp_path / "out"):
        assert "is in use by process" in refused(78, "import", shards, "--tokenizer", saved, "--out", tmp_path / "out")
    assert (tmp_path / ".out.unfinished" / "part-00000.json").exists()


def test_import_never_overwrites_a_folder(saved, tmp_path):
    shards = save_shards(tmp_path / "shards", train=GOOD, val=GOOD)
    (tmp_path / "out").mkdir()
    assert "exists" in refused(2, "import", shards, "--tokenizer", saved, "--out", tmp_path / "out")
    assert "No folder" in refused(65, "import", tmp_path / "none", "--tokenizer", saved, "--out", tmp_path / "new")


# -- plan ------------------------------------------------------------------------------------------------------------


def test_plan_prints_and_plots_the_tokens_of_each_source(texts, store, saved, tmp_path):
    sources = f"sources: {{a: 'text={texts}', b: 'store={store}'}}\n"
    phases = "phases: [{share: 100%, weights: {a: 1, b: 3}}]\n"
    mixture = write(tmp_path, "mixture.yaml", sources + phases)
    picture = tmp_path / "plan.png"
    arguments = ("--tokenizer", saved, "--stores", tmp_path / "stores", "--block_size", 32, *SHARE)
    output = succeeded("plan", mixture, *arguments, "--train_tokens", 3210, "--out", picture)
    assert output.startswith("mixture: 3,200 tokens to train on, in 100 rows of 32 tokens\n")
    assert output.endswith(f"plot  {picture}\n")
    assert re.findall(r"^    (\w) +([\d,]+) tokens .*of all", output, re.MULTILINE) == [("a", "800"), ("b", "2,400")]
    header = picture.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n" and min(np.frombuffer(header[16:24], dtype=">u4")) > 300
    assert (tmp_path / "stores" / "a" / "manifest.json").is_file()
    assert "--train_tokens 31 is less than one row" in refused(2, "plan", mixture, *arguments, "--train_tokens", 31)
    assert "PNG" in refused(2, "plan", mixture, *arguments, "--train_tokens", 3210, "--out", tmp_path / "plan.xyz")


def test_plan_prepares_stores_with_the_given_persona_and_seed(saved, tmp_path):
    persona = (Path(rorchat.__file__).parent / "persona.yaml").read_text().replace("RorChat", "Zebulon")
    write(tmp_path, "zebulon.yaml", persona)
    mixture = write(tmp_path, "mixture.yaml", "sources: {me: persona=100}\n")
    arguments = ("plan", mixture, "--tokenizer", saved, "--stores", tmp_path / "stores", "--block_size", 32, *SHARE)
    more = ("--train_tokens", 3200, "--persona", tmp_path / "zebulon.yaml")
    succeeded(*arguments, *more, "--seed", 5)
    assert TokenStore(tmp_path / "stores" / "me").manifest.seed == 5
    assert "its source (files, persona or " in refused(78, *arguments, "--train_tokens", 3200, "--seed", 5)
    assert "seed 5, now 0" in refused(78, *arguments, *more)


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
    "a weight without a source": ("sources: {a: text=x}\nweights: {b: 1}", "b"),
}


@pytest.mark.parametrize("case", MIXTURES)
def test_an_unreadable_mixture_is_refused_in_one_line(case, saved, tmp_path):
    content, message = MIXTURES[case]
    mixture = write(tmp_path, "mixture.yaml", content)
    arguments = ("--tokenizer", saved, "--stores", tmp_path / "stores", "--train_tokens", 3200, "--block_size", 32)
    line = refused(2, "plan", mixture, *arguments)
    assert message in line
    assert "Cannot read the mixture" in refused(2, "plan", tmp_path / "none.yaml", *arguments)
    (tmp_path / "latin.yaml").write_bytes(b"sources: \xff")
    assert "Cannot read the mixture" in refused(2, "plan", tmp_path / "latin.yaml", *arguments)
