"""The fast path of training computes what plain Transformers computes, and leaves a stock model behind."""

import contextlib
import copy
import json
import math
from types import MethodType

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from rorchat.model import build_model
from rorchat.training import optim as optimizer_module
from rorchat.training.kernels import lm_head_loss as loss_module
from rorchat.training.kernels.lm_head_loss import patch_gelu, patch_lm_head_loss
from rorchat.training.optim import NEWTON_SCHULZ, SAFETY, build_optimizer, orthogonalized


def ready(model, compiled: bool = False):
    model = copy.deepcopy(model)
    patch_lm_head_loss(model, compiled)
    patch_gelu(model)
    return model


def ids_of(model, rows: int = 4, length: int = 64) -> torch.Tensor:
    return torch.randint(0, model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))


def gradients(model, ids, autocast: bool = False) -> dict[str, torch.Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def stock() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=1024, n_positions=128, n_layer=3, n_head=4, n_embd=128, **quiet))


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_loss_and_gradients_are_those_of_plain_transformers_within_1e_5_in_float32(stock, compiled):
    ids = ids_of(stock)
    expected, found = gradients(copy.deepcopy(stock), ids), gradients(ready(stock, compiled), ids)
    assert expected.keys() == found.keys()
    far = {name: distance(found[name], expected[name]) for name in expected}
    assert max(far.values()) < 1e-5, max(far, key=far.get)


def test_in_bf16_the_fast_path_is_as_near_to_float32_as_plain_autocast_is(stock):
    """bfloat16 has 8 bits: a rounding is 2^-9. Both round products; the bound is 2 % of a gradient's norm, and twice
    the distance of plain autocast."""
    ids = ids_of(stock)
    exact = gradients(copy.deepcopy(stock), ids)
    plain, found = gradients(copy.deepcopy(stock), ids, autocast=True), gradients(ready(stock), ids, autocast=True)
    for name in exact:
        far = distance(found[name], exact[name])
        assert far < max(2 * distance(plain[name], exact[name]), 2**-9), name
        assert far < 0.02, name


def test_rows_of_a_batch_reach_attention_without_a_mask_and_the_config_is_stock_again(stock, monkeypatch):
    seen = []

    def spy(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **kwargs):
        seen.append((attn_mask is None, is_causal))
        return attend(query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, **kwargs)

    attend = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    model, ids = ready(stock), ids_of(stock)
    model(input_ids=ids, labels=ids)
    assert seen == [(True, True)] * model.config.n_layer
    assert model.config._attn_implementation == "sdpa"


def test_rows_with_a_mask_or_with_positions_keep_the_stock_attention(stock):
    model, ids = ready(stock), ids_of(stock)
    mask = torch.ones_like(ids)
    mask[:, :10] = 0
    positions = torch.arange(64).remainder(32).expand_as(ids)
    for more in ({"attention_mask": mask}, {"position_ids": positions}):
        # with a cache, Transformers does not look for packed rows in the positions
        expected = copy.deepcopy(stock)(input_ids=ids, labels=ids, use_cache=False, **more).loss
        torch.testing.assert_close(model(input_ids=ids, labels=ids, **more).loss, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_compiled_attention_is_causal_without_a_mask(stock, monkeypatch):
    graphs = []

    def inspect(graph, example):
        graphs.append(graph)
        return graph.forward

    compiling = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **options: compiling(module, backend=inspect, **options))
    torch._dynamo.reset()
    model, ids = ready(stock, compiled=True), ids_of(stock)
    model(input_ids=ids, labels=ids)
    calls = [
        node for graph in graphs for node in graph.graph.nodes
        if node.target is torch.nn.functional.scaled_dot_product_attention
    ]  # fmt: skip
    assert len(calls) == model.config.n_layer
    assert all(call.kwargs.get("attn_mask") is None and call.kwargs["is_causal"] is True for call in calls)


def test_a_loss_goes_backward_once(stock):
    model, ids = ready(stock), ids_of(stock)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        loss.backward()


def test_gradient_checkpointing_changes_no_gradient(stock):
    ids = ids_of(stock)
    expected, model = gradients(ready(stock), ids), ready(stock)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = gradients(model, ids)
    assert max(distance(found[name], expected[name]) for name in expected) < 1e-5


@pytest.fixture
def recomputing(monkeypatch):
    monkeypatch.setattr(loss_module, "WORTHWHILE", 0)  # these models are too small for it


@pytest.mark.parametrize("autocast", [False, True])
def test_outputs_computed_again_give_the_same_gradients_to_the_bit(stock, autocast, recomputing, monkeypatch):
    ids = ids_of(stock)
    found = gradients(ready(stock), ids, autocast)
    monkeypatch.setattr(loss_module, "WORTHWHILE", math.inf)
    kept = gradients(ready(stock), ids, autocast)
    assert all(torch.equal(found[name], kept[name]) for name in kept)


def test_neither_a_norms_output_nor_the_gelus_is_kept(stock, recomputing, monkeypatch):
    """Two outputs of norms and one of a GELU, four times as wide, a layer: six hidden states of float32."""
    ids = ids_of(stock)
    saved = []
    stock_hooks = torch.autograd.graph.saved_tensors_hooks

    class Weighed(stock_hooks):
        def __init__(self, pack, unpack):
            super().__init__(lambda tensor: saved.append(pack(tensor)) or saved[-1], unpack)

    monkeypatch.setattr(torch.autograd.graph, "saved_tensors_hooks", Weighed)
    model = ready(stock)
    model(input_ids=ids, labels=ids)
    again = [kept for kept in saved if len(kept) == 3]
    numbers = sum(shape.numel() for _, _, shape in again)
    assert numbers == 6 * model.config.n_layer * ids.numel() * model.config.n_embd
    inputs = {given.untyped_storage().data_ptr() for _, given, _ in again}
    held = {kept.untyped_storage().data_ptr() for kept, *rest in saved if len(rest) == 1}
    assert inputs <= held  # what they are computed from is kept by others: it costs nothing


def test_a_weight_changed_before_the_backward_pass_is_seen(stock, recomputing):
    model, ids = ready(stock), ids_of(stock)
    loss = model(input_ids=ids, labels=ids).loss
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()


@pytest.mark.parametrize("case", ["no gradient is wanted", "gradient checkpointing", "others keep"])
def test_outputs_are_computed_again_only_where_that_spares_something(stock, recomputing, monkeypatch, case):
    model, ids = ready(stock).train(), ids_of(stock)
    if case == "gradient checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    theirs = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    used = []
    monkeypatch.setattr(torch.nn.Module, "register_forward_hook", lambda *_, **__: used.append(1) or pytest.fail())
    with contextlib.ExitStack() as contexts:
        if case == "no gradient is wanted":
            contexts.enter_context(torch.no_grad())
        if case == "others keep":
            contexts.enter_context(theirs)
        model(input_ids=ids, labels=ids)
    assert not used
    assert (len(kept) > 10 * model.config.n_layer) == (case == "others keep")


def test_a_norm_with_a_hook_runs_once_and_as_the_hook_has_it(stock, recomputing):
    plain, calls = copy.deepcopy(stock), []

    def double(module, arguments, output):
        calls.append(1)
        return 2 * output

    plain.transformer.h[1].ln_2.register_forward_hook(double)
    ids = ids_of(stock)
    expected = gradients(plain, ids)
    calls.clear()
    found = gradients(ready(plain), ids)
    assert len(calls) == 1
    assert max(distance(found[name], expected[name]) for name in expected) < 1e-5


def test_a_loss_without_a_backward_pass_forms_no_gradient(stock, monkeypatch):
    model, ids = ready(stock), ids_of(stock)
    expected = model(input_ids=ids, labels=ids).loss.detach()
    monkeypatch.setattr(torch, "zeros_like", lambda *_, **__: pytest.fail("the head's gradient was made"))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids, labels=ids).loss, expected)
    model.lm_head.weight.requires_grad_(False)  # the embedding's, too
    model(input_ids=ids, labels=ids).loss.backward()


def test_in_fp16_the_heads_gradient_needs_no_loss_scale():
    """It is formed before the loss is scaled, from probabilities, of which GPT-2's vocabulary has small ones: it must
    be as exact as plain autocast's with the loss scaled by 2^16, in rows of words that were never asked for as well."""
    torch.manual_seed(0)
    weight, hidden, labels = 0.02 * torch.randn(50_304, 64), torch.randn(1, 513, 64), torch.randint(0, 2_000, (1, 513))

    def of(loss_of, dtype):
        w = weight.clone().requires_grad_()
        with torch.autocast("cpu", torch.float16, enabled=dtype == torch.float16):
            loss = loss_of(hidden, w)
        (loss / 512 * 2**16).backward()
        return w.grad

    def ours(hidden, weight):
        return loss_module.head_loss(hidden, weight, labels, whole_rows=True)

    def plain(hidden, weight):
        logits = torch.nn.functional.linear(hidden[0, :-1], weight).float()
        return torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum")

    exact, found, stock = of(plain, torch.float32), of(ours, torch.float16), of(plain, torch.float16)
    assert distance(found, exact) < 2 * distance(stock, exact) < 2**-9
    assert distance(found[2_000:], exact[2_000:]) < 2**-9


def test_gradients_of_bf16_weights_are_summed_over_slices_in_float32(stock, monkeypatch):
    """Of 252 slices of one token each: added up in bfloat16, small parts vanish beside the sum."""
    model = copy.deepcopy(stock).bfloat16()
    ids = ids_of(stock)
    whole = gradients(ready(model), ids)
    monkeypatch.setattr(loss_module, "LOGITS_AT_ONCE", 1)
    sliced = gradients(ready(model), ids)
    name = "transformer.wte.weight"
    assert sliced[name].dtype == torch.bfloat16
    assert distance(sliced[name].float(), whole[name].float()) < 2**-8


def test_nothing_stays_attached_to_a_model_whose_outputs_are_computed_again(stock, recomputing):
    model, ids = ready(stock), ids_of(stock)
    model(input_ids=ids, labels=ids).loss.backward()
    assert not any(module._forward_hooks for module in model.modules())


def test_head_and_embedding_share_one_gradient(stock, monkeypatch):
    """The gradient that arrives at the weight is the head's own tensor, to which the lookup has added."""
    made = {}
    zeros_like = torch.zeros_like

    def noted(*arguments, **options):
        tensor = zeros_like(*arguments, **options)
        made[tensor.shape] = tensor.data_ptr()  # the tensor itself, held here, would be copied
        return tensor

    monkeypatch.setattr(torch, "zeros_like", noted)
    model, ids = ready(stock), ids_of(stock)
    model(input_ids=ids, labels=ids).loss.backward()
    weight = model.lm_head.weight
    assert weight.grad.data_ptr() == made[weight.shape]


@pytest.mark.parametrize("case", ["untied", "frozen", "hooked", "scaled", "replaced"])
def test_an_embedding_apart_from_the_head_keeps_its_own_gradient(stock, case):
    plain = copy.deepcopy(stock)
    if case == "untied":
        plain.lm_head.weight = torch.nn.Parameter(plain.lm_head.weight.detach().clone())
    elif case == "frozen":
        plain.lm_head.weight.requires_grad_(False)
    elif case == "scaled":
        plain.transformer.wte.scale_grad_by_freq = True
    elif case == "replaced":  # as accelerate does where weights lie elsewhere
        doubled = lambda wte, ids: 2 * torch.nn.functional.embedding(ids, wte.weight)  # noqa: E731
        plain.transformer.wte.forward = MethodType(doubled, plain.transformer.wte)
    else:
        plain.transformer.wte.register_forward_hook(lambda module, arguments, output: 2 * output)
    model, ids = ready(plain), ids_of(plain)
    for each in (plain, model):
        each(input_ids=ids, labels=ids).loss.backward()
    for (name, expected), found in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert (
            (expected.grad is None) == (found.grad is None) == (case == "frozen" and name == "transformer.wte.weight")
        )
        assert expected.grad is None or distance(found.grad, expected.grad) < 1e-5, name


@pytest.mark.slow
def test_a_model_trained_with_every_lever_is_saved_as_a_stock_one(tokenizer, tmp_path):
    from rorchat.model import save_model

    born = build_model("2x2x64", tokenizer, 64)
    plain = copy.deepcopy(born)
    model = ready(born, compiled=True)
    optimizer = build_optimizer(model, "muon", learning_rate=1e-3, matrix_learning_rate=1e-2, weight_decay=0.1)
    ids = ids_of(model, length=64)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, each in (("fast", model), ("plain", plain)):
        save_model(each, tokenizer, tmp_path / name)
    weights, stock_weights = (load_file(tmp_path / name / "model.safetensors") for name in ("fast", "plain"))
    assert weights.keys() == stock_weights.keys()
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("fast", "plain")]
    assert configs[0] == configs[1]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "fast").eval()
    assert type(loaded) is GPT2LMHeadModel
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits, rtol=1e-5, atol=1e-5)


# The optimizers


def reference_orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    """By what it means: the singular vectors as they are, each singular value through the polynomials, in float64."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / (SAFETY * matrix.double().norm() + 1e-7)
    for a, b, c in NEWTON_SCHULZ:
        values = a * values + b * values**3 + c * values**5
    return left @ values.diag() @ right


@pytest.mark.parametrize("shape", [(48, 48), (48, 192), (192, 48), (64, 96)])
def test_orthogonalized_is_newton_schulz_for_every_shape(shape):
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    for found, matrix in zip(orthogonalized(matrices), matrices, strict=True):
        assert distance(found.double(), reference_orthogonalized(matrix)) < 1e-5


def test_singular_values_above_a_thousandth_end_around_one_in_float32_and_in_bf16():
    draw = torch.Generator().manual_seed(2)
    for shape in ((64, 64), (64, 256), (256, 64)):
        values = torch.logspace(0, -2.5, 64)
        left, right = (torch.linalg.qr(torch.randn(size, 64, generator=draw))[0] for size in shape)
        matrix = left @ values.diag() @ right.T
        assert (values / matrix.norm()).min() > 1e-3
        for dtype, low, high in ((torch.float32, 0.13, 1.87), (torch.bfloat16, 0.10, 1.95)):
            ends = torch.linalg.svdvals(orthogonalized(matrix[None].to(dtype))[0].float())
            assert low < ends.min() and ends.max() < high, (shape, dtype)


def test_muons_update_is_the_reference_on_every_matrix_of_the_model(stock):
    """Two steps, so that momentum counts: 0.95 of the buffer and 0.05 of the gradient, into it and out of it."""
    model, decay, rate = copy.deepcopy(stock), 0.1, 0.01
    optimizer = build_optimizer(model, "muon", learning_rate=0.0, matrix_learning_rate=rate, weight_decay=decay)
    names = [name for name, p in model.named_parameters() if ".h." in name and p.ndim == 2]
    expected = {name: p.detach().double().clone() for name, p in model.named_parameters() if name in names}
    buffers = {name: torch.zeros_like(value) for name, value in expected.items()}
    for step in range(2):
        for index, (name, parameter) in enumerate(model.named_parameters()):
            draw = torch.Generator().manual_seed(100 * step + index)
            parameter.grad = torch.randn(parameter.shape, generator=draw)
            if name not in names:
                continue
            gradient = parameter.grad.double()
            buffers[name].lerp_(gradient, 0.05)
            update = gradient.lerp(buffers[name], 0.95)
            for start in range(0, update.size(1), update.size(1) // (3 if "c_attn" in name else 1)):
                part = slice(start, start + update.size(1) // (3 if "c_attn" in name else 1))
                size = 0.2 * math.sqrt(max(update[:, part].shape))
                expected[name][:, part] *= 1 - rate * decay
                expected[name][:, part] -= rate * size * reference_orthogonalized(update[:, part])
        optimizer.step()
    assert len(names) == 4 * model.config.n_layer
    for name, parameter in model.named_parameters():
        if name in names:
            assert distance(parameter.detach().double(), expected[name]) < 1e-5, name


def test_beside_muon_all_else_is_stepped_by_plain_adamw(stock):
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
        assert distance(one, other) < 1e-6, name


def test_matrices_may_go_through_newton_schulz_in_slices(stock, monkeypatch):
    stepped = []
    for at_once in (2**24, 1):
        monkeypatch.setitem(optimizer_module.NUMBERS_AT_ONCE, "cpu", at_once)
        model = copy.deepcopy(stock)
        optimizer = build_optimizer(model, "muon", learning_rate=0.0, matrix_learning_rate=0.01, weight_decay=0.1)
        for index, parameter in enumerate(model.parameters()):
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
        optimizer.step()
        stepped.append(list(model.parameters()))
    assert max(distance(one, other) for one, other in zip(*stepped, strict=True)) < 1e-6


def test_a_loss_scaler_can_leave_a_step_out(stock):
    """As fp16 has it: after infinite gradients nothing moves, and Accelerate is told that nothing did."""
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    Accelerator(cpu=True)  # its state, without which its optimizer does not step
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


def test_eight_bit_adamw_learns_nearly_as_adamw_does_and_keeps_embeddings_in_32_bits(stock):
    ids, losses = ids_of(stock), {}
    for name in ("adamw", "adamw_8bit"):
        model = ready(stock)
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
