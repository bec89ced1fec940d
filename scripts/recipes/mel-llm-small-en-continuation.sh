#!/usr/bin/env bash
# Trains the small English model that goes on with speech (SPECTRON's task), out of the one that speaks, to the folder of its Hub
# repository. What is learnt is in mel-llm-small-en-continuation/.
#
#   scripts/recipes/mel-llm-small-en-continuation.sh SPEECH OUTPUT [arguments of scripts/train.py]
#
#   SPEECH   a folder with the corpus synth-en, and joe*, if there are any, with more of its Piper voice: see
#            mel-llm-small-en-tts.sh
#   OUTPUT   gets start/ (the voice with a prompt for going on and a CTC head for reading), 1-all/ (what training leaves) and
#            model/ (what is published)
#
#   START=FOLDER         the voice; by default hub_cards/mel-llm-small-en-tts
#   PYTHON=python3.12    choose the interpreter
#
# What was interrupted goes on when the same command is given again.
set -euo pipefail

here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
recipe="$here/recipes/mel-llm-small-en-continuation"
python="${PYTHON:-python}"
speech="${1:?SPEECH, the folder with the corpora, is missing}"
output="${2:?OUTPUT, a folder, is missing}"
shift 2
mkdir -p "$output"
[[ -f "$output/start/config.json" ]] || "$python" "$here/recipes/mel_llm_small_en_continuation_start.py" \
    "${START:-$here/../hub_cards/mel-llm-small-en-tts}" "$output/start"

# One voice is spoken, and gone on with; the others are there to be read
one="$speech/synth-en,exclude=speaker:[!p]*"
heard=("$one,weight=1")
for folder in "$speech"/joe*/; do
    [[ ! -d "$folder" ]] || heard+=("$folder,weight=1")
done
heard+=("$speech/synth-en,exclude=speaker:p*,task=asr,weight=2")

# train NAME MODEL ARGUMENT...: a step that is done is left alone
train() {
    local name=$1 model=$2
    shift 2
    [[ -f "$output/$name/training_summary.json" ]] || "$python" "$here/train.py" "$recipe/$name.yaml" \
        --model_name_or_path "$output/$model" --output_dir "$output/$name" --train_data "${heard[@]}" --eval_data "$one" "$@"
}

train 1-all start "$@"
[[ -f "$output/model/config.json" ]] || "$python" "$here/pack.py" "$output/1-all" "$output/model"
