"""LoRA adapters of a tiny model."""

from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import GPT2LMHeadModel

from rorchat.model import build_model, load_checkpoint, save_model
from rorchat.training.lora import Adapter

SIZE, POSITIONS, RANK = "2x2x32", 128, 4


def settings(rank: int = RANK, load_in_4bit: bool = False):
    """The arguments that an adapter reads."""
    return SimpleNamespace(lora_rank=rank, load_in_4bit=load_in_4bit, bf16=False, fp16=False, device="cpu")


def save_base(folder: Path, tokenizer) -> Path:
    """A stock model with the control tokens; its embedding is large enough for tokens to differ."""
    model = build_model(SIZE, tokenizer, POSITIONS)
    model.transformer.wte.weight.data *= 10
    save_model(model, tokenizer, folder)
    return folder


def load_with_adapter(folder: Path, tokenizer, **options) -> tuple[GPT2LMHeadModel, Adapter]:
    model = load_checkpoint(str(folder), tokenizer)
    return model, Adapter(model, tokenizer, settings(**options), str(folder))


def batch(tokenizer, rows: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, len(tokenizer), (rows, 40), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.5, -100)
    return {"input_ids": ids, "labels": labels}


@torch.no_grad()
def compute_logits(model, tokenizer) -> torch.Tensor:
    return model.eval()(input_ids=batch(tokenizer)["input_ids"]).logits
