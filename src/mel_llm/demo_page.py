"""The demo page: speak to the model, watch what it reads and writes, and let it speak.

What the page does, without the page: [`Demo`] needs no gradio, and [`build_page`] puts it on one.
"""

import html
import inspect
import math
import os
import threading
from collections.abc import Iterator

import numpy as np
import torch
from transformers import StoppingCriteria, TextIteratorStreamer

from .audio_utils_mel_llm import load_audio
from .synthesis_mel_llm import iter_speech, split_sentences
from .transcription_mel_llm import join_texts, split_audio


# A perceptually even colour scale, dark for quiet: matplotlib's "magma" (CC0), at nine places
_COLOURS = np.array(
    [
        *((0, 0, 4), (28, 16, 68), (79, 18, 123), (129, 37, 129), (181, 54, 122)),
        *((229, 80, 100), (251, 135, 97), (254, 194, 135), (252, 253, 191)),
    ],
    dtype=np.float32,
)
_BIN_PIXELS = 3
_MAX_COLUMNS = 1600
_MIN_COLUMNS = 1200


class _Stop(StoppingCriteria):
    """Ends the decoding of a visitor who has gone."""

    def __init__(self):
        self.event = threading.Event()

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        return torch.full((len(input_ids),), self.event.is_set(), dtype=torch.bool, device=input_ids.device)


def mel_image(frames: np.ndarray | torch.Tensor) -> np.ndarray:
    """A picture of log-mel frames: time to the right, pitch upwards, the loud bright.

    Args:
        frames: `(frames, num_mel_bins)`.

    Returns:
        `np.ndarray`: `(height, width, 3)`, uint8. Long recordings are averaged in time, short ones widened.
    """
    values = np.asarray(frames, dtype=np.float32)
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"`frames` must be (frames, num_mel_bins), got {values.shape}.")
    if len(values) > _MAX_COLUMNS:
        starts = np.linspace(0, len(values), _MAX_COLUMNS, endpoint=False).astype(int)
        values = np.add.reduceat(values, starts) / np.diff([*starts, len(values)])[:, None]
    low, high = np.percentile(values, [1, 99.5])
    places = np.clip((values - low) / max(high - low, 1e-6), 0, 1) * (len(_COLOURS) - 1)
    left = np.minimum(places.astype(int), len(_COLOURS) - 2)
    share = (places - left)[..., None]
    colours = _COLOURS[left] * (1 - share) + _COLOURS[left + 1] * share
    image = colours.round().astype(np.uint8).transpose(1, 0, 2)[::-1]
    return image.repeat(_BIN_PIXELS, 0).repeat(max(1, math.ceil(_MIN_COLUMNS / len(values))), 1)


class Demo:
    r"""What can be done on the page. One visitor at a time: the model is one.

    Args:
        model ([`MelLLMForSpeechSeq2Seq`] or [`MelLLMForTextToSpeech`]): In evaluation mode. It speaks if it has a speech
            head and a vocoder.
        processor ([`MelLLMProcessor`]): Its processor.
        max_seconds (`float`, defaults to 600): Longest recording.
        max_chars (`int`, defaults to 2000): Longest text to speak.
    """

    def __init__(self, model, processor, max_seconds: float = 600.0, max_chars: int = 2000):
        self.model, self.processor = model, processor
        self.max_seconds, self.max_chars = max_seconds, max_chars
        # The largest recording of that length that is likely: 48 kHz, stereo, 32 bit, and a header
        self.max_bytes = math.ceil(max_seconds * 48000 * 2 * 4) + (1 << 20)
        self.rate = processor.feature_extractor.sampling_rate
        self.speaks = getattr(model, "vocoder", None) is not None

    def listen(self, recording: str | os.PathLike | None) -> Iterator[tuple[np.ndarray, str, str]]:
        """Transcribes a recording, piece by piece and token by token.

        Args:
            recording: A file that [`load_audio`] reads.

        Returns:
            Iterator of the picture of the log-mel that the model reads, the text so far, and what is going on.

        Raises:
            ValueError, OSError: There is nothing to transcribe, it is too long, or it cannot be read.
        """
        if not recording:
            raise ValueError("There is no recording yet: record something, or upload a file.")
        audio = load_audio(recording, self.rate, duration=self.max_seconds + 1)
        seconds = len(audio) / self.rate
        if seconds > self.max_seconds:
            raise ValueError(
                f"This page takes recordings of up to {self.max_seconds:g} seconds. For longer ones there is "
                "`mel-llm transcribe`."
            )
        frames = self._log_mel(audio)
        image = mel_image(frames)
        yield image, "", f"{seconds:.1f} s, {len(frames):,} frames. The model reads ..."
        audio_config = self.model.config.audio_config
        texts: list[str] = []
        tokens = 0
        for piece in split_audio([audio], self.rate, audio_config.max_audio_seconds):
            inputs = self.processor(audio=piece.samples, sampling_rate=self.rate)
            tokens += audio_config.num_audio_tokens(inputs["input_features"].shape[1])
            at = f"{piece.start:.1f} to {piece.end:.1f} of {seconds:.1f} s"
            text = ""
            for text in self._write(inputs):
                yield image, join_texts([*texts, text]), f"{at} ..."
            texts.append(text)
        text = join_texts(texts)
        if not tokens:
            status = "There is no sound in this recording: it is nowhere louder than -70 dBFS. Is the microphone on?"
        elif not text:
            status = f"{seconds:.1f} s read as {tokens:,} audio tokens; the model heard no words."
        else:
            status = f"{seconds:.1f} s read as {tokens:,} audio tokens."
        yield image, text, status

    def _log_mel(self, audio: np.ndarray) -> torch.Tensor:
        return self.processor.feature_extractor(audio, sampling_rate=self.rate, return_tensors="pt")["input_features"][
            0
        ]

    def _write(self, inputs) -> Iterator[str]:
        """The transcript of one piece as it grows; what the loop guard takes back is gone in the last one."""
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        stop = _Stop()
        result: dict = {}

        def run() -> None:
            try:
                result["ids"] = self.model.generate(
                    **inputs.to(self.model.device), streamer=streamer, stopping_criteria=[stop], num_beams=1
                )
            except BaseException as error:  # told where somebody listens
                result["error"] = error
            finally:
                streamer.end()  # whatever happened, nobody waits for ever

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            text = ""
            for part in streamer:
                if part:
                    text += part
                    yield text.strip()
        finally:
            stop.event.set()
            thread.join()
        if "error" in result:
            raise result["error"]
        yield self.processor.decode(result["ids"][0], skip_special_tokens=True).strip()

    def speak(
        self, text: str | None, temperature: float = 1.0, seed: int | float | None = None
    ) -> Iterator[tuple[tuple[int, np.ndarray] | None, np.ndarray | None, str]]:
        """Speaks a text, sentence by sentence in one voice.

        Args:
            text (`str`): Up to `max_chars` characters.
            temperature (`float`, defaults to 1.0): 0 takes the mean.
            seed (`int`, *optional*): Makes it repeatable.

        Returns:
            Iterator of the sound (Hz and int16 samples; `None` until all is spoken), the picture of its log-mel so far,
            and what is going on.

        Raises:
            ValueError: There is nothing to speak, it is too long, or this model does not speak.
        """
        if not self.speaks:
            raise ValueError("This model has no speech head with a vocoder: it only listens.")
        text = (text or "").strip()
        if not text:
            raise ValueError("There is no text yet: type what is to be spoken.")
        if len(text) > self.max_chars:
            raise ValueError(f"This page speaks up to {self.max_chars:,} characters, and these are {len(text):,}.")
        if seed is not None and (seed < 0 or seed != int(seed)):
            raise ValueError(f"The seed must be a whole number from 0 on, got {seed:g}.")
        total = len(split_sentences(self.processor.clean_speech_text(text)))
        yield None, None, f"Sentence 1 of {total} ..."
        pieces: list[np.ndarray] = []
        frames: list[np.ndarray] = []  # as the model wrote them
        image = None
        speech = iter_speech(
            self.model,
            self.processor,
            text,
            seed=None if seed is None else int(seed),
            on_sentence=lambda sentence, output: frames.append(output.spectrogram[0].float().cpu().numpy()),
            temperature=float(temperature),
        )
        for _, piece in speech:
            pieces.append(piece.numpy())
            image = mel_image(np.concatenate(frames))
            yield None, image, f"{len(pieces)} of {max(total, len(pieces))} sentences are spoken ..."
        audio = np.concatenate(pieces)
        samples = (np.clip(audio, -1, 1) * 32767).round().astype(np.int16)
        yield (self.rate, samples), image, f"{len(audio) / self.rate:.1f} s of speech. It is synthetic."


def build_page(demo: Demo, title: str = "Mel-LLM"):
    """The page, a `gradio.Blocks`, with its queue not yet bounded.

    Raises:
        ImportError: gradio is not installed; the message says how to.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # it asks the network when it is imported
    try:
        import gradio
    except ImportError as error:
        raise ImportError(
            "The demo page needs gradio: `pip install gradio`, or this package's extra `demo`."
        ) from error

    def explained(function, picture):
        """Errors as a message on the page; it is HTML there. A picture (an output's place) is sent when it changes."""

        def call(*arguments):
            shown = None
            try:
                for outputs in function(*arguments):
                    outputs = list(outputs)
                    if outputs[picture] is shown:
                        outputs[picture] = gradio.skip()
                    else:
                        shown = outputs[picture]
                    yield outputs
            except (ValueError, OSError, ImportError) as error:
                raise gradio.Error(html.escape(str(error)), print_exception=False) from error

        return call

    # No button that publishes what is on the page; its name depends on gradio's version
    is_new = "buttons" in inspect.signature(gradio.Image.__init__).parameters
    private = {"buttons": ["download"]} if is_new else {"show_share_button": False}
    one_at_a_time = {"concurrency_limit": 1, "concurrency_id": "model"}
    # gradio keeps what visitors send and get as files: every ten minutes, those older than an hour go
    with gradio.Blocks(title=title, analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gradio.Markdown(
            f"# {html.escape(title)}\nA language model that reads spectrograms. "
            "What is recorded and written here stays on the machine that this page runs on."
        )
        with gradio.Tab("Listen"):
            recording = gradio.Audio(
                sources=["microphone", "upload"],
                type="filepath",
                label=f"Speech, up to {demo.max_seconds:g} seconds",
                **private,
            )
            with gradio.Row():
                start = gradio.Button("Transcribe", variant="primary")
                stop = gradio.Button("Stop")
            heard = gradio.Textbox(label="What the model writes", lines=3, interactive=False)
            read = gradio.Image(label="The log-mel that it reads", interactive=False, **private)
            state = gradio.Markdown()
            run = start.click(
                explained(demo.listen, 0), recording, [read, heard, state], api_name="transcribe", **one_at_a_time
            )
            stop.click(None, cancels=[run])
        if demo.speaks:
            with gradio.Tab("Speak"):
                text = gradio.Textbox(label=f"Text, up to {demo.max_chars:,} characters", lines=3)
                with gradio.Row():
                    temperature = gradio.Slider(0, 1.5, value=1, step=0.05, label="Temperature")
                    seed = gradio.Number(label="Seed (the same one, the same speech)", value=0, precision=0, minimum=0)
                with gradio.Row():
                    say = gradio.Button("Speak", variant="primary")
                    hush = gradio.Button("Stop")
                spoken = gradio.Audio(label="What the model says", interactive=False, **private)
                written = gradio.Image(label="The log-mel that it writes", interactive=False, **private)
                status = gradio.Markdown()
                run = say.click(
                    explained(demo.speak, 1),
                    [text, temperature, seed],
                    [spoken, written, status],
                    api_name="speak",
                    **one_at_a_time,
                )
                hush.click(None, cancels=[run])
    return page


__all__ = ["Demo", "build_page", "mel_image"]
