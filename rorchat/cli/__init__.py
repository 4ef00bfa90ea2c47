"""The command line `rorchat`."""

from typing import Annotated

import typer

from rorchat import __version__
from rorchat.cli import checkpoint, data, model, plan, recipes, tokenizer, train
from rorchat.cli.app import App
from rorchat.errors import exits_with_one_line

app = App("From raw text to your own chat model.")

for command in (train.pretrain, train.sft, train.dpo, train.grpo):
    app.command(context_settings=train.RAW, add_help_option=False, rich_help_panel="Training")(command)
app.command("train-tokenizer", context_settings=train.RAW, add_help_option=False, rich_help_panel="Training")(
    train.train_tokenizer
)
for command in (plan.plan, model.chat, model.evaluate, model.gate, model.report, model.push):
    app.command()(command)
app.add_typer(data.app, name="data")
app.add_typer(recipes.app, name="recipes")
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(tokenizer.app, name="tokenizer")


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
    app.run()
