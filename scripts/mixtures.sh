#!/usr/bin/env bash
# Plans and prepares the mixtures of two stories and trains on them for 20 steps in the demo's size, in minutes on two
# cores. It shows whether rorchat-124m and rangeflow-124m can read your files, before you rent a GPU.
#
#   bash scripts/mixtures.sh DATA OUT
#
# DATA holds small samples in subfolders of these names: pile, dailydialog, cornell_movie_dialogs, natural_questions,
# openbookqa, math_dataset, mbpp, c4, cosmopedia, alpaca, python_code, gpt2_tokenizer. A variable below, if set, gives
# another place. Without cosmopedia, a file of corpus_prose is used in its place.
set -euo pipefail
DATA=$(realpath "${1:?usage: mixtures.sh DATA OUT}")
OUT=$(realpath -m "${2:?usage: mixtures.sh DATA OUT}")

export PILE=${PILE:-$DATA/pile/pile_sample.jsonl} DAILYDIALOG=${DAILYDIALOG:-$DATA/dailydialog}
export CORNELL=${CORNELL:-$DATA/cornell_movie_dialogs} OPENBOOKQA=${OPENBOOKQA:-$DATA/openbookqa}
export NATURAL_QUESTIONS=${NATURAL_QUESTIONS:-$DATA/natural_questions/natural_questions_openbook_short.jsonl}
export MATHEMATICS=${MATHEMATICS:-$DATA/math_dataset} MBPP=${MBPP:-$DATA/mbpp/mbpp.jsonl}
export C4=${C4:-$DATA/c4/c4-sample.00000-of-00001.json.gz} ALPACA=${ALPACA:-$DATA/alpaca}
export PYTHON_CODE=${PYTHON_CODE:-$DATA/python_code/cosqa-dev.json}
export COSMOPEDIA=${COSMOPEDIA:-$([ -d "$DATA/cosmopedia" ] && echo "$DATA/cosmopedia" || echo "$DATA/corpus_prose/train-00000-of-00006.parquet")}

for story in rorchat-124m rangeflow-124m; do
    rorchat data plan "$story/mixture.yaml" --tokenizer "$DATA/gpt2_tokenizer" --train_tokens 2000000 \
        --block_size 256 --validation_share 0.02 --stores "$OUT/$story/tokens" --out "$OUT/$story-plan.png"
    rorchat pretrain --num_processes 1 \
        --mixture "$story/mixture.yaml" --tokenizer "$DATA/gpt2_tokenizer" --size demo --block_size 256 \
        --global_batch_tokens 4096 --per_device_train_batch_size 16 --max_steps 20 --eval_strategy no --logging_steps 5 \
        --validation_share 0.02 --token_store "$OUT/$story/tokens" --output_dir "$OUT/$story/pretrain"
done
