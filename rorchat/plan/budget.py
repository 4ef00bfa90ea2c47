"""Turns a request into a plan, or raises a one-line error that says what would fit."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from rorchat.device import PRECISIONS, Device
from rorchat.errors import UsageError, did_you_mean
from rorchat.model import Shape, count_scaling_parameters, parse_shape
from rorchat.plan.cost import (
    KERNELS,
    OUTSIDE_STEPS,
    STATE_BYTES,
    Setup,
    compute_mfu,
    estimate_memory,
    estimate_seconds_per_token,
    find_largest_micro_batch,
    find_memory_savers,
)
from rorchat.plan.scaling import FITS, Fit, format_size, list_shapes

GLOBAL_BATCH_TOKENS = 524_288  # the batch of GPT-3's smallest model, and of all reproductions of GPT-2
TARGET_STEPS = 2_000  # the batch of a short run is halved until the run has at least this many steps
MIN_STEPS = 100  # a shorter run is refused
#: Smallest numbers of parameters and tokens that the scaling laws were fitted on (Hoffmann et al. 2022, abstract)
FITTED_FROM = (70e6, 5e9)
NOTABLE_LOSS = 0.05  # nats; another size is mentioned only if its loss is lower by this much
MICRO_BATCH_TOKENS = {True: 8_192, False: 65_536}  # {is_cpu: tokens}; larger micro-batches are not faster


@dataclass(frozen=True)
class Request:
    """A budget (dollars, hours or FLOPs), optionally with a size or tokens, or a size and tokens without a budget."""

    device: Device
    money: float | None = None
    hours: float | None = None
    flops: float | None = None
    tokens: float | None = None
    size: str | None = None
    gpus: int = 1
    dollars_per_hour: float | None = None
    vocabulary: int = 50_304
    block_size: int = 1024
    precision: str | None = None
    optimizer: str = "muon"
    kernels: str | None = None
    gradient_checkpointing: bool = False
    global_batch_tokens: int | None = None
    micro_batch: int | None = None
    mfu: float | None = None
    fit: str = "epoch"

    def __post_init__(self) -> None:
        budgets = [name for name in ("money", "hours", "flops") if getattr(self, name) is not None]
        if len(budgets) > 1:
            raise UsageError(f"--{budgets[0]} and --{budgets[1]} are two budgets: give one.")
        if not budgets and not (self.tokens is not None and self.size):
            raise UsageError("No budget: give --money DOLLARS, --hours H or --flops F, or --size with --tokens.")
        for option in ("money", "hours", "flops", "tokens", "mfu", "dollars_per_hour"):
            _check_positive(option, getattr(self, option), 1.0 if option == "mfu" else math.inf)
        for option in ("gpus", "vocabulary", "block_size", "global_batch_tokens", "micro_batch"):
            _check_positive(option, getattr(self, option))
        choices = (("optimizer", STATE_BYTES), ("kernels", KERNELS), ("fit", FITS), ("precision", PRECISIONS))
        for option, names in choices:
            value = getattr(self, option)
            if value is not None and value not in names:
                raise UsageError(f"--{option} {value!r}.{did_you_mean(value, names)} Available: {', '.join(names)}.")
        if self.block_size < 2:
            raise UsageError(f"--block_size is {self.block_size}: a row needs at least 2 tokens.")
        if self.device.is_cpu and self.gpus > 1:
            raise UsageError(f"--gpus is {self.gpus} on a CPU: name a GPU with --device.")

    @property
    def price(self) -> float | None:
        """Dollars per hour of all devices."""
        price = self.dollars_per_hour or self.device.dollars_per_hour
        return price * self.gpus if price else None

    @property
    def setup(self) -> Setup:
        return Setup(
            device=self.device,
            gpus=self.gpus,
            precision=self.precision or self.device.precision,
            vocabulary=self.vocabulary,
            block_size=self.block_size,
            optimizer=self.optimizer,
            kernels=self.kernels or ("eager" if self.device.is_cpu else "compiled"),  # the defaults of pretraining
            gradient_checkpointing=self.gradient_checkpointing,
            mfu=self.mfu,
        )

    @property
    def budget(self) -> str:
        """The budget and the devices in words."""
        devices = f"{self.gpus} x {self.device.name}" if self.gpus > 1 else f"one {self.device.name}"
        if self.money:
            return f"${self.money:,.2f} on {devices}"
        if self.hours:
            return f"{self.hours:g} hours on {devices}"
        return f"{self.flops:.3g} FLOPs on {devices}" if self.flops else f"{self.tokens:,.0f} tokens on {devices}"

    def affordable_tokens(self, setup: Setup, shape: Shape, seconds_per_token: float) -> float:
        """The number of tokens that the budget pays for; infinity without a budget.

        Raises:
            UsageError: the budget is money and the device has no price.
        """
        if self.flops:
            return self.flops / setup.flops(shape)
        hours = self.hours
        if self.money:
            if not self.price:
                raise UsageError(
                    f"{self.device.name} has no price: give --dollars_per_hour, or name a device that has one, as in "
                    "--device H100."
                )
            hours = self.money / self.price
        return hours / compute_hours(1, seconds_per_token) if hours else math.inf


def _check_positive(option: str, value: float | None, most: float = math.inf) -> None:
    if value is not None and not (0 < value <= most and math.isfinite(value)):
        allowed = "a share above 0, at most 1" if most == 1 else "a positive, finite number"
        raise UsageError(f"--{option} is {value}: give {allowed}.")


@dataclass(frozen=True)
class Plan:
    """A run that its budget pays for.

    `seconds_per_token` is for all devices together. `hours` includes the time outside of training steps.
    """

    request: Request
    setup: Setup
    shape: Shape
    tokens: int
    global_batch_tokens: int
    micro_batch: int
    seconds_per_token: float
    notes: tuple[str, ...] = field(default=())

    @property
    def parameters(self) -> int:
        """N in the scaling laws and in the FLOP count."""
        return count_scaling_parameters(self.shape, self.setup.vocabulary)

    @property
    def size(self) -> str:
        return format_size(self.shape)

    @property
    def steps(self) -> int:
        return self.tokens // self.global_batch_tokens

    @property
    def accumulation(self) -> int:
        """Micro-batches per step on each device."""
        return self.global_batch_tokens // (self.micro_batch * self.setup.block_size * self.setup.gpus)

    @property
    def flops(self) -> float:
        return self.setup.flops(self.shape) * self.tokens

    @property
    def mfu(self) -> float:
        return compute_mfu(self.setup, self.shape, self.seconds_per_token)

    @property
    def hours(self) -> float:
        return compute_hours(self.tokens, self.seconds_per_token)

    @property
    def money(self) -> float | None:
        return self.hours * self.request.price if self.request.price else None

    @property
    def fit(self) -> Fit:
        return FITS[self.request.fit]

    @property
    def fitted_loss(self) -> float:
        """The loss by the scaling law, in nats per token. For a tiny run, it exceeds that of random guessing."""
        return self.fit.loss(self.parameters, self.tokens)

    @property
    def loss(self) -> float:
        """The fitted loss, but never more than ln V, the loss of a model that considers all V tokens equally likely."""
        return min(self.fitted_loss, math.log(self.setup.vocabulary))

    @property
    def is_out_of_reach(self) -> bool:
        """Whether the scaling law predicts a higher loss than random guessing: it does not hold for such a run."""
        return self.loss < self.fitted_loss

    @property
    def is_extrapolated(self) -> bool:
        """Whether the model or the number of tokens is smaller than any that the scaling laws were fitted on."""
        return self.parameters < FITTED_FROM[0] or self.tokens < FITTED_FROM[1]

    @property
    def memory(self) -> dict[str, float]:
        return estimate_memory(self.setup, self.shape, self.micro_batch, accumulates=self.accumulation > 1)

    @property
    def affordable_tokens(self) -> float:
        return self.request.affordable_tokens(self.setup, self.shape, self.seconds_per_token)

    def with_note(self, note: str) -> "Plan":
        return replace(self, notes=(*self.notes, note))


def compute_hours(tokens: float, seconds_per_token: float) -> float:
    """The duration of a run in hours, including the time outside of training steps."""
    return tokens * seconds_per_token * (1 + OUTSIDE_STEPS) / 3600


@dataclass(frozen=True)
class DoesNotFit:
    """A shape that does not fit into memory with a micro-batch of one row, or with the requested one (`reason`)."""

    shape: Shape
    reason: str = ""


def make_plan(request: Request, measured: float | None = None) -> Plan:
    """Plans a run.

    Args:
        measured: measured seconds per token of the requested size on all devices together; None to estimate them.

    Raises:
        UsageError: the run is too expensive or does not fit into memory. The message says what would be possible.
    """
    if not request.size:
        return _choose_size(request)
    plan = _plan_shape(request, parse_shape(request.size), measured)
    if isinstance(plan, DoesNotFit):
        raise UsageError(_explain_memory(request, plan))
    if request.tokens and plan.tokens > plan.affordable_tokens:
        raise UsageError(_explain_price(plan))
    plan = _add_extrapolation_note(_check_steps(plan))
    return plan if request.tokens or measured else _add_better_size_note(plan)


def compare_fits(request: Request) -> dict[str, Plan]:
    """{name of a fit: the plan according to this fit}."""
    return {name: make_plan(replace(request, fit=name)) for name in FITS}


def iterate_plans(request: Request) -> Iterator[Plan | DoesNotFit]:
    """Yields a plan for every affordable shape, from small to large; ends with a DoesNotFit if memory is the limit."""
    for shape in list_shapes():
        plan = _plan_shape(request, shape)
        if isinstance(plan, DoesNotFit):
            yield plan
            return
        if plan.steps < MIN_STEPS or plan.tokens > plan.affordable_tokens * (1 + 1e-9):
            return
        yield plan


def _choose_size(request: Request) -> Plan:
    """The plan with the lowest predicted loss over all shapes."""
    candidates = list(iterate_plans(request))
    fitting = [plan for plan in candidates if isinstance(plan, Plan)]
    if not fitting:
        smallest = _plan_shape(request, list_shapes()[0])
        if isinstance(smallest, DoesNotFit):
            raise UsageError(_explain_memory(request, smallest))
        if request.tokens:
            raise UsageError(_explain_price(smallest))
        return _check_steps(smallest)
    best = min(fitting, key=lambda plan: plan.fitted_loss)
    too_large = candidates[-1]
    if best is fitting[-1] and isinstance(too_large, DoesNotFit) and not request.tokens:
        reason = too_large.reason
        if not reason:
            savers = find_memory_savers(request.setup, too_large.shape)
            remedy = f" (it would with {' or with '.join(savers)})" if savers else ""
            reason = f"{format_size(too_large.shape)} does not fit into {request.device.name}'s memory{remedy}."
        best = best.with_note(f"A larger model would have a lower loss, but {reason}")
    return _add_extrapolation_note(best)


def _plan_shape(request: Request, shape: Shape, measured: float | None = None) -> Plan | DoesNotFit:
    """The plan for a shape, with the requested number of tokens, or else as many as the budget pays for."""
    setup = replace(request.setup, seconds_per_token=measured)
    limit = request.micro_batch or MICRO_BATCH_TOKENS[setup.device.is_cpu] // setup.block_size
    batch = request.global_batch_tokens or GLOBAL_BATCH_TOKENS
    for _ in range(2):  # the batch depends on the tokens, which in turn depend slightly on the speed with this batch
        rows = _choose_rows(request, batch)
        micro_batch = find_largest_micro_batch(setup, shape, rows, limit)
        if not micro_batch:
            return DoesNotFit(shape)
        seconds = estimate_seconds_per_token(setup, shape, micro_batch, rows * setup.block_size * setup.gpus)
        tokens = request.tokens or request.affordable_tokens(setup, shape, seconds)
        batch = request.global_batch_tokens or _choose_batch_tokens(request, tokens)
    if request.micro_batch and rows % request.micro_batch:
        raise UsageError(
            f"--micro_batch {request.micro_batch} does not divide the {rows} rows that a device reads per step: "
            "change it or --global_batch_tokens."
        )
    if request.micro_batch and micro_batch != request.micro_batch:
        reason = (
            f"--micro_batch {request.micro_batch} of {format_size(shape)} does not fit into {request.device.name}'s "
            f"memory: at most {micro_batch} does."
        )
        return DoesNotFit(shape, reason)
    batch = rows * setup.block_size * setup.gpus
    return Plan(request, setup, shape, int(tokens // batch * batch), batch, micro_batch, seconds)


def _choose_rows(request: Request, batch_tokens: int) -> int:
    """Rows that one device reads per step: a power of two, unless the request fixes the batch or the micro-batch."""
    unit = request.block_size * request.gpus
    if request.global_batch_tokens and batch_tokens % unit:
        raise UsageError(
            f"--global_batch_tokens {batch_tokens:,} is not a multiple of block size {request.block_size} x "
            f"{request.gpus} devices = {unit:,}: the nearest multiples are {max(1, batch_tokens // unit) * unit:,} and "
            f"{(batch_tokens // unit + 1) * unit:,}."
        )
    rows = max(1, batch_tokens // unit)
    if request.global_batch_tokens:
        return rows
    if request.micro_batch:
        return max(1, rows // request.micro_batch) * request.micro_batch
    return 2 ** int(math.log2(rows))


def _choose_batch_tokens(request: Request, tokens: float) -> int:
    """GPT-3's batch, halved until the run has at least TARGET_STEPS steps."""
    batch = GLOBAL_BATCH_TOKENS
    while batch > request.block_size * request.gpus and tokens / batch < TARGET_STEPS:
        batch //= 2
    return batch


def _check_steps(plan: Plan) -> Plan:
    if plan.steps < MIN_STEPS:
        raise UsageError(
            f"{plan.request.budget} pays for {plan.tokens:,} tokens of {plan.size}, which is {plan.steps} steps of "
            f"{plan.global_batch_tokens:,} tokens: too few. Give a larger budget, a smaller --size, or a smaller "
            "--global_batch_tokens."
        )
    return plan


def _add_extrapolation_note(plan: Plan) -> Plan:
    if plan.is_out_of_reach:
        return plan.with_note(
            f"The scaling law does not reach this run: its {plan.fitted_loss:.1f} nats/token are more than ln V = "
            f"{plan.loss:.1f}, the loss of guessing among {plan.setup.vocabulary:,} tokens. What the run will reach is "
            "unknown; a larger budget or a smaller --vocabulary comes closer to what was fitted."
        )
    if not plan.is_extrapolated:
        return plan
    return plan.with_note(
        f"The fits are based on models from {FITTED_FROM[0] / 1e6:.0f}M parameters and {FITTED_FROM[1] / 1e9:.0f}B "
        "tokens up. Here they are extrapolated: use the loss to compare plans, not as a prediction."
    )


def _add_better_size_note(plan: Plan) -> Plan:
    """Adds a note on the best size for the budget if its loss is much lower than that of the requested size."""
    request = replace(plan.request, size=None, micro_batch=None)
    others = [other for other in iterate_plans(request) if isinstance(other, Plan)]
    best = min(others, key=lambda other: other.loss, default=plan)
    if best.loss > plan.loss - NOTABLE_LOSS:
        return plan
    return plan.with_note(
        f"By the {plan.fit.name} fit, {best.size} on {best.tokens:,} tokens would reach a loss of {best.loss:.2f} with "
        f"the same budget; {plan.size} reaches {plan.loss:.2f}."
    )


def _explain_price(plan: Plan) -> str:
    """Says why the requested number of tokens is too expensive, and which model could be trained on it."""
    price = f" (${plan.money:,.2f})" if plan.money else ""
    others = [other for other in iterate_plans(replace(plan.request, size=None)) if isinstance(other, Plan)]
    remedy = "no model fits them: give fewer tokens"
    if others:
        remedy = f"the largest model that fits them is {others[-1].size}"
    return (
        f"{plan.size} on {plan.request.tokens:,.0f} tokens needs {plan.flops:.3g} FLOPs, {plan.hours:,.3g} hours{price}"
        f"; {plan.request.budget} pays for {plan.affordable_tokens:,.3g} tokens of it, and {remedy}."
    )


def _explain_memory(request: Request, too_large: DoesNotFit) -> str:
    """Says why a shape does not fit into memory, and what would fit."""
    if too_large.reason:
        return too_large.reason
    setup = request.setup
    need = sum(estimate_memory(setup, too_large.shape, 1).values())
    savers = find_memory_savers(setup, too_large.shape)
    remedy = "Neither --gradient_checkpointing nor adamw_8bit is enough"
    if savers:
        remedy = f"It fits with {' or with '.join(savers)}"
    fitting = [shape for shape in list_shapes() if find_largest_micro_batch(setup, shape, 1, 1)]
    largest = f"the largest that fits now is {format_size(fitting[-1])}" if fitting else "no shape fits now"
    return (
        f"{format_size(too_large.shape)} needs {need / 1e9:.1f} GB for a micro-batch of one row of {setup.block_size} "
        f"tokens; {setup.device.name} has {setup.memory_bytes / 1e9:.1f} GB. {remedy}; {largest}."
    )
