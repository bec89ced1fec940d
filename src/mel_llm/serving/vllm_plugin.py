"""vLLM's entry point: tells it of Mel-LLM. vLLM calls [`register`] in each of its processes, whatever it serves."""


def register() -> None:
    """Makes vLLM load checkpoints of Mel-LLM, those that speak too, as [`vllm_model.MelLLMForVLLM`].

    Cheap and repeatable: the model's module is imported when such a checkpoint is served.
    """
    from vllm import ModelRegistry

    import mel_llm  # noqa: F401  (its configuration and processor register with the Auto classes)

    for architecture in ("MelLLMForSpeechSeq2Seq", "MelLLMForTextToSpeech", "MelLLMForSpeechContinuation"):
        ModelRegistry.register_model(architecture, "mel_llm.serving.vllm_model:MelLLMForVLLM")


__all__ = ["register"]
