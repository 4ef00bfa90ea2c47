"""Training speed, side by side: rorchat, TRL, Transformers' Trainer, nanoGPT and raw loops on equal tokens and weights.

    python scripts/bench/run.py                                       # every work of the table in docs/benchmarks.md
    python scripts/bench/run.py --work 124m --sides rorchat,nanogpt --repeats 5 --write docs/benchmarks.md
    python scripts/bench/run.py --work overhead --ablate              # rorchat with one lever off at a time
    python scripts/bench/run.py --work sft dpo --repeats 2            # fine-tuning and preferences against TRL
    NANOGPT_DIR=../nanoGPT python scripts/bench/run.py --work 124m

Every side is a process of its own with the same cores, threads and allocator; they run one after another, there and
back (A B C, C B A, ...). A side whose tokens, weights, parameters or first loss are not those of the others is invalid
and has no figures. What the machine can do is measured before and after each work.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from table import SPEED, calibration_told, markdown, moves, peaks_of, summary_of, with_section
from works import HOW_TO_GET, KEEPS_MEMORY, LARGE_PAGES, LEVERS, NEEDS, SIDES, WORKS, Work, quick

from rorchat.errors import UsageError, did_you_mean, exits_with_one_line

HERE = Path(__file__).resolve().parent
DEFAULT_WORKS = ("124m", "overhead", "optimizer", "optimizer-124m")
TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2, "fp16": 2e-2}  # of a loss, in nats
OF_NORM = {"fp32": 1e-3, "bf16": 5e-3, "fp16": 5e-3}  # of the gradient's norm, as a share: a leak moves it by 1 or 2 %
#: What makes the material of a work, and what runs a side of it, by what the work's rows are.
SCRIPTS = {
    "rows": ("material.py", "training.py"),
    "conversations": ("chat_material.py", "chat.py"),
    "pairs": ("chat_material.py", "chat.py"),
}
STDERR_LINES = 12
BUSY = 0.3  # the load average above which figures are not to be trusted


@dataclass(frozen=True)
class Side:
    name: str
    lever: str = ""

    @property
    def title(self) -> str:
        return f"{self.name} without {self.lever}" if self.lever else self.name


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment() -> dict[str, str]:
    """What every side gets."""
    return {
        "OMP_NUM_THREADS": str(cores()),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
    }


def inherited() -> dict[str, str]:
    """What the caller's environment says about threads and memory, which every side gets as well."""
    names = ("OMP_", "KMP_", "GOMP_", "MKL_", "MALLOC_", "GLIBC_", "LD_PRELOAD", "TORCH", "PYTORCH_", "CUDA_")
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(names)}


def peers() -> dict[str, str]:
    """sha256 of the peers' code that is here, by the variable that says where."""
    files = {name: Path(os.environ[name]) / "model.py" for name in HOW_TO_GET if os.environ.get(name)}
    return {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items() if file.is_file()}


def run_process(words: Sequence[str | Path], more: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    # From this process, which is small: a child's peak memory begins at its parent's
    variables = os.environ | environment() | (more or {})
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, env=variables)


def checked(done: subprocess.CompletedProcess, what: str) -> str:
    if done.returncode:
        raise RuntimeError(f"{what} failed:\n{last_lines(done.stderr)}")
    return done.stdout


def last_lines(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-STDERR_LINES:])


def calibrated(is_quick: bool) -> dict:
    words = [HERE / "calibration.py", *(["--quick"] if is_quick else [])]
    return json.loads(checked(run_process(words), "The calibration"))


def missing(side: Side) -> str:
    """Why a side cannot run here: its code is not there."""
    variable = NEEDS.get(side.name)
    if variable is None:
        return ""
    folder = os.environ.get(variable)
    if not folder:
        return f"{variable} is not set ({HOW_TO_GET[variable]})"
    return "" if (Path(folder) / "model.py").is_file() else f"{variable} is {folder}, which has no model.py"


def complaints(record: dict, proof: dict) -> list[str]:
    """In what a side did other work than the others; empty if in nothing."""
    found = [
        f"{key} is {record[key]}, not {proof[key]}"
        for key in ("tokens_sha256", "weights_sha256", "parameters")
        if record[key] != proof[key]
    ]
    for key in (key for key in proof if key.startswith("first_")):
        allowed = OF_NORM[record["precision"]] * proof[key] if "norm" in key else TOLERANCE[record["precision"]]
        # written so that a NaN is found as well; None where a side's own cannot be compared
        if record[key] is not None and not abs(record[key] - proof[key]) <= allowed:
            found.append(
                f"its {key.replace('_', ' ')} is {record[key]:.5f}, not {proof[key]:.5f} within {allowed:g} "
                f"({record['precision']})"
            )
    return found


def run_side(work: Work, side: Side, material: Path) -> dict:
    """One repeat of one side: its record, with a status and, unless that is ok, why."""
    why = missing(side)
    if why:
        return {"status": "skipped", "why": why}
    result = material / "result.json"
    result.unlink(missing_ok=True)
    words = [HERE / SCRIPTS[work.data][1], json.dumps(asdict(work)), side.name, material, result]
    if side.lever:
        done = run_process([*words, side.lever], LEVERS[work.data][side.lever].environment)
    else:
        done = run_process(words, {} if side.name in KEEPS_MEMORY else LARGE_PAGES)
    if done.returncode or not result.is_file():
        lines = last_lines(done.stderr).splitlines() or [f"exit code {done.returncode}"]
        return {"status": "failed", "why": "\n".join([lines[-1], *lines])}
    record = json.loads(result.read_text())
    proof = json.loads((material / "proof.json").read_text())
    why = "; ".join(complaints(record, proof))
    return record | ({"status": "invalid", "why": why} if why else {"status": "ok"})


def told(side: Side, record: dict, work: Work) -> str:
    if record["status"] != "ok":
        return f"{side.title:24} {record['status']}: {record['why']}"
    seconds = median(record["step_seconds"])
    return (
        f"{side.title:24} {work.units_a_step / seconds:10{SPEED[work.unit]}} {work.unit}/s  {seconds:.4g} s a step  "
        f"{record['peak_memory_bytes'] / 1e9:.2f} GB  first loss {record['first_loss']:.5f}"
    )


def compare(name: str, work: Work, sides: list[Side], repeats: int, is_quick: bool) -> tuple[dict, dict]:
    """(the result of a work, the machine)"""
    say(f"{name}: {work.title}")
    before = calibrated(is_quick)
    runs = []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        material = Path(folder)
        make = HERE / SCRIPTS[work.data][0]
        checked(run_process([make, json.dumps(asdict(work)), material]), "Making tokens and weights")
        proof = json.loads((material / "proof.json").read_text())
        for repeat in range(repeats):
            for side in sides if repeat % 2 == 0 else reversed(sides):
                record = run_side(work, side, material)
                runs.append({"side": side.title, "repeat": repeat} | record)
                say(f"  {told(side, record, work)}")
    after = calibrated(is_quick)
    calibration = {
        "before": before["calibration"],
        "after": after["calibration"],
        "moved": moves(before["calibration"], after["calibration"]),
    }
    result = {
        "work": asdict(work),
        "proof": proof,
        "calibration": calibration,
        "runs": runs,
        "summary": summary_of(work, runs, proof, peaks_of(before["calibration"])),
    }
    for line in calibration_told(calibration):
        say(f"  {line}")
    return result, before["machine"]


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def chosen_sides(work: Work, arguments: argparse.Namespace) -> list[Side]:
    if arguments.ablate:
        return [Side(work.subject), *(Side(work.subject, lever) for lever in LEVERS[work.data])]
    return [Side(name) for name in (arguments.sides.split(",") if arguments.sides else work.sides)]


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs="+", default=list(DEFAULT_WORKS), metavar="NAME", help=", ".join(WORKS))
    parser.add_argument("--sides", metavar="A,B", help="instead of the work's own; an unknown one says which")
    parser.add_argument("--ablate", action="store_true", help="rorchat without each of its levers")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, help="measured steps of a repeat, instead of the work's own")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: proves that all runs, measures nothing")
    parser.add_argument("--out", type=Path, help="where the JSON goes; default: runs/bench/DATE.json")
    parser.add_argument("--write", type=Path, metavar="FILE.md", help="replace the sections of the works in this file")
    arguments = parser.parse_args(argv)
    check(arguments)
    return arguments


def known(names: Sequence[str], choices: Sequence[str], of: str = "") -> None:
    for name in names:
        if name not in choices:
            raise UsageError(f"No {name!r}{of}.{did_you_mean(name, choices)} Known: {', '.join(choices)}.")


def check(arguments: argparse.Namespace) -> None:
    known(arguments.work, WORKS)
    for name in arguments.work:
        known(arguments.sides.split(",") if arguments.sides else [], SIDES[WORKS[name].data], f" of {name}")
        if arguments.steps and not WORKS[name].discarded:
            raise UsageError(f"steps is given, and {name} is one step that ends its epoch: give --repeats instead.")
    for name in ("repeats", "steps"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}: give a positive number.")
    if arguments.ablate and arguments.sides:
        raise UsageError("Both --ablate and --sides: an ablation is of rorchat alone, give one of them.")
    if arguments.write and arguments.quick:
        raise UsageError("--quick measures nothing that --write could keep: give one of them.")
    if arguments.write:
        updated(
            arguments.write, {section_name(name, arguments): "" for name in arguments.work}
        )  # before the hours, not after


def updated(file: Path, sections: dict[str, str]) -> str:
    """The file's text with the sections of the works replaced."""
    try:
        text = file.read_text(encoding="utf-8")
        for name, body in sections.items():
            text = with_section(text, name, body)
    except (OSError, ValueError) as error:
        raise UsageError(f"Cannot write into {file}: {error}.") from None
    return text


def section_name(name: str, arguments: argparse.Namespace) -> str:
    return f"{name} --ablate" if arguments.ablate else name


@exits_with_one_line
def main(argv: list[str] | None = None) -> int:
    arguments = parsed(argv)
    started = datetime.now(UTC)
    run = {
        "date": started.isoformat(timespec="seconds"),
        "command": " ".join(["python scripts/bench/run.py", *(sys.argv[1:] if argv is None else argv)]),
        "environment": inherited() | environment(),
        "peers": peers(),
        "repeats": arguments.repeats,
        "load": os.getloadavg()[0],
        "works": {},
    }
    if run["load"] > BUSY:
        say(f"The load average is {run['load']:.2f}: other work is running, and figures will say so.")
    out = arguments.out or Path("runs/bench") / f"{started:%Y%m%dT%H%M%SZ}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    for name in arguments.work:
        work = quick(WORKS[name]) if arguments.quick else WORKS[name]
        work = replace(work, steps=arguments.steps or work.steps)
        sides = chosen_sides(work, arguments)
        run["works"][name], run["machine"] = compare(name, work, sides, arguments.repeats, arguments.quick)
        out.write_text(json.dumps(run, indent=1) + "\n")  # after each: the next may take an hour
    say(f"{out}")
    sections = {section_name(name, arguments): markdown(name, result, run) for name, result in run["works"].items()}
    print("\n\n".join(sections.values()))
    if arguments.write:
        arguments.write.write_text(updated(arguments.write, sections), encoding="utf-8")
    bad = [r for result in run["works"].values() for r in result["runs"] if r["status"] in ("invalid", "failed")]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
