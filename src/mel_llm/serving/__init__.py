"""Mel-LLM behind servers: vLLM's plugin ([`vllm_plugin`]), and speech as OpenAI's clients ask for it ([`speech`]).

`transformers serve` needs nothing from here: `python -m mel_llm serve` is enough.
"""
