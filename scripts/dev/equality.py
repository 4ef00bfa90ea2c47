"""Prove that two versions of this repository train identically, bit by bit, on a CPU.

    python scripts/dev/equality.py record CHECKOUT OUT [--stages tokenizer pretrain ...]
    python scripts/dev/equality.py compare BEFORE/record.json AFTER/record.json [--rename old=new ...]
    python scripts/dev/equality.py resume BEFORE_CHECKOUT AFTER_CHECKOUT OUT [--whole RECORDED]

``record`` runs a short version of every stage of the demo from a checkout, through the command line of its recipes, and
writes ``OUT/record.json``: the lines of ``metrics.jsonl`` and ``samples.jsonl`` without anything measured by a clock,
and the SHA-256 of the weights, the tokenizer, the token stores and the model's configuration files. ``compare`` prints
one line for each item of each stage and exits with 1 if any item differs. ``resume`` stops a run of one checkout with
SIGTERM after its first checkpoint, continues it with the other checkout, and compares the result with the recorded
run in ``RECORDED``, a folder written by ``record`` (default: recorded from BEFORE_CHECKOUT into ``OUT/whole``).

Two records are comparable only if they come from the same machine and the same installed packages. Every run uses this
interpreter, one process and one thread: the script pins itself, and so its children, to one CPU, which is also what
``use_all_cores`` of rorchat counts. Use ``taskset -c N`` to choose the CPU. Seeds are the defaults of the recipes, so
that a changed default is noticed as well. Nothing is written outside OUT.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

Lines = list[dict[str, object]]

#: Recipe and flags by stage, in the order of the demo; ``{inputs}`` is the folder that holds the earlier stages.
STAGES = {
    "tokenizer": "tokenizer.py --config recipes/demo/tokenizer.yaml",
    "pretrain": "pretrain.py --config recipes/demo/pretrain.yaml --tokenizer {inputs}/tokenizer --max_steps 150",
    "midtrain": "pretrain.py --config recipes/demo/midtrain.yaml --model {inputs}/pretrain --max_steps 60",
    "sft": "sft.py --config recipes/demo/sft.yaml --model {inputs}/midtrain --replay {inputs}/pretrain/tokens/tinytown "
    "--max_steps 60",
    "sft-lora": "sft.py --config recipes/demo/sft.yaml --model {inputs}/midtrain "
    "--replay {inputs}/pretrain/tokens/tinytown --max_steps 20 --optimizer adamw --lora_rank 4",
    "dpo": "dpo.py --config recipes/demo/dpo.yaml --model {inputs}/sft --max_steps 60",
    "grpo": "grpo.py --config recipes/demo/grpo.yaml --model {inputs}/sft --max_steps 60 "
    "--per_device_train_batch_size 64",
}
RESUMED = ("pretrain", "sft", "dpo")
STOPPED_BY_SIGNAL = 75  # exit code of a recipe
#: Metrics that depend on a clock or on the machine; so do those whose names contain one of CLOCK_WORDS.
MEASURED = {"seconds", "dollars", "memory_bytes", "mfu", "peak", "peak_flops"}
CLOCK_WORDS = ("_seconds", "per_second", "runtime", "step_time")
HASHED = {
    "model.safetensors", "adapter_model.safetensors", "config.json", "generation_config.json", "tokenizer.json",
    "tokenizer_config.json", "chat_template.jinja",
}  # fmt: skip
PROBE = """
import json, os, rorchat, sys, torch, transformers, trl
versions = {module.__name__: module.__version__ for module in (torch, transformers, trl)}
environment = {"python": sys.version.split()[0], "capability": torch.backends.cpu.get_cpu_capability(), **versions}
cpus = len(os.sched_getaffinity(0))
threads = torch.get_num_threads()
print(json.dumps({"package": rorchat.__file__, "cpus": cpus, "threads": threads, "versions": environment}))
"""


def make_environment(checkout: Path, out: Path) -> dict[str, str]:
    """Variables of every run: the checkout's package, one thread, no GPU, no network, caches in OUT."""
    return {
        **os.environ,
        "PYTHONPATH": str(checkout),
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(out / "cache" / "huggingface"),
        "XDG_CACHE_HOME": str(out / "cache"),
        "MPLCONFIGDIR": str(out / "cache" / "matplotlib"),
    }


def probe(checkout: Path, out: Path) -> dict[str, str]:
    """Return the versions that a run uses; exit unless it imports the checkout's package and has a single thread."""
    command = [sys.executable, "-P", "-c", PROBE]
    environment = make_environment(checkout, out)
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    if checkout not in Path(result["package"]).resolve().parents:
        sys.exit(f"rorchat is imported from {result['package']}, not from {checkout}.")
    if (result["cpus"], result["threads"]) != (1, 1):
        sys.exit(f"A run would have {result['threads']} threads on {result['cpus']} CPUs; one of each is required.")
    return result["versions"]


def build_command(stage: str, inputs: Path, folder: Path) -> list[str]:
    """Return the command line of a stage that reads the earlier stages in ``inputs`` and writes into ``folder``."""
    recipe, *flags = (word.format(inputs=inputs) for word in STAGES[stage].split())
    logging = [] if stage == "tokenizer" else ["--logging_steps", "5"]
    return [sys.executable, f"recipes/{recipe}", *flags, *logging, "--output_dir", str(folder)]


def run(checkout: Path, command: list[str], folder: Path, stop: bool = False) -> None:
    """Run a stage in a checkout and append its output to ``folder.log``; exit if it fails.

    Args:
        stop: Send SIGTERM as soon as the folder holds a checkpoint, and expect the run to end by it.
    """
    log = folder.with_name(f"{folder.name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = make_environment(checkout, folder.parent)
    with log.open("a", encoding="utf-8") as file:
        process = subprocess.Popen(command, cwd=checkout, env=environment, stdout=file, stderr=subprocess.STDOUT)
        while stop and process.poll() is None:
            if any(folder.glob("checkpoint-*")):
                process.send_signal(signal.SIGTERM)
                break
            time.sleep(0.02)
        code = process.wait()
    if code != (STOPPED_BY_SIGNAL if stop else 0):
        end = log.read_text(encoding="utf-8")[-3000:]
        sys.exit(f"{' '.join(command)}\nin {checkout} exited with {code}; the end of {log}:\n{end}")


def read_lines(path: Path, out: Path) -> Lines:
    """Return the lines of a JSON Lines file without measured values, with the path of OUT replaced in texts."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        record = json.loads(line.replace(str(out), "OUT"))
        names = [name for name in record if name not in MEASURED and not any(word in name for word in CLOCK_WORDS)]
        kept.append({name: record[name] for name in names})
    return kept


def collect_results(folder: Path, out: Path) -> dict[str, object]:
    """Return the results of a stage: metrics, samples, and the SHA-256 of each file by its relative path."""
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if (path.name in HASHED or path.suffix == ".npy") and not name.parts[0].startswith(("checkpoint-", ".")):
            files[str(name)] = hashlib.sha256(path.read_bytes()).hexdigest()
    metrics, samples = (read_lines(folder / f"{name}.jsonl", out) for name in ("metrics", "samples"))
    return {"metrics": metrics, "samples": samples, "files": files}


def record(checkout: Path, out: Path, stages: list[str]) -> None:
    """Run the stages in the order of the demo and write, or update, ``OUT/record.json``."""
    path = out / "record.json"
    for stage in stages:
        if (out / stage).exists():
            sys.exit(f"{out / stage} exists: delete it first, or choose another OUT.")
    out.mkdir(parents=True, exist_ok=True)
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"stages": {}}
    content |= {"environment": probe(checkout, out), "checkout": str(checkout)}
    for stage in (name for name in STAGES if name in stages):
        started = time.monotonic()
        run(checkout, build_command(stage, out, out / stage), out / stage)
        results = collect_results(out / stage, out)
        seconds = round(time.monotonic() - started, 1)
        content["stages"][stage] = {**results, "seconds": seconds}
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(f"{stage}: {len(results['metrics'])} lines, {len(results['files'])} files, {seconds} s", flush=True)
    print(path)


def find_first_difference(a: Lines, b: Lines) -> str:
    """Return where two lists of lines first differ, or an empty string."""
    for number, (x, y) in enumerate(zip(a, b, strict=False), 1):
        for name in sorted({*x, *y}):
            if (name in x) != (name in y) or x.get(name) != y.get(name):
                values = f"{x.get(name, 'absent')} -> {y.get(name, 'absent')}"
                return f"line {number}, step {x.get('step')}: {name} {values}"
    return "" if len(a) == len(b) else f"{len(a)} lines -> {len(b)} lines"


def find_differences(a: dict, b: dict) -> dict[str, str]:
    """Return the first difference of each item of a stage's results; empty strings where items are equal."""
    differences = {item: find_first_difference(a[item], b[item]) for item in ("metrics", "samples")}
    for name in sorted({*a["files"], *b["files"]}):
        x, y = (results["files"].get(name, "absent")[:12] for results in (a, b))
        differences[name] = "" if x == y else f"{x} -> {y}"
    return differences


def report(stage: str, differences: dict[str, str]) -> bool:
    """Print one line for each item of a stage and return whether all items are equal."""
    for item, difference in differences.items():
        print(f"{stage:10} {item:40} {'different: ' + difference if difference else 'equal'}", flush=True)
    return not any(differences.values())


def compare(before: Path, after: Path, new_names: dict[str, str], stages: list[str]) -> bool:
    """Print the comparison of two records and return whether they are equal.

    Args:
        renamed: New names of metrics, by their names in ``before``.
    """
    a, b = (json.loads(path.read_text(encoding="utf-8")) for path in (before, after))
    if a["environment"] != b["environment"]:
        print(f"warning: the environments differ: {a['environment']} -> {b['environment']}")
    equal = True
    for stage in (name for name in stages if name in a["stages"] or name in b["stages"]):
        if stage not in a["stages"] or stage not in b["stages"]:
            differences = {"stage": f"only in {before if stage in a['stages'] else after}"}
        else:
            of_a = a["stages"][stage]
            of_a["metrics"] = [{new_names.get(key, key): line[key] for key in line} for line in of_a["metrics"]]
            differences = find_differences(of_a, b["stages"][stage])
        equal &= report(stage, differences)
    return equal


def resume(before: Path, after: Path, out: Path, recorded: Path | None) -> bool:
    """Stop each of RESUMED in one checkout, continue it in the other, and return whether all end like ``recorded``."""
    if recorded is None:
        recorded = out / "whole"
        record(before, recorded, ["tokenizer", "pretrain", "midtrain", "sft", "dpo"])
    expected = json.loads((recorded / "record.json").read_text(encoding="utf-8"))["stages"]
    equal = True
    for stage in RESUMED:
        folder = out / stage
        if folder.exists():
            sys.exit(f"{folder} exists: delete it first, or choose another OUT.")
        command = [*build_command(stage, recorded, folder), "--save_steps", "20"]
        run(before, command, folder, stop=True)
        run(after, command, folder)
        results = collect_results(folder, recorded)
        resumed = [line["step"] for line in results["metrics"] if line.get("event") == "resumed"]
        if len(resumed) != 1:
            sys.exit(f"{folder}/metrics.jsonl has {len(resumed)} events 'resumed', not one.")
        for run_results in (
            results,
            expected[stage],
        ):  # events and constants logged at the start depend on the first step
            lines = [line for line in run_results["metrics"] if "event" not in line]
            run_results["metrics"] = [{key: line[key] for key in line if key != "flops_per_token"} for line in lines]
        print(f"{stage}: resumed after step {resumed[0]}")
        equal &= report(stage, find_differences(expected[stage], results))
    return equal


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, paths in (
        ("record", ("checkout", "out")),
        ("compare", ("before", "after")),
        ("resume", ("before", "after", "out")),
    ):
        command = commands.add_parser(name)
        for path in paths:
            command.add_argument(path, type=lambda text: Path(text).resolve())
        if name == "resume":
            command.add_argument("--whole", type=lambda text: Path(text).resolve(), help="a folder of `record`")
        else:
            command.add_argument("--stages", nargs="+", choices=STAGES, default=[*STAGES])
        if name == "compare":
            command.add_argument("--rename", action="append", default=[], metavar="OLD=NEW", help="a renamed metric")
    arguments = parser.parse_args()

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    if arguments.command == "record":
        record(arguments.checkout, arguments.out, arguments.stages)
        return 0
    if arguments.command == "compare":
        new_names = dict(pair.split("=", 1) for pair in arguments.rename)
        return 0 if compare(arguments.before, arguments.after, new_names, arguments.stages) else 1
    probe(arguments.before, arguments.out), probe(arguments.after, arguments.out)
    return 0 if resume(arguments.before, arguments.after, arguments.out, arguments.whole) else 1


if __name__ == "__main__":
    sys.exit(main())
