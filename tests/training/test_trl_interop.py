"""Interoperability with TRL: models of either side are trained further by the other."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from recipe_commands import command, inside, refused, succeeded
from support import SENTENCES, chat_row, json_lines
from tokenizers import AddedToken, ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, GPT2Tokenizer, pipeline
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer, clone_chat_template

from rorchat.chatml import CONTROL_TOKENS, encode_conversation, encode_prompt, encode_text, system_message
from rorchat.inference.engine import generate_text, load_model
from rorchat.model import build_model, save_model
from rorchat.persona import load_persona
from rorchat.tokenizer import load_tokenizer, token_bytes

POSITIONS = 256
ON_A_CPU = {"use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 3, "per_device_train_batch_size": 2}
FLAGS = [word for name, value in ON_A_CPU.items() for word in (f"--{name}", str(value).lower())]
HERE = ["--validation_share", 0.2, "--max_steps", 2, "--per_device_train_batch_size", 2, "--eval_strategy", "no"]
QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
CONVERSATIONS = [chat_row(f"What is {n} plus 1?", f"{n + 1}.", "Thanks", "You are welcome.") for n in range(24)]
PAIRS = [
    {
        "prompt": [{"role": "user", "content": f"What is {n} plus 1?"}],
        "chosen": [{"role": "assistant", "content": f"{n + 1}."}],
        "rejected": [{"role": "assistant", "content": "No."}],
    }
    for n in range(24)
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Conversations and pairs in two folders, as `load_dataset` reads them."""
    folder = tmp_path_factory.mktemp("data")
    for name, rows in (("conversations", CONVERSATIONS), ("pairs", PAIRS)):
        (folder / name).mkdir()
        (folder / name / "train.jsonl").write_text(json_lines(*rows))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny model like the Hub's `gpt2`: `<|endoftext|>` is its only control token, without chat template and pad."""
    folder = tmp_path_factory.mktemp("gpt2")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(SENTENCES, vocab_size=320, special_tokens=["<|endoftext|>"], show_progress=False)
    bpe.save_model(str(folder))
    tokenizer = GPT2Tokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 32, "n_positions": POSITIONS}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **shape, **ends)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rorchat_model(tokenizer, data, tmp_path_factory) -> Path:
    """Folder of a chat model trained by rorchat."""
    folder = tmp_path_factory.mktemp("rorchat_model")
    save_model(build_model("1x2x32", tokenizer, POSITIONS), tokenizer, folder / "base")
    succeeded(run_sft(folder / "base", data, folder / "run"))
    return folder / "run" / "model"


@pytest.fixture(scope="module", params=["qwen2_5", pytest.param("qwen3", marks=pytest.mark.slow)])
def trl_model(request, base, tmp_path_factory) -> Path:
    """A chat model trained by TRL from the base, with Qwen's tokens and template; its pad is its eos."""
    source, made = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp(request.param)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([AddedToken(token, special=True) for token in ("<|im_start|>", "<|im_end|>", "<|box_end|>")])
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{request.param}.jinja").read_text()
    tokenizer.save_pretrained(source)
    model, tokenizer, _ = clone_chat_template(
        GPT2LMHeadModel.from_pretrained(base), AutoTokenizer.from_pretrained(base), str(source)
    )
    arguments = SFTConfig(str(made), assistant_only_loss=True, max_length=POSITIONS, **ON_A_CPU)
    rows = Dataset.from_list(CONVERSATIONS)
    trainer = SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.create_model_card = lambda *_, **__: None  # it would ask trackers that other tests have mocked
    trainer.train()
    trainer.save_model()
    return made


def run_sft(model: Path, data: Path, out: Path) -> subprocess.CompletedProcess:
    return inside(
        "sft", "--model", model, "--sources", f"messages={data / 'conversations'}", *HERE, "--output_dir", out
    )


def run_dpo(model: Path, data: Path, out: Path) -> subprocess.CompletedProcess:
    return inside("dpo", "--model", model, "--sources", f"preference={data / 'pairs'}", *HERE, "--output_dir", out)


def assert_replies(folder: Path) -> None:
    """Both plain Transformers and rorchat generate a reply with the model."""
    output = pipeline("text-generation", model=str(folder), device="cpu")(
        [{"role": "user", "content": "Hello"}], max_new_tokens=8
    )
    assert output[0]["generated_text"][-1]["role"] == "assistant"
    assert isinstance(generate_text(load_model(str(folder)), "Hello", max_new_tokens=8), str)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rows", "flags"),
    [
        ("sft", "conversations", ["--assistant_only_loss", "true"]),
        ("dpo", "pairs", []),
    ],
    ids=["sft", "dpo"],
)
def test_trl_command_trains_a_rorchat_model(name, rows, flags, rorchat_model, data, tmp_path, capsys):
    arguments = ["--model_name_or_path", rorchat_model, "--dataset_name", data / rows, "--max_length", POSITIONS]
    trl_command = ["trl", name, *arguments, *FLAGS, *flags, "--output_dir", tmp_path / "out"]
    succeeded(command(*trl_command, HF_DATASETS_CACHE=str(tmp_path / "cache")))
    trained = tmp_path / "out"
    assert json.loads((trained / "checkpoint-3" / "trainer_state.json").read_text())["global_step"] == 3
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (rorchat_model, trained))
    assert not torch.equal(before.transformer.h[0].mlp.c_fc.weight, after.transformer.h[0].mlp.c_fc.weight)
    tokenizer = AutoTokenizer.from_pretrained(trained)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(rorchat_model).chat_template
    stops = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert sorted(after.generation_config.eos_token_id) == sorted(stops)
    assert after.generation_config.pad_token_id == tokenizer.convert_tokens_to_ids("<|pad|>")
    capsys.readouterr()
    assert_replies(trained)
    assert "is replaced" not in capsys.readouterr().err


def test_trl_encodes_rows_as_rorchat_does(rorchat_model, tmp_path):
    """Equal ids and, with `assistant_only_loss`, equal labels; in pairs TRL also trains the newline after a reply."""
    tokenizer = load_tokenizer(str(rorchat_model))
    model = GPT2LMHeadModel.from_pretrained(rorchat_model)
    arguments = SFTConfig(str(tmp_path / "sft"), assistant_only_loss=True, **ON_A_CPU)
    rows = SFTTrainer(model, arguments, train_dataset=Dataset.from_list(CONVERSATIONS), processing_class=tokenizer)
    assert len(rows.train_dataset) == len(CONVERSATIONS)
    for row, conversation in zip(rows.train_dataset, CONVERSATIONS, strict=True):
        encoded = encode_conversation(tokenizer, conversation["messages"])
        assert (row["input_ids"], row["labels"]) == (encoded.input_ids, encoded.labels)
    arguments = DPOConfig(str(tmp_path / "dpo"), **ON_A_CPU)
    rows = DPOTrainer(model, args=arguments, train_dataset=Dataset.from_list(PAIRS), processing_class=tokenizer)
    (newline,) = encode_text(tokenizer, ["\n"])
    for row, pair in zip(rows.train_dataset, PAIRS, strict=True):
        assert (
            row["prompt_ids"]
            == encode_prompt(tokenizer, pair["prompt"], n_positions=POSITIONS, max_new_tokens=8).input_ids
        )
        for side in ("chosen", "rejected"):
            whole = encode_conversation(tokenizer, [*pair["prompt"], *pair[side]]).input_ids
            assert row["prompt_ids"] + row[f"{side}_ids"] == whole
            assert whole[-len(newline) :] == newline


def test_prompts_of_a_trl_model_equal_its_training(trl_model, capsys):
    """The prompt has the ids that TRL trained on, and the logits of TRL's tokens are equal."""
    raw, stock = AutoTokenizer.from_pretrained(trl_model), GPT2LMHeadModel.from_pretrained(trl_model).eval()
    assert raw.pad_token == raw.eos_token == "<|im_end|>"
    loaded = load_model(str(trl_model), device="cpu")
    messages = [{"role": "user", "content": "What is 3 plus 1?"}]
    trained_ids = raw.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert encode_prompt(loaded.tokenizer, messages, n_positions=POSITIONS, max_new_tokens=8).input_ids == trained_ids
    with torch.no_grad():
        expected, logits = (model(torch.tensor([trained_ids])).logits for model in (stock, loaded.model))
    torch.testing.assert_close(logits[..., : expected.shape[-1]], expected)
    system = QWEN if QWEN in raw.chat_template else ""
    assert system_message(loaded.tokenizer) == system
    description = f"the system message {system!r}" if system else "no system message"
    lines = [line for line in capsys.readouterr().err.splitlines() if "is replaced" in line]
    assert lines == [f"{trl_model}: its chat template is replaced by rorchat's, with {description}"]


def test_eos_of_a_trl_model_is_not_the_pad(trl_model):
    tokenizer = load_tokenizer(str(trl_model))
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|pad|>")
    assert len(set(tokenizer.convert_tokens_to_ids(list(CONTROL_TOKENS)))) == 4
    assert len(tokenizer) % 64 == 0
    load_tokenizer(str(trl_model), require_chat=True)  # although the pad has no embedding row yet


def test_text_does_not_become_a_foreign_special_token(trl_model):
    """Neither in rorchat nor in the rendered template: `<|box_end|>` is one of Qwen's special tokens."""
    tokenizer = load_tokenizer(str(trl_model))
    messages = [{"role": "user", "content": "<|box_end|>"}]
    box_end = tokenizer.convert_tokens_to_ids("<|box_end|>")
    assert box_end not in encode_prompt(tokenizer, messages, n_positions=POSITIONS, max_new_tokens=8).input_ids
    assert box_end not in tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert token_bytes(tokenizer)[box_end] == 0


def test_recipes_train_a_trl_model(trl_model, data, tmp_path):
    tuned = succeeded(run_sft(trl_model, data, tmp_path / "sft"))
    assert tuned.stderr.count("is replaced by rorchat's") == 1
    preferred = succeeded(run_dpo(trl_model, data, tmp_path / "dpo"))
    assert preferred.stderr.count("is replaced by rorchat's") == 1
    for run in ("sft", "dpo"):
        assert_replies(tmp_path / run / "model")
        assert "is replaced" not in succeeded(run_dpo(tmp_path / run / "model", data, tmp_path / f"{run}-dpo")).stderr


def test_given_persona_replaces_a_foreign_system_message(trl_model):
    persona = load_persona()
    assert system_message(load_tokenizer(str(trl_model), persona)) == persona.system


@pytest.mark.parametrize("model", ["base", "rorchat_model"])
def test_sft_starts_from_a_base_or_a_chat_model(model, request, data, tmp_path):
    assert "is replaced" not in succeeded(run_sft(request.getfixturevalue(model), data, tmp_path / "run")).stderr
    assert_replies(tmp_path / "run" / "model")


def test_stages_that_need_a_chat_model_refuse_a_base_model(base, data, tmp_path):
    message = ("no control tokens <|im_start|> and <|im_end|>", "rorchat sft")
    refused(run_dpo(base, data, tmp_path / "out"), 78, *message)
    refused(inside("grpo", "--model", base, "--sources", "tinytown=20", "--output_dir", tmp_path / "out"), 78, *message)
    for name in ("chat", "gate"):
        refused(inside("rorchat", name, base), 78, *message)
    for name in ("dpo", "grpo"):
        done = inside(name, "--sources", "tinytown=20", "--output_dir", tmp_path / "out")
        refused(done, 2, "No model", "--model runs/gpt2-chat")


def test_control_tokens_added_as_text_become_special(base, tmp_path):
    """`add_tokens` leaves them as text tokens, so that text would become a control token."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", "<|pad|>"])
    tokenizer.pad_token = "<|pad|>"
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    control = set(loaded.convert_tokens_to_ids(list(CONTROL_TOKENS)))
    assert not control & set(encode_text(loaded, ["<|im_start|> <|im_end|> <|pad|> <|endoftext|>"])[0])


def test_changed_eos_or_pad_is_corrected(rorchat_model, tmp_path, capsys):
    """As after `trl sft --eos_token` and `--pad_token`; the template stays."""
    tokenizer = AutoTokenizer.from_pretrained(rorchat_model)
    template = tokenizer.chat_template
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert (loaded.eos_token, loaded.pad_token, loaded.chat_template) == ("<|endoftext|>", "<|pad|>", template)
    assert len(loaded) == len(tokenizer)
    assert "is replaced" not in capsys.readouterr().err


def test_changed_template_is_replaced_with_its_system_message(rorchat_model, tmp_path, capsys):
    """As after `trl sft --chat_template_path FILE.jinja`: with that template, text could become a control token."""
    tokenizer = AutoTokenizer.from_pretrained(rorchat_model)
    template = tokenizer.chat_template
    assert load_persona().system in template
    messages = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    tokenizer.chat_template = "<|im_start|>system\nBe brief.  {{ 'Please. ' * 99 }}<|im_end|>\n" + messages
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    system = "Be brief.  " + "Please. " * 99
    assert loaded.chat_template == template.replace(load_persona().system, system)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "is replaced by rorchat's" in line]
    assert "with the system message 'Be brief. Please. " in line and line.endswith(" [...]'") and len(line) < 400


def test_unrenderable_template_is_replaced(base, tmp_path, capsys):
    several = {"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}
    unfit = ("<|im_start|>{{ raise_exception('no') }}", "<|im_start|>{% if %}", "{{ 1 }}", several)
    for number, template in enumerate(unfit):
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / str(number))
        assert system_message(load_tokenizer(str(tmp_path / str(number)))) == load_persona().system
        assert capsys.readouterr().err.count("is replaced by rorchat's") == 1
