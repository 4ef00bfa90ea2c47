#!/usr/bin/env bash
# RorChat: GPT-2's checkpoint goes on with seven sources, learns to chat, and learns which replies are better. For one T4;
# with --smoke three steps of every stage, on any machine.
#
#   bash scripts/rorchat_124m.sh DATA OUT [--smoke | you/your-model]
#
# DATA holds, in their original forms or as their Hub folders, by these names or with the variables below set to others:
# pile, dailydialog, cornell_movie_dialogs, natural_questions, openbookqa, math_dataset, mbpp, ultrafeedback, hh_rlhf.
# No tokenizer is trained: GPT-2's gets the control tokens. GPT2 may name a folder laid out like the Hub's gpt2. With a name
# on the Hub the model is pushed to it in the end, if it behaves.
set -euo pipefail
DATA=$(realpath "${1:?usage: rorchat_124m.sh DATA OUT [--smoke | you/your-model]}")
OUT=$(realpath -m "${2:?usage: rorchat_124m.sh DATA OUT [--smoke | you/your-model]}")
last=${3:-}
GPT2=${GPT2:-gpt2}
[ ! -d "$GPT2" ] || GPT2=$(realpath "$GPT2")
cd "$(dirname "$0")/.."
launch="accelerate launch --quiet --config_file recipes/accelerate/one_process.yaml"
story=recipes/rorchat-124m

export PILE=${PILE:-$DATA/pile} DAILYDIALOG=${DAILYDIALOG:-$DATA/dailydialog} CORNELL=${CORNELL:-$DATA/cornell_movie_dialogs}
export NATURAL_QUESTIONS=${NATURAL_QUESTIONS:-$DATA/natural_questions} OPENBOOKQA=${OPENBOOKQA:-$DATA/openbookqa}
export MATHEMATICS=${MATHEMATICS:-$DATA/math_dataset} MBPP=${MBPP:-$DATA/mbpp}
export ULTRAFEEDBACK=${ULTRAFEEDBACK:-$DATA/ultrafeedback} HH_RLHF=${HH_RLHF:-$DATA/hh_rlhf}

smoke="" base=$OUT/pretrain
if [ "$last" = --smoke ]; then
    # Small samples will do, of which more must be held out. What pretraining leaves is a toy: chat begins with GPT-2 itself.
    smoke="--smoke --validation_share 0.02" base=$GPT2
fi
$launch recipes/pretrain.py --config $story/pretrain.yaml --model "$GPT2" --output_dir "$OUT/pretrain" $smoke
$launch recipes/sft.py --config $story/sft.yaml --model "$base" --output_dir "$OUT/sft" $smoke
$launch recipes/dpo.py --config $story/dpo.yaml --model "$OUT/sft" --output_dir "$OUT/dpo" $smoke
if [ "$smoke" ]; then
    rorchat report "$OUT"
    exit
fi

rorchat evaluate "pretrained=$OUT/pretrain" "sft=$OUT/sft" "dpo=$OUT/dpo" --text "$OUT/pretrain/tokens/pile" \
    --out "$OUT/scores.json"
mkdir -p "$OUT/model"
cp "$OUT"/dpo/model/* "$OUT/model/"
rm -f "$OUT/behaviour.json" # an earlier model's
verdict=0
rorchat gate "$OUT/dpo" --before "$OUT/sft" --out "$OUT/behaviour.json" || verdict=$?
rorchat report "$OUT"
# 70 where a measure fails: the report shows which, and nothing is pushed
if [ "$verdict" != 0 ]; then
    exit "$verdict"
fi
if [ "$last" ]; then
    rorchat push "$OUT/dpo" "$last"
fi
