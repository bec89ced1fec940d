#!/usr/bin/env bash
# Trains the small English model that speaks, and that goes on with speech (SPECTRON's task), out of the one that reads, to the folder
# of its Hub repository. What is learnt is in mel-llm-small-en-tts/, the voice, and then in mel-llm-small-en-continuation/.
#
#   scripts/recipes/mel-llm-small-en-continuation.sh SPEECH OUTPUT [arguments of scripts/train.py, for every step]
#
#   SPEECH   a folder with the corpus synth-en, and joe*, if there are any, with more of its Piper voice: see
#            mel-llm-small-en-tts.sh
#   OUTPUT   gets voice/ (what mel-llm-small-en-tts.sh makes), start/ (the voice with a prompt for going on and a CTC head for
#            reading), 1-all/ and 2-speech/ (what training leaves), vocoder/ and model/ (what is published)
#
#   START=FOLDER         a voice to begin with; by default one is trained
#   READER=FOLDER        what that voice begins with; by default hub_cards/mel-llm-small-en
#   VOCODER=FOLDER       a vocoder that scripts/train_vocoder.py trained, or a model that speaks, for its; by default one is trained
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
if [[ ! -f "$output/start/config.json" ]]; then
    [[ -n "${START:-}" ]] || START="${READER:-}" VOCODER="" bash "$here/recipes/mel-llm-small-en-tts.sh" "$speech" "$output/voice" "$@"
    "$python" "$here/recipes/mel_llm_small_en_continuation_start.py" "${START:-$output/voice/model}" "$output/start"
fi

# One voice is spoken, and gone on with; the others are there to be read
one="$speech/synth-en,exclude=speaker:[!p]*"
spoken=("$one")
heard=("$one,weight=1")
for folder in "$speech"/joe*/; do
    if [[ -d "$folder" ]]; then
        spoken+=("$folder")
        heard+=("$folder,weight=1")
    fi
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
train 2-speech 1-all "$@"
if [[ ! -f "$output/model/config.json" ]]; then
    # The spectral losses alone: a step with discriminators takes seven times as long on a CPU
    [[ -n "${VOCODER:-}" ]] || "$python" "$here/train_vocoder.py" --train_data "${spoken[@]}" --eval_data "$one" --edge_padding 120 \
        --max_steps 6000 --adversarial_start 1000000 --learning_rate 1e-3 --learning_rate_decay 0.75 --bf16 \
        --save_steps 1000 --output_dir "$output/vocoder"
    "$python" "$here/pack.py" "$output/2-speech" "$output/model" --vocoder "${VOCODER:-$output/vocoder}"
fi
