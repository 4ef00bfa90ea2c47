"""LoRA: the model stays as it is, small matrices beside its own learn, and so do the rows of the control tokens.

Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685) in PEFT's layers, put into a GPT2LMHeadModel that remains one:
what trains, generates and evaluates sees no other class. Checkpoints are adapters in PEFT's form, and the result is the
stock model with the adapter merged into it. QLoRA (Dettmers et al. 2023, arXiv:2305.14314) holds the frozen matrices in
4 bits.
"""

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from rorchat.chatml import CONTROL_TOKENS
from rorchat.errors import UsageError
from rorchat.model import ADAPTER_BASE, ADAPTER_WEIGHTS, is_adapter, load_adapter, matrices, weights_sha256
from rorchat.training.distributed import sharding_strategy

ALPHA = 2  # times the rank: what a layer adds is B A x twice, whatever the rank
ROWS = "base_model.model.transformer.wte.token_adapter.trainable_tokens_delta"  # PEFT's name of the trained rows


@dataclass
class LoraArguments:
    """Whether the model itself is trained, or an adapter beside it."""

    lora_rank: int = field(
        default=0, metadata={"help": "Rank of the matrices that learn beside a frozen model, such as 16; 0: no LoRA."}
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Hold the frozen model in 4 bits (QLoRA); with lora_rank."}
    )

    def check_lora(self) -> None:
        """Raises UsageError where the settings contradict each other."""
        if self.lora_rank < 0:
            raise UsageError(f"lora_rank is {self.lora_rank}: give a positive number, or 0 to train the model itself.")
        if self.load_in_4bit and not self.lora_rank:
            raise UsageError("load_in_4bit holds a model that is not trained: give lora_rank as well, such as 16.")
        if self.lora_rank and self.optimizer == "muon":
            raise UsageError(
                "optimizer muon makes updates orthogonal, which says nothing of the product of LoRA's two matrices: "
                "give adamw or adamw_8bit."
            )
        if self.lora_rank and (how := sharding_strategy(self)):
            raise UsageError(
                f"lora_rank is {self.lora_rank}, and {how} would shard the model: LoRA needs little memory. Launch "
                "with recipes/accelerate/ddp.yaml."
            )


def adapter_of(model: GPT2LMHeadModel, tokenizer, arguments: LoraArguments, base: str) -> "Adapter | None":
    """The adapter that is to be trained, put into the model; None where the model itself is."""
    return Adapter(model, tokenizer, arguments, base) if arguments.lora_rank else None


class Adapter:
    """What learns beside a frozen model: PEFT's layers and the control tokens' rows of the tied embedding and head.

    The model that is given has PEFT's layers in it from then on.

    Args:
        base: the folder or Hub id that the model was loaded from.

    Raises:
        UsageError: the rank or the base does not do, or the device cannot compute in 4 bits.
    """

    def __init__(self, model: GPT2LMHeadModel, tokenizer, arguments: LoraArguments, base: str):
        rank = arguments.lora_rank
        if is_adapter(base):
            raise UsageError(f"lora_rank is {rank}, but {base} is an adapter itself: give a model.")
        if rank > model.config.n_embd:
            raise UsageError(f"lora_rank is {rank}, but the model is only {model.config.n_embd} wide: give less.")
        self.base = str(Path(base).resolve()) if Path(base).is_dir() else base
        self.about = {"sha256": weights_sha256(base), "load_in_4bit": arguments.load_in_4bit}
        control = tokenizer.convert_tokens_to_ids(list(CONTROL_TOKENS))
        grown = range(GPT2Config.from_pretrained(base).vocab_size, len(tokenizer))  # rows that the base has not
        self.rows = sorted({*control, *grown})
        # as they were: where 4-bit products are taken in bf16, bitsandbytes rounds them in place
        self._biases = [matrix.bias for _, _, matrix in matrices(model)]
        if arguments.load_in_4bit:
            _hold_in_4_bits(model, arguments)
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=rank,
            lora_alpha=ALPHA * rank,
            target_modules=["c_attn", "c_proj", "c_fc"],
            fan_in_fan_out=not arguments.load_in_4bit,  # Conv1D holds (in, out), what stands in its place (out, in)
            trainable_token_indices=sorted(control),
        )
        self.peft = get_peft_model(model, config)
        vars(model).pop("is_loaded_in_4bit", None)  # trainers would take it for one that Transformers quantized
        # PEFT 0.21 wraps the head and passes its weight on alone; TRL 1.16 reads the bias as well, which is None
        model.lm_head.register_parameter("bias", None)

    @property
    def model(self) -> GPT2LMHeadModel:
        return self.peft.get_base_model()

    def save(self, folder: str | Path, tokenizer) -> None:
        """Writes an adapter that plain PEFT loads, with the tokenizer.

        Beside the rows that were trained it has those that the base lacks, so that it fits a base that grows to the
        tokenizer's size whatever it grows by.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = get_peft_model_state_dict(self.peft, save_embedding_layers=False)
        weights[ROWS] = self.model.get_input_embeddings().weight.detach()[self.rows]
        weights = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
        save_file(weights, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        config = copy.copy(self.peft.peft_config["default"])
        config.base_model_name_or_path = self.base
        config.trainable_token_indices, config.inference_mode = self.rows, True
        config.target_modules = sorted(config.target_modules)  # a set, whose order no two processes share
        config.save_pretrained(folder)
        (folder / ADAPTER_BASE).write_text(json.dumps(self.about, indent=2) + "\n")
        tokenizer.save_pretrained(folder)

    def load(self, folder: str | Path) -> None:
        """Goes on with what `save` wrote; raises MismatchError where it is another's."""
        load_adapter(self.peft, Path(folder))

    def merged(self) -> GPT2LMHeadModel:
        """The stock model with the adapter merged into it. Of the model that was trained nothing is left."""
        if self.about["load_in_4bit"]:  # where PEFT would round the sum to 4 bits again
            for (part, name, layer), bias in zip(list(matrices(self.model)), self._biases, strict=True):
                setattr(part, name, _stock(layer, bias))
        return self.peft.merge_and_unload()


def _hold_in_4_bits(model: GPT2LMHeadModel, arguments) -> None:
    """Puts the matrices of the blocks into 4 bits: NF4 with quantized scales, a quarter of bf16.

    Transformers quantizes while it loads, which our embeddings, that grow first, would have to be taken out of; and
    what it gives back in the end is no Conv1D.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit

    dtype = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else torch.float32
    kind = {"quant_type": "nf4", "compress_statistics": True}
    for part, name, matrix in list(matrices(model)):
        layer = Linear4bit(*matrix.weight.shape, compute_dtype=dtype, device="meta", **kind)
        layer.weight = Params4bit(matrix.weight.detach().T.contiguous(), requires_grad=False, module=layer, **kind)
        layer.bias = torch.nn.Parameter(matrix.bias.detach().clone(), requires_grad=False)
        # bitsandbytes 0.50 packs the weights anew in the first evaluation on a CPU with AVX512-BF16, and from then on
        # no gradient goes through them
        layer.support_avx512bf16_for_cpu = False
        try:
            setattr(part, name, layer.to(arguments.device))
        except (RuntimeError, NotImplementedError, AttributeError) as error:
            raise UsageError(
                f"load_in_4bit: bitsandbytes cannot compute in 4 bits on {arguments.device} "
                f"({' '.join(str(error).split())[:100]}): leave it out, or train on a CUDA GPU."
            ) from None
    model.is_loaded_in_4bit = True  # by which PEFT knows


def _stock(layer: torch.nn.Module, bias: torch.Tensor) -> Conv1D:
    """A layer of PEFT over a 4-bit matrix as the matrix (in, out) that it computes with, in float32."""
    from bitsandbytes.functional import dequantize_4bit

    held = layer.get_base_layer().weight
    weight = dequantize_4bit(held.data, held.quant_state).float() + layer.get_delta_weight("default")
    stock = Conv1D(*weight.shape)
    stock.weight.data, stock.bias.data = weight.T.contiguous(), bias.detach().to(weight.device)
    return stock
