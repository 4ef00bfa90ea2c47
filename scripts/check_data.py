"""Reads every row of all training files in a folder and writes a table of kept and rejected rows.

    python scripts/check_data.py ../shared/data --out docs/data.md

Evaluation sets are not read, since they must not be used for training. The format of each file is guessed as in
`rorchat data check FILE`. The exit code is 1 if the rows of a file do not add up.
"""

import argparse
import fnmatch
import re
import sys
import textwrap
from functools import partial
from pathlib import Path

from rorchat.errors import RorchatError
from rorchat.inspection import check_source
from rorchat.reporting.tables import format_table

# Evaluation questions, test splits and validation splits, which must stay out of training
EVALUATION = (
    "arc/*", "core_eval/*", "hellaswag/*", "human_eval/*", "lambada/*", "mmlu/*", "piqa/*", "squad/*",
    "gsm8k/test.jsonl", "openbookqa/*dev*", "openbookqa/*test*", "natural_questions/nq_open/*",
    "natural_questions/nq-dev-*", "pile/val.*", "pile/test.*", "c4/*validation*", "chat/mt_bench_question.jsonl",
    "*wiki.test.tokens", "*wiki.valid.tokens", "corpus_prose/val.jsonl", "dailydialog/*test*",
    "dailydialog/*validation*",
)  # fmt: skip
# Files of a dataset without rows of their own: additional tables, labels, descriptions
COMPANIONS = (
    "*.md", "*manifest.json", "*readme.txt", "*README.txt", "gpt2_tokenizer/*", "*_metadata.txt", "*/movie_lines.txt",
    "*dialogues_act_*", "*dialogues_emotion_*", "*/openbook.txt",
)  # fmt: skip

fill = partial(textwrap.fill, width=120, break_long_words=False, break_on_hyphens=False)


def classify(name: str) -> str:
    """Return "evaluation", "companion" or "training"."""
    for kind, patterns in (("evaluation", EVALUATION), ("companion", COMPANIONS)):
        if any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
            return kind
    return "training"


def check_file(root: Path, name: str) -> tuple[list[str], bool]:
    """Return a row of the table and whether the numbers of rows add up."""
    try:
        result = check_source(str(root / name))
    except RorchatError as error:
        return [name, "-", "-", "-", str(error).replace(f"{root}/", "")], False
    row_stats = result.stats
    reasons = [
        f"{count:,} {reason}, first at {row_stats.places[reason][0]}"
        for reason, count in sorted(row_stats.rejects.items(), key=lambda item: -item[1])
    ]
    reasons += [f"({count:,} kept rows repaired: {repair})" for repair, count in row_stats.repairs.items()]
    rejected = "; ".join(reasons).replace(f"{root}/", "").replace(name, "") or "none"
    rejected = re.sub(r"first at :(?=\d)", "first at line ", rejected).replace("first at , row", "first at row")
    adds_up = row_stats.rows_in == row_stats.kept + sum(row_stats.rejects.values()) > 0
    return [name, result.spec.partition("=")[0], f"{row_stats.rows_in:,}", f"{row_stats.kept:,}", rejected], adds_up


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, help="Markdown file; default: stdout")
    arguments = parser.parse_args()
    names = sorted(str(path.relative_to(arguments.folder)) for path in arguments.folder.rglob("*") if path.is_file())
    if not names:
        parser.error(f"{arguments.folder} contains no file")
    kinds = {name: classify(name) for name in names}
    training = [name for name in names if kinds[name] == "training"]
    rows, wrong = [], []
    for number, name in enumerate(training, start=1):
        print(f"{number} of {len(training)}: {name}", file=sys.stderr)
        row, adds_up = check_file(arguments.folder, name)
        rows.append(row)
        wrong += [] if adds_up else [name]
    folders = sorted({name.split("/")[0] for name in names if kinds[name] == "evaluation"})
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
                f"{len(training)} training files. {sum(kind == 'evaluation' for kind in kinds.values())} files of "
                f"evaluation sets and held-out splits were not read (in {', '.join(folders)}), nor "
                f"{sum(kind == 'companion' for kind in kinds.values())} files that contain no rows of their own."
            ),
            "Your own files and datasets of the Hub: [preparing data](preparing_data.md#any-dataset-of-the-hub).",
        ]
    )
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")
    else:
        print(text)
    if wrong:
        print(f"The rows of {', '.join(wrong)} do not add up or cannot be read.", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
