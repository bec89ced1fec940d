#!/usr/bin/env bash
# Trains the small English model that reads and speaks, from a language model to the folder of its Hub repository.
#
#   scripts/recipes/mel-llm-small-en.sh SPEECH OUTPUT [arguments of scripts/train.py]
#
#   SPEECH   a folder with the corpora asterisk-en and synth-en: see docs/data.md
#   OUTPUT   gets start/ (the untrained model), run/ and vocoder/ (what training leaves), and model/ (what is published)
#
#   BACKBONE=FOLDER GGUF=FILE   the language model; by default HuggingFaceTB/SmolLM2-135M-Instruct from the Hub
#   VOCODER_STEPS=0             no neural vocoder: Griffin-Lim
#   PYTHON=python3.12           choose the interpreter
#
# On a GPU, add --bf16. What was interrupted goes on when the same command is given again.
set -euo pipefail

here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-python}"
speech="${1:?SPEECH, the folder with the corpora, is missing}"
output="${2:?OUTPUT, a folder, is missing}"
shift 2

mkdir -p "$output"
if [[ ! -f "$output/start/config.json" ]]; then
    "$python" - "$speech"/{asterisk,synth}-en/train/metadata.csv > "$output/sentences.txt" <<'PYTHON'
import csv, sys
for path in sys.argv[1:]:
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            print(" ".join(row["text"].split()))
PYTHON
    "$python" "$here/convert_text_llm.py" "${BACKBONE:-HuggingFaceTB/SmolLM2-135M-Instruct}" ${GGUF:+--gguf_file "$GGUF"} \
        --layers 0-5 --vocab_size 8000 --vocab_texts "$output/sentences.txt" --speaks --output_dir "$output/start" \
        --audio_config '{"reduction_factor": 4, "conv_channels": 256, "hidden_size": 256, "ctc_weight": 0.3, "ctc_rate": 2}'
fi

vocoder=griffin_lim
steps="${VOCODER_STEPS:-100000}"
if [[ "$steps" != 0 ]]; then
    vocoder="$output/vocoder"
    "$python" "$here/train_vocoder.py" --output_dir "$vocoder" --max_steps "$steps" \
        --train_data "$speech/asterisk-en,weight=1" "$speech/synth-en,weight=2,exclude=source:*espeak*" \
        --eval_data "$speech/asterisk-en" --vocoder_kwargs '{"lookahead": 1}' \
        --adversarial_start "$((steps / 4))"
fi

# The worst of the synthetic voices are for reading only
"$python" "$here/train.py" "$here/recipes/mel-llm-small-en.yaml" --model_name_or_path "$output/start" \
    --output_dir "$output/run" --vocoder "$vocoder" \
    --train_data "$speech/asterisk-en,weight=1" "$speech/synth-en,weight=4,exclude=source:*espeak*" \
    "$speech/synth-en,weight=1,task=asr" \
    --eval_data "$speech/asterisk-en" "$speech/synth-en" "$@"

[[ -f "$output/model/config.json" ]] || "$python" "$here/pack.py" "$output/run" "$output/model"
