"""`rorchat tokenizer ...`: compare tokenizers. `rorchat train-tokenizer` trains one."""

from pathlib import Path
from typing import Annotated

import typer

from rorchat.cli.app import App
from rorchat.errors import UsageError

app = App("Compare tokenizers.")


@app.command()
def compare(
    tokenizers: Annotated[list[str], typer.Argument(help="NAME=FOLDER, FOLDER, or a Hub id such as gpt2.")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="A domain: LABEL=PATH (text, JSON Lines or Parquet), or LABEL=SOURCE=PATH with a source of `rorchat "
            "data list`. Repeatable; default: six short texts in the package."
        ),
    ] = None,
    max_characters: Annotated[int, typer.Option(help="Maximum characters read from each domain.")] = 2_000_000,
    out: Annotated[
        Path | None, typer.Option(help="Plot the comparison to tokenizers.png in this folder; default: no file.")
    ] = None,
) -> None:
    """Compare tokenizers on texts of several domains: bytes per token, tokens per word, unused tokens."""
    columns = _require_unique(_name_tokenizers(tokenizers), "tokenizer", "NAME=FOLDER")
    rows = _require_unique([_parse_domain(text) for text in data or []], "domain", "LABEL=PATH")

    from rorchat.cli.tables import print_table
    from rorchat.sources.registry import iterate_texts
    from rorchat.tokenizer import load_tokenizer
    from rorchat.tokenizer.compare import (
        builtin_domains,
        compare_tokenizers,
        comparison_notes,
        comparison_rows,
        draw_comparison,
        read_domain,
    )

    loaded = {name: load_tokenizer(place) for name, place in columns.items()}
    domains = [read_domain(label, iterate_texts([spec]), max_characters) for label, spec in rows.items()]
    comparison = compare_tokenizers(loaded, domains or builtin_domains(max_characters))
    print_table(*comparison_rows(comparison))
    print("", *comparison_notes(comparison), sep="\n")
    if out:
        out.mkdir(parents=True, exist_ok=True)
        draw_comparison(comparison, out / "tokenizers.png")
        print(f"plot  {out / 'tokenizers.png'}")


def _require_unique(pairs: list[tuple[str, str]], what: str, form: str) -> dict[str, str]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"Two {what}s have the name {name!r}: name them as in {form}.")
    return dict(pairs)


def _name_tokenizers(texts: list[str]) -> list[tuple[str, str]]:
    """(name, folder or Hub id) of each tokenizer.

    A folder without a name is named after its last part. If several have the same one, as in `a/tokenizer` and
    `b/tokenizer`, they are named after the folders above, in which they differ.
    """
    parsed = [_parse_tokenizer(text) for text in texts]
    for level in range(max(len(Path(place).parts) for _, place in parsed)):
        names = [name or _part(place, level) for name, place in parsed]
        parsed = [
            (given or (name if names.count(name) == 1 else ""), place)
            for name, (given, place) in zip(names, parsed, strict=True)
        ]
    return [(name or Path(place).name, place) for name, place in parsed]


def _part(place: str, level: int) -> str:
    """The part of a path at a level above its last one, or the first part if there is none."""
    parts = Path(place).parts
    return parts[max(0, len(parts) - 1 - level)]


def _parse_tokenizer(text: str) -> tuple[str, str]:
    """(name, or "" if none is given; folder or Hub id). A `/` before the first `=` makes all of it a path."""
    name, sign, location = text.partition("=")
    if sign and "/" not in name:
        if not name or not location:
            raise UsageError(f"{text!r} is not a tokenizer: give FOLDER, a Hub id, or NAME=FOLDER.")
        return name, location
    return "", text


def _parse_domain(text: str) -> tuple[str, str]:
    """(label, spec of the source)."""
    from rorchat.sources.registry import find_source, list_sources

    label, _, rest = text.partition("=")
    if not label or not rest:
        raise UsageError(f"--data {text!r} is not a domain: give LABEL=PATH, or LABEL=SOURCE=PATH with a named source.")
    source, sign, _ = rest.partition("=")
    if source in list_sources():
        return label, rest
    if sign and source.isidentifier():
        find_source(source)  # raises, with the nearest name
    return label, f"text={rest}"
