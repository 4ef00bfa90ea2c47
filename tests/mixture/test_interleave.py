"""MIXTURE: the file says it, every row is a pure function of its number, and stores that do not fit are not mixed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support import located

from rorchat.errors import DataError, MismatchError, UsageError
from rorchat.mixture.config import MixtureConfig, Phase, Source, read_mixture
from rorchat.mixture.dataset import Mixture, ValidationRows
from rorchat.mixture.plan import Plan
from rorchat.mixture.stores import count_rows_per_epoch, prepare_stores
from rorchat.tokens.import_shards import import_shards
from rorchat.tokens.prepare import prepare

MIXTURE = """
sources:
  c4: c4=data/c4
  tales: {from: cosmopedia=data/tales, max_epochs: 4, optional: true}
  alpaca: alpaca=data/alpaca
phases:
  - {share: 60%, weights: {c4: 1}}
  - {share: 0.2, ramp_to: {tales: 50, alpaca: 6e-1}, replay: 10%}
  - {share: 20%}
  - {tokens: 2_000}
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "mixture.yaml"
    path.write_text(text)
    return path


# The file


def test_a_mixture_file_is_read_as_it_says(tmp_path):
    config = read_mixture(written(tmp_path, MIXTURE))
    assert config.sources["c4"] == Source("c4=data/c4")
    assert config.sources["tales"] == Source("cosmopedia=data/tales", 4.0, True)
    assert config.phases == (
        Phase(share=0.6, weights={"c4": 1.0}),
        Phase(share=0.2, ramp_to={"tales": 50.0, "alpaca": 0.6}, replay=0.1),
        Phase(share=0.2),
        Phase(tokens=2000),
    )
    assert json.loads(json.dumps(config.to_dict()))["phases"][3]["tokens"] == 2000


def test_a_mixture_file_without_phases_is_one_phase_by_its_weights_or_by_size(tmp_path):
    plain = read_mixture(written(tmp_path, "sources: {a: text=a, b: text=b}\n"))
    assert plain.phases == (Phase(share=1.0),)
    weighed = read_mixture(written(tmp_path, "sources: {a: text=a, b: text=b}\nweights: {a: 1, b: 30%}\n"))
    assert weighed.phases == (Phase(share=1.0, weights={"a": 1.0, "b": 0.3}),)


def test_two_files_that_say_the_same_in_other_words_resolve_alike_and_others_do_not(tmp_path):
    first = read_mixture(written(tmp_path, MIXTURE)).to_dict()
    other_words = MIXTURE.replace("60%", "0.6").replace("c4: c4=data/c4", "c4: {from: c4=data/c4}")
    assert read_mixture(written(tmp_path, other_words)).to_dict() == first
    assert read_mixture(written(tmp_path, MIXTURE.replace("50", "51"))).to_dict() != first


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("phases:", "phaess:", "unknown key 'phaess'. Did you mean 'phases'"),
        ("optional: true", "optinal: true", "source 'tales': unknown key 'optinal'. Did you mean 'optional'"),
        ("optional: true", "optional: maybe", "source 'tales': optional is 'maybe'; give true or false"),
        ("max_epochs: 4", "max_epochs: -1", "source 'tales': max_epochs is -1; give a number that is not negative"),
        ("max_epochs: 4", "max_epochs: 0", "max_epochs is 0; give a positive number"),
        ("c4: c4=data/c4", "c4: 5", "source 'c4' must hold `key: value` lines, it holds a int"),
        ("c4: c4=data/c4", "c4/x: c4=data/c4", "source 'c4/x': its name becomes a folder's"),
        ("alpaca: alpaca=data/alpaca", "c4: c4=twice", "key 'c4' stands twice"),
        ("{c4: 1}", "{alpaka: 1}", "phase 1: weights names 'alpaka', which is no source. Did you mean 'alpaca'"),
        ("{c4: 1}", "{c4: -1}", "phase 1: weights: c4 is -1; give a number that is not negative"),
        ("{c4: 1}", "{c4: true}", "phase 1: weights: c4 is True; give a number"),
        ("{c4: 1}", "{c4: .nan}", "phase 1: weights: c4 is nan; give a number"),
        ("{c4: 1}", "{c4: .inf}", "phase 1: weights: c4 is inf; give a number"),
        ("{c4: 1}", "{c4: 0}", "phase 1: weights are all 0"),
        ("{c4: 1}", "[1, 2]", r"phase 1: weights is \[1, 2\]; give one number a source"),
        ("share: 60%, weights", "share: 60%, weigths", "phase 1: unknown key 'weigths'. Did you mean 'weights'"),
        ("share: 60%", "share: 50%", "shares of the phases sum to 90 %: they must sum to 100 %"),
        ("share: 60%", "share: 160%", "phase 1: share is '160%'; give more than 0 and at most 100 %"),
        ("share: 60%", "share: 0", "phase 1: share is 0; give more than 0"),
        ("share: 60%", "share: 60%, tokens: 5", "phase 1: give its length as share .* or as tokens: one of the two"),
        ("share: 60%, weights", "weights", "phase 1: give its length as share"),
        ("60%, weights", "60%, ramp_to", "phase 1: ramp_to goes on from the phase before, and this is the first"),
        ("60%, weights", "60%, replay: 5%, weights", "phase 1: replay goes on from the phase before"),
        ("0.2, ramp_to", "0.2, weights: {c4: 1}, ramp_to", "phase 2: both weights and ramp_to"),
        ("replay: 10%", "replay: lots", "phase 2: replay is 'lots'; give a number"),
        ("share: 20%}", "share: 20%, replay: 10%}", "phase 3: replay without weights or ramp_to"),
        ("tokens: 2_000", "tokens: 0.5", "phase 4: tokens is 0.5; give a whole number"),
        ("phases:", "weights: {c4: 1}\nphases:", "both phases and weights"),
        ("phases:", "phases: []\nother:", "unknown key 'other'"),
    ],
)
def test_a_mistake_in_a_mixture_file_is_one_line_that_says_where(old, new, said, tmp_path):
    assert old in MIXTURE
    path = written(tmp_path, MIXTURE.replace(old, new, 1))
    with pytest.raises(UsageError, match=said) as failure:
        read_mixture(path)
    assert str(path) in str(failure.value) and "\n" not in str(failure.value)


@pytest.mark.parametrize(
    "text", ["", "5", "sources: []", "sources: {}", "sources: {a: text=a}\nphases: 3", "{", "? {a: 1}\n: 2"]
)
def test_what_is_no_mixture_file_is_one_line_too(text, tmp_path):
    with pytest.raises(UsageError) as failure:
        read_mixture(written(tmp_path, text))
    assert str(tmp_path) in str(failure.value) and "\n" not in str(failure.value)
    with pytest.raises(UsageError, match="Cannot read the mixture .*missing.yaml: No such file"):
        read_mixture(tmp_path / "missing.yaml")


# The rows


class CountingStore:
    """A store whose tokens are the numbers `first`, `first` + 1, ..., so that a row shows where it comes from."""

    def __init__(self, name: str, train: int, validation: int = 0, first: int = 0):
        self.name, self.folder, self.first = name, Path(name), first
        self._tokens = {"train": train, "validation": validation}

    def tokens(self, split: str) -> int:
        return self._tokens[split]

    def slice(self, split: str, start: int, stop: int) -> np.ndarray:
        assert 0 <= start < stop <= self._tokens[split]
        return np.arange(self.first + start, self.first + stop)


@pytest.fixture
def stores() -> list[CountingStore]:
    return [CountingStore(f"s{n}", size, first=10_000 * n) for n, size in enumerate((1000, 333, 2050))]


def mixture_of(stores, weights, block_size, rows, seed=0) -> Mixture:
    given = None if weights is None else {store.name: w for store, w in zip(stores, weights, strict=True)}
    config = MixtureConfig({store.name: Source("text") for store in stores}, (Phase(share=1.0, weights=given),))
    return Mixture(stores, Plan(config, count_rows_per_epoch(stores, block_size), rows, block_size), seed)


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.7, 0.2, 0.1], [1, 1000, 1], [3, 0.001, 8], None])
def test_shares_are_exact_at_every_prefix_within_one_row(weights, stores):
    dataset = mixture_of(stores, weights, block_size=10, rows=3000)
    given = np.array(weights or [100, 33, 205], dtype=float)  # without weights: whole rows of each source
    sources = located(dataset.plan)[:, 0]
    seen = np.cumsum(sources[:, None] == np.arange(3), axis=0)
    expected = np.arange(1, 3001)[:, None] * (given / given.sum())
    assert np.abs(seen - expected).max() <= 1


def test_a_row_is_a_pure_function_of_its_number(stores):
    first = mixture_of(stores, [5, 2, 3], block_size=16, rows=400, seed=7)
    longer = mixture_of(stores, [5, 2, 3], block_size=16, rows=900, seed=7)
    expected = [first[row]["input_ids"].tolist() for row in range(400)]
    assert [longer[row]["input_ids"].tolist() for row in reversed(range(400))][::-1] == expected
    order = np.random.default_rng(0).permutation(400)
    again = mixture_of(stores[::-1], [3, 2, 5], block_size=16, rows=400, seed=7)
    again.plan.locate(399)
    assert sorted(map(tuple, expected)) == sorted(tuple(again[int(row)]["input_ids"].tolist()) for row in order)


def test_a_row_is_a_window_of_its_source_and_its_labels_are_its_ids(stores):
    dataset = mixture_of(stores, [5, 2, 3], block_size=16, rows=300)
    assert len(dataset) == 300
    for row in range(300):
        source, offset = dataset.locate(row)
        ids, labels = dataset[row]["input_ids"], dataset[row]["labels"]
        first = 10_000 * source + offset
        assert ids.tolist() == list(range(first, first + 16)) == labels.tolist()
        assert offset % 16 == 0 and ids.dtype == labels.dtype == torch.int64
    with pytest.raises(IndexError):
        dataset[300]


def test_every_window_of_a_source_comes_once_in_every_epoch_and_in_another_order(stores):
    dataset = mixture_of(stores, [1, 1, 1], block_size=10, rows=3000)
    for source, windows in enumerate((100, 33, 205)):
        offsets = [offset for s, offset in map(dataset.locate, range(3000)) if s == source]
        assert len(offsets) == 1000
        epochs = [offsets[start : start + windows] for start in range(0, 1000 - windows + 1, windows)]
        assert len(epochs) == 1000 // windows >= 4
        for epoch in epochs:
            assert sorted(epoch) == [10 * window for window in range(windows)]
        assert len(set(map(tuple, epochs))) == len(epochs)


def test_another_seed_gives_another_order_of_the_same_rows(stores):
    first, other = (mixture_of(stores, [5, 2, 3], block_size=10, rows=500, seed=seed) for seed in (0, 1))
    assert (located(first.plan) == located(other.plan)).all()
    differing = sum(first.locate(row) != other.locate(row) for row in range(500))
    assert differing > 400


def test_a_source_added_later_leaves_the_order_within_the_others_alone(stores):
    two = mixture_of(stores[:2], [1, 1], block_size=10, rows=60)
    three = mixture_of(stores[::-1], [1, 1, 1], block_size=10, rows=90)
    for name in ("s0", "s1"):
        before, after = (
            [offset for s, offset in map(dataset.locate, range(len(dataset))) if dataset.stores[s].name == name]
            for dataset in (two, three)
        )
        assert before == after and len(before) == 30


def test_a_source_smaller_than_one_row_is_a_data_error(stores):
    with pytest.raises(DataError, match="s1 has 333 training tokens, less than one row of 500"):
        count_rows_per_epoch(stores, 500)


@pytest.mark.parametrize("tokens", [2, 9, 10, 11, 19, 20, 100, 101])
def test_validation_rows_predict_every_token_but_the_first_exactly_once(tokens):
    store = CountingStore("s", 100, validation=tokens, first=500)
    rows = ValidationRows(store, block_size=10)
    predicted, widths = [], []
    for number in range(len(rows)):
        row = rows[number]
        assert row["input_ids"].tolist() == row["labels"].tolist()
        widths.append(len(row["labels"]))
        predicted += row["labels"][1:].tolist()  # the loss shifts: the first label of a row is never asked for
    assert predicted == list(range(501, 500 + tokens))
    assert all(width == 10 for width in widths[:-1]) and 2 <= widths[-1] <= 10


# The recipe


def pretrain_arguments(folder: Path, **more):
    from rorchat.training.pretrain import PretrainArguments

    settings = {"output_dir": str(folder / "run"), "block_size": 16, "global_batch_tokens": 16, "max_steps": 9}
    return PretrainArguments(**settings | {"per_device_train_batch_size": 1, "use_cpu": True} | more)


def test_a_mixture_excludes_sources_and_weights_and_stands_for_them(tmp_path):
    path = str(written(tmp_path, MIXTURE))
    for more in ({"sources": ["text=a"]}, {"weights": [1.0]}):
        with pytest.raises(UsageError, match=f"Both mixture and {next(iter(more))}"):
            pretrain_arguments(tmp_path, mixture=path, **more)
    assert pretrain_arguments(tmp_path, mixture=path).specs() == [
        "c4=data/c4",
        "cosmopedia=data/tales",
        "alpaca=data/alpaca",
    ]
    with pytest.raises(UsageError, match="No sources"):
        pretrain_arguments(tmp_path)


def test_a_run_compares_what_its_mixture_file_says_and_not_its_name(tmp_path):
    from rorchat.training.checkpointing.fingerprint import data_fingerprint

    path = written(tmp_path, MIXTURE)
    first = data_fingerprint(pretrain_arguments(tmp_path, mixture=str(path)))
    path.write_text(MIXTURE.replace("50", "51"))
    assert data_fingerprint(pretrain_arguments(tmp_path, mixture=str(path))) != first
    path.write_text(MIXTURE + "# a comment\n")
    assert data_fingerprint(pretrain_arguments(tmp_path, mixture=str(path))) == first


def test_a_difference_between_mixtures_is_said_by_its_place(tmp_path):
    from rorchat.training.checkpointing.fingerprint import differences

    before = read_mixture(written(tmp_path, MIXTURE)).to_dict()
    now = read_mixture(written(tmp_path, MIXTURE.replace("{c4: 1}", "{c4: 2}"))).to_dict()
    (found,) = differences({"mixture": before}, {"mixture": now}, elastic=True)
    assert (found.name, found.before, found.now, found.is_fatal) == ("mixture.phases.1.weights.c4", 1.0, 2.0, True)
    assert differences({"mixture": before}, {"mixture": before}, elastic=True) == []
    (found,) = differences({"a": {"b": [1]}}, {"a": {"b": [1, 2]}}, elastic=True)
    assert (found.name, found.before, found.now) == ("a.b", [1], [1, 2])


def test_what_changes_roundings_alone_is_told_and_what_decides_is_fatal():
    from rorchat.training.checkpointing.fingerprint import differences

    before = {"settings": {"learning_rate": 1e-3, "per_device_train_batch_size": 4, "logging_steps": 5}, "processes": 1}
    before |= {"versions": {"torch": "2.12"}}
    now = {"settings": {"learning_rate": 1e-4, "per_device_train_batch_size": 2, "logging_steps": 1}, "processes": 2}
    now |= {"versions": {"torch": "2.13"}}
    elastic, rigid = (
        {each.name: each.is_fatal for each in differences(before, now, elastic=elastic)} for elastic in (True, False)
    )
    assert elastic == {
        "learning_rate": True, "per_device_train_batch_size": False, "processes": False, "versions.torch": False,
    }  # fmt: skip
    assert [name for name in rigid if rigid[name]] == ["learning_rate", "per_device_train_batch_size", "processes"]


def test_an_optional_source_that_fails_is_reported_and_left_out_and_another_stops_the_run(
    tmp_path, monkeypatch, capsys
):
    from rorchat.mixture import dataset

    def prepared(spec, tokenizer, folder, **options):
        if spec == "cosmopedia=data/tales":
            raise DataError("data/tales is not there.")
        return CountingStore(folder.name, 8 if spec.startswith("alpaca") else 100)

    monkeypatch.setattr(dataset, "prepare", prepared)
    optional = MIXTURE.replace("alpaca: alpaca=data/alpaca", "alpaca: {from: alpaca=x, optional: true}")

    def stores(text: str) -> list[str]:
        config = read_mixture(written(tmp_path, text))
        return [store.name for store in dataset.prepare_stores(config, None, tmp_path, 16, validation_share=0.1)]

    assert stores(optional) == ["c4"]
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "source tales is optional and left out: data/tales is not there."
    assert told[1].startswith("source alpaca is optional and left out: ") and "less than one row of 16" in told[1]
    with pytest.raises(DataError, match="less than one row of 16"):
        stores(MIXTURE)


# Where sources are mixed


@pytest.fixture
def texts(tmp_path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"Document {n} says hello {n * 7919 % 1000}."}) + "\n" for n in range(400))
    )
    return path


def split_of(store, split: str, tokenizer) -> set[str]:
    ids = store.slice(split, 0, store.tokens(split)).tolist()
    return set(tokenizer.decode(ids).split("<|endoftext|>")) - {""}


def test_a_store_that_holds_out_another_share_is_not_mixed(texts, tokenizer, tmp_path):
    prepare(f"text={texts}", tokenizer, tmp_path / "small", validation_share=0.05, workers=1)
    prepare(f"text={texts}", tokenizer, tmp_path / "same", validation_share=0.2, workers=1)

    def stores(*specs: str) -> list:
        return prepare_stores(
            MixtureConfig.from_specs([*specs]), tokenizer, tmp_path / "tokens", 16, validation_share=0.2
        )

    with pytest.raises(
        MismatchError, match="holds out 0.05 of its documents, this mixture 0.2.*Set validation_share to"
    ):
        stores(f"store={tmp_path / 'small'}", f"text={texts}")
    first, second = stores(f"store={tmp_path / 'same'}", f"text={texts}")
    held_out = split_of(second, "validation", tokenizer)
    assert len(held_out) > 40 and not held_out & split_of(first, "train", tokenizer)
    assert len(stores(f"store={tmp_path / 'small'}")) == 1  # alone it agrees with itself


def test_a_store_that_was_tokenized_elsewhere_is_mixed_with_a_word_of_warning(texts, tokenizer, tmp_path, capsys):
    shards = tmp_path / "shards"
    shards.mkdir()
    ids = tokenizer("<|endoftext|>Somebody else said this, and more than this, and then went home to sleep.")[
        "input_ids"
    ]
    for name in ("train", "val"):
        np.save(shards / f"{name}.npy", np.array(ids * 3, dtype=np.uint16))
    import_shards(shards, tokenizer, tmp_path / "theirs")
    config = MixtureConfig.from_specs([f"store={tmp_path / 'theirs'}", f"text={texts}"])
    assert len(prepare_stores(config, tokenizer, tmp_path / "tokens", 16, validation_share=0.2)) == 2
    assert f"{tmp_path / 'theirs'} was tokenized elsewhere: what other sources hold out may" in capsys.readouterr().err
    prepare_stores(
        MixtureConfig.from_specs([config.sources["store"].spec]), tokenizer, tmp_path, 16, validation_share=0.2
    )
    assert capsys.readouterr().err == ""


RANK = """
import sys
from pathlib import Path
from torch import distributed
from rorchat.errors import RemoteError
from rorchat.tokenizer import load_tokenizer
from rorchat.tokens import mixture
from rorchat.tokens.phases import MixtureConfig, Source
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
prepare = mixture.prepare
def flaky(spec, *arguments, **options):
    if rank == FAILING and "other" in spec:
        raise RemoteError("timeout")
    return prepare(spec, *arguments, **options)
mixture.prepare = flaky
names = {"texts": Source(f"text={folder}/texts.jsonl"), "other": Source(f"text={folder}/other.jsonl", optional=True)}
class InTurn:
    def __enter__(self):
        if rank: distributed.barrier()
    def __exit__(self, *_):
        if not rank: distributed.barrier()
tokenizer = load_tokenizer(str(folder / "tokenizer"))
stores = mixture.prepare_stores(
    MixtureConfig(names, ()), tokenizer, folder / "tokens", 16, validation_share=0.2, first=InTurn
)
print("STORES", [store.name for store in stores])
distributed.barrier()
distributed.destroy_process_group()  # else a process may abort as the other leaves
"""


@pytest.mark.parametrize("failing", [0, 1, None])
def test_an_optional_source_that_fails_in_one_process_is_left_out_in_all(failing, texts, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "other.jsonl").write_text(texts.read_text())
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK.replace("FAILING", str(failing)), str(rank), str(tmp_path)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    names = "['texts']" if failing is not None else "['texts', 'other']"
    assert [out.partition("STORES ")[2].strip() for out, _ in said] == [names] * 2
    assert [err.count("source other is optional and left out") > 0 for _, err in said] == [failing is not None, False]
