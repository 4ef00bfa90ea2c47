"""A request -> a plan, or one line that says what would fit."""

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
    largest_micro_batch,
    memory,
    mfu,
    seconds_per_token,
    total,
    what_helps,
)
from rorchat.plan.scaling import FITS, Fit, family, size_name

GLOBAL_BATCH_TOKENS = 524_288  # GPT-3's for its smallest model, and every reproduction of GPT-2's
FEWEST_STEPS = 2_000  # a short run takes smaller batches, so that it still has so many steps
SHORTEST_RUN = 100  # steps: what is shorter is no training
FITTED = (70e6, 5e9)  # parameters and tokens of the smallest models that the fits saw (Hoffmann et al. 2022, abstract)
WORTH_SAYING = 0.05  # nats: by so much another size must be better to be named
MICRO_BATCH_TOKENS = {True: 8_192, False: 65_536}  # on a CPU, on a GPU: more do not make it faster


@dataclass(frozen=True)
class Request:
    """What is wanted: one budget (dollars, hours or FLOPs), with or without a size or tokens; or a size and tokens."""

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

    def __post_init__(self):
        self._check_budget()
        for option in ("money", "hours", "flops", "tokens", "mfu", "dollars_per_hour"):
            _positive(option, getattr(self, option), 1.0 if option == "mfu" else math.inf)
        for option in ("gpus", "vocabulary", "block_size", "global_batch_tokens", "micro_batch"):
            _positive(option, getattr(self, option))
        known = (("optimizer", STATE_BYTES), ("kernels", KERNELS), ("fit", FITS), ("precision", PRECISIONS))
        for option, names in known:
            value = getattr(self, option)
            if value is not None and value not in names:
                raise UsageError(f"--{option} {value!r}.{did_you_mean(value, names)} Known: {', '.join(names)}.")
        if self.block_size < 2:
            raise UsageError(f"--block-size is {self.block_size}: a row needs at least 2 tokens.")
        if self.device.is_cpu and self.gpus > 1:
            raise UsageError(f"--gpus is {self.gpus} on a CPU: name a GPU with --device.")

    def _check_budget(self) -> None:
        given = [name for name in ("money", "hours", "flops") if getattr(self, name) is not None]
        if len(given) > 1:
            raise UsageError(f"--{given[0]} and --{given[1]} are two budgets: give one.")
        if not given and not (self.tokens is not None and self.size):
            raise UsageError("No budget: give --money DOLLARS, --hours H or --flops F, or --size with --tokens.")

    @property
    def price(self) -> float | None:
        """Dollars for an hour of all devices."""
        each = self.dollars_per_hour or self.device.dollars_per_hour
        return each * self.gpus if each else None

    @property
    def setup(self) -> Setup:
        return Setup(
            device=self.device,
            gpus=self.gpus,
            precision=self.precision or self.device.precision,
            vocabulary=self.vocabulary,
            block_size=self.block_size,
            optimizer=self.optimizer,
            kernels=self.kernels or ("eager" if self.device.is_cpu else "compiled"),  # as pretraining decides
            gradient_checkpointing=self.gradient_checkpointing,
            mfu=self.mfu,
        )


def _positive(option: str, value: float | None, most: float = math.inf) -> None:
    if value is not None and not (0 < value <= most and math.isfinite(value)):
        allowed = "a share above 0, at most 1" if most == 1 else "a positive, finite number"
        raise UsageError(f"--{option.replace('_', '-')} is {value}: give {allowed}.")


@dataclass(frozen=True)
class Plan:
    """A run that its budget pays for. `seconds_per_token` is over all devices; `hours` adds what lies between steps."""

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
        """N, as the fits and the FLOPs count it."""
        return count_scaling_parameters(self.shape, self.setup.vocabulary)

    @property
    def size(self) -> str:
        return size_name(self.shape)

    @property
    def steps(self) -> int:
        return self.tokens // self.global_batch_tokens

    @property
    def accumulation(self) -> int:
        return self.global_batch_tokens // (self.micro_batch * self.setup.block_size * self.setup.gpus)

    @property
    def flops(self) -> float:
        return self.setup.flops(self.shape) * self.tokens

    @property
    def mfu(self) -> float:
        return mfu(self.setup, self.shape, self.seconds_per_token)

    @property
    def hours(self) -> float:
        return hours_of(self.tokens, self.seconds_per_token)

    @property
    def money(self) -> float | None:
        return self.hours * self.request.price if self.request.price else None

    @property
    def fit(self) -> Fit:
        return FITS[self.request.fit]

    @property
    def loss(self) -> float:
        return self.fit.loss(self.parameters, self.tokens)

    @property
    def is_extrapolated(self) -> bool:
        """Whether the fits saw no model so small or tokens so few."""
        return self.parameters < FITTED[0] or self.tokens < FITTED[1]

    @property
    def memory(self) -> dict[str, float]:
        return memory(self.setup, self.shape, self.micro_batch, accumulates=self.accumulation > 1)


def hours_of(tokens: float, seconds: float) -> float:
    """Hours that tokens take at so many seconds each in steps, and the time outside of steps."""
    return tokens * seconds * (1 + OUTSIDE_STEPS) / 3600


def make_plan(request: Request, measured: float | None = None) -> Plan:
    """The plan of a request.

    Args:
        measured: seconds per token of the request's size, over all devices, in place of the model of speed.

    Raises:
        UsageError: the budget buys no such run, or it does not fit into memory; says what would.
    """
    if not request.size:
        return _best_plan(request)
    plan = _plan(request, parse_shape(request.size), measured)
    if isinstance(plan, _TooLarge):
        raise UsageError(_no_memory(request, plan))
    if request.tokens and plan.tokens > _affordable(request, plan):
        raise UsageError(_too_dear(request, plan))
    plan = _with_notes(_long_enough(plan))
    return plan if request.tokens or measured else _with_better_size(plan)


def _with_better_size(plan: Plan) -> Plan:
    """The plan of a size that was asked for, with a note where the same budget buys much less loss with another."""
    # of whatever micro-batch fits it: that changes the speed a little
    free = replace(plan.request, size=None, micro_batch=None)
    others = [other for other in plans(free) if isinstance(other, Plan)]
    best = min(others, key=lambda other: other.loss, default=plan)
    if best.loss > plan.loss - WORTH_SAYING:
        return plan
    note = (
        f"By the {plan.fit.name} fit, {best.size} on {best.tokens:,} tokens would end at a loss of {best.loss:.2f} for "
        f"the same budget, {plan.size} at {plan.loss:.2f}."
    )
    return replace(plan, notes=(*plan.notes, note))


def choices(request: Request) -> dict[str, Plan]:
    """What each fit would choose, by its name."""
    return {name: make_plan(replace(request, fit=name)) for name in FITS}


def _with_notes(plan: Plan) -> Plan:
    if not plan.is_extrapolated:
        return plan
    note = (
        f"The fits saw models from {FITTED[0] / 1e6:.0f}M parameters and {FITTED[1] / 1e9:.0f}B tokens up: here they "
        "are extrapolated, and their loss is a way to compare choices, no forecast."
    )
    return replace(plan, notes=(*plan.notes, note))


@dataclass(frozen=True)
class _TooLarge:
    """One row of this shape does not fit into memory, or the micro-batch that was asked for; then `says` what does."""

    shape: Shape
    says: str = ""


def _plan(request: Request, shape: Shape, measured: float | None = None) -> Plan | _TooLarge:
    """The plan for a shape, with the tokens asked for or else those the budget buys."""
    setup = replace(request.setup, seconds_per_token=measured)
    tokens, batch = request.tokens, request.global_batch_tokens or GLOBAL_BATCH_TOKENS
    for _ in range(2):  # the batch depends on the tokens, and through the speed a little on the batch
        rows = _rows(request, batch)
        most = request.micro_batch or MICRO_BATCH_TOKENS[setup.device.is_cpu] // setup.block_size
        micro_batch = largest_micro_batch(setup, shape, rows, most)
        if not micro_batch:
            return _TooLarge(shape)
        seconds = seconds_per_token(setup, shape, micro_batch, rows * setup.block_size * setup.gpus)
        bought = request.tokens or _buys(request, setup, shape, seconds)
        tokens = bought
        batch = request.global_batch_tokens or _batch(request, bought)
    if request.micro_batch and rows % request.micro_batch:
        raise UsageError(
            f"--micro-batch {request.micro_batch} does not divide the {rows} rows that a device reads in a step: "
            "change it or --global-batch-tokens."
        )
    if request.micro_batch and micro_batch != request.micro_batch:
        device = request.device.name
        return _TooLarge(
            shape,
            f"--micro-batch {request.micro_batch} of {size_name(shape)} does not fit into {device}'s memory: at most "
            f"{micro_batch} does.",
        )
    batch = rows * setup.block_size * setup.gpus
    return Plan(request, setup, shape, int(tokens // batch * batch), batch, micro_batch, seconds)


def _rows(request: Request, batch: int) -> int:
    """Rows a device reads in a step."""
    each = request.block_size * request.gpus
    if request.global_batch_tokens and batch % each:
        raise UsageError(
            f"--global-batch-tokens {batch:,} is no multiple of block size {request.block_size} x {request.gpus} "
            f"devices = {each:,}: the nearest that fit are {max(1, batch // each) * each:,} and "
            f"{(batch // each + 1) * each:,}."
        )
    rows = max(1, batch // each)
    if request.global_batch_tokens:
        return rows
    if request.micro_batch:
        return max(1, rows // request.micro_batch) * request.micro_batch
    return 2 ** int(math.log2(rows))


def _batch(request: Request, tokens: float) -> int:
    """GPT-3's batch, halved until the run has enough steps."""
    batch = GLOBAL_BATCH_TOKENS
    while batch > request.block_size * request.gpus and tokens / batch < FEWEST_STEPS:
        batch //= 2
    return batch


def _buys(request: Request, setup: Setup, shape: Shape, seconds: float) -> float:
    """Tokens that the budget pays for at so many seconds each."""
    if request.flops:
        return request.flops / setup.flops(shape)
    hours = request.hours
    if request.money:
        if not request.price:
            raise UsageError(
                f"{request.device.name} has no price: give --dollars-per-hour, or name a device that has one, as in "
                "--device H100."
            )
        hours = request.money / request.price
    return hours / hours_of(1, seconds)


def _affordable(request: Request, plan: Plan) -> float:
    if not (request.money or request.hours or request.flops):
        return math.inf
    return _buys(request, plan.setup, plan.shape, plan.seconds_per_token)


def _long_enough(plan: Plan) -> Plan:
    if plan.steps < SHORTEST_RUN:
        raise UsageError(
            f"{_budget(plan.request)} buys {plan.tokens:,} tokens of {plan.size}, {plan.steps} steps of "
            f"{plan.global_batch_tokens:,}: too few to train on. Give more, a smaller --size, or a smaller "
            "--global-batch-tokens."
        )
    return plan


def plans(request: Request) -> Iterator[Plan | _TooLarge]:
    """A plan for every shape of the family that the budget can train on the tokens asked for, small to large."""
    for shape in family():
        plan = _plan(request, shape)
        if isinstance(plan, _TooLarge):
            yield plan
            return  # nor does a larger one fit
        if plan.steps < SHORTEST_RUN or plan.tokens > _affordable(request, plan) * (1 + 1e-9):
            return
        yield plan


def _best_plan(request: Request) -> Plan:
    found = list(plans(request))
    fitting = [plan for plan in found if isinstance(plan, Plan)]
    if not fitting:
        smallest = _plan(request, family()[0])
        if isinstance(smallest, _TooLarge):
            raise UsageError(_no_memory(request, smallest))
        if request.tokens:
            raise UsageError(_too_dear(request, smallest))
        return _long_enough(smallest)
    best = min(fitting, key=lambda plan: plan.loss)
    if best is fitting[-1] and isinstance(found[-1], _TooLarge) and not request.tokens:
        best = replace(best, notes=(f"A larger model would have the lower loss, but {_why_not(request, found[-1])}",))
    return _with_notes(best)


def _why_not(request: Request, large: _TooLarge) -> str:
    if large.says:
        return large.says
    helps = what_helps(request.setup, large.shape)
    more = f" ({' or '.join(helps)} would let it)" if helps else ""
    return f"{size_name(large.shape)} does not fit into {request.device.name}'s memory{more}."


def _budget(request: Request) -> str:
    who = f"{request.gpus} x {request.device.name}" if request.gpus > 1 else f"one {request.device.name}"
    for value, said in (
        (request.money, "${:,.2f}"),
        (request.hours, "{:g} hours"),
        (request.flops, "{:.3g} FLOPs"),
    ):
        if value:
            return f"{said.format(value)} on {who}"
    return f"{request.tokens:,.0f} tokens on {who}"


def _too_dear(request: Request, plan: Plan) -> str:
    price = f" (${plan.money:,.2f})" if plan.money else ""
    needs = f"{plan.flops:.3g} FLOPs, {plan.hours:,.3g} hours{price}"
    buys = _affordable(request, plan)
    largest = [other for other in plans(replace(request, size=None)) if isinstance(other, Plan)]
    fits = (
        f"the largest model that fits them is {largest[-1].size}"
        if largest
        else "no model fits them: give fewer tokens"
    )
    return (
        f"{plan.size} on {request.tokens:,.0f} tokens needs {needs}; {_budget(request)} buys {buys:,.3g} tokens of it, "
        f"and {fits}."
    )


def _no_memory(request: Request, large: _TooLarge) -> str:
    if large.says:
        return large.says
    setup = request.setup
    need = total(memory(setup, large.shape, 1))
    helps = what_helps(setup, large.shape)
    fitting = [shape for shape in family() if largest_micro_batch(setup, shape, 1, 1)]
    remedy = (
        f"It fits with {' or with '.join(helps)}" if helps else "Neither --gradient-checkpointing nor adamw_8bit helps"
    )
    largest = f"; as it is, the largest that fits is {size_name(fitting[-1])}" if fitting else "; no shape fits"
    return (
        f"{size_name(large.shape)} needs {need / 1e9:.1f} GB at a micro-batch of one row of {setup.block_size} tokens; "
        f"{setup.device.name} has {setup.device.memory_bytes / 1e9:.1f} GB. {remedy}{largest}."
    )
