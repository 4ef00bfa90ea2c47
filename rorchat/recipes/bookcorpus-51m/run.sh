#!/usr/bin/env bash
# BookCorpus: 51M parameters from scratch on 1.1 billion tokens, with its own tokenizer. For one V100.
#
#   bash run.sh [SETTINGS]
#
# SETTINGS are flags of `rorchat pretrain`. BOOKCORPUS may name a local copy of the dataset.
# Everything is written to runs/bookcorpus-51m in the working directory.
set -euo pipefail
story=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source=bookcorpus${BOOKCORPUS:+=$BOOKCORPUS}

rorchat train-tokenizer --num_processes 1 --config "$story/tokenizer.yaml" --sources "$source"
rorchat pretrain --num_processes 1 --config "$story/pretrain.yaml" --sources "$source" "$@"
