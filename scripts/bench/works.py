"""What is compared: works (shapes and batches), their sides, and the levers of `--ablate`. Imports nothing heavy."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

NANOGPT = "NANOGPT_DIR"
HOW_TO_GET = {NANOGPT: "git clone https://github.com/karpathy/nanoGPT, and give its folder"}
LENGTHS = Path(__file__).with_name("lengths.json")


@dataclass(frozen=True)
class Work:
    """A shape, and the batch of every step.

    Args:
        size: layers x heads x width.
        rows: of `block_size` tokens, in one pass through the model.
        steps: measured in each repeat, behind `discarded` ones, which allocate and compile.
        sides: what runs unless `--sides` says otherwise.
        passes: forward and backward passes to an optimizer step.
        data: what a row is: `rows` of random tokens, or `conversations` or `pairs` of them with real lengths
            (lengths.json), of at most `block_size` tokens. A side that packs has fewer rows and passes.
        subject: the side that all others are compared with.
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
        """From JSON, as the processes of a run hand it on."""
        values = json.loads(text)
        return cls(**{**values, "sides": tuple(values["sides"])})

    @property
    def shape(self) -> tuple[int, int, int]:
        """Layers, heads, width."""
        layers, heads, width = map(int, self.size.split("x"))
        return layers, heads, width

    @property
    def tokens_a_step(self) -> int:
        return self.rows * self.block_size * self.passes

    @property
    def unit(self) -> str:
        """What speed counts."""
        return "pairs" if self.data == "pairs" else "tokens"

    @property
    def units_a_step(self) -> int:
        """Padding is not counted, context is."""
        if self.data == "rows":
            return self.tokens_a_step
        lengths = self.lengths()
        return len(lengths) if self.data == "pairs" else sum(map(sum, lengths))

    def lengths(self) -> list[list[int]]:
        """Of each conversation how many tokens are context, supervised, context and so on; of each pair how many its
        prompt, the chosen and the rejected reply have. Where `block_size` is not theirs they shrink in proportion, and
        only the first stretches stay.
        """
        known = json.loads(LENGTHS.read_text())
        rows, number = known[self.data], self.rows * self.passes
        rows = [rows[(2 * k + 1) * len(rows) // (2 * number)] for k in range(number)]
        if self.block_size == known["window"]:
            return rows
        return [[max(1, part * self.block_size // known["window"] - 1) for part in row[:3]] for row in rows]

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
    # Neither has steps to discard: an epoch is one step, which takes minutes
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

#: What each side is, for the reader of the table, by what the work's rows are.
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
        "rorchat": "rorchat as it comes",
        "rorchat-bf16": "rorchat, bf16 whatever the device",
        "rorchat-muon": "rorchat with Muon",
    },
    "conversations": {
        "trl-default": "TRL's SFTTrainer, its defaults: bf16, gradient checkpointing, padding; GPT-2's dropout of 0.1",
        "trl-packing": "those defaults with packing=True: best-fit rows, a batch flattened to one row, SDPA",
        "trl-fp32": "TRL's SFTTrainer, fp32, no gradient checkpointing, dropout 0",
        "trl-packing-fp32": "trl-fp32 with packing=True",
        "rorchat": "rorchat as it comes",
    },
    "pairs": {
        "trl-dpo-default": "TRL's DPOTrainer, its defaults: bf16, gradient checkpointing, a second model as reference",
        "trl-dpo-fp32": "TRL's DPOTrainer, fp32, no gradient checkpointing",
        "rorchat-dpo-default": "rorchat as it comes, with its SFT term",
        "rorchat-dpo": "rorchat with TRL's loss: without the SFT term",
    },
}
#: Memory that is freed and faulted in again in every step is faster in large pages. These sides keep theirs.
LARGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}
KEEPS_MEMORY = ("rorchat", "rorchat-bf16", "rorchat-muon", "raw-fused", "rorchat-dpo", "rorchat-dpo-default")
NEEDS = {"nanogpt": NANOGPT, "nanogpt-fp32": NANOGPT}


@dataclass(frozen=True)
class Lever:
    """One lever of rorchat turned off (or over), from outside: the product has no switch for it.

    Args:
        flags: settings of the stage's recipe.
        patches: `module:function` is replaced by one that does nothing, as a context manager too, or, as
            `module:function=name`, by the one of that name in training.py; `module:Class.method` is taken away, which
            leaves the parent's.
        environment: variables of the process.
    """

    flags: tuple[str, ...] = ()
    patches: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


_LEVERS = {
    "fused head": Lever(
        patches=(
            "rorchat.training.kernels.lm_head_loss:head_loss=full_logits_loss",
            "rorchat.training.kernels.lm_head_loss:_lookup_is_plain=no",  # there is no gradient to share
        )
    ),
    "shared gradient": Lever(patches=("rorchat.training.kernels.lm_head_loss:_lookup_is_plain=no",)),
    "recomputed outputs": Lever(patches=("rorchat.training.kernels.lm_head_loss:cheap_outputs_computed_again",)),
    "small pages": Lever(environment=LARGE_PAGES),
    "kept memory": Lever(patches=("rorchat.training.stage:keep_freed_memory",)),
    "bf16": Lever(flags=("--bf16", "false")),
    "fp32": Lever(flags=("--bf16", "true")),
}

LEVERS = {
    "rows": _LEVERS
    | {
        "fused GELU": Lever(patches=("rorchat.training.pretrain:fuse_gelu",)),
        "causal attention": Lever(patches=("rorchat.training.kernels.lm_head_loss:causal_attention",)),
        "short step": Lever(
            patches=(
                "rorchat.training.stage:StageTrainer.training_step",
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
        "fused GELU": Lever(patches=("rorchat.training.sft:fuse_gelu",)),
        "packing": Lever(patches=("rorchat.training.sft:pack=one_a_row", "rorchat.mixture.packing:pack=one_a_row")),
        "maskless attention": Lever(
            patches=(
                "rorchat.training.kernels.lm_head_loss:packed_attention",
                "rorchat.training.kernels.attention:packed_attention",
            )
        ),
    },
    "pairs": {name: _LEVERS[name] for name in ("small pages", "kept memory", "bf16", "fp32")}
    | {
        "fused GELU": Lever(patches=("rorchat.training.dpo:fuse_gelu",)),
        "rows of similar length": Lever(patches=("rorchat.training.dpo:training_order=random_order",)),
    },
}


def quick(work: Work) -> Work:
    """The same work with a shape that proves the harness and nothing else."""
    return replace(
        work, title=f"{work.title}: quick, no figures", size="2x2x32", vocabulary=512, rows=2, block_size=32,
        passes=min(work.passes, 2), steps=min(work.steps, 2), discarded=min(work.discarded, 1),
    )  # fmt: skip
