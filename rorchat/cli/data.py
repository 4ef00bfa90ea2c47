"""`rorchat data ...`: what there is to train on, what is wrong with it, and how it becomes tokens."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from rorchat.cli.app import App
from rorchat.errors import DataError, UsageError

app = App("Datasets: what there is, what is wrong with it, how it becomes tokens.")

Tokenizer = Annotated[str, typer.Option(help="A folder or a Hub id.")]
Source = Annotated[
    str, typer.Argument(help="NAME (from the Hub), NAME=PATH, NAME=AMOUNT (generated); chat:NAME: its conversations.")
]
Against = Annotated[
    list[str] | None,
    typer.Option(help="An evaluation set, file or folder: rows with 13 words in a row of it are rejected. Repeatable."),
]
MinCharacters = Annotated[int, typer.Option(help="Reject shorter texts.")]
MaxCharacters = Annotated[int, typer.Option(help="Reject longer texts; 0 for no limit.")]
MaxRepetition = Annotated[float, typer.Option(help="Reject texts with a larger share in repeated lines; 0: no limit.")]
MinLetters = Annotated[float, typer.Option(help="Reject texts with a smaller share of letters and blanks.")]
MinLatin = Annotated[float, typer.Option(help="Reject texts with a smaller share of Latin letters among the letters.")]


@app.command("list")
def list_sources() -> None:
    """The datasets that recipes can name: kind, licence, size, and what the loss counts."""
    from rorchat.cli.tables import print_table
    from rorchat.sources.base import LOSS_BY_KIND, licence_restriction
    from rorchat.sources.registry import find_source, list_sources, source_kinds

    rows = []
    for name in list_sources():
        module = find_source(name)
        home = getattr(module, "HUB", None)
        where = "generated" if hasattr(module, "generate") else home["path"] if home else "your files"
        loss = "; ".join(LOSS_BY_KIND[kind] for kind in source_kinds(name))
        title = module.__doc__.splitlines()[0].split(":")[0].rstrip(".")
        rows.append([name, title, ", ".join(source_kinds(name)), where, module.SIZE, module.LICENCE, loss])
    print_table(["source", "what it is", "gives", "from", "size", "licence", "the loss counts"], rows)
    restricted = [name for name in list_sources() if licence_restriction(find_source(name).LICENCE)]
    print(f"\nNot for commercial use, or of unstated licence: {', '.join(restricted)}.")


@app.command()
def check(
    source: Annotated[str, typer.Argument(help="A source (NAME, NAME=PATH), or a file or folder of any known shape.")],
    shape: Annotated[
        str | None, typer.Option("--as", help="As which source a path is read, e.g. messages; default: guessed.")
    ] = None,
    rejects: Annotated[Path | None, typer.Option(help="Write the rejected rows to this JSON lines file.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="With --max-length: conversations that do not fit are over-long.")
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of a conversation.")] = None,
    against: Against = None,
    min_characters: MinCharacters = 0,
    max_characters: MaxCharacters = 0,
    max_repetition: MaxRepetition = 0.0,
    min_letters: MinLetters = 0.0,
    min_latin: MinLatin = 0.0,
) -> None:
    """Read every row on its own: how many are kept, how many rejected, why, and where."""
    from rorchat.inspection import FORMAT_REASONS
    from rorchat.inspection import check as check_rows
    from rorchat.reading.filters import Filters
    from rorchat.sources.registry import unread_files
    from rorchat.tokenizer import load_tokenizer

    if (tokenizer is None) != (max_length is None):
        raise UsageError("--tokenizer and --max-length go together: tokens are counted with a tokenizer.")
    if max_length is not None and max_length < 1:
        raise UsageError(f"--max-length is {max_length}: give a positive number.")
    if rejects:
        _require_apart(source, rejects)
    filters = Filters(min_characters, max_characters, max_repetition, min_letters, min_latin)
    file = rejects.open("w", encoding="utf-8") if rejects else None
    try:
        found = check_rows(
            source,
            shape=shape,
            filters=filters,
            evaluation=against,
            tokenizer=load_tokenizer(tokenizer) if tokenizer else None,
            max_length=max_length,
            rejects=file,
        )
    finally:
        if file:
            file.close()
    name = found.spec.partition("=")[0]
    if found.guessed:
        print(f"read as {name!r}; another shape with --as")
    if found.evaluation:
        print(found.evaluation.describe())
    print(found.stats)
    _tell_unread(unread_files(found.spec))
    strange = sum(count for reason, count in found.stats.rejects.items() if reason in FORMAT_REASONS)
    if found.guessed and strange > found.stats.rows_in / 10:
        print(f"{strange:,} rows are of another shape than {name!r}: check the files one by one")
    if rejects:
        print(f"rejects  {rejects}")
    if not found.stats.kept:
        raise DataError(f"No row of {found.spec} can be used.")


def _tell_unread(files: list[str]) -> None:
    if files:
        more = ", ..." if files[5:] else ""
        print(f"{len(files):,} other files of the folder are not read: {', '.join(files[:5])}{more}")


def _require_apart(source: str, rejects: Path) -> None:
    """Raises UsageError where writing `rejects` would overwrite the source, or put a file into its folder."""
    given = source if Path(source).expanduser().exists() else source.partition("=")[2]
    path = Path(given).expanduser().resolve()
    if given and path in (rejects.expanduser().resolve(), *rejects.expanduser().resolve().parents):
        raise UsageError(f"--rejects {rejects} lies in what is checked, {given}: choose another place.")


@app.command()
def show(
    source: Annotated[str, typer.Argument(help="A source (NAME, NAME=PATH, NAME=AMOUNT), or a file or folder.")],
    tokenizer: Tokenizer,
    row: Annotated[int, typer.Option(help="Which row, counted from 0.")] = 0,
    shape: Annotated[str | None, typer.Option("--as", help="As which source a path is read; default: guessed.")] = None,
) -> None:
    """A row as the model sees it, token by token; what the loss counts is green on a terminal, else in brackets."""
    from rorchat.inspection import resolve_spec
    from rorchat.inspection import show as tokens_of
    from rorchat.tokenizer import load_tokenizer

    if row < 0:
        raise UsageError(f"--row is {row}: rows are counted from 0.")
    spec, _ = resolve_spec(source, shape)
    place, sequences = tokens_of(spec, row, load_tokenizer(tokenizer))
    for title, tokens in sequences.items():
        trained = sum(token.trained for token in tokens)
        print(f"{place}, {title}: {len(tokens)} tokens, {trained} of them trained")
        print(_coloured(tokens) if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else _bracketed(tokens))


def _coloured(tokens) -> str:
    """Trained tokens on green, others on grey, in two shades in turn, so that each can be told from its neighbours."""
    shades = {True: ("\033[30;48;5;114m", "\033[30;48;5;157m"), False: ("\033[37;48;5;238m", "\033[37;48;5;242m")}
    parts = []
    for number, token in enumerate(tokens):
        text = token.text.replace("\n", "⏎\033[0m\n" + shades[token.trained][number % 2])
        parts.append(shades[token.trained][number % 2] + ("\033[1m" if token.control else "") + text + "\033[0m")
    return "".join(parts)


def _bracketed(tokens) -> str:
    """Tokens with a bar between them; stretches of trained ones stand in double brackets."""
    parts = []
    for before, token in zip([None, *tokens], tokens, strict=False):
        was = before is not None and before.trained
        if token.trained != was:
            parts.append("⟦" if token.trained else "⟧")
        elif before is not None:
            parts.append("|")
        parts.append(token.text.replace("\n", "⏎\n"))
    return "".join(parts) + ("⟧" if tokens and tokens[-1].trained else "")


@app.command()
def prepare(
    source: Source,
    tokenizer: Tokenizer,
    out: Annotated[Path, typer.Option(help="Where the token store goes.")],
    workers: Annotated[int | None, typer.Option(help="Processes; default: one a CPU. The bytes are the same.")] = None,
    validation_share: Annotated[float, typer.Option(help="Share of the documents held out, in (0, 1).")] = 0.01,
    seed: Annotated[int, typer.Option(help="Of generated sources.")] = 0,
    persona: Annotated[str | None, typer.Option(help="A persona file, for what is generated about it.")] = None,
    against: Against = None,
    min_characters: MinCharacters = 0,
    max_characters: MaxCharacters = 0,
    max_repetition: MaxRepetition = 0.0,
    min_letters: MinLetters = 0.0,
    min_latin: MinLatin = 0.0,
) -> None:
    """Tokenize a source into a store, in parallel; a killed run is gone on with by the same command."""
    from rorchat.persona import load_persona
    from rorchat.reading.filters import Filters
    from rorchat.sources.registry import find_source
    from rorchat.tokenizer import load_tokenizer
    from rorchat.tokens.prepare import prepare as prepare_store

    find_source(source.partition("=")[0])  # before the tokenizer, which may come from afar
    if workers is not None and workers < 1:
        raise UsageError(f"--workers is {workers}: give a positive number.")
    _require_share(validation_share)
    store = prepare_store(
        source,
        load_tokenizer(tokenizer),
        out,
        validation_share=validation_share,
        seed=seed,
        persona=load_persona(persona),
        filters=Filters(min_characters, max_characters, max_repetition, min_letters, min_latin),
        evaluation=against,
        workers=workers,
    )
    _tell(store)


def _require_share(validation_share: float) -> None:
    if not 0 < validation_share < 1:
        raise UsageError(f"--validation-share is {validation_share}: it must lie between 0 and 1.")


def _tell(store) -> None:
    for split in ("train", "validation"):
        documents, tokens = store.manifest.total(split, "documents"), store.manifest.total(split, "tokens")
        print(f"{split}: {documents:,} documents, {tokens:,} tokens")
    print(f"store  {store.folder}")


@app.command()
def verify(store: Annotated[Path, typer.Argument(help="A token store.")]) -> None:
    """Read every byte of a token store and compare it with its manifest."""
    from tqdm.auto import tqdm

    from rorchat.tokens.store import TokenStore

    opened = TokenStore(store)
    with tqdm(desc="verify", unit="B", unit_scale=True, disable=None, leave=False) as bar:
        problems = opened.verify(bar.update)
    if problems:
        more = f" And {len(problems) - 1} more." if len(problems) > 1 else ""
        raise DataError(f"{problems[0]}.{more} Delete {store} to prepare it again.")
    _tell(opened)
    print(f"every byte of {len(opened.manifest.shards)} shards is as it was written")


@app.command("import")
def import_(
    shards: Annotated[Path, typer.Argument(help="A folder of flat uint16 or uint32 .npy arrays.")],
    tokenizer: Tokenizer,
    out: Annotated[Path, typer.Option(help="Where the token store goes.")],
) -> None:
    """Make a token store of shards that another project tokenized; files with 'val' in the name become validation.

    Files are hard-linked if the file system allows it, so do not change the originals.
    """
    from rorchat.tokenizer import load_tokenizer
    from rorchat.tokens.import_shards import import_shards

    _tell(import_shards(shards, load_tokenizer(tokenizer), out))


@app.command()
def plan(
    mixture: Annotated[Path, typer.Argument(help="A mixture file: sources, and phases with weights and ramps.")],
    tokenizer: Tokenizer,
    train_tokens: Annotated[int, typer.Option(help="Tokens of the run.")],
    stores: Annotated[Path, typer.Option(help="Where the token stores are or go: `token_store` of the recipe.")],
    block_size: Annotated[int, typer.Option(help="Tokens a row.")] = 1024,
    validation_share: Annotated[float, typer.Option(help="Share of the documents held out, in (0, 1).")] = 0.01,
    seed: Annotated[int, typer.Option(help="Of generated sources: `data_seed` of the recipe.")] = 0,
    persona: Annotated[str | None, typer.Option(help="A persona file, for what is generated about it.")] = None,
    out: Annotated[Path | None, typer.Option(help="Draw the plan into this PNG file.")] = None,
) -> None:
    """What a mixture comes to: tokens and epochs of every source in every phase, with warnings, before any training."""
    from rorchat.mixture.config import read_mixture
    from rorchat.mixture.plan import Plan
    from rorchat.mixture.stores import count_rows_per_epoch, prepare_stores
    from rorchat.persona import load_persona
    from rorchat.tokenizer import load_tokenizer

    config = read_mixture(mixture)
    if block_size < 2 or train_tokens < block_size:
        raise UsageError(
            f"--train-tokens {train_tokens} is less than one row of --block-size {block_size} (at least 2)."
        )
    _require_share(validation_share)
    if out and out.suffix.lower() != ".png":
        raise UsageError(f"--out is {out}: it draws a PNG file, name it so.")
    loaded = load_tokenizer(tokenizer)
    prepared = prepare_stores(
        config,
        loaded,
        stores,
        block_size,
        validation_share=validation_share,
        seed=seed,
        persona=load_persona(persona),
    )
    planned = Plan(config, count_rows_per_epoch(prepared, block_size), train_tokens // block_size, block_size)
    print(planned.describe())
    if out:
        planned.draw(out)
        print(f"picture  {out}")
