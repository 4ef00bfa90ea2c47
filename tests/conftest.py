"""Fixtures of several test files, and the environment of the tests."""

import os

# Before torch is imported: it reads them once. Waiting threads sleep, so that a test does not crowd out other work.
os.environ["OMP_NUM_THREADS"] = "2"
os.environ["OMP_WAIT_POLICY"] = "passive"
os.environ["HF_HUB_OFFLINE"] = "1"

import copy
import os
from pathlib import Path

import pytest
from support import DOCUMENTS, ROOT, SENTENCES, SHARE, write_documents

from rorchat.tokens.store import TokenStore

pytest_plugins = ["faults.harness"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: two workers that take a file each then end at the same time."""
    items.sort(key=lambda item: item.path.parent.name != "faults")


@pytest.fixture(scope="session", autouse=True)
def two_threads():
    import torch

    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def tokenizer():
    """A tokenizer of 384 tokens: 256 bytes, the control tokens, the reserved slots and about a hundred merges."""
    from rorchat.tokenizer import train_tokenizer

    return train_tokenizer(SENTENCES, vocab_size=384)


@pytest.fixture(scope="session")
def chat(tokenizer):
    """A model with random weights: two layers, 128 positions. Shared, so a test that changes it copies it first."""
    from rorchat.inference.engine import ChatModel
    from rorchat.model import build_model

    return ChatModel(build_model("2x2x32", tokenizer, n_positions=128).eval(), tokenizer)


@pytest.fixture(scope="session")
def lively(chat):
    """Random weights large enough that every prompt gets another answer; small ones only repeat the last token."""
    import torch

    from rorchat.inference.engine import ChatModel

    model = copy.deepcopy(chat.model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.4, generator=generator)
    return ChatModel(model.eval(), chat.tokenizer)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data in its original formats, which is too large and too variously licensed to stand in the repository."""
    folder = Path(os.environ.get("RORCHAT_SHARED_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data in {folder}: set RORCHAT_SHARED_DATA to the folder that has it")
    return folder


@pytest.fixture(scope="session")
def gpt2_tokenizer(shared_data):
    """GPT-2's own tokenizer with the control tokens added: 50,304 tokens."""
    from rorchat.tokenizer import load_tokenizer

    return load_tokenizer(str(shared_data / "gpt2_tokenizer"))


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory) -> Path:
    """The folder of the tokenizer, as a command line names it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def spec(tmp_path) -> str:
    return write_documents(tmp_path, DOCUMENTS)


@pytest.fixture
def store(spec, tokenizer, tmp_path) -> TokenStore:
    """A store of the DOCUMENTS, a fifth of them held out."""
    from rorchat.tokens.prepare import prepare

    return prepare(spec, tokenizer, tmp_path / "store", validation_share=SHARE)
