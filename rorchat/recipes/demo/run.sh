#!/usr/bin/env bash
# Tinytown: from generated text to a chat model with scores, in about five minutes on a CPU, without a network.
#
#   bash run.sh
#
# Everything is written to runs/demo in the working directory.
set -euo pipefail
story=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=runs/demo

rorchat train-tokenizer --num_processes 1 --config "$story/tokenizer.yaml"
rorchat pretrain --num_processes 1 --config "$story/pretrain.yaml"
rorchat pretrain --num_processes 1 --config "$story/midtrain.yaml"
rorchat sft --num_processes 1 --config "$story/sft.yaml"
rorchat dpo --num_processes 1 --config "$story/dpo.yaml"

mkdir -p $out/model
cp $out/dpo/model/* $out/model/

rorchat evaluate pretrained=$out/pretrain midtrained=$out/midtrain sft=$out/sft dpo=$out/dpo \
    --untrained --out $out/scores.json > /dev/null
rm -f $out/behaviour.json # of an earlier model
# The gate exits with 70 if a measure fails; the report shows which
rorchat gate $out/dpo --before $out/sft --out $out/behaviour.json || [ $? = 70 ]
rorchat report $out
