"""The benchmark of fine-tuning and preference training: equal work whatever a side packs and pads, or no figures."""

import json
import random
import sys
from dataclasses import replace

import pytest
import torch
from support import ROOT, exchange, json_lines, written

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
from watch import Watch  # noqa: E402

from rorchat.chatml import IGNORE_INDEX  # noqa: E402

WORK = {data: works.quick(works.WORKS[name]) for data, name in (("conversations", "sft"), ("pairs", "dpo"))}
EVERY_SIDE = [(data, side) for data in WORK for side in sides.SIDES[data]]
EVERY_LEVER = [(data, lever) for data in WORK for lever in sorted(works.LEVERS[data])]
SUBJECT = {"conversations": sides.rorchat, "pairs": sides.rorchat_dpo}


@pytest.fixture(autouse=True)
def own_accelerator():
    """The precision of a process is Accelerate's first caller's; here every side is the first."""
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folders = {data: tmp_path_factory.mktemp(data) for data in WORK}
    for data, folder in folders.items():
        chat_material.make(WORK[data], folder)
    return folders


def complaints(record: dict, folder) -> list[str]:
    return run.complaints(record, json.loads((folder / "proof.json").read_text()))


@pytest.mark.parametrize(("data", "side"), EVERY_SIDE)
def test_every_side_trains_the_same_rows_once_and_finds_the_same_losses_and_gradient(made, data, side):
    record = sides.SIDES[data][side](Watch(WORK[data], made[data]))
    assert complaints(record, made[data]) == []
    assert len(record["step_seconds"]) == 1 and record["step_seconds"][0] > record["optimizer_seconds"][0] > 0


def test_every_side_that_can_be_asked_for_exists_and_is_explained():
    assert {data: set(found) for data, found in sides.SIDES.items()} == {data: set(works.SIDES[data]) for data in WORK}


def test_conversations_that_see_each_other_in_a_packed_row_make_a_side_invalid(made, monkeypatch):
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
    watch = Watch(WORK["conversations"], made["conversations"])
    said = complaints(sides.SIDES["conversations"]["trl-packing-fp32"](watch), made["conversations"])
    assert [line for line in said if "gradient norm" in line or "first loss" in line]


def another(data: str, folder, monkeypatch, **changed):
    monkeypatch.setattr(chat_material, "SEED", 1)
    chat_material.make(WORK[data], folder)
    return folder


@pytest.mark.parametrize(("data", "side"), [("conversations", "rorchat"), ("pairs", "rorchat-dpo")])
def test_a_side_that_trains_other_rows_is_invalid(made, data, side, tmp_path, monkeypatch):
    other = another(data, tmp_path, monkeypatch)
    (other / "weights.safetensors").write_bytes((made[data] / "weights.safetensors").read_bytes())
    said = complaints(sides.SIDES[data][side](Watch(WORK[data], other)), made[data])
    assert said[0].split()[0] == "tokens_sha256" and not [line for line in said if "weights" in line]


def test_a_preference_side_whose_reference_is_another_model_is_invalid(made, monkeypatch):
    stock = sides.loaded_model
    models = iter(range(9))

    def second_is_another(work, folder):
        model = stock(work, folder)
        if next(models):
            with torch.no_grad():
                model.transformer.ln_f.weight.mul_(3)
        return model

    monkeypatch.setattr(sides, "loaded_model", second_is_another)
    said = complaints(sides.SIDES["pairs"]["trl-dpo-fp32"](Watch(WORK["pairs"], made["pairs"])), made["pairs"])
    assert [line for line in said if line.startswith("its first reward is")]


def test_chosen_and_rejected_in_each_others_place_are_told(made, monkeypatch):
    stock = sides.read_rows
    reads = iter(range(9))

    def swapped_first(watch):
        rows = stock(watch)
        if next(reads):  # what is compared with
            return rows
        return [row | {"chosen_ids": row["rejected_ids"], "rejected_ids": row["chosen_ids"]} for row in rows]

    monkeypatch.setattr(sides, "read_rows", swapped_first)
    said = complaints(sides.SIDES["pairs"]["trl-dpo-fp32"](Watch(WORK["pairs"], made["pairs"])), made["pairs"])
    assert {line.split(" is ")[0] for line in said} == {"its first chosen loss", "its first rejected loss"}


def batch_of(*rows: list[int]) -> torch.Tensor:
    return torch.cat([torch.tensor([row, [IGNORE_INDEX, *row[1:]]]) for row in rows], dim=1)


def test_rows_are_known_again_in_any_order_and_packing_and_nothing_else_is():
    one, two, three = [1, 7, 8], [1, 9], [1, 5, 6, 5]
    known = chat_material.rows_sha256([batch_of(one, two, three)], start=1)
    assert chat_material.rows_sha256([batch_of(three), batch_of(two, one)], start=1) == known
    relabelled = batch_of(one, two, three)
    relabelled[1, 1] = IGNORE_INDEX
    others = [
        [batch_of(one, two)], [batch_of(one, two, three, three)], [batch_of(one, two, [1, 5, 5, 6])],
        [batch_of([1, 7, 8, 9], three)], [batch_of([4], one, two, three)], [relabelled],
    ]  # fmt: skip
    assert known not in [chat_material.rows_sha256(batches, start=1) for batches in others]


@pytest.mark.parametrize(("data", "name"), EVERY_LEVER)
def test_rorchat_without_a_lever_does_the_same_work(made, data, name, monkeypatch):
    lever = works.LEVERS[data][name]
    before = {}
    for target in lever.patches:
        owner, attribute = training.located(target)
        before[owner, attribute] = vars(owner)[attribute]
        monkeypatch.setattr(owner, attribute, before[owner, attribute])  # put back afterwards
    record = training.without(lever, SUBJECT[data], Watch(WORK[data], made[data]))
    assert all(vars(owner).get(attribute) is not value for (owner, attribute), value in before.items())
    assert complaints(record, made[data]) == []


def test_a_run_goes_over_its_sides_in_processes_of_their_own(tmp_path, capsys):
    command = ["--quick", "--work", "dpo", "--sides", "trl-dpo-fp32,rorchat-dpo", "--repeats", "1"]
    assert run.main([*command, "--out", str(tmp_path / "run.json")]) == 0
    result = json.loads((tmp_path / "run.json").read_text())["works"]["dpo"]
    assert [(r["side"], r["status"]) for r in result["runs"]] == [("trl-dpo-fp32", "ok"), ("rorchat-dpo", "ok")]
    told = capsys.readouterr().out
    assert "| side | precision | pairs/s | seconds a step |" in told and "rorchat-dpo's speed over it" in told
    assert "one step over 4 pairs" in told and "share of the" not in told


def test_a_pair_or_a_token_that_is_no_padding_counts(made):
    assert WORK["pairs"].units_a_step == 4 and works.WORKS["dpo"].units_a_step == 32
    rows = json.loads((made["conversations"] / "rows.json").read_text())
    assert WORK["conversations"].units_a_step == sum(len(row["input_ids"]) for row in rows)
    same = {"status": "ok", "precision": "fp32", "first_step_seconds": 9.0, "optimizer_seconds": [0.1]}
    runs = [
        same | {"side": side, "repeat": 0, "step_seconds": [took], "peak_memory_bytes": 1}
        for side, took in (("trl-dpo-default", 8.0), ("rorchat-dpo", 2.0))
    ]
    found = table.summary_of(WORK["pairs"], runs, {"parameters": 1}, {"bf16": 1.0, "fp32": 1.0})
    assert found["rorchat-dpo"]["per_second"]["median"] == 2.0
    assert found["trl-dpo-default"]["speed_ratio"]["median"] == 4.0 and "speed_ratio" not in found["rorchat-dpo"]


def test_the_kept_lengths_fit_their_window_and_shrink_with_it(tmp_path, monkeypatch):
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


def test_rows_are_drawn_evenly_over_their_lengths():
    rows = [[1, length] for length in range(1, 101)]
    random.Random(0).shuffle(rows)
    assert [length for _, length in lengths.drawn(rows, 5)] == [11, 31, 51, 71, 91]
    assert lengths.drawn(rows, 100) == sorted(rows)


def test_lengths_are_those_of_the_rows_that_are_trained(tokenizer, tmp_path):
    from rorchat.chatml import encode_conversation
    from rorchat.training.dpo import DPOArguments, read_pairs

    rows = [exchange("Hello", "Hi!", "And you?", "I am well."), exchange("What?", "word " * 200)]
    path = written(tmp_path, "rows.jsonl", json_lines(*rows))
    (found,) = lengths.conversations_of(f"messages={path}", tokenizer, 128)
    encoded = encode_conversation(tokenizer, rows[0]["messages"])
    assert sum(found) == len(encoded.input_ids) and len(found) == 5
    assert sum(found[1::2]) == sum(label != IGNORE_INDEX for label in encoded.labels)

    pairs = [{"prompt": f"Question {n}?", "chosen": "yes " * n, "rejected": "no"} for n in range(1, 60)]
    path = written(tmp_path, "pairs.jsonl", json_lines(*pairs))
    sources = [f"preference={path}"]
    arguments = DPOArguments(output_dir=str(tmp_path), model="any", sources=sources, validation_share=0.3)
    kept = [row for split in read_pairs(arguments, tokenizer, 128)[:2] for row in split]
    expected = sorted([len(row[f"{part}_ids"]) for part in ("prompt", "chosen", "rejected")] for row in kept)
    assert len(expected) < len(pairs)
    assert sorted(lengths.pairs_of(f"preference={path}", tokenizer, 128)) == expected


def test_density_counts_the_tokens_of_full_rows_and_refuses_rows_that_lost_something():
    sizes = [6, 2, 5, 3, 8]
    assert packing.density(packing.one_a_row, sizes, 8) == 24 / 40
    for pack in (packing.trl, packing.rorchat):
        assert packing.density(pack, sizes, 8) == 1.0
        assert sorted(map(sorted, pack(sizes, 8))) == [[0, 1], [2, 3], [4]]
    with pytest.raises(ValueError, match="do not hold each of the 5 conversations once"):
        packing.density(lambda lengths, window: [[0, 1], [2, 3]], sizes, 8)
    with pytest.raises(ValueError, match="a row has 9 tokens, in a window of 8"):
        packing.density(lambda lengths, window: [[0, 3], [1], [2], [4]], sizes, 8)


def test_the_table_of_packing_has_every_file_and_all_together():
    found = packing.table({"a": [6, 5], "b": [2, 3], "c": []}, 8)
    assert found.splitlines()[2:] == [
        "| a | 2 | 11 | 68.75% | 68.75% | 68.75% |",
        "| b | 2 | 5 | 31.25% | 62.50% | 62.50% |",
        "| c | 0 | 0 | none fits | none fits | none fits |",
        "| **all together** | 4 | 16 | 50.00% | 100.00% | 100.00% |",
    ]
