"""TOKENS: what is stored is what was read, and which row comes when is a pure function of the plan."""

import copy
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from rorchat.chatml import END_OF_TEXT, encode_text
from rorchat.errors import DataError, MismatchError, UsageError
from rorchat.sources import in_validation
from rorchat.tokens.batch import padded
from rorchat.tokens.mixture import Mixture, ValidationRows, _merged
from rorchat.tokens.prepare import prepare
from rorchat.tokens.store import Manifest, Shard, TokenStore

SHARE = 0.2
DOCUMENTS = [
    f"Document {n}: the {'very ' * (n % 7)}small model says “naïve café 你好 🙂” {n} times.\n" for n in range(120)
]
DOCUMENTS += ["  LEADING blanks and CAPITALS  ", "leading Blanks\nand capitals", "text that says <|endoftext|> itself"]
DOCUMENTS += [DOCUMENTS[3]] * 3


def write_documents(folder: Path, documents: list[str], name: str = "documents.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents))
    return f"text={path}"


def decoded(store: TokenStore, split: str, tokenizer) -> list[str]:
    """The documents of a split, cut at the document starts that the store keeps beside each shard."""
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


def files_of(folder: Path) -> dict[str, str]:
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    assert len(found) >= 5
    return found


@pytest.fixture
def spec(tmp_path) -> str:
    return write_documents(tmp_path, DOCUMENTS)


@pytest.fixture
def store(spec, tokenizer, tmp_path) -> TokenStore:
    return prepare(spec, tokenizer, tmp_path / "store", validation_share=SHARE)


def test_a_store_decodes_to_the_documents_it_was_made_of(store, tokenizer):
    assert decoded(store, "train", tokenizer) == [text for text in DOCUMENTS if not in_validation(text, SHARE)]
    assert decoded(store, "validation", tokenizer) == [text for text in DOCUMENTS if in_validation(text, SHARE)]


def test_the_ids_of_a_store_are_each_document_after_an_end_of_text(store, tokenizer):
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    expected = [
        token
        for text, ids in zip(DOCUMENTS, encode_text(tokenizer, DOCUMENTS), strict=True)
        if not in_validation(text, SHARE)
        for token in [end, *ids]
    ]
    assert store.slice("train", 0, store.tokens("train")).tolist() == expected
    # A text that spells a control token does not begin a document
    assert expected.count(end) == store.manifest.total("train", "documents")


def test_the_manifest_adds_up(store, tokenizer):
    manifest = store.manifest
    assert (manifest.rows_in, manifest.kept, manifest.rejects) == (len(DOCUMENTS), len(DOCUMENTS), {})
    for split, documents in (
        ("train", [text for text in DOCUMENTS if not in_validation(text, SHARE)]),
        ("validation", [text for text in DOCUMENTS if in_validation(text, SHARE)]),
    ):
        assert len(documents) > 5
        assert manifest.total(split, "documents") == len(documents)
        assert manifest.total(split, "utf8_bytes") == sum(len(text.encode()) for text in documents)
        tokens = sum(len(ids) + 1 for ids in encode_text(tokenizer, documents))
        assert manifest.total(split, "tokens") == store.tokens(split) == tokens
        assert manifest.summary()[f"{split}_tokens"] == tokens
    assert manifest.vocabulary_size == len(tokenizer) == 384
    assert Manifest.read(store.folder) == manifest


def test_the_manifest_counts_what_was_rejected(tokenizer, tmp_path):
    spec = write_documents(tmp_path, DOCUMENTS)
    with open(spec.partition("=")[2], "a") as file:
        file.write('5\n{"text": " "}\n{"text": "\\ud800"}\n')
    manifest = prepare(spec, tokenizer, tmp_path / "store", validation_share=SHARE).manifest
    assert manifest.rejects == {"wrong type": 1, "empty text": 1, "invalid Unicode": 1}
    assert manifest.rows_in == manifest.kept + 3 == len(DOCUMENTS) + 3


def test_the_sha256_in_the_manifest_is_that_of_the_file(store):
    assert len(store.manifest.shards) >= 2
    for shard in store.manifest.shards:
        assert hashlib.sha256((store.folder / shard.file).read_bytes()).hexdigest() == shard.sha256


def test_a_second_run_writes_the_same_bytes(spec, store, tokenizer, tmp_path):
    again = prepare(spec, tokenizer, tmp_path / "again", validation_share=SHARE)
    assert files_of(again.folder) == files_of(store.folder)


def test_a_finished_store_is_found_and_not_made_again(spec, store, tokenizer):
    Path(spec.partition("=")[2]).unlink()  # it would fail if it were read again
    before = {path.name: path.stat().st_mtime_ns for path in store.folder.iterdir()}
    found = prepare(spec, tokenizer, store.folder, validation_share=SHARE)
    assert found.manifest == store.manifest
    assert {path.name: path.stat().st_mtime_ns for path in store.folder.iterdir()} == before


def test_several_shards_read_the_same_as_one(spec, store, tokenizer, tmp_path):
    many = prepare(spec, tokenizer, tmp_path / "many", validation_share=SHARE, tokens_per_shard=200)
    assert sum(shard.split == "train" for shard in many.manifest.shards) > 5
    assert sum(shard.split == "validation" for shard in many.manifest.shards) > 1
    for split in ("train", "validation"):
        tokens = store.tokens(split)
        assert many.tokens(split) == tokens
        whole = store.slice(split, 0, tokens)
        assert (many.slice(split, 0, tokens) == whole).all()
        for start in range(0, tokens - 1, 17):
            for stop in (start + 1, start + 16, min(start + 450, tokens)):
                assert (many.slice(split, start, min(stop, tokens)) == whole[start:stop]).all()
        assert decoded(many, split, tokenizer) == decoded(store, split, tokenizer)
        for what in ("documents", "utf8_bytes"):
            assert many.manifest.total(split, what) == store.manifest.total(split, what)
    assert store.slice("train", 0, 5).dtype == np.int64


def test_duplicates_never_straddle_the_hold_out_whatever_their_case_and_blanks(tokenizer, tmp_path):
    originals = [f"The story number {n} is told." for n in range(200)]
    copies = [text.upper() for text in originals] + [f" {text.replace(' ', '  ')}\n\n" for text in originals]
    store = prepare(
        write_documents(tmp_path, originals + copies + originals), tokenizer, tmp_path / "s", validation_share=SHARE
    )
    train, validation = (
        {" ".join(text.lower().split()) for text in decoded(store, split, tokenizer)}
        for split in ("train", "validation")
    )
    assert train & validation == set()
    assert len(train) + len(validation) == 200 and 20 < len(validation) < 60


def test_a_store_of_another_tokenizer_share_seed_or_source_is_a_mismatch(spec, store, tokenizer, tmp_path):
    from rorchat.tokenizer import train_tokenizer

    other = train_tokenizer(DOCUMENTS, vocab_size=384)
    with pytest.raises(MismatchError, match="holds other tokens: tokenizer_sha256 .* Delete it") as failure:
        prepare(spec, other, store.folder, validation_share=SHARE)
    assert failure.value.exit_code == 78 and "\n" not in str(failure.value)
    with pytest.raises(MismatchError, match=f"validation_share {SHARE}, now 0.3"):
        prepare(spec, tokenizer, store.folder, validation_share=0.3)
    with pytest.raises(MismatchError, match="seed 0, now 1"):
        prepare(spec, tokenizer, store.folder, validation_share=SHARE, seed=1)
    with pytest.raises(MismatchError, match="source .*now 'tinytown=10'"):
        prepare("tinytown=10", tokenizer, store.folder, validation_share=SHARE)


def test_another_system_message_does_not_disown_a_store(spec, store, tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = tokenizer.chat_template.replace("RorChat", "Bibo")
    assert prepare(spec, other, store.folder, validation_share=SHARE).manifest == store.manifest


@pytest.mark.parametrize(("share", "said"), [(0.0, "no validation documents"), (1.0, "no train documents")])
def test_no_validation_or_no_training_is_a_data_error_that_leaves_no_folder_behind(
    share, said, spec, tokenizer, tmp_path
):
    with pytest.raises(DataError, match=f"{said}, {len(DOCUMENTS)} in all at validation_share {share}"):
        prepare(spec, tokenizer, tmp_path / "store", validation_share=share)
    assert [path.name for path in tmp_path.iterdir()] == ["documents.jsonl"]


def test_a_source_that_fails_while_it_is_read_leaves_no_folder_behind(tokenizer, tmp_path):
    spec = write_documents(tmp_path, [])
    with pytest.raises(DataError, match="is empty"):
        prepare(spec, tokenizer, tmp_path / "store", validation_share=SHARE)
    assert [path.name for path in tmp_path.iterdir()] == ["documents.jsonl"]


def test_what_a_killed_run_left_behind_is_made_anew(spec, store, tokenizer, tmp_path):
    left = tmp_path / ".again.unfinished"
    left.mkdir()
    (left / "train-00007.npy").write_bytes(b"half")
    again = prepare(spec, tokenizer, tmp_path / "again", validation_share=SHARE)
    assert files_of(again.folder) == files_of(store.folder) and not left.exists()


def test_ids_above_65535_are_stored_in_32_bits_and_smaller_vocabularies_in_16(spec, store, tokenizer, tmp_path):
    assert np.load(store.folder / "train-00000.npy").dtype == np.uint16
    large = copy.deepcopy(tokenizer)
    large.add_tokens([f"word{number}" for number in range(66_000)])
    documents = [f"A text with word{number} and word65999" for number in range(40)]
    stored = prepare(
        write_documents(tmp_path, documents, "large.jsonl"), large, tmp_path / "large", validation_share=SHARE
    )
    assert np.load(stored.folder / "train-00000.npy").dtype == np.uint32
    ids = stored.slice("train", 0, stored.tokens("train"))
    assert ids.max() == large.convert_tokens_to_ids("word65999") > 65_535
    assert sorted(decoded(stored, "train", large) + decoded(stored, "validation", large)) == sorted(documents)


def test_gpt2s_own_vocabulary_fits_into_16_bits(gpt2_tokenizer, spec, tmp_path):
    store = prepare(spec, gpt2_tokenizer, tmp_path / "gpt2", validation_share=SHARE)
    assert np.load(store.folder / "train-00000.npy").dtype == np.uint16
    assert store.slice("train", 0, 1).tolist() == [50256]
    assert decoded(store, "train", gpt2_tokenizer) == [text for text in DOCUMENTS if not in_validation(text, SHARE)]


def test_a_truncated_shard_is_one_line_that_says_what_to_delete(store):
    path = store.folder / "train-00000.npy"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(
        DataError, match=f"{path} cannot be read.* Delete {store.folder} to prepare it again"
    ) as failure:
        TokenStore(store.folder)
    assert "\n" not in str(failure.value)


def test_a_shard_of_another_length_than_its_manifest_says_is_a_mismatch(store):
    path = store.folder / "train-00000.npy"
    ids = np.load(path)
    np.save(path, ids[:-5])
    with pytest.raises(MismatchError, match=f"has {len(ids) - 5:,} tokens, its manifest says {len(ids):,}"):
        TokenStore(store.folder)


def test_a_missing_shard_or_manifest_is_a_data_error(store):
    (store.folder / "validation-00000.npy").unlink()
    with pytest.raises(DataError, match=r"validation-00000\.npy cannot be read"):
        TokenStore(store.folder)
    manifest = store.folder / "manifest.json"
    manifest.write_text(manifest.read_text()[:-40])
    with pytest.raises(DataError, match=r"manifest\.json cannot be read"):
        TokenStore(store.folder)
    manifest.unlink()
    with pytest.raises(DataError, match="is no token store: it has no manifest.json"):
        TokenStore(store.folder)


def counting_store(folder: Path, tokens: int, validation: int = 0, first: int = 0) -> TokenStore:
    """A store of the numbers `first`, `first` + 1, ... as its tokens, so that a row shows where it comes from."""
    folder.mkdir()
    shards = []
    for split, count in (("train", tokens), ("validation", validation)):
        if count:
            np.save(folder / f"{split}-00000.npy", np.arange(first, first + count, dtype=np.uint16))
            shards.append(Shard(f"{split}-00000.npy", split, count, 1, count, ""))
    Manifest(f"text={folder}", "none", "", 65_536, 0, 0.1, 0, shards=shards).write(folder)
    return TokenStore(folder)


@pytest.fixture
def stores(tmp_path) -> list[TokenStore]:
    sizes = (1000, 333, 2050)
    return [counting_store(tmp_path / f"s{n}", size, first=10_000 * n) for n, size in enumerate(sizes)]


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.7, 0.2, 0.1], [1, 1000, 1], [3, 0.001, 8], None])
def test_shares_are_exact_at_every_prefix_within_one_row(weights, stores):
    mixture = Mixture(stores, weights, block_size=10, rows=3000, seed=0)
    given = np.array(weights or [100, 33, 205], dtype=float)  # without weights: whole rows of each source
    shares = given / given.sum()
    seen = np.cumsum(mixture.source_of_row[:, None] == np.arange(3), axis=0)
    expected = np.arange(1, 3001)[:, None] * shares
    assert np.abs(seen - expected).max() <= 1
    assert np.allclose(mixture.shares, shares)


def test_with_many_sources_no_share_is_ever_off_by_more_than_half_a_row_a_source():
    draw = np.random.default_rng(0)
    for sources in (1, 2, 4, 8, 16):
        for _ in range(20):
            shares = draw.random(sources) ** 3 + 1e-3
            shares /= shares.sum()
            source_of_row, _ = _merged(shares, 2000)
            seen = np.cumsum(source_of_row[:, None] == np.arange(sources), axis=0)
            assert np.abs(seen - np.arange(1, 2001)[:, None] * shares).max() <= max(1, sources / 2)


def test_a_row_is_a_pure_function_of_its_number(stores):
    first = Mixture(stores, [5, 2, 3], block_size=16, rows=400, seed=7)
    longer = Mixture(stores, [5, 2, 3], block_size=16, rows=900, seed=7)
    expected = [first[row]["input_ids"].tolist() for row in range(400)]
    assert [longer[row]["input_ids"].tolist() for row in reversed(range(400))][::-1] == expected
    order = np.random.default_rng(0).permutation(400)
    again = Mixture(stores, [5, 2, 3], block_size=16, rows=400, seed=7)
    assert all(again[int(row)]["input_ids"].tolist() == expected[row] for row in order)


def test_a_row_is_a_window_of_its_source_and_its_labels_are_its_ids(stores):
    mixture = Mixture(stores, [5, 2, 3], block_size=16, rows=300, seed=0)
    assert len(mixture) == 300
    for row in range(300):
        source, offset = mixture.locate(row)
        ids, labels = mixture[row]["input_ids"], mixture[row]["labels"]
        first = 10_000 * source + offset
        assert ids.tolist() == list(range(first, first + 16)) == labels.tolist()
        assert offset % 16 == 0 and ids.dtype == labels.dtype == torch.int64


def test_every_window_of_a_source_comes_once_in_every_epoch_and_in_another_order(stores):
    mixture = Mixture(stores, [1, 1, 1], block_size=10, rows=3000, seed=0)
    for source, windows in enumerate((100, 33, 205)):
        offsets = [offset for s, offset in map(mixture.locate, range(3000)) if s == source]
        assert len(offsets) == 1000
        epochs = [offsets[start : start + windows] for start in range(0, 1000 - windows + 1, windows)]
        assert len(epochs) == 1000 // windows >= 4
        for epoch in epochs:
            assert sorted(epoch) == [10 * window for window in range(windows)]
        assert len(set(map(tuple, epochs))) == len(epochs)


def test_another_seed_gives_another_order_of_the_same_rows(stores):
    first, other = (Mixture(stores, [5, 2, 3], block_size=10, rows=500, seed=seed) for seed in (0, 1))
    assert (first.source_of_row == other.source_of_row).all()
    differing = sum(first.locate(row) != other.locate(row) for row in range(500))
    assert differing > 400


def test_a_source_added_later_leaves_the_order_within_the_others_alone(stores):
    two = Mixture(stores[:2], [1, 1], block_size=10, rows=60, seed=0)
    three = Mixture(stores[::-1], [1, 1, 1], block_size=10, rows=90, seed=0)
    for name in ("s0", "s1"):
        before, after = (
            [offset for s, offset in map(mixture.locate, range(len(mixture))) if mixture.stores[s].name == name]
            for mixture in (two, three)
        )
        assert before == after and len(before) == 30


def test_the_plan_says_what_each_source_gives(stores):
    plan = Mixture(stores, [2, 1, 1], block_size=10, rows=400, seed=0).plan()
    assert [(part["share"], part["tokens"], part["epochs"]) for part in plan] == [
        (0.5, 2000, 200 / 100),
        (0.25, 1000, 100 / 33),
        (0.25, 1000, 100 / 205),
    ]
    assert [part["source"] for part in plan] == [store.manifest.source for store in stores]


@pytest.mark.parametrize(
    "weights", [[1.0], [1.0, 2.0], [1, 2, 3, 4], [1, 0, 1], [1, -1, 1], [1, float("nan"), 1], [1, float("inf"), 1]]
)
def test_wrong_weights_are_a_usage_error(weights, stores):
    with pytest.raises(
        UsageError, match=rf"{len(weights)} weights .* for 3 sources: give one positive number a source"
    ):
        Mixture(stores, weights, block_size=10, rows=100, seed=0)


def test_a_source_smaller_than_one_row_is_a_data_error(stores):
    with pytest.raises(DataError, match="s1 has 333 training tokens, less than one row of 500"):
        Mixture(stores, None, block_size=500, rows=10, seed=0)


@pytest.mark.parametrize("tokens", [2, 9, 10, 11, 19, 20, 100, 101])
def test_validation_rows_predict_every_token_but_the_first_exactly_once(tokens, tmp_path):
    store = counting_store(tmp_path / "s", 100, validation=tokens, first=500)
    rows = ValidationRows(store, block_size=10)
    predicted, widths = [], []
    for number in range(len(rows)):
        row = rows[number]
        assert row["input_ids"].tolist() == row["labels"].tolist()
        widths.append(len(row["labels"]))
        predicted += row["labels"][1:].tolist()  # the loss shifts: the first label of a row is never asked for
    assert predicted == list(range(501, 500 + tokens))
    assert all(width == 10 for width in widths[:-1]) and 2 <= widths[-1] <= 10


def test_a_batch_is_padded_on_the_right_and_no_loss_counts_the_padding():
    rows = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": torch.tensor([4]), "labels": [4]}]
    batch = padded(rows, pad_id=9)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [4, -100, -100]]
