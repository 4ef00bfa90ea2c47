"""What is compared: works (shapes and batches), sides (implementations), and the levers of `--ablate`.

Imports neither torch nor numpy: the peak memory of a child process begins at that of its parent.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

NANOGPT = "NANOGPT_DIR"
HOW_TO_GET = {NANOGPT: "run git clone https://github.com/karpathy/nanoGPT and set it to the folder"}
LENGTHS = Path(__file__).with_name("lengths.json")


@dataclass(frozen=True)
class Work:
    """A model shape and the batch of every step.

    Args:
        size: layers x heads x width.
        rows: rows of `block_size` tokens in a micro-batch.
        steps: measured steps of each repeat, after `discarded` steps that allocate memory and compile.
        sides: sides to run by default.
        passes: micro-batches per optimizer step.
        data: `rows` of random tokens, or `conversations` or `pairs` of random tokens with real lengths (lengths.json)
            of at most `block_size` tokens. A side that packs has fewer rows and passes.
        subject: the side with which the others are compared.
    """

    title: str
    size: str
    vocabulary: int
    rows: int
    block_size: int
    steps: int
    sides: tuple[str, ...]
    passes: int = 1
    discarded: int = 2
    data: str = "rows"
    subject: str = "rorchat"

    @classmethod
    def read(cls, text: str) -> "Work":
        """Parse the JSON that run.py passes to its child processes."""
        values = json.loads(text)
        return cls(**{**values, "sides": tuple(values["sides"])})

    @property
    def shape(self) -> tuple[int, int, int]:
        """Layers, heads, width."""
        layers, heads, width = map(int, self.size.split("x"))
        return layers, heads, width

    @property
    def tokens_per_step(self) -> int:
        return self.rows * self.block_size * self.passes

    @property
    def unit(self) -> str:
        """The unit of speed."""
        return "pairs" if self.data == "pairs" else "tokens"

    @property
    def units_per_step(self) -> int:
        """Tokens or pairs per step, including context and excluding padding."""
        if self.data == "rows":
            return self.tokens_per_step
        lengths = self.lengths()
        return len(lengths) if self.data == "pairs" else sum(map(sum, lengths))

    def lengths(self) -> list[list[int]]:
        """Lengths of the parts of each row.

        A conversation has [context, supervised, context, ...] tokens, a pair [prompt, chosen, rejected]. For another
        `block_size` than that of lengths.json, only the first three parts are kept, scaled in proportion.
        """
        kept = json.loads(LENGTHS.read_text(encoding="utf-8"))
        rows, number = kept[self.data], self.rows * self.passes
        rows = [rows[(2 * k + 1) * len(rows) // (2 * number)] for k in range(number)]
        if self.block_size == kept["window"]:
            return rows
        return [[max(1, part * self.block_size // kept["window"] - 1) for part in row[:3]] for row in rows]

    @property
    def rows_consumed(self) -> int:
        return self.rows * self.passes * (self.steps + self.discarded)


_SIDES_124M = (
    "trainer-default", "trainer-fp32", "trainer-fp32-compile", "trainer-bf16", "trainer-bf16-compile", "nanogpt",
    "nanogpt-fp32", "rorchat", "rorchat-bf16",
)  # fmt: skip

WORKS = {
    "124m": Work("124M parameters, 4 x 512 tokens a step", "12x12x768", 50_304, 4, 512, 3, _SIDES_124M),
    "124m-1024": Work("124M parameters, 16 x 1,024 tokens a step", "12x12x768", 50_304, 16, 1024, 20, _SIDES_124M),
    "overhead": Work(
        "2 layers x 128, 8 x 64 tokens a step", "2x4x128", 512, 8, 64, 300,
        ("raw-fused", "raw", "trainer-fp32", "accelerate", "rorchat"), discarded=20,
    ),
    "optimizer": Work(
        "4 layers x 256, 8,192 tokens a step", "4x4x256", 4096, 8, 256, 10, ("rorchat", "rorchat-muon"), passes=4
    ),
    "optimizer-124m": Work(
        "124M parameters, 8,192 tokens a step", "12x12x768", 50_304, 4, 512, 2, ("rorchat", "rorchat-muon"),
        passes=4, discarded=1,
    ),
    # No steps are discarded: an epoch is one step that takes minutes
    "sft": Work(
        "124M parameters, an epoch of 96 conversations in one step", "12x12x768", 50_304, 8, 1024, 1,
        ("trl-default", "trl-packing", "trl-fp32", "trl-packing-fp32", "rorchat"), passes=12, discarded=0,
        data="conversations",
    ),
    "dpo": Work(
        "124M parameters, an epoch of 32 pairs in one step", "12x12x768", 50_304, 8, 1024, 1,
        ("trl-dpo-default", "trl-dpo-fp32", "rorchat-dpo-default", "rorchat-dpo"), passes=4, discarded=0, data="pairs",
        subject="rorchat-dpo",
    ),
}  # fmt: skip

#: Description of each side in the table, by the data of the work.
SIDES = {
    "rows": {
        "trainer-default": "Transformers' Trainer, its defaults: fp32, dropout 0.1, eager",
        "trainer-fp32": "Transformers' Trainer, fp32, dropout 0, eager",
        "trainer-fp32-compile": "Transformers' Trainer, fp32, dropout 0, torch_compile",
        "trainer-bf16": "Transformers' Trainer, bf16, dropout 0, eager",
        "trainer-bf16-compile": "Transformers' Trainer, bf16, dropout 0, torch_compile",
        "accelerate": "a loop with Accelerate, stock model, fp32",
        "nanogpt": "nanoGPT's model and loop, bf16 autocast, torch.compile",
        "nanogpt-fp32": "nanoGPT's model and loop, fp32, torch.compile",
        "raw": "a raw loop, stock model, fp32, eager",
        "raw-fused": "a raw loop with rorchat's kernels, precision and optimizer",
        "rorchat": "rorchat with its defaults",
        "rorchat-bf16": "rorchat in bf16 on any device",
        "rorchat-muon": "rorchat with Muon",
    },
    "conversations": {
        "trl-default": "TRL's SFTTrainer, its defaults: bf16, gradient checkpointing, padding; GPT-2's dropout of 0.1",
        "trl-packing": "those defaults with packing=True: best-fit rows, a batch flattened to one row, SDPA",
        "trl-fp32": "TRL's SFTTrainer, fp32, no gradient checkpointing, dropout 0",
        "trl-packing-fp32": "trl-fp32 with packing=True",
        "rorchat": "rorchat with its defaults",
    },
    "pairs": {
        "trl-dpo-default": "TRL's DPOTrainer, its defaults: bf16, gradient checkpointing, a second model as reference",
        "trl-dpo-fp32": "TRL's DPOTrainer, fp32, no gradient checkpointing",
        "rorchat-dpo-default": "rorchat with its defaults, including the SFT term",
        "rorchat-dpo": "rorchat with TRL's loss: without the SFT term",
    },
}
#: Large pages speed up sides that free and allocate memory in every step. The sides in KEEPS_MEMORY keep theirs.
LARGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}
KEEPS_MEMORY = ("rorchat", "rorchat-bf16", "rorchat-muon", "raw-fused", "rorchat-dpo", "rorchat-dpo-default")
NEEDS = {"nanogpt": NANOGPT, "nanogpt-fp32": NANOGPT}


@dataclass(frozen=True)
class Lever:
    """An optimization of rorchat that `--ablate` switches off; rorchat itself has no switch for most of them.

    Args:
        flags: flags of the stage's recipe.
        patches: `module:function` becomes a function that does nothing (usable as a context manager),
            `module:function=name` the function of that name in training.py; `module:Class.method` is deleted, so that
            the inherited method is used.
        environment: environment variables of the process.
    """

    flags: tuple[str, ...] = ()
    patches: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


_LEVERS = {
    "fused head": Lever(
        patches=(
            "rorchat.training.kernels.lm_head_loss:head_loss=full_logits_loss",
            "rorchat.training.kernels.lm_head_loss:is_lookup_plain=return_false",  # it relies on the fused head
        )
    ),
    "shared gradient": Lever(patches=("rorchat.training.kernels.lm_head_loss:is_lookup_plain=return_false",)),
    "recomputed outputs": Lever(patches=("rorchat.training.kernels.lm_head_loss:recompute_cheap_outputs",)),
    "small pages": Lever(environment=LARGE_PAGES),
    "kept memory": Lever(patches=("rorchat.training.arguments:keep_freed_memory",)),
    "bf16": Lever(flags=("--bf16", "false")),
    "fp32": Lever(flags=("--bf16", "true")),
}

LEVERS = {
    "rows": _LEVERS
    | {
        "fused GELU": Lever(patches=("rorchat.training.pretrain:patch_gelu",)),
        "causal attention": Lever(patches=("rorchat.training.kernels.lm_head_loss:causal_attention",)),
        "short step": Lever(
            patches=(
                "rorchat.training.stage:StageTrainer.forward_backward",
                "rorchat.training.stage:StageTrainer._clip_grad_norm",
                "rorchat.training.stage:StageTrainer.floating_point_ops",
                "rorchat.training.pretrain:PretrainTrainer._get_num_items_in_batch",
            )
        ),
        "compile": Lever(flags=("--compile", "false")),
        "eager": Lever(flags=("--compile", "true")),
    },
    "conversations": _LEVERS
    | {
        "fused GELU": Lever(patches=("rorchat.training.sft:patch_gelu",)),
        "packing": Lever(
            patches=("rorchat.training.sft:pack=one_row_each", "rorchat.mixture.packing:pack=one_row_each")
        ),
        "maskless attention": Lever(
            patches=(
                "rorchat.training.kernels.lm_head_loss:packed_attention",
                "rorchat.training.kernels.attention:packed_attention",
            )
        ),
    },
    "pairs": {name: _LEVERS[name] for name in ("small pages", "kept memory", "bf16", "fp32")}
    | {
        "fused GELU": Lever(patches=("rorchat.training.dpo:patch_gelu",)),
        "rows of similar length": Lever(patches=("rorchat.training.dpo:training_order=random_order",)),
    },
}


def quick(work: Work) -> Work:
    """The work with a tiny shape, which tests the benchmark and measures nothing."""
    return replace(
        work, title=f"{work.title}: quick, no figures", size="2x2x32", vocabulary=512, rows=2, block_size=32,
        passes=min(work.passes, 2), steps=min(work.steps, 2), discarded=min(work.discarded, 1),
    )  # fmt: skip
