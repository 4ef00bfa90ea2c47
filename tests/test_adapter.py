"""Adapters in a folder: those of another base are refused, those of plain PEFT predict what PEFT predicts."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from lora_support import POSITIONS, SIZE, compute_logits, load_with_adapter, save_base
from peft import AutoPeftModelForCausalLM, IA3Config, LoraConfig, LoraModel, get_peft_model
from transformers import GPT2LMHeadModel

from rorchat.errors import DataError, MismatchError, UsageError
from rorchat.inference.engine import load_model
from rorchat.model import build_model, load_checkpoint, save_model


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"), tokenizer)


class TestOtherBase:
    @pytest.fixture
    def folder(self, base, tokenizer, tmp_path) -> Path:
        model, adapter = load_with_adapter(base, tokenizer)
        adapter.save(tmp_path / "adapter", tokenizer)
        return tmp_path / "adapter"

    def set_base(self, folder: Path, base: object, keep_record: bool = True) -> None:
        """Makes the adapter name another base. Plain PEFT writes no record of the base: `keep_record=False`."""
        config = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": base}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        if not keep_record:
            (folder / "base.json").unlink()

    def assert_raises(self, kind, folder: Path, tokenizer, *parts: str) -> None:
        with pytest.raises(kind) as caught:
            load_checkpoint(str(folder), tokenizer)
        assert "\n" not in str(caught.value)
        for part in parts:
            assert part in str(caught.value)

    def test_other_weights_differ_by_sha256(self, folder, base, tokenizer, tmp_path):
        shutil.copytree(base, tmp_path / "other")
        model = load_checkpoint(str(base), tokenizer)
        model.transformer.h[0].mlp.c_fc.bias.data += 1e-6
        save_model(model, tokenizer, tmp_path / "other")
        self.set_base(folder, str(tmp_path / "other"))
        self.assert_raises(MismatchError, folder, tokenizer, "was trained with another model", "sha256 differs")

    @pytest.mark.parametrize("shard", ["5GB", "40KB"])
    def test_other_weights_on_the_hub_differ_by_sha256(self, base, tokenizer, tmp_path, monkeypatch, shard):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        cached, commit = tmp_path / "models--user--base", "0" * 40
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text(commit)
        model = load_checkpoint(str(base), tokenizer)
        model.save_pretrained(cached / "snapshots" / commit, max_shard_size=shard)
        _, adapter = load_with_adapter("user/base", tokenizer)
        adapter.save(tmp_path / "adapter", tokenizer)
        load_checkpoint(str(tmp_path / "adapter"), tokenizer)
        model.transformer.ln_f.bias.data += 1e-6
        model.save_pretrained(cached / "snapshots" / commit, max_shard_size=shard)
        assert len(list((cached / "snapshots" / commit).glob("*.safetensors"))) > (shard == "40KB")
        self.assert_raises(
            MismatchError, tmp_path / "adapter", tokenizer, "another model than user/base", "sha256 differs"
        )

    @pytest.mark.parametrize("size", ["3x2x32", "1x2x32", "2x2x64"])
    def test_other_size_names_a_matrix_that_does_not_fit(self, folder, tokenizer, tmp_path, size):
        save_model(build_model(size, tokenizer, POSITIONS), tokenizer, tmp_path / "other")
        self.set_base(folder, str(tmp_path / "other"), keep_record=False)
        self.assert_raises(MismatchError, folder, tokenizer, "does not fit", "lora_A", "another base model")

    def test_base_with_fewer_tokens(self, folder, tokenizer, tmp_path):
        config = json.loads((folder / "adapter_config.json").read_text())
        config["trainable_token_indices"] = [len(tokenizer)]
        (folder / "adapter_config.json").write_text(json.dumps(config))
        self.assert_raises(MismatchError, folder, tokenizer, f"row for token {len(tokenizer)}", "another base model")

    def test_base_that_is_missing_unnamed_or_an_adapter(self, folder, tokenizer, tmp_path):
        self.set_base(folder, str(tmp_path / "gone"))
        self.assert_raises(DataError, folder, tokenizer, f"{tmp_path / 'gone'}, does not exist: restore it")
        self.set_base(folder, None)
        self.assert_raises(DataError, folder, tokenizer, "does not name its base model", "adapter_config.json")
        self.set_base(folder, str(folder))
        self.assert_raises(DataError, folder, tokenizer, "is an adapter itself")

    def test_damaged_and_missing_weights(self, folder, tokenizer):
        (folder / "adapter_model.safetensors").write_bytes(b"damaged")
        self.assert_raises(DataError, folder, tokenizer, "Cannot load the adapter")
        (folder / "adapter_model.safetensors").unlink()
        self.assert_raises(DataError, folder, tokenizer, "Cannot load the adapter")
        (folder / "adapter_config.json").write_text("{")
        self.assert_raises(DataError, folder, tokenizer, "cannot be read")

    def test_adapter_of_another_type(self, base, tokenizer, tmp_path):
        config = IA3Config(target_modules=["c_attn"], feedforward_modules=[], base_model_name_or_path=str(base))
        get_peft_model(build_model(SIZE, tokenizer, POSITIONS), config).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        self.assert_raises(DataError, tmp_path, tokenizer, "of type IA3", "only LORA")

    def test_adapter_as_base_or_rank_above_width(self, folder, base, tokenizer):
        with pytest.raises(UsageError, match="is an adapter itself: give a whole model"):
            load_with_adapter(folder, tokenizer)
        with pytest.raises(UsageError, match="the width of the model is only 32"):
            load_with_adapter(base, tokenizer, rank=33)


def save_plain_adapter(folder: Path, base: Path, tokenizer, **settings) -> torch.Tensor:
    """Saves an adapter with random weights as PEFT does, and returns the logits of the model that PEFT loads."""
    settings = {"target_modules": ["c_attn"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"} | settings
    model = get_peft_model(GPT2LMHeadModel.from_pretrained(base), LoraConfig(**settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator) * 0.03
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return compute_logits(AutoPeftModelForCausalLM.from_pretrained(folder), tokenizer)


PLAIN_ADAPTERS = {
    "matrices": {},
    "embedding": {"target_modules": ["wte", "c_attn"]},
    "head": {"target_modules": ["lm_head", "c_attn"]},
    "embedding and head": {"target_modules": ["wte", "lm_head"]},
    "tied by PEFT": {"target_modules": ["wte", "c_attn"], "ensure_weight_tying": True},
    "positions": {"target_modules": ["wpe", "c_proj"]},
    "all linear layers": {"target_modules": "all-linear"},
    "whole embedding": {"modules_to_save": ["wte"]},
    "whole head": {"modules_to_save": ["lm_head"]},
    "whole norms": {"modules_to_save": ["ln_1", "ln_f"]},
    "some rows": {"trainable_token_indices": [3, 300]},
    "other rows of embedding and head": {"trainable_token_indices": {"wte": [3, 5], "lm_head": [7]}},
    "DoRA": {"use_dora": True, "target_modules": ["c_attn", "c_fc"]},
    "rank-stabilized": {"use_rslora": True, "r": 8, "rank_pattern": {"h.1.attn.c_attn": 2}, "lora_alpha": 16},
    "all biases": {"bias": "all"},
    "biases of the adapter's layers": {"bias": "lora_only"},
    "biases of the adapter": {"lora_bias": True},
    "one layer": {"layers_to_transform": [1], "layers_pattern": "h"},
}


@pytest.mark.parametrize("settings", PLAIN_ADAPTERS.values(), ids=PLAIN_ADAPTERS)
def test_an_adapter_of_plain_peft_predicts_what_peft_predicts(base, tokenizer, tmp_path, settings):
    expected = save_plain_adapter(tmp_path / "adapter", base, tokenizer, **settings)
    stock = compute_logits(load_checkpoint(str(base), tokenizer), tokenizer)
    if settings.get("bias") != "lora_only":  # PEFT 0.21 does not save these biases
        assert float((expected - stock).abs().max()) > 1e-3
    loaded = load_model(str(tmp_path / "adapter"), "cpu").model
    save_model(loaded, tokenizer, tmp_path / "merged")
    for model in (loaded, GPT2LMHeadModel.from_pretrained(tmp_path / "merged")):
        torch.testing.assert_close(compute_logits(model, tokenizer), expected, rtol=0, atol=1e-5)


def test_an_adapter_that_is_active_after_certain_tokens_only_is_a_mismatch(base, tokenizer, tmp_path):
    save_plain_adapter(tmp_path, base, tokenizer, alora_invocation_tokens=[5, 6])
    with pytest.raises(MismatchError, match="merge") as caught:
        load_checkpoint(str(tmp_path), tokenizer)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_merge_that_changes_the_predictions_is_a_mismatch(base, tokenizer, tmp_path, monkeypatch):
    save_plain_adapter(tmp_path, base, tokenizer)
    monkeypatch.setattr(LoraModel, "merge_and_unload", LoraModel.unload)  # as if PEFT could not merge this adapter
    with pytest.raises(
        MismatchError, match="cannot be merged into a stock GPT-2: its predictions would change by up to"
    ):
        load_checkpoint(str(tmp_path), tokenizer)
