"""`pipeline("speech-continuation")`: a spoken prompt in, its text and what follows, written and spoken, out.

transformers has no such task; this adds it to its registry when the package, or a repository's code, is imported. All of it
is ours.
"""

from typing import Any

import numpy as np
import torch
from transformers import AutoModelForPreTraining, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.utils import logging


logger = logging.get_logger(__name__)

TASK = "speech-continuation"
_GENERATE_ARGUMENTS = (
    *("return_text_only", "skip_text", "max_new_tokens", "max_seconds", "min_seconds", "temperature", "seed"),
    *("do_sample", "text_temperature", "top_k", "top_p", "stop_threshold", "streamer", "text_streamer"),
)


class SpeechContinuationPipeline(Pipeline):
    """Goes on with recordings, or answers them.

    ```python
    >>> from transformers import pipeline
    >>> import mel_llm

    >>> speaker = pipeline("speech-continuation", model="my-mel-llm")
    >>> said = speaker("prompt.wav", max_seconds=5.0, seed=1)
    >>> said["text"], said["audio"].shape, said["sampling_rate"]
    ```
    """

    _load_processor = True
    _load_tokenizer = False
    _load_feature_extractor = False
    _load_image_processor = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # The base class would pad batches on the side that the tokenizer asks for
        self.tokenizer = None
        if not hasattr(self.model, "speech_head") or not hasattr(self.model.config, "continuation_prefix_ids"):
            raise ValueError(
                f"The {TASK} pipeline needs a MelLLMForSpeechContinuation, got {type(self.model).__name__}. Load the model with "
                "`AutoModelForPreTraining`, or pass its name."
            )
        trained = self.model.config.architectures
        if trained and type(self.model).__name__ not in trained:
            logger.warning(
                f"This checkpoint is a {trained[0]}, which was not trained to go on with speech: expect nonsense."
            )
        if not hasattr(self.processor, "decode_continuation"):
            raise ValueError(
                f"The {TASK} pipeline needs the model's `processor`, got {type(self.processor).__name__}."
            )

    def __call__(self, inputs, **kwargs: Any) -> dict | list[dict]:
        """
        Args:
            inputs: A recording, or a list of them: a path, a URL, bytes, an array (at the model's rate, or at
                `sampling_rate`), `(array, rate)`, or a dict with `array` or `raw` and `sampling_rate`, as those of `datasets`.
                Of what is longer than the model was trained on, the last seconds are taken, with a warning.
            sampling_rate (`int`, *optional*): Hz of arrays.
            question (`bool`, defaults to `False`): Answer the recording instead of going on with it.
            batch_size (`int`, defaults to 1): How many recordings go through the model at a time.
            generate_kwargs (`dict`, *optional*), kwargs: For [`MelLLMForSpeechContinuation.generate`].

        Returns:
            A dict, or a list of them: `text` (`str`), all that the model wrote; `transcript` and `continuation` (`str`), the
            text of the recording and of what follows, or None where the model did not tell them apart; `audio`
            (`np.ndarray` of shape `(samples,)`, float32), what follows, or None with `return_text_only`; and
            `sampling_rate` (`int`), Hz.

        Raises:
            ValueError: A recording cannot be read or is shorter than one audio token; the model has no vocoder; or an
                argument is unknown or out of range.
        """
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(self, sampling_rate=None, question=None, generate_kwargs=None, **kwargs):
        unknown = sorted(set(kwargs) - set(_GENERATE_ARGUMENTS))
        if unknown:
            raise ValueError(
                f"The {TASK} pipeline does not know the arguments {', '.join(unknown)}; it knows sampling_rate, question, "
                f"batch_size, generate_kwargs, {', '.join(_GENERATE_ARGUMENTS)}."
            )
        generate_kwargs = {**(generate_kwargs or {}), **kwargs}
        if question is not None:
            generate_kwargs["task"] = "qa" if question else "continuation"
        preprocess = {} if sampling_rate is None else {"sampling_rate": sampling_rate}
        return preprocess, {"generate_kwargs": generate_kwargs} if generate_kwargs else {}, {}

    def preprocess(self, inputs, sampling_rate: int | None = None) -> dict:
        rate = self.processor.feature_extractor.sampling_rate
        if isinstance(inputs, dict) and inputs.get("raw") is not None:  # as the speech recognition pipeline has it
            inputs = {**{key: value for key, value in inputs.items() if key != "raw"}, "array": inputs["raw"]}
        if sampling_rate is not None and isinstance(inputs, np.ndarray | torch.Tensor | list):
            inputs = (inputs, sampling_rate)
        features = self.processor(audio=inputs)
        limit = self.model.config.audio_config
        frames = int(limit.max_audio_seconds * limit.frame_rate)
        size = features["input_features"].shape[1]
        if size > frames:
            logger.warning(
                f"The recording has {size / limit.frame_rate:.1f} s (at {rate} Hz), more than the {limit.max_audio_seconds:g} s "
                "that the model was trained on; its last seconds are taken."
            )
            features = {name: value[:, -frames:] for name, value in features.items()}
        return dict(features)

    def _forward(self, model_inputs, generate_kwargs: dict | None = None) -> dict:
        generate_kwargs = generate_kwargs or {}
        if self.model.vocoder is None and not generate_kwargs.get("return_text_only"):
            raise ValueError(
                "This model has no vocoder (`config.vocoder_config` is None), so it makes no sound: pass "
                "`return_text_only=True`, or a model with one."
            )
        output = self.model.generate(**model_inputs, **{"task": "continuation", **generate_kwargs})
        rows = self.processor.decode_continuation(output)
        audio = [None] * len(rows) if output.audio is None else [row.float().cpu().numpy() for row in output.audio]
        return {"rows": [{**row, "audio": samples} for row, samples in zip(rows, audio, strict=True)]}

    def postprocess(self, model_outputs) -> dict:
        rows = model_outputs["rows"]
        row = rows[0] if isinstance(rows, list) else rows
        return {**row, "sampling_rate": self.model.config.sampling_rate}


def register_pipeline(replace: bool = True) -> None:
    """Makes `transformers.pipeline` know the task. Calling it again changes nothing.

    Args:
        replace (`bool`, defaults to `True`): Also where the task is there already, of a repository's code, say.
    """
    known = PIPELINE_REGISTRY.supported_tasks
    if TASK in known:
        if not replace or known[TASK]["impl"] is SpeechContinuationPipeline:
            return
        del known[TASK]  # the registry would warn
    PIPELINE_REGISTRY.register_pipeline(
        TASK, SpeechContinuationPipeline, pt_model=AutoModelForPreTraining, type="multimodal"
    )
    # What a saved pipeline writes into the model's config: that a repository has code of its own for the task. It has not,
    # and whoever has this package need not trust any.
    if "_registered_impl" in vars(SpeechContinuationPipeline):
        del SpeechContinuationPipeline._registered_impl


__all__ = ["SpeechContinuationPipeline", "register_pipeline"]
