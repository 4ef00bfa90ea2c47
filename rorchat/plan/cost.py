"""Estimates the cost of training: seconds per token, and memory in bytes.

The time is estimated with a roofline model: matrix products run at an assumed share of the peak FLOP/s, and all other
operations at an assumed share of the memory bandwidth, with bytes counted from the kernels that are used.
`docs/planning.md` compares the estimates with measured runs.
"""

from dataclasses import dataclass, replace
from typing import Any

from rorchat.device import Device, get_peak_flops, measure_bandwidth
from rorchat.errors import UsageError
from rorchat.model import Shape, count_parameters, count_scaling_parameters, flops_per_token
from rorchat.validation_split import MAX_EVAL_TOKENS

BANDWIDTH_SHARE = 0.8  # elementwise kernels reach this share of the bandwidth in the data sheet
PARALLEL_SHARE = 0.95  # N GPUs in one machine reach this share of N times the speed of one GPU
OUTSIDE_STEPS = 0.1  # time for validation, samples and saving, as a share of the time in steps
EVALUATIONS = 4  # of a pretraining run, with its default eval_steps
VALIDATION_SHARE = 0.01  # the default validation_share
FORWARD_SHARE = 1 / 3  # of the FLOPs of a training step: without the backward pass
MEMORY_SHARE = 0.95  # a plan uses this share of the memory; the driver and allocator fragmentation need the rest
LAUNCH_SECONDS = 6e-4  # per layer, forward and backward, in eager mode: about 100 kernel launches of 6 us
COMPILED_TRAFFIC = 0.43  # memory traffic with kernels fused by torch.compile, as a share of the eager traffic
KERNELS = ("eager", "compiled", "manual")

# Bytes of memory traffic per token, forward and backward. Dictionaries are indexed by bytes per element. The backward
# pass counts as two forward passes.
BODY_BYTES = {2: 324, 4: 456}  # x width x layers: norms, casts, biases, GELU, residuals, inputs and outputs of products
HEAD_BYTES = 40  # x vocabulary: product, float32 copy, softmax, gradient
SCORE_BYTES = {2: 72, 4: 72}  # x heads x layers x positions: scores, if attention has no fused kernel
MICRO_BATCH_BYTES = 18  # x parameters, per micro-batch: casts and gradient accumulation
UPDATE_BYTES = 28  # x parameters, per step: reads gradient, weight and two moments, writes weight and moments

# Bytes of activations per token that are kept for the backward pass, by bytes per element
KEPT_BYTES = {2: 36, 4: 64}  # x width x layers: inputs of norms, products and GELU; q, k, v
RECOMPUTED_BYTES = {2: 8, 4: 24}  # part of KEPT_BYTES: outputs of GELU, in fp32 also of norms (kernels/recompute.py)
KEPT_SCORE_BYTES = {2: 7, 4: 9}  # x heads x layers x positions, without fused attention: softmax, dropout mask, product

#: Bytes of optimizer state: (per parameter in the matrices of the blocks, per other parameter)
STATE_BYTES = {
    "adamw": (8, 8),
    "adamw_8bit": (2, 8),  # the embeddings stay in 32 bits
    "muon": (4, 8),
}
CONTEXT_BYTES = {True: 6e8, False: 1.2e9}  # by is_cpu. CPU: Python and its libraries; GPU: CUDA context, cuBLAS
CPU_FRAGMENTS = 0.15  # measured fragmentation of glibc's heap, as a share of all tensors
MUON_COPIES = 5  # of the matrices that Muon updates at once: momentum and the products of Newton-Schulz


@dataclass(frozen=True)
class Setup:
    """How a model is trained: everything except its shape that determines time and memory.

    If `mfu` or `seconds_per_token` is given, it replaces the roofline model.
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
    def bytes_per_number(self) -> int:
        """Bytes of an element in matrix products."""
        return 4 if self.precision == "fp32" else 2

    @property
    def memory_bytes(self) -> int:
        """Memory of one device.

        Raises:
            UsageError: the table of devices does not contain the value.
        """
        if not self.device.memory_bytes:
            raise UsageError(
                f"{self.device.name} has no memory_gb in the table of devices: add it to a file and pass it as "
                "--devices."
            )
        return self.device.memory_bytes

    @property
    def peak(self) -> float:
        """Peak FLOP/s of one device in this precision.

        Raises:
            UsageError: the table of devices does not contain the value.
        """
        known = self.device.peak_flops.get(self.precision)
        if known:
            return known
        if self.device.is_cpu:
            return get_peak_flops(self.precision, on_gpu=False)[0]
        listed = ", ".join(self.device.peak_flops) or "none"
        raise UsageError(
            f"{self.device.name} has no peak for {self.precision} in the table of devices (listed: {listed}). "
            "Choose another --precision, or add the value to a file and pass it as --devices."
        )

    @property
    def bandwidth(self) -> float:
        """Memory bandwidth of one device in bytes per second.

        Raises:
            UsageError: the table of devices does not contain the value.
        """
        if self.device.bandwidth:
            return self.device.bandwidth
        if self.device.is_cpu:
            return measure_bandwidth()
        raise UsageError(
            f"{self.device.name} has no bandwidth_gb_s in the table of devices: add it to a file and pass it as "
            "--devices, or give --mfu."
        )

    def flops(self, shape: Shape) -> float:
        """FLOPs per token."""
        return flops_per_token(shape, self.vocabulary, self.block_size)


def estimate_seconds_per_token(setup: Setup, shape: Shape, micro_batch: int, global_batch_tokens: int) -> float:
    """Estimates seconds per token in training steps, over all GPUs together."""
    if setup.seconds_per_token:
        return setup.seconds_per_token
    if setup.mfu:
        return setup.flops(shape) / (setup.peak * setup.mfu * setup.gpus)
    # FLOPs of the layers' forward pass, which gradient checkpointing repeats: matrices and attention's two products
    layers_forward = shape.n_layer * (24.0 * shape.n_embd**2 + 4 * setup.block_size * shape.n_embd)
    recomputed = layers_forward if setup.gradient_checkpointing else 0.0
    products = (setup.flops(shape) + recomputed) / (setup.peak * setup.device.matmul_share)
    tokens = micro_batch * setup.block_size
    traffic = estimate_traffic(setup, shape, tokens, global_batch_tokens)
    seconds = products + traffic / (setup.bandwidth * BANDWIDTH_SHARE)
    if not setup.device.is_cpu and setup.kernels != "compiled":
        seconds = max(seconds, shape.n_layer * LAUNCH_SECONDS / tokens)
    return seconds / (setup.gpus * PARALLEL_SHARE if setup.gpus > 1 else 1)


def estimate_traffic(setup: Setup, shape: Shape, micro_batch_tokens: int, global_batch_tokens: int) -> float:
    """Estimates the memory traffic in bytes per token, including the token's share of the optimizer step."""
    width, layers = shape.n_embd, shape.n_layer
    body = BODY_BYTES[setup.bytes_per_number] * width * layers * (4 / 3 if setup.gradient_checkpointing else 1)
    moved = body + HEAD_BYTES * setup.vocabulary
    if setup.kernels == "manual":
        moved += SCORE_BYTES[setup.bytes_per_number] * shape.n_head * layers * setup.block_size
    if setup.kernels == "compiled":
        moved *= COMPILED_TRAFFIC
    count = count_parameters(shape, setup.vocabulary, setup.block_size)
    return moved + count * (MICRO_BATCH_BYTES / micro_batch_tokens + UPDATE_BYTES * setup.gpus / global_batch_tokens)


def count_validation_tokens(tokens: float) -> float:
    """Tokens that each evaluation of a run over `tokens` reads, if it passes over its data once."""
    return min(MAX_EVAL_TOKENS, tokens * VALIDATION_SHARE / (1 - VALIDATION_SHARE))


def compute_mfu(setup: Setup, shape: Shape, seconds_per_token: float) -> float:
    """Computes the model FLOPs utilization: the model's FLOP/s (`flops_per_token`) as a share of the peak."""
    return setup.flops(shape) / (seconds_per_token * setup.peak * setup.gpus)


def estimate_memory(setup: Setup, shape: Shape, micro_batch: int, accumulates: bool = True) -> dict[str, float]:
    """Estimates the peak memory of one device in a training step.

    Args:
        accumulates: whether a step has several micro-batches. The gradient of the head then exists twice: the new one
            and the accumulated one.

    Returns:
        {part: bytes}, whose sum is the peak. The part `update` is present only if the peak is in the optimizer step: it
        is the memory that this step needs beyond what the backward pass has freed.
    """
    tokens, width = micro_batch * setup.block_size, shape.n_embd
    count = count_parameters(shape, setup.vocabulary, setup.block_size)
    body, head = 12 * shape.n_layer * width**2, setup.vocabulary * width
    is_mixed = setup.bytes_per_number == 2
    matrix_state, other_state = STATE_BYTES[setup.optimizer]
    layer = _estimate_kept(setup, tokens * width)
    if setup.kernels == "manual":
        layer += KEPT_SCORE_BYTES[setup.bytes_per_number] * shape.n_head * setup.block_size * tokens
    # gradient checkpointing keeps the input of every layer, and everything of one layer
    layers = layer + shape.n_layer * 4 * width * tokens if setup.gradient_checkpointing else shape.n_layer * layer
    parts = {
        "weights": count * 4 + (count_scaling_parameters(shape, setup.vocabulary) * 2 if is_mixed else 0),
        "gradients": count * (8 if setup.gpus > 1 else 4),  # DDP communicates copies of them
        "optimizer": matrix_state * body + other_state * (count - body),
        "activations": layers + 8 * width * tokens,
        "logits": _estimate_logits(setup, tokens) + (4 * head if accumulates else 0) + 8 * width * tokens,
        "workspace": CONTEXT_BYTES[setup.device.is_cpu] + layer / 2,
    }
    if setup.device.is_cpu:
        parts["workspace"] += CPU_FRAGMENTS * (sum(parts.values()) - CONTEXT_BYTES[True])
    # the optimizer step runs after the backward pass has freed the activations
    freed = parts["activations"] + parts["logits"] + layer / 2
    update = _estimate_update(setup, shape)
    return parts | {"update": update - freed} if update > freed else parts


def _estimate_update(setup: Setup, shape: Shape) -> float:
    """Estimates the temporary memory of the optimizer step: fused AdamW works in place, Muon on stacked copies."""
    if setup.optimizer != "muon":
        return 0.0
    from rorchat.training.optim import MAX_ELEMENTS

    largest = 4 * shape.n_embd**2  # a matrix of the MLP; q, k, v and output together have the same size
    at_once = min(shape.n_layer * largest, max(MAX_ELEMENTS["cpu" if setup.device.is_cpu else "gpu"], largest))
    # Muon uses bf16 on devices that compute it fast, whatever the precision of the run (rorchat/training/optim.py)
    return MUON_COPIES * at_once * (2 if "bf16" in setup.device.peak_flops and not setup.device.is_cpu else 4)


def _estimate_kept(setup: Setup, numbers: int) -> float:
    """Estimates the activations that a layer keeps for its backward pass, in bytes, without attention scores.

    Args:
        numbers: elements of the hidden states (tokens x width).
    """
    from rorchat.training.kernels.recompute import MIN_RECOMPUTE_ELEMENTS

    recomputes = setup.kernels == "eager" and numbers >= MIN_RECOMPUTE_ELEMENTS and not setup.gradient_checkpointing
    recomputed = RECOMPUTED_BYTES[setup.bytes_per_number] if recomputes else 0
    return (KEPT_BYTES[setup.bytes_per_number] - recomputed) * numbers


def _estimate_logits(setup: Setup, tokens: int) -> float:
    """Estimates the memory of the logits: a slice in float32 and, in mixed precision, a copy in half precision."""
    from rorchat.training.kernels.sliced_head import MAX_LOGITS

    if setup.kernels == "manual":  # all logits, and the float32 copies of the loss
        return tokens * setup.vocabulary * (setup.bytes_per_number + 8)
    at_once = min(tokens * setup.vocabulary, max(MAX_LOGITS, setup.vocabulary))
    return at_once * (4 if setup.bytes_per_number == 4 else 4 + setup.bytes_per_number)


def fits_memory(setup: Setup, shape: Shape, micro_batch: int, accumulates: bool = True) -> bool:
    """Whether a step fits into the device's memory.

    Raises:
        UsageError: the table of devices does not contain the memory.
    """
    available = MEMORY_SHARE * setup.memory_bytes
    return sum(estimate_memory(setup, shape, micro_batch, accumulates).values()) <= available


def find_largest_micro_batch(setup: Setup, shape: Shape, rows: int, limit: int) -> int:
    """Finds the largest micro-batch that divides `rows`, is at most `limit` and fits into memory; 0 if none fits."""
    divisors = (n for n in range(min(rows, max(1, limit)), 0, -1) if rows % n == 0)
    return next((n for n in divisors if fits_memory(setup, shape, n, accumulates=n < rows)), 0)


def find_memory_savers(setup: Setup, shape: Shape) -> list[str]:
    """Finds the smallest sets of options with which a micro-batch of one row fits into memory."""
    savers: dict[str, dict[str, Any]] = {
        "--optimizer adamw_8bit": {"optimizer": "adamw_8bit"},
        "--gradient_checkpointing": {"gradient_checkpointing": True},
        "--optimizer adamw_8bit --gradient_checkpointing": {"optimizer": "adamw_8bit", "gradient_checkpointing": True},
    }
    fitting = [name for name, changes in savers.items() if fits_memory(replace(setup, **changes), shape, 1)]
    return [name for name in fitting if not any(other != name and other in name for other in fitting)]
