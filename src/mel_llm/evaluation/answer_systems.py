"""Who answers questions about clips: models through their chat templates, and functions."""

import torch

from .clip_systems import ClipSystem, FunctionSystem, ModelSystem
from .plugins import PREFIX


class Answerer(ModelSystem):
    """A model that is asked about clips: the audio, then the question, in its chat template; it answers greedily.

    A Mel-LLM, or any model whose processor's `apply_chat_template` takes `{"type": "audio", "audio": array}`.

    Args:
        system_prompt (`str`, *optional*): A message before.
        args, kwargs: As for [`ModelSystem`].

    Raises:
        ValueError: It has no chat template.
    """

    def __init__(self, *args, system_prompt: str | None = None, **kwargs):
        super().__init__(*args, system_prompt=system_prompt, **kwargs)
        self.system_prompt = system_prompt
        if not getattr(self.processor, "chat_template", None):
            raise ValueError(f"{self.name} has no chat template, so it cannot be asked anything.")

    @torch.no_grad()
    def run(self, clips, prompts) -> list[str]:
        before = [{"role": "system", "content": [{"type": "text", "text": self.system_prompt}]}]
        conversations = [
            [
                *(before if self.system_prompt else []),
                {
                    "role": "user",
                    "content": [{"type": "audio", "audio": clip}, {"type": "text", "text": prompt}],
                },
            ]
            for clip, prompt in zip(clips, prompts, strict=True)
        ]
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
        if not self.is_mel_llm:  # whose processor pads as it must by itself
            self.processor.tokenizer.padding_side = "left"
            options.update(
                return_tensors="pt", processor_kwargs={"padding": True, "sampling_rate": self.sampling_rate}
            )
        inputs = self.processor.apply_chat_template(conversations, **options)
        ids = self._generate(inputs, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(ids, skip_special_tokens=True)]


class FunctionAnswerer(FunctionSystem):
    """A function `(waveform (samples,), rate in Hz, question) -> text`."""

    def run(self, clips, prompts) -> list[str]:
        return [
            str(self.function(clip, self.sampling_rate, prompt)) for clip, prompt in zip(clips, prompts, strict=True)
        ]


def make_answerer(spec: str, is_peer: bool = False, **options) -> ClipSystem:
    """What `--model` or `--peer` names.

    Args:
        spec (`str`): Folder or Hub name of a model, or `python:module.function`: see [`FunctionAnswerer`].
        is_peer (`bool`, defaults to `False`): Whether it is there to be compared with.
        options: For [`Answerer`].

    Raises:
        ImportError, OSError, ValueError: It cannot be found or asked; the message says why.
    """
    if spec.startswith(PREFIX):
        return FunctionAnswerer(spec, is_peer)
    return Answerer(spec, is_peer=is_peer, **options)


__all__ = ["Answerer", "FunctionAnswerer", "make_answerer"]
