"""Muon, AdamW and 8-bit AdamW: their updates, and which parameter goes to which of them."""

import copy
import math

import pytest
import torch
from kernel_support import build_stock_model, patched_copy, random_ids, relative_distance
from transformers import GPT2LMHeadModel

from rorchat.training import optim
from rorchat.training.optim import NEWTON_SCHULZ, SAFETY, build_optimizer, orthogonalize


@pytest.fixture(scope="module")
def stock() -> GPT2LMHeadModel:
    return build_stock_model()


def orthogonalize_by_svd(matrix: torch.Tensor) -> torch.Tensor:
    """By definition: singular vectors stay, each singular value goes through the polynomials, in float64."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / (SAFETY * matrix.double().norm() + 1e-7)
    for a, b, c in NEWTON_SCHULZ:
        values = a * values + b * values**3 + c * values**5
    return left @ values.diag() @ right


@pytest.mark.parametrize("shape", [(48, 48), (48, 192), (192, 48), (64, 96)])
def test_orthogonalize_equals_svd_for_every_shape(shape):
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    for result, matrix in zip(orthogonalize(matrices), matrices, strict=True):
        assert relative_distance(result.double(), orthogonalize_by_svd(matrix)) < 1e-5


def test_singular_values_above_a_thousandth_become_about_one():
    rng = torch.Generator().manual_seed(2)
    for shape in ((64, 64), (64, 256), (256, 64)):
        values = torch.logspace(0, -2.5, 64)
        left, right = (torch.linalg.qr(torch.randn(size, 64, generator=rng))[0] for size in shape)
        matrix = left @ values.diag() @ right.T
        assert (values / matrix.norm()).min() > 1e-3
        for dtype, low, high in ((torch.float32, 0.13, 1.87), (torch.bfloat16, 0.10, 1.95)):
            ends = torch.linalg.svdvals(orthogonalize(matrix[None].to(dtype))[0].float())
            assert low < ends.min() and ends.max() < high, (shape, dtype)


def test_muon_updates_every_matrix_as_the_reference_does(stock):
    """Two steps, so that the momentum matters: 0.95 of the buffer and 0.05 of the gradient, twice (Nesterov)."""
    model, decay, rate = copy.deepcopy(stock), 0.1, 0.01
    optimizer = build_optimizer(model, "muon", learning_rate=0.0, matrix_learning_rate=rate, weight_decay=decay)
    names = [name for name, p in model.named_parameters() if ".h." in name and p.ndim == 2]
    expected = {name: p.detach().double().clone() for name, p in model.named_parameters() if name in names}
    buffers = {name: torch.zeros_like(value) for name, value in expected.items()}
    for step in range(2):
        for index, (name, parameter) in enumerate(model.named_parameters()):
            rng = torch.Generator().manual_seed(100 * step + index)
            parameter.grad = torch.randn(parameter.shape, generator=rng)
            if name not in names:
                continue
            gradient = parameter.grad.double()
            buffers[name].lerp_(gradient, 0.05)
            update = gradient.lerp(buffers[name], 0.95)
            for start in range(0, update.size(1), update.size(1) // (3 if "c_attn" in name else 1)):
                part = slice(start, start + update.size(1) // (3 if "c_attn" in name else 1))
                size = 0.2 * math.sqrt(max(update[:, part].shape))
                expected[name][:, part] *= 1 - rate * decay
                expected[name][:, part] -= rate * size * orthogonalize_by_svd(update[:, part])
        optimizer.step()
    assert len(names) == 4 * model.config.n_layer
    for name, parameter in model.named_parameters():
        if name in names:
            assert relative_distance(parameter.detach().double(), expected[name]) < 1e-5, name


def test_parameters_without_muon_are_updated_by_adamw(stock):
    model, plain = copy.deepcopy(stock), copy.deepcopy(stock)
    optimizer = build_optimizer(model, "muon", learning_rate=1e-3, matrix_learning_rate=0.0, weight_decay=0.1)
    of = dict(plain.named_parameters())
    rest = [p for name, p in of.items() if not (".h." in name and p.ndim == 2) and "wte" not in name]
    groups = [{"params": [of["transformer.wte.weight"]], "lr": 10 * 1e-3}, {"params": rest, "lr": 1e-3}]
    expected = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for step in range(3):
        for index, (one, other) in enumerate(zip(model.parameters(), plain.parameters(), strict=True)):
            one.grad = torch.randn(one.shape, generator=torch.Generator().manual_seed(100 * step + index))
            other.grad = one.grad.clone()
        optimizer.step()
        expected.step()
    for (name, one), (_, other) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert relative_distance(one, other) < 1e-6, name


def test_muon_in_slices_gives_the_same_update(stock, monkeypatch):
    stepped = []
    for at_once in (2**24, 1):
        monkeypatch.setitem(optim.MAX_ELEMENTS, "cpu", at_once)
        model = copy.deepcopy(stock)
        optimizer = build_optimizer(model, "muon", learning_rate=0.0, matrix_learning_rate=0.01, weight_decay=0.1)
        for index, parameter in enumerate(model.parameters()):
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
        optimizer.step()
        stepped.append(list(model.parameters()))
    assert max(relative_distance(one, other) for one, other in zip(*stepped, strict=True)) < 1e-6


def test_loss_scaler_can_skip_a_step(stock):
    """fp16: after infinite gradients no parameter changes, and Accelerate knows that the step was skipped."""
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    Accelerator(cpu=True)  # creates the state that its optimizer needs
    for name in ("adamw", "muon"):
        model = copy.deepcopy(stock)
        inner = build_optimizer(
            model, name, learning_rate=1e-3, matrix_learning_rate=1e-3, weight_decay=0.0, scaled=True
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        optimizer = AcceleratedOptimizer(inner, device_placement=False, scaler=scaler)
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, torch.inf)
        scaler.scale(torch.zeros(()))
        optimizer.step()
        assert optimizer.step_was_skipped, name
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), stock.parameters(), strict=True))


def test_8bit_adamw_learns_like_adamw(stock):
    ids, losses = random_ids(stock), {}
    for name in ("adamw", "adamw_8bit"):
        model = patched_copy(stock)
        optimizer = build_optimizer(model, name, learning_rate=3e-3, matrix_learning_rate=0.0, weight_decay=0.1)
        for _ in range(20):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses[name] = loss.item()
    assert losses["adamw_8bit"] == pytest.approx(losses["adamw"], rel=0.05)
    states = {name: optimizer.state[p]["state1"].dtype for name, p in model.named_parameters()}
    assert states["transformer.h.0.mlp.c_fc.weight"] == torch.uint8
    assert states["transformer.wte.weight"] == torch.float32
