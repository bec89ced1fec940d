"""Makes an untrained Mel-LLM of any causal language model, if need be a smaller one.

    python scripts/convert_text_llm.py HuggingFaceTB/SmolLM2-135M-Instruct --output_dir runs/start
    python scripts/convert_text_llm.py FOLDER/model.Q4_1.gguf --output_dir runs/start \\
        --layers 0-5,28,29 --vocab_size 8000 --vocab_texts sentences.txt --audio_config '{"reduction_factor": 4}' --speaks
    python scripts/convert_text_llm.py hub_cards/mel-llm-small-en --output_dir runs/speaking-start --letters_only --speaks

The third takes a Mel-LLM, whose language model becomes another one's, and whose ears, as far as they are trained, go with it.

`scripts/train.py --model_name_or_path runs/start` trains it, and measures the normalisation of features first.
`scripts/train.py` converts a model by itself, too; this script is for making one smaller on the way, and for looking at
it before.
"""

import argparse
import copy
import json
import sys
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    AutoTokenizer,
)

from mel_llm import (
    MelLLMAudioConfig,
    MelLLMConfig,
    MelLLMFeatureExtractor,
    MelLLMProcessor,
    MelLLMSpeechConfig,
    MelLLMVocoderConfig,
)
from mel_llm.conversion import (
    TOKEN_RATE_FIELDS,
    check_new_folder,
    find_spare_token,
    forget_gguf,
    from_text_llm,
    keep_layers,
    language_model_of,
    new_folder,
    parse_layers,
    prune_vocabulary,
    take_ears,
)
from mel_llm.script_errors import told_in_a_line
from mel_llm.training import count_parameters
from mel_llm.training.run_model import INSTRUCTIONS


_INSTRUCTIONS = (*INSTRUCTIONS, "speech_instruction")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "model", help="a causal language model, or a Mel-LLM: a folder, a GGUF file, or a name on the Hub"
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="a new folder")
    parser.add_argument("--gguf_file", help="the GGUF file in that folder or repository")
    parser.add_argument("--revision", default="main")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--layers", help="keep these, e.g. 0-5,28,29; all when left out")
    parser.add_argument("--vocab_size", type=int, help="keep the most frequent tokens of --vocab_texts")
    parser.add_argument("--vocab_texts", type=Path, nargs="+", default=[], help="text files, a text on each line")
    parser.add_argument(
        "--letters_only",
        action="store_true",
        help="keep the tokens of single bytes alone: texts are then written letter by letter, which suits a small speaker",
    )
    parser.add_argument("--audio_config", default="{}", help="fields of MelLLMAudioConfig in JSON")
    parser.add_argument("--transcription_instruction", help="what the default prompt asks for")
    parser.add_argument("--speech_instruction", help="what stands before a text that is to be spoken")
    parser.add_argument(
        "--chat_template", type=Path, help="a Jinja file in the place of the tokenizer's, e.g. with a shorter prompt"
    )
    parser.add_argument(
        "--text_only", action="store_true", help="only make it smaller: a language model without ears comes out"
    )
    parser.add_argument("--speaks", action="store_true", help="with a speech head")
    parser.add_argument("--speech_preset", default="small", choices=sorted(MelLLMSpeechConfig.PRESETS))
    parser.add_argument("--speech_config", default="{}", help="fields of MelLLMSpeechConfig in JSON")
    parser.add_argument("--seed", type=int, default=0, help="of the new weights")
    arguments = parser.parse_args(argv)
    if (arguments.vocab_size is None) != (not arguments.vocab_texts):
        parser.error("--vocab_size and --vocab_texts go together.")
    if arguments.letters_only and arguments.vocab_size is not None:
        parser.error("--letters_only leaves no other tokens: leave --vocab_size out.")
    for name in ("audio_config", "speech_config"):
        try:
            fields = json.loads(getattr(arguments, name))
        except json.JSONDecodeError as error:
            parser.error(f"--{name} is not JSON: {error}.")
        if not isinstance(fields, dict):
            parser.error(f"--{name} must be a JSON object.")
        setattr(arguments, name, fields)
    if arguments.text_only and (arguments.audio_config or arguments.speaks):
        parser.error("--text_only makes no audio side: leave --audio_config and --speaks out.")
    for name, default in (("speech_config", {}), ("speech_preset", "small")):
        if getattr(arguments, name) != default and not arguments.speaks:
            parser.error(f"--{name} needs --speaks.")
    for name, config in (("audio_config", MelLLMAudioConfig()), ("speech_config", MelLLMSpeechConfig())):
        unknown = sorted(getattr(arguments, name).keys() - config.to_dict().keys())
        if unknown:
            parser.error(f"--{name}: {type(config).__name__} has no field {', '.join(unknown)}.")
    path = Path(arguments.model)
    if path.is_file() and arguments.gguf_file is None:
        if path.suffix.lower() != ".gguf":
            parser.error(f"{path} is a file, and no GGUF file. Give the folder of the model.")
        arguments.model, arguments.gguf_file = str(path.parent), path.name
    return arguments


def load_mel_llm(arguments: argparse.Namespace):
    """The model and its processor, if it is a Mel-LLM that is taken; else None."""
    if arguments.gguf_file is not None:
        return None
    options = {"revision": arguments.revision}
    if AutoConfig.from_pretrained(arguments.model, **options).model_type != MelLLMConfig.model_type:
        return None
    dtype = getattr(torch, arguments.dtype)
    model = AutoModelForSpeechSeq2Seq.from_pretrained(arguments.model, dtype=dtype, **options)
    if model.config.speech_config is not None and not arguments.text_only:
        raise ValueError(
            f"{arguments.model} speaks, and its voice cannot be taken along: begin with a model that only reads."
        )
    return model, AutoProcessor.from_pretrained(arguments.model, **options)


def load_text_llm(arguments: argparse.Namespace, mel_llm=None):
    """The language model, as small as it is to be, and its tokenizer.

    Raises:
        OSError, ValueError: Something is not there, or does not fit.
    """
    layers = None if arguments.layers is None else parse_layers(arguments.layers)
    if mel_llm is None:
        options = {"revision": arguments.revision}
        if arguments.gguf_file is not None:
            options["gguf_file"] = arguments.gguf_file
        tokenizer = AutoTokenizer.from_pretrained(arguments.model, **options)
        dtype = getattr(torch, arguments.dtype)
        text_model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype, **options)
    else:
        text_model, tokenizer = language_model_of(mel_llm[0]), mel_llm[1].tokenizer
    if arguments.chat_template is not None:
        tokenizer.chat_template = arguments.chat_template.read_text(encoding="utf-8")
    if layers is not None:
        text_model = keep_layers(text_model, layers)
    if arguments.vocab_size is not None:
        texts = [line for path in arguments.vocab_texts for line in path.read_text(encoding="utf-8").splitlines()]
        # What the prompts are written with must not fall to pieces; it is small, and counts as often as the most frequent
        prompts = prompt_texts(tokenizer, instructions_of(arguments, mel_llm)) * (len(texts) + 1)
        text_model, tokenizer = prune_vocabulary(text_model, tokenizer, [*prompts, *texts], arguments.vocab_size)
    elif arguments.letters_only:
        text_model, tokenizer = prune_vocabulary(text_model, tokenizer, [], len(tokenizer))
    return text_model, tokenizer


def convert(arguments: argparse.Namespace):
    """The Mel-LLM and its processor.

    Raises:
        OSError, ValueError: Something is not there, or does not fit.
    """
    mel_llm = load_mel_llm(arguments)
    audio_config, extractor, options = MelLLMAudioConfig(**arguments.audio_config), None, {}
    if mel_llm is not None:
        if arguments.audio_config.keys() - TOKEN_RATE_FIELDS:
            raise ValueError(
                f"--audio_config is for new ears, but {arguments.model} has its own, of which only `reduction_factor` and "
                "`ctc_rate` can be changed."
            )
        theirs, extractor = mel_llm[0].config.audio_config, mel_llm[1].feature_extractor
        audio_config = MelLLMAudioConfig.from_dict(theirs.to_dict() | arguments.audio_config)
        if arguments.chat_template is None:
            options["chat_template"] = mel_llm[1].chat_template
    text_model, tokenizer = load_text_llm(arguments, mel_llm)
    speech = {}
    if arguments.speaks:
        if extractor is None:
            extractor = MelLLMFeatureExtractor.from_preset("phi4")
            extractor.edge_padding = (extractor.win_length - extractor.hop_length) // 2  # a frame for each hop
        speech = {
            "speech_config": MelLLMSpeechConfig.from_preset(arguments.speech_preset, **arguments.speech_config),
            "vocoder_config": MelLLMVocoderConfig.from_feature_extractor(extractor),
        }
    torch.manual_seed(arguments.seed)
    options |= instructions_of(arguments, mel_llm)
    model, processor = from_text_llm(text_model, tokenizer, audio_config, extractor, **options, **speech)
    if mel_llm is not None:
        take_ears(model, mel_llm[0])
    return model, processor


def instructions_of(arguments: argparse.Namespace, mel_llm=None) -> dict:
    """What prompts ask for, as far as it is given, and else what a Mel-LLM's ask for."""
    theirs = {} if mel_llm is None else {name: getattr(mel_llm[1], name) for name in _INSTRUCTIONS}
    given = {name: asked for name in _INSTRUCTIONS if (asked := getattr(arguments, name, None)) is not None}
    return {**theirs, **given}


def prompt_texts(tokenizer, instructions: dict) -> list[str]:
    """The default prompts in the tokenizer's own words."""
    tokenizer = copy.deepcopy(tokenizer)
    audio_token = find_spare_token(tokenizer) or "<|audio|>"
    tokenizer.add_tokens([audio_token], special_tokens=True)
    extractor = MelLLMFeatureExtractor.from_preset("phi4")
    processor = MelLLMProcessor(extractor, tokenizer, audio_token=audio_token, **instructions)
    spoken = (
        *processor.continuation_prompt_ids(),
        *processor.continuation_prompt_ids("qa"),
        processor.separator_ids(),
    )
    ids = [*processor.default_prompt_ids(), *processor.speech_prompt_ids(), *spoken]
    return [tokenizer.decode(part) for part in ids]


def main(argv: list[str]) -> None:
    arguments = parse_arguments(argv)
    check_new_folder(arguments.output_dir)
    if arguments.text_only:
        model, processor = load_text_llm(arguments, load_mel_llm(arguments))
        forget_gguf(model)
        text_config, more = model.config, "a language model without ears."
    else:
        model, processor = convert(arguments)
        text_config, more = (
            model.config.text_config,
            f"audio token {processor.audio_token!r}. Untrained where it is new.",
        )
    with new_folder(arguments.output_dir) as partial:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
    print(
        f"{arguments.output_dir}: {count_parameters(model)[1]:,} parameters, {text_config.num_hidden_layers} layers, "
        f"{text_config.vocab_size} tokens, {more}"
    )


if __name__ == "__main__":
    with told_in_a_line("convert_text_llm.py"):
        main(sys.argv[1:])
