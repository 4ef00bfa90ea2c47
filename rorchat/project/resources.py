"""How much memory and disk a project needs."""

import shutil
from pathlib import Path

from rorchat.model import count_parameters
from rorchat.plan import cost
from rorchat.project.schedule import Schedule, Scheduler
from rorchat.project.timing import ROWS, request_steps
from rorchat.training.checkpointing.checkpoint import KEPT

WEIGHT_BYTES, OPTIMIZER_BYTES = 4, 8  # per parameter on disk; Muon needs 4, AdamW 8
TOKEN_BYTES = 2  # in a token store


def estimate_memory(scheduler: Scheduler, schedule: Schedule) -> float:
    """The peak of a training process in bytes, in a step of ROWS rows."""
    shape, vocabulary = schedule.size.shape, schedule.size.vocabulary.size
    machine, optimizer = scheduler.machine, scheduler.optimizer
    request = request_steps(machine.device, shape, vocabulary, machine.block_size, optimizer=optimizer)
    return sum(cost.estimate_memory(request.setup, shape, ROWS).values())


def estimate_disk(scheduler: Scheduler, schedule: Schedule) -> float:
    """Bytes of the checkpoints, models and token stores of all stages."""
    size = schedule.size
    parameters = count_parameters(size.shape, size.vocabulary.size, scheduler.machine.block_size)
    of_stage = parameters * (KEPT * (WEIGHT_BYTES + OPTIMIZER_BYTES) + WEIGHT_BYTES)
    tokens = sum(scheduler.count_tokens(group, size.vocabulary) for group in ("documents", "conversations", "persona"))
    return len(scheduler.stages) * of_stage + 2 * TOKEN_BYTES * tokens  # stores of pretraining and of midtraining


def describe_resources(scheduler: Scheduler, schedule: Schedule, folder: Path) -> str:
    """What the project needs, and whether this machine lacks it."""
    memory, disk = estimate_memory(scheduler, schedule), estimate_disk(scheduler, schedule)
    text = f"The project needs about {memory / 1e9:.1f} GB of memory and {disk / 1e6:,.0f} MB of disk."
    device, free = scheduler.machine.device, _free_bytes(folder)
    if disk > free:
        text += f" The disk has only {free / 1e6:,.0f} MB left: free some space first."
    if device.memory_bytes and memory > device.memory_bytes:
        text += (
            f" {device.name} has only {device.memory_bytes / 1e9:.1f} GB in all: give fewer --hours, so that a smaller "
            "model is planned."
        )
    return text


def _free_bytes(folder: Path) -> int:
    """Free space where a folder, which need not exist yet, will be."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free
