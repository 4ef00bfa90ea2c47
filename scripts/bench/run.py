"""Compares the training speed of rorchat, TRL, Transformers' Trainer, nanoGPT and plain loops on the same work.

    python scripts/bench/run.py                                       # all works of the table in docs/benchmarks.md
    python scripts/bench/run.py --work 124m --sides rorchat,nanogpt --repeats 5 --write docs/benchmarks.md
    python scripts/bench/run.py --work overhead --ablate              # rorchat without one optimization at a time
    python scripts/bench/run.py --work sft dpo --repeats 2            # fine-tuning and DPO against TRL
    NANOGPT_DIR=../nanoGPT python scripts/bench/run.py --work 124m

Every side runs in a separate process with the same cores, threads and allocator, one after another and back (A B C,
C B A, ...). A side with other tokens, weights, parameters or another first loss is invalid and gets no figures. The
speed of the machine itself is measured before and after each work. The benchmark imports the rorchat on PYTHONPATH, so
that checkouts can be compared: run it alternately with PYTHONPATH=OLD and PYTHONPATH=NEW.
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

from table import SPEED, find_changes, find_peaks, format_calibration, markdown, replace_section, summarize
from works import HOW_TO_GET, KEEPS_MEMORY, LARGE_PAGES, LEVERS, NEEDS, SIDES, WORKS, Work, quick

from rorchat.errors import UsageError, did_you_mean, exits_with_one_line

HERE = Path(__file__).resolve().parent
DEFAULT_WORKS = ("124m", "overhead", "optimizer", "optimizer-124m")
LOSS_TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2, "fp16": 2e-2}  # nats
NORM_TOLERANCE = {"fp32": 1e-3, "bf16": 5e-3, "fp16": 5e-3}  # relative; attention across packed rows moves it by 1-2 %
#: Scripts that make the material of a work and run one of its sides, by the data of the work.
SCRIPTS = {
    "rows": ("material.py", "training.py"),
    "conversations": ("chat_material.py", "chat.py"),
    "pairs": ("chat_material.py", "chat.py"),
}
STDERR_LINES = 12
BUSY = 0.3  # load average above which figures are unreliable


@dataclass(frozen=True)
class Side:
    name: str
    lever: str = ""

    @property
    def title(self) -> str:
        return f"{self.name} without {self.lever}" if self.lever else self.name


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def side_variables() -> dict[str, str]:
    """Environment variables of all sides."""
    return {
        "OMP_NUM_THREADS": str(cores()),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
    }


def inherited_variables() -> dict[str, str]:
    """Variables of the caller's environment that affect threads and memory; the sides inherit them."""
    names = ("OMP_", "KMP_", "GOMP_", "MKL_", "MALLOC_", "GLIBC_", "LD_PRELOAD", "TORCH", "PYTORCH_", "CUDA_")
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(names)}


def hash_peers() -> dict[str, str]:
    """SHA-256 of the available third-party code, by the variable that names its folder."""
    files = {name: Path(os.environ[name]) / "model.py" for name in HOW_TO_GET if os.environ.get(name)}
    return {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items() if file.is_file()}


def run_process(command: Sequence[str | Path], more: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    # started from this small process: the peak memory of a child begins at that of its parent
    variables = os.environ | side_variables() | (more or {})
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, env=variables)


def require_success(process: subprocess.CompletedProcess, what: str) -> str:
    if process.returncode:
        raise RuntimeError(f"{what} failed:\n{last_lines(process.stderr)}")
    return process.stdout


def last_lines(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-STDERR_LINES:])


def calibrate(is_quick: bool) -> dict:
    command = [HERE / "calibration.py", *(["--quick"] if is_quick else [])]
    return json.loads(require_success(run_process(command), "The calibration"))


def find_missing(side: Side) -> str:
    """Why a side cannot run here, or an empty string."""
    variable = NEEDS.get(side.name)
    if variable is None:
        return ""
    folder = os.environ.get(variable)
    if not folder:
        return f"{variable} is not set ({HOW_TO_GET[variable]})"
    return "" if (Path(folder) / "model.py").is_file() else f"{variable} is {folder}, which has no model.py"


def find_mismatches(record: dict, proof: dict) -> list[str]:
    """Differences between the work of a side and that of the others."""
    mismatches = [
        f"{key} is {record[key]}, not {proof[key]}"
        for key in ("tokens_sha256", "weights_sha256", "parameters")
        if record[key] != proof[key]
    ]
    for key in (key for key in proof if key.startswith("first_")):
        precision = record["precision"]
        allowed = NORM_TOLERANCE[precision] * proof[key] if "norm" in key else LOSS_TOLERANCE[precision]
        # true for NaN as well; None means that the side cannot be compared
        if record[key] is not None and not abs(record[key] - proof[key]) <= allowed:
            mismatches.append(
                f"{key.replace('_', ' ')} is {record[key]:.5f}, not {proof[key]:.5f} within {allowed:g} ({precision})"
            )
    return mismatches


def run_side(work: Work, side: Side, material: Path) -> dict:
    """Run one repeat of one side; the record has a `status` and, if that is not "ok", the reason in `why`."""
    why = find_missing(side)
    if why:
        return {"status": "skipped", "why": why}
    result = material / "result.json"
    result.unlink(missing_ok=True)
    command = [HERE / SCRIPTS[work.data][1], json.dumps(asdict(work)), side.name, material, result]
    if side.lever:
        process = run_process([*command, side.lever], LEVERS[work.data][side.lever].side_variables)
    else:
        process = run_process(command, {} if side.name in KEEPS_MEMORY else LARGE_PAGES)
    if process.returncode or not result.is_file():
        lines = last_lines(process.stderr).splitlines() or [f"exit code {process.returncode}"]
        return {"status": "failed", "why": "\n".join([lines[-1], *lines])}
    record = json.loads(result.read_text(encoding="utf-8"))
    proof = json.loads((material / "proof.json").read_text(encoding="utf-8"))
    why = "; ".join(find_mismatches(record, proof))
    return record | ({"status": "invalid", "why": why} if why else {"status": "ok"})


def format_record(side: Side, record: dict, work: Work) -> str:
    if record["status"] != "ok":
        return f"{side.title:24} {record['status']}: {record['why']}"
    seconds = median(record["step_seconds"])
    return (
        f"{side.title:24} {work.units_per_step / seconds:10{SPEED[work.unit]}} {work.unit}/s  {seconds:.4g} s a step  "
        f"{record['peak_memory_bytes'] / 1e9:.2f} GB  first loss {record['first_loss']:.5f}"
    )


def compare(name: str, work: Work, sides: list[Side], repeats: int, is_quick: bool) -> tuple[dict, dict]:
    """Run all sides of a work; returns the result and a description of the machine."""
    log(f"{name}: {work.title}")
    before = calibrate(is_quick)
    runs = []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        material = Path(folder)
        make = HERE / SCRIPTS[work.data][0]
        require_success(run_process([make, json.dumps(asdict(work)), material]), "Making the material")
        proof = json.loads((material / "proof.json").read_text(encoding="utf-8"))
        for repeat in range(repeats):
            for side in sides if repeat % 2 == 0 else reversed(sides):
                record = run_side(work, side, material)
                runs.append({"side": side.title, "repeat": repeat} | record)
                log(f"  {format_record(side, record, work)}")
    after = calibrate(is_quick)
    calibration = {
        "before": before["calibration"],
        "after": after["calibration"],
        "moved": find_changes(before["calibration"], after["calibration"]),
    }
    result = {
        "work": asdict(work),
        "proof": proof,
        "calibration": calibration,
        "runs": runs,
        "summary": summarize(work, runs, proof, find_peaks(before["calibration"])),
    }
    for line in format_calibration(calibration):
        log(f"  {line}")
    return result, before["machine"]


def log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def chosen_sides(work: Work, arguments: argparse.Namespace) -> list[Side]:
    if arguments.ablate:
        return [Side(work.subject), *(Side(work.subject, lever) for lever in LEVERS[work.data])]
    return [Side(name) for name in (arguments.sides.split(",") if arguments.sides else work.sides)]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs="+", default=list(DEFAULT_WORKS), metavar="NAME", help=", ".join(WORKS))
    parser.add_argument("--sides", metavar="A,B", help="sides to run instead of those of the work")
    parser.add_argument("--ablate", action="store_true", help="run rorchat without each of its optimizations")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, help="measured steps per repeat, instead of those of the work")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: tests the benchmark, measures nothing")
    parser.add_argument("--out", type=Path, help="JSON file of the results; default: runs/bench/DATE.json")
    parser.add_argument("--write", type=Path, metavar="FILE.md", help="replace the sections of the works in this file")
    arguments = parser.parse_args(argv)
    check_arguments(arguments)
    return arguments


def require_known(names: Sequence[str], choices: Sequence[str], of: str = "") -> None:
    for name in names:
        if name not in choices:
            raise UsageError(f"No {name!r}{of}.{did_you_mean(name, choices)} Known: {', '.join(choices)}.")


def check_arguments(arguments: argparse.Namespace) -> None:
    require_known(arguments.work, WORKS)
    for name in arguments.work:
        require_known(arguments.sides.split(",") if arguments.sides else [], SIDES[WORKS[name].data], f" of {name}")
        if arguments.steps and not WORKS[name].discarded:
            raise UsageError(f"--steps cannot be set for {name}, whose epoch is one step. Use --repeats instead.")
    for name in ("repeats", "steps"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}: give a positive number.")
    if arguments.ablate and arguments.sides:
        raise UsageError("--ablate and --sides exclude each other: an ablation runs rorchat only.")
    if arguments.write and arguments.quick:
        raise UsageError("--quick and --write exclude each other: a quick run measures nothing.")
    if arguments.write:
        # fails now rather than after hours of measuring
        replace_sections(arguments.write, {section_name(name, arguments): "" for name in arguments.work})


def replace_sections(file: Path, sections: dict[str, str]) -> str:
    """The text of the file with the sections of the works replaced."""
    try:
        text = file.read_text(encoding="utf-8")
        for name, body in sections.items():
            text = replace_section(text, name, body)
    except (OSError, ValueError) as error:
        raise UsageError(f"Cannot write into {file}: {error}.") from None
    return text


def section_name(name: str, arguments: argparse.Namespace) -> str:
    return f"{name} --ablate" if arguments.ablate else name


@exits_with_one_line
def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    started = datetime.now(UTC)
    run = {
        "date": started.isoformat(timespec="seconds"),
        "command": " ".join(["python scripts/bench/run.py", *(sys.argv[1:] if argv is None else argv)]),
        "environment": inherited_variables() | side_variables(),
        "peers": hash_peers(),
        "repeats": arguments.repeats,
        "load": os.getloadavg()[0],
        "works": {},
    }
    if run["load"] > BUSY:
        log(f"The load average is {run['load']:.2f}: other programs are running, and the table will show it.")
    out = arguments.out or Path("runs/bench") / f"{started:%Y%m%dT%H%M%SZ}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    for name in arguments.work:
        work = quick(WORKS[name]) if arguments.quick else WORKS[name]
        work = replace(work, steps=arguments.steps or work.steps)
        sides = chosen_sides(work, arguments)
        run["works"][name], run["machine"] = compare(name, work, sides, arguments.repeats, arguments.quick)
        out.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")  # after each work: the next may take an hour
    log(str(out))
    sections = {section_name(name, arguments): markdown(name, result, run) for name, result in run["works"].items()}
    print("\n\n".join(sections.values()))
    if arguments.write:
        arguments.write.write_text(replace_sections(arguments.write, sections), encoding="utf-8")
    bad = [r for result in run["works"].values() for r in result["runs"] if r["status"] in ("invalid", "failed")]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
