"""A plan for people: a table, its assumptions in words, the YAML of the run, and a picture."""

from pathlib import Path

from rorchat.model import count_parameters, count_scaling_parameters
from rorchat.plan.budget import OUTSIDE_STEPS, Plan, Request, choices
from rorchat.plan.cost import BANDWIDTH_SHARE, COMPILED_TRAFFIC, PARALLEL_SHARE, total
from rorchat.plan.probe import Probe
from rorchat.plan.scaling import family

GPT2_VOCABULARIES = (50_257, 50_304)
BUDGETS = (0.1, 0.22, 0.46, 1.0, 2.2, 4.6, 10.0)  # times the chosen one, for the picture
UNSTEADY = 0.3  # of the median: so much spread makes a measurement worth repeating
POINTS = 5  # of each curve in the picture, at least


def amount(number: float) -> str:
    """A count as people write it: 51.5M, 1.10B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.0f}"


def duration(hours: float) -> str:
    """Hours as people say them: 42 s, 3.5 min, 3.5 h, 12 days."""
    if hours < 1:
        return f"{hours * 3600:.0f} s" if hours < 1 / 60 else f"{hours * 60:.1f} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"


def plan_rows(plan: Plan) -> list[list[str]]:
    """What, how much, and where it comes from."""
    setup, request = plan.setup, plan.request
    shape, count = plan.shape, count_parameters(plan.shape, setup.vocabulary, setup.block_size)
    devices = f"{setup.gpus} x {setup.device.name}" if setup.gpus > 1 else setup.device.name
    memory = plan.memory
    rows = [
        ["model", plan.size, f"{shape.n_layer} layers, {shape.n_head} heads, {shape.n_embd} wide"],
        ["parameters", amount(count), f"with {setup.vocabulary:,} tokens (tied) and {setup.block_size:,} positions"],
        ["tokens", amount(plan.tokens), f"{plan.tokens / plan.parameters:.1f} a parameter"],
        ["compute", f"{plan.flops:.3g} FLOPs", f"{setup.flops(shape) / 1e6:,.1f} MFLOP a token: 6 N + 12 L d T"],
        [
            "loss, by the fit",
            f"{plan.loss:.3f} nats/token",
            f"{plan.fit.name}; of the text it was fitted on, not of yours",
        ],
        ["step", f"{plan.global_batch_tokens:,} tokens", f"{plan.steps:,} of them"],
        [
            "micro-batch",
            f"{plan.micro_batch} x {setup.block_size:,}",
            f"{plan.accumulation} accumulated on {devices}",
        ],
        [
            "speed",
            f"{amount(1 / plan.seconds_per_token)} tokens/s",
            f"{100 * plan.mfu:.1f} % of {setup.gpus * setup.peak / 1e12:,.4g} TFLOP/s in {setup.precision}, "
            f"{_speed_source(plan)}",
        ],
        ["time", duration(plan.hours), f"with {100 * OUTSIDE_STEPS:.0f} % outside of steps"],
        [
            "money",
            f"${plan.money:,.2f}" if plan.money else "no price",
            f"${request.price:,.2f} an hour" if request.price else "give --dollars-per-hour",
        ],
        [
            "memory",
            f"{total(memory) / 1e9:.2f} GB",
            f"of {setup.device.memory_bytes / 1e9:.1f} GB; optimizer: {setup.optimizer}",
        ],
    ]
    return rows + [[f"- {part}", f"{size / 1e9:.2f} GB", ""] for part, size in memory.items()]


def _speed_source(plan: Plan) -> str:
    if plan.setup.seconds_per_token:
        return "measured"
    return "as given by --mfu" if plan.setup.mfu else f"assumed, {plan.setup.kernels} kernels"


def assumptions(plan: Plan, probed: Probe | None = None) -> list[str]:
    """Every assumption that the figures rest on, a line each."""
    setup, device = plan.setup, plan.setup.device
    said = [f"Fit: {plan.fit.name}, {plan.fit.source}."]
    if probed:
        said.append(
            f"Speed: measured here, {probed.micro_step:.3g} s for {probed.micro_batch} x {setup.block_size} tokens, "
            f"forward and backward (median of 3, spread {probed.spread:.2g} s), {probed.update:.3g} s a step."
        )
        if probed.spread > UNSTEADY * probed.micro_step:
            said.append("The machine was not steady while that was measured: probe again when nothing else runs.")
    elif setup.mfu:
        said.append(f"Speed: MFU {setup.mfu:g}, as given.")
    else:
        peak = "from its data sheet" if device.peak_flops.get(setup.precision) else "measured here"
        said.append(
            f"Speed: products at {device.matmul_share:g} of {setup.peak / 1e12:,.4g} TFLOP/s "
            f"({setup.precision}, {peak}), the rest at "
            f"{BANDWIDTH_SHARE:g} of {setup.bandwidth / 1e9:,.0f} GB/s"
            + (f", with {COMPILED_TRAFFIC:g} of the eager bytes" if setup.kernels == "compiled" else "")
            + ". An assumption, docs/planning.md has its grounds; --probe measures, --mfu replaces it."
        )
    if setup.gpus > 1:
        said.append(
            "Several GPUs: every one as fast as the one that was measured."
            if probed
            else f"Several GPUs: {PARALLEL_SHARE:g} of {setup.gpus} times one, in one machine."
        )
    if plan.money:
        own = plan.request.dollars_per_hour
        said.append(
            f"Price: {'as given' if own else 'an example from the table of devices; --dollars-per-hour replaces it'}."
        )
    return [*said, *plan.notes]


def fit_lines(request: Request) -> list[str]:
    """What each fit would choose for the budget, a line each."""
    return [
        f"{name}: {plan.size} ({amount(plan.parameters)}) on {amount(plan.tokens)} tokens"
        + (", this plan" if name == request.fit else "")
        for name, plan in choices(request).items()
    ]


def as_yaml(plan: Plan) -> str:
    """The config of `recipes/pretrain.py`; its sources and its tokenizer are to be filled in."""
    setup = plan.setup
    devices = f" x {setup.gpus} devices" if setup.gpus > 1 else ""
    gpt2 = setup.vocabulary in GPT2_VOCABULARIES
    lines = [
        f"# {amount(count_parameters(plan.shape, setup.vocabulary, setup.block_size))} parameters on "
        f"{amount(plan.tokens)} tokens: planned for {setup.gpus} x {setup.device.name}, {duration(plan.hours)}"
        + (f", ${plan.money:,.2f}." if plan.money else "."),
        f"# tokens per step: {plan.micro_batch} rows x {setup.block_size:,} tokens x {plan.accumulation} accumulated"
        f"{devices} = {plan.global_batch_tokens:,};  x {plan.steps:,} steps = {amount(plan.tokens)} tokens",
        "sources: [text=my_texts/] # yours: `rorchat data list`, or a mixture file in its place",
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


def draw(plan: Plan, path: Path) -> None:
    """Loss against parameters for budgets around the plan's: the minimum of each, and what was chosen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    curves = [(plan.flops * times, _curve(plan, plan.flops * times)) for times in BUDGETS]
    lowest = [min(points, key=lambda point: point[1]) for _, points in curves]
    figure, axis = pyplot.subplots(figsize=(9, 5.4), constrained_layout=True)
    colours = pyplot.get_cmap("viridis")
    for number, (flops, points) in enumerate(curves):
        own = flops == plan.flops
        # what lies far from the minimum would only flatten the others, but a curve has some points
        reach = max(lowest[number][1] * 1.12, sorted(loss for _, loss in points)[POINTS - 1])
        near = [point for point in points if point[1] <= reach]
        axis.plot(
            *zip(*near, strict=True),
            color=colours(0.9 * number / (len(curves) - 1)),
            linewidth=2.6 if own else 1.3,
            marker="o",
            markersize=3,
            label=f"{flops:.2g} FLOPs" + (": this budget" if own else ""),
        )
    axis.plot(*zip(*lowest, strict=True), "k--", linewidth=1, marker="v", markersize=7, label="lowest of each budget")
    told = f"{plan.size}: {amount(plan.parameters)} parameters,\n{amount(plan.tokens)} tokens, loss {plan.loss:.2f}"
    axis.plot(
        plan.parameters, plan.loss, "*", color="tab:red", markersize=18, markeredgecolor="white", label=told, zorder=5
    )
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="parameters N (body and tied head)",
        ylabel="loss by the fit, nats/token" + (" (extrapolated: no forecast)" if plan.is_extrapolated else ""),
    )
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: amount(value)))
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


def _curve(plan: Plan, flops: float) -> list[tuple[float, float]]:
    """(parameters, loss) of every shape of the family at a budget, from its real FLOPs."""
    vocabulary = plan.setup.vocabulary
    counts = [(count_scaling_parameters(shape, vocabulary), plan.setup.flops(shape)) for shape in family()]
    return [(count, plan.fit.loss(count, flops / each)) for count, each in counts]
