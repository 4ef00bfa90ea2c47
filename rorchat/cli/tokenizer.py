"""`rorchat tokenizer ...`: which tokenizer for which text. `recipes/tokenizer.py` trains one."""

from pathlib import Path
from typing import Annotated

import typer

from rorchat.cli.app import App
from rorchat.errors import UsageError

app = App("Tokenizers side by side.")


@app.command()
def compare(
    tokenizers: Annotated[list[str], typer.Argument(help="NAME=FOLDER, FOLDER, or a Hub id such as gpt2.")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="A domain: LABEL=PATH (text, JSON lines or Parquet), or LABEL=SOURCE=PATH with a source of `rorchat "
            "data list`. Again for every domain; without it, six short texts that come with the package."
        ),
    ] = None,
    max_characters: Annotated[int, typer.Option(help="How much of each domain is read at most.")] = 2_000_000,
    out: Annotated[
        Path | None, typer.Option(help="Also draw tokenizers.png in this folder; without it no file is written.")
    ] = None,
) -> None:
    """Bytes per token, tokens per word and unused tokens of tokenizers, on texts of several domains."""
    columns = _once_each([_column(given) for given in tokenizers], "tokenizer", "NAME=FOLDER")
    rows = _once_each([_domain(given) for given in data or []], "domain", "LABEL=PATH")

    from rorchat.cli.tables import print_table
    from rorchat.sources.registry import iterate_texts
    from rorchat.tokenizer import load_tokenizer
    from rorchat.tokenizer.compare import (
        compare_tokenizers,
        comparison_notes,
        comparison_rows,
        draw_comparison,
        embedded_domains,
        read_domain,
    )

    loaded = {name: load_tokenizer(place) for name, place in columns.items()}
    domains = [read_domain(label, iterate_texts([spec]), max_characters) for label, spec in rows.items()]
    comparison = compare_tokenizers(loaded, domains or embedded_domains(max_characters))
    print_table(*comparison_rows(comparison))
    print("", *comparison_notes(comparison), sep="\n")
    if out:
        out.mkdir(parents=True, exist_ok=True)
        draw_comparison(comparison, out / "tokenizers.png")
        print(f"picture  {out / 'tokenizers.png'}")


def _once_each(pairs: list[tuple[str, str]], what: str, form: str) -> dict[str, str]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"Two {what}s are called {name!r}: give each a name of its own, as in {form}.")
    return dict(pairs)


def _column(given: str) -> tuple[str, str]:
    """(name, folder or Hub id). The part before the first `=` is a name unless it is the beginning of a path."""
    name, sign, place = given.partition("=")
    if sign and "/" not in name:
        if not name or not place:
            raise UsageError(f"{given!r} is no tokenizer: give FOLDER, a Hub id, or NAME=FOLDER.")
        return name, place
    return Path(given).name, given


def _domain(given: str) -> tuple[str, str]:
    """(label, source's spec)."""
    from rorchat.sources.registry import find_source, list_sources

    label, _, rest = given.partition("=")
    if not label or not rest:
        raise UsageError(f"--data {given!r} is no domain: give LABEL=PATH, or LABEL=SOURCE=PATH with a named source.")
    source, sign, _ = rest.partition("=")
    if source in list_sources():
        return label, rest
    if sign and source.isidentifier():
        find_source(source)  # names the nearest
    return label, f"text={rest}"
