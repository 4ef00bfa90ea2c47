#!/usr/bin/env bash
# First words: from real data to a chat model of 10M parameters, in about twenty minutes on two CPU cores.
#
#   bash run.sh DATA OUT
#
# DATA holds gpt2_tokenizer/ (vocab.json, merges.txt), corpus_prose/ (train-*.parquet, val.jsonl), alpaca/,
# dailydialog/, chat/ and preference/, each in its original format.
set -euo pipefail
data=$(realpath "${1:?usage: run.sh DATA OUT}")
out=$(realpath -m "${2:?usage: run.sh DATA OUT}")
story=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

rorchat pretrain --num_processes 1 --config "$story/pretrain.yaml" \
    --tokenizer "$data/gpt2_tokenizer" --sources "prose=$data/corpus_prose" --output_dir "$out/pretrain"
rorchat evaluate "pretrained=$out/pretrain" --no_chat --text "prose=$data/corpus_prose/val.jsonl" --out "$out/prose.json"

rorchat sft --num_processes 1 --config "$story/sft.yaml" --model "$out/pretrain" --output_dir "$out/sft" --sources \
    "alpaca=$data/alpaca/alpaca_5000.json" "dailydialog=$data/dailydialog/dialogues_text.txt" \
    "messages=$data/chat/moss003_messages.jsonl" "messages=$data/chat/tulu3_oasst1_sft_sample.jsonl" persona=300

rorchat dpo --num_processes 1 --config "$story/dpo.yaml" --model "$out/sft" --output_dir "$out/dpo" --sources \
    "preference=$data/preference/ultrafeedback_train_1000.jsonl" \
    "preference=$data/preference/tulu3_preference_sample.jsonl" \
    "preference=$data/preference/instruction-data-with-preference.json"

mkdir -p "$out/model"
cp "$out"/dpo/model/* "$out/model/"
rm -f "$out/behaviour.json" # of an earlier model
# The gate exits with 70 if a measure fails; the report shows which
rorchat gate "$out/dpo" --before "$out/sft" --out "$out/behaviour.json" || [ $? = 70 ]
rorchat report "$out"
printf 'Who are you?\nGive three tips for staying healthy.\n' | rorchat chat "$out/model"
