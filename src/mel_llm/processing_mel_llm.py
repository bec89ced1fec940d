"""Text and audio to the inputs of a Mel-LLM: placeholders, prompts, labels; and its outputs back to text and sound.

The prompt is Phi-4-multimodal's, which the paper uses (inferred): the audio, then "Transcribe the audio clip into
text.", in the chat template of whatever language model is behind. Everything else here is ours.
"""

import contextlib
import os
import re
import unicodedata
import uuid
from numbers import Integral

import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin
from transformers.processing_utils import ProcessingKwargs
from transformers.utils import logging

from .audio_utils_mel_llm import load_audio, to_mono_float
from .sharing_mel_llm import PROCESSOR_FILES, MelLLMSharingMixin


logger = logging.get_logger(__name__)


# Chat templates of text models expect a message's content to be a string. This goes in front of one: it joins content
# given in parts, with the placeholder in the place of each audio.
_JOIN_PARTS = """\
{%- set joined = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- if message.content is string or message.content is not iterable -%}
{%- set joined.messages = joined.messages + [message] -%}
{%- else -%}
{%- set parts = namespace(text='') -%}
{%- for part in message.content -%}
{%- if part.type in ['audio', 'input_audio', 'audio_url'] -%}
{%- set parts.text = parts.text + '<AUDIO_TOKEN>' -%}
{%- elif part.type == 'text' -%}
{%- set parts.text = parts.text + part.text -%}
{%- else -%}
{{- raise_exception('Mel-LLM takes text and audio, not ' + part.type) -}}
{%- endif -%}
{%- endfor -%}
{%- set joined.messages = joined.messages + [dict(message, content=parts.text)] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = joined.messages -%}
"""

# For language models without a chat template: requests on lines of their own, answers closed by the end of text
_PLAIN_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{- message.content + eos_token -}}
{%- else -%}
{{- message.content + '\\n' -}}
{%- endif -%}
{%- endfor -%}
"""

LANGUAGES = {
    "ar": "Arabic", "bg": "Bulgarian", "ca": "Catalan", "cs": "Czech", "da": "Danish", "de": "German", "el": "Greek",
    "en": "English", "es": "Spanish", "et": "Estonian", "fa": "Persian", "fi": "Finnish", "fr": "French",
    "he": "Hebrew", "hi": "Hindi", "hr": "Croatian", "hu": "Hungarian", "id": "Indonesian", "it": "Italian",
    "ja": "Japanese", "ko": "Korean", "lt": "Lithuanian", "lv": "Latvian", "ms": "Malay", "nl": "Dutch",
    "no": "Norwegian", "pl": "Polish", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian", "sk": "Slovak",
    "sl": "Slovenian", "sr": "Serbian", "sv": "Swedish", "th": "Thai", "tr": "Turkish", "uk": "Ukrainian",
    "vi": "Vietnamese", "zh": "Chinese",
}  # fmt: skip


# A recording whose voice is to go on (ours): shorter ones hardly hold a voice, and longer ones crowd out the text
_MIN_VOICE_SECONDS, _MAX_VOICE_SECONDS = 0.5, 30.0
_SILENT_VOICE_PEAK = 1e-3  # -60 dBFS: nobody speaks in it
_MAX_NAMED = 10  # of the characters that cannot be spoken


def _is_text(value) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(item, str) for item in value)
    )


def _is_clip(value) -> bool:
    """Whether a value is one clip and not a list of clips."""
    if isinstance(value, list):
        return len(value) > 0 and isinstance(value[0], int | float)
    if isinstance(value, tuple):  # (samples, rate); any other tuple is a list of clips
        return len(value) == 2 and isinstance(value[1], Integral) and not isinstance(value[0], int | float)
    return True


class MelLLMProcessor(MelLLMSharingMixin, ProcessorMixin):
    r"""Feature extractor and tokenizer in one.

    Args:
        feature_extractor ([`MelLLMFeatureExtractor`]): Waveforms to log-mel features.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The language model's tokenizer.
        chat_template (`str`, *optional*): Jinja template for conversations with audio in them. By default the
            tokenizer's own, made to take content in parts; a plain one if it has none.
        audio_token (`str`, defaults to `"<|audio|>"`): Special token of the tokenizer that marks the place of audio.
        reduction_factor (`int`, defaults to 8): Mel frames per audio token; the model's `audio_config` has the same.
        transcription_instruction (`str`): What the default prompt asks for.
        speech_instruction (`str`): What stands before a text that is to be spoken.
        continuation_instruction (`str`), qa_instruction (`str`): What is asked of a recording that is to be gone on with, and
            of a spoken question.

    Raises:
        ValueError: `audio_token` is not a token of the tokenizer, `reduction_factor` is not a positive integer, or a text
            is not a string.
    """

    _replaced_files = PROCESSOR_FILES

    valid_processor_kwargs = ProcessingKwargs

    def __init__(
        self,
        feature_extractor,
        tokenizer,
        chat_template: str | None = None,
        audio_token: str = "<|audio|>",
        reduction_factor: int = 8,
        transcription_instruction: str = "Transcribe the audio clip into text.",
        speech_instruction: str = "Read the text aloud.",
        continuation_instruction: str = "Transcribe the audio clip, go on with what is said, and say it.",
        qa_instruction: str = "Transcribe the question in the audio clip, answer it, and say the answer.",
    ):
        if not isinstance(reduction_factor, int) or isinstance(reduction_factor, bool) or reduction_factor < 1:
            raise ValueError(f"`reduction_factor` must be a positive integer, got {reduction_factor!r}.")
        for name, value in (
            ("audio_token", audio_token),
            ("transcription_instruction", transcription_instruction),
            ("speech_instruction", speech_instruction),
            ("continuation_instruction", continuation_instruction),
            ("qa_instruction", qa_instruction),
        ):
            if not isinstance(value, str):
                raise ValueError(f"`{name}` must be a string, got {value!r}.")
        self.audio_token = audio_token
        self.audio_token_id = tokenizer.convert_tokens_to_ids(audio_token)
        if self.audio_token_id is None or self.audio_token_id == tokenizer.unk_token_id:
            raise ValueError(
                f"`audio_token` {audio_token!r} is not in the tokenizer. Add it with "
                f"`tokenizer.add_tokens([{audio_token!r}], special_tokens=True)` and resize the model's embeddings, or "
                "name a spare special token that the tokenizer has."
            )
        self.reduction_factor = reduction_factor
        self.transcription_instruction = transcription_instruction
        self.speech_instruction = speech_instruction
        self.continuation_instruction = continuation_instruction
        self.qa_instruction = qa_instruction
        if chat_template is None:
            template = tokenizer.chat_template
            if isinstance(template, dict):
                template = template.get("default")
            if template is None or not template.startswith(_JOIN_PARTS[:40]):
                template = _JOIN_PARTS.replace("<AUDIO_TOKEN>", audio_token) + (template or _PLAIN_TEMPLATE)
            chat_template = template
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template)

    # --- inputs -----------------------------------------------------------------------------------------------------

    def __call__(
        self,
        *inputs,
        audio=None,
        text: str | list[str] | None = None,
        response: str | list[str] | None = None,
        sampling_rate: int | None = None,
        output_labels: bool = False,
        return_tensors: str | None = "pt",
        **kwargs,
    ) -> BatchFeature:
        r"""Makes model inputs from audio, text, or text with audio in it.

        The first positional argument is the audio -- or the text, if it is a string or a list of strings: stock
        clients pass either. A file is named by keyword, `audio="speech.wav"`. Text alone in first place is what the
        text-to-speech pipeline passes, and is made into a request as [`MelLLMProcessor.apply_speech_request`] does.

        Args:
            audio: One clip or a list of clips: arrays, paths, URLs, bytes, or dicts of `datasets`; see
                [`load_audio`]. For a batch of texts, all their clips in the order in which they stand there.
            text (`str` or `list[str]`, *optional*): Text with `audio_token` once for each clip.
            response (`str` or `list[str]`, *optional*): What the model should answer to `text`, for training.
            sampling_rate (`int`, *optional*): Hz of clips that are bare arrays.
            output_labels (`bool`, defaults to `False`): Also return `labels` in which only the response, with the
                token that ends it, counts.
            return_tensors (`str`, *optional*, defaults to `"pt"`): `"pt"`; for audio alone or text alone anything
                that the feature extractor or the tokenizer knows.
            kwargs: For the tokenizer and the feature extractor: `padding`, `padding_side` (of the text; by default
                left, and right with a response), `truncation`, `device`, `text_kwargs`, `audio_kwargs`, ...

        Returns:
            [`~transformers.BatchFeature`]: For audio alone, `input_features` and its `attention_mask`: the model puts
            the default prompt around it. For text, `input_ids` and `attention_mask`; with audio in it, also
            `input_features` `(clips, frames, num_mel_bins)` and `input_features_mask` `(clips, frames)`.

        Raises:
            ValueError: Audio that [`MelLLMFeatureExtractor`] refuses; a number of clips that is not the number of
                places for them; or `output_labels` without a response.
        """
        is_speech_request = text is None and audio is None and response is None
        audio, text = self._sort_inputs(inputs, audio, text)
        if is_speech_request and audio is None and text is not None and not kwargs and return_tensors == "pt":
            return self.apply_speech_request(text)
        if output_labels and response is None:
            raise ValueError(
                "`output_labels=True` needs `response`, the text whose tokens count; or give the conversation with the "
                "assistant's answer to `apply_chat_template(..., output_labels=True)`."
            )
        if response is not None and text is None:
            raise ValueError("`response` needs the `text` that it answers; `apply_transcription_request` writes one.")
        if audio is None and text is None:
            raise ValueError("Pass `audio`, `text` or both.")
        if text is not None and not _is_text(text):
            raise ValueError(f"`text` must be a string or a list of strings, got {type(text).__name__}.")

        if audio is not None:
            audio = self._load_clips(audio, sampling_rate)
            sampling_rate = self.feature_extractor.sampling_rate
        if text is None:
            kwargs = {**kwargs.pop("common_kwargs", {}), **kwargs, **kwargs.pop("audio_kwargs", {})}
            kwargs.pop("text_kwargs", None)
            return self.feature_extractor(audio, sampling_rate=sampling_rate, return_tensors=return_tensors, **kwargs)

        if return_tensors != "pt" and audio is not None:
            raise ValueError(f'`return_tensors` must be "pt" for text with audio, got {return_tensors!r}.')
        self._check_places(text, audio)
        if response is not None:
            return self._with_response(text, audio, response, output_labels, kwargs)
        text, text_kwargs = self._with_special_tokens(text, self._text_defaults(kwargs, padding_side="left"))
        if audio is None:
            kwargs = {**kwargs, **text_kwargs}
            for name in ("text_kwargs", "audio_kwargs", "common_kwargs", "device", "return_attention_mask"):
                kwargs.pop(name, None)
            batch = BatchFeature(dict(self.tokenizer(text, return_tensors=return_tensors, **kwargs)))
        else:
            kwargs["text_kwargs"] = text_kwargs
            batch = super().__call__(
                text=text, audio=audio, sampling_rate=sampling_rate, return_tensors=return_tensors, **kwargs
            )
        batch.pop("token_type_ids", None)  # some tokenizers make them; the model takes none
        return batch

    def _sort_inputs(self, inputs: tuple, audio, text) -> tuple:
        if len(inputs) > 2:
            raise TypeError(f"MelLLMProcessor takes two positional arguments, audio and text, got {len(inputs)}.")
        inputs = [value for value in inputs if value is not None]
        for value in inputs:
            if text is None and _is_text(value):
                text = value
            elif audio is None:
                audio = value
            else:
                raise TypeError("`audio` or `text` is given twice: by position and by name.")
        return audio, text

    def _load_voices(self, voice, sampling_rate: int | None) -> list[np.ndarray]:
        """Recordings of voices in any form to a flat list of waveforms at the extractor's rate, checked."""
        if not _is_clip(voice):
            return [clip for item in voice for clip in self._load_voices(item, sampling_rate)]
        rate = self.feature_extractor.sampling_rate
        try:
            if isinstance(voice, str | bytes | os.PathLike | dict | tuple) or hasattr(voice, "read"):
                # No more than shows that it is too long
                clip = load_audio(voice, sampling_rate=rate, duration=_MAX_VOICE_SECONDS + 0.1)
            else:
                clip = load_audio((to_mono_float(voice, "voice"), sampling_rate or rate), sampling_rate=rate)
        except (TypeError, ValueError) as error:
            raise type(error)(f"`voice` cannot be used: {error}") from error
        seconds = len(clip) / rate
        if not _MIN_VOICE_SECONDS <= seconds <= _MAX_VOICE_SECONDS:
            found = f"is longer than {_MAX_VOICE_SECONDS:g}" if seconds > _MAX_VOICE_SECONDS else f"has {seconds:.2f}"
            raise ValueError(
                f"`voice` {found} seconds: it must have from {_MIN_VOICE_SECONDS:g} to {_MAX_VOICE_SECONDS:g}. Take a "
                "part in which somebody speaks, and just the words of that part as `voice_text`."
            )
        if np.abs(clip).max() < _SILENT_VOICE_PEAK:
            raise ValueError(
                "`voice` is silent (nothing in it is louder than -60 dBFS), so there is no voice to go on."
            )
        return [clip]

    def _load_clips(self, audio, sampling_rate: int | None) -> list[np.ndarray]:
        """Clips in any form, nested by text or not, to a flat list of waveforms at the extractor's rate."""
        rate = self.feature_extractor.sampling_rate
        if _is_clip(audio):
            if isinstance(audio, str | bytes | os.PathLike | dict | tuple) or hasattr(audio, "read"):
                return [load_audio(audio, sampling_rate=rate)]
            if sampling_rate is not None and sampling_rate != rate:
                raise ValueError(
                    f"`sampling_rate` is {sampling_rate} Hz, but the features are made from {rate} Hz. Resample first: "
                    f"`mel_llm.load_audio((array, {sampling_rate}), sampling_rate={rate})`."
                )
            return [audio]
        if len(audio) == 0:
            raise ValueError("`audio` is an empty list.")
        return [clip for item in audio for clip in self._load_clips(item, sampling_rate)]

    def _check_places(self, text: str | list[str], audio: list | None) -> None:
        texts = [text] if isinstance(text, str) else text
        places = sum(sample.count(self.audio_token) for sample in texts)
        clips = 0 if audio is None else len(audio)
        if places != clips:
            raise ValueError(
                f"`text` has {places} places for audio ({self.audio_token!r}), but {clips} clips of `audio` are given."
            )

    @staticmethod
    def _text_defaults(kwargs: dict, padding_side: str) -> dict:
        """The tokenizer's keyword arguments, with padding as this model needs it unless the caller says otherwise."""
        text_kwargs = {"padding": True, "padding_side": padding_side, **kwargs.pop("text_kwargs", {})}
        for name in ("padding", "padding_side", "add_special_tokens"):
            if name in kwargs:
                text_kwargs[name] = kwargs.pop(name)
        return text_kwargs

    def _process_audio(self, audio: list, **kwargs) -> tuple[dict, list[str]]:
        # Audio is always padded on the right: the tokenizer's side must not reach it
        kwargs = {key: value for key, value in kwargs.items() if key != "padding_side"}
        kwargs.update(return_attention_mask=True, return_tensors="pt")
        inputs = dict(self.feature_extractor(audio, **kwargs))
        inputs["input_features_mask"] = inputs.pop("attention_mask")
        return inputs, [self.replace_audio_token(inputs, index) for index in range(len(audio))]

    def replace_audio_token(self, audio_inputs: dict, audio_idx: int, **kwargs) -> str:
        """The text that takes the place of one `audio_token`: as many of them as the clip has audio tokens."""
        num_frames = int(audio_inputs["input_features_mask"][audio_idx].sum())
        return self.audio_token * -(-num_frames // self.reduction_factor)

    def _with_response(self, text, audio, response, output_labels: bool, kwargs: dict) -> BatchFeature:
        texts, responses = ([value] if isinstance(value, str) else list(value) for value in (text, response))
        if len(texts) != len(responses):
            raise ValueError(f"`response` has {len(responses)} entries for {len(texts)} of `text`.")
        end_id = self.response_eos_token_id()
        end = "" if end_id is None else self.tokenizer.convert_ids_to_tokens(end_id)
        rows = [[(prompt, False), (answer + end, True)] for prompt, answer in zip(texts, responses, strict=True)]
        return self._encode_rows(rows, audio, output_labels, kwargs)

    def _encode_rows(self, rows: list[list[tuple[str, bool]]], audio, output_labels: bool, kwargs) -> BatchFeature:
        """Rows of (text, counts in the labels) to padded inputs.

        The pieces are tokenized one by one, so that a prompt has the very tokens that it has without an answer.
        """
        text_kwargs = self._text_defaults(kwargs, padding_side="right")
        audio_kwargs = {**kwargs.pop("common_kwargs", {}), **kwargs.pop("audio_kwargs", {})}
        if "device" in kwargs:
            audio_kwargs["device"] = kwargs.pop("device")
        features: dict = {}
        replacements: list[str] = []
        if audio is not None:
            features, replacements = self._process_audio(
                audio, sampling_rate=self.feature_extractor.sampling_rate, **audio_kwargs
            )
        remaining = iter(replacements)
        encoded = []
        for row in rows:
            ids: list[int] = []
            labels: list[int] = []
            for index, (piece, counts) in enumerate(row):
                expanded = re.sub(re.escape(self.audio_token), lambda _: next(remaining), piece)
                piece_ids = self._tokenize(expanded, first=index == 0)
                ids += piece_ids
                labels += piece_ids if counts else [-100] * len(piece_ids)
            encoded.append({"input_ids": ids, "labels": labels})
        batch = self.tokenizer.pad(
            [{"input_ids": row["input_ids"]} for row in encoded],
            padding=text_kwargs["padding"],
            padding_side=text_kwargs["padding_side"],
            max_length=text_kwargs.get("max_length"),
            pad_to_multiple_of=text_kwargs.get("pad_to_multiple_of"),
            return_attention_mask=True,
            return_tensors="pt",
        )
        if output_labels:
            batch["labels"] = torch.full_like(batch["input_ids"], -100)
            for target, mask, row in zip(batch["labels"], batch["attention_mask"], encoded, strict=True):
                target[mask.bool()] = torch.tensor(row["labels"])
        return BatchFeature({**batch, **features})

    def _with_special_tokens(self, text, text_kwargs: dict) -> tuple:
        """Text and tokenizer arguments such that a text begins as the tokenizer wants and does not end.

        A template that writes the beginning-of-sequence token itself gets no second one; and a tokenizer that closes
        every text does not close a prompt, which is to go on.
        """
        if "add_special_tokens" in text_kwargs:
            return text, text_kwargs
        texts = [text] if isinstance(text, str) else list(text)
        bos = self.tokenizer.bos_token
        has_bos = [bos is not None and sample.startswith(bos) for sample in texts]
        probe = self.tokenizer("a")["input_ids"]
        closes = self.tokenizer.eos_token_id is not None and probe[-1:] == [self.tokenizer.eos_token_id]
        if not any(has_bos) and not closes:
            return text, text_kwargs
        opens = bos is not None and probe[:1] == [self.tokenizer.bos_token_id]
        texts = [bos + sample if opens and not has else sample for sample, has in zip(texts, has_bos, strict=True)]
        return texts[0] if isinstance(text, str) else texts, {**text_kwargs, "add_special_tokens": False}

    def _tokenize(self, text: str, first: bool) -> list[int]:
        """Token ids of the text at a row's beginning, or of a piece that goes on from there."""
        kwargs = {} if first else {"add_special_tokens": False}
        text, kwargs = self._with_special_tokens(text, kwargs)
        return self.tokenizer(text, **kwargs)["input_ids"]

    # --- prompts ----------------------------------------------------------------------------------------------------

    def _request(self, audio, language: str | None, prompt: str | None, instruction: str | None = None) -> list[dict]:
        instruction = self.transcription_instruction if instruction is None else instruction
        if language is not None:
            name = LANGUAGES.get(re.split("[-_]", language.lower())[0], language)  # "en-US" is English too
            if name == language and len(name) < 4 and name.islower():
                raise ValueError(
                    f"`language` {language!r} is not known. Give its English name, or one of {LANGUAGES}."
                )
            instruction = f"{instruction} The language is {name[:1].upper() + name[1:]}.".strip()
        if prompt:
            instruction = f"{instruction} {prompt}".strip()
        content = [{"type": "audio", "audio": audio}]
        if instruction:
            content.append({"type": "text", "text": instruction})
        return [{"role": "user", "content": content}]

    def default_prompt_ids(self) -> tuple[list[int], list[int]]:
        """Token ids before and after the audio in the default prompt, for the config's `prompt_prefix_ids` and
        `prompt_suffix_ids`."""
        return self.prompt_ids(self.transcription_instruction)

    def continuation_prompt_ids(self, task: str = "continuation") -> tuple[list[int], list[int]]:
        """Token ids before and after the audio of a prompt for speech: for `"continuation"` the config's
        `continuation_prefix_ids` and `continuation_suffix_ids`, for `"qa"` its `qa_prefix_ids` and `qa_suffix_ids`.

        Raises:
            ValueError: There is no such task.
        """
        instructions = {"continuation": self.continuation_instruction, "qa": self.qa_instruction}
        if task not in instructions:
            raise ValueError(f"`task` must be one of {', '.join(map(repr, instructions))}, got {task!r}.")
        return self.prompt_ids(instructions[task])

    def separator_ids(self) -> list[int]:
        """Token ids between what was heard and what follows, for the config's `separator_ids`: the end of a line, or a
        full stop for a tokenizer without."""
        unknown = self.tokenizer.unk_token_id
        for text in ("\n", "."):
            ids = self._plain_ids([text])[0]
            if ids and unknown not in ids and self.tokenizer.decode(ids) == text:
                return ids
        return []

    def continuation_text_ids(self, transcript: str, continuation: str | None = None) -> list[int]:
        """Token ids of the text that a model writes behind a spoken prompt, for `labels` of
        [`MelLLMForSpeechContinuation`]; the model adds the end of text.

        Args:
            transcript (`str`): What is said in the recording; with what follows it, where the two cannot be told apart. Its
                lines become one.
            continuation (`str`, *optional*): What follows it, or the answer. The separator goes between the two. Each is
                tokenized on its own, so that the separator's tokens are those of the config.
        """
        # The end of a line separates the two, so that there is none in the transcript
        ids = self._plain_ids([" ".join(transcript.split())])[0]
        if continuation is None:
            return ids
        return [*ids, *self.separator_ids(), *self._plain_ids([continuation.strip()])[0]]

    def decode_continuation(self, output) -> list[dict[str, str | None]]:
        """What [`MelLLMForSpeechContinuation.generate`] returned as text: for each row a dict of `text`, all of it, and
        `transcript` and `continuation`, its parts, which are None where the model wrote no separator."""

        def decode(ids) -> str | None:
            return None if ids is None else self.tokenizer.decode(ids, skip_special_tokens=True).strip()

        return [
            {"text": decode(row), "transcript": decode(transcript), "continuation": decode(continuation)}
            for row, transcript, continuation in zip(
                output.sequences, output.transcript, output.continuation, strict=True
            )
        ]

    def prompt_ids(self, instruction: str) -> tuple[list[int], list[int]]:
        """Token ids before and after the audio in a prompt that asks for something; `""` asks for nothing."""
        text = self.apply_chat_template(self._request(None, None, None, instruction), add_generation_prompt=True)
        ids = self._tokenize(text, first=True)
        place = ids.index(self.audio_token_id)
        return ids[:place], ids[place + 1 :]

    def speech_prompt_ids(self) -> tuple[list[int], list[int]]:
        """Token ids before and after a text that is to be spoken, for the config's `speech_prefix_ids` and
        `speech_suffix_ids`."""
        instruction = [{"type": "text", "text": self.speech_instruction + "\n"}] if self.speech_instruction else []
        place = {"type": "audio", "audio": None}  # stands for the text: a token that no text has
        messages = [{"role": "user", "content": [*instruction, place]}]
        ids = self._tokenize(self.apply_chat_template(messages, add_generation_prompt=True), first=True)
        index = ids.index(self.audio_token_id)
        return ids[:index], ids[index + 1 :]

    def apply_speech_request(
        self,
        text: str | list[str],
        voice=None,
        voice_text: str | list[str] | None = None,
        sampling_rate: int | None = None,
    ) -> BatchFeature:
        r"""Inputs of [`MelLLMForTextToSpeech.generate`].

        What looks like a special token of the tokenizer is read as the text that it is.

        Args:
            text (`str` or `list[str]`): What to speak. Characters that cannot be spoken are left out, with a warning;
                see [`MelLLMProcessor.clean_speech_text`].
            voice (*optional*): A recording of 0.5 to 30 seconds, or one for each text, whose voice is to go on; anything
                that [`load_audio`] takes.
            voice_text (`str` or `list[str]`, *optional*): What is said in it, word for word.
            sampling_rate (`int`, *optional*): Hz of recordings that are bare arrays, which are resampled from it; by
                default the feature extractor's.

        Returns:
            `input_ids` and `attention_mask`; with a voice, also `voice_features` `(batch, frames, num_mel_bins)` and
            `voice_features_mask` `(batch, frames)`.

        Raises:
            ValueError: A text is no string or has no word in it; a voice comes without its text or the other way round,
                or their numbers differ; a voice is too short, too long, silent, or cannot be read.
        """
        texts = self._speech_texts(text, "text")
        if (voice is None) != (voice_text is None):
            raise ValueError("`voice` and `voice_text` go together: a recording, and what is said in it.")
        batch: dict = {}
        if voice is not None:
            spoken = self._speech_texts(voice_text, "voice_text")
            num_clips, num_spoken = 1 if _is_clip(voice) else len(voice), len(spoken)
            if not (num_clips == num_spoken == 1 or num_clips == num_spoken == len(texts)):
                raise ValueError(
                    f"`voice` has {num_clips} recordings and `voice_text` {num_spoken} texts for {len(texts)} of `text`."
                )
            clips = self._load_voices(voice, sampling_rate)
            if num_clips == 1:
                clips, spoken = clips * len(texts), spoken * len(texts)
            texts = [f"{before.strip()} {after}" for before, after in zip(spoken, texts, strict=True)]
            features = self.feature_extractor(
                clips, sampling_rate=self.feature_extractor.sampling_rate, return_tensors="pt"
            )
            batch["voice_features"], batch["voice_features_mask"] = (
                features["input_features"],
                features["attention_mask"],
            )
        return BatchFeature({**self.speech_tokens(texts), **batch})

    def speech_tokens(self, texts: list[str]) -> dict[str, torch.Tensor]:
        """Texts to be spoken, as they are, to `input_ids` and `attention_mask` `(batch, tokens)`, padded on the left."""
        tokens = self.tokenizer(
            texts,
            padding=True,
            padding_side="left",
            add_special_tokens=False,
            split_special_tokens=True,
            return_tensors="pt",
        )
        return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}

    def _speech_texts(self, text, name: str) -> list[str]:
        texts = list(text) if isinstance(text, list | tuple) else [text]
        if not texts or not all(isinstance(item, str) and item.strip() for item in texts):
            shown = repr(text)
            raise ValueError(
                f"`{name}` must be a text or a list of texts, none of them empty, got "
                f"{shown if len(shown) < 80 else shown[:80] + '...'}."
            )
        return [self.clean_speech_text(item, name) for item in texts]

    def clean_speech_text(self, text: str, name: str = "text") -> str:
        """A text without what cannot be spoken: control characters, and what the tokenizer has no token for (a
        byte-level one has tokens for all text). A warning names what is left out.

        Raises:
            ValueError: `text`, called `name`, is no string, or no word remains.
        """
        if not isinstance(text, str):
            raise ValueError(f"`{name}` must be a string, got {type(text).__name__}.")
        # Control characters (NUL, escapes), halves of characters (bytes that were no text) and private ones
        characters = sorted(c for c in set(text) if not c.isspace())
        lost = [c for c in characters if unicodedata.category(c) in ("Cc", "Cs", "Co")]
        lost += self._dropped([c for c in characters if c not in lost])
        kept = text.translate({ord(c): None for c in lost})
        unknown = self._unknown([kept])
        if unknown:
            words = kept.split()
            unknown = self._unknown(dict.fromkeys(words))
            strange = self._unknown(sorted({c for word in unknown for c in word}))
            without = {word: word.translate({ord(c): None for c in strange}) for word in unknown}
            # What is still not known, or nothing any more, goes as a whole: some tokenizers know words and no letters
            whole = self._unknown([word for word in without.values() if word])
            gone = [word for word in unknown if not without[word] or without[word] in whole]
            parts = {c for word in unknown if word not in gone for c in word}
            lost += [*gone, *[c for c in strange if c in parts and c not in gone]]
            kept = " ".join(word if word not in without else without[word] for word in words)
            kept = " ".join(word for word in kept.split() if word not in whole)
        names = ", ".join(repr(c) for c in lost[:_MAX_NAMED]) + (", ..." if len(lost) > _MAX_NAMED else "")
        if not any(c.isalnum() for c in kept):
            reason = f" This tokenizer has no tokens for {names}." if lost else ""
            raise ValueError(f"`{name}` has no word to be spoken.{reason}")
        if lost:
            logger.warning(f"`{name}` has characters that cannot be spoken, and they are left out: {names}.")
        return kept

    def _plain_ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def _dropped(self, characters: list[str]) -> list[str]:
        """Those of the characters that the tokenizer passes over in silence."""
        # Behind a letter too, since some tokenizers write a token for the space before a text, whatever follows
        letter, *ids = self._plain_ids(["a", *characters, *[f"a{c}" for c in characters]])
        pairs = zip(characters, ids[: len(characters)], ids[len(characters) :], strict=True)
        is_known = letter and self.tokenizer.unk_token_id not in letter
        return [c for c, alone, behind in pairs if not alone or (is_known and behind == letter)]

    def _unknown(self, pieces) -> list[str]:
        """Those of the pieces of text that the unknown token is in."""
        unknown, pieces = self.tokenizer.unk_token_id, [piece for piece in pieces if piece.strip()]
        if unknown is None or not pieces:
            return []
        return [piece for piece, ids in zip(pieces, self._plain_ids(pieces), strict=True) if unknown in ids]

    def response_eos_token_id(self) -> int | None:
        """The token with which the template closes an answer: the tokenizer's end of text, or a chat's end of turn."""
        request = self._request(None, None, None)
        prompt = self.apply_chat_template(request, add_generation_prompt=True)
        answer = "answer"
        full = self.apply_chat_template([*request, {"role": "assistant", "content": answer}])
        tail = full.partition(prompt)[2].partition(answer)[2] if full.startswith(prompt) else ""
        ids = self.tokenizer(tail, add_special_tokens=False)["input_ids"]
        return ids[0] if ids and ids[0] in self._special_tokens() else self.tokenizer.eos_token_id

    def _special_tokens(self) -> dict[int, str]:
        """All of them: the tokenizer's own list has only those with a role, and a chat's markers may have none."""
        return {index: str(token) for index, token in self.tokenizer.added_tokens_decoder.items() if token.special}

    def apply_transcription_request(
        self,
        audio,
        language: str | list[str] | None = None,
        prompt: str | list[str] | None = None,
        tokenize: bool = True,
        **kwargs,
    ) -> BatchFeature | list[str]:
        r"""Inputs that ask for the transcript of each clip.

        Args:
            audio: One clip or a list of clips, in any form that [`load_audio`] takes, or arrays at the feature
                extractor's rate.
            language (`str` or `list[str]`, *optional*): English name or two-letter code of the language spoken.
            prompt (`str` or `list[str]`, *optional*): More to tell the model: words to expect, or how to write.
            tokenize (`bool`, defaults to `True`): `False` returns the prompts as text.
            kwargs: For [`MelLLMProcessor.apply_chat_template`].

        Raises:
            ValueError: Numbers of clips, languages and prompts differ, or a language is not known.
        """
        clips = [audio] if _is_clip(audio) else list(audio)
        if not clips:
            raise ValueError("`audio` is an empty list.")

        def per_clip(name, value):
            values = [value] * len(clips) if value is None or isinstance(value, str) else list(value)
            if len(values) != len(clips):
                raise ValueError(f"`{name}` has {len(values)} entries for {len(clips)} clips.")
            return values

        conversations = [
            self._request(*request)
            for request in zip(clips, per_clip("language", language), per_clip("prompt", prompt), strict=True)
        ]
        return self.apply_chat_template(
            conversations, add_generation_prompt=True, tokenize=tokenize, return_dict=True, **kwargs
        )

    def apply_chat_template(
        self,
        conversation: list[dict] | list[list[dict]],
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        output_labels: bool = False,
        processor_kwargs: dict | None = None,
        **kwargs,
    ):
        r"""Writes conversations in the language model's chat format.

        A message's `content` is a string or a list of parts: `{"type": "text", "text": ...}` and `{"type": "audio",
        "audio": ...}` (or `path`, `url`), whose audio is anything that [`load_audio`] takes or an array at the
        feature extractor's rate; parts of the OpenAI form, `input_audio` and `audio_url`, are understood too.

        Args:
            conversation: A list of messages, or a list of such lists.
            add_generation_prompt (`bool`, defaults to `False`): End with the beginning of an answer.
            tokenize (`bool`, defaults to `False`): Return token ids and features instead of text.
            return_dict (`bool`, defaults to `False`): With `tokenize`, return all inputs and not only `input_ids`.
            output_labels (`bool`, defaults to `False`): Return all inputs with `labels` in which only the answers of
                the assistant, each with the token that ends it, count. Implies `tokenize` and `return_dict`.

        Raises:
            ValueError: A part is neither text nor audio; with `output_labels`, there is no answer, or the template
                does not write a conversation's beginning the same whatever follows.
        """
        batched = len(conversation) > 0 and isinstance(conversation[0], list | tuple)
        conversations = [
            [self._plain_message(message) for message in messages]
            for messages in (conversation if batched else [conversation])
        ]
        if output_labels:
            return self._labelled(conversations, chat_template, dict(processor_kwargs or {}), kwargs)
        if tokenize:
            for messages in conversations:
                self._load_message_audio(messages)
        return super().apply_chat_template(
            conversations if batched else conversations[0],
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            tokenize=tokenize,
            return_dict=return_dict,
            processor_kwargs=processor_kwargs,
            **kwargs,
        )

    @staticmethod
    def _plain_message(message: dict) -> dict:
        """A copy of a message whose parts all have the one form, `audio` or `text`."""
        content = message.get("content")
        if not isinstance(content, list | tuple):
            return dict(message)
        parts = []
        for part in content:
            kind = part.get("type")
            if kind == "audio_url":
                url = part["audio_url"]
                part = {"type": "audio", "audio": url["url"] if isinstance(url, dict) else url}
            elif kind == "input_audio":
                data = part["input_audio"]
                part = {"type": "audio", "audio": f"data:audio/{data.get('format', 'wav')};base64,{data['data']}"}
            elif kind == "audio":
                source = next(
                    (part[key] for key in ("audio", "path", "url", "base64") if part.get(key) is not None), None
                )
                if isinstance(source, np.ndarray | torch.Tensor) and part.get("sampling_rate"):
                    source = (source, part["sampling_rate"])
                part = {"type": "audio", "audio": source}
            elif kind != "text":
                raise ValueError(f"A part of a message must be of type text or audio, got {kind!r}.")
            parts.append(part)
        return {**message, "content": parts}

    def _load_message_audio(self, messages: list[dict]) -> list[np.ndarray]:
        """Loads the audio of a conversation in place, so that it does not depend on what else is installed; returns
        the clips in their order."""
        clips = []
        for message in messages:
            if isinstance(message.get("content"), str):
                continue
            for part in message.get("content") or []:
                if part["type"] == "audio":
                    if part["audio"] is None:
                        raise ValueError("A part of type audio has no audio: give it as `audio`, `path` or `url`.")
                    (clip,) = self._load_clips(part["audio"], None)
                    part["audio"] = clip.cpu().numpy() if isinstance(clip, torch.Tensor) else np.asarray(clip)
                    clips.append(part["audio"])
        return clips

    def _labelled(self, conversations, chat_template, processor_kwargs: dict, kwargs: dict) -> BatchFeature:
        rows, audio = [], []
        for messages in conversations:
            audio += self._load_message_audio(messages)

            def render(count, prompt=False, messages=messages):
                return super(MelLLMProcessor, self).apply_chat_template(
                    messages[:count], chat_template=chat_template, add_generation_prompt=prompt, **kwargs
                )

            pieces, done = [], ""
            answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
            if not answers:
                raise ValueError("`output_labels=True` needs a message of the assistant in every conversation.")
            for index in answers:
                before, after = render(index, prompt=True), render(index + 1)
                if not (before.startswith(done) and after.startswith(before)):
                    raise ValueError(
                        "This chat template rewrites earlier messages when later ones are added, so labels cannot be "
                        "told apart. Pass a `chat_template` that does not, or `text` and `response` to the processor."
                    )
                answer = after[len(before) :]
                end = self._end_of_answer(answer)
                pieces += [(before[len(done) :], False), (answer[:end], True)]
                if answer[end:]:
                    pieces.append((answer[end:], False))
                done = after
            rows.append(pieces)
        return self._encode_rows(rows, audio or None, True, processor_kwargs)

    def _end_of_answer(self, answer: str) -> int:
        """Where an answer with its closing token ends; some templates write a line break after it."""
        special = self._special_tokens().values()
        closing = [answer.rfind(token) + len(token) for token in special if token in answer]
        return max(closing, default=len(answer))

    # --- outputs ----------------------------------------------------------------------------------------------------

    def decode(self, token_ids, return_format: str = "raw", **kwargs):
        r"""Token ids to text; a batch of them to a list of texts.

        Args:
            token_ids: What `generate` returned, with or without the prompt.
            return_format (`str`, defaults to `"raw"`): `"raw"` is the tokenizer's `decode`. `"transcription_only"`
                leaves out the prompt and special tokens; `"parsed"` is a dict with that text as `transcription` and
                the `language`, which this model does not tell (`None`).
            kwargs: For the tokenizer.

        Raises:
            ValueError: There is no such `return_format`.
        """
        formats = ("raw", "parsed", "transcription_only")
        if return_format not in formats:
            raise ValueError(f"`return_format` must be one of {', '.join(formats)}, got {return_format!r}.")
        if return_format == "raw":
            return self.tokenizer.decode(token_ids, **kwargs)
        if hasattr(token_ids, "tolist"):
            token_ids = token_ids.tolist()
        if len(token_ids) > 0 and not isinstance(token_ids[0], int):
            return [self.decode(ids, return_format=return_format, **kwargs) for ids in token_ids]
        kwargs["skip_special_tokens"] = True
        text = self.tokenizer.decode(self._after_prompt(list(token_ids)), **kwargs).strip()
        return text if return_format == "transcription_only" else {"language": None, "transcription": text}

    def batch_decode(self, sequences, return_format: str = "raw", **kwargs) -> list:
        """As [`MelLLMProcessor.decode`], for a batch."""
        if return_format == "raw":
            return self.tokenizer.batch_decode(sequences, **kwargs)
        return [self.decode(ids, return_format=return_format, **kwargs) for ids in sequences]

    def _after_prompt(self, ids: list[int]) -> list[int]:
        """The answer in a sequence that may begin with the prompt: what follows the last audio and, after that, what
        the template writes between a request and its answer."""
        if self.audio_token_id not in ids:
            return ids
        ids = ids[len(ids) - ids[::-1].index(self.audio_token_id) :]
        suffix = self.default_prompt_ids()[1]
        if ids[: len(suffix)] == suffix:
            return ids[len(suffix) :]
        # Another request than the default one: it ends as the default one does, from its closing token on
        instruction = self.tokenizer(self.transcription_instruction, add_special_tokens=False)["input_ids"]
        header = suffix[len(instruction) :] if suffix[: len(instruction)] == instruction else suffix[-1:]
        places = [i for i in range(len(ids) - len(header) + 1) if header and ids[i : i + len(header)] == header]
        if not places:
            return ids
        # A chat's header is unmistakable, and only its last one begins the answer; a bare line break may be in it too
        is_chat = not self._special_tokens().keys().isdisjoint(header)
        return ids[places[-1 if is_chat else 0] + len(header) :]

    def save_audio(self, audio, path: str | os.PathLike, sampling_rate: int | None = None) -> None:
        """Writes a waveform to a file whose ending names the format (`.wav`, `.flac`, `.ogg`, `.mp3`).

        Args:
            audio (`np.ndarray` or `torch.Tensor` of shape `(samples,)` or `(1, samples)`): Mono, in [-1, 1].
            path: The file. It appears whole or not at all.
            sampling_rate (`int`, *optional*): Hz; the feature extractor's by default.

        Raises:
            ValueError: `audio` is not one mono waveform, or is not finite.
        """
        try:
            import soundfile
        except ImportError as error:
            raise ImportError("Writing audio needs soundfile: `pip install soundfile`.") from error
        samples = audio.detach().float().cpu().numpy() if isinstance(audio, torch.Tensor) else np.asarray(audio)
        samples = samples[0] if samples.ndim == 2 and samples.shape[0] == 1 else samples
        if samples.ndim != 1 or samples.size == 0 or not np.isfinite(samples).all():
            raise ValueError(f"`audio` must be one finite mono waveform, got an array of shape {samples.shape}.")
        path = os.fspath(path)
        folder, name = os.path.split(os.path.abspath(path))
        # Not of `tempfile`, whose files only their owner may read
        partial = os.path.join(folder, f".partial-{uuid.uuid4().hex[:8]}-{name}")
        try:
            soundfile.write(partial, samples, sampling_rate or self.feature_extractor.sampling_rate)
            os.replace(partial, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(partial)
            raise

    @property
    def model_input_names(self) -> list[str]:
        return ["input_features", "input_features_mask", "input_ids", "attention_mask"]


__all__ = ["MelLLMProcessor"]
