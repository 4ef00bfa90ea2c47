"""Stores are prepared for a mixture, and stores with different validation splits are refused."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import preloaded
import pytest
from mixture_support import MIXTURE, CountingStore, write_mixture

from rorchat.errors import DataError, MismatchError
from rorchat.mixture.mixture_file import MixtureConfig, read_mixture
from rorchat.mixture.stores import prepare_stores
from rorchat.tokens.import_shards import import_shards
from rorchat.tokens.prepare import prepare


def test_only_optional_sources_may_fail(tmp_path, monkeypatch, capsys):
    from rorchat.mixture import stores as stores_module

    def prepared(spec, tokenizer, folder, **options):
        if spec == "cosmopedia=data/tales":
            raise DataError("data/tales is not there.")
        return CountingStore(folder.name, 8 if spec.startswith("alpaca") else 100)

    monkeypatch.setattr(stores_module, "prepare", prepared)
    optional = MIXTURE.replace("alpaca: alpaca=data/alpaca", "alpaca: {from: alpaca=x, optional: true}")

    def stores(text: str) -> list[str]:
        config = read_mixture(write_mixture(tmp_path, text))
        return [store.name for store in prepare_stores(config, None, tmp_path, 16, validation_share=0.1)]

    assert stores(optional) == ["c4"]
    messages = capsys.readouterr().err.splitlines()
    assert messages[0] == "optional source tales is omitted: data/tales is not there."
    assert messages[1].startswith("optional source alpaca is omitted: ") and "less than one row of 16" in messages[1]
    with pytest.raises(DataError, match="less than one row of 16"):
        stores(MIXTURE)


@pytest.fixture
def texts(tmp_path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"Document {n} says hello {n * 7919 % 1000}."}) + "\n" for n in range(400))
    )
    return path


def texts_of(store, split: str, tokenizer) -> set[str]:
    ids = store.slice(split, 0, store.tokens(split)).tolist()
    return set(tokenizer.decode(ids).split("<|endoftext|>")) - {""}


def test_a_store_with_another_validation_share_is_refused(texts, tokenizer, tmp_path):
    prepare(f"text={texts}", tokenizer, tmp_path / "small", validation_share=0.05, workers=1)
    prepare(f"text={texts}", tokenizer, tmp_path / "same", validation_share=0.2, workers=1)

    def stores(*specs: str) -> list:
        return prepare_stores(
            MixtureConfig.from_specs([*specs]), tokenizer, tmp_path / "tokens", 16, validation_share=0.2
        )

    with pytest.raises(
        MismatchError, match="has a validation share of 0.05, this mixture 0.2.*Set validation_share to"
    ):
        stores(f"store={tmp_path / 'small'}", f"text={texts}")
    first, second = stores(f"store={tmp_path / 'same'}", f"text={texts}")
    validation = texts_of(second, "validation", tokenizer)
    assert len(validation) > 40 and not validation & texts_of(first, "train", tokenizer)
    assert len(stores(f"store={tmp_path / 'small'}")) == 1  # a single store has no other to disagree with


def test_an_imported_store_in_a_mixture_prints_a_warning(texts, tokenizer, tmp_path, capsys):
    shards = tmp_path / "shards"
    shards.mkdir()
    ids = tokenizer("<|endoftext|>Somebody else said this, and more than this, and then went home to sleep.")[
        "input_ids"
    ]
    for name in ("train", "val"):
        np.save(shards / f"{name}.npy", np.array(ids * 3, dtype=np.uint16))
    import_shards(shards, tokenizer, tmp_path / "imported")
    config = MixtureConfig.from_specs([f"store={tmp_path / 'imported'}", f"text={texts}"])
    assert len(prepare_stores(config, tokenizer, tmp_path / "tokens", 16, validation_share=0.2)) == 2
    assert f"{tmp_path / 'imported'} was tokenized elsewhere: its training text may" in capsys.readouterr().err
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
from rorchat.mixture import stores as stores_module
from rorchat.mixture.mixture_file import MixtureConfig, Source
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
prepare = stores_module.prepare
def flaky(spec, *arguments, **options):
    if rank == FAILING and "other" in spec:
        raise RemoteError("timeout")
    return prepare(spec, *arguments, **options)
stores_module.prepare = flaky
names = {"texts": Source(f"text={folder}/texts.jsonl"), "other": Source(f"text={folder}/other.jsonl", optional=True)}
class InTurn:
    def __enter__(self):
        if rank: distributed.barrier()
    def __exit__(self, *_):
        if not rank: distributed.barrier()
tokenizer = load_tokenizer(str(folder / "tokenizer"))
stores = stores_module.prepare_stores(
    MixtureConfig(names, ()), tokenizer, folder / "tokens", 16, validation_share=0.2, first=InTurn
)
print("STORES", [store.name for store in stores])
distributed.barrier()
distributed.destroy_process_group()  # otherwise a process may abort when the other exits
"""


@pytest.mark.parametrize("failing", [0, 1, None])
def test_a_source_that_fails_in_one_process_is_omitted_in_all(failing, texts, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "other.jsonl").write_text(texts.read_text())
    processes = [
        subprocess.Popen(
            [preloaded.client("python"), "-c", RANK.replace("FAILING", str(failing)), str(rank), str(tmp_path)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    names = "['texts']" if failing is not None else "['texts', 'other']"
    assert [out.partition("STORES ")[2].strip() for out, _ in outputs] == [names] * 2
    assert [err.count("optional source other is omitted") > 0 for _, err in outputs] == [failing is not None, False]
