"""Builds or loads a stock GPT-2 with as many embedding rows as the tokenizer has tokens.

The architecture is Transformers' `GPT2LMHeadModel`, and a saved model is a folder that any tool for GPT-2 can load.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rorchat.adapter import is_adapter, is_tied, iterate_blocks, merge_adapter, read_adapter
from rorchat.chatml import CONTROL_TOKENS, END_OF_TEXT, IM_END, PAD
from rorchat.errors import DataError, MismatchError, UsageError, did_you_mean, shorten_error
from rorchat.hub_client import explain_failed_load

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import GPT2Config, GPT2LMHeadModel

INITIALIZER_RANGE = 0.02  # standard deviation of random weights, as in GPT-2
WEIGHTS = "model.safetensors"
#: Programs pad the vocabulary to a multiple of a power of two, from 64 to, with tensor parallelism, 1,024.
PADDING_MULTIPLES = (64, 1024)


@dataclass(frozen=True)
class Shape:
    """The size of a GPT-2: layers, heads per layer, and width. The size of a head is n_embd / n_head."""

    n_layer: int
    n_head: int
    n_embd: int


#: Named by their number of parameters with GPT-2's vocabulary. Exceptions: `demo` (1M with 1,024 tokens), and `561m`,
#: which has as many parameters as nanochat's d20 (20 layers, untied head) with 65,536 tokens.
SIZES = {
    "demo": Shape(4, 4, 128),
    "51m": Shape(8, 8, 512),
    "124m": Shape(12, 12, 768),
    "355m": Shape(24, 16, 1024),
    "561m": Shape(24, 20, 1280),
    "774m": Shape(36, 20, 1280),
    "1.5b": Shape(48, 25, 1600),
}


def parse_shape(size: str) -> Shape:
    """The shape with this name, or an explicit layers x heads x width such as "6x5x160".

    Raises:
        UsageError: there is no such size, or the heads do not divide the width.
    """
    if size.lower() in SIZES:
        return SIZES[size.lower()]
    parts = size.lower().split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) for part in parts):
        raise UsageError(
            f"No model size {size!r}.{did_you_mean(size.lower(), SIZES)} Available: {', '.join(SIZES)}, or layers x "
            "heads x width as in 6x5x160."
        )
    shape = Shape(*map(int, parts))
    if shape.n_embd % shape.n_head:
        raise UsageError(f"Size {size!r}: a width of {shape.n_embd} is not divisible by {shape.n_head} heads.")
    return shape


def count_parameters(shape: Shape, vocab_size: int, n_positions: int) -> int:
    """Parameters of a stock GPT-2, with the tied language-model head counted once."""
    width = shape.n_embd
    block = 12 * width**2 + 13 * width  # four matrices with biases, two layer norms
    return (vocab_size + n_positions) * width + shape.n_layer * block + 2 * width


def count_scaling_parameters(shape: Shape, vocab_size: int) -> int:
    """The N in scaling laws and FLOP estimates: the matrices of the blocks, and the tied token embedding counted once.

    Position embeddings, biases and norms (1 % of 124M) are excluded, because no matrix product uses them.
    """
    return 12 * shape.n_layer * shape.n_embd**2 + vocab_size * shape.n_embd


def flops_per_token(shape: Shape, vocab_size: int, block_size: int) -> float:
    """Training FLOPs per token, forward and backward: 6 N + 12 L d T.

    N is `count_scaling_parameters`, L the number of layers, d the width, and T the number of tokens in a row. The
    attention term counts the whole T x T matrix although half of it is masked. This is the convention of PaLM
    (Chowdhery et al. 2022, arXiv:2204.02311, appendix B) and of nanoGPT, so MFU values are comparable. Recomputation by
    gradient checkpointing is not counted.
    """
    return 6.0 * count_scaling_parameters(shape, vocab_size) + 12.0 * shape.n_layer * shape.n_embd * block_size


def build_model(size: str, tokenizer, n_positions: int, seed: int = 0) -> "GPT2LMHeadModel":
    """Builds a stock GPT-2 with random float32 weights and without dropout.

    Args:
        size: a name in `SIZES`, or layers x heads x width.
        tokenizer: determines the vocabulary size and the special token ids.
        n_positions: the context window in tokens.
    """
    from transformers import GPT2Config, GPT2LMHeadModel, set_seed

    shape = parse_shape(size)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=n_positions,
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        n_embd=shape.n_embd,
        # A small model does not overfit a large corpus, and on a CPU dropout disables the fast attention kernel.
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=INITIALIZER_RANGE,
        bos_token_id=tokenizer.convert_tokens_to_ids(END_OF_TEXT),
        eos_token_id=tokenizer.convert_tokens_to_ids(END_OF_TEXT),
        pad_token_id=tokenizer.convert_tokens_to_ids(PAD),
    )
    set_seed(seed)
    model = GPT2LMHeadModel(config)
    _set_generation_config(model, tokenizer)
    return model


def zero_output_projections(model: "GPT2LMHeadModel") -> None:
    """Sets the output projections of attention and MLP to zero, so that every block starts as the identity.

    With Muon, whose update size is independent of the gradient, this reaches the same loss with fewer tokens (see
    docs/LOG.md).
    """
    for block in iterate_blocks(model):
        for projection in (block.attn.c_proj, block.mlp.c_proj):
            projection.weight.detach().zero_()


def load_checkpoint(name_or_path: str, tokenizer, seed: int = 0) -> "GPT2LMHeadModel":
    """Loads a GPT-2 from a folder or the Hub in float32, without dropout, and resizes its embeddings for the tokenizer.

    New embedding rows are the mean of the old rows plus noise with the standard deviation of the old rows. With
    Transformers' `mean_resizing`, the new rows differ by only 2e-6, so `<|im_start|>`, `<|im_end|>` and `<|pad|>` would
    start as the same token. The logits of the old tokens do not change. If the folder contains an adapter, the adapter
    is merged into its base model.

    Rows beyond the tokenizer's tokens, with which some programs pad the vocabulary, are dropped with a message.

    Raises:
        DataError: there is no model, its weights cannot be loaded or are not finite, or it is not a GPT-2.
        RemoteError, PermissionDenied: the Hub cannot be reached, or denies access.
        MismatchError: the tokenizer is not the model's, or the adapter belongs to another base model.
    """
    if is_adapter(name_or_path):
        adapter = read_adapter(Path(name_or_path))
        model = merge_adapter(load_checkpoint(adapter.base, tokenizer, seed), adapter)
    else:
        model = _load_stock(name_or_path, tokenizer, seed)
    _require_finite(model, name_or_path)
    return model


def _load_stock(name_or_path: str, tokenizer, seed: int) -> "GPT2LMHeadModel":
    from transformers import set_seed

    model = _load_weights(name_or_path)
    rows, tokens = model.transformer.wte.num_embeddings, len(tokenizer)
    # vocab_size counts no added tokens: GPT-2's 50,257 match the 50,257 rows of its model
    if not tokenizer.vocab_size <= rows < tokens + padding_multiple(rows):
        raise MismatchError(
            f"The model {name_or_path!r} has {rows:,} embedding rows, but the tokenizer has {tokens:,} tokens "
            f"({tokenizer.vocab_size:,} without added tokens). Give the tokenizer that the model was trained with."
        )
    set_seed(seed)
    if rows < tokens:
        _enlarge_embeddings(model, tokens)
    elif rows > tokens:
        model.resize_token_embeddings(tokens)
        if os.environ.get("RANK", "0") == "0":
            print(  # noqa: T201
                f"{name_or_path}: of its {rows:,} embedding rows, the last {rows - tokens:,} are dropped, because the "
                f"tokenizer has only {tokens:,} tokens",
                file=sys.stderr,
            )
    model.config.bos_token_id = model.config.eos_token_id = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    model.config.pad_token_id = tokenizer.convert_tokens_to_ids(PAD)
    _set_generation_config(model, tokenizer)
    return model


def padding_multiple(rows: int) -> int:
    """The largest multiple to which a vocabulary of so many rows may have been padded: it has fewer rows of padding.

    A tokenizer with fewer tokens than that is not the model's. For 50,304 rows, which are 393 x 128, it is 128.
    """
    smallest, largest = PADDING_MULTIPLES
    return max(smallest, min(largest, rows & -rows))


def _load_weights(name_or_path: str) -> "GPT2LMHeadModel":
    import torch
    from transformers import GPT2LMHeadModel

    config = _read_config(name_or_path)
    for dropout in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        setattr(config, dropout, 0.0)
    try:
        loaded: tuple[GPT2LMHeadModel, dict] = GPT2LMHeadModel.from_pretrained(  # type: ignore[assignment]
            name_or_path, config=config, dtype=torch.float32, output_loading_info=True
        )  # declared to return a model, but with `output_loading_info` it is a pair
    except Exception as error:  # OSError, SafetensorError, RuntimeError for other shapes, errors of the Hub's client
        if Path(name_or_path).is_dir():
            raise DataError(f"Cannot load the weights of {name_or_path!r}: {shorten_error(error)}") from None
        raise explain_failed_load("the weights of a model", name_or_path, error) from None
    model, info = loaded
    if info["missing_keys"]:
        raise DataError(f"{name_or_path!r} has no weights for {', '.join(sorted(info['missing_keys'])[:4])}.")
    # Transformers does not tie an embedding and a head that differ in the file, whatever the config says
    model.config.tie_word_embeddings = is_tied(model)
    return model


def _require_finite(model: "GPT2LMHeadModel", name_or_path: str) -> None:
    """Raises DataError if a weight is not finite, or if the weights are so large that predictions are not."""
    import torch

    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise DataError(
                f"The weights of {name_or_path!r} contain NaN or infinite values, first in {name}: its training has "
                "diverged, or the file is damaged. Give another model, or an earlier checkpoint."
            )
    ids = torch.tensor([[model.config.bos_token_id]])
    with torch.no_grad():
        logits = model(ids, attention_mask=torch.ones_like(ids)).logits
    if not logits.isfinite().all():
        raise DataError(
            f"The predictions of {name_or_path!r} are NaN or infinite, because its weights are too large: its training "
            "has diverged. Give another model, or an earlier checkpoint."
        )


def _read_config(name_or_path: str) -> "GPT2Config":
    from transformers import AutoConfig

    if not Path(name_or_path).is_dir() and (Path(name_or_path).exists() or name_or_path.startswith((".", "/"))):
        raise DataError(f"No model folder {name_or_path}.")
    try:
        config = AutoConfig.from_pretrained(name_or_path)
    except Exception as error:  # OSError, ValueError, or whatever a file of another form leads to
        if Path(name_or_path).is_dir():
            raise DataError(f"No model can be loaded from {name_or_path!r}: {shorten_error(error)}") from None
        raise explain_failed_load("a model", name_or_path, error) from None
    if config.model_type != "gpt2":
        raise DataError(f"{name_or_path!r} is a {config.model_type} model; rorchat needs a GPT-2 (model_type 'gpt2').")
    return config


def _enlarge_embeddings(model: "GPT2LMHeadModel", rows: int) -> None:
    import torch

    before = [matrix.detach().clone() for matrix in _vocabulary_matrices(model)]
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for old, new in zip(before, _vocabulary_matrices(model), strict=True):
            noise = torch.randn(rows - len(old), old.size(1)) * old.std(dim=0)
            new[len(old) :] = old.mean(dim=0) + noise


def _vocabulary_matrices(model: "GPT2LMHeadModel") -> "list[Tensor]":
    """The matrices with a row for each token: the embedding, and the head if it is not tied to it."""
    embedding, head = model.transformer.wte.weight, model.lm_head.weight
    return [embedding] if is_tied(model) else [embedding, head]


def _set_generation_config(model: "GPT2LMHeadModel", tokenizer) -> None:
    """Sets the defaults of `generate`: sampling, and a stop at the end of the turn, document or context window."""
    from transformers import GenerationConfig

    end_of_turn, end_of_text, pad = tokenizer.convert_tokens_to_ids([IM_END, END_OF_TEXT, PAD])
    model.generation_config = GenerationConfig(
        eos_token_id=[end_of_turn, end_of_text],
        bos_token_id=end_of_text,
        pad_token_id=pad,
        do_sample=True,
        temperature=0.6,
        top_p=0.9,
        max_length=model.config.n_positions,
    )


def check_fit(model: "GPT2LMHeadModel", tokenizer, length: int | None = None, setting: str = "block_size") -> None:
    """Raises MismatchError if the tokenizer is not the model's or `length` tokens exceed the context window."""
    rows = model.transformer.wte.num_embeddings
    if rows != len(tokenizer):
        raise MismatchError(
            f"The model has {rows:,} embedding rows, but the tokenizer has {len(tokenizer):,} tokens: use the "
            "tokenizer that was saved with the model."
        )
    outside = [token for token in CONTROL_TOKENS if not 0 <= tokenizer.convert_tokens_to_ids(token) < rows]
    if outside:
        raise MismatchError(f"The control tokens {', '.join(outside)} have no embedding row.")
    if length and length > model.config.n_positions:
        raise MismatchError(
            f"{setting} is {length}, but the model has only {model.config.n_positions} positions. "
            f"Try: --{setting} {model.config.n_positions}"
        )


def save_model(model: "GPT2LMHeadModel", tokenizer, folder: str | Path) -> None:
    """Writes a standard Transformers folder: weights, config, generation config, tokenizer and chat template."""
    tokenizer.model_max_length = model.config.n_positions
    model.config.architectures = ["GPT2LMHeadModel"]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
