"""Run by tests/recipes/test_accelerate.py under torchrun: FSDP2 over gloo on CPUs, wrapped as Accelerate does it.

Accelerate shards on GPUs only, but the functions that it calls also work on CPUs, so that the fused head and
`gather_model` can be tested with real shards. Prints the largest relative differences from an unsharded model as JSON.
"""

import copy
import json
import os
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed.tensor import DTensor
from transformers import GPT2Config, GPT2LMHeadModel

from rorchat.training.callbacks.divergence import DivergenceCallback
from rorchat.training.callbacks.metrics import MetricsCallback
from rorchat.training.distributed import gather_model
from rorchat.training.kernels.lm_head_loss import patch_lm_head_loss

STOCK = {
    "vocab_size": 384, "n_positions": 64, "n_layer": 2, "n_head": 2, "n_embd": 32, "resid_pdrop": 0.0,
    "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm of the difference, relative to the norm of `b`."""
    return ((a - b).norm() / b.norm()).item()


def main() -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    stock = GPT2LMHeadModel(GPT2Config(**STOCK))
    model = copy.deepcopy(stock)
    patch_lm_head_loss(model)
    plugin = FullyShardedDataParallelPlugin(  # as in recipes/accelerate/fsdp.yaml
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["GPT2Block"],
        reshard_after_forward=True, state_dict_type="FULL_STATE_DICT",
    )  # fmt: skip
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="no", is_main_process=not rank,
        torch_device_mesh=None, device=torch.device("cpu"),
    )  # fmt: skip
    model = fsdp2_prepare_model(accelerator, model)
    sharded = sum(isinstance(parameter, DTensor) for parameter in model.parameters())

    rows = torch.randint(0, 384, (2 * world, 64), generator=torch.Generator().manual_seed(1))
    local_rows = rows[2 * rank : 2 * rank + 2]
    loss = model(input_ids=local_rows, labels=local_rows).loss
    loss.backward()
    expected = stock(input_ids=rows, labels=rows).loss
    expected.backward()
    dist.all_reduce(loss := loss.detach().clone())
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    divergence = DivergenceCallback(MetricsCallback(Path(os.devnull), lambda step: step))
    divergence.record_loss(1, loss)
    divergence.record_grad_norm(norm)
    local_norm = divergence.grad_norm  # a plain tensor on every process
    expected_norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in stock.parameters()])
    gradients = [
        distance(parameter.grad.full_tensor(), other.grad)
        for (_, parameter), (_, other) in zip(model.named_parameters(), stock.named_parameters(), strict=True)
    ]
    whole = gather_model(model).eval()
    with torch.no_grad():
        logits = distance(whole(input_ids=local_rows).logits, stock.eval()(input_ids=local_rows).logits)
    if rank == 0:
        report = {
            "loss": distance(loss / world, expected),
            "gradients": max(gradients),
            "logits": logits,
            "norm": -1.0 if isinstance(local_norm, DTensor) else distance(local_norm, expected_norm),
            "sharded": sharded,
            "parameters": len(gradients),
            "type": type(whole).__name__,
        }
        print(json.dumps(report))  # noqa: T201
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
