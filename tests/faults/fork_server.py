"""Runs recipes with injected faults in forks of a process that has imported everything (itself a fork, preloaded.py).

One JSON job per line on stdin, one JSON answer per line on stdout. A job has these keys:

    argv, stage, log    command line, recipe ("pretrain" by default), file for stdout and stderr
    processes           number of ranks; the environment variables of a launcher are set
    dropout             dropout of new models (pretraining has no setting for it, but it draws random numbers)
    signals             answer {"pid": ...} first, so that the test can send signals
    launcher            like "signals", but the process is a launcher: it starts the ranks, waits for them and passes no
                        signal on
    fault               what goes wrong; faults with a "rank" affect that process only, by default the first

The answer is {"code": exit code, or minus the signal that killed the process}. The faults:

    {"kill_at": N, "during": STEP}    SIGKILL before the N-th file operation in the run's folder while that step is
                                      saved; with "torn", after it and with half of its file
    {"fail_at": N, "during": STEP, "errno": E}    the operation raises OSError; with "always", every operation does
    {"count": FILE, "during": STEP}   write the list of operations to FILE
    {"snapshots": FOLDER, "during": STEP}    copy the run's folder before the N-th operation to FOLDER/N
    {"fail_in_turn": [N, ...], "copies": FOLDER, "errno": E, "during": null}    an operation of every second save
                                      raises OSError, from that of step 5 on: the next N each time; FOLDER gets a
                                      copy of the run's folder after each, named after the step
    "mirroring": STEP in place of "during"    count while that step's checkpoint is copied to the mirror
    {"signal": S, "at": STEP, "where": "forward" | "save" | "evaluate"}    the process sends itself a signal
    {"fits": ROWS, "from": STEP, "in": "forward" | "backward" | "evaluate"}    more rows run out of memory; with
                                      "micro_batch": N, from the N-th micro-batch of a step on
    {"poison": [STEPS], "value": "nan" | "inf", "in": "loss" | "gradient" | "weight" | "moment"}    non-finite values;
                                      with "micro_batch": N, in that micro-batch only
    {"fill": FILE, "at": STEP, "leave": BYTES}    another program fills the disk
    {"no_rename": ERRNO}              folders cannot be renamed
    {"vanish": STEP}                  the mirror disappears when that step is about to be copied
    {"rows": FOLDER}                  write the ids of every trained micro-batch, one file per process
    {"off": NAME}                     a protection from PROTECTIONS is switched off
"""

import builtins
import contextlib
import ctypes
import gc
import importlib
import io
import json
import os
import runpy
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
import transformers.modeling_utils

import rorchat.model as model_module
from rorchat.errors import exits_with_one_line
from rorchat.mixture.plan import Plan
from rorchat.training import oom_recovery, run_folder, stage
from rorchat.training import train_and_save as run_module
from rorchat.training.callbacks import signals
from rorchat.training.callbacks.divergence import DivergenceCallback
from rorchat.training.checkpointing import resume_plan, trainer_mixin
from rorchat.training.checkpointing.mirror import FolderStorage, Mirror
from rorchat.training.checkpointing.recovery import Checkpoints
from rorchat.training.checkpointing.trainer_mixin import CheckpointMixin
from rorchat.training.dpo import ChatDPOTrainer
from rorchat.training.pretrain import PretrainTrainer
from rorchat.training.sft import ChatSFTTrainer
from rorchat.training.stage import StageTrainer

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("pretrain", "sft", "dpo", "grpo")
TRAINERS = (PretrainTrainer, ChatSFTTrainer, ChatDPOTrainer)
GRACE_SECONDS = 2.5  # until the other ranks are killed after one has failed
SET_CHILD_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of prctl(2): orphans become children of this process
OPERATIONS = ("mkdir", "open", "fsync", "rename", "replace", "unlink", "rmdir")


def wrap(owner: object, name: str, wrapper: Callable) -> None:
    """Replace ``owner.name`` by a function that calls ``wrapper(original, *args, **kwargs)``."""
    original = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: wrapper(original, *args, **kwargs))


class FileOperations:
    """Counts the file operations inside a folder while it is active, and kills or fails at one of them."""

    def __init__(self, folder: str, fault: dict):
        self.folder, self.fault = str(Path(folder).resolve()), fault
        self.active, self.operations = False, []

    def install(self) -> None:
        for name in OPERATIONS:
            self.watch(os, name)
        self.watch(builtins, "open")
        self.watch(io, "open")
        self.watch(torch, "save", path_index=1)
        self.watch(safetensors.torch, "save_file", path_index=1)
        self.watch(transformers.modeling_utils, "safe_save_file", path_index=1)
        if "mirroring" in self.fault:
            wait_for_copies()
            self.activate_in(FolderStorage, "upload", lambda storage, checkpoint, run: checkpoint.step)
        else:
            self.activate_in(CheckpointMixin, "_save_checkpoint", lambda trainer, *_: trainer.state.global_step)

    def watch(self, owner: object, name: str, path_index: int = 0) -> None:
        def watched(original, *args, **kwargs):
            path = args[path_index] if len(args) > path_index else kwargs.get("filename", kwargs.get("path"))
            # names in rmtree are relative to a dir_fd
            if not self.active or self.is_other_thread() or not (self.contains(path) or "dir_fd" in kwargs):
                return original(*args, **kwargs)
            self.operations.append(f"{name} {path}")
            fault, number = self.fault, len(self.operations)
            if "snapshots" in fault:
                self.copy_folder(Path(fault["snapshots"]) / str(number))
            if fault.get("always") or number == fault.get("fail_at"):
                raise OSError(fault["errno"], os.strerror(fault["errno"]), str(path))
            if number != fault.get("kill_at"):
                return original(*args, **kwargs)
            if fault.get("torn"):
                original(*args, **kwargs)
                if isinstance(path, (str, os.PathLike)) and os.path.isfile(path):
                    os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

        wrap(owner, name, watched)

    def copy_folder(self, target: Path) -> None:
        active, self.active = self.active, False
        shutil.copytree(self.folder, target)
        self.active = active

    def contains(self, path) -> bool:
        try:
            return str(Path(os.fsdecode(path)).absolute()).startswith(self.folder)
        except TypeError:  # a file descriptor
            return True

    def is_other_thread(self) -> bool:
        """Copies to the mirror run in a thread; a fault hits either that thread or the rest."""
        return (threading.current_thread().name == "mirror") != ("mirroring" in self.fault)

    def activate_in(self, owner: type, name: str, find_step: Callable[..., int]) -> None:
        in_turn, wanted = self.fault.get("fail_in_turn", []), self.fault.get("mirroring", self.fault.get("during"))
        turns = dict(zip(range(5, 5 + 2 * len(in_turn), 2), in_turn, strict=True))

        def activated(original, *args):
            step = find_step(*args)
            self.active = self.fault.get("always") or step == wanted or step in turns
            if step in turns:
                self.operations, self.fault["fail_at"] = [], turns[step]
            try:
                return original(*args)
            finally:
                self.active = False
                if step in turns and len(self.operations) >= turns[step]:
                    self.copy_folder(Path(self.fault["copies"]) / str(step))
                if "count" in self.fault and self.operations:
                    Path(self.fault["count"]).write_text(json.dumps(self.operations), encoding="utf-8")

        wrap(owner, name, activated)


def poison(fault: dict) -> None:
    """Make the loss, a gradient, a weight or a moment of the optimizer non-finite."""
    value, micro_batches = float(fault["value"]), Counter()

    def poisoned(original, trainer, *args, **kwargs):
        step = trainer.state.global_step + 1
        micro_batches[step] += 1
        if step not in fault["poison"] or micro_batches[step] != fault.get("micro_batch", micro_batches[step]):
            return original(trainer, *args, **kwargs)
        weight = trainer.model.transformer.h[0].mlp.c_fc.weight
        if fault["in"] == "weight":
            with torch.no_grad():
                weight[0, 0] = value
        if fault["in"] == "moment":
            moment = next(state["exp_avg"] for state in trainer.optimizer.state.values() if "exp_avg" in state)
            moment.view(-1)[0] = value
        loss = original(trainer, *args, **kwargs)
        if fault["in"] == "gradient":
            handle = weight.register_hook(lambda gradient: handle.remove() or torch.full_like(gradient, value))
        return loss * value if fault["in"] == "loss" else loss

    for trainer_class in TRAINERS:
        wrap(trainer_class, "compute_loss", poisoned)


def run_out_of_memory(fault: dict) -> None:
    """Raise OutOfMemoryError for micro-batches with more rows than fit."""

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    if fault["in"] == "evaluate":
        stage.compute_dataset_loss = fail
        return
    micro_batches = Counter()

    def counted(original, trainer, *args):
        micro_batches[trainer.state.global_step] += 1
        return original(trainer, *args)

    def limited(original, trainer, model, inputs, *args, **kwargs):
        step = trainer.state.global_step
        is_early = step + 1 < fault["from"] or micro_batches[step] < fault.get("micro_batch", 1)
        if is_early or len(inputs["input_ids"]) <= fault["fits"]:
            return original(trainer, model, inputs, *args, **kwargs)
        if fault["in"] == "forward":
            fail()
        loss = original(trainer, model, inputs, *args, **kwargs)
        # in the backward pass, after the gradient of the head and before that of the first layer
        handle = trainer.model.transformer.h[0].mlp.c_fc.weight.register_hook(lambda _: (handle.remove(), fail()))
        return loss

    wrap(StageTrainer, "training_step", counted)
    for trainer_class in TRAINERS:
        wrap(trainer_class, "compute_loss", limited)


def add_dropout(probability: float) -> None:
    def build(original, *args, **kwargs):
        model = original(*args, **kwargs)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = probability
        return model

    wrap(model_module, "build_model", build)


def send_signal(fault: dict) -> None:
    owner, name = {
        "forward": (StageTrainer, "training_step"),
        "save": (CheckpointMixin, "_write_checkpoint"),
        "evaluate": (StageTrainer, "loss_on"),
    }[fault["where"]]

    def sending(original, trainer, *args, **kwargs):
        if trainer.state.global_step == fault["at"] and trainer.args.process_index == fault.get("rank", 0):
            os.kill(os.getpid(), fault["signal"])
        return original(trainer, *args, **kwargs)

    wrap(owner, name, sending)


def fill_disk(fault: dict) -> None:
    def filling(original, trainer, *args):
        filler = Path(fault["fill"])
        if trainer.state.global_step + 1 == fault["at"] and not filler.exists():
            filler.write_bytes(bytes(shutil.disk_usage(filler.parent).free - fault["leave"]))
        return original(trainer, *args)

    wrap(StageTrainer, "training_step", filling)


def refuse_folder_renames(number: int) -> None:
    def rename(original, source, target, **kwargs):
        if os.path.isdir(source):
            raise OSError(number, os.strerror(number), str(source))
        original(source, target, **kwargs)

    wrap(os, "rename", rename)


def wait_for_copies() -> None:
    """Let training wait for each copy; otherwise its short steps would overtake the copies, which then skip some."""

    def waiting(original, mirror, *args):
        original(mirror, *args)
        with mirror._changed:
            mirror._changed.wait_for(mirror._is_idle)

    wrap(Mirror, "offer", waiting)


def remove_mirror(step: int) -> None:
    def upload(original, storage, checkpoint, run):
        if checkpoint.step == step:
            shutil.rmtree(storage.checkpoints.folder)
        original(storage, checkpoint, run)

    wait_for_copies()
    wrap(FolderStorage, "upload", upload)


def log_rows(folder: str) -> None:
    def logged(original, trainer, model, inputs, *args):
        rank, step = trainer.args.process_index, trainer.state.global_step + 1
        with open(Path(folder) / f"{rank}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "rank": rank, "ids": inputs["input_ids"].tolist()}) + "\n")
        return original(trainer, model, inputs, *args)

    wrap(StageTrainer, "training_step", logged)


def begin_in_place(checkpoints: Checkpoints, step: int) -> Path:
    """Like `Checkpoints.begin`, but files are written directly into the final folder."""
    folder = checkpoints.folder / f"checkpoint-{step}"
    folder.mkdir()
    (checkpoints.folder / ".staging").mkdir()
    (checkpoints.folder / ".staging" / folder.name).symlink_to(folder, target_is_directory=True)
    return folder


#: (owner, attribute, harmless replacement) of each protection that "off" can switch off.
PROTECTIONS = {
    "staging": (Checkpoints, "begin", begin_in_place),
    "trainer state": (trainer_mixin._RestoreCallback, "on_train_begin", lambda *_, **__: None),
    "divergence": (DivergenceCallback, "on_pre_optimizer_step", lambda *_, **__: None),
    "storage failure": (trainer_mixin, "find_storage_failure", lambda save: save() and None),
    "oom recovery": (oom_recovery, "is_out_of_memory", lambda error: False),
    "folder lock": (run_folder, "folder_lock", lambda folder: contextlib.nullcontext()),
    "finite check": (CheckpointMixin, "is_finite", lambda trainer: True),
    "fingerprint": (resume_plan, "compare_metadata", lambda *_, **__: []),
    "lost peer": (run_module, "is_lost_peer", lambda error: False),
    "signals": (run_folder, "handle_signals", contextlib.nullcontext),
}


def install(fault: dict, argv: list[str]) -> None:
    is_affected = fault.get("rank", 0) == int(os.environ.get("RANK", "0"))
    if "no_rename" in fault:
        refuse_folder_renames(fault["no_rename"])
    if is_affected and fault.keys() & {"kill_at", "fail_at", "fail_in_turn", "count", "snapshots"}:
        flag = "--mirror" if "mirroring" in fault else "--output_dir"
        FileOperations(argv[argv.index(flag) + 1], fault).install()
    for name, install_fault in (("poison", poison), ("fits", run_out_of_memory), ("fill", fill_disk)):
        if is_affected and name in fault:
            install_fault(fault)
    if "signal" in fault:
        send_signal(fault)
    if "rows" in fault:
        log_rows(fault["rows"])
    if "vanish" in fault:
        remove_mirror(fault["vanish"])
    if "off" in fault:
        setattr(*PROTECTIONS[fault["off"]])


def run_recipe(job: dict) -> None:
    """The forked process: redirect its output, install the fault, run the recipe, exit with its code."""
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    install(job.get("fault") or {}, job["argv"])
    if job.get("dropout"):
        add_dropout(job["dropout"])
    try:
        recipe = runpy.run_path(str(ROOT / "recipes" / f"{job.get('stage', 'pretrain')}.py"))
        exits_with_one_line(recipe["main"])(job["argv"])
        code = 0
    except SystemExit as exit_request:
        code = exit_request.code or 0
    except KeyboardInterrupt:
        code = 130  # before `main` has begun, which handles it
    except BaseException:
        traceback.print_exc()
        code = 99
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_for_signals(job: dict) -> dict:
    """Answer with the process id at once, and return exit code and CPU time at the end."""
    if not (pid := os.fork()):
        run_recipe(job)
    print(json.dumps({"pid": pid}), flush=True)  # noqa: T201
    _, status, usage = os.wait4(pid, 0)
    return {"code": os.waitstatus_to_exitcode(status), "cpu_seconds": usage.ru_utime + usage.ru_stime}


def run_below_launcher(job: dict) -> dict:
    """Answer with the id of a launcher at once, and at the end with the exit codes of its ranks, which outlive it."""
    ctypes.CDLL(None).prctl(SET_CHILD_SUBREAPER, 1)
    if not (launcher := os.fork()):
        signals.find_waiting_parent = os.getppid
        run(job)
        os._exit(0)
    print(json.dumps({"pid": launcher}), flush=True)  # noqa: T201
    os.waitpid(launcher, 0)
    codes = []
    with contextlib.suppress(ChildProcessError):  # no rank is left: they ended before the launcher
        while len(codes) < job.get("processes", 1):
            codes.append(os.waitstatus_to_exitcode(os.waitpid(-1, 0)[1]))
    ctypes.CDLL(None).prctl(SET_CHILD_SUBREAPER, 0)
    return {"codes": codes}


def run(job: dict) -> int:
    """Exit code of the process, or of the first rank that failed; the other ranks are killed after a grace period."""
    pids = set()
    for environment in launcher_environments(job.get("processes", 1)):
        if not (pid := os.fork()):
            os.environ.update(environment)
            run_recipe(job)
        pids.add(pid)
    codes = []
    while pids:
        pid, status = os.waitpid(-1, os.WNOHANG if any(codes) else 0)
        if pid:
            pids.remove(pid)
            codes.append(os.waitstatus_to_exitcode(status))
            last_exit = time.monotonic()
        elif time.monotonic() - last_exit > GRACE_SECONDS:
            for remaining in pids:
                os.kill(remaining, signal.SIGKILL)
        else:
            time.sleep(0.02)
    return next((code for code in codes if code), 0)


def launcher_environments(processes: int) -> list[dict[str, str]]:
    """The environment variables that a launcher sets for each process."""
    if processes == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def main() -> None:
    stage.get_peak_flops = lambda precision, on_gpu: (1e12, "measured")  # measuring takes 0.5 s
    Plan.draw = lambda *_: None  # drawing takes 1 s
    for name in STAGES:  # imports what the recipes import
        runpy.run_path(str(ROOT / "recipes" / f"{name}.py"))
    importlib.import_module("rorchat.sources.tinytown")  # imported when first used
    gc.freeze()  # so that the garbage collector of a fork does not traverse all imported modules
    for line in sys.stdin:
        job = json.loads(line)
        if job.get("launcher"):
            answer = run_below_launcher(job)
        else:
            answer = run_for_signals(job) if job.get("signals") else {"code": run(job)}
        print(json.dumps(answer), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
