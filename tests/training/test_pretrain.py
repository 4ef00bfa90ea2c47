"""Fused loss, optimizers, order of rows, settings of pretraining."""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from training_support import build_pretrain_trainer

from rorchat.errors import UsageError
from rorchat.mixture.collators import collate_padded
from rorchat.model import build_model
from rorchat.training.arguments import parse
from rorchat.training.kernels.lm_head_loss import head_loss, patch_gelu, patch_lm_head_loss
from rorchat.training.optim import build_optimizer
from rorchat.training.pretrain import PretrainArguments, build_mixture, describe_mixture, prepare_token_stores
from rorchat.training.run_folder import RunFolder
from rorchat.training.sampler import count_steps, training_order
from rorchat.training.sft import SFTArguments
from rorchat.training.train_and_save import train


@pytest.fixture
def model(tokenizer):
    return build_model("2x2x32", tokenizer, 64).eval()


def batch(model, masked: bool = True) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(20, model.config.vocab_size, (3, 40), generator=generator)
    labels = ids.clone()
    if masked:
        labels[torch.rand(ids.shape, generator=generator) < 0.5] = -100
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("rows_at_once", [1, 7, 10_000])
def test_the_fused_loss_and_its_gradients_equal_those_of_full_logits(model, monkeypatch, rows_at_once):
    monkeypatch.setattr("rorchat.training.kernels.sliced_head.MAX_LOGITS", rows_at_once * model.config.vocab_size)
    data = batch(model)
    hidden = torch.randn(3, 40, 32, dtype=torch.float32, requires_grad=True)
    weight = model.lm_head.weight.detach().clone().requires_grad_()
    fused = head_loss(hidden, weight, data["labels"])
    fused.mul(0.37).backward()
    gradients = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    logits = hidden[:, :-1] @ weight.T
    plain = F.cross_entropy(logits.reshape(-1, logits.size(-1)), data["labels"][:, 1:].reshape(-1), reduction="sum")
    plain.mul(0.37).backward()
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gradients[0], hidden.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradients[1], weight.grad, rtol=1e-4, atol=1e-5)


def test_a_patched_model_has_the_loss_and_logits_of_the_stock_model(model):
    data = batch(model)
    stock = model(**data)
    patched = copy.deepcopy(model)
    patch_lm_head_loss(patched)
    patch_gelu(patched)
    torch.testing.assert_close(patched(**data).loss, stock.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(patched(data["input_ids"]).logits, stock.logits, rtol=1e-4, atol=1e-5)
    assert patched(**data, num_items_in_batch=7).loss.item() == pytest.approx(
        stock.loss.item() * int((data["labels"][:, 1:] != -100).sum()) / 7, rel=1e-5
    )


def test_a_patched_model_has_the_gradients_of_the_stock_model(model):
    data, patched = batch(model), copy.deepcopy(model)
    patch_lm_head_loss(patched)
    model(**data).loss.backward()
    patched(**data).loss.backward()
    for (name, expected), (_, actual) in zip(model.named_parameters(), patched.named_parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_a_batch_without_labels_has_zero_loss_and_gradients(model):
    patch_lm_head_loss(model)
    data = batch(model)
    data["labels"].fill_(-100)
    loss = model(**data, num_items_in_batch=5).loss
    loss.backward()
    assert loss.item() == 0
    assert float(model.transformer.wte.weight.grad.abs().sum()) == 0


def test_the_initial_loss_is_that_of_a_uniform_distribution(model):
    loss = model(**batch(model, masked=False)).loss.item()
    assert loss == pytest.approx(np.log(model.config.vocab_size), abs=0.1)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "muon"])
def test_every_optimizer_can_overfit_one_batch(model, name):
    patch_lm_head_loss(model)
    data = batch(model, masked=False)
    optimizer = build_optimizer(model, name, learning_rate=1e-2, matrix_learning_rate=1e-2, weight_decay=0.0)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(**data).loss
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


def test_right_padding_does_not_change_the_gradients(model):
    patch_lm_head_loss(model)
    rows = [{key: value[0][:length] for key, value in batch(model).items()} for length in (40, 11, 25)]
    model(**collate_padded(rows, pad_id=3), num_items_in_batch=10).loss.backward()
    together = model.transformer.wte.weight.grad.clone()
    model.zero_grad()
    for row in rows:
        model(**collate_padded([row], pad_id=3), num_items_in_batch=10).loss.backward()
    torch.testing.assert_close(together, model.transformer.wte.weight.grad, rtol=1e-4, atol=1e-6)


def test_muon_orthogonalizes_q_k_and_v_separately(model):
    optimizer = build_optimizer(model, "muon", learning_rate=0.0, matrix_learning_rate=1.0, weight_decay=0.0)
    weight = model.transformer.h[0].attn.c_attn.weight
    before = weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    for update in (weight.detach() - before).chunk(3, dim=1):  # an orthogonal (32, 32) matrix x 0.2 x sqrt(32)
        assert float(torch.linalg.svdvals(update).mean()) == pytest.approx(0.2 * 32**0.5, rel=0.3)


def test_every_parameter_is_in_one_group_and_muon_gets_only_matrices(model):
    optimizer = build_optimizer(model, "muon", learning_rate=1.0, matrix_learning_rate=2.0, weight_decay=0.1)
    members = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(members) == sorted(id(parameter) for parameter in model.parameters())
    muon = [p for group in optimizer.param_groups if group["use_muon"] for p in group["params"]]
    assert len(muon) == 4 * model.config.n_layer
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates[id(model.transformer.wte.weight)] == 10.0 and rates[id(model.transformer.wpe.weight)] == 1.0
    assert {p.ndim for p in muon} == {2}


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "muon"])
def test_an_optimizer_resumes_exactly_from_its_state(model, name):
    def steps(model, optimizer, count):
        for number in range(count):
            for index, parameter in enumerate(model.parameters()):
                generator = torch.Generator().manual_seed(1000 * number + index)
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()

    settings = {"learning_rate": 1e-3, "matrix_learning_rate": 1e-3, "weight_decay": 0.1}
    optimizer = build_optimizer(model, name, **settings)
    steps(model, optimizer, 2)
    other = copy.deepcopy(model)
    resumed = build_optimizer(other, name, **settings)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(model, optimizer, 2)
    steps(other, resumed, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_the_order_of_rows_depends_on_the_seed_and_groups_rows_by_length():
    lengths = np.random.default_rng(0).integers(5, 100, 400)
    order = training_order(lengths, rows=800, batch_size=8, seed=0)
    assert np.array_equal(order, training_order(lengths, 800, 8, 0))
    assert not np.array_equal(order, training_order(lengths, 800, 8, 1))
    spread = np.ptp(lengths[order].reshape(-1, 8), axis=1).mean()
    assert spread < 0.2 * np.ptp(lengths)


@pytest.mark.parametrize("rows", [8, 9, 100])
def test_no_batch_contains_a_row_twice_if_epochs_are_short(rows):
    order = training_order(np.random.default_rng(0).integers(5, 100, rows), rows=8 * rows, batch_size=8, seed=0)
    assert np.array_equal(np.sort(order.reshape(8, rows)), np.tile(np.arange(rows), (8, 1)))
    assert all(len(set(batch)) == 8 for batch in order.reshape(-1, 8).tolist())


@pytest.mark.parametrize(("rows", "epochs", "steps"), [(47, 1, 2), (64, 1, 2), (10, 1, 1), (47, 2, 3)])
def test_the_steps_of_an_epoch_cover_all_rows(rows, epochs, steps):
    sizes = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4, "world_size": 1}
    assert count_steps(SimpleNamespace(**sizes, max_steps=-1, num_train_epochs=epochs), rows) == steps


BASE = ["--sources", "tinytown=10", "--output_dir", "x", "--block_size", "64", "--per_device_train_batch_size", "2"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"max_steps": 2_500_001, "num_train_epochs": 3.0},
            "max_steps is 2,500,001, so that .* 10,000,004 rows: .* 2,500,000 ",
        ),
        ({"max_steps": -1, "num_train_epochs": 1e18}, r"num_train_epochs is 1e\+18, so that"),
    ],
)
def test_more_rows_than_have_room_in_memory_are_refused(settings, message):
    """The order of the rows of the whole run is computed at the start."""
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "world_size": 1}
    with pytest.raises(UsageError, match=message):
        count_steps(SimpleNamespace(**sizes, **settings), 10)
    assert count_steps(SimpleNamespace(**sizes, max_steps=2_500_000), 10) == 2_500_000


def test_gradient_accumulation_is_derived_from_the_global_batch():
    arguments = parse(PretrainArguments, [*BASE, "--global_batch_tokens", "512", "--train_tokens", "5120"])
    assert (arguments.gradient_accumulation_steps, arguments.max_steps) == (4, 10)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--global_batch_tokens", "500"], "--global_batch_tokens 384 "),
        (["--global_batch_tokens", "512", "--train_tokens", "511"], "less than one step"),
        (["--block_sise", "3"], "Did you mean 'block_size'"),
        (["--block_size", "many"], "invalid int value"),
        (["--optimizer", "adan"], "Did you mean 'adamw'"),
        (["--validation_share", "0"], "between 0 and 1"),
        (["--optim", "adamw_bnb_8bit"], "chosen by `optimizer`"),
        (["--gradient_accumulation_steps", "2"], "global_batch_tokens"),
        (["--per_device_train_batch_size", "0"], "give a positive number"),
    ],
)
def test_invalid_flags_raise_a_one_line_error(flags, message):
    with pytest.raises(UsageError, match=message) as error:
        parse(PretrainArguments, [*BASE, *flags])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("learning_rat: 1", "unknown key 'learning_rat'. Did you mean 'learning_rate'"),
        ("block_size: [1, 2]", "expected an int"),
        ("block_size: 1.5", "expected an int"),
        ("learning_rate: fast", "expected a number"),
        ("learning_rate: true", "expected a number"),
        ("sources: tinytown=10", "expected a list of strings"),
        ("sources: [5]", "expected a list of strings"),
        ("weights: [a, b]", "expected a list of numbers"),
        ("size: 124", "expected a string"),
        ("eval_strategy: no", "in quotes"),
        ("fp16: maybe", "expected true or false"),
    ],
)
def test_an_error_in_a_config_names_file_and_line(tmp_path, line, message):
    config = tmp_path / "c.yaml"
    config.write_text(f"# a comment\n{line}\n")
    with pytest.raises(UsageError) as error:
        parse(PretrainArguments, ["--config", str(config), *BASE])
    assert message in str(error.value) and f"{config}:2: " in str(error.value)


def test_flags_override_the_config_and_the_config_overrides_defaults(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("sources: [tinytown=10]\noutput_dir: x\nlearning_rate: 6e-4\nmax_steps: 7\n")
    arguments = parse(SFTArguments, ["--config", str(config), "--max_steps", "3"])
    assert (arguments.learning_rate, arguments.max_steps, arguments.per_device_train_batch_size) == (6e-4, 3, 8)
    assert arguments.given == {"learning_rate": 6e-4, "max_steps": 3, "output_dir": "x", "sources": ["tinytown=10"]}


def test_the_logged_loss_of_a_row_is_the_mean_over_its_predicted_tokens(tokenizer, tmp_path):
    """Not over the row's length: position 0 is not a target, but Transformers counts it for GPT-2."""
    import json

    from training_support import build_pretrain_trainer

    flags = ["--global_batch_tokens", "128", "--max_steps", "1", "--logging_steps", "1", "--eval_strategy", "no"]
    flags += ["--validation_share", "0.1", "--bf16", "false"]
    base = [*BASE[:1], "tinytown=60", "--output_dir", str(tmp_path), *BASE[4:]]
    arguments = parse(PretrainArguments, [*base, *flags])
    model = build_model("2x2x32", tokenizer, 64)
    stock = copy.deepcopy(model)
    trainer = build_pretrain_trainer(model, arguments, tokenizer)
    rows = [trainer.mixture[index] for index in range(2)]
    with torch.no_grad():
        expected = stock(**collate_padded(rows, 0)).loss.item()
    trainer.train()
    logged = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    assert logged == pytest.approx(expected, abs=2e-4)  # a factor 63/64 is 0.09


@pytest.mark.parametrize("max_eval_tokens", [0, 200, 10**6])
def test_evaluations_read_at_most_so_many_tokens_and_the_start_says_so(max_eval_tokens, tokenizer, tmp_path, capsys):
    flags = ["--sources", "tinytown=120", "persona=60", "--size", "2x2x32", "--block_size", "32", "--bf16", "false"]
    flags += ["--per_device_train_batch_size", "2", "--global_batch_tokens", "128", "--max_steps", "1"]
    flags += ["--validation_share", "0.2", "--save_strategy", "no", "--sample_prompts", "--eval_steps", "1"]
    flags += ["--max_eval_tokens", str(max_eval_tokens), "--output_dir", str(tmp_path / "run")]
    arguments = parse(PretrainArguments, flags)
    run = RunFolder(arguments, "pretrain", {})
    stores = prepare_token_stores(arguments, tokenizer)
    details = describe_mixture(build_mixture(arguments, stores).plan, stores, [], arguments.max_eval_tokens)
    trainer = build_pretrain_trainer(
        build_model("2x2x32", tokenizer, 32), arguments, tokenizer, context=run.context(details), stores=stores
    )
    metrics = train(run, trainer)
    held_out = sum(store.tokens("validation") for store in stores)
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())["evaluated_share"]
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("validation: ")]
    assert held_out > 2000 and {"eval_tinytown_loss", "eval_persona_loss"} < metrics.keys()
    if max_eval_tokens == 200:
        assert metrics["eval_tokens"] <= 200 and recorded == 200 / held_out
        assert told == [
            f"validation: every evaluation reads {recorded:.2%} of the validation split, 200 tokens, evenly spaced and "
            "the same each time; --max_eval_tokens 0 reads all of it"
        ]
    else:
        assert (metrics["eval_tokens"], recorded, told) == (held_out - len(stores), 1, [])
