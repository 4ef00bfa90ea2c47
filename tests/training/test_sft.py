"""SFT: labels, replayed documents, and invalid settings."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_support import compute_plain_loss
from support import chat_row, write

from rorchat.chatml import END_OF_TEXT, IM_START
from rorchat.errors import UsageError, exits_with_one_line
from rorchat.evaluation.loss import Loss
from rorchat.model import build_model, save_model
from rorchat.training.arguments import parse
from rorchat.training.context import StageContext
from rorchat.training.data import row_lengths
from rorchat.training.sft import ChatSFTTrainer, SFTArguments, load_conversations

ROOT = Path(__file__).parents[2]
FLAGS = ["--sources", "tinytown=80", "--validation_share", "0.1", "--output_dir", "runs/x"]


def test_labels_are_the_replies_and_their_ends(tokenizer):
    from rorchat.sources.registry import load_rows

    train, validation, *_ = load_conversations(parse(SFTArguments, FLAGS), tokenizer, 10_000)
    targets = set()
    for row in (*train, *validation):
        is_target = np.array(row["labels"]) != -100
        edges = np.flatnonzero(np.diff(np.concatenate([[False], is_target, [False]])))
        targets |= {tokenizer.decode(row["input_ids"][a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)}
    rows = load_rows("tinytown=80", "conversation", seed=0)
    replies = {m["content"] + "<|im_end|>" for row in rows for m in row["messages"] if m["role"] == "assistant"}
    assert targets == replies


def test_replayed_documents_have_their_share_of_tokens(tokenizer):
    plain, *_ = load_conversations(parse(SFTArguments, FLAGS), tokenizer, 128)
    flags = [*FLAGS, "--replay", "tinytown=200", "--replay_share", "0.2"]
    train, *_ = load_conversations(parse(SFTArguments, flags), tokenizer, 128)
    assert 0.2 == pytest.approx(
        1 - row_lengths(plain, "input_ids").sum() / row_lengths(train, "input_ids").sum(), abs=0.001
    )
    begins = tokenizer.convert_tokens_to_ids([IM_START, END_OF_TEXT])
    first = [row["input_ids"][0] for row in train]
    assert first == [begins[0]] * len(plain) + [begins[1]] * (len(train) - len(plain))
    assert all(-100 not in row["labels"][1:] for row in [*train][len(plain) :])


def test_each_of_several_sources_has_a_validation_loss(tokenizer, tmp_path):
    specs = []
    for word, reply in (("apple", "It is red. " * 3), ("pear", "No.")):
        rows = [chat_row(f"Is the {word} {number} good?", reply) for number in range(40)]
        specs.append(f"messages={write(tmp_path, f'{word}.jsonl', rows)}")
    flags = ["--validation_share", "0.2", "--bf16", "false", "--max_steps", "1", "--output_dir", str(tmp_path / "run")]
    arguments = parse(SFTArguments, ["--sources", *specs, *flags])
    split = load_conversations(arguments, tokenizer, 192)
    for name, word in (("messages", "apple"), ("messages-2", "pear")):
        texts = [tokenizer.decode(row["input_ids"]) for row in split.validation[name]]
        assert len(texts) > 3 and all(word in text for text in texts)
    counts = [len(rows) for rows in split.validation.values()]
    assert counts == split.validation_rows == [entry["validation"] for entry in split.summary()]
    assert sum(counts) + len(split.train) == 80

    model = build_model("2x2x32", tokenizer, 192)
    with torch.no_grad():
        model.transformer.wte.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    trainer = ChatSFTTrainer(model, arguments, tokenizer, split.train, split.validation, StageContext())
    metrics = trainer.evaluate()
    plain = {name: compute_plain_loss(trainer.chat, list(rows)) for name, rows in split.validation.items()}
    for name, loss in plain.items():
        assert metrics[f"eval_{name}_loss"] == pytest.approx(loss.per_token, rel=1e-4)
        assert metrics["eval_loss"] != pytest.approx(loss.per_token, rel=1e-3)
    assert metrics["eval_loss"] == pytest.approx(sum(plain.values(), Loss()).per_token, rel=1e-4)


def test_a_source_without_validation_rows_has_no_validation_loss(tokenizer):
    flags = ["--sources", "tinytown=80", "tinytown=1", "--validation_share", "0.1", "--output_dir", "runs/x"]
    split = load_conversations(parse(SFTArguments, flags), tokenizer, 10_000)
    assert split.validation_rows[1] == 0 and list(split.validation) == ["tinytown"]


def test_invalid_replay_share_is_refused():
    with pytest.raises(UsageError, match="replay_share is 1.0: it must lie between 0 and 1"):
        parse(SFTArguments, [*FLAGS, "--replay_share", "1"])


@pytest.fixture(scope="module")
def documents(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("replay") / "documents.txt"
    path.write_text("\n\n".join(f"Document {number} is about the mill by the river. " * 4 for number in range(200)))
    return path


def test_other_replayed_documents_make_another_run(tokenizer, documents, tmp_path, capsys):
    save_model(build_model("2x2x32", tokenizer, 256), tokenizer, tmp_path / "base")
    main = exits_with_one_line(runpy.run_path(str(ROOT / "recipes" / "sft.py"))["main"])
    argv = ["--model", str(tmp_path / "base"), "--sources", "tinytown=40", "--validation_share", "0.2"]
    argv += ["--replay", f"text={documents}", "--max_steps", "2", "--per_device_train_batch_size", "2"]
    argv += ["--output_dir", str(tmp_path / "run"), "--eval_strategy", "no"]
    main(argv)
    main(argv)
    assert "already finished" in capsys.readouterr().err
    documents.write_text(documents.read_text() + "\n\nAnd one more.")
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert exit_.value.code == 78 and "inputs.replay" in capsys.readouterr().err


def test_zero_replay_share_means_no_replay():
    assert parse(SFTArguments, [*FLAGS, "--replay", "tinytown=200", "--replay_share", "0"]).replay_source() is None
