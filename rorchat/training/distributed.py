"""Several processes: how they meet on CPUs, what may be sharded among them, and a sharded model in one piece."""

import copy
import functools
import os
from collections.abc import Callable
from datetime import timedelta

import torch
from accelerate import PartialState
from transformers import GPT2LMHeadModel

from rorchat.errors import RorchatError, UsageError

WHOLE_MATRICES = {
    "muon": "Muon needs whole matrices",
    "adamw_8bit": "8-bit AdamW keeps embeddings in 32 bits by their names, which shards have not",
}

#: What gloo says, as a RuntimeError, when it waits in vain (torch 2.13, third_party/gloo/gloo/transport).
_LOST = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Application timeout", "gloo/")


def use_gloo_on_cpu() -> None:
    """Makes several processes without a GPU one run over gloo; to be called before TrainingArguments sets up devices.

    Without it every one of them believes to be alone, and all of them write into one folder: accelerate 1.15 looks for
    a process group on CPUs only where ACCELERATE_USE_CPU is set (`PartialState._prepare_backend`), which its launcher
    sets for one process alone (`prepare_multi_gpu_env` does not).
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.cuda.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"


def sharding_strategy(arguments) -> str:
    """How the launcher or the arguments shard the model: "FSDP", "ZeRO-2", "ZeRO-3", or "" where it stays whole."""
    if arguments.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        return "FSDP"
    if arguments.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        return f"ZeRO-{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}"
    return ""


def check_sharding(arguments) -> None:
    """Raises UsageError where the run cannot be sharded as the launcher was told; nothing where it is not sharded.

    Args:
        arguments: a stage's, whose `optimizer` and `save_strategy` decide.
    """
    how = sharding_strategy(arguments)
    if not how:
        return
    if arguments.optimizer in WHOLE_MATRICES:
        raise UsageError(
            f"optimizer {arguments.optimizer} cannot be sharded by {how}: {WHOLE_MATRICES[arguments.optimizer]}. Give "
            "--optimizer adamw, or launch with recipes/accelerate/ddp.yaml, where every GPU has the whole model."
        )
    if not torch.cuda.is_available():
        # accelerate 1.15 takes FSDP for granted on GPUs alone (state.py, AcceleratorState) and trains unsharded here
        raise UsageError(
            f"{how} needs GPUs, and there is none here. To try several processes on CPUs: recipes/accelerate/cpu.yaml."
        )
    if str(getattr(arguments.save_strategy, "value", arguments.save_strategy)) != "no":
        raise UsageError(
            f"save_strategy is {arguments.save_strategy}: checkpoints of a model sharded by {how} are in pieces that "
            "nothing here verifies. Give --save_strategy no, or launch with recipes/accelerate/ddp.yaml."
        )


def run_on_main_process(task: Callable[[], object]) -> None:
    """Runs a task on the first process while the others wait; what it refuses, all refuse.

    Raises:
        RorchatError, OSError: the first process's, on every process.
    """
    failure: list[RorchatError | OSError | None] = [None]
    state = PartialState()
    if state.is_main_process:
        try:
            task()
        except (RorchatError, OSError) as error:
            failure[0] = error
    if state.num_processes > 1:
        torch.distributed.broadcast_object_list(failure, src=0, group=_over_gloo())
    if failure[0] is not None:
        raise failure[0]


def set_collective_timeout(seconds: float) -> None:
    """Bounds how long a process of the run waits for another one; all of them must call this.

    `ddp_timeout` alone does not: transformers 5.23 gives it to no group that meets over gloo, and 30 minutes are the
    default there.
    """
    if torch.distributed.is_initialized():
        for group in (torch.distributed.group.WORLD, _over_gloo()):
            torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def is_lost_peer(error: BaseException) -> bool:
    """Whether a process failed because another one is gone or does not answer."""
    said = str(error)
    return isinstance(error, torch.distributed.DistError) or any(words in said for words in _LOST)


def any_rank(*flags: bool) -> tuple[bool, ...]:
    """Each flag, true where any process has it so. All must call this, and none goes on before all have."""
    if not (torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1):
        return flags
    raised = torch.tensor(flags, dtype=torch.uint8)
    torch.distributed.all_reduce(raised, op=torch.distributed.ReduceOp.MAX, group=_over_gloo())
    return tuple(bool(flag) for flag in raised)


@functools.cache
def _over_gloo():
    """All processes, over gloo: a flag on the host need not wait for what a GPU has queued."""
    return torch.distributed.new_group(backend="gloo")


def gather_model(model) -> GPT2LMHeadModel:
    """The model with all of its weights, on every process: itself, or a copy where its weights are in shards.

    Validation reads weights outside of their modules' forward and gives processes different numbers of batches, one
    process alone samples and saves: none of this works on shards. A copy costs its weights, 0.5 GB at 124M and 6 GB at
    1.5B, for as long as it is held. Every process must call this, or those that do wait for ever.
    """
    model = getattr(model, "module", model)  # DDP's, DeepSpeed's
    weights = _gathered(model)
    if weights is None:
        return model
    with torch.device(next(iter(weights.values())).device):
        whole = GPT2LMHeadModel(copy.deepcopy(model.config))
    whole.load_state_dict(weights)
    whole.generation_config = model.generation_config
    return whole.train(model.training)


def _gathered(model) -> dict[str, torch.Tensor] | None:
    """The whole weights of a sharded model by name, None of one that is not."""
    from torch.distributed.tensor import DTensor

    parameters = list(model.parameters())
    if any(hasattr(parameter, "ds_id") for parameter in parameters):  # ZeRO-3 marks its parameters so
        from deepspeed.zero import GatheredParameters

        with GatheredParameters(parameters):
            return {name: value.detach().clone() for name, value in model.state_dict().items()}
    if not any(isinstance(parameter, DTensor) for parameter in parameters):
        return None
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in model.state_dict().items()
    }
