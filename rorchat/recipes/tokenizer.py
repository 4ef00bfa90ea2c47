"""Train a byte-level BPE tokenizer with the ChatML control tokens.

rorchat train-tokenizer --config demo/tokenizer.yaml
python recipes/tokenizer.py --sources text=my_texts/ --vocab_size 8192 --output_dir runs/tokenizer
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rorchat.console import configure_libraries
from rorchat.errors import exits_with_one_line

if TYPE_CHECKING:
    from rorchat.training.result import TokenizerResult


@exits_with_one_line
def main(argv: list[str] | None = None) -> dict[str, float]:
    configure_libraries()  # before they are imported
    return train(argv).metrics


def train(argv: Sequence[str] | None = None, settings: Mapping[str, object] | None = None) -> "TokenizerResult":
    """Trains with the settings of the command line and of Python, see `rorchat.training.arguments.parse`."""
    from rorchat.training.arguments import parse
    from rorchat.training.tokenizer import TokenizerArguments, run_tokenizer_training

    arguments = parse(TokenizerArguments, argv, settings)
    return run_tokenizer_training(arguments)


if __name__ == "__main__":
    main()
