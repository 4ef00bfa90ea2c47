"""Recomputation of cheap outputs in the backward pass instead of keeping them from the forward pass.

For every number of its hidden state a block of GPT-2 keeps 16 numbers for the backward pass. Six of them are outputs of
a norm or of the GELU, kept by the matrix product that follows. Both are cheap to compute, and their inputs are kept
anyway, so they are recomputed (as in Chen et al. 2016, arXiv:1604.06174). torch.compile does this on its own.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from rorchat.adapter import iterate_blocks

#: Elements of a hidden state (tokens x width) from which it pays off: below, the Python overhead is a tenth of a step.
MIN_RECOMPUTE_ELEMENTS = 2**20


@contextlib.contextmanager
def recompute_cheap_outputs(model: GPT2LMHeadModel) -> Iterator[None]:
    """A context in which forward passes of a stock GPT-2 do not keep the outputs of norms and of the GELU.

    Gradients are bit-identical. Under autocast a matrix product keeps its own copy of a norm's output in bf16 or
    fp16, and only the GELU's output is saved. Layers with hooks are skipped, because the hooks would run twice.

    The context has no effect if no gradient is needed, under gradient checkpointing (which keeps neither output), and
    inside other saved-tensor hooks such as `save_on_cpu` and TRL's activation offloading (which it would hide).
    """
    # torch has no public way to ask for installed hooks
    outer_hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    is_checkpointed = model.training and model.is_activation_checkpointing
    if outer_hooks is not None or not torch.is_grad_enabled() or is_checkpointed:
        yield
        return

    # A forward hook notes the latest output of a cheap layer. The next matrix product saves that tensor: `pack`
    # recognizes it by its address and keeps (layer, input) instead, from which `unpack` computes it again. The output
    # is referenced until the next one, so that no other tensor can take its address.
    output, layer, layer_input = None, None, None

    def note_output(module, arguments, result):
        nonlocal output, layer, layer_input
        if type(result) is Tensor:  # a subclass may have no storage of its own to be recognized by
            output, layer, layer_input = result, module, arguments[0].detach()

    def pack(tensor: Tensor):
        is_output = output is not None and tensor.data_ptr() == output.data_ptr() and tensor.numel() == output.numel()
        if is_output and tensor.is_contiguous() and tensor.dtype == output.dtype == layer_input.dtype:
            return layer, layer_input, tensor.shape
        # detached, because a function that saves its own result would form a reference cycle with it
        return tensor.detach(), tensor._version

    def unpack(packed) -> Tensor:
        if len(packed) == 2:
            tensor, version = packed
            if tensor._version != version:  # autograd does not make this check for tensors kept by hooks
                raise RuntimeError(f"A tensor {tuple(tensor.shape)} that the backward pass needs was changed in place.")
            return tensor
        layer, layer_input, shape = packed
        # without autocast: the output of these layers has the dtype of their input
        with torch.no_grad(), torch.autocast(layer_input.device.type, enabled=False):
            return layer.forward(layer_input).view(shape)

    cheap = [module for block in iterate_blocks(model) for module in (block.ln_1, block.ln_2, block.mlp.act)]
    handles = [
        module.register_forward_hook(note_output)
        for module in cheap
        if not module._forward_hooks and not module._forward_pre_hooks
    ]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        for handle in handles:
            handle.remove()
