"""Programs that speak, each behind the same three methods. A new one is a class like these."""

from .base import EngineMissing, EngineOptions, SpeechEngine
from .espeak import EspeakEngine
from .flite import FliteEngine
from .kokoro import KokoroEngine
from .piper import PiperEngine


ENGINES: dict[str, type[SpeechEngine]] = {
    engine.name: engine for engine in (KokoroEngine, PiperEngine, FliteEngine, EspeakEngine)
}


def make_engine(name: str, options: EngineOptions) -> SpeechEngine:
    """An engine by its name, or `python:module.function`: what the function returns when it is called with the options.

    Raises:
        EngineMissing: It is not installed; says what to install.
        ValueError: There is no such engine.
    """
    if name.startswith("python:"):
        from mel_llm.evaluation.plugins import load_callable

        return load_callable(name, "--engines")(options)
    if name not in ENGINES:
        raise ValueError(
            f"--engines: there is no {name!r}; there are {', '.join(ENGINES)} and python:module.function."
        )
    return ENGINES[name](options)


__all__ = ["ENGINES", "EngineMissing", "EngineOptions", "SpeechEngine", "make_engine"]
