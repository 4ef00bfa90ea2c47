"""What training takes: the seconds of a token and the bytes of a step, by part.

Seconds are a roofline: products at an assumed share of the peak, plus everything else at an assumed share of the
memory's bandwidth, counted in bytes from the kernels that run. `docs/planning.md` holds it against measured runs.
"""

from dataclasses import dataclass, replace

from rorchat.device import Device, get_peak_flops, measure_bandwidth
from rorchat.errors import UsageError
from rorchat.model import Shape, count_parameters, count_scaling_parameters, flops_per_token

BANDWIDTH_SHARE = 0.8  # of the data sheet's bandwidth, that elementwise kernels reach
PARALLEL_SHARE = 0.95  # of N times one GPU's speed, with N GPUs in one machine
OUTSIDE_STEPS = 0.1  # validation, samples and saving, as a share of the time in steps
MEMORY_SHARE = 0.95  # of the device's that a plan fills: the driver and the allocator's gaps take the rest
LAUNCH_SECONDS = 6e-4  # a layer forward and backward in eager mode: about a hundred kernels, 6 us each to launch
COMPILED_TRAFFIC = 0.43  # of the eager bytes, once kernels are fused by torch.compile
KERNELS = ("eager", "compiled", "manual")
# Bytes that one token moves, forward and backward; the backward pass counted as two forward passes
BODY_BYTES = {
    2: 324,
    4: 456,
}  # times width and layers: norms, casts, biases, GELU, residuals, products' in- and outputs
HEAD_BYTES = 40  # times the vocabulary: product, float32 copy, softmax, gradient
SCORE_BYTES = {
    2: 72,
    4: 72,
}  # times heads, layers and positions: scores that attention without a fused kernel writes out
STEP_BYTES = 18  # times the parameters, a micro-batch: casts, and gradients added up
UPDATE_BYTES = 28  # times the parameters, a step: gradient read, weight and two moments read and written
# Bytes that one token keeps until the backward pass
KEPT_BYTES = {2: 36, 4: 64}  # times width and layers: inputs of norms, products and GELU; q, k, v
SPARED_BYTES = {
    2: 8,
    4: 24,
}  # of those: outputs of the GELU, in fp32 of norms too (rorchat/training/kernels/recompute.py)
KEPT_SCORES = {
    2: 7,
    4: 9,
}  # times heads, layers and positions, without fused attention: softmax, dropout's mask, product
STATE_BYTES = {  # of the optimizer: (a number in the body's matrices, any other number)
    "adamw": (8, 8),
    "adamw_8bit": (2, 8),  # the embeddings stay in 32 bits
    "muon": (4, 8),
}
CONTEXT_BYTES = {True: 6e8, False: 1.2e9}  # CPU: Python and its libraries; GPU: CUDA context, cuBLAS, fragments
CPU_FRAGMENTS = 0.15  # of all tensors, measured: the holes of glibc's heap, which keeps what a step frees
# Muon stacks equal matrices, so many numbers at once: their momentum, and the products of Newton-Schulz
MUON_COPIES = 5


@dataclass(frozen=True)
class Setup:
    """How a model is trained: what decides seconds and bytes besides its shape.

    `bytes` of a number in products: 2 in bf16 and fp16, else 4. `mfu` or `seconds_per_token` replace the roofline.
    """

    device: Device
    gpus: int
    precision: str
    vocabulary: int
    block_size: int
    optimizer: str = "adamw"
    kernels: str = "eager"
    gradient_checkpointing: bool = False
    mfu: float | None = None
    seconds_per_token: float | None = None

    @property
    def bytes(self) -> int:
        return 4 if self.precision == "fp32" else 2

    @property
    def peak(self) -> float:
        """FLOP/s of one device in the precision."""
        known = self.device.peak_flops.get(self.precision)
        if known:
            return known
        if self.device.is_cpu:
            return get_peak_flops(self.precision, on_gpu=False)[0]
        have = ", ".join(self.device.peak_flops) or "none"
        raise UsageError(
            f"{self.device.name} has no peak for {self.precision} in the table of devices (known: {have}). "
            "Choose another --precision, or give the figure with --devices."
        )

    @property
    def bandwidth(self) -> float:
        return self.device.bandwidth or (measure_bandwidth() if self.device.is_cpu else _no_bandwidth(self.device))

    def flops(self, shape: Shape) -> float:
        return flops_per_token(shape, self.vocabulary, self.block_size)


def _no_bandwidth(device: Device) -> float:
    raise UsageError(f"{device.name} has no bandwidth_gb_s in the table of devices: give it with --devices, or --mfu.")


def seconds_per_token(setup: Setup, shape: Shape, micro_batch: int, global_batch_tokens: int) -> float:
    """Seconds in steps, over all GPUs: tokens times this is the time in steps."""
    if setup.seconds_per_token:
        return setup.seconds_per_token
    if setup.mfu:
        return setup.flops(shape) / (setup.peak * setup.mfu * setup.gpus)
    # every layer's forward pass again: its matrices, and attention's two products
    again = shape.n_layer * (24.0 * shape.n_embd**2 + 4 * setup.block_size * shape.n_embd)
    recomputed = again if setup.gradient_checkpointing else 0.0
    products = (setup.flops(shape) + recomputed) / (setup.peak * setup.device.matmul_share)
    tokens = micro_batch * setup.block_size
    one = products + traffic(setup, shape, tokens, global_batch_tokens) / (setup.bandwidth * BANDWIDTH_SHARE)
    if not setup.device.is_cpu and setup.kernels != "compiled":
        one = max(one, shape.n_layer * LAUNCH_SECONDS / tokens)
    return one / (setup.gpus * PARALLEL_SHARE if setup.gpus > 1 else 1)


def traffic(setup: Setup, shape: Shape, micro_batch_tokens: int, global_batch_tokens: int) -> float:
    """Bytes that a token moves between memory and units outside of fused kernels, its share of a step's included."""
    width, layers = shape.n_embd, shape.n_layer
    body = BODY_BYTES[setup.bytes] * width * layers * (4 / 3 if setup.gradient_checkpointing else 1)
    moved = body + HEAD_BYTES * setup.vocabulary
    if setup.kernels == "manual":
        moved += SCORE_BYTES[setup.bytes] * shape.n_head * layers * setup.block_size
    if setup.kernels == "compiled":
        moved *= COMPILED_TRAFFIC
    count = count_parameters(shape, setup.vocabulary, setup.block_size)
    return moved + count * (STEP_BYTES / micro_batch_tokens + UPDATE_BYTES * setup.gpus / global_batch_tokens)


def mfu(setup: Setup, shape: Shape, seconds: float) -> float:
    """Share of the peak that the FLOPs of the model itself make up; see `rorchat.model.flops_per_token`."""
    return setup.flops(shape) / (seconds * setup.peak * setup.gpus)


def memory(setup: Setup, shape: Shape, micro_batch: int, accumulates: bool = True) -> dict[str, float]:
    """Bytes on one device at the peak of a step, by part; their sum is the need.

    Where a step `accumulates`, the head's next gradient is made while that of the passes before is held. `update` is
    there where the optimizer's step is that peak: what it needs beyond the room that activations leave.
    """
    tokens, width = micro_batch * setup.block_size, shape.n_embd
    count = count_parameters(shape, setup.vocabulary, setup.block_size)
    body, head = 12 * shape.n_layer * width**2, setup.vocabulary * width
    mixed = setup.bytes == 2
    for_matrices, for_rest = STATE_BYTES[setup.optimizer]
    layer = _kept(setup, tokens * width)
    if setup.kernels == "manual":
        layer += KEPT_SCORES[setup.bytes] * shape.n_head * setup.block_size * tokens
    layers_kept = layer + shape.n_layer * 4 * width * tokens if setup.gradient_checkpointing else shape.n_layer * layer
    backward = {
        "weights": count * 4 + (count_scaling_parameters(shape, setup.vocabulary) * 2 if mixed else 0),
        "gradients": count * (8 if setup.gpus > 1 else 4),  # DDP sends copies
        "optimizer": for_matrices * body + for_rest * (count - body),
        "activations": layers_kept + 8 * width * tokens,
        "logits": _logits(setup, tokens) + (4 * head if accumulates else 0) + 8 * width * tokens,
        "workspace": CONTEXT_BYTES[setup.device.is_cpu] + layer / 2,
    }
    if setup.device.is_cpu:
        backward["workspace"] += CPU_FRAGMENTS * (total(backward) - CONTEXT_BYTES[True])
    # The optimizer steps when the backward pass has freed what it kept
    freed = backward["activations"] + backward["logits"] + layer / 2
    update = _update(setup, shape)
    return backward | {"update": update - freed} if update > freed else backward


def _update(setup: Setup, shape: Shape) -> float:
    """Of the optimizer's step, beside its state: the fused AdamW works in place, Muon on copies of equal matrices."""
    if setup.optimizer != "muon":
        return 0.0
    from rorchat.training.optim import MAX_ELEMENTS

    largest = 4 * shape.n_embd**2  # one matrix of the MLP: no slice is smaller; q, k, v and output are as many numbers
    at_once = min(shape.n_layer * largest, max(MAX_ELEMENTS["cpu" if setup.device.is_cpu else "gpu"], largest))
    # bf16 where it is computed fast, whatever the run's precision (rorchat/training/optim.py)
    return MUON_COPIES * at_once * (2 if "bf16" in setup.device.peak_flops and not setup.device.is_cpu else 4)


def _kept(setup: Setup, numbers: int) -> float:
    """Of one layer until its backward pass, but for scores; `numbers` are those of a hidden state."""
    from rorchat.training.kernels.recompute import MIN_RECOMPUTE_ELEMENTS

    again = setup.kernels == "eager" and numbers >= MIN_RECOMPUTE_ELEMENTS and not setup.gradient_checkpointing
    spared = SPARED_BYTES[setup.bytes] if again else 0
    return (KEPT_BYTES[setup.bytes] - spared) * numbers


def _logits(setup: Setup, tokens: int) -> float:
    """Of the fused head: a slice in float32, and in the products' precision where that is another."""
    from rorchat.training.kernels.sliced_head import MAX_LOGITS

    if setup.kernels == "manual":  # all of them, and the float32 copies of the loss
        return tokens * setup.vocabulary * (setup.bytes + 8)
    at_once = min(tokens * setup.vocabulary, max(MAX_LOGITS, setup.vocabulary))
    return at_once * (4 if setup.bytes == 4 else 4 + setup.bytes)


def total(parts: dict[str, float]) -> float:
    return sum(parts.values())


def largest_micro_batch(setup: Setup, shape: Shape, rows: int, most: int) -> int:
    """Rows of a micro-batch: the largest divisor of `rows`, up to `most`, that fits into memory; 0 if none does."""
    limit = setup.device.memory_bytes
    if not limit:
        raise UsageError(f"{setup.device.name} has no memory_gb in the table of devices: give it with --devices.")
    for micro_batch in sorted((n for n in range(1, min(rows, max(1, most)) + 1) if rows % n == 0), reverse=True):
        if total(memory(setup, shape, micro_batch, accumulates=micro_batch < rows)) <= MEMORY_SHARE * limit:
            return micro_batch
    return 0


def what_helps(setup: Setup, shape: Shape) -> list[str]:
    """The options, alone or together, with which one row would fit."""
    limit = MEMORY_SHARE * setup.device.memory_bytes
    changes = {
        "--optimizer adamw_8bit": {"optimizer": "adamw_8bit"},
        "--gradient-checkpointing": {"gradient_checkpointing": True},
        "--optimizer adamw_8bit --gradient-checkpointing": {"optimizer": "adamw_8bit", "gradient_checkpointing": True},
    }
    fitting = [name for name, new in changes.items() if total(memory(replace(setup, **new), shape, 1)) <= limit]
    return [name for name in fitting if not any(other != name and other in name for other in fitting)]
