"""Makes what all sides of a work share: tokens, initial weights, a token store, and a proof of equal work.

    python scripts/bench/material.py WORK_JSON FOLDER

FOLDER/tokens.npy           uint16 (rows, block_size) in reading order
FOLDER/store/               a token store whose mixture yields the same rows in the same order
FOLDER/weights.safetensors  initial weights with GPT-2's names
FOLDER/proof.json           sha256 of tokens and weights, number of parameters, and loss of the first step
"""

import hashlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel
from works import Work

SEED = 0
STORE = "store"  # the name of the source `store=FOLDER` in a mixture


def build_stock_model(work: Work, dropout: float = 0.0) -> GPT2LMHeadModel:
    layers, heads, width = work.shape
    torch.manual_seed(SEED)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=work.vocabulary, n_positions=work.block_size, n_layer=layers, n_head=heads, n_embd=width,
            resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def load_initial_model(work: Work, folder: Path, dropout: float = 0.0) -> GPT2LMHeadModel:
    """A stock model with the initial weights, copied because tensors of a memory-mapped file have small pages."""
    model = build_stock_model(work, dropout)
    result = model.load_state_dict(load_file(folder / "weights.safetensors"), strict=False)
    if result.unexpected_keys or result.missing_keys != ["lm_head.weight"]:  # tied to the embedding
        raise ValueError(f"the weights do not fit the model: {result}")
    return model


class Rows(Dataset):
    """The rows in reading order: {"input_ids": (block_size,), "labels": (block_size,)}, int64."""

    def __init__(self, folder: Path):
        self.tokens = np.load(folder / "tokens.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(self.tokens[row].astype(np.int64))
        return {"input_ids": ids, "labels": ids}

    def batch(self, start: int, rows: int) -> torch.Tensor:
        """(rows, block_size) from row `start`."""
        return torch.from_numpy(self.tokens[start : start + rows].astype(np.int64))


def tokens_sha256(batches: Iterable[torch.Tensor]) -> str:
    """Hash of the ids in reading order, independent of the batches."""
    digest = hashlib.sha256()
    for ids in batches:
        digest.update(ids.cpu().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def weights_sha256(weights: dict[str, torch.Tensor]) -> str:
    """Hash of names and float32 values without `lm_head.weight`, which is tied to the embedding."""
    digest = hashlib.sha256()
    for name in sorted(set(weights) - {"lm_head.weight"}):
        digest.update(name.encode())
        digest.update(weights[name].detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def make_tokenizer(work: Work):
    """A tokenizer of the vocabulary size of the work; most tokens are reserved slots, since only ids are used."""
    from rorchat.tokenizer import train_tokenizer

    return train_tokenizer(["a b c"], vocab_size=work.vocabulary)


def make_mixture(work: Work, folder: Path):
    from rorchat.mixture.dataset import Mixture
    from rorchat.mixture.mixture_file import MixtureConfig
    from rorchat.mixture.plan import Plan
    from rorchat.mixture.stores import count_rows_per_epoch
    from rorchat.tokens.store import TokenStore

    store = TokenStore(folder / STORE, STORE)
    config = MixtureConfig.from_specs([f"{STORE}={folder / STORE}"])
    plan = Plan(config, count_rows_per_epoch([store], work.block_size), work.rows_consumed, work.block_size)
    return Mixture([store], plan, seed=0)


def make_tokens(work: Work, folder: Path) -> None:
    """Write a store of random rows, one document each, and tokens.npy in the order of its mixture."""
    from rorchat.chatml import END_OF_TEXT
    from rorchat.tokens.import_shards import import_shards

    tokenizer = make_tokenizer(work)
    rows = np.random.default_rng(SEED).integers(
        256, work.vocabulary, (work.rows_consumed + 1, work.block_size), dtype=np.uint16
    )
    rows[:, 0] = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    shards = folder / "shards"
    shards.mkdir()
    np.save(shards / "train.npy", rows[:-1].reshape(-1))
    np.save(shards / "val.npy", rows[-1])
    import_shards(shards, tokenizer, folder / STORE)
    mixture = make_mixture(work, folder)
    ordered = np.stack([mixture[row]["input_ids"].numpy() for row in range(work.rows_consumed)])
    np.save(folder / "tokens.npy", ordered.astype(np.uint16))


@torch.no_grad()
def first_loss(work: Work, folder: Path, model: GPT2LMHeadModel) -> float:
    """Nats per predicted token of the rows of the first step, without dropout."""
    rows, losses = Rows(folder), []
    model.eval()
    for number in range(work.passes):
        ids = rows.batch(number * work.rows, work.rows).to(model.device)
        losses.append(model(input_ids=ids, labels=ids, use_cache=False).loss.item())
    model.train()
    return sum(losses) / len(losses)


def save_weights(model: GPT2LMHeadModel, folder: Path) -> dict[str, torch.Tensor]:
    weights = {name: value.contiguous() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, folder / "weights.safetensors")
    return weights


def make(work: Work, folder: Path) -> None:
    make_tokens(work, folder)
    model = build_stock_model(work)
    proof = {
        "tokens_sha256": tokens_sha256([Rows(folder).batch(0, work.rows_consumed)]),
        "weights_sha256": weights_sha256(save_weights(model, folder)),
        "parameters": model.num_parameters(),
        "first_loss": first_loss(work, folder, model),
    }
    (folder / "proof.json").write_text(json.dumps(proof), encoding="utf-8")


if __name__ == "__main__":
    make(Work.read(sys.argv[1]), Path(sys.argv[2]))
