"""Attention without a mask in a stock GPT-2, for unpadded rows and for packed ones.

With the stock implementation, GPT-2 builds a dense mask wherever position ids restart: one number for every pair of
tokens of a row. Here each packed sequence goes through the causal kernel on its own, or all of them through one
variable-length kernel on GPUs that have it.

A packed row consists of prefix groups. A group is a prefix and its continuations: every continuation attends to the
prefix and to itself, not to the other continuations. Two replies to one prompt so share the computation of the prompt.
A plain sequence is a group without continuations.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

CAUSAL_ATTENTION, PACKED_ATTENTION = "causal_sdpa", "packed_sdpa"  # names for which Transformers builds no mask

PrefixGroup = tuple[int, ...]  # number of tokens of the prefix and of each continuation


def packed_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    prefix_groups: Sequence[PrefixGroup],
    dropout: float = 0.0,
    scaling: float | None = None,
    **_,
) -> tuple[Tensor, None]:
    """Causal attention within each prefix group.

    Args:
        query, key, value: (B, H, T, D); the groups follow each other in row-major order.
        prefix_groups: The groups of all rows, B x T tokens in total.

    Returns:
        The output (B, T, H, D), and None for the attention weights.
    """
    batch, heads, length, width = query.shape
    # (B, H, T, D) -> (N, H, D), N = B x T
    query, key, value = (x.transpose(1, 2).reshape(batch * length, heads, width) for x in (query, key, value))
    if _has_varlen_kernel(query) and not dropout:
        output = attend_by_varlen_kernel(query, key, value, prefix_groups, scaling)
    else:
        output = attend_by_sequence(query, key, value, prefix_groups, dropout, scaling)
    return output.view(batch, length, heads, width), None


def _has_varlen_kernel(query: Tensor) -> bool:
    return query.is_cuda and query.dtype != torch.float32 and torch.cuda.get_device_capability(query.device) >= (8, 0)


def attend_by_sequence(
    query: Tensor, key: Tensor, value: Tensor, prefix_groups: Sequence[PrefixGroup], dropout: float, scaling
) -> Tensor:
    """One kernel call for each prefix with one continuation: (N, H, D) each -> (N, H, D)."""
    sizes = [size for group in prefix_groups for size in group]
    # split instead of slicing: the gradient of a slice is as large as the tensor it was taken from
    parts = iter(zip(*(x.split(sizes) for x in (query, key, value)), strict=True))

    def attend(*qkv: Tensor) -> Tensor:
        qkv = [x.transpose(0, 1).unsqueeze(0) for x in qkv]  # (L, H, D) -> (1, H, L, D)
        return F.scaled_dot_product_attention(*qkv, dropout_p=dropout, scale=scaling, is_causal=True)[0].transpose(0, 1)

    outputs = []
    for prefix_size, *continuations in prefix_groups:
        prefix = next(parts)
        if not continuations:
            outputs.append(attend(*prefix))
        for number, _ in enumerate(continuations):
            output = attend(*(torch.cat(both) for both in zip(prefix, next(parts), strict=True)))
            outputs.append(output[prefix_size if number else 0 :])  # the first call returns the prefix as well
    return torch.cat(outputs)


def attend_by_varlen_kernel(
    query: Tensor, key: Tensor, value: Tensor, prefix_groups: Sequence[PrefixGroup], scaling
) -> Tensor:
    index, bounds, longest = _varlen_layout(tuple(prefix_groups), query.device)
    if index is not None:
        key, value = key[index], value[index]
    # the causal window is aligned to the last key, so a continuation attends to its whole prefix
    return varlen_attn(query, key, value, *bounds, *longest, scale=scaling, window_size=(-1, 0))


@functools.lru_cache(maxsize=1)  # every block of a micro-batch asks for the same layout
def _varlen_layout(
    prefix_groups: tuple[PrefixGroup, ...], device: torch.device
) -> tuple[Tensor | None, list[Tensor], list[int]]:
    """Which keys the kernel reads for which queries.

    The kernel takes queries and keys as sequences one after another. The first continuation forms one sequence with
    its prefix. Each further continuation is a separate sequence, whose keys are the prefix's, gathered again, and those
    of the continuation.

    Returns:
        The positions to gather keys from, None if every key is already in place; the cumulative lengths of the query
        sequences and of the key sequences; the longest query sequence and the longest key sequence.
    """
    key_positions, query_lengths = [], []
    start = 0
    for prefix, *continuations in prefix_groups:
        length = prefix + sum(continuations[:1])
        key_positions.append(range(start, start + length))
        query_lengths.append(length)
        end = start + length
        for continuation in continuations[1:]:
            key_positions.append((*range(start, start + prefix), *range(end, end + continuation)))
            query_lengths.append(continuation)
            end += continuation
        start = end
    key_lengths = [len(positions) for positions in key_positions]
    bounds = [
        torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to(device) for lengths in (query_lengths, key_lengths)
    ]
    index = None
    if key_lengths != query_lengths:
        index = torch.tensor([position for positions in key_positions for position in positions]).to(device)
    return index, bounds, [max(query_lengths), max(key_lengths)]


AttentionInterface.register(CAUSAL_ATTENTION, sdpa_attention_forward)
AttentionInterface.register(PACKED_ATTENTION, packed_attention_forward)


@contextlib.contextmanager
def _attention_implementation(config, name: str) -> Iterator[None]:
    stock, config._attn_implementation = config._attn_implementation, name
    try:
        yield
    finally:
        config._attn_implementation = stock


def causal_attention(config) -> contextlib.AbstractContextManager:
    """A context in which attention is causal and builds no mask: for rows without left padding and without packing."""
    return _attention_implementation(config, CAUSAL_ATTENTION)


def packed_attention(config) -> contextlib.AbstractContextManager:
    """A context in which the model attends to packed rows and is called with their `prefix_groups`."""
    return _attention_implementation(config, PACKED_ATTENTION)


def patch_packed_attention(model: nn.Module) -> None:
    """Make every block of a stock GPT-2 use packed attention when it is called with `prefix_groups`.

    The context manager alone is not enough: gradient checkpointing calls blocks again in the backward pass, after the
    context has ended.
    """
    for block in model.transformer.h:
        if "forward" not in vars(block.attn):
            block.attn.forward = functools.partial(_forward_with_groups, block.attn, block.attn.forward)


def _forward_with_groups(attention: nn.Module, stock_forward, *args, **kwargs):
    if "prefix_groups" not in kwargs:
        return stock_forward(*args, **kwargs)
    with packed_attention(attention.config):
        return stock_forward(*args, **kwargs)


def skip_padding_warning(model: nn.Module) -> None:
    """Keep Transformers from searching every batch for padding in order to recommend an attention mask.

    Batches are padded on the right (rorchat/mixture/collators.py), where a causal model does not look.
    """
    model.base_model.warn_if_padding_and_no_attention_mask = lambda *_: None
