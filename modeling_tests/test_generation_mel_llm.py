"""generate(): every strategy, batches, budgets, loops, silence."""

import copy

import numpy as np
import pytest
import torch
from conftest import BACKBONES, build_tiny, tiny_text_config
from transformers import AutoModelForCausalLM, GenerationConfig, TextIteratorStreamer, TextStreamer, set_seed

from mel_llm import MelLLMFeatureExtractor, generation_mel_llm
from mel_llm.generation_mel_llm import RepetitionLoopCriteria, _loop_period


GREEDY = {"do_sample": False, "max_new_tokens": 12}


def audio_of(processor, clips):
    return processor(audio=[clip["array"] for clip in clips])


def trimmed(row: torch.Tensor, pad: int = 0, eos: int = 2) -> list[int]:
    return [token for token in row.tolist() if token not in (pad, eos)]


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("model_type", BACKBONES)
@pytest.mark.parametrize("strategy", [{}, {"num_beams": 3}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_batch_equals_single(tokenizer, speech_clips, model_type, bidirectional, strategy):
    model, processor = build_tiny(tokenizer, model_type, {"bidirectional_attention": bidirectional})
    clips = speech_clips[:3]
    together = model.generate(**audio_of(processor, clips), **GREEDY, **strategy)
    for clip, row in zip(clips, together, strict=True):
        alone = model.generate(**audio_of(processor, [clip]), **GREEDY, **strategy)[0]
        assert trimmed(alone) == trimmed(row)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("model_type", BACKBONES)
def test_with_cache_equals_without(tokenizer, speech_clips, model_type, bidirectional):
    model, processor = build_tiny(tokenizer, model_type, {"bidirectional_attention": bidirectional})
    audio = audio_of(processor, speech_clips[:3])
    expected = model.generate(**audio, **GREEDY, use_cache=False)
    assert torch.equal(model.generate(**audio, **GREEDY), expected)
    assert torch.equal(model.generate(**audio, **GREEDY, cache_implementation="static"), expected)


def test_default_prompt_is_the_processors_prompt(tiny, speech_clips):
    model, processor = tiny
    clips = speech_clips[:3]
    audio = audio_of(processor, clips)
    request = processor.apply_transcription_request([clip["array"] for clip in clips])
    ids, mask = model._build_prompt(audio["input_features"], audio["attention_mask"])
    assert torch.equal(ids, request["input_ids"]) and torch.equal(mask, request["attention_mask"])
    transcripts = model.generate(**audio, **GREEDY)
    whole = model.generate(**request, **GREEDY)
    assert torch.equal(whole[:, ids.shape[1] :], transcripts)
    assert torch.equal(whole[:, : ids.shape[1]], ids)


def test_features_by_position_and_without_a_mask(tiny, speech_clips):
    model, processor = tiny
    audio = audio_of(processor, speech_clips[:1])
    expected = model.generate(**audio, **GREEDY)
    assert torch.equal(model.generate(audio["input_features"], **GREEDY), expected)
    assert torch.equal(
        model.generate(audio["input_features"], input_features_mask=audio["attention_mask"], **GREEDY), expected
    )


@pytest.mark.parametrize(
    "strategy",
    [
        {"num_beams": 5},
        {"do_sample": True, "temperature": 0.8, "top_p": 0.9},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
    ],
)
def test_strategies_give_dicts_of_transcripts(tiny, speech_clips, strategy):
    model, processor = tiny
    set_seed(0)
    out = model.generate(
        **audio_of(processor, speech_clips[:2]),
        **{**GREEDY, **strategy},
        return_dict_in_generate=True,
        output_scores=True,
    )
    rows = 2 * strategy.get("num_return_sequences", 1)
    assert out.sequences.shape[0] == rows and 1 <= out.sequences.shape[1] <= 12
    assert len(out.scores) >= out.sequences.shape[1]
    assert not (out.sequences == model.config.audio_token_id).any()


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(
    "strategy",
    [{"num_return_sequences": 2, "do_sample": True, "top_k": 1}, {"num_beams": 3, "num_return_sequences": 2}],
)
def test_copies_of_a_text_keep_their_own_clips(tokenizer, speech_clips, strategy, bidirectional):
    """Texts with two, no and one clip; each row's copies must hear what the row hears alone."""
    model, processor = build_tiny(tokenizer, audio_config={"bidirectional_attention": bidirectional})
    a, b, c = (clip["array"] for clip in speech_clips[:3])
    token = processor.audio_token
    texts, clips = [f"{token} or {token}?\n", "No audio.\n", f"{token}Write it.\n"], [[a, b], [], [c]]
    batch = processor(text=texts, audio=[a, b, c])
    together = model.generate(**batch, **GREEDY | strategy)
    for row, (text, own) in enumerate(zip(texts, clips, strict=True)):
        alone = model.generate(**processor(text=text, audio=own or None), **GREEDY | strategy)
        for twin in range(2):
            assert together[2 * row + twin][-12:].tolist() == alone[twin][-12:].tolist()
    if strategy.get("do_sample"):  # from the single likeliest token: greedy
        greedy = model.generate(**batch, **GREEDY)
        assert torch.equal(together[::2], greedy) and torch.equal(together[1::2], greedy)


def test_assisted_decoding_with_a_text_model_and_with_prompt_lookup(tiny, speech_clips):
    model, processor = tiny
    audio = audio_of(processor, speech_clips[:1])
    expected = model.generate(**audio, **GREEDY)
    set_seed(1)
    draft = AutoModelForCausalLM.from_config(tiny_text_config()).eval()
    assert torch.equal(model.generate(**audio, **GREEDY, assistant_model=draft), expected)
    assert torch.equal(model.generate(**audio, **GREEDY, prompt_lookup_num_tokens=2), expected)
    assert torch.equal(model.generate(**audio, **GREEDY, assistant_model=copy.deepcopy(model)), expected)


def test_audio_that_was_forgotten_is_an_error(tiny, speech_clips):
    model, processor = tiny
    ids = processor.apply_transcription_request(speech_clips[0]["array"])["input_ids"]
    with pytest.raises(ValueError, match="no `input_features`"):
        model.generate(input_ids=ids, max_new_tokens=3)
    with pytest.raises(ValueError, match="no `input_features`"):
        model.generate(ids, max_new_tokens=3)


def test_text_streamers(tiny, speech_clips, capsys):
    model, processor = tiny
    audio = audio_of(processor, speech_clips[:1])
    out = model.generate(**audio, **GREEDY, streamer=TextStreamer(processor.tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.rstrip("\n") == processor.tokenizer.decode(out[0]).rstrip("\n")
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True)
    model.generate(**audio, **GREEDY, streamer=streamer)
    assert "".join(streamer) == processor.tokenizer.decode(out[0])


def test_compiled_decoding_is_one_graph_and_changes_nothing(tiny, speech_clips):
    from transformers import CompileConfig

    model, processor = tiny
    audio = audio_of(processor, speech_clips[:2])
    expected = model.generate(**audio, **GREEDY)
    # fullgraph: a Python-side check of values on the way of a decoding step would raise here
    config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    config._compile_all_devices = True
    compiled = model.generate(**audio, **GREEDY, cache_implementation="static", compile_config=config)
    assert torch.equal(compiled, expected)


def test_chat_returns_the_prompt_as_language_models_do(tiny):
    model, processor = tiny
    inputs = processor("Please try again.")
    out = model.generate(**inputs, **GREEDY)
    assert torch.equal(out[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])


# --- how long a transcript may get --------------------------------------------------------------------------------------


def never_stop(model):
    """A model that goes on until something stops it, and does not repeat itself."""
    model.generation_config.suppress_tokens = [2, model.config.audio_token_id]
    return model


def test_budget_follows_each_clips_own_length(tiny, speech_clips):
    model, processor = tiny
    never_stop(model)
    model.config.max_text_tokens_per_second = 10.0
    clips = sorted(speech_clips, key=lambda clip: clip["duration"])
    clips = [clips[0], clips[-1]]
    out = model.generate(**audio_of(processor, clips), do_sample=True, repetition_penalty=2.0)
    for clip, row in zip(clips, out, strict=True):
        frames = processor.feature_extractor.num_frames(len(clip["array"]))
        budget = 16 + -(-frames * 10 // 100)
        assert abs(len(trimmed(row)) - budget) <= 1


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    """What the generation code warns of; the library's `warning_once` would keep quiet in every test but the first."""
    messages = []
    monkeypatch.setattr(generation_mel_llm.logger, "warning_once", messages.append, raising=False)
    return messages


def test_a_transcript_cut_by_its_budget_is_told(tiny, speech_clips, warnings):
    model, processor = tiny
    never_stop(model)
    model.config.max_text_tokens_per_second = 1.0
    model.generate(**audio_of(processor, speech_clips[:2]), max_new_tokens=30)
    assert not warnings  # asked for
    model.generate(**audio_of(processor, speech_clips[:2]), do_sample=True)
    assert "reached the most tokens" in warnings[0]


def test_explicit_lengths_count_tokens_of_the_transcript(tiny, speech_clips):
    model, processor = tiny
    never_stop(model)
    audio = audio_of(processor, speech_clips[:2])
    assert model.generate(**audio, max_new_tokens=5).shape[1] == 5
    assert model.generate(**audio, max_length=6).shape[1] == 6  # as Seq2SeqTrainer passes it
    # as it leaves it behind in the model's generation config
    model.generation_config.max_length, model.generation_config.max_new_tokens = 7, None
    assert model.generate(**audio).shape[1] == 7
    # more than the budget, on purpose
    model.config.max_text_tokens_per_second = 1.0
    kwargs = {"do_sample": True, "repetition_penalty": 2.0}
    assert model.generate(**audio, max_new_tokens=50, **kwargs).shape[1] == 50
    assert model.generate(**audio, min_new_tokens=190, max_new_tokens=190).shape[1] == 190


def test_generate_leaves_the_models_generation_config_alone(tiny, speech_clips):
    model, processor = tiny
    before = model.generation_config.to_dict()
    model.generate(**audio_of(processor, speech_clips[:1]), max_new_tokens=3, num_beams=2)
    assert model.generation_config.to_dict() == before


def test_no_warnings_about_arguments(tiny, speech_clips, caplog):
    import transformers

    model, processor = tiny
    model.generation_config.max_length = 20  # as the Seq2SeqTrainer leaves it
    transformers.utils.logging.enable_propagation()
    try:
        model.generate(**audio_of(processor, speech_clips[:1]), max_new_tokens=3, num_beams=2, length_penalty=1.1)
    finally:
        transformers.utils.logging.disable_propagation()
    assert not [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


# --- loops and silence ----------------------------------------------------------------------------------------------------


def test_what_counts_as_a_loop():
    def period(tokens):
        return int(_loop_period(torch.tensor([tokens])))

    assert period([5] * 48) == 1
    assert period([1, 2, 3] + [5] * 48) == 1
    assert period([5] * 47) == 0
    assert period([7, 8, 9] * 16) == 3
    assert period([7, 8, 9, 10] * 11) == 0  # "nine nine nine" in characters is speech
    assert period([7, 8, 9] * 16 + [1, 1, 1]) == 0
    assert period(list(range(16)) * 12) == 16
    assert period(list(range(17)) * 12) == 0
    criteria = RepetitionLoopCriteria(prompt_length=3, end_ids=torch.tensor([0, 2]))
    rows = torch.tensor([[1, 2, 3] + [5] * 48, [1, 2, 3, *range(10, 58)], [1, 2, 3, 9] + [0] * 47])
    assert criteria(rows, None).tolist() == [True, False, False]
    rows = torch.nn.functional.pad(rows, (0, 8))
    assert not criteria(rows[:, :-4], None).any()  # looked at not so long ago
    assert criteria(rows, None).tolist() == [False] * 3 and criteria.stopped.tolist() == [True, False, False]


class Parrot(torch.nn.Module):
    """Stands for the output layer: always the same token."""

    def __init__(self, model, token):
        super().__init__()
        self.size, self.token = model.config.vocab_size, token
        self.weight = model.lm_head.weight

    def forward(self, hidden_states):
        scores = torch.zeros(*hidden_states.shape[:-1], self.size)
        scores[..., self.token] = 10.0
        return scores


@pytest.mark.parametrize("strategy", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 7}])
def test_a_loop_ends_and_is_cut_to_its_first_round(tiny, speech_clips, strategy):
    model, processor = tiny
    model.lm_head = Parrot(model, 40)
    audio = audio_of(processor, [max(speech_clips, key=lambda clip: clip["duration"])])
    out = model.generate(**audio, **strategy)
    assert out.shape[1] < 70  # the budget would be 16 + 40 a second
    assert trimmed(out[0]) == [40]
    assert model.generate(**audio, **strategy, min_new_tokens=50, max_new_tokens=50).shape[1] == 50


def test_only_what_was_stopped_in_a_loop_is_cut(tiny):
    model, _ = tiny
    rows = torch.tensor(
        [
            [9] + [5] * 54 + [0] * 9,  # stopped in a loop
            [9] + [5] * 54 + [2] + [0] * 8,  # ended by the model: its own word, however odd
            [9] + [5] * 63,  # cut off by its length while in a loop
            list(range(10, 74)),
        ]
    )
    loops = RepetitionLoopCriteria(0, torch.tensor([0, 2]))
    loops.stopped = torch.tensor([True, False, False, False])
    out = model._cut_loops(rows, torch.tensor([55, 55, 64, 64]), model.generation_config, loops)
    assert trimmed(out[0]) == trimmed(out[2]) == [9, 5]
    assert torch.equal(out[1], rows[1]) and torch.equal(out[3], rows[3])


@pytest.mark.parametrize("strategy", [{}, {"num_beams": 5}, {"do_sample": True}, {"num_beams": 2, "do_sample": True}])
def test_silence_gives_empty_text_and_leaves_the_rest_alone(tiny, speech_clips, strategy):
    model, processor = tiny
    rng = torch.Generator().manual_seed(0)
    silent = torch.zeros(16000)
    hiss = torch.randn(24000, generator=rng) * 1e-4  # -80 dBFS
    speech = torch.tensor(speech_clips[0]["array"])
    out = model.generate(**processor(audio=[silent, speech, hiss]), max_new_tokens=12, **strategy)
    texts = processor.batch_decode(out, skip_special_tokens=True)
    assert texts[0] == texts[2] == ""
    assert texts[1] != ""
    if not strategy.get("do_sample"):
        alone = model.generate(**processor(audio=[speech]), max_new_tokens=12, **strategy)
        assert trimmed(out[1]) == trimmed(alone[0])


@pytest.mark.parametrize("gain_db", [0, -20, -40])
def test_quiet_speech_is_not_silence(tiny, speech_clips, gain_db):
    model, processor = tiny
    arrays = [clip["array"] * 10 ** (gain_db / 20) for clip in speech_clips]
    audio = processor(audio=arrays)
    assert model._silent_clips(audio["input_features"], audio["attention_mask"]) is None


@pytest.mark.parametrize("preset", ["phi4", "hifigan16k", "spectron"])
def test_silence_is_told_from_speech_in_the_units_of_every_preset(tokenizer, speech_clips, preset):
    extractor = MelLLMFeatureExtractor.from_preset(preset)
    audio_config = {"num_mel_bins": extractor.num_mel_bins, "hop_length": extractor.hop_length}
    model, processor = build_tiny(tokenizer, audio_config=audio_config, feature_extractor=extractor)
    speech = speech_clips[0]["array"] * 0.01
    audio = processor(audio=[np.zeros(16000, np.float32), speech])
    assert model._silent_clips(audio["input_features"], audio["attention_mask"]).tolist() == [True, False]


def test_silence_guard_can_be_turned_off(tiny):
    model, processor = tiny
    model.config.audio_config.silence_threshold = None
    never_stop(model)
    assert trimmed(model.generate(**processor(audio=torch.zeros(16000)), max_new_tokens=5)[0])


def test_audio_longer_than_the_backbone_was_made_for_warns(tiny, warnings):
    model, processor = tiny
    model.config.text_config.max_position_embeddings = 64
    model.generate(**processor(audio=torch.rand(32000)), max_new_tokens=30)
    assert "shorter pieces" in warnings[0]


def test_the_shortest_audio(tiny):
    model, processor = tiny
    for samples in (1, 10, 399, 400, 401):
        out = model.generate(**processor(audio=torch.rand(samples)), max_new_tokens=3)
        assert out.shape[0] == 1


def test_a_config_that_says_nothing_of_beams_has_the_checkpoints(tiny, speech_clips):
    model, processor = tiny
    inputs = audio_of(processor, speech_clips[:2])
    expected = model.generate(**inputs, num_beams=3, max_new_tokens=8)
    greedy = model.generate(**inputs, max_new_tokens=8)
    model.generation_config.num_beams = 3
    assert torch.equal(model.generate(**inputs, generation_config=GenerationConfig(max_new_tokens=8)), expected)
    assert torch.equal(
        model.generate(**inputs, generation_config=GenerationConfig(max_new_tokens=8, num_beams=1)), greedy
    )
    model.generation_config.use_cache = False
    assert torch.equal(model.generate(**inputs, generation_config=GenerationConfig(max_new_tokens=8)), expected)


@pytest.mark.parametrize("model_type", ["falcon_h1", "lfm2"])
def test_beams_of_backbones_that_keep_more_than_keys_and_values(tokenizer, speech_clips, model_type):
    text = (
        {} if model_type == "lfm2" else {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}
    )
    model, processor = build_tiny(tokenizer, model_type, text=text)
    inputs = audio_of(processor, speech_clips[:2])
    beams = model.generate(**inputs, num_beams=3, max_new_tokens=6)
    without = model.generate(
        **inputs, num_beams=3, max_new_tokens=6, output_hidden_states=True, return_dict_in_generate=True
    )
    assert torch.equal(beams, without.sequences)


def test_a_checkpoints_beams_make_way_for_a_streamer(tiny, speech_clips):
    model, processor = tiny
    inputs = audio_of(processor, speech_clips[:1])
    greedy = model.generate(**inputs, max_new_tokens=8)
    model.generation_config.num_beams = 3
    streamer = TextIteratorStreamer(processor.tokenizer)
    assert torch.equal(model.generate(**inputs, max_new_tokens=8, streamer=streamer), greedy)
    assert "".join(streamer).endswith(processor.decode(greedy[0]))
    assert model.generation_config.num_beams == 3
    for both in ({"num_beams": 2}, {"generation_config": GenerationConfig(num_beams=2)}):  # who asks for both is told
        with pytest.raises(ValueError, match="streamer"):
            model.generate(**inputs, max_new_tokens=8, streamer=streamer, **both)
