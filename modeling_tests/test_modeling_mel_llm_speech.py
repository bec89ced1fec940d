"""Speaking: what training sees is what generation does, alone and in batches, whole and as a stream."""

import copy
import json

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, build_tiny
from test_registration import run
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSpeechSeq2Seq,
    AutoModelForTextToWaveform,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.utils import logging

import mel_llm
from mel_llm import (
    MelLLMConfig,
    MelLLMFeatureExtractor,
    MelLLMForTextToSpeech,
    MelLLMSpeechConfig,
    MelLLMVocoder,
    MelLLMVocoderConfig,
    load_audio,
)
from mel_llm.speech_generation_mel_llm import _SpeechOptions
from mel_llm.training import SynthesisCollator


def build_speaking(
    tokenizer,
    family: str = "llama",
    vocoder: bool = True,
    audio: dict | None = None,
    text: dict | None = None,
    **speech,
):
    extractor = MelLLMFeatureExtractor.from_preset("phi4", edge_padding=120)
    speech = {"history_dropout": 0.0, "postnet_layers": 2, "postnet_channels": 16, "head_hidden_size": 32, **speech}
    model, processor = build_tiny(
        tokenizer,
        family,
        audio_config=audio,
        text=text,
        feature_extractor=extractor,
        speech_config=MelLLMSpeechConfig.from_preset("small", **speech),
        vocoder_config=MelLLMVocoderConfig.from_feature_extractor(extractor, num_iterations=4) if vocoder else None,
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # so that the residual and the post-net, which begin at zero, have a say
        for parameter in model.speech_head.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval(), processor


@pytest.fixture(scope="module")
def speaking(tokenizer):
    return build_speaking(tokenizer)


def free(**more):
    """Arguments with which speech goes on to the limit."""
    return {"stop_threshold": 1.0, "return_dict_in_generate": True, "seed": 3, **more}


def assert_same_sound(samples: torch.Tensor, expected: torch.Tensor) -> None:
    """Griffin-Lim's iterations make a thousandth of what were last digits in the spectrogram."""
    assert samples.shape == expected.shape and (samples - expected).abs().max() < 1e-3 * expected.abs().max()


TEXTS = ["Please try again.", "Yes.", "You have reached a number that is not in service."]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("share_embed", [True, False])
@pytest.mark.parametrize("head_type", ["vae", "deterministic"])
def test_generation_is_teacher_forcing(tokenizer, family, share_embed, head_type):
    model, processor = build_speaking(tokenizer, family, share_embed=share_embed, head_type=head_type)
    inputs = processor.apply_speech_request(TEXTS[:2])
    options = _SpeechOptions(temperature=0.0, max_patches=7, stop_threshold=1.0)
    frames, lengths, _ = model._write_patches(*inputs.values(), None, None, options, None)
    assert lengths.tolist() == [28, 28]
    hidden = model._teacher_forced_states(inputs["input_ids"], inputs["attention_mask"], frames, lengths)
    mean, _ = model.speech_head.distribution(hidden[:, :-1])
    torch.testing.assert_close(model.speech_head._frames(model.speech_head.decode(mean)), frames, rtol=1e-5, atol=1e-5)


def test_the_history_may_be_the_models_own_in_training(tokenizer, speech_clips):
    model, processor = build_speaking(tokenizer, head_type="deterministic")
    batch = SynthesisCollator(processor)([{"audio": clip["array"], "text": clip["text"]} for clip in speech_clips[:2]])
    histories = []
    embed = model._embed_history
    model._embed_history = lambda frames, lengths: histories.append(frames) or embed(frames, lengths)
    recorded = model(**batch).losses["before"]
    model.history_sampling = 0.5
    assert torch.equal(model(**batch).losses["before"], recorded)  # an evaluation has none of it
    recording = histories[0].unflatten(1, (-1, 4))
    lengths = -(-(batch["labels"] != -100).all(-1).sum(-1) // 4) * 4
    rounds = []
    for seed in range(6):
        histories.clear()
        model.train()
        torch.manual_seed(seed)
        model(**batch).loss.backward()
        rounds.append(len(histories) - 1)
        before, after = histories[-2:]
        own = (after.unflatten(1, (-1, 4)) != recording).flatten(2).any(-1)
        assert 0.3 < own.float().mean() < 0.7
        # Whole patches, and those that it would have written there
        with torch.no_grad():
            model.eval()
            states = model._states_behind(batch["input_ids"], batch["attention_mask"], before, lengths)
            written = model.speech_head.sample(states[:, :-1].flatten(0, 1)).unflatten(0, own.shape)
        torch.testing.assert_close(after.unflatten(1, (-1, 4))[own], written[own], rtol=1e-4, atol=1e-4)
    assert set(rounds) == {1, 2}  # once, or twice on end
    # What autocast kept of the passes without gradients must not be what the last pass is made of
    model.train().zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(**batch).loss.backward()
    assert all(
        parameter.grad is not None
        for parameter in (model.speech_head.latent.weight, model.model.multi_modal_projector.linear_1.weight)
    )


@pytest.mark.parametrize("reduction_factor", [1, 2, 8])
def test_other_patch_sizes(tokenizer, reduction_factor):
    model, processor = build_speaking(tokenizer, audio={"reduction_factor": reduction_factor})
    output = model.generate(**processor("Yes."), **free(max_new_tokens=5))
    assert output.spectrogram[0].shape == (5 * reduction_factor, 80)
    assert output.audio[0].shape == (5 * reduction_factor * 160,)


def test_a_text_speaks_the_same_in_any_batch(speaking):
    model, processor = speaking
    model = copy.deepcopy(model)
    model.config.speech_config.history_dropout = 0.3
    together = model.generate(**processor.apply_speech_request(TEXTS), **free(max_new_tokens=6))
    for index, text in enumerate(TEXTS):
        alone = model.generate(**processor.apply_speech_request(text), **free(max_new_tokens=6))
        torch.testing.assert_close(alone.spectrogram[0], together.spectrogram[index], rtol=1e-4, atol=1e-3)
        assert len(alone.audio[0]) == len(together.audio[index])
    other = model.generate(**processor.apply_speech_request(TEXTS), **free(max_new_tokens=6, seed=4))
    assert not torch.allclose(other.spectrogram[0], together.spectrogram[0])


def test_limits_and_the_stop(speaking):
    model, processor = speaking
    inputs = processor.apply_speech_request(TEXTS[:2])
    tokens = inputs["attention_mask"].sum(-1)
    output = model.generate(**inputs, **free())
    expected = [-(-(2.0 + n / 1.5) // 0.04) * 4 for n in tokens.tolist()]
    assert [len(frames) for frames in output.spectrogram] == expected and output.stopped == [False, False]
    half = model.generate(**inputs, **free(max_seconds=0.5))
    assert [len(frames) for frames in half.spectrogram] == [52, 52]
    whole = model.generate(**inputs, **free(max_seconds=0.6))  # 15 patches, and in float32 0.6 / 0.04 is more
    assert [len(frames) for frames in whole.spectrogram] == [60, 60]
    at_once = model.generate(**inputs, **free(stop_threshold=1e-9, min_seconds=0.2))
    assert [len(frames) for frames in at_once.spectrogram] == [20, 20] and at_once.stopped == [True, True]
    waveforms = model.generate(**inputs, max_seconds=0.5, stop_threshold=1.0)
    assert waveforms.shape == (2, 52 * 160)


def test_silence_ends_speech(speaking, monkeypatch):
    model, processor = speaking
    spoken = iter([torch.full((1, 4, 80), 1.0)] * 5 + [torch.full((1, 4, 80), -3.0)] * 1000)
    monkeypatch.setattr(model.speech_head, "sample", lambda *args: next(spoken))
    output = model.generate(**processor(TEXTS[2]), **free(max_seconds=30))
    assert len(output.spectrogram[0]) == (5 + 8) * 4  # and 0.3 s of the silence
    assert output.stopped == [False]


class Streamer:
    def __init__(self):
        self.parts, self.ended = [], False

    def put(self, value):
        self.parts.append(value)

    def end(self):
        self.ended = True


def test_a_stream_is_the_whole(speaking):
    model, processor = speaking
    streamer = Streamer()
    inputs = processor(TEXTS[2])
    whole = model.generate(**inputs, **free(max_seconds=6.0))
    streamed = model.generate(**inputs, **free(max_seconds=6.0, streamer=streamer))
    assert streamer.ended and len(streamer.parts) > 3
    assert_same_sound(torch.cat(streamer.parts), whole.audio[0])
    assert torch.equal(torch.cat(streamer.parts), streamed.audio[0])
    torch.testing.assert_close(streamed.spectrogram[0], whole.spectrogram[0], rtol=1e-4, atol=1e-4)
    # A listener hears something soon: a block of 16 frames, and the frames that it waits for
    assert len(streamer.parts[0]) == 16 * 160
    with pytest.raises(ValueError, match="one text at a time"):
        model.generate(**processor.apply_speech_request(TEXTS), streamer=Streamer())


@pytest.mark.parametrize("spoken_again", [False, True])
def test_a_stream_holds_silence_back_that_may_be_cut(speaking, monkeypatch, spoken_again):
    model, processor = speaking
    loud, silent = torch.full((1, 4, 80), 1.0), torch.full((1, 4, 80), -3.0)
    patches = [loud] * 5 + [silent] * 40 + ([loud] * 3 if spoken_again else []) + [silent] * 1000
    results = []
    for streamer in (None, Streamer()):
        spoken = iter(patches)
        monkeypatch.setattr(model.speech_head, "sample", lambda *args, spoken=spoken: next(spoken))
        results.append(model.generate(**processor(TEXTS[2]), **free(max_seconds=30, streamer=streamer)))
    whole, streamed = results
    assert len(whole.spectrogram[0]) == (5 + 8 + (32 + 3 + 8 if spoken_again else 0)) * 4
    torch.testing.assert_close(streamed.spectrogram[0], whole.spectrogram[0], rtol=1e-4, atol=1e-4)
    assert sum(map(len, streamer.parts)) == len(whole.audio[0])


def test_no_mask_is_made_where_nothing_is_padded(speaking, monkeypatch):
    model, processor = speaking
    masks, forward = [], model.model.language_model.forward

    def look(**kwargs):
        masks.append(kwargs["attention_mask"])
        return forward(**kwargs)

    monkeypatch.setattr(model.model.language_model, "forward", look)
    model.generate(**processor(TEXTS[0]), **free(max_new_tokens=3))
    assert masks == [None] * 3
    masks.clear()
    model.generate(**processor.apply_speech_request(TEXTS), **free(max_new_tokens=3))
    assert [mask.shape[1] - masks[0].shape[1] for mask in masks] == [0, 1, 2]


def test_a_voice_is_the_same_in_any_batch_with_dropout(speaking, speech_clips):
    """Rows whose voices differ in length draw different numbers of random values."""
    model, processor = speaking
    model = copy.deepcopy(model)
    model.config.speech_config.history_dropout = 0.3
    clips = sorted(speech_clips, key=lambda clip: len(clip["array"]))[:2]
    inputs = processor.apply_speech_request(
        TEXTS[:2], voice=[clip["array"] for clip in clips], voice_text=[clip["text"] for clip in clips]
    )
    together = model.generate(**inputs, **free(max_new_tokens=5))
    request = processor.apply_speech_request(TEXTS[0], voice=clips[0]["array"], voice_text=clips[0]["text"])
    alone = model.generate(**request, **free(max_new_tokens=5))
    torch.testing.assert_close(alone.spectrogram[0], together.spectrogram[0], rtol=1e-4, atol=1e-3)


def test_a_voice_goes_before(speaking, speech_clips):
    model, processor = speaking
    clips = speech_clips[:2]
    inputs = processor.apply_speech_request(
        TEXTS[:2], voice=[clip["array"] for clip in clips], voice_text=[clip["text"] for clip in clips]
    )
    together = model.generate(**inputs, **free(max_new_tokens=5))
    alone = model.generate(
        **processor.apply_speech_request(TEXTS[1], voice=clips[1]["array"], voice_text=clips[1]["text"]),
        **free(max_new_tokens=5),
    )
    torch.testing.assert_close(alone.spectrogram[0], together.spectrogram[1], rtol=1e-4, atol=1e-3)
    without = model.generate(**processor.apply_speech_request(TEXTS[1]), **free(max_new_tokens=5))
    assert not torch.allclose(without.spectrogram[0], together.spectrogram[1])

    # What it continues with is what teacher forcing over voice and speech predicts
    options = _SpeechOptions(temperature=0.0, max_patches=4, stop_threshold=1.0)
    one = processor.apply_speech_request(TEXTS[1], voice=clips[1]["array"], voice_text=clips[1]["text"])
    frames, _, _ = model._write_patches(*one.values(), options, None)
    voice = model.normalize(one["voice_features"])
    num_voice = voice.shape[1] // 4 * 4
    everything = torch.cat([voice[:, :num_voice], frames], dim=1)
    lengths = torch.tensor([everything.shape[1]])
    hidden = model._teacher_forced_states(one["input_ids"], one["attention_mask"], everything, lengths)
    mean, _ = model.speech_head.distribution(hidden[:, :-1])
    predicted = model.speech_head._frames(model.speech_head.decode(mean))[:, num_voice:]
    torch.testing.assert_close(predicted, frames, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("request_kwargs", "message"),
    [
        ({"text": ""}, "none of them empty"),
        ({"text": ["a", "  "]}, "none of them empty"),
        ({"text": "a", "voice": torch.zeros(16000)}, "go together"),
        ({"text": "a", "voice_text": "b"}, "go together"),
        ({"text": ["a", "b", "c"], "voice": [torch.zeros(16000)] * 2, "voice_text": ["x", "y"]}, "2 recordings"),
    ],
)
def test_requests_that_cannot_be_spoken(speaking, request_kwargs, message):
    _, processor = speaking
    with pytest.raises(ValueError, match=message):
        processor.apply_speech_request(**request_kwargs)


NOISE = np.random.default_rng(0).standard_normal(16000 * 40).astype("float32") * 0.1


@pytest.mark.parametrize(
    ("voice", "message"),
    [
        (NOISE[:800], "has 0.05 seconds: it must have from 0.5 to 30"),
        (NOISE, "longer than 30 seconds"),
        (np.zeros(16000, "float32"), "silent"),
        (np.full(16000, np.nan, "float32"), "`voice`.*NaN"),
        ((np.full(16000, np.nan, "float32"), 8000), "`voice`.*NaN"),
        (NOISE[:16000].reshape(-1, 2), "`voice`.*transpose"),
        ((NOISE[:8000], 0), "`voice`.*Hz"),
        (b"no audio", "`voice`.*not audio"),
        ([], "0 recordings"),
    ],
)
def test_voices_that_cannot_go_on(speaking, voice, message):
    _, processor = speaking
    with pytest.raises(ValueError, match=message):
        processor.apply_speech_request("Yes.", voice=voice, voice_text="No.")


def test_a_voice_at_any_rate(speaking, tmp_path):
    _, processor = speaking
    tone = np.sin(np.arange(16000) * 0.2).astype("float32") * 0.3

    def features(voice, **kwargs):
        return processor.apply_speech_request("Yes.", voice=voice, voice_text="No.", **kwargs)["voice_features"]

    at_16k, half = features(tone), load_audio((tone, 16000), sampling_rate=8000)
    soundfile.write(tmp_path / "stereo.wav", np.stack([half, half], axis=1), 8000, subtype="FLOAT")
    for other in (features((half, 8000)), features(half, sampling_rate=8000), features(tmp_path / "stereo.wav"),
                  features(np.stack([half, half]), sampling_rate=8000)):  # fmt: skip
        assert other.shape == at_16k.shape
        torch.testing.assert_close(other, features((half, 8000)), rtol=1e-3, atol=1e-2)
    soundfile.write(tmp_path / "long.wav", np.tile(tone, 600), 16000)  # ten minutes
    with pytest.raises(ValueError, match="longer than 30 seconds"):
        features(tmp_path / "long.wav")
    with pytest.raises(FileNotFoundError):
        features(tmp_path / "gone.wav")


def test_special_tokens_in_a_text_are_text(speaking):
    _, processor = speaking
    tokenizer = processor.tokenizer
    text = "Say <|eos|> and <|audio|> and <|bos|>."
    special = set(tokenizer.convert_tokens_to_ids(["<|eos|>", "<|audio|>", "<|bos|>", "<|pad|>"]))
    for batch in (processor.apply_speech_request(text), processor([text]), processor(text)):  # the pipeline's call
        assert not special & set(batch["input_ids"][0].tolist())
        assert tokenizer.decode(batch["input_ids"][0]) == text
    # elsewhere, text with special tokens in it is what a prompt is made of
    assert special & set(processor(text="Say <|eos|>")["input_ids"][0].tolist())


@pytest.fixture
def warnings(caplog, monkeypatch):
    """Texts of this package's warnings."""
    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)
    caplog.set_level("WARNING", logger="mel_llm")
    return lambda: [record.getMessage() for record in caplog.records]


LETTERS = {c: i for i, c in enumerate("abcdefghijklmnopqrstuvwxyz.")}


@pytest.mark.parametrize("says_unknown", [True, False])
def test_letters_that_the_tokenizer_lacks_are_named(speaking, warnings, says_unknown):
    vocab = {**LETTERS, **({"[UNK]": 27} if says_unknown else {})}
    model = models.BPE(vocab, [], unk_token="[UNK]" if says_unknown else None)
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]" if says_unknown else None, eos_token="</s>"
    )
    tokenizer.pad_token = "</s>"
    tokenizer.add_tokens(["<|audio|>"], special_tokens=True)
    processor = mel_llm.MelLLMProcessor(speaking[1].feature_extractor, tokenizer)
    assert processor.clean_speech_text("say it.") == "say it." and not warnings()
    assert processor.clean_speech_text("say 你 it 😀 x好.").split() == ["say", "it", "x."]
    (message,) = warnings()
    assert all(c in message for c in "你😀好")
    with pytest.raises(ValueError, match="no word to be spoken.*no tokens for .*你.*好"):
        processor.apply_speech_request("你好")


def test_words_that_a_tokenizer_of_words_lacks_are_named(speaking, warnings):
    backend = Tokenizer(models.WordLevel({"say": 0, "it": 1, "[UNK]": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.add_tokens(["<|audio|>"], special_tokens=True)
    processor = mel_llm.MelLLMProcessor(speaking[1].feature_extractor, tokenizer)
    assert processor.clean_speech_text("say it") == "say it" and not warnings()
    assert processor.clean_speech_text("say it loud") == "say it"
    assert "'loud'" in warnings()[0]


def test_control_characters_are_left_out_and_emoji_are_the_models_affair(speaking, warnings):
    _, processor = speaking
    assert processor.clean_speech_text("a\x00b\x1b\udce9c\nd") == "abc\nd"
    assert r"'\x00', '\x1b', '\udce9'" in warnings()[0]
    assert processor.clean_speech_text("It is 😀.") == "It is 😀." and len(warnings()) == 1
    for nothing in ("😀", "...", "\x00"):
        with pytest.raises(ValueError, match="no word"):
            processor.apply_speech_request(nothing)


def test_long_texts_are_sent_where_they_can_be_spoken(speaking):
    model, processor = speaking
    for text in ("a sentence and " * 6667, "x" * 10_000):  # 100,000 characters; one word
        with pytest.raises(ValueError, match="iter_speech.*mel-llm speak"):
            model.generate(**processor.apply_speech_request(text))


def test_a_model_that_writes_no_numbers(speaking):
    model, processor = copy.deepcopy(speaking[0]), speaking[1]
    with torch.no_grad():
        model.speech_head.begin.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="NaN or infinity"):
        model.generate(**processor("Yes."))  # and it ends


def test_defaults_in_a_generation_config_ask_for_nothing(speaking):
    """Pipelines of older versions of transformers write the library's `do_sample=False, temperature=1.0` into what they pass."""
    model, processor = speaking
    inputs = processor("Yes.")

    def speak(seed, **fields):
        config = GenerationConfig(**fields)
        return model.generate(**inputs, generation_config=config, max_seconds=0.3, seed=seed)

    assert torch.equal(speak(1, do_sample=False, temperature=1.0), speak(1))
    assert not torch.equal(speak(1, do_sample=False, temperature=1.0), speak(2, do_sample=False, temperature=1.0))
    assert torch.equal(speak(1, do_sample=False), speak(2, do_sample=False))  # asked for


def test_bad_arguments_are_told(speaking, tokenizer):
    model, processor = speaking
    inputs = processor("Yes.")
    nan, infinity = float("nan"), float("inf")
    for name, value in (
        ("temperature", -1), ("temperature", nan), ("temperature", infinity), ("temperature", "warm"),
        ("max_seconds", 0), ("max_seconds", nan), ("max_seconds", infinity), ("max_seconds", -1), ("max_seconds", 1e9),
        ("min_seconds", -1), ("stop_threshold", 0), ("stop_threshold", nan), ("max_new_tokens", 0), ("seed", 1.5),
        ("temprature", 0.5),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=name):
            model.generate(**inputs, **{name: value})
    with pytest.raises(ValueError, match="must not be more than"):
        model.generate(**inputs, min_seconds=2.0, max_seconds=1.0)
    model.generate(**inputs, max_seconds=0.1, seed=-1, do_sample=True)  # what stock code passes
    with pytest.raises(ValueError, match="no text to speak"):
        model.generate(torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(ValueError, match="sentence by sentence"):
        model.generate(**processor("word " * 2000))
    with pytest.raises(ValueError, match="at least 4 frames"):
        model.generate(**inputs, voice_features=torch.zeros(1, 3, 80))
    silent, _ = build_speaking(tokenizer, vocoder=False)
    with pytest.raises(ValueError, match="no vocoder"):
        silent.generate(**inputs, max_new_tokens=2)
    assert silent.generate(**inputs, **free(max_new_tokens=2)).audio is None


def test_padding_changes_neither_loss_nor_gradient(speaking, speech_clips):
    model, processor = speaking
    model = copy.deepcopy(model)
    features = [
        processor.feature_extractor(clip["array"], sampling_rate=16000, return_tensors="pt")["input_features"][0]
        for clip in speech_clips[:2]
    ]
    short = min(range(2), key=lambda i: len(features[i]))
    labels = torch.nn.utils.rnn.pad_sequence(features, batch_first=True, padding_value=-100.0)
    inputs = processor.apply_speech_request([clip["text"] for clip in speech_clips[:2]])
    both = model(**inputs, labels=labels)
    one = processor.apply_speech_request(speech_clips[short]["text"])
    alone = model(**one, labels=features[short][None])
    torch.testing.assert_close(
        alone.spectrogram[0], both.spectrogram[short, : len(features[short])], rtol=1e-4, atol=1e-4
    )
    with pytest.raises(ValueError, match="padded on the right"):
        model(**inputs, labels=torch.full_like(labels, -100.0))
    with pytest.raises(ValueError, match=r"\(batch, frames, 80\)"):
        model(**inputs, labels=labels[..., :40])


def test_the_stock_trainer_trains_it(speaking, speech_clips, tmp_path):
    model, processor = speaking
    model = copy.deepcopy(model)
    examples = []
    for clip in speech_clips[:4]:
        features = processor.feature_extractor(clip["array"], sampling_rate=16000, return_tensors="pt")
        ids = processor.apply_speech_request(clip["text"])["input_ids"][0]
        examples.append({"input_ids": ids, "labels": features["input_features"][0]})

    def collate(batch):
        return {key: batch[0][key][None] for key in batch[0]}

    arguments = TrainingArguments(
        str(tmp_path), max_steps=12, per_device_train_batch_size=1, learning_rate=3e-3, logging_steps=1,
        report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True, gradient_accumulation_steps=2,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=examples, data_collator=collate)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    assert model.speech_head.num_updates == 24  # the stock trainer tells nobody which passes were one update


def test_the_loop_is_not_limited_by_the_text_models_tokens(speaking):
    model, processor = speaking
    model = copy.deepcopy(model)
    model.speech_head.stop.bias.data.fill_(-30.0)
    r = model.config.audio_config.reduction_factor
    assert model.generation_config.max_new_tokens == 1024
    model.generation_config.max_new_tokens = 5
    inputs = processor.apply_speech_request(TEXTS[0])
    frames = model.generate(**inputs, **free(max_seconds=2.0)).spectrogram[0]
    assert len(frames) == 200
    for limit in ({"max_new_tokens": 3}, {"generation_config": GenerationConfig(max_new_tokens=3)}):
        assert len(model.generate(**inputs, **free(max_seconds=2.0), **limit).spectrogram[0]) == 3 * r


def test_several_takes_of_a_text(speaking):
    model, processor = speaking
    inputs = processor.apply_speech_request([TEXTS[0]] * 3)
    options = {"max_seconds": 0.3, "min_seconds": 0.3, "return_dict_in_generate": True}
    takes = model.generate(**inputs, **options).spectrogram
    assert not torch.equal(takes[0], takes[1]) and not torch.equal(takes[1], takes[2])
    seeded = model.generate(**inputs, **options, seed=[7, 8, 7]).spectrogram
    assert torch.equal(seeded[0], seeded[2]) and not torch.equal(seeded[0], seeded[1])
    single = processor.apply_speech_request(TEXTS[0])
    for seed, row in zip((7, 8), seeded, strict=False):
        alone = model.generate(**single, **options, seed=seed).spectrogram[0]
        torch.testing.assert_close(alone, row, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="`seed` has 2 numbers for 3 texts"):
        model.generate(**inputs, **options, seed=[1, 2])


def test_arguments_of_text_generation_are_understood_or_refused(speaking):
    model, processor = speaking
    inputs = processor.apply_speech_request(TEXTS[0])
    options = {"max_seconds": 0.3, "return_dict_in_generate": True}
    calm = [
        model.generate(**inputs, **options, **more).spectrogram[0]
        for more in ({"do_sample": False}, {"temperature": 0})
    ]
    if model.config.speech_config.history_dropout == 0:
        assert torch.equal(*calm)
    with pytest.raises(ValueError, match=r"do_sample=False.*`temperature` is 0.5"):
        model.generate(**inputs, **options, do_sample=False, temperature=0.5)
    for name, value in (("num_return_sequences", 3), ("num_beams", 2), ("top_k", 5), ("max_length", 9)):
        with pytest.raises(ValueError, match=f"does not know the arguments {name}"):
            model.generate(**inputs, **options, **{name: value})


def test_a_vocoder_for_other_features_is_refused(speaking):
    model, processor = speaking
    other = MelLLMVocoderConfig.from_feature_extractor(MelLLMFeatureExtractor.from_preset("hifigan16k"))
    with pytest.raises(ValueError, match="hop_length 256"):
        MelLLMConfig(**{**model.config.to_dict(), "vocoder_config": other})
    model = copy.deepcopy(model)
    model.vocoder = MelLLMVocoder(other)
    with pytest.raises(ValueError, match=r"`model.vocoder` is for 16000 Hz, a hop of 256"):
        model.generate(**processor.apply_speech_request(TEXTS[0]), max_seconds=0.2)


def test_a_speech_config_may_be_a_dict(tiny_folder):
    model = AutoModelForTextToWaveform.from_pretrained(tiny_folder, speech_config={"head_hidden_size": 16})
    assert model.speech_head.residual[0].out_features == 16


def test_one_checkpoint_for_both_directions(speaking, speech_clips, tmp_path, caplog):
    model, processor = speaking
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with caplog.at_level("WARNING"):
        reads = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path).eval()
        speaks = AutoModelForTextToWaveform.from_pretrained(tmp_path).eval()
    assert not [record for record in caplog.records if "speech_head" in record.getMessage()]
    assert isinstance(speaks, MelLLMForTextToSpeech)
    audio = processor(audio=speech_clips[0]["array"])
    assert torch.equal(reads.generate(**audio, max_new_tokens=5), speaks.generate(**audio, max_new_tokens=5))
    inputs = processor("Yes.")
    expected = model.generate(**inputs, **free(max_new_tokens=4)).audio[0]
    assert_same_sound(speaks.generate(**inputs, **free(max_new_tokens=4)).audio[0], expected)
    reads.save_pretrained(tmp_path / "reading")
    with pytest.raises(ValueError, match="speech_config"):
        config = mel_llm.MelLLMConfig.from_pretrained(tmp_path, speech_config=None)
        MelLLMForTextToSpeech(config)


def test_the_pipeline_speaks_in_a_fresh_process(speaking, tmp_path):
    model, processor = speaking
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    (tmp_path / "speak.py").write_text(
        "import mel_llm, numpy\nfrom transformers import pipeline\n"
        "speaker = pipeline('text-to-speech', model='model')\n"
        "output = speaker('Yes.', forward_params={'max_seconds': 0.4, 'stop_threshold': 1.0, 'seed': 1})\n"
        "assert output['sampling_rate'] == 16000 and output['audio'].shape[-1] == 40 * 160, output['audio'].shape\n"
        "assert numpy.isfinite(output['audio']).all()\nprint('spoken')\n"
    )
    result = run("speak.py", cwd=tmp_path, HF_HUB_OFFLINE="1")
    assert "spoken" in result.stdout, result.stderr
    speaker = pipeline("text-to-speech", model=str(tmp_path / "model"))
    for wrong, message in (("", "none of them empty"), ("...", "no word"), ("a word " * 15_000, "iter_speech")):
        with pytest.raises(ValueError, match=message):
            speaker(wrong)
    several = speaker(["Yes.", "No."], forward_params={"max_seconds": 0.4, "stop_threshold": 1.0})
    assert [output["audio"].shape[-1] for output in several] == [6400, 6400]


@pytest.mark.slow
def test_recordings_are_learnt_and_spoken(tmp_path):
    """The whole objective on real speech: free-running, it stays on the mel, and it stops."""
    script = str(ROOT / "scripts" / "demo_tts.py")
    result = run(script, "--output_dir", str(tmp_path), "--clips", "4", "--steps", "400", OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    for clip in figures["temperature 0"]["clips"]:
        assert clip["mel_l1"] < 0.1 and clip["stopped"]
        assert abs(clip["frames"] - clip["real_frames"]) <= max(4, 0.1 * clip["real_frames"])
    assert sorted(path.name for path in tmp_path.glob("*.wav")) == [f"{i}.wav" for i in range(4)]
