#!/usr/bin/env bash
# FineWeb-Edu: 124M parameters from scratch on 10 billion tokens. For eight GPUs of 80 GB.
#
#   bash run.sh [SETTINGS]
#
# SETTINGS are flags of `rorchat pretrain`. FINEWEB_EDU may name a local copy of the dataset.
# Everything is written to runs/fineweb-124m in the working directory.
set -euo pipefail
story=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source=fineweb_edu${FINEWEB_EDU:+=$FINEWEB_EDU}

# The tokens are prepared before the GPUs are started
rorchat data prepare "$source" --tokenizer gpt2 --validation_share 0.002 --out runs/fineweb-124m/tokens/fineweb_edu
rorchat pretrain --config "$story/pretrain.yaml" --sources "$source" "$@"
