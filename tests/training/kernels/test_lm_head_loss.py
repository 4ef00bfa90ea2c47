"""The training forward pass computes what plain Transformers computes and leaves a stock model behind."""

import copy
import json
from types import MethodType

import pytest
import torch
from kernel_support import (
    largest_distance,
    loss_and_gradients,
    patched_copy,
    random_ids,
    relative_distance,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from rorchat.model import build_model, save_model
from rorchat.training.kernels.lm_head_loss import head_loss
from rorchat.training.optim import build_optimizer

MAX_LOGITS = "rorchat.training.kernels.sliced_head.MAX_LOGITS"


def test_float32_gradients_equal_plain_transformers(stock):
    ids = random_ids(stock)
    expected = loss_and_gradients(copy.deepcopy(stock), ids)
    assert largest_distance(loss_and_gradients(patched_copy(stock), ids), expected) < 1e-5


def test_bf16_gradients_are_as_exact_as_plain_autocast(stock):
    """bfloat16 has 8 bits: rounding is 2^-9. The bound is 2 % of a gradient's norm and twice plain autocast's error."""
    ids = random_ids(stock)
    exact = loss_and_gradients(copy.deepcopy(stock), ids)
    plain = loss_and_gradients(copy.deepcopy(stock), ids, autocast=True)
    patched = loss_and_gradients(patched_copy(stock), ids, autocast=True)
    for name in exact:
        error = relative_distance(patched[name], exact[name])
        assert error < max(2 * relative_distance(plain[name], exact[name]), 2**-9), name
        assert error < 0.02, name


def test_attention_gets_no_mask_and_config_is_restored(stock, monkeypatch):
    calls = []

    def spy(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **kwargs):
        calls.append((attn_mask is None, is_causal))
        return attend(query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, **kwargs)

    attend = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    model, ids = patched_copy(stock), random_ids(stock)
    model(input_ids=ids, labels=ids)
    assert calls == [(True, True)] * model.config.n_layer
    assert model.config._attn_implementation == "sdpa"


def test_masks_and_positions_keep_stock_attention(stock):
    model, ids = patched_copy(stock), random_ids(stock)
    mask = torch.ones_like(ids)
    mask[:, :10] = 0
    positions = torch.arange(64).remainder(32).expand_as(ids)
    for inputs in ({"attention_mask": mask}, {"position_ids": positions}):
        # with a cache, Transformers does not detect packed rows by their positions
        expected = copy.deepcopy(stock)(input_ids=ids, labels=ids, use_cache=False, **inputs).loss
        torch.testing.assert_close(model(input_ids=ids, labels=ids, **inputs).loss, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_compiled_attention_is_causal_without_a_mask(stock, monkeypatch):
    graphs = []

    def inspect(graph, example):
        graphs.append(graph)
        return graph.forward

    compile_module = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **options: compile_module(module, backend=inspect, **options))
    torch._dynamo.reset()
    model, ids = patched_copy(stock, compiled=True), random_ids(stock)
    model(input_ids=ids, labels=ids)
    calls = [
        node for graph in graphs for node in graph.graph.nodes
        if node.target is torch.nn.functional.scaled_dot_product_attention
    ]  # fmt: skip
    assert len(calls) == model.config.n_layer
    assert all(call.kwargs.get("attn_mask") is None and call.kwargs["is_causal"] is True for call in calls)


def test_second_backward_raises(stock):
    model, ids = patched_copy(stock), random_ids(stock)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        loss.backward()


def test_gradient_checkpointing_keeps_gradients(stock):
    ids = random_ids(stock)
    expected, model = loss_and_gradients(patched_copy(stock), ids), patched_copy(stock)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert largest_distance(loss_and_gradients(model, ids), expected) < 1e-5


def test_no_gradient_is_allocated_without_backward(stock, monkeypatch):
    model, ids = patched_copy(stock), random_ids(stock)
    expected = model(input_ids=ids, labels=ids).loss.detach()
    monkeypatch.setattr(torch, "zeros_like", lambda *_, **__: pytest.fail("the head's gradient was allocated"))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids, labels=ids).loss, expected)
    model.lm_head.weight.requires_grad_(False)  # the embedding's as well
    model(input_ids=ids, labels=ids).loss.backward()


def test_fp16_head_gradient_needs_no_loss_scale():
    """It is computed before the loss is scaled, from the small probabilities of GPT-2's vocabulary. It must be as exact
    as plain autocast's with the loss scaled by 2^16, also in rows of tokens that are never a label."""
    torch.manual_seed(0)
    weight, hidden, labels = 0.02 * torch.randn(50_304, 64), torch.randn(1, 513, 64), torch.randint(0, 2_000, (1, 513))

    def weight_gradient(compute_loss, dtype):
        w = weight.clone().requires_grad_()
        with torch.autocast("cpu", torch.float16, enabled=dtype == torch.float16):
            loss = compute_loss(hidden, w)
        (loss / 512 * 2**16).backward()
        return w.grad

    def sliced(hidden, weight):
        return head_loss(hidden, weight, labels, whole_rows=True)

    def plain(hidden, weight):
        logits = torch.nn.functional.linear(hidden[0, :-1], weight).float()
        return torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum")

    exact, half = weight_gradient(plain, torch.float32), weight_gradient(sliced, torch.float16)
    plain_half = weight_gradient(plain, torch.float16)
    assert relative_distance(half, exact) < 2 * relative_distance(plain_half, exact) < 2**-9
    assert relative_distance(half[2_000:], exact[2_000:]) < 2**-9


def test_bf16_weight_gradients_are_summed_in_float32(stock, monkeypatch):
    """252 slices of one token: summed in bfloat16, small parts would vanish."""
    model = copy.deepcopy(stock).bfloat16()
    ids = random_ids(stock)
    whole = loss_and_gradients(patched_copy(model), ids)
    monkeypatch.setattr(MAX_LOGITS, 1)
    sliced = loss_and_gradients(patched_copy(model), ids)
    name = "transformer.wte.weight"
    assert sliced[name].dtype == torch.bfloat16
    assert relative_distance(sliced[name].float(), whole[name].float()) < 2**-8


def test_head_and_embedding_share_one_gradient(stock, monkeypatch):
    """The gradient of the weight is the tensor that the head allocated, to which the lookup has added."""
    addresses = {}
    zeros_like = torch.zeros_like

    def spy(*arguments, **options):
        tensor = zeros_like(*arguments, **options)
        addresses[tensor.shape] = tensor.data_ptr()  # not the tensor itself: a referenced one would be copied
        return tensor

    monkeypatch.setattr(torch, "zeros_like", spy)
    model, ids = patched_copy(stock), random_ids(stock)
    model(input_ids=ids, labels=ids).loss.backward()
    weight = model.lm_head.weight
    assert weight.grad.data_ptr() == addresses[weight.shape]


@pytest.mark.parametrize("case", ["untied", "frozen", "hooked", "scaled", "replaced"])
def test_embedding_with_other_behaviour_keeps_its_gradient(stock, case):
    plain = copy.deepcopy(stock)
    if case == "untied":
        plain.lm_head.weight = torch.nn.Parameter(plain.lm_head.weight.detach().clone())
    elif case == "frozen":
        plain.lm_head.weight.requires_grad_(False)
    elif case == "scaled":
        plain.transformer.wte.scale_grad_by_freq = True
    elif case == "replaced":  # as accelerate does to offloaded weights
        doubled = lambda wte, ids: 2 * torch.nn.functional.embedding(ids, wte.weight)  # noqa: E731
        plain.transformer.wte.forward = MethodType(doubled, plain.transformer.wte)
    else:
        plain.transformer.wte.register_forward_hook(lambda module, arguments, output: 2 * output)
    model, ids = patched_copy(plain), random_ids(plain)
    for either in (plain, model):
        either(input_ids=ids, labels=ids).loss.backward()
    for (name, expected), parameter in zip(plain.named_parameters(), model.parameters(), strict=True):
        is_frozen = case == "frozen" and name == "transformer.wte.weight"
        assert (expected.grad is None) == (parameter.grad is None) == is_frozen
        assert expected.grad is None or relative_distance(parameter.grad, expected.grad) < 1e-5, name


@pytest.mark.slow
def test_a_compiled_model_has_plain_gradients_and_is_saved_as_a_stock_one(tokenizer, tmp_path):
    """One test, because compiling takes most of its time."""
    plain = build_model("2x2x64", tokenizer, 64)
    model = patched_copy(plain, compiled=True)
    ids = random_ids(model)
    expected = loss_and_gradients(copy.deepcopy(plain), ids)
    assert largest_distance(loss_and_gradients(model, ids), expected) < 1e-5
    optimizer = build_optimizer(model, "muon", learning_rate=1e-3, matrix_learning_rate=1e-2, weight_decay=0.1)
    optimizer.zero_grad()
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, either in (("patched", model), ("plain", plain)):
        save_model(either, tokenizer, tmp_path / name)
    weights, stock_weights = (load_file(tmp_path / name / "model.safetensors") for name in ("patched", "plain"))
    assert weights.keys() == stock_weights.keys()
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("patched", "plain")]
    assert configs[0] == configs[1]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "patched").eval()
    assert type(loaded) is GPT2LMHeadModel
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits, rtol=1e-5, atol=1e-5)
