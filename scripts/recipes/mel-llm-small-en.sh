#!/usr/bin/env bash
# Trains the small English model that reads, from a language model to the folder of its Hub repository. The steps are those of the
# files in mel-llm-small-en/. Its sibling that speaks, mel-llm-small-en-continuation.sh, begins with what comes out as READER.
#
#   scripts/recipes/mel-llm-small-en.sh SPEECH OUTPUT [arguments of scripts/train.py, for every step]
#
#   SPEECH   a folder with the corpora asterisk-en and synth-en, and more-NAME, if there are any, with more speech: see
#            docs/data.md. Natural voices, and many of them, help most: `scripts/prepare_data.py synthetic --texts FILE
#            --engines piper --piper_voices en_US-libritts_r-medium.onnx --output_dir SPEECH/more-voices --hours 8 ...`
#   OUTPUT   gets start/ (the untrained model), 1-letters/, 2-short/, 3-all/, 4-finer/, 5-taught/ and 6-spliced/ (what training leaves;
#            the fourth begins with finer/, the model before it at 25 audio tokens a second in the place of 12.5), spliced-*/ (the
#            corpora's words, put together anew, for the last one) and model/ (what is published)
#
#   BACKBONE=FOLDER GGUF=FILE   the language model; by default HuggingFaceTB/SmolLM2-135M-Instruct from the Hub
#   TEACHER=FOLDER              what the last two steps listen beside; by default openai/whisper-base from the Hub
#   START=FOLDER                a model to go on with, hub_cards/mel-llm-small-en for instance: it has the last step alone
#   PYTHON=python3.12           choose the interpreter
#   LAUNCH="torchrun --nproc_per_node 2"   several processes, for the last two steps: on two CPU cores, for instance, with
#                               OMP_NUM_THREADS=1 and --ddp_backend gloo among the arguments
#
# What was interrupted goes on when the same command is given again.
set -euo pipefail

here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
recipe="$here/recipes/mel-llm-small-en"
python="${PYTHON:-python}"
speech="${1:?SPEECH, the folder with the corpora, is missing}"
output="${2:?OUTPUT, a folder, is missing}"
shift 2
mkdir -p "$output"

if [[ -f "$output/model/config.json" && ! -f "$output/6-spliced/training_summary.json" ]]; then
    echo "$output/model is there, and of a recipe with fewer steps: move it away, and give the same command again." >&2
    exit 1
fi

# train NAME MODEL ARGUMENT...: a step that is done is left alone
train() {
    local name=$1 model=$2
    shift 2
    [[ -f "$output/$name/training_summary.json" ]] || ${launch:-"$python"} "$here/train.py" "$recipe/$name.yaml" \
        --model_name_or_path "$output/$model" --output_dir "$output/$name" \
        --eval_data "$speech/asterisk-en" "$speech/synth-en" "$@"
}

# pack RUN FOLDER ARGUMENT...
pack() {
    local run=$1 folder=$2
    shift 2
    if [[ -f "$output/$folder/config.json" && "$output/$run/training_summary.json" -nt "$output/$folder/config.json" ]]; then
        echo "$output/$folder is older than $output/$run: move it away, and give the same command again." >&2
        exit 1
    fi
    [[ -f "$output/$folder/config.json" ]] || "$python" "$here/pack.py" "$output/$run" "$output/$folder" "$@"
}

# Little of what there is little of, which would be learnt by heart; and of the voices that there is most of, no more
heard=(--train_data "$speech/asterisk-en,weight=0.6" "$speech/synth-en,weight=2.2,exclude=source:synth:[fp]*"
    "$speech/synth-en,weight=2.7,exclude=source:synth:[ke]*")
for folder in "$speech"/more-*/; do
    [[ ! -d "$folder" ]] || heard+=("$folder,weight=1.5")
done

is_taught() { [[ -f "$output/5-taught/training_summary.json" ]]; }
# A model that is given stands for all steps but the last
if [[ -n "${START:-}" ]] && ! is_taught; then
    if compgen -G "$output/5-taught/checkpoint-*" > /dev/null; then
        echo "$output/5-taught was begun without START: give another OUTPUT, or the same command without START." >&2
        exit 1
    fi
    mkdir -p "$output/5-taught"
    cp -- "$START"/*.safetensors* "$START"/*.jinja "$START"/tokenizer*.json "$START"/{generation_,processor_,}config.json "$output/5-taught/"
    cp -- "$START/training_summary.json" "$output/5-taught/"
fi
# What there is at 25 audio tokens a second: what three steps make at 12.5 and a fourth goes on with
is_finer() { is_taught || [[ -f "$output/finer/config.json" || -f "$output/4-finer/training_summary.json" ]]; }
if ! is_finer && [[ ! -f "$output/start/config.json" ]]; then
    texts=("$speech"/{asterisk,synth}-en/train/metadata.csv)
    [[ ! -f "$speech/text/sentences_en_train.tsv" ]] || texts+=("$speech/text/sentences_en_train.tsv")
    "$python" - "${texts[@]}" > "$output/sentences.txt" <<'PYTHON'
import csv, sys
lines = []
for path in sys.argv[1:]:
    with open(path, newline="", encoding="utf-8") as file:
        more = [" ".join(row["text"].split()) for row in csv.DictReader(file, delimiter="\t" if path.endswith(".tsv") else ",")]
    heard = set(lines) if path.endswith(".tsv") else ()  # what is heard again counts again, what is read does not
    lines += [line for line in more if line not in heard]
print(*lines, sep="\n")
PYTHON
    # The layers at both ends: of those tried, without training, they predict the sentences best
    "$python" "$here/convert_text_llm.py" "${BACKBONE:-HuggingFaceTB/SmolLM2-135M-Instruct}" ${GGUF:+--gguf_file "$GGUF"} \
        --layers 0-2,27-29 --vocab_size 4000 --vocab_texts "$output/sentences.txt" --speaks --output_dir "$output/start" \
        --chat_template "$recipe/chat_template.jinja" --transcription_instruction "" \
        --audio_config '{"reduction_factor": 8, "conv_channels": 96, "hidden_size": 384, "bidirectional_attention": true,
            "ctc_weight": 1.5, "ctc_rate": 4, "ctc_layer": 4, "ctc_decoding_weight": 0.3}'
fi
if ! is_finer; then
    train 1-letters start "${heard[@]}" "$@"
    train 2-short 1-letters "${heard[@]}" "$@"
    train 3-all 2-short "${heard[@]}" "$@"
    pack 3-all coarse --reads_only --dtype float32
    "$python" "$here/convert_text_llm.py" "$output/coarse" --audio_config '{"reduction_factor": 4, "ctc_rate": 2}' --output_dir "$output/finer"
fi
if ! is_taught; then
    train 4-finer finer "${heard[@]}" "$@"
    launch="${LAUNCH:-}" train 5-taught 4-finer "${heard[@]}" --teacher "${TEACHER:-openai/whisper-base}" --teacher_cache "$output/teacher" "$@"
fi

# splice CORPUS ARGUMENT...
splice() {
    local name=$1
    shift
    [[ -d "$output/spliced-$name" ]] || "$python" "$here/prepare_data.py" spliced --corpora "$speech/$name-en" --model "$output/5-taught" \
        --output_dir "$output/spliced-$name" "$@"
}
splice asterisk --hours 3 --seconds 2 13 --seed 1
splice synth --hours 2.5 --seconds 2 12 --seed 2
# Half of the clips are of many voices, if there are any; the others of what there is little of, and of it put together anew
mixed=(--train_data "$speech/asterisk-en,weight=0.4" "$output/spliced-asterisk,weight=1.2" "$output/spliced-synth,weight=0.9"
    "$speech/synth-en,weight=1.2,exclude=source:synth:[fp]*" "$speech/synth-en,weight=1.3,exclude=source:synth:[ke]*")
more=("$speech"/more-*/)
for folder in "${more[@]}"; do
    [[ ! -d "$folder" ]] || mixed+=("$folder,weight=$("$python" -c "print(5 / ${#more[@]})")")
done
launch="${LAUNCH:-}" train 6-spliced 5-taught "${mixed[@]}" --teacher "${TEACHER:-openai/whisper-base}" --teacher_cache "$output/teacher" "$@"
pack 6-spliced model --reads_only --num_beams 4 --max_audio_seconds 10
