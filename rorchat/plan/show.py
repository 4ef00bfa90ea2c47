"""A plan as a table, its assumptions in words, the YAML of the run, and a figure of IsoFLOP curves."""

import math
from pathlib import Path

from rorchat.model import count_parameters, count_scaling_parameters
from rorchat.plan.budget import OUTSIDE_STEPS, Plan, Request, compare_fits
from rorchat.plan.cost import (
    BANDWIDTH_SHARE,
    COMPILED_TRAFFIC,
    EVALUATIONS,
    FORWARD_SHARE,
    PARALLEL_SHARE,
    count_validation_tokens,
)
from rorchat.plan.probe import Probe
from rorchat.plan.scaling import list_shapes

GPT2_VOCABULARIES = (50_257, 50_304)
BUDGETS = (0.1, 0.22, 0.46, 1.0, 2.2, 4.6, 10.0)  # of the curves in the figure, relative to the plan's
MAX_SPREAD = 0.3  # of the median, above which a measurement should be repeated
MIN_POINTS = 5  # of each curve in the figure


def format_count(number: float) -> str:
    """A count with three digits: 51.5M, 1.1B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.0f}"


def format_duration(hours: float) -> str:
    """Hours in a readable unit: 42 s, 3.5 min, 3.5 h, 12 days."""
    if hours < 1:
        return f"{hours * 3600:.0f} s" if hours < 1 / 60 else f"{hours * 60:.1f} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"


def build_rows(plan: Plan) -> list[list[str]]:
    """The rows of the table: quantity, value, explanation."""
    setup, request = plan.setup, plan.request
    shape, count = plan.shape, count_parameters(plan.shape, setup.vocabulary, setup.block_size)
    devices = f"{setup.gpus} x {setup.device.name}" if setup.gpus > 1 else setup.device.name
    memory, validated = plan.memory, count_validation_tokens(plan.tokens)
    rows = [
        ["model", plan.size, f"{shape.n_layer} layers, {shape.n_head} heads, {shape.n_embd} wide"],
        [
            "parameters",
            format_count(count),
            f"with {setup.vocabulary:,} tokens (tied) and {setup.block_size:,} positions",
        ],
        ["tokens", format_count(plan.tokens), f"{plan.tokens / plan.parameters:.1f} per parameter"],
        ["compute", f"{plan.flops:.3g} FLOPs", f"{setup.flops(shape) / 1e6:,.1f} MFLOP per token: 6 N + 12 L d T"],
        [
            "loss, by the fit",
            f"{plan.loss:.3f} nats/token",
            "ln V, a random guess: the fit does not reach here"
            if plan.is_out_of_reach
            else f"{plan.fit.name}; on the text it was fitted on, not on yours",
        ],
        ["step", f"{plan.global_batch_tokens:,} tokens", f"{plan.steps:,} steps"],
        [
            "micro-batch",
            f"{plan.micro_batch} x {setup.block_size:,}",
            f"{plan.accumulation} accumulated on {devices}",
        ],
        [
            "speed",
            f"{format_count(1 / plan.seconds_per_token)} tokens/s",
            f"{100 * plan.mfu:.1f} % of {setup.gpus * setup.peak / 1e12:,.4g} TFLOP/s in {setup.precision}, "
            f"{_speed_source(plan)}",
        ],
        ["time", format_duration(plan.hours), f"including {100 * OUTSIDE_STEPS:.0f} % outside of steps"],
        [
            "validation",
            f"{EVALUATIONS} x {format_count(validated)} tokens",
            f"{100 * EVALUATIONS * FORWARD_SHARE * validated / plan.tokens:.2g} % of the FLOPs, outside of steps",
        ],
        [
            "money",
            f"${plan.money:,.2f}" if plan.money else "no price",
            f"${request.price:,.2f} per hour" if request.price else "give --dollars_per_hour",
        ],
        [
            "memory",
            f"{sum(memory.values()) / 1e9:.2f} GB",
            f"of {setup.memory_bytes / 1e9:.1f} GB; optimizer: {setup.optimizer}",
        ],
    ]
    return rows + [[f"- {part}", f"{size / 1e9:.2f} GB", ""] for part, size in memory.items()]


def _speed_source(plan: Plan) -> str:
    if plan.setup.seconds_per_token:
        return "measured"
    return "from --mfu" if plan.setup.mfu else f"assumed, {plan.setup.kernels} kernels"


def list_assumptions(plan: Plan, probe: Probe | None = None) -> list[str]:
    """The assumptions behind the figures, one per line."""
    setup, device = plan.setup, plan.setup.device
    lines = [f"Fit: {plan.fit.name}, {plan.fit.source}."]
    if probe:
        lines.append(
            f"Speed: measured here, {probe.micro_step:.3g} s for {probe.micro_batch} x {setup.block_size} tokens, "
            f"forward and backward (median of 3, spread {probe.spread:.2g} s), {probe.update:.3g} s per step."
        )
        if probe.spread > MAX_SPREAD * probe.micro_step:
            lines.append("The machine was busy during the measurement: probe again when nothing else runs.")
    elif setup.mfu:
        lines.append(f"Speed: MFU {setup.mfu:g}, from --mfu.")
    else:
        peak = "from its data sheet" if device.peak_flops.get(setup.precision) else "measured here"
        lines.append(
            f"Speed: matrix products at {device.matmul_share:g} of {setup.peak / 1e12:,.4g} TFLOP/s "
            f"({setup.precision}, {peak}), the rest at "
            f"{BANDWIDTH_SHARE:g} of {setup.bandwidth / 1e9:,.0f} GB/s"
            + (f", with {COMPILED_TRAFFIC:g} of the eager bytes" if setup.kernels == "compiled" else "")
            + ". An assumption, explained in docs/planning.md; --probe measures it, --mfu replaces it."
        )
    if setup.gpus > 1:
        lines.append(
            "Several GPUs: each as fast as the measured one."
            if probe
            else f"Several GPUs: {PARALLEL_SHARE:g} of {setup.gpus} times the speed of one, in one machine."
        )
    if plan.money:
        source = "an example from the table of devices; --dollars_per_hour replaces it"
        lines.append(f"Price: {'from --dollars_per_hour' if plan.request.dollars_per_hour else source}.")
    return [*lines, *plan.notes]


def describe_fits(request: Request) -> list[str]:
    """The choice of each fit for the budget, one per line."""
    return [
        f"{name}: {plan.size} ({format_count(plan.parameters)}) on {format_count(plan.tokens)} tokens"
        + (", this plan" if name == request.fit else "")
        for name, plan in compare_fits(request).items()
    ]


def to_yaml(plan: Plan) -> str:
    """The config of `recipes/pretrain.py`; the user fills in sources and tokenizer."""
    setup = plan.setup
    devices = f" x {setup.gpus} devices" if setup.gpus > 1 else ""
    gpt2 = setup.vocabulary in GPT2_VOCABULARIES
    parameters = format_count(count_parameters(plan.shape, setup.vocabulary, setup.block_size))
    lines = [
        f"# {parameters} parameters on {format_count(plan.tokens)} tokens: planned for {setup.gpus} x "
        f"{setup.device.name}, {format_duration(plan.hours)}" + (f", ${plan.money:,.2f}." if plan.money else "."),
        f"# tokens per step: {plan.micro_batch} rows x {setup.block_size:,} tokens x {plan.accumulation} accumulated"
        f"{devices} = {plan.global_batch_tokens:,};  x {plan.steps:,} steps = {format_count(plan.tokens)} tokens",
        "sources: [text=my_texts/] # change this: see `rorchat data list`, or use a mixture file",
        "tokenizer: gpt2"
        if gpt2
        else f"tokenizer: runs/tokenizer # recipes/tokenizer.py --vocab_size {setup.vocabulary}",
        f"size: {plan.size}",
        f"block_size: {setup.block_size}",
        f"per_device_train_batch_size: {plan.micro_batch}",
        f"global_batch_tokens: {plan.global_batch_tokens}",
        f"train_tokens: {plan.tokens}",
        f"optimizer: {setup.optimizer}",
    ]
    if setup.gradient_checkpointing:
        lines.append("gradient_checkpointing: true")
    lines.append(f"compile: {str(setup.kernels == 'compiled').lower()}")
    if plan.request.precision:
        lines += [f"bf16: {str(setup.precision == 'bf16').lower()}", f"fp16: {str(setup.precision == 'fp16').lower()}"]
    return "\n".join([*lines, "output_dir: runs/pretrain", ""])


def draw_isoflop_curves(plan: Plan, path: Path) -> None:
    """Draws loss by parameters for budgets around the plan's, with the minimum of each and the plan."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    curves = [(plan.flops * times, compute_isoflop_curve(plan, plan.flops * times)) for times in BUDGETS]
    lowest = [min(points, key=lambda point: point[1]) for _, points in curves]
    figure, axis = pyplot.subplots(figsize=(9, 5.4), constrained_layout=True)
    colours = pyplot.get_cmap("viridis")
    for number, (flops, points) in enumerate(curves):
        # points far above the minimum would flatten the other curves
        reach = max(lowest[number][1] * 1.12, sorted(loss for _, loss in points)[MIN_POINTS - 1])
        near = [point for point in points if point[1] <= reach]
        axis.plot(
            *zip(*near, strict=True),
            color=colours(0.9 * number / (len(curves) - 1)),
            linewidth=2.6 if flops == plan.flops else 1.3,
            marker="o",
            markersize=3,
            label=f"{flops:.2g} FLOPs" + (": this budget" if flops == plan.flops else ""),
        )
    axis.plot(*zip(*lowest, strict=True), "k--", linewidth=1, marker="v", markersize=7, label="minimum of each budget")
    counts = f"{format_count(plan.parameters)} parameters,\n{format_count(plan.tokens)} tokens"
    label = f"{plan.size}: {counts}, loss {plan.loss:.2f}"
    axis.plot(
        plan.parameters, plan.loss, "*", color="tab:red", markersize=18, markeredgecolor="white", label=label, zorder=5
    )
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="parameters N (body and tied head)",
        ylabel="loss by the fit, nats/token" + (" (extrapolated, not a forecast)" if plan.is_extrapolated else ""),
    )
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.yaxis.set_major_locator(MaxNLocator(8))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2f}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(alpha=0.3)
    axis.set_title(
        f"IsoFLOP curves: {plan.fit.name} fit, {plan.setup.vocabulary:,} tokens, {plan.setup.block_size:,} positions"
    )
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def compute_isoflop_curve(plan: Plan, flops: float) -> list[tuple[float, float]]:
    """(parameters, loss) of every shape for a budget of FLOPs."""
    vocabulary = plan.setup.vocabulary
    counts = [(count_scaling_parameters(shape, vocabulary), plan.setup.flops(shape)) for shape in list_shapes()]
    highest = math.log(vocabulary)  # of a random guess
    return [(count, min(highest, plan.fit.loss(count, flops / per_token))) for count, per_token in counts]
