"""The benchmark of training speed: all sides do the same work, one that does not has no figures, the sums are right."""

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace

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
from watch import Watch  # noqa: E402

from rorchat.errors import UsageError  # noqa: E402
from rorchat.training.kernels import lm_head_loss  # noqa: E402

WORK = works.quick(works.WORKS["optimizer"])  # two passes a step
EAGER = [
    "trainer-default", "trainer-fp32", "trainer-bf16", "accelerate", "raw", "raw-fused", "rorchat", "rorchat-bf16",
    "rorchat-muon",
]  # fmt: skip


@pytest.fixture(autouse=True)
def own_accelerator():
    """The precision of a process is Accelerate's first caller's; here every side is the first."""
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    material.make(WORK, folder)
    return folder


def proof_of(folder) -> dict:
    return json.loads((folder / "proof.json").read_text())


@pytest.mark.parametrize("side", EAGER)
def test_every_side_reads_the_same_tokens_from_the_same_weights_and_begins_at_the_same_loss(made, side):
    record = training.SIDES[side](Watch(WORK, made))
    assert run.complaints(record, proof_of(made)) == []
    assert (len(record["step_seconds"]), len(record["optimizer_seconds"])) == (WORK.steps, WORK.steps)
    assert all(0 < o < s for o, s in zip(record["optimizer_seconds"], record["step_seconds"], strict=True))
    assert record["last_loss"] != record["first_loss"]


def test_nanogpt_does_the_same_work(made):
    if not os.environ.get(works.NANOGPT):
        pytest.skip(f"{works.NANOGPT} is not set: {works.HOW_TO_GET[works.NANOGPT]}")
    for precision in ("fp32", "bf16"):
        record = training.nanogpt(Watch(WORK, made), precision, compiled=False)
        assert run.complaints(record, proof_of(made)) == []


def test_every_side_that_can_be_asked_for_exists_and_is_explained():
    assert set(training.SIDES) == set(works.SIDES["rows"])
    assert all(set(work.sides) <= set(works.SIDES[work.data]) for work in works.WORKS.values())


def another(work, folder, seed: int, monkeypatch):
    monkeypatch.setattr(material, "SEED", seed)
    material.make(work, folder)
    return folder


def test_a_side_with_other_weights_is_invalid_though_its_loss_may_pass(made, tmp_path, monkeypatch):
    other = another(WORK, tmp_path, 1, monkeypatch)
    for file in ("tokens.npy",):
        (other / file).write_bytes((made / file).read_bytes())
    said = run.complaints(training.raw(Watch(WORK, other)), proof_of(made))
    assert [line.split()[0] for line in said if "loss" not in line] == ["weights_sha256"]


def test_a_side_with_other_tokens_is_invalid(made, tmp_path, monkeypatch):
    other = another(WORK, tmp_path, 1, monkeypatch)
    (other / "weights.safetensors").write_bytes((made / "weights.safetensors").read_bytes())
    said = run.complaints(training.rorchat(Watch(WORK, other)), proof_of(made))
    assert [line.split()[0] for line in said if "loss" not in line] == ["tokens_sha256"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"first_loss": 6.002}, "first loss is 6.00200, not 6.00000 within 0.001"),
        ({"first_loss": 6.021, "precision": "bf16"}, "within 0.02 "),
        ({"first_loss": float("nan")}, "first loss is nan"),
        ({"parameters": 11}, "parameters is 11, not 10"),
        ({"first_gradient_norm": 4.005}, "first gradient norm is 4.00500, not 4.00000 within 0.004 "),
        ({"first_gradient_norm": 4.03, "precision": "bf16"}, "within 0.02 "),
    ],
)
def test_a_side_that_does_other_work_is_told_in_what(change, said):
    proof = {
        "tokens_sha256": "a",
        "weights_sha256": "b",
        "parameters": 10,
        "first_loss": 6.0,
        "first_gradient_norm": 4.0,
    }
    for near in ({"first_loss": 6.0009}, {"first_gradient_norm": 4.003}, {"first_gradient_norm": None}):
        assert run.complaints(proof | {"precision": "fp32"} | near, proof) == []
    (line,) = run.complaints(proof | {"precision": "fp32"} | change, proof)
    assert said in line


def test_a_side_that_breaks_shows_its_last_words_and_one_without_its_code_is_skipped(made, tmp_path, monkeypatch):
    monkeypatch.delenv(works.NANOGPT, raising=False)
    skipped = run.run_side(WORK, run.Side("nanogpt"), made)
    assert (skipped["status"], "NANOGPT_DIR is not set" in skipped["why"]) == ("skipped", True)
    monkeypatch.setenv(works.NANOGPT, str(tmp_path))
    assert "has no model.py" in run.run_side(WORK, run.Side("nanogpt"), made)["why"]
    broken = run.run_side(WORK, run.Side("raw"), tmp_path)
    assert broken["status"] == "failed"
    assert "weights.safetensors" in broken["why"].splitlines()[0]
    assert len(broken["why"].splitlines()) <= run.STDERR_LINES + 1


def test_a_run_goes_there_and_back_over_its_sides_and_writes_what_it_found(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(works.NANOGPT, raising=False)
    out = tmp_path / "results" / "run.json"
    command = ["--quick", "--work", "overhead", "--sides", "raw,nanogpt,rorchat", "--repeats", "2", "--out", str(out)]
    assert run.main(command) == 0
    found = json.loads(out.read_text())
    result = found["works"]["overhead"]
    assert [r["side"] for r in result["runs"]] == ["raw", "nanogpt", "rorchat", "rorchat", "nanogpt", "raw"]
    assert [r["status"] for r in result["runs"]] == ["ok", "skipped", "ok", "ok", "skipped", "ok"]
    hashes = {(r["tokens_sha256"], r["weights_sha256"]) for r in result["runs"] if r["status"] == "ok"}
    assert hashes == {(result["proof"]["tokens_sha256"], result["proof"]["weights_sha256"])}
    assert set(result["summary"]) == {"raw", "rorchat"}
    assert found["machine"]["versions"]["torch"] and result["calibration"]["before"]["memory copy"] > 0
    told = capsys.readouterr().out
    assert "| `rorchat` |" in told and "| `raw` |" in told
    assert "- `nanogpt` skipped: NANOGPT_DIR is not set" in told


def runs_of(seconds: dict[str, list[float]]) -> list[dict]:
    same = {"status": "ok", "precision": "fp32", "first_step_seconds": 9.0, "optimizer_seconds": [0.1]}
    return [
        same | {"side": side, "repeat": repeat, "step_seconds": [took, took, 100.0], "peak_memory_bytes": 10**9}
        for side, all_took in seconds.items()
        for repeat, took in enumerate(all_took)
    ]


def test_speeds_are_medians_of_medians_and_ratios_are_taken_within_a_repeat():
    work = replace(WORK, rows=10, block_size=10, passes=1)  # 100 tokens a step
    runs = runs_of({"rorchat": [1.0, 2.0, 4.0], "raw": [2.0, 8.0, 4.0]})
    found = table.summary_of(work, runs, {"parameters": 1000}, {"bf16": 1e6, "fp32": 1e5})
    assert found["rorchat"]["per_second"] == {"median": 50.0, "min": 25.0, "max": 100.0}
    assert found["raw"]["speed_ratio"] == {"median": 2.0, "min": 1.0, "max": 4.0}
    assert "speed_ratio" not in found["rorchat"]
    flops = 50 * table.flops_per_token(work, 1000)
    assert found["rorchat"]["share_of_peak"] == {"bf16": flops / 1e6, "fp32": flops / 1e5}


def test_a_side_that_was_invalid_once_has_no_figures_at_all():
    runs = runs_of({"rorchat": [1.0, 1.0], "raw": [2.0, 2.0]})
    runs[-1]["status"] = "invalid"
    assert set(table.summary_of(WORK, runs, {"parameters": 10_000}, {"bf16": 1.0, "fp32": 1.0})) == {"rorchat"}


def test_the_work_of_a_token_is_nanogpts_count():
    work = replace(works.WORKS["124m"], block_size=1024)
    parameters = 12 * (12 * 768**2 + 13 * 768) + 2 * 768 + (50_304 + 1024) * 768
    assert table.flops_per_token(work, parameters) == pytest.approx(854.8e6, rel=1e-3)


def test_a_calibration_that_moved_by_more_than_a_twentieth_is_told():
    before = {"bf16 1x1x1": 1e12, "fp32 1x1x1": 1e11, "memory copy": 1e10, "python loop": 1e7}
    after = before | {"bf16 1x1x1": 0.9e12, "memory copy": 1.04e10}
    moved = table.moves(before, after)
    assert moved == {"bf16 1x1x1": pytest.approx(-0.1)}
    told = table.calibration_told({"before": before, "after": after, "moved": moved})
    assert "not steady" in told[1] and "bf16 1x1x1 -10%" in told[1]
    assert len(table.calibration_told({"before": before, "after": before, "moved": {}})) == 1


def test_a_section_is_replaced_between_its_comments_and_the_rest_of_the_page_stays(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- bench: 124m -->\nold\n<!-- end of bench: 124m -->\nb\n")
    assert run.updated(page, {"124m": "new \\1"}) == (
        "a\n<!-- bench: 124m -->\nnew \\1\n<!-- end of bench: 124m -->\nb\n"
    )
    with pytest.raises(UsageError, match="no line <!-- bench: overhead -->"):
        run.updated(page, {"overhead": "new"})


def test_the_page_of_figures_has_a_place_for_every_work_and_its_ablation():
    page = ROOT / "docs" / "benchmarks.md"
    names = [*works.WORKS, "124m --ablate", "sft --ablate", packing.SECTION]
    assert run.updated(page, {name: "new" for name in names}).count("-->\nnew\n<!--") == len(names)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--work", "124"], "Did you mean '124m'"),
        (["--sides", "rorchat,nanogtp"], "Did you mean 'nanogpt'"),
        (["--work", "overhead", "sft", "--sides", "raw"], "No 'raw' of sft"),
        (["--work", "sft", "--steps", "2"], "sft is one step that ends its epoch: give --repeats"),
        (["--repeats", "0"], "give a positive number"),
        (["--ablate", "--sides", "raw"], "of rorchat alone"),
        (["--quick", "--write", "docs/benchmarks.md"], "measures nothing"),
        (["--write", "no/such/page.md"], "Cannot write into no/such/page.md"),
    ],
)
def test_a_wrong_request_is_one_sentence_before_anything_runs(flags, said):
    with pytest.raises(UsageError, match=said) as caught:
        run.parsed(flags)
    assert "\n" not in str(caught.value)


def test_the_orchestrator_is_small_since_a_childs_peak_memory_begins_at_its_parents():
    code = "import run, sys; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=BENCH).stdout
    assert told.strip() == "[]"


@pytest.mark.parametrize("name", sorted(set(works.LEVERS["rows"]) - {"eager"}))  # a minute of compiling
def test_rorchat_without_a_lever_does_the_same_work(made, name, monkeypatch):
    before, lever = {}, works.LEVERS["rows"][name]
    for target in lever.patches:
        owner, attribute = training.located(target)
        before[owner, attribute] = vars(owner)[attribute]
        monkeypatch.setattr(owner, attribute, before[owner, attribute])  # put back afterwards
    record = training.without(lever, training.rorchat, Watch(WORK, made))
    assert all(vars(owner).get(attribute) is not value for (owner, attribute), value in before.items())
    assert run.complaints(record, proof_of(made)) == []


def test_a_lever_that_is_gone_is_an_error_and_not_one_without_effect(made):
    lever = works.Lever(patches=("rorchat.training.pretrain:fuse_nothing",))
    with pytest.raises(AttributeError, match="fuse_nothing"):
        training.without(lever, training.rorchat, Watch(WORK, made))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_head_that_replaces_the_fused_one_has_its_loss_and_gradients_and_all_logits(dtype, monkeypatch):
    monkeypatch.setattr(lm_head_loss, "LOGITS_AT_ONCE", 1 << 8)
    torch.manual_seed(0)
    labels = torch.randint(0, 64, (2, 9)).masked_fill(torch.rand(2, 9) < 0.3, training.IGNORED)
    found = []
    for head in (lm_head_loss.head_loss, training.full_logits_loss):
        hidden, weight = (torch.randn(*shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
                          for shape in ((2, 9, 16), (64, 16)))  # fmt: skip
        with torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext():
            total = head(hidden, weight, labels)
        total.backward()
        found.append((total, hidden.grad, weight.grad))
    near = {"rtol": 2e-2, "atol": 5e-2} if dtype else {"rtol": 1e-5, "atol": 1e-5}
    for ours, plain in zip(*found, strict=True):
        assert ours.dtype == plain.dtype == torch.float32
        torch.testing.assert_close(ours, plain, **near)


def test_the_lever_of_the_head_leaves_causal_attention_and_the_compiler_alone(made, monkeypatch):
    lever = works.LEVERS["rows"]["fused head"]
    for name in ("head_loss", "_lookup_is_plain"):
        monkeypatch.setattr(lm_head_loss, name, getattr(lm_head_loss, name))  # put back afterwards
    entered, stock = [], lm_head_loss.causal_attention
    monkeypatch.setattr(lm_head_loss, "causal_attention", lambda config: entered.append(1) or stock(config))
    training.without(lever, training.rorchat, Watch(WORK, made))
    assert lever.patches[0].endswith("=full_logits_loss") and lm_head_loss.head_loss is training.full_logits_loss
    assert len(entered) == WORK.passes * (WORK.steps + WORK.discarded)


def recorded(losses: dict[str, dict[int, float]]) -> list[dict]:
    return [
        {"side": side, "seed": seed, "loss": value} for side, found in losses.items() for seed, value in found.items()
    ]


def test_losses_are_compared_over_the_seeds_that_both_sides_have(capsys):
    losses = {"nanogpt": {0: 3.0, 1: 9.0}, "ours 0.1": {0: 3.5}, "ours 0.2": {0: 2.9, 2: 99.0}, "ours 1": {0: 2.0}}
    tokens_to_loss.told(recorded(losses), 244)
    told = capsys.readouterr().out
    # over all seeds, 0.1 would have reached 6.0, and 0.2 would not
    assert "to the loss of nanoGPT's recipe (nanogpt), 3.000 over seeds 0: 0.201 of the tokens (ours 0.2)" in told
    assert "AdamW tuned" not in told
    losses |= {"adamw 1e-3 cosine 10": {0: 2.5, 1: 2.5}, "adamw 2e-3 cosine 10": {1: 2.6, 2: 1.0}}
    tokens_to_loss.told(recorded(losses), 244)
    # by the seed that the grid has in common, which is 1; ours have none but 0 in common with its best
    assert (
        "AdamW tuned (adamw 1e-3 cosine 10), 2.500 over seeds 0: 1.000 of the tokens (ours 1)"
        in capsys.readouterr().out
    )


def test_nothing_is_said_where_no_seed_is_common_and_what_is_not_reached_is_said(capsys):
    tokens_to_loss.told(recorded({"nanogpt": {0: 3.0}, "ours 0.1": {1: 1.0}, "adamw 1e-3 cosine 10": {2: 1.0}}), 244)
    assert "to the loss of" not in capsys.readouterr().out
    tokens_to_loss.told(recorded({"nanogpt": {0: 3.0}, "ours 0.1": {0: 3.1}}), 244)
    assert "(nanogpt), 3.000 over seeds 0: not reached" in capsys.readouterr().out


def test_a_work_travels_to_its_sides_as_it_is():
    for work in works.WORKS.values():
        assert works.Work.read(json.dumps(asdict(work))) == work
