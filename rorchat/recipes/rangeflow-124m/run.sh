#!/usr/bin/env bash
# RangeFlow: 124M parameters from scratch on a mixture that ramps from C4 to Cosmopedia, Alpaca and Python. For one T4.
#
#   bash run.sh DATA [SETTINGS]
#
# DATA holds the datasets in their original formats or as their Hub folders, in subfolders of these names: c4,
# cosmopedia, alpaca, python_code. A variable below, if set, gives another place. SETTINGS are flags of `rorchat
# pretrain`. Everything is written to runs/rangeflow-124m in the working directory.
set -euo pipefail
DATA=$(realpath "${1:?usage: run.sh DATA [SETTINGS]}")
shift
story=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

export C4=${C4:-$DATA/c4} COSMOPEDIA=${COSMOPEDIA:-$DATA/cosmopedia} ALPACA=${ALPACA:-$DATA/alpaca}
export PYTHON_CODE=${PYTHON_CODE:-$DATA/python_code}
rorchat pretrain --num_processes 1 --config "$story/pretrain.yaml" "$@"
