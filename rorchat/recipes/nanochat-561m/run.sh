#!/usr/bin/env bash
# nanochat's d20 as stock GPT-2: 558M parameters from scratch on 11.2 billion tokens. For eight GPUs of 80 GB.
#
#   bash run.sh [SETTINGS]
#
# SETTINGS are flags of `rorchat pretrain`. FINEWEB_EDU may name a local copy of the dataset.
# Everything is written to runs/nanochat-561m in the working directory.
set -euo pipefail
story=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=runs/nanochat-561m
source=fineweb_edu${FINEWEB_EDU:+=$FINEWEB_EDU}

rorchat train-tokenizer --num_processes 1 --config "$story/tokenizer.yaml" --sources "$source"
# The tokens are prepared before the GPUs are started
rorchat data prepare "$source" --tokenizer $out/tokenizer --validation_share 0.002 --out $out/tokens/fineweb_edu
rorchat pretrain --config "$story/pretrain.yaml" --sources "$source" "$@"
