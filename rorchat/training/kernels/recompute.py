"""Cheap outputs computed again in the backward pass, in place of being kept from the forward pass.

Of the 16 numbers that a block of GPT-2 keeps for every number of its hidden state, six are outputs of a norm or of the
GELU that the matrix product behind them keeps for its gradient. Both are elementwise and their inputs are kept anyway
(Chen et al. 2016, arXiv:1604.06174, drop the results of low-cost operations in the same way). torch.compile does this
by itself.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

#: Numbers of a hidden state (tokens x width) from which it pays: below, Python's part in it is a tenth of a step.
WORTHWHILE = 2**20


@contextlib.contextmanager
def cheap_outputs_computed_again(model: nn.Module) -> Iterator[None]:
    """Forward passes of a stock GPT-2 in this context keep no output of a norm before a product, and of no GELU.

    The gradients are the same to the bit. Under autocast a product keeps its own copy of a norm's output in bf16 or
    fp16, and only the GELU's is spared. Where no gradient is wanted, where gradient checkpointing keeps neither, or
    where others decide already what is kept (`torch.autograd.graph.save_on_cpu`, TRL's activation offloading), which
    this would hide, the context does nothing; nor to a layer with hooks, which would run twice.
    """
    # torch has no public way to ask
    others = torch._C._autograd._top_saved_tensors_default_hooks(False)
    if others is not None or not torch.is_grad_enabled() or _is_checkpointed(model):
        yield
        return
    # The latest output, which the module behind takes at once. Held, so that no other tensor can come to lie there.
    output, module, given = None, None, None

    def note(made_by, arguments, made):
        nonlocal output, module, given
        if type(made) is Tensor:  # a subclass may have no memory of its own to tell it by
            output, module, given = made, made_by, arguments[0].detach()

    def pack(tensor: Tensor):
        is_output = output is not None and tensor.data_ptr() == output.data_ptr() and tensor.numel() == output.numel()
        if is_output and tensor.is_contiguous() and tensor.dtype == output.dtype == given.dtype:
            return module, given, tensor.shape
        # the tensor itself would be a cycle of references, where a function keeps its result
        return tensor.detach(), tensor._version

    def unpack(kept) -> Tensor:
        if len(kept) == 2:
            tensor, version = kept
            if tensor._version != version:  # autograd's own check does not see what hooks keep
                raise RuntimeError(f"A tensor {tuple(tensor.shape)} that the backward pass needs was changed in place.")
            return tensor
        module, given, shape = kept
        with torch.no_grad(), torch.autocast(given.device.type, enabled=False):  # its output has its input's type
            return module.forward(given).view(shape)

    layers = [layer for block in model.transformer.h for layer in (block.ln_1, block.ln_2, block.mlp.act)]
    bare = [layer for layer in layers if not layer._forward_hooks and not layer._forward_pre_hooks]
    handles = [layer.register_forward_hook(note) for layer in bare]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _is_checkpointed(model: nn.Module) -> bool:
    return model.training and model.is_activation_checkpointing
