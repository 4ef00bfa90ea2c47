"""`rorchat ...`: the commands that are not launched on many processes. What is launched stands in recipes/."""

import typer

from rorchat.cli import checkpoint, data, model, plan, tokenizer
from rorchat.errors import exits_with_one_line

app = typer.Typer(
    help="From raw text to your own chat model. Training is `accelerate launch recipes/...`; here is the rest.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (plan.plan, model.chat, model.evaluate, model.gate, model.report, model.push):
    app.command()(command)
app.add_typer(data.app, name="data")
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(tokenizer.app, name="tokenizer")


@exits_with_one_line
def main() -> None:
    app()
