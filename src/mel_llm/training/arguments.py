"""The arguments of `scripts/train.py`, beside those of transformers' `Seq2SeqTrainingArguments`."""

from dataclasses import dataclass, field

import torch
from transformers import Seq2SeqTrainingArguments


@dataclass
class ModelArguments:
    """What is trained."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub name of a Mel-LLM to go on with, or of any causal language model to build one "
            "around; or a folder of adapters to go on with, beside --lora. Left out: a small one from scratch."
        },
    )
    revision: str | None = field(default=None, metadata={"help": "Revision of the model on the Hub."})
    gguf_file: str | None = field(default=None, metadata={"help": "Language models only: the GGUF file to read."})
    dtype: str = field(default="float32", metadata={"help": "float32, bfloat16 or auto: the weights are loaded so."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "sdpa, eager, flash_attention_2, flex_attention."}
    )
    preset: str = field(
        default="small",
        metadata={
            "help": "From scratch only: small, or SPECTRON's form, spectron-small, spectron-350m or spectron-1b, with its "
            "features, encoder and speech head."
        },
    )
    audio_config: str = field(
        default="{}",
        metadata={"help": "New models only: fields of MelLLMAudioConfig in JSON, e.g. '{\"reduction_factor\": 4}'."},
    )
    text_config: str = field(
        default="{}",
        metadata={
            "help": "From scratch only: fields of the language model's config in JSON, `model_type` among them."
        },
    )
    vocab_size: int = field(
        default=512, metadata={"help": "From scratch only: size of the tokenizer learnt from the transcripts."}
    )
    transcription_instruction: str | None = field(
        default=None,
        metadata={"help": "New models only: what the default prompt asks for. From scratch: nothing, by default."},
    )
    continuation_instruction: str | None = field(
        default=None, metadata={"help": "New models only: what the prompt asks for that is to be gone on with."}
    )
    qa_instruction: str | None = field(
        default=None, metadata={"help": "New models only: what the prompt asks for around a spoken question."}
    )
    speech_preset: str = field(
        default="small", metadata={"help": "New speech heads only: small, paper or spectron, of MelLLMSpeechConfig."}
    )
    speech_config: str = field(
        default="{}", metadata={"help": "New speech heads only: fields of MelLLMSpeechConfig in JSON."}
    )
    text_loss_weight: float | None = field(
        default=None,
        metadata={
            "help": "For continuation and qa: what the text's cross-entropy counts beside the speech head's loss; by default "
            "as the model has it, 1 for new ones."
        },
    )
    vocoder: str | None = field(
        default=None,
        metadata={
            "help": "What makes the speech sound: griffin_lim (for new speech heads the default), none, the folder of a "
            "vocoder that scripts/train_vocoder.py trained, or of a model that speaks, for its. It is not trained here."
        },
    )
    lora: str | None = field(
        default=None,
        metadata={
            "help": "Train LoRA adapters, the audio embedder and the projector instead of everything: paper or small."
        },
    )
    lora_r: int | None = field(default=None, metadata={"help": "Another rank than the preset's."})
    lora_alpha: int | None = field(default=None, metadata={"help": "Another scale than the preset's."})
    lora_dropout: float | None = field(default=None, metadata={"help": "Another dropout than the preset's."})
    merge_lora: bool = field(
        default=False, metadata={"help": "Save the whole model with the adapters merged in, instead of the adapters."}
    )
    remote_code: bool = field(
        default=False,
        metadata={
            "help": "Save this package's code beside the model, for those who load it with trust_remote_code=True."
        },
    )
    init_adapter: str | None = field(
        default=None,
        metadata={
            "help": "With --lora: a folder with adapters of the same rank that these begin as, whatever front end they were "
            "trained with. New ones change nothing at first."
        },
    )
    random_init: str | None = field(
        default=None,
        metadata={
            "help": "Parts of --model_name_or_path that begin with random weights instead of their own: backbone (the language "
            "model), encoder (the Conformer blocks), audio (embedder with encoder, projector, CTC head); several with commas."
        },
    )
    freeze_layers: str | None = field(
        default=None,
        metadata={
            "help": "Layers of the language model that are not trained, counted from 0: L24-31, 24-, 0-3,7. With --lora they "
            "get no adapters; with --init_adapter they keep theirs as they are."
        },
    )
    freeze: list[str] = field(
        default_factory=list, metadata={"help": "Regular expressions; parameters whose names match are not trained."}
    )


@dataclass
class DataArguments:
    """What it is trained on. A source is PLACE[,key=value]...: see `mel_llm.training.SpeechSource`."""

    train_data: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Sources: folders, manifests, Hub datasets; e.g. recordings "
            "openslr/librispeech_asr,config=clean,split=train.100,weight=2,streaming=true"
        },
    )
    eval_data: list[str] = field(
        default_factory=list, metadata={"help": "The same, by default of the split 'validation'."}
    )
    tasks: list[str] = field(
        default_factory=lambda: ["asr"],
        metadata={
            "help": "What is learnt from the clips, one or several: asr (read them), tts (speak them), continuation (go on "
            "with their beginning, SPECTRON), qa (answer spoken questions): asr,tts,continuation,qa."
        },
    )
    task_weights: list[float] = field(
        default_factory=list,
        metadata={"help": "Shares of the tasks in the batches, in their order; by default every clip once for each."},
    )
    text_normalizer: str = field(
        default="none",
        metadata={"help": "How transcripts are written: none, lower, lower_no_punctuation, whisper, whisper_basic."},
    )
    wer_normalizer: str = field(default="whisper", metadata={"help": "The same choices, for the error rates."})
    min_seconds: float = field(default=0.1, metadata={"help": "Shorter clips are left out."})
    max_seconds: float = field(default=30.0, metadata={"help": "Longer clips are left out."})
    max_tokens: int | None = field(default=None, metadata={"help": "Clips with longer transcripts are left out."})
    speed_factors: list[float] = field(
        default_factory=list, metadata={"help": "Speed perturbation, e.g. 0.9 1.0 1.1; none by default."}
    )
    spec_augment: bool = field(default=False, metadata={"help": "Mask stretches of time and bands of mel bins."})
    spec_augment_config: str = field(
        default="{}",
        metadata={"help": "Fields of SpecAugment in JSON: how much is masked, e.g. '{\"max_time_share\": 0.05}'."},
    )
    conditions: bool = field(
        default=False, metadata={"help": "Noise, rooms, telephone bands and levels, by chance (RecordingConditions)."}
    )
    voice_warp: float = field(
        default=0.0, metadata={"help": "Stretch the frequency axis by up to this share, e.g. 0.15: other voices."}
    )
    voice_pairs: float = field(
        default=0.0,
        metadata={
            "help": "Share of the clips to be spoken (tts) that follow another of the same speaker: voice prompts work "
            "better for it. The data needs a column `speaker`."
        },
    )
    prompt_seconds: list[float] = field(
        default_factory=lambda: [3.0],
        metadata={
            "help": "For continuation: how much of each clip is its prompt; two numbers are a range. Clips without room for "
            "the shortest and --min_continuation_seconds are left out."
        },
    )
    prompt_fraction: list[float] = field(
        default_factory=list,
        metadata={"help": "For continuation: the same as a share of each clip, e.g. 0.4, or 0.3 0.5."},
    )
    min_continuation_seconds: float = field(
        default=0.5, metadata={"help": "For continuation: what must remain of a clip behind its prompt."}
    )
    skip_text_probability: float = field(
        default=0.0,
        metadata={
            "help": "For continuation and qa: share of the examples that are learnt without the text in between, so that "
            "the model can also do without."
        },
    )
    group_by_length: bool = field(default=True, metadata={"help": "Batches of clips of similar length."})
    max_batch_tokens: int | None = field(
        default=None,
        metadata={
            "help": "As many clips to a batch as fit into so many tokens of the language model (audio, prompt and text, with "
            "padding), in the place of --per_device_train_batch_size."
        },
    )
    packing: bool = field(
        default=False,
        metadata={
            "help": "Reading: lay the clips of a batch one after another, without padding; each sees only itself."
        },
    )
    features_on_device: bool = field(
        default=False, metadata={"help": "Make features on the model's device instead of in the workers."}
    )
    shuffle_buffer: int = field(default=1000, metadata={"help": "Rows of a stream that are shuffled at a time."})
    teacher: str | None = field(
        default=None,
        metadata={
            "help": "Reading: folder or Hub name of a speech encoder (Whisper, wav2vec 2.0, HuBERT, WavLM) whose states the audio "
            "tokens' states learn to predict beside the transcript. In training alone: the model has no encoder."
        },
    )
    teacher_weight: float = field(default=2.0, metadata={"help": "What that loss counts."})
    teacher_layer: int | None = field(
        default=None,
        metadata={
            "help": "Layers of the language model below it; by default those below the CTC head, or two thirds."
        },
    )
    teacher_cache: str | None = field(
        default=None,
        metadata={
            "help": "Folder for the teacher's states, so that they are made once: 50 kB for a second of Whisper base."
        },
    )
    statistics_clips: int = field(
        default=1000, metadata={"help": "New models only: clips that the normalisation of features is measured on."}
    )


@dataclass
class SpeechTrainingArguments(Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` with the defaults that speech needs."""

    ctc_only_steps: int = field(
        default=0, metadata={"help": "Steps at first in which reading is learnt from the CTC head's loss alone."}
    )
    text_dropout: float = field(
        default=0.0,
        metadata={
            "help": "Share of the transcript's tokens that are hidden from the model while it learns to write the next ones: "
            "what it cannot read it has to hear."
        },
    )
    history_sampling: float = field(
        default=0.0,
        metadata={
            "help": "Speaking: share of the patches behind a place that are the model's own in training instead of the "
            "recording's, as they are in generation. A step takes half as long again."
        },
    )
    compile_layers: bool = field(
        default=False,
        metadata={
            "help": "Compile the language model's layers (torch.compile): twice as fast on a CPU with --bf16, after a minute "
            "or two. Needs a C++ compiler."
        },
    )
    output_dir: str | None = field(default=None, metadata={"help": "Checkpoints and the trained model go here."})
    learning_rate: float = field(default=3e-4, metadata={"help": "The initial learning rate for AdamW."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps, or share of all steps if below 1."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay false: the collator wants them."})
    predict_with_generate: bool = field(default=True, metadata={"help": "Transcribe in evaluation, for error rates."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps, or this share of them."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints that are kept."})
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes that decode audio."})

    def __post_init__(self):
        # transformers takes every metric but a loss for one of which more is better
        metric = self.metric_for_best_model or ""
        if self.greater_is_better is None and metric.split("_")[-1] in ("wer", "cer"):
            self.greater_is_better = False
        # transformers takes bfloat16 on a CPU for a GPU that is missing, unless it is told
        if self.bf16 and not torch.accelerator.is_available():
            self.use_cpu = True
        super().__post_init__()


__all__ = ["DataArguments", "ModelArguments", "SpeechTrainingArguments"]
