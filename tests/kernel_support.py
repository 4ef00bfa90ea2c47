"""A small stock GPT-2 for the tests of kernels and optimizers, its gradients, and how far two tensors are apart."""

import copy

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from rorchat.training.kernels.lm_head_loss import patch_gelu, patch_lm_head_loss


def build_stock_model(vocab_size: int = 1024, n_positions: int = 128, n_layer: int = 3, n_head: int = 4, n_embd=128):
    torch.manual_seed(0)
    shape = {"n_positions": n_positions, "n_layer": n_layer, "n_head": n_head, "n_embd": n_embd}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, bos_token_id=0, eos_token_id=0, **shape, **no_dropout))


def patched_copy(model: GPT2LMHeadModel, compiled: bool = False) -> GPT2LMHeadModel:
    model = copy.deepcopy(model)
    patch_lm_head_loss(model, compiled)
    patch_gelu(model)
    return model


def random_ids(model: GPT2LMHeadModel, rows: int = 4, length: int = 64) -> torch.Tensor:
    return torch.randint(0, model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))


def loss_and_gradients(model: GPT2LMHeadModel, ids: torch.Tensor, autocast: bool = False) -> dict[str, torch.Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}


def relative_distance(tensor: torch.Tensor, expected: torch.Tensor) -> float:
    return float((tensor - expected).norm() / expected.norm())


def largest_distance(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert tensors.keys() == expected.keys()
    return max(relative_distance(tensors[name], expected[name]) for name in expected)
