"""Train a byte-level BPE tokenizer with the ChatML control tokens.

rorchat train-tokenizer --config demo/tokenizer.yaml
python recipes/tokenizer.py --sources text=my_texts/ --vocab_size 8192 --output_dir runs/tokenizer
"""

from rorchat.console import configure_libraries
from rorchat.errors import exits_with_one_line


def main(argv: list[str] | None = None) -> dict[str, float]:
    configure_libraries()  # before they are imported
    from rorchat.training.arguments import parse
    from rorchat.training.tokenizer import TokenizerArguments, run_tokenizer_training

    return run_tokenizer_training(parse(TokenizerArguments, argv))


if __name__ == "__main__":
    exits_with_one_line(main)()
