"""`rorchat data ...`: list, check and show datasets, and turn them into token stores."""

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rorchat.cli.app import App
from rorchat.errors import DataError, RorchatError, UsageError

if TYPE_CHECKING:
    from rorchat.inspection import Checks, ShownToken
    from rorchat.tokens.store import TokenStore

app = App("List, check, show and tokenize datasets.")

Tokenizer = Annotated[str, typer.Option(help="A folder or a Hub id.")]
Source = Annotated[
    str,
    typer.Argument(
        help="NAME (from the Hub), NAME=OWNER/DATASET (any dataset of the Hub), NAME=PATH, NAME=AMOUNT (generated); "
        "chat:NAME for its conversations only."
    ),
]
Columns = Annotated[
    list[str] | None,
    typer.Option(
        help="ROLE=COLUMN, one or several: the columns to read, as user=question assistant=answer; default: known ones."
    ),
]
RowFormat = Annotated[
    str | None, typer.Option("--as", help="The source whose row format a path has, e.g. messages; default: guessed.")
]
Against = Annotated[
    list[str] | None,
    typer.Option(help="An evaluation set, file or folder: rows that share 13 consecutive words with it are rejected. "
                 "Repeatable."),
]  # fmt: skip
MinCharacters = Annotated[int, typer.Option(help="Reject shorter texts.")]
MaxCharacters = Annotated[int, typer.Option(help="Reject longer texts; 0: no limit.")]
MaxRepetition = Annotated[float, typer.Option(help="Reject texts with a larger share in repeated lines; 0: no limit.")]
MinLetters = Annotated[float, typer.Option(help="Reject texts with a smaller share of letters and spaces.")]
MinLatin = Annotated[float, typer.Option(help="Reject texts with a smaller share of Latin letters among the letters.")]
ValidationShare = Annotated[float, typer.Option(help="Share of the documents that becomes validation data, in (0, 1).")]
PersonaFile = Annotated[str | None, typer.Option(help="A persona file, for conversations that are generated from it.")]
Out = Annotated[Path, typer.Option(help="A new folder for the token store.")]


@app.command("list")
def list_sources() -> None:
    """List the datasets by the names that recipes use: kind, licence, size, and which tokens are in the loss."""
    from rorchat.cli.tables import print_table
    from rorchat.sources.base import LOSS_BY_KIND, licence_restriction
    from rorchat.sources.registry import find_source, list_sources

    rows = []
    for name in list_sources():
        source = find_source(name)
        where = "generated" if source.is_generated else source.hub["path"] if source.hub else "your files"
        loss = "; ".join(LOSS_BY_KIND[kind] for kind in source.kinds)
        title = source.title.split(":")[0].rstrip(".")
        rows.append([name, title, ", ".join(source.kinds), where, source.size, source.licence, loss])
    print_table(
        ["source", "description", "kinds", "from", "size", "licence", "tokens in the loss"],
        rows,
        less_important=("tokens in the loss", "from", "description"),
    )
    print(
        "\nAny dataset of the Hub: text=OWNER/DATASET, messages=OWNER/DATASET, preference=OWNER/DATASET "
        "(docs/preparing_data.md)."
    )
    restricted = [name for name in list_sources() if licence_restriction(find_source(name).licence)]
    print(f"Not for commercial use, or of unstated licence: {', '.join(restricted)}.")


@app.command()
def check(
    source: Annotated[
        str,
        typer.Argument(help="A source (NAME, NAME=OWNER/DATASET, NAME=PATH), or a file or folder of a known format."),
    ],
    row_format: RowFormat = None,
    columns: Columns = None,
    rejects: Annotated[Path | None, typer.Option(help="Write the rejected rows to this JSON Lines file.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="With --max_length: count rows that do not fit.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens per conversation.")] = None,
    against: Against = None,
    min_characters: MinCharacters = 0,
    max_characters: MaxCharacters = 0,
    max_repetition: MaxRepetition = 0.0,
    min_letters: MinLetters = 0.0,
    min_latin: MinLatin = 0.0,
) -> None:
    """Read every row. Count kept and rejected rows, with the reasons and the first places."""
    from rorchat.inspection import Checks
    from rorchat.inspection.guess import guess_files, resolve_spec
    from rorchat.project_folder import PLAN, is_project
    from rorchat.reading.filters import Filters
    from rorchat.reading.listing import is_folder
    from rorchat.tokenizer import load_tokenizer
    from rorchat.tokens.decontamination import EvaluationText

    if (tokenizer is None) != (max_length is None):
        raise UsageError("--tokenizer and --max_length go together: tokens are counted with a tokenizer.")
    if max_length is not None and max_length < 1:
        raise UsageError(f"--max_length is {max_length}: give a positive number.")
    folder = Path(source).expanduser()
    if is_project(folder):
        raise UsageError(f"{source} is a project, not data: its sources are in {folder / PLAN}.")
    formats = guess_files(folder) if not row_format and not columns and is_folder(folder) else {}
    if formats:
        spec, guessed = f"{formats.get(folder, 'text')}={source}", True
    else:
        spec, guessed = resolve_spec(source, row_format, columns)
    if rejects:
        _require_separate(spec, rejects)
    filters = Filters(min_characters, max_characters, max_repetition, min_letters, min_latin)
    with rejects.open("w", encoding="utf-8") if rejects else nullcontext() as file:
        evaluation = EvaluationText.read(against) if against else None
        checks = Checks(filters, evaluation, load_tokenizer(tokenizer) if tokenizer else None, max_length, file)
        problem = _check_files(folder, formats, checks) if len(formats) > 1 else _check_spec(spec, checks, guessed)
    if rejects:
        print(f"rejects  {rejects}")
    if problem:
        raise DataError(problem)


def _check_spec(spec: str, checks: "Checks", guessed: bool) -> str:
    """Checks a source and prints the counts. Returns what is wrong if no row can be used."""
    from rorchat.inspection import check_spec
    from rorchat.inspection.guess import FORMAT_REASONS
    from rorchat.sources.registry import columns_advice

    stats, name = check_spec(spec, checks), spec.partition("=")[0]
    if guessed:
        print(f"read as {name!r}; use --as to read it as another format")
    if checks.evaluation:
        print(checks.evaluation.describe())
    print(stats)
    other_format = sum(count for reason, count in stats.rejects.items() if reason in FORMAT_REASONS)
    if guessed and other_format > stats.rows_in / 10:
        print(f"{other_format:,} rows have a different format than {name!r}: check the files one by one")
    return "" if stats.kept else f"No row of {spec} can be used. {columns_advice(stats)}".strip()


def _check_files(folder: Path, formats: dict[Path, str], checks: "Checks") -> str:
    """Checks each file of a folder by itself and prints a table. Returns what is wrong if no row can be used."""
    from rorchat.cli.tables import print_table
    from rorchat.inspection import check_spec
    from rorchat.sources.base import RowStats
    from rorchat.sources.registry import note_unread

    lines, rows_in, kept = [], 0, 0
    for file, name in formats.items():
        shown = str(file.relative_to(folder))
        if not name:
            lines.append([shown, "-", "-", "-", "no row has a known format"])
            continue
        try:
            stats = check_spec(f"{name}={file}", checks)
        except RorchatError as error:
            lines.append([shown, name, "-", "-", str(error)])
            continue
        rows_in, kept = rows_in + stats.rows_in, kept + stats.kept
        rejected = ", ".join(f"{count:,} {reason}" for reason, count in stats.most_frequent_rejects())
        lines.append([shown, name, f"{stats.rows_in:,}", f"{stats.kept:,}", rejected or "none"])
    print(f"{folder}: its files have several formats, and each is read as its own; --as reads all of them as one\n")
    print_table(["file", "read as", "rows", "kept", "rejected"], lines)
    print(f"\n{len(formats):,} files: {kept:,} of {rows_in:,} rows kept")
    if checks.evaluation:
        print(checks.evaluation.describe())
    everything = f"text={folder}"  # which reads any file that another source reads
    if unread := RowStats(everything, reading=note_unread(everything)).describe_unread():
        print(unread)
    return "" if kept else f"No row of {folder} can be used."


def _require_separate(spec: str, rejects: Path) -> None:
    """Raises UsageError if writing `rejects` would overwrite the source, or add a file to its folder."""
    from rorchat.sources.registry import local_path

    location = local_path(spec)
    if location and location.resolve() in (rejects.expanduser().resolve(), *rejects.expanduser().resolve().parents):
        raise UsageError(f"--rejects {rejects} would change the checked data in {location}: choose another file.")


@app.command()
def show(
    source: Annotated[
        str,
        typer.Argument(help="A source (NAME, NAME=OWNER/DATASET, NAME=PATH, NAME=AMOUNT), or a file or folder."),
    ],
    tokenizer: Tokenizer,
    row: Annotated[int, typer.Option(help="The number of the row, from 0.")] = 0,
    row_format: RowFormat = None,
    columns: Columns = None,
) -> None:
    """Show a row as tokens. Tokens in the loss are green on a terminal, and in brackets elsewhere."""
    from rorchat.inspection import show_row
    from rorchat.inspection.guess import resolve_spec
    from rorchat.sources.base import RowStats
    from rorchat.sources.registry import note_unread
    from rorchat.tokenizer import load_tokenizer

    if row < 0:
        raise UsageError(f"--row is {row}: rows are counted from 0.")
    spec, _ = resolve_spec(source, row_format, columns)
    if unread := RowStats(spec, reading=note_unread(spec)).describe_unread():
        print(unread, file=sys.stderr)
    place, sequences = show_row(spec, row, load_tokenizer(tokenizer))
    in_colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for title, tokens in sequences.items():
        trained = sum(token.trained for token in tokens)
        print(f"{place}, {title}: {len(tokens)} tokens, {trained} of them in the loss")
        print(format_in_colour(tokens) if in_colour else format_in_brackets(tokens))


def format_in_colour(tokens: "Sequence[ShownToken]") -> str:
    """Shows tokens in the loss on green and others on grey, in two alternating shades."""
    shades = {True: ("\033[30;48;5;114m", "\033[30;48;5;157m"), False: ("\033[37;48;5;238m", "\033[37;48;5;242m")}
    parts = []
    for number, token in enumerate(tokens):
        text = token.text.replace("\n", "⏎\033[0m\n" + shades[token.trained][number % 2])
        parts.append(shades[token.trained][number % 2] + ("\033[1m" if token.control else "") + text + "\033[0m")
    return "".join(parts)


def format_in_brackets(tokens: "Sequence[ShownToken]") -> str:
    """Separates tokens by bars and encloses every run of tokens in the loss in double brackets."""
    parts = []
    for before, token in zip([None, *tokens], tokens, strict=False):
        was_trained = before is not None and before.trained
        if token.trained != was_trained:
            parts.append("⟦" if token.trained else "⟧")
        elif before is not None:
            parts.append("|")
        parts.append(token.text.replace("\n", "⏎\n"))
    return "".join(parts) + ("⟧" if tokens and tokens[-1].trained else "")


@app.command()
def prepare(
    source: Source,
    tokenizer: Tokenizer,
    out: Out,
    workers: Annotated[
        int | None, typer.Option(help="Processes; default: one per CPU. The result does not depend on it.")
    ] = None,
    validation_share: ValidationShare = 0.01,
    seed: Annotated[int, typer.Option(help="Seed of generated sources.")] = 0,
    persona: PersonaFile = None,
    columns: Columns = None,
    against: Against = None,
    min_characters: MinCharacters = 0,
    max_characters: MaxCharacters = 0,
    max_repetition: MaxRepetition = 0.0,
    min_letters: MinLetters = 0.0,
    min_latin: MinLatin = 0.0,
) -> None:
    """Tokenize a source into a token store, in parallel. Rerun the same command to resume an interrupted run."""
    from rorchat.persona import load_persona
    from rorchat.reading.filters import Filters
    from rorchat.sources.columns import parse_columns
    from rorchat.sources.location import add_columns
    from rorchat.sources.registry import locate
    from rorchat.tokenizer import load_tokenizer
    from rorchat.tokens.prepare import prepare as prepare_store

    locate(source)  # before the tokenizer, which may have to be downloaded
    (spec,) = add_columns([source], parse_columns(columns or []))
    if workers is not None and workers < 1:
        raise UsageError(f"--workers is {workers}: give a positive number.")
    _require_share(validation_share)
    store = prepare_store(
        spec,
        load_tokenizer(tokenizer),
        out,
        validation_share=validation_share,
        seed=seed,
        persona=load_persona(persona),
        filters=Filters(min_characters, max_characters, max_repetition, min_letters, min_latin),
        evaluation=against,
        workers=workers,
    )
    _print_sizes(store)
    _print_next(store.folder)


def _require_share(validation_share: float) -> None:
    if not 0 < validation_share < 1:
        raise UsageError(f"--validation_share is {validation_share}: it must be between 0 and 1.")


def _print_next(store: Path) -> None:
    from rorchat.training.next_step import describe_next, list_next_commands

    print(describe_next(list_next_commands("data prepare", store)))


def _print_sizes(store: "TokenStore") -> None:
    for split in ("train", "validation"):
        documents, tokens = store.manifest.total(split, "documents"), store.manifest.total(split, "tokens")
        print(f"{split}: {documents:,} documents, {tokens:,} tokens")
    print(f"store  {store.folder}")


@app.command()
def verify(store: Annotated[Path, typer.Argument(help="A token store.")]) -> None:
    """Compare every byte of a token store with its manifest."""
    from tqdm.auto import tqdm

    from rorchat.tokens.store import TokenStore

    opened = TokenStore(store)
    with tqdm(desc="verify", unit="B", unit_scale=True, disable=None, leave=False) as bar:
        problems = opened.verify(bar.update)
    if problems:
        more = f" And {len(problems) - 1} more." if len(problems) > 1 else ""
        raise DataError(f"{problems[0]}.{more} Delete {store} to prepare it again.")
    _print_sizes(opened)
    print(f"all {len(opened.manifest.shards)} shards are valid")


@app.command("import")
def import_(
    shards: Annotated[Path, typer.Argument(help="A folder of flat uint16 or uint32 .npy arrays.")],
    tokenizer: Tokenizer,
    out: Out,
) -> None:
    """Make a token store from shards tokenized by another project. Files with 'val' in their name become validation.

    The files are linked, not copied, if the file system allows it: do not change the originals.
    """
    from rorchat.tokenizer import load_tokenizer
    from rorchat.tokens.import_shards import import_shards

    _print_sizes(import_shards(shards, load_tokenizer(tokenizer), out))
    _print_next(out)


@app.command()
def plan(
    mixture: Annotated[str, typer.Argument(help="A mixture file, or that of a story: rorchat-124m/mixture.yaml.")],
    tokenizer: Tokenizer,
    train_tokens: Annotated[int, typer.Option(help="Tokens to train on.")],
    stores: Annotated[Path, typer.Option(help="The folder of token stores: `token_store` of the recipe.")],
    block_size: Annotated[int, typer.Option(help="Tokens per row.")] = 1024,
    validation_share: ValidationShare = 0.01,
    seed: Annotated[int, typer.Option(help="Seed of generated sources: `data_seed` of the recipe.")] = 0,
    persona: PersonaFile = None,
    out: Annotated[Path | None, typer.Option(help="Plot the plan to this PNG file.")] = None,
) -> None:
    """Prepare the sources of a mixture and show the tokens and epochs of each in every phase, with warnings."""
    from rorchat.mixture.mixture_file import read_mixture
    from rorchat.mixture.plan import Plan
    from rorchat.mixture.stores import count_rows_per_epoch, prepare_stores
    from rorchat.persona import load_persona
    from rorchat.tokenizer import load_tokenizer

    config = read_mixture(mixture)
    if block_size < 2 or train_tokens < block_size:
        raise UsageError(
            f"--train_tokens {train_tokens} is less than one row of --block_size {block_size} (at least 2)."
        )
    _require_share(validation_share)
    if out and out.suffix.lower() != ".png":
        raise UsageError(f"--out is {out}: the plot is a PNG file, give a name that ends in .png.")
    prepared = prepare_stores(
        config,
        load_tokenizer(tokenizer),
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
        print(f"plot  {out}")
