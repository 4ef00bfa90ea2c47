"""`rorchat plan`: what a budget buys, before it is spent."""

from pathlib import Path
from typing import Annotated

import typer

from rorchat.errors import UsageError


def plan(
    money: Annotated[float | None, typer.Option(help="A budget in dollars.")] = None,
    hours: Annotated[float | None, typer.Option(help="A budget in hours of all devices.")] = None,
    flops: Annotated[float | None, typer.Option(help="A budget in FLOPs, as in 3.2e17.")] = None,
    tokens: Annotated[float | None, typer.Option(help="Tokens to train on; with --size no budget is needed.")] = None,
    size: Annotated[
        str | None, typer.Option(help="The shape: a name, or layers x heads x width as in 8x8x512.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="T4, A100-80, H100, cpu ...; default: this machine's.")] = None,
    gpus: Annotated[int, typer.Option(help="How many of the device, in one machine.")] = 1,
    devices: Annotated[
        Path | None, typer.Option(help="Your own devices: a YAML file like rorchat/devices.yaml.")
    ] = None,
    dollars_per_hour: Annotated[float | None, typer.Option(help="Price of one device, instead of the table's.")] = None,
    vocabulary: Annotated[
        int, typer.Option(help="Tokens of the tokenizer; default: GPT-2's with control tokens.")
    ] = 50_304,
    block_size: Annotated[int, typer.Option(help="Tokens a row, and positions of the model.")] = 1024,
    global_batch_tokens: Annotated[
        int | None, typer.Option(help="Tokens of a step; default: 524,288, halved until there are 2,000 steps.")
    ] = None,
    micro_batch: Annotated[
        int | None, typer.Option(help="Rows at once on a device; default: the most that fit.")
    ] = None,
    optimizer: Annotated[str, typer.Option(help="adamw, adamw_8bit or muon.")] = "muon",
    precision: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; default: the device's best.")] = None,
    kernels: Annotated[
        str | None,
        typer.Option(
            help="compiled (torch.compile, the default on a GPU), eager, or manual (attention that writes its scores)."
        ),
    ] = None,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Compute activations again to save memory.")] = False,
    mfu: Annotated[
        float | None, typer.Option(help="Share of the peak that is reached, instead of the assumed speed.")
    ] = None,
    probe: Annotated[bool, typer.Option(help="Measure the speed: 3 training steps on this machine.")] = False,
    fit: Annotated[
        str, typer.Option(help="epoch (the corrected Chinchilla constants) or chinchilla (as published).")
    ] = "epoch",
    yaml: Annotated[bool, typer.Option("--yaml", help="Print only the YAML of the pretraining run.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write that YAML to this file.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw the IsoFLOP curves to this PNG file.")] = None,
) -> None:
    """From money, hours or FLOPs and a device: model, tokens, batches, memory, time, price, and the YAML of the run."""
    for path in (out, picture):
        if path and not path.resolve().parent.is_dir():
            raise UsageError(f"There is no folder {path.parent} for {path.name}: make it, or give another place.")
    if picture and picture.suffix.lower() != ".png":
        raise UsageError(f"--picture {picture}: give a file that ends in .png.")

    from rorchat.device import detect_device, find_device
    from rorchat.plan.budget import Request, make_plan

    request = Request(
        device=find_device(device, devices) if device else detect_device(devices),
        money=money, hours=hours, flops=flops, tokens=tokens, size=size, gpus=gpus, dollars_per_hour=dollars_per_hour,
        vocabulary=vocabulary, block_size=block_size, precision=precision, optimizer=optimizer, kernels=kernels,
        gradient_checkpointing=gradient_checkpointing, global_batch_tokens=global_batch_tokens, micro_batch=micro_batch,
        mfu=mfu, fit=fit,
    )  # fmt: skip
    planned, probed = make_plan(request), None
    if probe:
        planned, probed = _probed(planned)
    _show(planned, probed, only_yaml=yaml)
    if out:
        from rorchat.plan.show import as_yaml

        out.write_text(as_yaml(planned), encoding="utf-8")
    if picture:
        from rorchat.plan.show import draw

        draw(planned, picture)
    if not yaml:
        for name, path in (("run", out), ("picture", picture)):
            if path:
                print(f"{name}  {path}")


def _probed(planned):
    """The plan again with the measured speed, for the same shape."""
    from dataclasses import replace

    from rorchat.plan.budget import make_plan
    from rorchat.plan.probe import probe

    probed = probe(planned)
    again = make_plan(replace(planned.request, size=planned.size), measured=probed.seconds_per_token(planned))
    if not planned.request.size:
        again = replace(again, notes=(*again.notes, "Shape: chosen with the assumed speed, before the measurement."))
    return again, probed


def _show(planned, probed, only_yaml: bool) -> None:
    from rorchat.cli.tables import print_table
    from rorchat.plan.show import as_yaml, assumptions, fit_lines, plan_rows

    if only_yaml:
        print(as_yaml(planned), end="")
        return
    print_table(["", "planned", "how"], plan_rows(planned))
    print("", *assumptions(planned, probed), sep="\n")
    if not planned.request.size:
        print("", *fit_lines(planned.request), sep="\n")
    print("", as_yaml(planned), sep="\n", end="")
