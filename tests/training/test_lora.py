"""LoRA: what learns and what stays, adapters that plain PEFT loads, merged models that stop, runs that go on."""

import copy
import json
import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from faults.comparison import load_state, read_log, states_equal
from faults.harness import ROOT, verified_steps, weights_sha256
from peft import AutoPeftModelForCausalLM, IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from support import SENTENCES, command
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from rorchat.chatml import CONTROL_TOKENS, encode_conversations
from rorchat.errors import DataError, MismatchError, UsageError
from rorchat.files import file_sha256
from rorchat.inference.engine import load_model
from rorchat.model import build_model, load_checkpoint, save_model
from rorchat.tokenizer import load_tokenizer
from rorchat.training.arguments import parse
from rorchat.training.checkpointing.checkpoint import seal
from rorchat.training.dpo import DPOArguments
from rorchat.training.kernels.lm_head_loss import patch_gelu, patch_lm_head_loss
from rorchat.training.lora import Adapter
from rorchat.training.optim import build_optimizer
from rorchat.training.sft import SFTArguments

SIZE, POSITIONS, RANK = "2x2x32", 128, 4
EMBEDDING = "transformer.wte.weight"


def settings(rank: int = RANK, load_in_4bit: bool = False):
    """As much of a stage's arguments as an adapter reads."""
    return SimpleNamespace(lora_rank=rank, load_in_4bit=load_in_4bit, bf16=False, fp16=False, device="cpu")


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory) -> Path:
    """A stock model with the control tokens; its rows are large enough for the tokens to differ."""
    folder = tmp_path_factory.mktemp("base")
    model = build_model(SIZE, tokenizer, POSITIONS)
    model.transformer.wte.weight.data *= 10
    save_model(model, tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def small_base(tmp_path_factory) -> Path:
    """A model as GPT-2 is: its tokenizer has no control token but `<|endoftext|>`, and its embedding no row for one."""
    folder = tmp_path_factory.mktemp("small")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    bpe.train_from_iterator(SENTENCES, trainer)
    PreTrainedTokenizerFast(tokenizer_object=bpe, clean_up_tokenization_spaces=False).save_pretrained(folder)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=290, n_positions=POSITIONS, n_layer=2, n_head=2, n_embd=32))
    model.transformer.wte.weight.data *= 10
    model.save_pretrained(folder)
    return folder


def adapted(folder: Path, tokenizer, **more) -> tuple[GPT2LMHeadModel, Adapter]:
    model = load_checkpoint(str(folder), tokenizer)
    return model, Adapter(model, tokenizer, settings(**more), str(folder))


def batch(tokenizer, rows: int = 3) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, len(tokenizer), (rows, 40), generator=draw)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=draw) < 0.5, -100)
    return {"input_ids": ids, "labels": labels}


def trained(model: GPT2LMHeadModel, tokenizer, steps: int = 5, optimizer: str = "adamw") -> None:
    patch_lm_head_loss(model)
    optimizer = build_optimizer(model, optimizer, learning_rate=1e-2, matrix_learning_rate=0, weight_decay=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch(tokenizer)).loss.backward()
        optimizer.step()


@torch.no_grad()
def logits_of(model, tokenizer) -> torch.Tensor:
    return model.eval()(input_ids=batch(tokenizer)["input_ids"]).logits


def near(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


@pytest.mark.xfail(strict=True, raises=AttributeError, reason="TRL 1.16 reads the bias of a head that PEFT 0.21 wraps")
def test_plain_trl_and_peft_train_the_rows_of_new_tokens_of_gpt2(tokenizer, tmp_path):
    config = LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, trainable_token_indices=[1, 2])
    rows = Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}] * 2)
    arguments = SFTConfig(
        tmp_path, max_steps=1, bf16=False, use_cpu=True, report_to="none", dataset_kwargs={"skip_prepare_dataset": True}
    )
    trainer = SFTTrainer(
        build_model(SIZE, tokenizer, 64), arguments, train_dataset=rows, processing_class=tokenizer, peft_config=config
    )
    trainer.train()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_fused_loss_and_its_gradients_are_those_of_peft(base, tokenizer, checkpointing):
    model, _ = adapted(base, tokenizer)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "tokens_delta" in name:  # zeros, and the rows that it stands for
            torch.nn.init.normal_(parameter, std=0.1)
    plain, data = copy.deepcopy(model), batch(tokenizer)
    patch_lm_head_loss(model)
    patch_gelu(model)
    if checkpointing:
        model.train().gradient_checkpointing_enable()
    expected, found = plain(**data).loss, model(**data).loss
    expected.backward()
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    learning = 0
    for (name, a), b in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None) == (not a.requires_grad), name
        if a.requires_grad:
            assert float(a.grad.abs().sum()) > 0, name
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-6, msg=name)
            learning += a.numel()
    assert learning == 2 * RANK * (128 + 64 + 160 + 160) + 4 * 32  # two layers: c_attn, c_proj, c_fc, c_proj; rows


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_the_rows_of_the_control_tokens_learn_and_all_others_stay_to_the_bit(base, tokenizer, optimizer):
    model, adapter = adapted(base, tokenizer)
    before = load_checkpoint(str(base), tokenizer).state_dict()
    trained(model, tokenizer, optimizer=optimizer)
    after = adapter.merged().state_dict()
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(after[name], before[name])}
    matrices = {f"transformer.h.{n}.{m}.weight" for n in range(2) for m in ("attn.c_attn", "attn.c_proj", "mlp.c_fc")}
    matrices |= {f"transformer.h.{n}.mlp.c_proj.weight" for n in range(2)}
    assert changed == {*matrices, EMBEDDING, "lm_head.weight"}
    rows = (after[EMBEDDING] != before[EMBEDDING]).any(1).nonzero().flatten().tolist()
    assert rows == sorted(tokenizer.convert_tokens_to_ids(list(CONTROL_TOKENS)))


@pytest.mark.parametrize("folder", ["base", "small_base"])
def test_merged_logits_are_those_of_the_adapter_in_training_and_in_plain_peft(folder, request, tmp_path):
    folder = request.getfixturevalue(folder)
    tokenizer = load_tokenizer(str(folder))
    model, adapter = adapted(folder, tokenizer)
    trained(model, tokenizer)
    learned = logits_of(model, tokenizer)
    adapter.save(tmp_path / "adapter", tokenizer)
    merged = adapter.merged()
    assert type(merged) is GPT2LMHeadModel and not [name for name in merged.state_dict() if "lora" in name]
    save_model(merged, tokenizer, tmp_path / "model")
    near(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), tokenizer), learned)
    torch.manual_seed(7)  # the rows that a base grows by come from the adapter, not from a seed
    plain = GPT2LMHeadModel.from_pretrained(folder)
    plain.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    near(logits_of(PeftModel.from_pretrained(plain, tmp_path / "adapter"), tokenizer), learned)
    near(logits_of(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"), tokenizer), learned)
    near(logits_of(load_model(str(tmp_path / "adapter"), "cpu").model, tokenizer), learned)
    assert not [name for name in (tmp_path / "adapter").iterdir() if name.suffix in (".bin", ".pt")]
    said = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == str(folder) and said["target_modules"] == ["c_attn", "c_fc", "c_proj"]


class TestFourBits:
    def test_the_merged_model_computes_as_the_one_in_4_bits_with_its_adapter(self, small_base, tmp_path):
        tokenizer = load_tokenizer(str(small_base))
        model, adapter = adapted(small_base, tokenizer, load_in_4bit=True)
        rounded = logits_of(model, tokenizer)
        stock = logits_of(load_checkpoint(str(small_base), tokenizer), tokenizer)
        assert 1e-4 < float((rounded - stock).abs().max()) < 1
        trained(model.train(), tokenizer)
        learned = logits_of(model, tokenizer)
        assert float((learned - rounded).abs().max()) > 0.1
        adapter.save(tmp_path / "adapter", tokenizer)
        merged = adapter.merged()
        save_model(merged, tokenizer, tmp_path / "model")
        near(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), tokenizer), learned)
        near(logits_of(load_checkpoint(str(tmp_path / "adapter"), tokenizer), tokenizer), learned)

    def test_gradients_go_through_the_frozen_matrices_after_an_evaluation_too(self, tokenizer, tmp_path):
        """bitsandbytes 0.50 cuts them off where the CPU has AVX512-BF16 and widths are multiples of 64."""
        save_model(build_model("2x2x64", tokenizer, POSITIONS), tokenizer, tmp_path)
        model, _ = adapted(tmp_path, tokenizer, load_in_4bit=True)
        patch_lm_head_loss(model)
        gradients = []
        for _ in range(2):
            model.train().zero_grad()
            model(**batch(tokenizer)).loss.backward()
            gradients.append(model.transformer.h[0].attn.c_attn.lora_B["default"].weight.grad.clone())
            logits_of(model, tokenizer)
        assert float(gradients[0].abs().sum()) > 0 and torch.equal(*gradients)

    def test_a_device_that_cannot_is_refused_in_one_line(self, base, tokenizer, monkeypatch):
        from bitsandbytes.nn import Linear4bit

        def cannot(*_):
            raise NotImplementedError("no kernel\nfor this device")

        monkeypatch.setattr(Linear4bit, "to", cannot)
        with pytest.raises(UsageError, match="cannot compute in 4 bits on cpu .no kernel for this device.: leave it"):
            adapted(base, tokenizer, load_in_4bit=True)


FLAGS = ["--sources", "tinytown=10", "--output_dir", "x", "--bf16", "false"]


@pytest.mark.parametrize("arguments", [SFTArguments, DPOArguments])
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--lora_rank", "-1"], "lora_rank is -1: give a positive number"),
        (["--load_in_4bit", "true"], "give lora_rank as well"),
        (["--lora_rank", "4", "--optimizer", "muon"], "give adamw or adamw_8bit"),
        (["--lora_rank", "4", "--fsdp", "full_shard"], "FSDP would shard the model"),
        (["--lora_rank", "many"], "invalid int value"),
    ],
)
def test_wrong_settings_are_one_line(arguments, flags, said):
    with pytest.raises(UsageError, match=said) as caught:
        parse(arguments, [*FLAGS, "--model", "x", *flags])
    assert "\n" not in str(caught.value)


class TestOfAnotherBase:
    @pytest.fixture
    def folder(self, base, tokenizer, tmp_path) -> Path:
        model, adapter = adapted(base, tokenizer)
        adapter.save(tmp_path / "adapter", tokenizer)
        return tmp_path / "adapter"

    def point(self, folder: Path, where: object, known: bool = True) -> None:
        """Makes the adapter name another base; without what it knows of its own, where it is plain PEFT's."""
        config = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": where}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        if not known:
            (folder / "base.json").unlink()

    def refused(self, kind, folder: Path, tokenizer, *said: str) -> None:
        with pytest.raises(kind) as caught:
            load_checkpoint(str(folder), tokenizer)
        assert "\n" not in str(caught.value)
        for words in said:
            assert words in str(caught.value)

    def test_other_weights_are_told_by_their_sha256(self, folder, base, tokenizer, tmp_path):
        shutil.copytree(base, tmp_path / "other")
        model = load_checkpoint(str(base), tokenizer)
        model.transformer.h[0].mlp.c_fc.bias.data += 1e-6
        save_model(model, tokenizer, tmp_path / "other")
        self.point(folder, str(tmp_path / "other"))
        self.refused(MismatchError, folder, tokenizer, "was trained beside another model", "sha256 differs")

    @pytest.mark.parametrize("shard", ["5GB", "40KB"])
    def test_other_weights_of_a_hub_id_are_told_too_and_of_any_shard(
        self, base, tokenizer, tmp_path, monkeypatch, shard
    ):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        cached, commit = tmp_path / "models--own--base", "0" * 40
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text(commit)
        model = load_checkpoint(str(base), tokenizer)
        model.save_pretrained(cached / "snapshots" / commit, max_shard_size=shard)
        _, adapter = adapted("own/base", tokenizer)
        adapter.save(tmp_path / "adapter", tokenizer)
        load_checkpoint(str(tmp_path / "adapter"), tokenizer)
        model.transformer.ln_f.bias.data += 1e-6
        model.save_pretrained(cached / "snapshots" / commit, max_shard_size=shard)
        assert len(list((cached / "snapshots" / commit).glob("*.safetensors"))) > (shard == "40KB")
        self.refused(MismatchError, tmp_path / "adapter", tokenizer, "another model than own/base", "sha256 differs")

    @pytest.mark.parametrize("size", ["3x2x32", "1x2x32", "2x2x64"])
    def test_another_size_is_told_by_the_first_matrix_that_does_not_fit(self, folder, tokenizer, tmp_path, size):
        save_model(build_model(size, tokenizer, POSITIONS), tokenizer, tmp_path / "other")
        self.point(folder, str(tmp_path / "other"), known=False)
        self.refused(MismatchError, folder, tokenizer, "does not fit", "lora_A", "another base")

    def test_a_base_of_fewer_tokens(self, folder, tokenizer, tmp_path):
        config = json.loads((folder / "adapter_config.json").read_text())
        config["trainable_token_indices"] = [len(tokenizer)]
        (folder / "adapter_config.json").write_text(json.dumps(config))
        self.refused(MismatchError, folder, tokenizer, f"row for token {len(tokenizer)}", "of another base")

    def test_a_base_that_is_gone_missing_or_an_adapter(self, folder, tokenizer, tmp_path):
        self.point(folder, str(tmp_path / "gone"))
        self.refused(DataError, folder, tokenizer, f"{tmp_path / 'gone'}, is not there: bring it back")
        self.point(folder, None)
        self.refused(DataError, folder, tokenizer, "does not say what its base is", "adapter_config.json")
        self.point(folder, str(folder))
        self.refused(DataError, folder, tokenizer, "is an adapter itself")

    def test_damaged_and_missing_weights(self, folder, tokenizer):
        (folder / "adapter_model.safetensors").write_bytes(b"damaged")
        self.refused(DataError, folder, tokenizer, "Cannot load the adapter")
        (folder / "adapter_model.safetensors").unlink()
        self.refused(DataError, folder, tokenizer, "Cannot load the adapter")
        (folder / "adapter_config.json").write_text("{")
        self.refused(DataError, folder, tokenizer, "cannot be read")

    def test_an_adapter_of_another_kind(self, base, tokenizer, tmp_path):
        config = IA3Config(target_modules=["c_attn"], feedforward_modules=[], base_model_name_or_path=str(base))
        get_peft_model(build_model(SIZE, tokenizer, POSITIONS), config).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        self.refused(DataError, tmp_path, tokenizer, "of the kind IA3", "only LORA")

    def test_lora_on_an_adapter_or_with_a_rank_above_the_width(self, folder, base, tokenizer):
        with pytest.raises(UsageError, match="is an adapter itself: give a model"):
            adapted(folder, tokenizer)
        with pytest.raises(UsageError, match="the model is only 32 wide"):
            adapted(base, tokenizer, rank=33)


def test_an_adapter_of_plain_peft_is_merged_as_peft_does(base, tokenizer, tmp_path):
    config = LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    model = get_peft_model(GPT2LMHeadModel.from_pretrained(base), config)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    expected = logits_of(model, tokenizer)
    near(logits_of(load_model(str(tmp_path), "cpu").model, tokenizer), expected)


RUN = {
    "tokenizer": None, "token_store": None, "size": None, "block_size": None, "global_batch_tokens": None,
    "sources": ["tinytown=60"], "per_device_train_batch_size": 2, "max_steps": 6, "save_steps": 3,
    "optimizer": "adamw", "gradient_accumulation_steps": 2, "lora_rank": RANK, "learning_rate": 1e-2,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(sandbox, chat_base) -> Path:
    out = sandbox.new_folder()
    done = sandbox.run(out, stage="sft", **RUN | {"model": str(chat_base)})
    assert done.code == 0, done.output
    return out


@pytest.mark.parametrize("stage", ["sft", "dpo"])
@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_a_run_that_is_interrupted_goes_on_to_the_same_bits(sandbox, chat_base, stage, load_in_4bit):
    flags = RUN | {"stage": stage, "load_in_4bit": load_in_4bit, "model": str(chat_base)}
    whole, out = sandbox.new_folder(), sandbox.new_folder()
    assert sandbox.run(whole, **flags).code == 0
    done = sandbox.run(out, {"signal": int(signal.SIGTERM), "at": 3, "where": "forward"}, **flags)
    assert done.code == 75, done.output
    assert verified_steps(out) == [4, 3]
    done = sandbox.run(out, **flags)
    assert done.code == 0, done.output
    assert weights_sha256(out) == weights_sha256(whole)
    assert len({file_sha256(each / "adapter" / "adapter_model.safetensors") for each in (out, whole)}) == 1
    assert states_equal(load_state(out, 6), load_state(whole, 6))
    assert read_log(out) == read_log(whole)


def test_two_processes_train_one_adapter(sandbox, chat_base):
    out, flags = sandbox.new_folder(), RUN | {"model": str(chat_base), "max_steps": 2, "save_steps": 2}
    done = sandbox.run(out, stage="sft", processes=2, **flags)
    assert done.code == 0, done.output
    assert verified_steps(out) == [2]
    rows = load_file(out / "adapter" / "adapter_model.safetensors")
    assert all(bool(value.isfinite().all()) for value in rows.values())
    assert max(float(value.abs().max()) for name, value in rows.items() if "lora_B" in name) > 1e-3  # at birth 0


def test_a_checkpoint_is_an_adapter_that_is_verified_exported_and_talked_to(run, tokenizer, tmp_path):
    names = {path.name for path in (run / "checkpoint-6").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "base.json", "tokenizer.json"} <= names
    assert "model.safetensors" not in names
    done = command("checkpoint", "verify", run)
    assert (done.returncode, done.stdout.splitlines()) == (0, ["checkpoint-3: valid", "checkpoint-6: valid"])
    assert command("checkpoint", "export", run, tmp_path / "out").returncode == 0
    made, final = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", run / "model"))
    assert made.keys() == final.keys()
    assert all(torch.equal(made[name], final[name]) for name in made)
    talkers = [load_model(str(folder), "cpu").model for folder in (run / "checkpoint-6", run)]
    near(*(logits_of(model, tokenizer) for model in talkers))


def test_an_export_without_the_base_says_what_is_missing(run, tmp_path):
    checkpoint = tmp_path / "checkpoint-6"
    shutil.copytree(run / "checkpoint-6", checkpoint)
    config = json.loads((checkpoint / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (checkpoint / "adapter_config.json").write_text(json.dumps(config))
    (checkpoint / "MANIFEST.json").unlink()
    seal(checkpoint, {"step": 6})
    done = command("checkpoint", "export", checkpoint, tmp_path / "out")
    assert done.returncode == 65 and done.stderr.count("\n") == 1
    assert f"{tmp_path / 'gone'}, is not there: bring it back" in done.stderr
    assert not (tmp_path / "out").exists()


def test_weights_alone_go_on(sandbox, run, chat_base):
    out = sandbox.new_folder(run)
    for step in (3, 6):
        (out / f"checkpoint-{step}" / "optimizer.pt").write_bytes(b"damaged")
    record = json.loads((out / "run.json").read_text())
    record.pop("finished")
    (out / "run.json").write_text(json.dumps(record))
    done = sandbox.run(out, stage="sft", **RUN | {"model": str(chat_base), "weights_only": True})
    assert done.code == 0 and "The weights of step 6 go on alone" in done.output, done.output
    assert weights_sha256(out) == weights_sha256(run)


def test_an_adapter_trains_on_as_the_model_that_it_makes_of_its_base(sandbox, run):
    flags = {name: value for name, value in RUN.items() if name != "lora_rank"} | {"max_steps": 2}
    merged, adapter = sandbox.new_folder(), sandbox.new_folder()
    for out, model in ((merged, run), (adapter, run / "adapter")):
        done = sandbox.run(out, stage="sft", **flags | {"model": str(model)})
        assert done.code == 0, done.output
    assert weights_sha256(merged) == weights_sha256(adapter)


def test_the_reference_of_dpo_is_the_model_without_the_adapter(sandbox, run, chat_base):
    """Before the first step nothing has been learned: the margin is 0 and the preference's loss log 2."""
    out = sandbox.new_folder()
    flags = {"model": str(chat_base), "max_steps": 3, "logging_steps": 1, "warmup_steps": 0, "loss_type": ["sigmoid"]}
    done = sandbox.run(out, stage="dpo", **RUN | flags | {"loss_weights": [1.0], "learning_rate": 0.1})
    assert done.code == 0, done.output
    line = next(line for line in read_log(out) if "loss" in line)
    assert line["loss"] == pytest.approx(math.log(2), abs=1e-4) and abs(line["rewards/margins"]) < 1e-4
    last = [line for line in read_log(out) if "eval_rewards/margins" in line][-1]
    assert abs(last["eval_rewards/margins"]) > 1e-3


def test_a_merged_model_learned_to_stop_and_does_so_in_plain_pipeline(small_base, tmp_path):
    """From a base without the control tokens, in a process without this package."""
    tokenizer = load_tokenizer(str(small_base))
    talk = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}]
    (encoded,) = encode_conversations(tokenizer, [talk], POSITIONS)
    data = {"input_ids": torch.tensor([encoded.input_ids]), "labels": torch.tensor([encoded.labels])}
    model, adapter = adapted(small_base, tokenizer, rank=8)
    patch_lm_head_loss(model)
    optimizer = build_optimizer(model, "adamw", learning_rate=2e-2, matrix_learning_rate=0, weight_decay=0)
    for _ in range(60):
        optimizer.zero_grad()
        model(**data).loss.backward()
        optimizer.step()
    save_model(adapter.merged(), tokenizer, tmp_path / "model")
    code = (
        "import sys\nfrom transformers import pipeline\n"
        f"talk = pipeline('text-generation', model={str(tmp_path / 'model')!r})\n"
        "out = talk([{'role': 'user', 'content': 'Hello'}], do_sample=False, max_new_tokens=40)\n"
        "print([out[0]['generated_text'][-1], 'rorchat' in sys.modules, 'peft' in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[{'role': 'assistant', 'content': 'Hi!'}, False, False]"
