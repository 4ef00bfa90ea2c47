"""Log-probabilities of pairs equal those of plain padded rows, and prompts and padding cost nothing."""

import copy

import pytest
import torch
from kernel_support import build_stock_model, relative_distance
from packing_support import VOCABULARY, padded_sides, pair_batch, plain_log_probabilities, random_pairs
from peft import LoraConfig, get_peft_model
from transformers import GPT2LMHeadModel

from rorchat.chatml import IGNORE_INDEX
from rorchat.training.kernels.dpo_logps import LogProbabilities, patch_dpo_logps, reply_masks


@pytest.fixture(scope="module")
def stock() -> GPT2LMHeadModel:
    return build_stock_model(VOCABULARY, n_positions=48, n_layer=2, n_head=2, n_embd=32)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_log_probabilities_and_gradients_equal_plain_rows(stock, checkpointing, monkeypatch):
    monkeypatch.setattr("rorchat.training.kernels.sliced_head.MAX_LOGITS", 7 * VOCABULARY)  # several slices
    pairs = random_pairs()
    batch = padded_sides(pairs)
    weights = torch.randn(batch["labels"][:, 1:].shape, generator=torch.Generator().manual_seed(4))
    plain, patched = copy.deepcopy(stock).train(), copy.deepcopy(stock).train()
    expected = plain_log_probabilities(plain, batch)
    (expected * weights).sum().backward()
    if checkpointing:
        patched.gradient_checkpointing_enable({"use_reentrant": False})
    patch_dpo_logps(patched)
    output = patched(**pair_batch(pairs))
    (output.log_probs * weights).sum().backward()
    assert torch.allclose(output.log_probs, expected, atol=1e-5)
    is_label = batch["labels"][:, 1:] != IGNORE_INDEX
    best = plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].argmax(-1)
    assert torch.equal(output.is_top1, (best == batch["labels"][:, 1:]) & is_label)
    for (name, parameter), reference in zip(patched.named_parameters(), plain.parameters(), strict=True):
        assert relative_distance(parameter.grad, reference.grad) <= 1e-5, name


def test_prompts_are_read_once_and_padding_never(stock):
    model = copy.deepcopy(stock)
    patch_dpo_logps(model)
    pairs, shapes = random_pairs(), []
    model.transformer.h[0].register_forward_hook(lambda module, args, output: shapes.append(args[0].shape[:2]))
    model(**pair_batch(pairs))
    assert shapes == [(1, sum(len(ids) for pair in pairs for ids in pair.values()))]


def test_masks_are_those_of_padded_sides():
    pairs = random_pairs()
    attention_mask, completion_mask = reply_masks(pair_batch(pairs)["group_sizes"])
    batch = padded_sides(pairs)
    assert torch.equal(attention_mask, batch["attention_mask"] == 1)
    assert torch.equal(completion_mask, batch["labels"] != IGNORE_INDEX)


def test_only_trained_rows_of_the_embedding_get_a_gradient(monkeypatch):
    """PEFT computes the gradient of the whole embedding and takes the trained rows from it."""
    computed, backward = [], LogProbabilities.backward

    def spy(*arguments):
        gradients = backward(*arguments)
        computed.append([gradient is not None for gradient in gradients])
        return gradients

    monkeypatch.setattr(LogProbabilities, "backward", staticmethod(spy))
    model = build_stock_model(VOCABULARY, n_positions=48, n_layer=1, n_head=2, n_embd=32)
    get_peft_model(
        model, LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, trainable_token_indices=[1, 2, 3, 4])
    )
    pairs = random_pairs(vocabulary=5)  # most tokens have a trained row
    expected = _trained_gradients(model, plain_log_probabilities(model, padded_sides(pairs)))
    patch_dpo_logps(model)
    gradients = _trained_gradients(model, model(**pair_batch(pairs)).log_probs)
    assert any("token_adapter" in name and gradient.abs().sum() for name, gradient in expected.items())
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
    assert computed == [[True, False, False, True, False, False, False, False]]  # hidden states and rows


def _trained_gradients(model, log_probs: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    log_probs.pow(2).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
