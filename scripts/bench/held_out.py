"""How many of all of Tinytown's held-out questions models answer: finer than the 200 of `rorchat evaluate`.

    python scripts/bench/held_out.py sft=runs/demo/sft grpo=runs/demo/grpo ...

A question that several draws have counts once; of 716 one is 0.14 %.
"""

import sys

from rorchat.evaluation.scores import score_chat
from rorchat.inference.engine import load_model
from rorchat.persona import load_persona
from rorchat.sources.tinytown import questions

DRAWS = 5  # of 200 each


def main(models: list[str]) -> None:
    asked = list({each.text: each for seed in range(DRAWS) for each in questions(seed=seed)}.values())
    for model in models:
        name, _, folder = model.rpartition("=")
        scores = score_chat(load_model(folder), name or folder, folder, load_persona(None), asked)
        print("  ".join(f"{row} {value}" for row, value in {"model": scores.name, **scores.rows()}.items()), flush=True)


if __name__ == "__main__":
    if not sys.argv[1:]:
        raise SystemExit(__doc__)
    main(sys.argv[1:])
