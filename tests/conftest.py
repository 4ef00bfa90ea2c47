"""Environment of the tests, and fixtures that several test files use."""

import os

# Libraries read these once, on import. One thread, because each worker has one core; the zero, because rorchat takes
# "1" for the default of `accelerate launch` and uses all cores.
os.environ["OMP_NUM_THREADS"] = "01"
os.environ["HF_HUB_OFFLINE"] = "1"

import contextlib
import copy
import tempfile
from pathlib import Path

import preloaded
import pytest
from support import DOCUMENTS, ROOT, SENTENCES, SHARE, write_documents

from rorchat.tokens.store import TokenStore

pytest_plugins = ["faults.harness"]
#: Folders of the longest test files, which start first so that both workers finish at about the same time.
LONGEST = ("docs", "faults", "recipes", "training", "scripts")
resources = contextlib.ExitStack()


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # the process that starts the workers, or the only one
        folder = resources.enter_context(tempfile.TemporaryDirectory(prefix="preloaded-"))
        resources.enter_context(preloaded.start_server(Path(folder)))


def pytest_unconfigure() -> None:
    resources.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def rank(item: pytest.Item) -> int:
        folder = item.path.relative_to(ROOT / "tests").parts[0]
        return LONGEST.index(folder) if folder in LONGEST else len(LONGEST)

    items.sort(key=rank)


@pytest.fixture(scope="session")
def tokenizer():
    """A tokenizer of 384 tokens: 256 bytes, control tokens, reserved slots and about a hundred merges."""
    from rorchat.tokenizer import train_tokenizer

    return train_tokenizer(SENTENCES, vocab_size=384)


@pytest.fixture(scope="session")
def chat(tokenizer):
    """A random model with two layers and 128 positions. Shared by all tests: copy it before you change it."""
    from rorchat.inference.engine import ChatModel
    from rorchat.model import build_model

    return ChatModel(build_model("2x2x32", tokenizer, n_positions=128).eval(), tokenizer)


@pytest.fixture(scope="session")
def lively(chat):
    """A model whose weights are large enough that replies differ by prompt; small ones repeat the last token."""
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
    """Folder of real datasets in their original formats, whose sizes and licences keep them out of the repository."""
    folder = Path(os.environ.get("RORCHAT_SHARED_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data in {folder}: set RORCHAT_SHARED_DATA to its folder")
    return folder


@pytest.fixture(scope="session")
def gpt2_tokenizer(shared_data):
    """GPT-2's tokenizer with the control tokens added: 50,304 tokens."""
    from rorchat.tokenizer import load_tokenizer

    return load_tokenizer(str(shared_data / "gpt2_tokenizer"))


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory) -> Path:
    """The folder of the tokenizer, for command lines."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def spec(tmp_path) -> str:
    return write_documents(tmp_path, DOCUMENTS)


@pytest.fixture
def store(spec, tokenizer, tmp_path) -> TokenStore:
    """A token store of DOCUMENTS, a fifth of which are for validation."""
    from rorchat.tokens.prepare import prepare

    return prepare(spec, tokenizer, tmp_path / "store", validation_share=SHARE)
