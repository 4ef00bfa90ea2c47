"""Cheap outputs are recomputed in the backward pass with equal gradients, and only where that saves memory."""

import contextlib
import copy
import math

import pytest
import torch
from kernel_support import largest_distance, loss_and_gradients, patched_copy, random_ids

MIN_RECOMPUTE_ELEMENTS = "rorchat.training.kernels.lm_head_loss.MIN_RECOMPUTE_ELEMENTS"


@pytest.fixture(autouse=True)
def always_recompute(monkeypatch):
    monkeypatch.setattr(MIN_RECOMPUTE_ELEMENTS, 0)  # these models are too small for it


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_are_equal_to_the_bit(stock, autocast, monkeypatch):
    ids = random_ids(stock)
    recomputed = loss_and_gradients(patched_copy(stock), ids, autocast)
    monkeypatch.setattr(MIN_RECOMPUTE_ELEMENTS, math.inf)
    kept = loss_and_gradients(patched_copy(stock), ids, autocast)
    assert all(torch.equal(recomputed[name], kept[name]) for name in kept)


def test_outputs_of_norms_and_gelu_are_not_kept(stock, monkeypatch):
    """A layer has two outputs of norms, and one of a GELU that is four times as wide: six float32 hidden states."""
    ids = random_ids(stock)
    packed = []
    saved_tensors_hooks = torch.autograd.graph.saved_tensors_hooks

    class RecordingHooks(saved_tensors_hooks):
        def __init__(self, pack, unpack):
            super().__init__(lambda tensor: packed.append(pack(tensor)) or packed[-1], unpack)

    monkeypatch.setattr(torch.autograd.graph, "saved_tensors_hooks", RecordingHooks)
    model = patched_copy(stock)
    model(input_ids=ids, labels=ids)
    recomputed = [entry for entry in packed if len(entry) == 3]
    elements = sum(shape.numel() for _, _, shape in recomputed)
    assert elements == 6 * model.config.n_layer * ids.numel() * model.config.n_embd
    inputs = {layer_input.untyped_storage().data_ptr() for _, layer_input, _ in recomputed}
    kept = {tensor.untyped_storage().data_ptr() for tensor, *rest in packed if len(rest) == 1}
    assert inputs <= kept  # the inputs are kept by other functions, so they cost nothing


def test_weight_changed_before_backward_raises(stock):
    model, ids = patched_copy(stock), random_ids(stock)
    loss = model(input_ids=ids, labels=ids).loss
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()


@pytest.mark.parametrize("case", ["no gradient", "gradient checkpointing", "other hooks"])
def test_nothing_is_recomputed_where_it_saves_nothing(stock, monkeypatch, case):
    model, ids = patched_copy(stock).train(), random_ids(stock)
    if case == "gradient checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    other_hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    monkeypatch.setattr(torch.nn.Module, "register_forward_hook", lambda *_, **__: pytest.fail("a layer has a hook"))
    with contextlib.ExitStack() as contexts:
        if case == "no gradient":
            contexts.enter_context(torch.no_grad())
        if case == "other hooks":
            contexts.enter_context(other_hooks)
        model(input_ids=ids, labels=ids)
    assert (len(kept) > 10 * model.config.n_layer) == (case == "other hooks")


def test_norm_with_a_hook_runs_once(stock):
    plain, calls = copy.deepcopy(stock), []

    def double(module, arguments, output):
        calls.append(1)
        return 2 * output

    plain.transformer.h[1].ln_2.register_forward_hook(double)
    ids = random_ids(stock)
    expected = loss_and_gradients(plain, ids)
    calls.clear()
    assert largest_distance(loss_and_gradients(patched_copy(plain), ids), expected) < 1e-5
    assert len(calls) == 1


def test_hooks_are_removed_after_the_forward_pass(stock):
    model, ids = patched_copy(stock), random_ids(stock)
    model(input_ids=ids, labels=ids).loss.backward()
    assert not any(module._forward_hooks for module in model.modules())
