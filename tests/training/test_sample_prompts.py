"""The default prompts of samples, and that samples do not change the training."""

import json
from pathlib import Path

import pytest
from datasets import Dataset
from faults.harness import weights_sha256
from recipe_commands import inside, succeeded
from support import SENTENCES, json_lines, write

from rorchat.chatml import encode_conversations
from rorchat.model import build_model, save_model
from rorchat.tokens.prepare import prepare
from rorchat.training.sample_prompts import WHO_ARE_YOU, first_words, user_messages


def write_texts(folder: Path, name: str, count: int = 60) -> str:
    texts = [{"text": f"{name} number {n} begins here. {SENTENCES[n % 32]} And it ends."} for n in range(count)]
    return f"text={write(folder, f'{name}.jsonl', json_lines(*texts))}"


def encode_rows(tokenizer, *prompts: str) -> Dataset:
    conversations = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": "Yes."}] for prompt in prompts
    ]
    return Dataset.from_list([{"input_ids": row.input_ids} for row in encode_conversations(tokenizer, conversations)])


def test_documents_of_every_source_begin_with_their_first_words(tokenizer, tmp_path):
    stores = [
        prepare(write_texts(tmp_path, name), tokenizer, tmp_path / "stores" / name, validation_share=0.3)
        for name in ("Letter", "Poem")
    ]
    prompts = first_words(stores, tokenizer)
    assert len(set(prompts)) == 3
    assert [prompt.split()[0] for prompt in prompts] == ["Letter", "Poem", "Letter"]
    for prompt in prompts:
        assert len(prompt.split()) == 8 and " begins here. " in prompt
    validation = {tokenizer.decode(store.slice("validation", 0, store.tokens("validation"))) for store in stores}
    assert all(any(prompt in text for text in validation) for prompt in prompts)


def test_conversations_are_no_documents(tokenizer, tmp_path):
    store = prepare("chat:tinytown=40", tokenizer, tmp_path / "store", validation_share=0.3)
    assert first_words([store], tokenizer) == []


def test_messages_of_validation_rows_are_chosen_short_ones_first(tokenizer):
    rows = encode_rows(tokenizer, "Long " * 50, "What\nis this?", "A cat?", "A cat?", " A dog? ", "A horse?")
    assert user_messages(rows, tokenizer, ["tinytown=9"], 2048) == ["What\nis this?", "A cat?", "A dog?"]
    assert user_messages(rows.select([0, 2]), tokenizer, ["persona=9"], 2048) == [
        "A cat?", ("Long " * 50).strip(), WHO_ARE_YOU,
    ]  # fmt: skip
    assert user_messages(encode_rows(tokenizer, WHO_ARE_YOU), tokenizer, ["persona=9"], 2048) == [WHO_ARE_YOU]


def test_messages_that_do_not_fit_are_left_out(tokenizer):
    rows = encode_rows(tokenizer, "Long " * 50, "A cat?")
    system = len(rows[1]["input_ids"])
    assert user_messages(rows, tokenizer, ["persona=9"], system + 40, 20) == ["A cat?", WHO_ARE_YOU]
    assert user_messages(rows, tokenizer, ["persona=9"], 24, 20) == []


@pytest.mark.parametrize("stage", ["pretrain", "sft", "dpo", "grpo"])
def test_samples_are_the_default_and_do_not_change_the_weights(stage, tokenizer, saved, tmp_path):
    save_model(build_model("1x2x16", tokenizer, n_positions=192), tokenizer, tmp_path / "base")
    flags = {
        "pretrain": ["--tokenizer", saved, "--size", "1x2x16", "--block_size", 64, "--global_batch_tokens", 512,
                     "--sources", write_texts(tmp_path, "Letter", 200)],
        "sft": ["--model", tmp_path / "base", "--sources", "tinytown=60", "persona=30"],
        "dpo": ["--model", tmp_path / "base", "--sources", "tinytown=60", "persona=30"],
        "grpo": ["--model", tmp_path / "base", "--sources", "tinytown=60", "--readiness_questions", 0,
                 "--per_device_train_batch_size", 8, "--max_completion_length", 12],
    }[stage]  # fmt: skip
    flags += ["--validation_share", 0.2, "--max_steps", 3, "--bf16", "false", "--learning_rate", "1e-3"]
    for name, more in (("default", []), ("off", ["--sample_prompts"])):
        done = succeeded(inside(stage, *flags, "--output_dir", tmp_path / name, *more))
        assert "error" not in done.stderr
    samples = [json.loads(line) for line in (tmp_path / "default" / "samples.jsonl").read_text().splitlines()]
    prompts = list(dict.fromkeys(sample["prompt"] for sample in samples))
    assert len(samples) == 2 * len(prompts) and {sample["step"] for sample in samples} == {0, 3}
    is_about_persona = stage in ("sft", "dpo")
    assert len(prompts) == 3 + is_about_persona and (WHO_ARE_YOU in prompts) == is_about_persona
    assert not (tmp_path / "off" / "samples.jsonl").exists()
    assert weights_sha256(tmp_path / "default") == weights_sha256(tmp_path / "off")
