#!/usr/bin/env bash
# RorChat: GPT-2's checkpoint is pretrained further on seven sources, then learns chat and preferences. For one T4.
#
#   bash run.sh DATA OUT [--smoke | you/your-model]
#
# With --smoke, three steps of every stage run on any machine. With a name on the Hub, the model is pushed to it if the
# gate passes. DATA holds the datasets in their original formats or as their Hub folders, in subfolders of these names:
# pile, dailydialog, cornell_movie_dialogs, natural_questions, openbookqa, math_dataset, mbpp, ultrafeedback, hh_rlhf.
# A variable below, if set, gives another place. GPT2 may name a folder laid out like the Hub's gpt2. No tokenizer is
# trained: the control tokens are added to GPT-2's.
set -euo pipefail
usage="usage: run.sh DATA OUT [--smoke | you/your-model]"
DATA=$(realpath "${1:?$usage}")
OUT=$(realpath -m "${2:?$usage}")
last=${3:-}
GPT2=${GPT2:-gpt2}
story=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

export PILE=${PILE:-$DATA/pile} DAILYDIALOG=${DAILYDIALOG:-$DATA/dailydialog}
export CORNELL=${CORNELL:-$DATA/cornell_movie_dialogs}
export NATURAL_QUESTIONS=${NATURAL_QUESTIONS:-$DATA/natural_questions} OPENBOOKQA=${OPENBOOKQA:-$DATA/openbookqa}
export MATHEMATICS=${MATHEMATICS:-$DATA/math_dataset} MBPP=${MBPP:-$DATA/mbpp}
export ULTRAFEEDBACK=${ULTRAFEEDBACK:-$DATA/ultrafeedback} HH_RLHF=${HH_RLHF:-$DATA/hh_rlhf}

smoke="" base=$OUT/pretrain
if [ "$last" = --smoke ]; then
    # Small samples need a larger validation share. Smoke pretraining leaves a toy model, so SFT starts from GPT-2 itself.
    smoke="--smoke --validation_share 0.02" base=$GPT2
fi
rorchat pretrain --num_processes 1 --config "$story/pretrain.yaml" --model "$GPT2" --output_dir "$OUT/pretrain" $smoke
rorchat sft --num_processes 1 --config "$story/sft.yaml" --model "$base" --output_dir "$OUT/sft" $smoke
rorchat dpo --num_processes 1 --config "$story/dpo.yaml" --model "$OUT/sft" --output_dir "$OUT/dpo" $smoke
if [ "$smoke" ]; then
    rorchat report "$OUT"
    exit
fi

rorchat evaluate "pretrained=$OUT/pretrain" "sft=$OUT/sft" "dpo=$OUT/dpo" --text "$OUT/pretrain/tokens/pile" \
    --out "$OUT/scores.json"
mkdir -p "$OUT/model"
cp "$OUT"/dpo/model/* "$OUT/model/"
rm -f "$OUT/behaviour.json" # of an earlier model
verdict=0
rorchat gate "$OUT/dpo" --before "$OUT/sft" --out "$OUT/behaviour.json" || verdict=$?
rorchat report "$OUT"
# The gate exits with 70 if a measure fails; then nothing is pushed
if [ "$verdict" != 0 ]; then
    exit "$verdict"
fi
if [ "$last" ]; then
    rorchat push "$OUT/dpo" "$last"
fi
