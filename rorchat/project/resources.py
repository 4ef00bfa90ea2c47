"""How much memory and disk a project needs."""

import shutil
from pathlib import Path

from rorchat.model import count_parameters
from rorchat.project.schedule import Schedule, Scheduler
from rorchat.project.timing import ROWS, plan_steps
from rorchat.training.checkpointing.checkpoint import KEPT

LIBRARY_BYTES = 0.9e9  # of a process that has imported torch and Transformers and read some data
WEIGHT_BYTES, OPTIMIZER_BYTES = 4, 8  # per parameter on disk; Muon needs 4, AdamW 8
TOKEN_BYTES = 2  # in a token store


def estimate_memory(scheduler: Scheduler, schedule: Schedule) -> float:
    """The peak of a training process in bytes: the libraries and a step of pretraining."""
    shape, vocabulary = schedule.size.shape, schedule.size.vocabulary.size
    machine = scheduler.machine
    plan = plan_steps(machine.device, shape, vocabulary, machine.block_size, ROWS)
    return LIBRARY_BYTES * machine.device.is_cpu + sum(plan.memory.values())


def estimate_disk(scheduler: Scheduler, schedule: Schedule) -> float:
    """Bytes of the checkpoints, models and token stores of all stages."""
    size = schedule.size
    parameters = count_parameters(size.shape, size.vocabulary.size, scheduler.machine.block_size)
    of_stage = parameters * (KEPT * (WEIGHT_BYTES + OPTIMIZER_BYTES) + WEIGHT_BYTES)
    text = scheduler.survey.utf8_bytes("documents") / size.vocabulary.bytes_per_token
    text += scheduler.survey.utf8_bytes("conversations") / size.vocabulary.chat_bytes_per_token
    return len(scheduler.stages) * of_stage + 2 * TOKEN_BYTES * text  # stores of pretraining and of midtraining


def describe_resources(scheduler: Scheduler, schedule: Schedule, folder: Path) -> str:
    """What the project needs, and whether this machine lacks it."""
    memory, disk = estimate_memory(scheduler, schedule), estimate_disk(scheduler, schedule)
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    device = scheduler.machine.device
    text = f"Needs about {memory / 1e9:.1f} GB of memory and {disk / 1e6:,.0f} MB of disk."
    if disk > free:
        text += f" The disk has only {free / 1e6:,.0f} MB left: free some space first."
    if device.memory_bytes and memory > device.memory_bytes:
        text += f" {device.name} has only {device.memory_bytes / 1e9:.1f} GB: close other programs."
    return text
