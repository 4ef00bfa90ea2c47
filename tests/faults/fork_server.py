"""Runs recipes in forks of a process that has everything imported, with faults: lines of JSON in, lines of JSON out.

A job is {"argv": [...], "stage": "pretrain", "log": FILE, "fault": {...}}; the answer {"code": exit code or minus the
signal}. Faults work inside the run's folder alone and count operations from the moment that `during` says:

    {"kill_at": K, "during": STEP}    SIGKILL before the K-th operation of the save of a step; `torn` halves its file
    {"fail_at": K, "during": STEP, "errno": N}    that operation raises OSError instead
    {"count": FILE, "during": STEP}   writes what the operations were
    with "mirroring" instead of "during": of the copy of that step's checkpoint in the mirror
    {"signal": N, "at": STEP, "where": "forward" | "save" | "evaluate"}    a signal to the process itself
    {"fits": ROWS, "from": STEP, "in": "forward" | "backward" | "evaluate"}    there is no memory for more rows at once
        from the N-th "micro_batch" of a step on
    {"fill": FILE, "at": STEP, "leave": BYTES}    somebody else fills the disk
    {"no_rename": ERRNO}    no folder can be renamed
    {"vanish": STEP}    the mirror is gone when that step is to be copied
    {"poison": [STEPS], "value": "nan", "in": "loss" | "gradient" | "weight" | "moment"}    in one `micro_batch`, or all
    {"rows": FOLDER}    writes the ids of every micro-batch that is trained on, a file for each process
    {"off": "staging" | "state" | "watch" ...}    a protection that is switched off, see `PROTECTIONS`
"""

import builtins
import contextlib
import gc
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
from collections import Counter
from pathlib import Path

import rorchat.training.trainer as trainer_module
import safetensors.torch
import torch
import transformers.modeling_utils

import rorchat.model as model_module
from rorchat.mixture.plan import Plan
from rorchat.training import oom_recovery as memory_module
from rorchat.training import run_folder as run_module
from rorchat.training.callbacks import metrics as callbacks_module
from rorchat.training.checkpointing import trainer_mixin as resume_module
from rorchat.training.checkpointing.checkpoint import Checkpoints
from rorchat.training.checkpointing.mirror import FolderPlace, Mirror
from rorchat.training.checkpointing.trainer_mixin import CheckpointMixin
from rorchat.training.dpo import PreferenceTrainer
from rorchat.training.pretrain import PretrainTrainer
from rorchat.training.sft import ChatTrainer

ROOT = Path(__file__).resolve().parents[2]
GRACE = 2.5  # seconds that the others have when one process has ended badly
OPERATIONS = ("mkdir", "open", "fsync", "rename", "replace", "unlink", "rmdir")


class Disk:
    """Counts what is done inside a folder while it is `on`, and does the fault's part at its operation."""

    def __init__(self, folder: str, fault: dict):
        self.folder, self.fault = str(Path(folder).resolve()), fault
        self.on, self.done = False, []

    def inside(self, path) -> bool:
        try:
            return str(Path(os.fsdecode(path)).absolute()).startswith(self.folder)
        except TypeError:  # a descriptor
            return True

    def elsewhere(self) -> bool:
        """Whether what happens is not the fault's: the mirror's thread, or the others."""
        return (threading.current_thread().name == "mirror") != ("mirroring" in self.fault)

    def before(self, name: str, path) -> None:
        if not self.on or self.elsewhere():
            return
        self.done.append(f"{name} {path}")
        if len(self.done) == self.fault.get("kill_at") and not self.fault.get("torn"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault.get("always") or len(self.done) == self.fault.get("fail_at"):
            raise OSError(self.fault["errno"], os.strerror(self.fault["errno"]), str(path))

    def after(self, path) -> None:
        if not self.on or self.elsewhere():
            return
        if len(self.done) == self.fault.get("kill_at") and self.fault.get("torn"):
            if isinstance(path, (str, os.PathLike)) and os.path.isfile(path):
                os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self, owner, name: str, at: int = 0) -> None:
        real = getattr(owner, name)

        def watched(*arguments, **options):
            path = arguments[at] if len(arguments) > at else options.get("filename", options.get("path"))
            if not self.on or not (self.inside(path) or "dir_fd" in options):  # rmtree's names are relative
                return real(*arguments, **options)
            self.before(name, path)
            result = real(*arguments, **options)
            self.after(path)
            return result

        setattr(owner, name, watched)

    def install(self) -> None:
        for name in OPERATIONS:
            self.watch(os, name)
        self.watch(builtins, "open")
        self.watch(io, "open")
        self.watch(torch, "save", at=1)
        for module in (safetensors.torch, transformers.modeling_utils):
            name = "save_file" if hasattr(module, "save_file") else "safe_save_file"
            self.watch(module, name, at=1)
        if "mirroring" in self.fault:
            wait_for_copies()
            self.turn_on(FolderPlace, "put", lambda place, checkpoint, run: checkpoint.step == self.fault["mirroring"])
        else:
            at = self.fault.get("during")
            self.turn_on(CheckpointMixin, "_save_checkpoint", lambda trainer, *_: trainer.state.global_step == at)

    def turn_on(self, owner, name: str, wanted) -> None:
        real = getattr(owner, name)

        def counted(*arguments):
            self.on = self.fault.get("always") or wanted(*arguments)
            try:
                return real(*arguments)
            finally:
                self.on = False
                if "count" in self.fault and self.done:
                    Path(self.fault["count"]).write_text(json.dumps(self.done))

        setattr(owner, name, counted)


def poison(fault: dict) -> None:
    """The loss, the gradients, a weight or a number of the optimizer's becomes no number in some steps."""
    value, seen = float(fault["value"]), Counter()

    def poisoned(real, trainer, *arguments, **options):
        step = trainer.state.global_step + 1
        seen[step] += 1
        if step not in fault["poison"] or seen[step] != fault.get("micro_batch", seen[step]):
            return real(trainer, *arguments, **options)
        weight = trainer.model.transformer.h[0].mlp.c_fc.weight
        if fault["in"] == "weight":
            with torch.no_grad():
                weight[0, 0] = value
        if fault["in"] == "moment":
            moment = next(state["exp_avg"] for state in trainer.optimizer.state.values() if "exp_avg" in state)
            moment.view(-1)[0] = value
        loss = real(trainer, *arguments, **options)
        if fault["in"] == "gradient":

            def hook(gradient):
                handle.remove()
                return torch.full_like(gradient, value)

            handle = weight.register_hook(hook)
        return loss * value if fault["in"] == "loss" else loss

    for kind in (PretrainTrainer, ChatTrainer, PreferenceTrainer):
        kind.compute_loss = (lambda real: lambda *arguments, **options: poisoned(real, *arguments, **options))(
            kind.compute_loss
        )


def run_out(fault: dict) -> None:
    """A forward or backward pass over more rows than fit has no memory, from a step on."""

    def raise_it(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def limited(real, trainer, model, inputs, *arguments, **options):
        early = trainer.state.global_step + 1 < fault["from"] or trainer._reached < fault.get("micro_batch", 1)
        if early or len(inputs["input_ids"]) <= fault["fits"]:
            return real(trainer, model, inputs, *arguments, **options)
        if fault["in"] == "forward":
            raise_it()
        loss = real(trainer, model, inputs, *arguments, **options)
        # behind the head's gradient, before the first layer's
        handle = trainer.model.transformer.h[0].mlp.c_fc.weight.register_hook(lambda _: (handle.remove(), raise_it()))
        return loss

    if fault["in"] == "evaluate":
        trainer_module.compute_dataset_loss = raise_it
        return
    for kind in (PretrainTrainer, ChatTrainer, PreferenceTrainer):
        kind.compute_loss = (lambda real: lambda *arguments, **options: limited(real, *arguments, **options))(
            kind.compute_loss
        )


def with_dropout(share: float) -> None:
    """A new model drops out, which pretraining here has no setting for: it is what draws random numbers in a step."""
    real = model_module.build_model

    def build(*arguments, **options):
        model = real(*arguments, **options)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = share
        return model

    model_module.build_model = build


def raise_signal(fault: dict) -> None:
    where = {
        "forward": (trainer_module.StageTrainer, "training_step"),
        "save": (CheckpointMixin, "_write"),
        "evaluate": (trainer_module.StageTrainer, "validation_loss"),
    }
    owner, name = where[fault["where"]]
    real = getattr(owner, name)

    def sending(trainer, *arguments, **options):
        if trainer.state.global_step == fault["at"] and trainer.args.process_index == fault.get("rank", 0):
            os.kill(os.getpid(), fault["signal"])
        return real(trainer, *arguments, **options)

    setattr(owner, name, sending)


def fill(fault: dict) -> None:
    """Somebody else fills the disk before a step, but for some bytes."""
    step = trainer_module.StageTrainer.training_step

    def filling(trainer, *arguments):
        filler = Path(fault["fill"])
        if trainer.state.global_step + 1 == fault["at"] and not filler.exists():
            filler.write_bytes(bytes(shutil.disk_usage(filler.parent).free - fault["leave"]))
        return step(trainer, *arguments)

    trainer_module.StageTrainer.training_step = filling


def refuse_renames(number: int) -> None:
    """The file system renames files, and no folders."""
    real = os.rename

    def rename(source, target, **options):
        if os.path.isdir(source):
            raise OSError(number, os.strerror(number), str(source))
        real(source, target, **options)

    os.rename = rename


def wait_for_copies() -> None:
    """Training waits for each copy: steps of milliseconds would overtake it, and the next one take its place."""
    offer = Mirror.offer

    def waiting(mirror, *arguments):
        offer(mirror, *arguments)
        with mirror._changed:
            mirror._changed.wait_for(mirror._idle)

    Mirror.offer = waiting


def vanish(step: int) -> None:
    """The mirror is gone when a step is to be copied, as a drive that somebody takes away."""
    wait_for_copies()
    put = FolderPlace.put

    def gone(place, checkpoint, run):
        if checkpoint.step == step:
            shutil.rmtree(place.checkpoints.folder)
        put(place, checkpoint, run)

    FolderPlace.put = gone


def log_rows(folder: str) -> None:
    real = trainer_module.StageTrainer.training_step

    def logged(trainer, model, inputs, *arguments):
        rank, step = trainer.args.process_index, trainer.state.global_step + 1
        with open(Path(folder) / f"{rank}.jsonl", "a") as file:
            file.write(json.dumps({"step": step, "rank": rank, "ids": inputs["input_ids"].tolist()}) + "\n")
        return real(trainer, model, inputs, *arguments)

    trainer_module.StageTrainer.training_step = logged


def in_place(checkpoints: Checkpoints, step: int) -> Path:
    """As `Checkpoints.begin`, but that files are written where they stay."""
    folder = checkpoints.folder / f"checkpoint-{step}"
    folder.mkdir()
    (checkpoints.folder / ".staging").mkdir()
    (checkpoints.folder / ".staging" / folder.name).symlink_to(folder, target_is_directory=True)
    return folder


def nothing(*_, **__) -> None:
    pass


PROTECTIONS = {
    "staging": (Checkpoints, "begin", in_place),
    "state": (resume_module._State, "on_train_begin", nothing),
    "watch": (callbacks_module.Watch, "on_pre_optimizer_step", nothing),
    "disk": (resume_module, "storage_failure", lambda stage: stage() and None),
    "memory": (memory_module, "is_out_of_memory", lambda error: False),
    "lock": (run_module, "alone", lambda folder: contextlib.nullcontext()),
    "finite": (CheckpointMixin, "is_finite", lambda trainer: True),
    "identity": (run_module, "differences", lambda *_: []),
    "lost": (run_module, "is_lost_peer", lambda error: False),
    "signals": (run_module, "listening", contextlib.nullcontext),
}


def switch_off(protection: str) -> None:
    setattr(*PROTECTIONS[protection])


def install(fault: dict, argv: list[str], own_rank: bool) -> None:
    """Makes the faults that a job has; those of an operation, of memory and of numbers are one process's."""
    if "no_rename" in fault:
        refuse_renames(fault["no_rename"])
    if own_rank and fault.keys() & {"kill_at", "fail_at", "count"}:
        Disk(argv[argv.index("--mirror" if "mirroring" in fault else "--output_dir") + 1], fault).install()
    for name, make in (("poison", poison), ("fits", run_out), ("fill", fill)):
        if own_rank and name in fault:
            make(fault)
    if "signal" in fault:
        raise_signal(fault)
    for name, make in (("rows", log_rows), ("vanish", vanish), ("off", switch_off)):
        if name in fault:
            make(fault[name])


def child(job: dict) -> None:
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(job.get("environment", {}))
    fault, argv = job.get("fault") or {}, job["argv"]
    own_rank = fault.get("rank", 0) == int(os.environ.get("RANK", "0"))
    install(fault, argv, own_rank)
    if job.get("dropout"):
        with_dropout(job["dropout"])
    try:
        runpy.run_path(str(ROOT / "recipes" / f"{job['stage']}.py"))["main"](argv)
        code = 0
    except SystemExit as stopped:
        code = stopped.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 99
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_for_signals(job: dict) -> dict:
    """Tells the process that it forks, so that somebody may send it signals, and at its end what it came to."""
    if not (pid := os.fork()):
        child(job)
    print(json.dumps({"pid": pid}), flush=True)  # noqa: T201
    _, status, used = os.wait4(pid, 0)
    return {"code": os.waitstatus_to_exitcode(status), "cpu_seconds": used.ru_utime + used.ru_stime}


def run(job: dict) -> int:
    """The exit code of the process, or of the first of several that ended badly; the others are then ended, too."""
    pids = {}
    for rank, environment in enumerate(environments(job.get("processes", 1))):
        if not (pid := os.fork()):
            os.environ.update(environment)
            child(job)
        pids[pid] = rank
    codes = []
    while pids:
        pid, status = os.waitpid(-1, os.WNOHANG if any(codes) else 0)
        if pid:
            del pids[pid]
            codes.append(os.waitstatus_to_exitcode(status))
            since = time.monotonic()
        elif time.monotonic() - since > GRACE:
            for left in pids:
                os.kill(left, signal.SIGKILL)
        else:
            time.sleep(0.02)
    return next((code for code in codes if code), 0)


def environments(processes: int) -> list[dict[str, str]]:
    """What a launcher sets, for each process."""
    if processes == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def main() -> None:
    torch.set_num_threads(1)
    trainer_module.use_all_cores = lambda: None  # a fork has no threads but its own
    trainer_module.get_peak_flops = lambda precision, on_gpu: (1e12, "measured")  # which takes half a second
    Plan.draw = lambda *_: None  # a second of every run
    for stage in ("pretrain", "sft", "dpo", "grpo"):
        runpy.run_path(str(ROOT / "recipes" / f"{stage}.py"))
    gc.freeze()  # or every fork looks through all that was imported
    for line in sys.stdin:
        job = json.loads(line)
        done = run_for_signals(job) if job.get("signals") else {"code": run(job)}
        print(json.dumps(done), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
