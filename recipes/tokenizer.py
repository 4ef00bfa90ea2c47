"""Train a byte-level BPE tokenizer with the ChatML control tokens in it.

accelerate launch recipes/tokenizer.py --config recipes/demo/tokenizer.yaml
python recipes/tokenizer.py --sources text=my_texts/ --vocab_size 8192 --output_dir runs/tokenizer
"""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from rorchat.errors import MismatchError, UsageError, exits_with_one_line
from rorchat.persona import load_persona
from rorchat.sources import texts
from rorchat.tokenizer import train_tokenizer
from rorchat.training.arguments import DataArguments, parse


@dataclass
class TokenizerArguments(DataArguments):
    """Settings of this recipe."""

    vocab_size: int = field(default=32_768, metadata={"help": "Tokens in all, a multiple of 64."})
    max_characters: int = field(default=1_000_000_000, metadata={"help": "Text that is counted; bounds memory."})
    output_dir: str = field(default="", metadata={"help": "Where the tokenizer goes."})

    def __post_init__(self):
        self.check_data()
        if not self.output_dir:
            raise UsageError("No output folder: give --output_dir runs/my-tokenizer")


@exits_with_one_line
def main(argv: list[str] | None = None) -> dict[str, float]:
    arguments = parse(TokenizerArguments, argv)
    folder = Path(arguments.output_dir)
    config = folder / "config.yaml"
    if os.environ.get("RANK", "0") != "0":
        return {}  # one process trains a tokenizer
    if folder.is_dir() and any(folder.iterdir()):
        if not config.is_file() or yaml.safe_load(config.read_text()) != arguments.given:
            raise MismatchError(
                f"The output folder {folder} holds another tokenizer or other files. "
                "Choose another output_dir, or delete it."
            )
        print(f"{folder}: trained before with these settings; delete the folder to train it again")
        return {}
    started = time.monotonic()
    persona = load_persona(arguments.persona)
    tokenizer = train_tokenizer(
        texts(arguments.sources, arguments.data_seed, persona), arguments.vocab_size, persona, arguments.max_characters
    )
    tokenizer.save_pretrained(folder)
    config.write_text(yaml.safe_dump(arguments.given))
    seconds = round(time.monotonic() - started, 1)
    print(f"{folder}: {len(tokenizer):,} tokens, trained in {seconds} s")
    return {"vocab_size": len(tokenizer), "seconds": seconds}


if __name__ == "__main__":
    main()
