#!/usr/bin/env bash
# The demo story: Tinytown, from raw text to a chat model that is scored. A CPU, some five minutes, no network.
set -euo pipefail
cd "$(dirname "$0")/.."
launch="accelerate launch --quiet --config_file recipes/accelerate/one_process.yaml"

$launch recipes/tokenizer.py --config recipes/demo/tokenizer.yaml
$launch recipes/pretrain.py  --config recipes/demo/pretrain.yaml
$launch recipes/pretrain.py  --config recipes/demo/midtrain.yaml
$launch recipes/sft.py       --config recipes/demo/sft.yaml
$launch recipes/dpo.py       --config recipes/demo/dpo.yaml

mkdir -p runs/demo/model
cp runs/demo/dpo/model/* runs/demo/model/

rorchat evaluate pretrained=runs/demo/pretrain midtrained=runs/demo/midtrain sft=runs/demo/sft dpo=runs/demo/dpo \
    --untrained --out runs/demo/scores.json > /dev/null
rm -f runs/demo/behaviour.json # an earlier model's
# 70 where a measure fails: the report shows which
rorchat gate runs/demo/dpo --before runs/demo/sft --out runs/demo/behaviour.json || [ $? = 70 ]
rorchat report runs/demo
