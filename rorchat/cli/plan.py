"""`rorchat plan`: from a budget to a model size, a run and its cost."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rorchat.errors import UsageError

if TYPE_CHECKING:
    from rorchat.plan.budget import Plan
    from rorchat.plan.probe import Probe


def plan(
    money: Annotated[float | None, typer.Option(help="A budget in dollars.")] = None,
    hours: Annotated[float | None, typer.Option(help="A budget in hours, of all devices together.")] = None,
    flops: Annotated[float | None, typer.Option(help="A budget in FLOPs, such as 3.2e17.")] = None,
    tokens: Annotated[float | None, typer.Option(help="Tokens to train on; with --size, no budget is needed.")] = None,
    size: Annotated[str | None, typer.Option(help="Model size: a name, or LAYERSxHEADSxWIDTH such as 8x8x512.")] = None,
    device: Annotated[str | None, typer.Option(help="T4, A100-80, H100, cpu ...; default: this machine's.")] = None,
    gpus: Annotated[int, typer.Option(help="Number of devices, in one machine.")] = 1,
    devices: Annotated[
        Path | None, typer.Option(help="A YAML file with other devices, in the format of rorchat/devices.yaml.")
    ] = None,
    dollars_per_hour: Annotated[float | None, typer.Option(help="Price of one device; default: the table's.")] = None,
    vocabulary: Annotated[int, typer.Option(help="Vocabulary size; default: GPT-2's with control tokens.")] = 50_304,
    block_size: Annotated[int, typer.Option(help="Tokens per row, and positions of the model.")] = 1024,
    global_batch_tokens: Annotated[
        int | None, typer.Option(help="Tokens per step; default: 524,288, halved until there are 2,000 steps.")
    ] = None,
    micro_batch: Annotated[
        int | None, typer.Option(help="Rows per device and forward pass; default: as many as fit.")
    ] = None,
    optimizer: Annotated[str, typer.Option(help="adamw, adamw_8bit or muon.")] = "muon",
    precision: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; default: the device's fastest.")] = None,
    kernels: Annotated[
        str | None,
        typer.Option(help="compiled (torch.compile, the default on a GPU), eager, or manual (attention without SDPA)."),
    ] = None,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Recompute activations to save memory.")] = False,
    mfu: Annotated[
        float | None, typer.Option(help="Model FLOPs utilization in (0, 1], in place of the assumed speed.")
    ] = None,
    probe: Annotated[bool, typer.Option(help="Measure the speed with 3 training steps on this machine.")] = False,
    fit: Annotated[
        str, typer.Option(help="Scaling law: epoch (Chinchilla, corrected by Epoch AI) or chinchilla (as published).")
    ] = "epoch",
    yaml: Annotated[bool, typer.Option("--yaml", help="Print only the YAML of the pretraining run.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the YAML to this file.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Plot the IsoFLOP curves to this PNG file.")] = None,
) -> None:
    """Plan a run for a budget and a device: model size, tokens, batch, memory, time, price, and the YAML."""
    _check_outputs(out, picture)

    from rorchat.device import detect_device, find_device
    from rorchat.plan.budget import Request, make_plan
    from rorchat.plan.show import draw_isoflop_curves, to_yaml
    from rorchat.training.gpu import warn_about_unusable_gpu
    from rorchat.training.next_step import describe_next, list_next_commands

    if device is None:
        warn_about_unusable_gpu()
    request = Request(
        device=find_device(device, devices) if device else detect_device(devices),
        money=money, hours=hours, flops=flops, tokens=tokens, size=size, gpus=gpus, dollars_per_hour=dollars_per_hour,
        vocabulary=vocabulary, block_size=block_size, precision=precision, optimizer=optimizer, kernels=kernels,
        gradient_checkpointing=gradient_checkpointing, global_batch_tokens=global_batch_tokens, micro_batch=micro_batch,
        mfu=mfu, fit=fit,
    )  # fmt: skip
    training_plan, measured = make_plan(request), None
    if probe:
        training_plan, measured = _measure(training_plan)
    if yaml:
        print(to_yaml(training_plan), end="")
    else:
        _print_plan(training_plan, measured)
    if out:
        out.write_text(to_yaml(training_plan), encoding="utf-8")
    if picture:
        draw_isoflop_curves(training_plan, picture)
    if not yaml:
        for name, path in (("run", out), ("plot", picture)):
            if path:
                print(f"{name}  {path}")
        if out:
            print(describe_next(list_next_commands("plan", out)))


def _check_outputs(out: Path | None, picture: Path | None) -> None:
    for path in (out, picture):
        if path and not path.resolve().parent.is_dir():
            raise UsageError(f"No folder {path.parent} for {path.name}: create it, or choose another place.")
    if picture and picture.suffix.lower() != ".png":
        raise UsageError(f"--picture {picture}: give a file that ends in .png.")


def _measure(training_plan: "Plan") -> "tuple[Plan, Probe]":
    """The plan with the measured speed, for the same model size."""
    from rorchat.plan.budget import make_plan
    from rorchat.plan.probe import measure_speed

    measured = measure_speed(training_plan)
    request = replace(training_plan.request, size=training_plan.size)
    updated = make_plan(request, measured=measured.seconds_per_token(training_plan))
    if not training_plan.request.size:
        note = "Shape: chosen with the assumed speed, before the measurement."
        updated = replace(updated, notes=(*updated.notes, note))
    return updated, measured


def _print_plan(training_plan: "Plan", measured: "Probe | None") -> None:
    from rorchat.cli.tables import print_table
    from rorchat.plan.show import build_rows, describe_fits, list_assumptions, to_yaml

    print_table(["", "planned", "how"], build_rows(training_plan))
    print("", *list_assumptions(training_plan, measured), sep="\n")
    if not training_plan.request.size:
        print("", *describe_fits(training_plan.request), sep="\n")
    print("", to_yaml(training_plan), sep="\n", end="")
