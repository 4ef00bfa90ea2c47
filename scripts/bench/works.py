"""What is compared: works (shapes and batches), their sides, and the levers of `--ablate`. Imports nothing heavy."""

import json
from dataclasses import dataclass, field, replace

NANOGPT = "NANOGPT_DIR"
HOW_TO_GET = {NANOGPT: "git clone https://github.com/karpathy/nanoGPT, and give its folder"}
SUBJECT = "rorchat"  # the side that all others are compared with


@dataclass(frozen=True)
class Work:
    """A shape, and the batch of every step.

    Args:
        size: layers x heads x width.
        rows: of `block_size` tokens, in one pass through the model.
        steps: measured in each repeat, behind `discarded` ones, which allocate and compile.
        sides: what runs unless `--sides` says otherwise.
        passes: forward and backward passes to an optimizer step.
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
}  # fmt: skip

#: What each side is, for the reader of the table.
SIDES = {
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
}
#: Memory that is freed and faulted in again in every step is faster in large pages. These sides keep theirs.
LARGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}
KEEPS_MEMORY = ("rorchat", "rorchat-bf16", "rorchat-muon", "raw-fused")
NEEDS = {"nanogpt": NANOGPT, "nanogpt-fp32": NANOGPT}


@dataclass(frozen=True)
class Lever:
    """One lever of rorchat turned off (or over), from outside: the product has no switch for it.

    Args:
        flags: settings of recipes/pretrain.py.
        patches: `module:function` is replaced by one that does nothing, as a context manager too, or, as
            `module:function=name`, by the one of that name in training.py; `module:Class.method` is taken away, which
            leaves the parent's.
        environment: variables of the process.
    """

    flags: tuple[str, ...] = ()
    patches: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


LEVERS = {
    "fused head": Lever(
        patches=(
            "rorchat.training.loss:head_loss=full_logits_loss",
            "rorchat.training.loss:_lookup_is_plain=no",  # there is no gradient to share
        )
    ),
    "shared gradient": Lever(patches=("rorchat.training.loss:_lookup_is_plain=no",)),
    "recomputed outputs": Lever(patches=("rorchat.training.loss:cheap_outputs_computed_again",)),
    "fused GELU": Lever(patches=("rorchat.training.pretrain:fuse_gelu",)),
    "causal attention": Lever(patches=("rorchat.training.loss:causal_attention",)),
    "short step": Lever(
        patches=(
            "rorchat.training.trainer:StageTrainer.training_step",
            "rorchat.training.trainer:StageTrainer._clip_grad_norm",
            "rorchat.training.trainer:StageTrainer.floating_point_ops",
            "rorchat.training.pretrain:PretrainTrainer._get_num_items_in_batch",
        )
    ),
    "small pages": Lever(environment=LARGE_PAGES),
    "kept memory": Lever(patches=("rorchat.training.trainer:keep_freed_memory",)),
    "bf16": Lever(flags=("--bf16", "false")),
    "fp32": Lever(flags=("--bf16", "true")),
    "compile": Lever(flags=("--compile", "false")),
    "eager": Lever(flags=("--compile", "true")),
}


def quick(work: Work) -> Work:
    """The same work with a shape that proves the harness and nothing else."""
    return replace(
        work, title=f"{work.title}: quick, no figures", size="2x2x32", vocabulary=512, rows=2, block_size=32,
        steps=2, discarded=1, passes=min(work.passes, 2),
    )  # fmt: skip
