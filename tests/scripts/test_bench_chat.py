"""The benchmark of fine-tuning and preference training: sides with different packing and padding do equal work."""

import json
import random
import sys
from dataclasses import replace

import preloaded
import pytest
import torch
from support import ROOT, chat_row, json_lines, write

BENCH = ROOT / "scripts" / "bench"
sys.path.insert(0, str(BENCH))

import chat as sides  # noqa: E402
import chat_material  # noqa: E402
import lengths  # noqa: E402
import packing  # noqa: E402
import run  # noqa: E402
import table  # noqa: E402
import training  # noqa: E402
import works  # noqa: E402
from recorder import Recorder  # noqa: E402

from rorchat.chatml import IGNORE_INDEX  # noqa: E402

WORK = {data: works.quick(works.WORKS[name]) for data, name in (("conversations", "sft"), ("pairs", "dpo"))}
EVERY_SIDE = [(data, side) for data in WORK for side in sides.SIDES[data]]
EVERY_LEVER = [(data, lever) for data in WORK for lever in sorted(works.LEVERS[data])]
SUBJECT = {"conversations": sides.run_rorchat_sft, "pairs": sides.run_rorchat_dpo}


@pytest.fixture(autouse=True)
def reset_accelerator():
    """Accelerate keeps the precision of its first caller in a process; here every side must be the first."""
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folders = {data: tmp_path_factory.mktemp(data) for data in WORK}
    for data, folder in folders.items():
        chat_material.make(WORK[data], folder)
    return folders


def find_mismatches(record: dict, folder) -> list[str]:
    return run.find_mismatches(record, json.loads((folder / "proof.json").read_text()))


@pytest.mark.parametrize(("data", "side"), EVERY_SIDE)
def test_every_side_has_the_same_rows_losses_and_gradient_norm(folders, data, side):
    record = sides.SIDES[data][side](Recorder(WORK[data], folders[data]))
    assert find_mismatches(record, folders[data]) == []
    assert len(record["step_seconds"]) == 1 and record["step_seconds"][0] > record["optimizer_seconds"][0] > 0


def test_every_side_exists_and_is_described():
    assert {data: set(segments) for data, segments in sides.SIDES.items()} == {
        data: set(works.SIDES[data]) for data in WORK
    }


def test_attention_across_packed_conversations_is_invalid(folders, monkeypatch):
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    collate = DataCollatorForLanguageModeling.torch_call

    def leaking(self, examples):
        batch = collate(self, examples)
        return {
            "input_ids": batch["input_ids"],
            "labels": batch["labels"],
            "attention_mask": batch["input_ids"] * 0 + 1,
        }

    monkeypatch.setattr(DataCollatorForLanguageModeling, "torch_call", leaking)
    recorder = Recorder(WORK["conversations"], folders["conversations"])
    mismatches = find_mismatches(sides.SIDES["conversations"]["trl-packing-fp32"](recorder), folders["conversations"])
    assert [line for line in mismatches if "gradient norm" in line or "first loss" in line]


def make_other_material(data: str, folder, monkeypatch, **changed):
    monkeypatch.setattr(chat_material, "SEED", 1)
    chat_material.make(WORK[data], folder)
    return folder


@pytest.mark.parametrize(("data", "side"), [("conversations", "rorchat"), ("pairs", "rorchat-dpo")])
def test_a_side_with_other_rows_is_invalid(folders, data, side, tmp_path, monkeypatch):
    other = make_other_material(data, tmp_path, monkeypatch)
    (other / "weights.safetensors").write_bytes((folders[data] / "weights.safetensors").read_bytes())
    mismatches = find_mismatches(sides.SIDES[data][side](Recorder(WORK[data], other)), folders[data])
    assert mismatches[0].split()[0] == "tokens_sha256" and not [line for line in mismatches if "weights" in line]


def test_a_side_with_another_reference_model_is_invalid(folders, monkeypatch):
    stock = sides.load_initial_model
    models = iter(range(9))

    def second_is_another(work, folder):
        model = stock(work, folder)
        if next(models):
            with torch.no_grad():
                model.transformer.ln_f.weight.mul_(3)
        return model

    monkeypatch.setattr(sides, "load_initial_model", second_is_another)
    mismatches = find_mismatches(
        sides.SIDES["pairs"]["trl-dpo-fp32"](Recorder(WORK["pairs"], folders["pairs"])), folders["pairs"]
    )
    assert [line for line in mismatches if line.startswith("first reward is")]


def test_swapped_chosen_and_rejected_replies_are_invalid(folders, monkeypatch):
    stock = sides.read_rows
    reads = iter(range(9))

    def swapped_first(recorder):
        rows = stock(recorder)
        if next(reads):  # the rows of the proof
            return rows
        return [row | {"chosen_ids": row["rejected_ids"], "rejected_ids": row["chosen_ids"]} for row in rows]

    monkeypatch.setattr(sides, "read_rows", swapped_first)
    mismatches = find_mismatches(
        sides.SIDES["pairs"]["trl-dpo-fp32"](Recorder(WORK["pairs"], folders["pairs"])), folders["pairs"]
    )
    assert {line.split(" is ")[0] for line in mismatches} == {"first chosen loss", "first rejected loss"}


def make_batch(*rows: list[int]) -> torch.Tensor:
    return torch.cat([torch.tensor([row, [IGNORE_INDEX, *row[1:]]]) for row in rows], dim=1)


def test_the_hash_of_rows_ignores_only_order_and_packing():
    one, two, three = [1, 7, 8], [1, 9], [1, 5, 6, 5]
    known = chat_material.rows_sha256([make_batch(one, two, three)], start=1)
    assert chat_material.rows_sha256([make_batch(three), make_batch(two, one)], start=1) == known
    relabelled = make_batch(one, two, three)
    relabelled[1, 1] = IGNORE_INDEX
    others = [
        [make_batch(one, two)], [make_batch(one, two, three, three)], [make_batch(one, two, [1, 5, 5, 6])],
        [make_batch([1, 7, 8, 9], three)], [make_batch([4], one, two, three)], [relabelled],
    ]  # fmt: skip
    assert known not in [chat_material.rows_sha256(batches, start=1) for batches in others]


@pytest.mark.parametrize(("data", "name"), EVERY_LEVER)
def test_rorchat_without_a_lever_does_the_same_work(folders, data, name, monkeypatch):
    lever = works.LEVERS[data][name]
    before = {}
    for target in lever.patches:
        owner, attribute = training.resolve_patch(target)
        before[owner, attribute] = vars(owner)[attribute]
        monkeypatch.setattr(owner, attribute, before[owner, attribute])  # so that it is restored
    record = training.run_without(lever, SUBJECT[data], Recorder(WORK[data], folders[data]))
    assert all(vars(owner).get(attribute) is not value for (owner, attribute), value in before.items())
    assert find_mismatches(record, folders[data]) == []


@pytest.mark.slow
def test_a_run_starts_a_process_for_each_side(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.executable", preloaded.client("python"))
    command = ["--quick", "--work", "dpo", "--sides", "trl-dpo-fp32,rorchat-dpo", "--repeats", "1"]
    assert run.main([*command, "--out", str(tmp_path / "run.json")]) == 0
    result = json.loads((tmp_path / "run.json").read_text())["works"]["dpo"]
    assert [(r["side"], r["status"]) for r in result["runs"]] == [("trl-dpo-fp32", "ok"), ("rorchat-dpo", "ok")]
    output = " ".join(capsys.readouterr().out.split())  # lines are wrapped where the name of the CPU puts the margin
    assert "| side | precision | pairs/s | seconds a step |" in output and "rorchat-dpo's speed over it" in output
    assert "one step over 4 pairs" in output and "share of the" not in output


def test_speed_counts_pairs_or_tokens_without_padding(folders):
    assert WORK["pairs"].units_per_step == 4 and works.WORKS["dpo"].units_per_step == 32
    rows = json.loads((folders["conversations"] / "rows.json").read_text())
    assert WORK["conversations"].units_per_step == sum(len(row["input_ids"]) for row in rows)
    same = {"status": "ok", "precision": "fp32", "first_step_seconds": 9.0, "optimizer_seconds": [0.1]}
    runs = [
        same | {"side": side, "repeat": 0, "step_seconds": [took], "peak_memory_bytes": 1}
        for side, took in (("trl-dpo-default", 8.0), ("rorchat-dpo", 2.0))
    ]
    segments = table.summarize(WORK["pairs"], runs, {"parameters": 1}, {"bf16": 1.0, "fp32": 1.0})
    assert segments["rorchat-dpo"]["per_second"]["median"] == 2.0
    assert segments["trl-dpo-default"]["speed_ratio"]["median"] == 4.0 and "speed_ratio" not in segments["rorchat-dpo"]


def test_stored_lengths_fit_their_window_and_shrink_with_it(tmp_path, monkeypatch):
    for name, number in (("sft", 96), ("dpo", 32)):
        work = works.WORKS[name]
        rows = work.lengths()
        assert len(rows) == number == work.rows * work.passes
        for shrunk in (work, replace(work, block_size=32), replace(work, block_size=16)):
            taken = [row[0] + max(row[1:]) if work.data == "pairs" else sum(row) for row in shrunk.lengths()]
            assert 0 < max(taken) <= shrunk.block_size
            assert all(part > 0 for row in shrunk.lengths() for part in row)
    assert all(len(row) % 2 == 1 for row in works.WORKS["sft"].lengths())  # context, reply, ..., context
    monkeypatch.setattr(works, "LENGTHS", tmp_path / "lengths.json")
    works.LENGTHS.write_text(json.dumps({"window": 1024, "conversations": [[1022, 1, 1]], "pairs": [[1, 1023, 1023]]}))
    assert replace(WORK["conversations"], rows=1, passes=1).lengths() == [[30, 1, 1]]
    assert replace(WORK["pairs"], rows=1, passes=1).lengths() == [[1, 30, 30]]


def test_rows_are_sampled_evenly_over_their_lengths():
    rows = [[1, length] for length in range(1, 101)]
    random.Random(0).shuffle(rows)
    assert [length for _, length in lengths.sample_evenly(rows, 5)] == [11, 31, 51, 71, 91]
    assert lengths.sample_evenly(rows, 100) == sorted(rows)


def test_lengths_equal_those_of_training_rows(tokenizer, tmp_path):
    from rorchat.chatml import encode_conversation
    from rorchat.training.dpo import DPOArguments, load_preferences

    rows = [chat_row("Hello", "Hi!", "And you?", "I am well."), chat_row("What?", "word " * 200)]
    path = write(tmp_path, "rows.jsonl", json_lines(*rows))
    (segments,) = lengths.read_conversation_lengths(f"messages={path}", tokenizer, 128)
    encoded = encode_conversation(tokenizer, rows[0]["messages"])
    assert sum(segments) == len(encoded.input_ids) and len(segments) == 5
    assert sum(segments[1::2]) == sum(label != IGNORE_INDEX for label in encoded.labels)

    pairs = [{"prompt": f"Question {n}?", "chosen": "yes " * n, "rejected": "no"} for n in range(1, 60)]
    path = write(tmp_path, "pairs.jsonl", json_lines(*pairs))
    sources = [f"preference={path}"]
    arguments = DPOArguments(output_dir=str(tmp_path), model="any", sources=sources, validation_share=0.3)
    complete = [row for split in load_preferences(arguments, tokenizer, 10_000)[:2] for row in split]
    sizes = sorted([len(row[f"{part}_ids"]) for part in ("prompt", "chosen", "rejected")] for row in complete)
    expected = [size for size in sizes if size[0] + max(size[1:]) < 128]  # with the line end after the reply
    assert 0 < len(expected) < len(pairs)
    assert sorted(lengths.read_pair_lengths(f"preference={path}", tokenizer, 128)) == expected


def test_density_requires_every_conversation_exactly_once():
    sizes = [6, 2, 5, 3, 8]
    assert packing.density(packing.one_row_each, sizes, 8) == 24 / 40
    for pack in (packing.pack_trl, packing.pack_rorchat):
        assert packing.density(pack, sizes, 8) == 1.0
        assert sorted(map(sorted, pack(sizes, 8))) == [[0, 1], [2, 3], [4]]
    with pytest.raises(ValueError, match="do not contain each of the 5 conversations once"):
        packing.density(lambda lengths, window: [[0, 1], [2, 3]], sizes, 8)
    with pytest.raises(ValueError, match="a row has 9 tokens, but the window is 8"):
        packing.density(lambda lengths, window: [[0, 3], [1], [2], [4]], sizes, 8)


def test_the_packing_table_has_every_file_and_the_total():
    segments = packing.table({"a": [6, 5], "b": [2, 3], "c": []}, 8)
    assert segments.splitlines()[2:] == [
        "| a | 2 | 11 | 68.75% | 68.75% | 68.75% |",
        "| b | 2 | 5 | 31.25% | 62.50% | 62.50% |",
        "| c | 0 | 0 | none fits | none fits | none fits |",
        "| **all together** | 4 | 16 | 50.00% | 100.00% | 100.00% |",
    ]
