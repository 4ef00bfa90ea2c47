#!/usr/bin/env bash
# First words: real data from a folder to a chat model of 10M parameters. Two CPU cores, some twenty minutes, no network.
#
#   bash scripts/first_words.sh DATA OUT
#
# DATA holds gpt2_tokenizer/ (vocab.json, merges.txt), corpus_prose/ (train-*.parquet, val.jsonl), alpaca/, dailydialog/,
# chat/ and preference/, each in its original format.
set -euo pipefail
data=$(realpath "${1:?usage: first_words.sh DATA OUT}")
out=$(realpath -m "${2:?usage: first_words.sh DATA OUT}")
cd "$(dirname "$0")/.."
launch="accelerate launch --quiet --config_file recipes/accelerate/one_process.yaml"

$launch recipes/pretrain.py --config recipes/first-words/pretrain.yaml \
    --tokenizer "$data/gpt2_tokenizer" --sources "prose=$data/corpus_prose" --output_dir "$out/pretrain"
rorchat evaluate "pretrained=$out/pretrain" --no-chat --text "prose=$data/corpus_prose/val.jsonl" --out "$out/prose.json"

$launch recipes/sft.py --config recipes/first-words/sft.yaml --model "$out/pretrain" --output_dir "$out/sft" --sources \
    "alpaca=$data/alpaca/alpaca_5000.json" "dailydialog=$data/dailydialog/dialogues_text.txt" \
    "messages=$data/chat/moss003_messages.jsonl" "messages=$data/chat/tulu3_oasst1_sft_sample.jsonl" persona=300

$launch recipes/dpo.py --config recipes/first-words/dpo.yaml --model "$out/sft" --output_dir "$out/dpo" --sources \
    "preference=$data/preference/ultrafeedback_train_1000.jsonl" "preference=$data/preference/tulu3_preference_sample.jsonl" \
    "preference=$data/preference/instruction-data-with-preference.json"

mkdir -p "$out/model"
cp "$out"/dpo/model/* "$out/model/"
rm -f "$out/behaviour.json" # an earlier model's
# 70 where a measure fails: the report shows which
rorchat gate "$out/dpo" --before "$out/sft" --out "$out/behaviour.json" || [ $? = 70 ]
rorchat report "$out"
printf 'Who are you?\nGive three tips for staying healthy.\n' | rorchat chat "$out/model"
