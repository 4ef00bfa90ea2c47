"""Several processes: process groups on CPUs, sharding, and calls that all processes make together."""

import copy
import functools
import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from transformers import GPT2LMHeadModel

from rorchat.errors import RorchatError, UsageError

Result = TypeVar("Result")
WHOLE_MATRICES = {
    "muon": "Muon needs whole matrices",
    "adamw_8bit": "8-bit AdamW identifies embeddings by their names, which shards do not have",
}

#: Parts of gloo's RuntimeErrors when a peer is lost (torch 2.13, third_party/gloo/gloo/transport).
_LOST_PEER_MESSAGES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Timed out waiting",
    "Application timeout",
    "gloo/",
)


def use_gloo_on_cpu() -> None:
    """Connects several processes on CPUs over gloo. Call it before TrainingArguments initializes devices.

    accelerate 1.15 creates a process group on CPUs only if ACCELERATE_USE_CPU is set (`PartialState._prepare_backend`),
    and its launcher sets that for a single process only (`prepare_multi_gpu_env` does not). Without a group, every
    process would behave as the only one, and all would write into the same folder.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os.environ["ACCELERATE_USE_CPU"] = "true"


def sharding_strategy() -> str:
    """How the launcher shards the model: "FSDP", "ZeRO-2", "ZeRO-3", or "" for not at all."""
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        return "FSDP"
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        return f"ZeRO-{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}"
    return ""


def check_sharding(arguments) -> None:
    """Raises UsageError if the optimizer, the device or the save strategy does not support the sharding."""
    strategy = sharding_strategy()
    if not strategy:
        return
    if arguments.optimizer in WHOLE_MATRICES:
        raise UsageError(
            f"optimizer {arguments.optimizer} cannot be sharded by {strategy}: {WHOLE_MATRICES[arguments.optimizer]}. "
            "Give --optimizer adamw, or launch with --accelerate_config ddp, where every GPU has the whole model."
        )
    if not torch.cuda.is_available():
        # accelerate 1.15 enables FSDP on GPUs only (state.py, AcceleratorState), and would train without sharding
        raise UsageError(
            f"{strategy} needs GPUs, and there is none. To try several processes on CPUs: --accelerate_config cpu."
        )
    if str(getattr(arguments.save_strategy, "value", arguments.save_strategy)) != "no":
        raise UsageError(
            f"save_strategy is {arguments.save_strategy}: checkpoints of a model sharded by {strategy} are in pieces "
            "that cannot be verified. Give --save_strategy no, or launch with --accelerate_config ddp."
        )


def run_on_main_process(task: Callable[[], Result]) -> Result:
    """Runs a task on the main process while the others wait. Returns its result on every process.

    Raises:
        RorchatError, OSError: of the task, on every process.
    """
    outcome: list = [None, None]  # error, result
    state = PartialState()
    if state.is_main_process:
        try:
            outcome[1] = task()
        except (RorchatError, OSError) as error:
            outcome[0] = error
    if state.num_processes > 1:
        torch.distributed.broadcast_object_list(outcome, src=0, group=_gloo_group())
    if outcome[0] is not None:
        raise outcome[0]
    return outcome[1]


def set_collective_timeout(seconds: float) -> None:
    """Limits how long a process waits for another one. Every process must call this.

    transformers 5.23 does not apply `ddp_timeout` to gloo groups, whose default is 30 minutes.
    """
    if torch.distributed.is_initialized():
        for group in (torch.distributed.group.WORLD, _gloo_group()):
            torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error means that another process has died or does not respond."""
    message = str(error)
    return isinstance(error, torch.distributed.DistError) or any(words in message for words in _LOST_PEER_MESSAGES)


def any_rank(*flags: bool) -> tuple[bool, ...]:
    """Each flag, True if it is True on any process. Every process must call this, and waits for the others."""
    if not (torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1):
        return flags
    raised = torch.tensor(flags, dtype=torch.uint8)
    torch.distributed.all_reduce(raised, op=torch.distributed.ReduceOp.MAX, group=_gloo_group())
    return tuple(bool(flag) for flag in raised)


@functools.cache
def _gloo_group():
    """A gloo group of all processes: exchanging flags on the host does not wait for the work queued on a GPU."""
    return torch.distributed.new_group(backend="gloo")


def gather_model(model) -> GPT2LMHeadModel:
    """The model with all of its weights on every process: itself, or a copy if its weights are sharded.

    Validation reads weights outside of their modules and has a different number of batches on each process, and one
    process alone generates samples and saves; none of this works on shards. A copy takes the memory of the weights,
    0.5 GB at 124M parameters and 6 GB at 1.5B. Every process must call this.
    """
    model = getattr(model, "module", model)  # the wrapper of DDP or DeepSpeed
    weights = _gather_weights(model)
    if weights is None:
        return model
    with torch.device(next(iter(weights.values())).device):
        gathered = GPT2LMHeadModel(copy.deepcopy(model.config))
    gathered.load_state_dict(weights)
    gathered.generation_config = model.generation_config
    return gathered.train(model.training)


def _gather_weights(model) -> dict[str, torch.Tensor] | None:
    """The full weights of a sharded model by name; None for a model that is not sharded."""
    from torch.distributed.tensor import DTensor

    parameters = list(model.parameters())
    if any(hasattr(parameter, "ds_id") for parameter in parameters):  # ZeRO-3
        from deepspeed.zero import GatheredParameters

        with GatheredParameters(parameters):
            return {name: value.detach().clone() for name, value in model.state_dict().items()}
    if not any(isinstance(parameter, DTensor) for parameter in parameters):
        return None
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in model.state_dict().items()
    }
