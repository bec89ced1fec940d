"""Makes the model that scripts/recipes/mel-llm-small-en-continuation.sh trains, out of one that speaks.

    python scripts/recipes/mel_llm_small_en_continuation_start.py runs/voice/model runs/start

It gets the prompts for going on and for answering, short ones: every letter of them is a token in every example. And a CTC head for
reading, which is new, and has a say in what is read; the stem has been kept at work by the history of what it speaks.
"""

import argparse
import sys
from pathlib import Path

from transformers import set_seed

from mel_llm import MelLLMConfig, MelLLMForSpeechContinuation, MelLLMProcessor
from mel_llm.conversion.new_folder import new_folder
from mel_llm.script_errors import told_in_a_line


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("voice", help="folder or Hub name of a Mel-LLM that speaks")
    parser.add_argument("start", type=Path, help="a new folder")
    arguments = parser.parse_args(argv)
    set_seed(3)
    processor = MelLLMProcessor.from_pretrained(arguments.voice)
    processor.continuation_instruction, processor.qa_instruction = "Go on.", "Answer."
    config = MelLLMConfig.from_pretrained(arguments.voice)
    config.audio_config.ctc_weight, config.audio_config.ctc_decoding_weight = 1.5, 0.5
    config.continuation_prefix_ids, config.continuation_suffix_ids = processor.continuation_prompt_ids()
    config.qa_prefix_ids, config.qa_suffix_ids = processor.continuation_prompt_ids("qa")
    model = MelLLMForSpeechContinuation.from_pretrained(arguments.voice, config=config)
    with new_folder(arguments.start) as folder:
        processor.save_pretrained(folder)
        model.save_pretrained(folder)


if __name__ == "__main__":
    with told_in_a_line(Path(__file__).name):
        main(sys.argv[1:])
