"""Attention of full rows and of packed ones, in a stock GPT-2, without a mask.

With its own name GPT-2's attention gets a dense mask wherever positions restart: a number for every pair of tokens of
a row. Here packed sequences are attended to one by one, each by the causal kernel, or all by one kernel for
sequences of various lengths on GPUs that have it.

A packed sequence is a tree: a stem and the branches that each go on from it, blind for one another, so that a prompt is
read once for all its replies. Most have no branch.
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

CAUSAL_ATTENTION, PACKED_ATTENTION = "causal_sdpa", "packed_sdpa"  # names that Transformers builds no mask for

PrefixGroup = tuple[int, ...]  # tokens of the stem, and of each branch


def packed_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    trees: Sequence[PrefixGroup],
    dropout: float = 0.0,
    scaling: float | None = None,
    **_,
) -> tuple[Tensor, None]:
    """Causal attention within each tree, each branch seeing the stem and itself.

    Args:
        query, key, value: (B, H, T, D), rows of trees that stand one behind the other.
        trees: of all rows; B x T tokens together.

    Returns:
        (B, T, H, D), and no weights.
    """
    batch, heads, length, width = query.shape
    query, key, value = (x.transpose(1, 2).reshape(batch * length, heads, width) for x in (query, key, value))
    if _has_kernel(query) and not dropout:
        output = _by_one_kernel(query, key, value, trees, scaling)
    else:
        output = _one_by_one(query, key, value, trees, dropout, scaling)
    return output.view(batch, length, heads, width), None


def _has_kernel(query: Tensor) -> bool:
    return query.is_cuda and query.dtype != torch.float32 and torch.cuda.get_device_capability(query.device) >= (8, 0)


def _one_by_one(
    query: Tensor, key: Tensor, value: Tensor, trees: Sequence[PrefixGroup], dropout: float, scaling
) -> Tensor:
    """(N, H, D) each; N tokens of all trees."""
    sizes = [size for tree in trees for size in tree]
    # split, not slices: the gradient of a slice is as large as what it was cut from
    parts = iter(zip(*(x.split(sizes) for x in (query, key, value)), strict=True))

    def attend(*qkv: Tensor) -> Tensor:
        qkv = [x.transpose(0, 1).unsqueeze(0) for x in qkv]  # (L, H, D) -> (1, H, L, D)
        return F.scaled_dot_product_attention(*qkv, dropout_p=dropout, scale=scaling, is_causal=True)[0].transpose(0, 1)

    outputs = []
    for stem_size, *branches in trees:
        stem = next(parts)
        if not branches:
            outputs.append(attend(*stem))
        for number, _ in enumerate(branches):
            found = attend(*(torch.cat(both) for both in zip(stem, next(parts), strict=True)))
            outputs.append(found[stem_size if number else 0 :])
    return torch.cat(outputs)


def _by_one_kernel(query: Tensor, key: Tensor, value: Tensor, trees: Sequence[PrefixGroup], scaling) -> Tensor:
    index, bounds, longest = _reading(tuple(trees), query.device)
    if index is not None:
        key, value = key[index], value[index]
    # causal from the last key back, so that a branch sees its stem whole
    return varlen_attn(query, key, value, *bounds, *longest, scale=scaling, window_size=(-1, 0))


@functools.lru_cache(maxsize=1)  # every block of a micro-batch asks for the same
def _reading(trees: tuple[PrefixGroup, ...], device: torch.device) -> tuple[Tensor | None, list[Tensor], list[int]]:
    """Which keys stand ready for which queries.

    Returns:
        Where each key is found, None if in its own place, where a stem is read for several branches; the bounds of the
        queries and of their keys; the most queries and keys of one call.
    """
    read, lengths = [], []
    start = 0
    for stem, *branches in trees:
        first = stem + (branches[0] if branches else 0)
        read.append(range(start, start + first))
        lengths.append(first)
        at = start + first
        for branch in branches[1:]:
            read.append((*range(start, start + stem), *range(at, at + branch)))
            lengths.append(branch)
            at += branch
        start = at
    seen = [len(keys) for keys in read]
    bounds = [torch.tensor([0, *sizes]).cumsum(0, dtype=torch.int32).to(device) for sizes in (lengths, seen)]
    index = None if seen == lengths else torch.tensor([at for keys in read for at in keys]).to(device)
    return index, bounds, [max(lengths), max(seen)]


AttentionInterface.register(CAUSAL_ATTENTION, sdpa_attention_forward)
AttentionInterface.register(PACKED_ATTENTION, packed_attention_forward)


@contextlib.contextmanager
def _attention(config, name: str) -> Iterator[None]:
    stock, config._attn_implementation = config._attn_implementation, name
    try:
        yield
    finally:
        config._attn_implementation = stock


def causal_attention(config) -> contextlib.AbstractContextManager:
    """Attention that is causal and knows no padding to the left and no packing, for as long as the context lasts."""
    return _attention(config, CAUSAL_ATTENTION)


def packed_attention(config) -> contextlib.AbstractContextManager:
    """Attention of packed rows, whose `trees` the model is called with, for as long as the context lasts."""
    return _attention(config, PACKED_ATTENTION)


def keep_packed(model: nn.Module) -> None:
    """Lets every block of a stock GPT-2 attend to packed rows wherever it is called with `trees`.

    Gradient checkpointing calls blocks again in the backward pass, when no context lasts any more.
    """
    for block in model.transformer.h:
        if "forward" not in vars(block.attn):
            block.attn.forward = functools.partial(_by_trees, block.attn, block.attn.forward)


def needs_no_mask(model: nn.Module) -> None:
    """Keeps Transformers from looking for padding in every forward pass, to recommend a mask.

    Batches are padded on the right (rorchat/mixture/collators.py), and a causal model never looks there.
    """
    model.base_model.warn_if_padding_and_no_attention_mask = lambda *_: None


def _by_trees(attention: nn.Module, stock_forward, *args, **kwargs):
    if "trees" not in kwargs:
        return stock_forward(*args, **kwargs)
    with packed_attention(attention.config):
        return stock_forward(*args, **kwargs)
