"""The pretraining benchmark: all sides do the same work, a side that does not gets no figures, and sums are correct."""

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace

import preloaded
import pytest
import torch
from support import ROOT

BENCH = ROOT / "scripts" / "bench"
sys.path.insert(0, str(BENCH))

import material  # noqa: E402
import packing  # noqa: E402
import run  # noqa: E402
import table  # noqa: E402
import tokens_to_loss  # noqa: E402
import training  # noqa: E402
import works  # noqa: E402
from recorder import Recorder  # noqa: E402

from rorchat.errors import UsageError  # noqa: E402
from rorchat.training.kernels import lm_head_loss  # noqa: E402

WORK = works.quick(works.WORKS["optimizer"])  # two passes a step
EAGER = [
    "trainer-default", "trainer-fp32", "trainer-bf16", "accelerate", "raw", "raw-fused", "rorchat", "rorchat-bf16",
    "rorchat-muon",
]  # fmt: skip


@pytest.fixture(autouse=True)
def reset_accelerator():
    """Accelerate keeps the precision of its first caller in a process; here every side must be the first."""
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def material_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    material.make(WORK, folder)
    return folder


def read_proof(folder) -> dict:
    return json.loads((folder / "proof.json").read_text())


@pytest.mark.parametrize("side", EAGER)
def test_every_side_has_the_same_tokens_weights_and_first_loss(material_folder, side):
    record = training.SIDES[side](Recorder(WORK, material_folder))
    assert run.find_mismatches(record, read_proof(material_folder)) == []
    assert (len(record["step_seconds"]), len(record["optimizer_seconds"])) == (WORK.steps, WORK.steps)
    assert all(0 < o < s for o, s in zip(record["optimizer_seconds"], record["step_seconds"], strict=True))
    assert record["last_loss"] != record["first_loss"]


def test_nanogpt_does_the_same_work(material_folder):
    if not os.environ.get(works.NANOGPT):
        pytest.skip(f"{works.NANOGPT} is not set: {works.HOW_TO_GET[works.NANOGPT]}")
    for precision in ("fp32", "bf16"):
        record = training.run_nanogpt(Recorder(WORK, material_folder), precision, compiled=False)
        assert run.find_mismatches(record, read_proof(material_folder)) == []


def test_every_side_exists_and_is_described():
    assert set(training.SIDES) == set(works.SIDES["rows"])
    assert all(set(work.sides) <= set(works.SIDES[work.data]) for work in works.WORKS.values())


def make_other_material(work, folder, seed: int, monkeypatch):
    monkeypatch.setattr(material, "SEED", seed)
    material.make(work, folder)
    return folder


def test_a_side_with_other_weights_is_invalid(material_folder, tmp_path, monkeypatch):
    other = make_other_material(WORK, tmp_path, 1, monkeypatch)
    (other / "tokens.npy").write_bytes((material_folder / "tokens.npy").read_bytes())
    mismatches = run.find_mismatches(training.run_raw(Recorder(WORK, other)), read_proof(material_folder))
    assert [line.split()[0] for line in mismatches if "loss" not in line] == ["weights_sha256"]


def test_a_side_with_other_tokens_is_invalid(material_folder, tmp_path, monkeypatch):
    other = make_other_material(WORK, tmp_path, 1, monkeypatch)
    (other / "weights.safetensors").write_bytes((material_folder / "weights.safetensors").read_bytes())
    mismatches = run.find_mismatches(training.run_rorchat(Recorder(WORK, other)), read_proof(material_folder))
    assert [line.split()[0] for line in mismatches if "loss" not in line] == ["tokens_sha256"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"first_loss": 6.002}, "first loss is 6.00200, not 6.00000 within 0.001"),
        ({"first_loss": 6.021, "precision": "bf16"}, "within 0.02 "),
        ({"first_loss": float("nan")}, "first loss is nan"),
        ({"parameters": 11}, "parameters is 11, not 10"),
        ({"first_gradient_norm": 4.005}, "first gradient norm is 4.00500, not 4.00000 within 0.004 "),
        ({"first_gradient_norm": 4.03, "precision": "bf16"}, "within 0.02 "),
    ],
)
def test_differences_of_a_side_are_named(change, message):
    proof = {
        "tokens_sha256": "a",
        "weights_sha256": "b",
        "parameters": 10,
        "first_loss": 6.0,
        "first_gradient_norm": 4.0,
    }
    for near in ({"first_loss": 6.0009}, {"first_gradient_norm": 4.003}, {"first_gradient_norm": None}):
        assert run.find_mismatches(proof | {"precision": "fp32"} | near, proof) == []
    (line,) = run.find_mismatches(proof | {"precision": "fp32"} | change, proof)
    assert message in line


@pytest.mark.slow
def test_a_failed_side_shows_its_error_and_one_without_code_is_skipped(material_folder, tmp_path, monkeypatch):
    monkeypatch.delenv(works.NANOGPT, raising=False)
    skipped = run.run_side(WORK, run.Side("nanogpt"), material_folder)
    assert (skipped["status"], "NANOGPT_DIR is not set" in skipped["why"]) == ("skipped", True)
    monkeypatch.setenv(works.NANOGPT, str(tmp_path))
    assert "has no model.py" in run.run_side(WORK, run.Side("nanogpt"), material_folder)["why"]
    monkeypatch.setattr("sys.executable", preloaded.client("python"))
    broken = run.run_side(WORK, run.Side("raw"), tmp_path)
    assert broken["status"] == "failed"
    assert "weights.safetensors" in broken["why"].splitlines()[0]
    assert len(broken["why"].splitlines()) <= run.STDERR_LINES + 1


@pytest.mark.slow
def test_a_run_alternates_the_order_of_sides_and_writes_results(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(works.NANOGPT, raising=False)
    monkeypatch.setattr("sys.executable", preloaded.client("python"))
    out = tmp_path / "results" / "run.json"
    command = ["--quick", "--work", "overhead", "--sides", "raw,nanogpt,rorchat", "--repeats", "2", "--out", str(out)]
    assert run.main(command) == 0
    results = json.loads(out.read_text())
    result = results["works"]["overhead"]
    assert [r["side"] for r in result["runs"]] == ["raw", "nanogpt", "rorchat", "rorchat", "nanogpt", "raw"]
    assert [r["status"] for r in result["runs"]] == ["ok", "skipped", "ok", "ok", "skipped", "ok"]
    hashes = {(r["tokens_sha256"], r["weights_sha256"]) for r in result["runs"] if r["status"] == "ok"}
    assert hashes == {(result["proof"]["tokens_sha256"], result["proof"]["weights_sha256"])}
    assert set(result["summary"]) == {"raw", "rorchat"}
    assert results["machine"]["versions"]["torch"] and result["calibration"]["before"]["memory copy"] > 0
    output = capsys.readouterr().out
    assert "| `rorchat` |" in output and "| `raw` |" in output
    assert "- `nanogpt` skipped: NANOGPT_DIR is not set" in output


def make_runs(seconds: dict[str, list[float]]) -> list[dict]:
    same = {"status": "ok", "precision": "fp32", "first_step_seconds": 9.0, "optimizer_seconds": [0.1]}
    return [
        same | {"side": side, "repeat": repeat, "step_seconds": [took, took, 100.0], "peak_memory_bytes": 10**9}
        for side, all_took in seconds.items()
        for repeat, took in enumerate(all_took)
    ]


def test_speeds_are_medians_and_ratios_are_within_a_repeat():
    work = replace(WORK, rows=10, block_size=10, passes=1)  # 100 tokens a step
    runs = make_runs({"rorchat": [1.0, 2.0, 4.0], "raw": [2.0, 8.0, 4.0]})
    results = table.summarize(work, runs, {"parameters": 1000}, {"bf16": 1e6, "fp32": 1e5})
    assert results["rorchat"]["per_second"] == {"median": 50.0, "min": 25.0, "max": 100.0}
    assert results["raw"]["speed_ratio"] == {"median": 2.0, "min": 1.0, "max": 4.0}
    assert "speed_ratio" not in results["rorchat"]
    flops = 50 * table.flops_per_token(work, 1000)
    assert results["rorchat"]["share_of_peak"] == {"bf16": flops / 1e6, "fp32": flops / 1e5}


def test_a_side_with_one_invalid_repeat_has_no_figures():
    runs = make_runs({"rorchat": [1.0, 1.0], "raw": [2.0, 2.0]})
    runs[-1]["status"] = "invalid"
    assert set(table.summarize(WORK, runs, {"parameters": 10_000}, {"bf16": 1.0, "fp32": 1.0})) == {"rorchat"}


def test_flops_per_token_equal_those_of_nanogpt():
    work = replace(works.WORKS["124m"], block_size=1024)
    parameters = 12 * (12 * 768**2 + 13 * 768) + 2 * 768 + (50_304 + 1024) * 768
    assert table.flops_per_token(work, parameters) == pytest.approx(854.8e6, rel=1e-3)


def test_a_calibration_that_changes_by_more_than_5_percent_is_shown():
    before = {"bf16 1x1x1": 1e12, "fp32 1x1x1": 1e11, "memory copy": 1e10, "python loop": 1e7}
    after = before | {"bf16 1x1x1": 0.9e12, "memory copy": 1.04e10}
    moved = table.find_changes(before, after)
    assert moved == {"bf16 1x1x1": pytest.approx(-0.1)}
    output = table.format_calibration({"before": before, "after": after, "moved": moved})
    assert "not steady" in output[1] and "bf16 1x1x1 -10%" in output[1]
    assert len(table.format_calibration({"before": before, "after": before, "moved": {}})) == 1


def test_only_the_section_between_its_comments_is_replaced(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- bench: 124m -->\nold\n<!-- end of bench: 124m -->\nb\n")
    assert run.replace_sections(page, {"124m": "new \\1"}) == (
        "a\n<!-- bench: 124m -->\nnew \\1\n<!-- end of bench: 124m -->\nb\n"
    )
    with pytest.raises(UsageError, match="no line <!-- bench: overhead -->"):
        run.replace_sections(page, {"overhead": "new"})


def test_the_benchmark_page_has_a_section_for_every_work():
    page = ROOT / "docs" / "benchmarks.md"
    names = [*works.WORKS, "124m --ablate", "sft --ablate", packing.SECTION]
    assert run.replace_sections(page, {name: "new" for name in names}).count("-->\nnew\n<!--") == len(names)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--work", "124"], "Did you mean '124m'"),
        (["--sides", "rorchat,nanogtp"], "Did you mean 'nanogpt'"),
        (["--work", "overhead", "sft", "--sides", "raw"], "No 'raw' of sft"),
        (["--work", "sft", "--steps", "2"], "Use --repeats instead"),
        (["--repeats", "0"], "give a positive number"),
        (["--ablate", "--sides", "raw"], "exclude each other"),
        (["--quick", "--write", "docs/benchmarks.md"], "measures nothing"),
        (["--write", "no/such/page.md"], "Cannot write into no/such/page.md"),
    ],
)
def test_wrong_arguments_are_refused_in_one_sentence(flags, message):
    with pytest.raises(UsageError, match=message) as caught:
        run.parse_arguments(flags)
    assert "\n" not in str(caught.value)


def test_run_py_imports_neither_torch_nor_numpy():
    code = "import run, sys; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=BENCH).stdout
    assert output.strip() == "[]"


@pytest.mark.parametrize("name", sorted(set(works.LEVERS["rows"]) - {"eager"}))  # a minute of compiling
def test_rorchat_without_a_lever_does_the_same_work(material_folder, name, monkeypatch):
    before, lever = {}, works.LEVERS["rows"][name]
    for target in lever.patches:
        owner, attribute = training.resolve_patch(target)
        before[owner, attribute] = vars(owner)[attribute]
        monkeypatch.setattr(owner, attribute, before[owner, attribute])  # so that it is restored
    record = training.run_without(lever, training.run_rorchat, Recorder(WORK, material_folder))
    assert all(vars(owner).get(attribute) is not value for (owner, attribute), value in before.items())
    assert run.find_mismatches(record, read_proof(material_folder)) == []


def test_a_lever_for_a_missing_function_is_an_error(material_folder):
    lever = works.Lever(patches=("rorchat.training.pretrain:missing_function",))
    with pytest.raises(AttributeError, match="missing_function"):
        training.run_without(lever, training.run_rorchat, Recorder(WORK, material_folder))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_plain_head_has_the_loss_and_gradients_of_the_fused_one(dtype, monkeypatch):
    monkeypatch.setattr("rorchat.training.kernels.sliced_head.MAX_LOGITS", 1 << 8)
    torch.manual_seed(0)
    labels = torch.randint(0, 64, (2, 9)).masked_fill(torch.rand(2, 9) < 0.3, training.IGNORE_INDEX)
    results = []
    for head in (lm_head_loss.head_loss, training.full_logits_loss):
        hidden, weight = (torch.randn(*shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
                          for shape in ((2, 9, 16), (64, 16)))  # fmt: skip
        with torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext():
            total = head(hidden, weight, labels)
        total.backward()
        results.append((total, hidden.grad, weight.grad))
    near = {"rtol": 2e-2, "atol": 5e-2} if dtype else {"rtol": 1e-5, "atol": 1e-5}
    for ours, plain in zip(*results, strict=True):
        assert ours.dtype == plain.dtype == torch.float32
        torch.testing.assert_close(ours, plain, **near)


def test_the_fused_head_lever_leaves_causal_attention_on(material_folder, monkeypatch):
    lever = works.LEVERS["rows"]["fused head"]
    for name in ("head_loss", "is_lookup_plain"):
        monkeypatch.setattr(lm_head_loss, name, getattr(lm_head_loss, name))  # so that it is restored
    entered, stock = [], lm_head_loss.causal_attention
    monkeypatch.setattr(lm_head_loss, "causal_attention", lambda config: entered.append(1) or stock(config))
    training.run_without(lever, training.run_rorchat, Recorder(WORK, material_folder))
    assert lever.patches[0].endswith("=full_logits_loss") and lm_head_loss.head_loss is training.full_logits_loss
    assert len(entered) == WORK.passes * (WORK.steps + WORK.discarded)


def make_records(losses: dict[str, dict[int, float]]) -> list[dict]:
    return [
        {"side": side, "seed": seed, "loss": value}
        for side, results in losses.items()
        for seed, value in results.items()
    ]


def test_losses_are_compared_over_common_seeds(capsys):
    losses = {"nanogpt": {0: 3.0, 1: 9.0}, "ours 0.1": {0: 3.5}, "ours 0.2": {0: 2.9, 2: 99.0}, "ours 1": {0: 2.0}}
    tokens_to_loss.print_results(make_records(losses), 244)
    output = capsys.readouterr().out
    # over all seeds, 0.1 would reach the mean of 6.0, and 0.2 would not
    assert "to the loss of nanoGPT's recipe (nanogpt), 3.000 over seeds 0: 0.201 of the tokens (ours 0.2)" in output
    assert "AdamW tuned" not in output
    losses |= {"adamw 1e-3 cosine 10": {0: 2.5, 1: 2.5}, "adamw 2e-3 cosine 10": {1: 2.6, 2: 1.0}}
    tokens_to_loss.print_results(make_records(losses), 244)
    # the sides of the grid have seed 1 in common; the best of them and ours have seed 0 in common
    assert (
        "AdamW tuned (adamw 1e-3 cosine 10), 2.500 over seeds 0: 1.000 of the tokens (ours 1)"
        in capsys.readouterr().out
    )


def test_no_common_seed_gives_no_line_and_a_missed_target_is_shown(capsys):
    tokens_to_loss.print_results(
        make_records({"nanogpt": {0: 3.0}, "ours 0.1": {1: 1.0}, "adamw 1e-3 cosine 10": {2: 1.0}}), 244
    )
    assert "to the loss of" not in capsys.readouterr().out
    tokens_to_loss.print_results(make_records({"nanogpt": {0: 3.0}, "ours 0.1": {0: 3.1}}), 244)
    assert "(nanogpt), 3.000 over seeds 0: not reached" in capsys.readouterr().out


def test_a_work_survives_json():
    for work in works.WORKS.values():
        assert works.Work.read(json.dumps(asdict(work))) == work
