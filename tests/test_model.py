"""Stock GPT-2 models of every size, and checkpoints with enlarged embeddings."""

import json
import shutil

import pytest
import torch
from hub_folders import hub_gpt2
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from rorchat.chatml import CONTROL_TOKENS
from rorchat.errors import DataError, MismatchError, UsageError
from rorchat.model import SIZES, build_model, check_fit, load_checkpoint, padding_multiple, parse_shape, save_model


@pytest.fixture(scope="session")
def small_gpt2(tmp_path_factory, shared_data):
    folder = tmp_path_factory.mktemp("gpt2")
    stock = hub_gpt2(folder, n_layer=2, n_head=2, n_embd=64, n_positions=128)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(shared_data / "gpt2_tokenizer" / name, folder / name)
    return folder, stock


@pytest.mark.parametrize(
    ("size", "tokens", "millions"),
    [
        ("51m", 50304, 51.5),
        ("124m", 50304, 124.5),
        ("355m", 50304, 354.9),
        ("561m", 65536, 557.5),
        ("774m", 50304, 774.1),
        ("1.5b", 50304, 1557.7),
    ],
)
def test_a_size_has_the_parameters_of_its_name(size, tokens, millions):
    shape = parse_shape(size)
    with torch.device("meta"):
        config = GPT2Config(vocab_size=tokens, n_layer=shape.n_layer, n_head=shape.n_head, n_embd=shape.n_embd)
        count = GPT2LMHeadModel(config).num_parameters()
    assert count / 1e6 == pytest.approx(millions, abs=0.06)


def test_a_shape_is_parsed_and_an_invalid_one_is_refused():
    assert parse_shape("6x5x160") == parse_shape("6X5X160")
    assert (parse_shape("6x5x160").n_layer, parse_shape("6x5x160").n_embd) == (6, 160)
    for size, message in (
        ("124", "Did you mean '124m'"),
        ("6x5", "layers x heads x width"),
        ("2x3x64", "not divisible by 3"),
        ("0x1x8", "No model size"),
    ):
        with pytest.raises(UsageError, match=message):
            parse_shape(size)
    assert set(SIZES) == {"demo", "51m", "124m", "355m", "561m", "774m", "1.5b"}


def test_the_seed_determines_the_weights(tokenizer):
    first, again, other = (build_model("2x2x32", tokenizer, 64, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["transformer.wte.weight"], other["transformer.wte.weight"])


def test_a_saved_model_loads_with_plain_transformers(tokenizer, tmp_path):
    model = build_model("2x2x32", tokenizer, 64)
    save_model(model, tokenizer, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["architectures"], config["model_type"], "auto_map" in config) == (["GPT2LMHeadModel"], "gpt2", False)
    assert config["activation_function"] == "gelu_new"
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    im_end, end_of_text = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert loaded.generation_config.eos_token_id == [im_end, end_of_text]
    assert loaded.generation_config.pad_token_id == tokenizer.pad_token_id
    assert AutoTokenizer.from_pretrained(tmp_path).model_max_length == 64
    assert not list(tmp_path.glob("*.bin"))


def test_enlarged_embeddings_keep_the_old_logits(small_gpt2, gpt2_tokenizer):
    folder, stock = small_gpt2
    model = load_checkpoint(str(folder), gpt2_tokenizer).eval()
    assert model.get_input_embeddings().num_embeddings == 50_304
    ids = torch.randint(0, 50_257, (2, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = (model(ids).logits[..., :50_257] - stock.eval()(ids).logits).abs().max()
    assert difference < 1e-5


def test_new_embedding_rows_are_as_far_apart_as_old_ones(small_gpt2, gpt2_tokenizer):
    model = load_checkpoint(str(small_gpt2[0]), gpt2_tokenizer)
    weight = model.get_input_embeddings().weight.detach()
    old = weight[:50_257]
    usual = (old[:1000] - old[1000:2000]).norm(dim=1).mean()
    rows = weight[torch.tensor([gpt2_tokenizer.convert_tokens_to_ids(token) for token in CONTROL_TOKENS[1:]])]
    for one in range(3):
        for other in range(one):
            assert 0.5 * usual < (rows[one] - rows[other]).norm() < 2 * usual


def test_enlarged_embeddings_stay_tied_after_saving(small_gpt2, gpt2_tokenizer, tmp_path):
    model = load_checkpoint(str(small_gpt2[0]), gpt2_tokenizer)
    save_model(model, gpt2_tokenizer, tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    again = load_checkpoint(str(tmp_path), gpt2_tokenizer)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_more_embedding_rows_than_tokens_are_a_mismatch(small_gpt2, tokenizer):
    with pytest.raises(MismatchError, match="50,257 embedding rows"):
        load_checkpoint(str(small_gpt2[0]), tokenizer)


@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_a_padded_vocabulary_are_dropped_and_told(tied, tokenizer, tmp_path, capsys):
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=512, n_positions=64, n_embd=32, n_layer=2, n_head=2, tie_word_embeddings=tied)
    ).eval()
    model.save_pretrained(tmp_path)
    padded = load_checkpoint(str(tmp_path), tokenizer)
    check_fit(padded, tokenizer)
    ids = torch.arange(60)[None]
    with torch.no_grad():
        torch.testing.assert_close(padded(ids).logits, model(ids).logits[..., : len(tokenizer)], rtol=0, atol=1e-6)
    assert "of its 512 embedding rows, the last 128 are dropped" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "multiple"),
    [(50_304, 128), (51_200, 1024), (65_536, 1024), (50_260, 64), (50_257, 64), (1536, 512), (1088, 64)],
)
def test_the_padding_of_a_vocabulary_is_less_than_a_power_of_two_that_divides_it(rows, multiple):
    assert padding_multiple(rows) == multiple


@pytest.mark.parametrize("rows", [768, 384 + 64])
def test_the_tokenizer_of_a_smaller_vocabulary_is_not_taken_for_that_of_a_padded_one(rows, tokenizer, tmp_path):
    """It has 384 tokens: no vocabulary of so few is padded to so many rows."""
    GPT2LMHeadModel(GPT2Config(vocab_size=rows, n_positions=64, n_embd=32, n_layer=1, n_head=2)).save_pretrained(
        tmp_path
    )
    with pytest.raises(MismatchError, match=f"has {rows} embedding rows, but the tokenizer has 384 tokens"):
        load_checkpoint(str(tmp_path), tokenizer)


def test_new_rows_of_an_untied_head_are_no_copies_of_those_of_the_embedding(gpt2_tokenizer, tmp_path):
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, tie_word_embeddings=False)).save_pretrained(tmp_path)
    model = load_checkpoint(str(tmp_path), gpt2_tokenizer)
    embedding, head = model.transformer.wte.weight.detach(), model.lm_head.weight.detach()
    assert len(embedding) == len(head) == 50_304
    assert not torch.isclose(embedding[50_257:], head[50_257:]).any(1).all()
    for matrix in (embedding, head):
        assert float(matrix[50_257:].std()) == pytest.approx(float(matrix[:50_257].std()), rel=0.3)


def test_an_embedding_and_a_head_that_differ_are_untied_whatever_the_config_says(tokenizer, tmp_path):
    model = build_model("2x2x32", tokenizer, 64)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    save_model(model, tokenizer, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8")) | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    loaded = load_checkpoint(str(tmp_path), tokenizer)
    assert loaded.config.tie_word_embeddings is False
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weight: weight.view(-1)[7:8].fill_(torch.nan), "first in transformer.h.1.mlp.c_fc.weight"),
        (lambda weight: weight.view(-1)[7:8].fill_(-torch.inf), "NaN or infinite values"),
        (lambda weight: weight.fill_(1e38), "because its weights are too large"),
    ],
    ids=["nan", "infinite", "too large"],
)
def test_a_model_that_has_diverged_is_refused(change, message, tokenizer, tmp_path):
    model = build_model("2x2x32", tokenizer, 64)
    change(model.transformer.h[1].mlp.c_fc.weight.data)
    save_model(model, tokenizer, tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        load_checkpoint(str(tmp_path), tokenizer)
    assert "\n" not in str(caught.value)


def test_another_architecture_is_refused(tmp_path, tokenizer):
    with pytest.raises(DataError, match="No model folder"):
        load_checkpoint(str(tmp_path / "nothing"), tokenizer)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(DataError, match="llama"):
        load_checkpoint(str(tmp_path), tokenizer)


def test_a_checkpoint_with_missing_weights_is_refused(tokenizer, tmp_path):
    model = build_model("2x2x32", tokenizer, 64)
    save_model(model, tokenizer, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("transformer.h.1.mlp.c_fc.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match="has no weights for"):
        load_checkpoint(str(tmp_path), tokenizer)


def test_a_truncated_weight_file_is_refused(tokenizer, tmp_path):
    save_model(build_model("2x2x32", tokenizer, 64), tokenizer, tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:1000])
    with pytest.raises(DataError, match="Cannot load the weights"):
        load_checkpoint(str(tmp_path), tokenizer)


def test_rows_longer_than_the_context_window_are_a_mismatch(tokenizer):
    model = build_model("2x2x32", tokenizer, 64)
    check_fit(model, tokenizer, 64)
    with pytest.raises(MismatchError, match="only 64 positions"):
        check_fit(model, tokenizer, 65)
