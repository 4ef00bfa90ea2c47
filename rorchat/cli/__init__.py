"""The command line `rorchat`."""

from typing import Annotated

import typer

from rorchat import __version__
from rorchat.cli import checkpoint, data, model, plan, project, recipes, tokenizer, train
from rorchat.cli.app import App
from rorchat.console import configure_libraries
from rorchat.errors import exits_with_one_line

app = App("From raw text to your own chat model.")

OWN, BEFORE, TRAINING, MODELS = "Your own model", "Before training", "Training", "Models"

app.command("new", rich_help_panel=OWN)(project.new)
app.command("run", rich_help_panel=OWN)(project.run)
app.add_typer(recipes.app, name="recipes", rich_help_panel=BEFORE)
app.add_typer(data.app, name="data", rich_help_panel=BEFORE)
app.add_typer(tokenizer.app, name="tokenizer", rich_help_panel=BEFORE)
app.command("plan", rich_help_panel=BEFORE)(plan.plan)
app.command("train-tokenizer", **train.RAW, rich_help_panel=TRAINING)(train.train_tokenizer)
app.command("pretrain", **train.RAW, rich_help_panel=TRAINING)(train.pretrain)
app.command("sft", **train.RAW, rich_help_panel=TRAINING)(train.sft)
app.command("dpo", **train.RAW, rich_help_panel=TRAINING)(train.dpo)
app.command("grpo", **train.RAW, rich_help_panel=TRAINING)(train.grpo)
app.add_typer(checkpoint.app, name="checkpoint", rich_help_panel=TRAINING)
app.command("chat", rich_help_panel=MODELS)(model.chat)
app.command("complete", rich_help_panel=MODELS)(model.complete)
app.command("evaluate", rich_help_panel=MODELS)(model.evaluate)
app.command("gate", rich_help_panel=MODELS)(model.gate)
app.command("report", rich_help_panel=MODELS)(model.report)
app.command("push", rich_help_panel=MODELS)(model.push)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"rorchat {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@exits_with_one_line
def main() -> None:
    """The entry point of the command `rorchat`."""
    configure_libraries()
    app.run()
