"""Measures speech: a model that speaks, copies through a vocoder, files, and recordings, in one table.

    python scripts/evaluate_tts.py --data recordings,split=test --model runs/tts --asr openai/whisper-base \\
        --speaker_encoder resemblyzer --mos dnsmos --output_dir runs/tts-evaluation
    python scripts/evaluate_tts.py --data recordings --reference --copy_synthesis griffin_lim runs/vocoder \\
        --asr python:judge.transcribe --output_dir runs/vocoders
    python scripts/evaluate_tts.py --data texts.txt --audio spoken --asr runs/recogniser --output_dir runs/files

The same command, started again, makes and scores only what is missing. In --output_dir are results.json with everything,
results.md with the table, and for each system a folder with the sound and the scores of each utterance.
"""

import json
import logging
import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForTextToWaveform, AutoProcessor, HfArgumentParser
from transformers.utils.logging import disable_progress_bar

from mel_llm import MelLLMFeatureExtractor, MelLLMForTextToSpeech, MelLLMVocoder, MelLLMVocoderConfig
from mel_llm.evaluation import (
    AudioFolder,
    CopySynthesis,
    ModelSpeech,
    ReferenceSpeech,
    SpeechEvaluation,
    SpeechSystem,
    Utterance,
    choose_voices,
    get_text_normalizer,
    load_mos,
    load_recognizer,
    load_speaker_encoder,
    load_utterances,
    make_judges,
    speech_table,
    summarize_speech,
)
from mel_llm.evaluation.environment import describe_environment, heading_of
from mel_llm.evaluation.plugins import describe_folder
from mel_llm.script_errors import interruption_goes_on, told_in_a_line
from mel_llm.training.run_model import load_vocoder
from mel_llm.whole_files import claim_folder, write_whole


logger = logging.getLogger("evaluate_tts")

_GRIFFIN_LIM = "griffin_lim"


@dataclass
class EvaluationArguments:
    """Who speaks what, and who listens. Hyphens and underscores in names are the same."""

    data: str = field(
        metadata={
            "help": "Texts: a .txt file with one on each line, a csv, tsv or json with a column of texts, or recordings "
            "with transcripts as scripts/train.py takes them, PLACE[,key=value]..., by default of the split "
            "'validation'. Recordings are what speech is compared with."
        }
    )
    output_dir: str = field(metadata={"help": "Where results, sound and scores go."})
    model: list[str] = field(default_factory=list, metadata={"help": "Folders or Hub names of Mel-LLMs that speak."})
    reference: bool = field(default=False, metadata={"help": "Measure the recordings themselves, too."})
    copy_synthesis: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Vocoders, to which the recordings' mels are given: griffin_lim, griffin_lim:ITERATIONS, folders of "
            "vocoders, or folders of models that speak."
        },
    )
    audio: list[str] = field(
        default_factory=list, metadata={"help": "Folders with a file for each utterance, ID.wav or another ending."}
    )
    asr: str | None = field(
        default=None,
        metadata={
            "help": "Who writes down what is said: folder or Hub name of a model for the speech recognition pipeline, or "
            "python:module.function, called with a waveform (samples,) and its rate in Hz."
        },
    )
    asr_language: str | None = field(default=None, metadata={"help": "Language spoken, for models that can be told."})
    normalizer: str = field(
        default="whisper", metadata={"help": "Of texts and transcripts; see mel_llm.evaluation.TEXT_NORMALIZERS."}
    )
    speaker_encoder: str | None = field(
        default=None, metadata={"help": "resemblyzer, or python:module.function that returns a vector."}
    )
    mos: str | None = field(
        default=None, metadata={"help": "dnsmos, or python:module.function that returns a number or a dict of them."}
    )
    mel_distance: bool = field(default=True, metadata={"help": "Mel distances, where there are recordings."})
    voice_from: str = field(
        default="none",
        metadata={
            "help": "In whose voice models speak, and with whom the speaker is compared: none (compared with the own "
            "recording), reference (the text's own recording), previous (the recording of the text before), or a file."
        },
    )
    voice_text: str | None = field(default=None, metadata={"help": "What is said in that file, word for word."})
    temperature: float = field(default=1.0, metadata={"help": "Of models; 0 takes the mean."})
    stop_threshold: float | None = field(default=None, metadata={"help": "Of models; see docs/tts.md."})
    max_seconds: float | None = field(default=None, metadata={"help": "Longest speech of a sentence."})
    min_seconds: float | None = field(default=None, metadata={"help": "Shortest speech of a sentence."})
    seed: int = field(default=0, metadata={"help": "Of every text's speech, and of the confidence intervals."})
    max_chars: int = field(
        default=200, metadata={"help": "Longer texts are spoken sentence by sentence, in one voice."}
    )
    batch_size: int = field(default=8, metadata={"help": "Texts that a model speaks at a time."})
    limit: int | None = field(default=None, metadata={"help": "Only the first so many utterances."})
    bootstrap_samples: int = field(default=1000, metadata={"help": "Of the confidence intervals."})
    keep_audio: bool = field(default=True, metadata={"help": "Keep the speech that was made."})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, cuda:1, ...; a GPU if there is one."})
    dtype: str = field(default="auto", metadata={"help": "Of models: auto, float32, bfloat16 or float16."})

    def __post_init__(self):
        for name in ("batch_size", "bootstrap_samples", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}.")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"--dtype must be auto, float32, bfloat16 or float16, got {self.dtype!r}.")
        if not self.temperature >= 0:
            raise ValueError(f"--temperature must be at least 0, got {self.temperature}.")
        for name in ("max_seconds", "min_seconds"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"--{name} must be more than 0, got {value}.")
        if self.stop_threshold is not None and not 0 < self.stop_threshold <= 1:
            raise ValueError(f"--stop_threshold must be more than 0 and at most 1, got {self.stop_threshold}.")
        if self.asr_language is not None and self.asr is None:
            raise ValueError("--asr_language is for --asr, which is not given.")
        get_text_normalizer(self.normalizer)
        self.device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")


def load_speaker(name: str, option: str, **kwargs) -> MelLLMForTextToSpeech:
    """A model that speaks, also one that is adapters and their base."""
    model = AutoModelForTextToWaveform.from_pretrained(name, **kwargs)
    if not isinstance(model, MelLLMForTextToSpeech):
        raise ValueError(f"{option} {name} is no Mel-LLM but a {type(model).__name__}.")
    return model


def load_model(name: str, arguments: EvaluationArguments) -> ModelSpeech:
    model = load_speaker(name, "--model", dtype=arguments.dtype).to(arguments.device)
    processor = AutoProcessor.from_pretrained(name)
    options = {key: getattr(arguments, key) for key in ("temperature", "stop_threshold", "max_seconds", "min_seconds")}
    return ModelSpeech(
        model, processor, name, describe_folder(name), seed=arguments.seed, max_chars=arguments.max_chars, **options
    )


def load_copy_synthesis(name: str, device: str) -> CopySynthesis:
    kind, _, iterations = name.partition(":")
    if kind == _GRIFFIN_LIM:
        if iterations and not (iterations.isdigit() and int(iterations)):
            raise ValueError(f"--copy_synthesis {name}: iterations must be a number above 0, got {iterations!r}.")
        extractor = MelLLMFeatureExtractor.from_preset("phi4", edge_padding=120)
        options = {"num_iterations": int(iterations)} if iterations else {}
        config = MelLLMVocoderConfig.from_feature_extractor(extractor, **options)
        return CopySynthesis(MelLLMVocoder(config), f"copy: Griffin-Lim, {config.num_iterations} iterations")
    return CopySynthesis(load_vocoder(name).to(device), f"copy: {name}", describe_folder(name))


def load_systems(arguments: EvaluationArguments, utterances: list[Utterance]) -> list[SpeechSystem]:
    """The bounds first; each is checked before the next is loaded."""
    makers = [ReferenceSpeech] if arguments.reference else []
    makers += [partial(load_copy_synthesis, name, arguments.device) for name in arguments.copy_synthesis]
    makers += [partial(AudioFolder, folder) for folder in arguments.audio]
    makers += [partial(load_model, name, arguments) for name in arguments.model]
    systems = []
    for make in makers:
        systems.append(make())
        systems[-1].check(utterances)
    return systems


def prepare(argv: list[str]) -> tuple[SpeechEvaluation, EvaluationArguments]:
    """Everything that can go wrong before anything is spoken: what is quick to find out first."""
    parser = HfArgumentParser(EvaluationArguments, description=__doc__.splitlines()[0])
    (arguments,) = parser.parse_args_into_dataclasses(argv)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)  # and not the root: judges from outside would report on every file
    if not (arguments.model or arguments.reference or arguments.copy_synthesis or arguments.audio):
        raise ValueError("There is nothing to evaluate: give --model, --reference, --copy_synthesis or --audio.")
    folder = claim_folder(arguments.output_dir)
    utterances = load_utterances(arguments.data)[: arguments.limit]
    recorded = sum(utterance.has_recording for utterance in utterances)
    logger.info(f"{len(utterances)} utterances, {recorded} of them recorded.")
    normalize = get_text_normalizer(arguments.normalizer)
    if arguments.asr is not None and not any(normalize(utterance.text).strip() for utterance in utterances):
        raise ValueError(f"--asr: {arguments.data} has no texts to compare transcripts with; see `text_column`.")
    if arguments.speaker_encoder is not None and not recorded and arguments.voice_from == "none":
        raise ValueError("--speaker_encoder has no voice to compare with: give recordings as --data, or --voice_from.")
    voices = choose_voices(utterances, arguments.voice_from, arguments.voice_text, needs_text=bool(arguments.model))
    systems = load_systems(arguments, utterances)
    encoder, mos = arguments.speaker_encoder, arguments.mos
    judges = make_judges(
        utterances,
        None if arguments.asr is None else load_recognizer(arguments.asr, arguments.asr_language, arguments.device),
        None if encoder is None else load_speaker_encoder(encoder, arguments.device),
        None if mos is None else load_mos(mos),
        arguments.mel_distance,
    )
    evaluation = SpeechEvaluation(
        utterances, voices, systems, judges, folder, arguments.batch_size, arguments.keep_audio
    )
    return evaluation, arguments


def report(results: list[dict], evaluation: SpeechEvaluation, arguments: EvaluationArguments) -> bool:
    """Writes and prints what came of it; whether everything was spoken and scored."""
    summaries = [
        summarize_speech(result, arguments.normalizer, arguments.seed, arguments.bootstrap_samples)
        for result in results
    ]
    table = speech_table(summaries)
    environment = describe_environment(arguments.device)
    whole = {
        "environment": environment,
        "arguments": asdict(arguments),
        "judges": {judge.name: judge.description for judge in evaluation.judges},
        "intervals": f"95 %, percentile bootstrap over utterances, {arguments.bootstrap_samples} samples, seed "
        f"{arguments.seed}",
        "systems": summaries,
    }
    folder = Path(arguments.output_dir)
    write_whole(folder / "results.json", json.dumps(whole, indent=2, ensure_ascii=False) + "\n")
    heading = [
        *heading_of(environment, "95 % bootstrap intervals", arguments.seed),
        *(f"{name}: {description}" for name, description in whole["judges"].items()),
    ]
    write_whole(folder / "results.md", "\n\n".join([*heading, table]))
    print(table, end="")
    for summary in summaries:
        if summary["failed"]:
            logger.warning(f"{summary['name']}: {len(summary['failed'])} failed: {', '.join(summary['failed'][:10])}")
    logger.info(f"Everything is in {folder / 'results.json'}.")
    return not any(summary["failed"] for summary in summaries)


if __name__ == "__main__":
    disable_progress_bar()
    with told_in_a_line("evaluate_tts.py"):
        evaluation, arguments = prepare(sys.argv[1:])
    with interruption_goes_on(logger):
        complete = report(evaluation.run(), evaluation, arguments)
    sys.exit(0 if complete else 1)
