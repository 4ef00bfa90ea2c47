"""Scores models on all validation questions of Tinytown, more precisely than the 200 of `rorchat evaluate`.

    python scripts/bench/validation_questions.py sft=runs/demo/sft grpo=runs/demo/grpo ...

A question that is drawn several times counts once; one of the 716 questions is 0.14 %.
"""

import sys

from rorchat.evaluation.scores import score_chat
from rorchat.inference.engine import load_model
from rorchat.persona import load_persona
from rorchat.sources.tinytown import held_out_questions

DRAWS = 5  # of 200 questions


def main(models: list[str]) -> None:
    unique = list(
        {question.text: question for seed in range(DRAWS) for question in held_out_questions(seed=seed)}.values()
    )
    for model in models:
        name, _, folder = model.rpartition("=")
        scores = score_chat(load_model(folder), name or folder, folder, load_persona(None), unique)
        print("  ".join(f"{row} {value}" for row, value in {"model": scores.name, **scores.rows()}.items()), flush=True)


if __name__ == "__main__":
    if not sys.argv[1:]:
        raise SystemExit(__doc__)
    main(sys.argv[1:])
