#!/usr/bin/env bash
# Trains a small English model that speaks, out of the one that reads: what mel-llm-small-en-continuation.sh begins with. The steps
# are those of the files in mel-llm-small-en-tts/.
#
#   scripts/recipes/mel-llm-small-en-tts.sh SPEECH OUTPUT [arguments of scripts/train.py, for every step]
#
#   SPEECH   a folder with the corpus synth-en, of which Piper's voice is taken, and joe*, if there are any, with more of it:
#            `scripts/prepare_data.py synthetic --texts speech/text/sentences_en_train.tsv --engines piper --piper_variation 0
#            --speeds 1 1 --output_dir SPEECH/joe --hours 14` (docs/data.md)
#   OUTPUT   gets start/ (the reader with a speech head, letter by letter), 1-place/ and 2-own/ (what training leaves) and model/
#            (what is left of it for speaking)
#
#   START=FOLDER         the reader; by default hub_cards/mel-llm-small-en
#   VOCODER=FOLDER       a vocoder that scripts/train_vocoder.py trained; by default Griffin-Lim
#   PYTHON=python3.12    choose the interpreter
#
# What was interrupted goes on when the same command is given again.
set -euo pipefail

here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
recipe="$here/recipes/mel-llm-small-en-tts"
python="${PYTHON:-python}"
speech="${1:?SPEECH, the folder with the corpora, is missing}"
output="${2:?OUTPUT, a folder, is missing}"
shift 2
mkdir -p "$output"
# Letters and not words: a state has one or two of them to say, and what they sound like is soon known. 12.5 patches a second, whatever
# the reader's token rate is: half as many to be written as at 25
[[ -f "$output/start/config.json" ]] || "$python" "$here/convert_text_llm.py" "${START:-$here/../hub_cards/mel-llm-small-en}" \
    --letters_only --speaks --transcription_instruction "" --speech_instruction "" --chat_template "$recipe/chat_template.jinja" \
    --audio_config '{"reduction_factor": 8, "ctc_rate": 4}' \
    --speech_config '{"ctc_weight": 1, "ctc_rate": 4, "min_tokens_per_second": 6, "keep_voice": false}' --output_dir "$output/start"

# One voice: its clips in synth-en, which vary, and those that do not
one=("$speech/synth-en,exclude=speaker:[!p]*")
spoken=("${one[@]}")
for folder in "$speech"/joe*/; do
    [[ ! -d "$folder" ]] || spoken+=("$folder")
done

# train NAME MODEL ARGUMENT...: a step that is done is left alone
train() {
    local name=$1 model=$2
    shift 2
    [[ -f "$output/$name/training_summary.json" ]] || "$python" "$here/train.py" "$recipe/$name.yaml" \
        --model_name_or_path "$output/$model" --output_dir "$output/$name" --vocoder "${VOCODER:-griffin_lim}" \
        --train_data "${spoken[@]}" --eval_data "${one[@]}" "$@"
}

train 1-place start "$@"
train 2-own 1-place "$@"
[[ -f "$output/model/config.json" ]] || "$python" "$here/pack.py" "$output/2-own" "$output/model" --speaks_only
