"""Reads every row of every training file below a folder, and writes where each row went as a table.

    python scripts/check_data.py ../shared/data --out docs/data.md

Evaluation sets are named and left alone: nobody should train on them. What each file holds is guessed, as
`rorchat data check FILE` does. Ends with 1 if the rows of a file do not add up.
"""

import argparse
import fnmatch
import re
import sys
import textwrap
from functools import partial
from pathlib import Path

from rorchat.errors import RorchatError
from rorchat.inspection import check
from rorchat.report import format_table

# Held-out questions, and test and validation splits, which stay out of training
EVALUATION = (
    "arc/*", "core_eval/*", "hellaswag/*", "human_eval/*", "lambada/*", "mmlu/*", "piqa/*", "squad/*",
    "gsm8k/test.jsonl", "openbookqa/*dev*", "openbookqa/*test*", "natural_questions/nq_open/*",
    "natural_questions/nq-dev-*", "pile/val.*", "pile/test.*", "c4/*validation*", "chat/mt_bench_question.jsonl",
    "*wiki.test.tokens", "*wiki.valid.tokens", "corpus_prose/val.jsonl", "dailydialog/*test*",
    "dailydialog/*validation*",
)  # fmt: skip
# Parts of a dataset that are no rows of it: tables that go with it, labels, descriptions
COMPANIONS = (
    "*.md", "*manifest.json", "*readme.txt", "*README.txt", "gpt2_tokenizer/*", "*_metadata.txt", "*/movie_lines.txt",
    "*dialogues_act_*", "*dialogues_emotion_*", "*/openbook.txt",
)  # fmt: skip

fill = partial(textwrap.fill, width=120, break_long_words=False, break_on_hyphens=False)


def sort_of(name: str) -> str:
    """What a file is: "evaluation", "companion" or "training"."""
    for sort, patterns in (("evaluation", EVALUATION), ("companion", COMPANIONS)):
        if any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
            return sort
    return "training"


def row_of(root: Path, name: str) -> tuple[list[str], bool]:
    """(a row of the table, whether the file's rows add up)."""
    try:
        found = check(str(root / name))
    except RorchatError as error:
        return [name, "-", "-", "-", str(error).replace(f"{root}/", "")], False
    tally = found.stats
    reasons = [
        f"{count:,} {reason}, first at {tally.places[reason][0]}"
        for reason, count in sorted(tally.rejects.items(), key=lambda item: -item[1])
    ]
    reasons += [f"({count:,} kept rows repaired: {repair})" for repair, count in tally.repairs.items()]
    said = "; ".join(reasons).replace(f"{root}/", "").replace(name, "") or "none"
    said = re.sub(r"first at :(?=\d)", "first at line ", said).replace("first at , row", "first at row")
    adds_up = tally.rows_in == tally.kept + sum(tally.rejects.values()) > 0
    return [name, found.spec.partition("=")[0], f"{tally.rows_in:,}", f"{tally.kept:,}", said], adds_up


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, help="a Markdown file; default: the terminal")
    arguments = parser.parse_args()
    names = sorted(str(path.relative_to(arguments.folder)) for path in arguments.folder.rglob("*") if path.is_file())
    if not names:
        parser.error(f"{arguments.folder} holds no file")
    sorts = {name: sort_of(name) for name in names}
    training = [name for name in names if sorts[name] == "training"]
    rows, wrong = [], []
    for number, name in enumerate(training, start=1):
        print(f"{number} of {len(training)}: {name}", file=sys.stderr)
        row, adds_up = row_of(arguments.folder, name)
        rows.append(row)
        wrong += [] if adds_up else [name]
    folders = sorted({name.split("/")[0] for name in names if sorts[name] == "evaluation"})
    text = "\n\n".join(
        [
            "# What happens to every row",
            fill(
                "Every training file in a folder of real data in original formats, as read by `python "
                "scripts/check_data.py FOLDER --out docs/data.md` (`rorchat data check FILE` for a single file). `rows "
                "= kept + rejected` always holds. Places are lines or rows of the file; rows and messages are numbered "
                "from 0. The format of each file was guessed."
            ),
            format_table(["file", "read as", "rows", "kept", "rejected"], rows),
            fill(
                f"{len(training)} training files. {sum(sort == 'evaluation' for sort in sorts.values())} files of "
                f"evaluation sets and held-out splits were not read (in {', '.join(folders)}), nor "
                f"{sum(sort == 'companion' for sort in sorts.values())} files that contain no rows of their own."
            ),
        ]
    )
    if arguments.out:
        arguments.out.write_text(text + "\n")
    else:
        print(text)
    if wrong:
        print(f"The rows of {', '.join(wrong)} do not add up or cannot be read.", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
