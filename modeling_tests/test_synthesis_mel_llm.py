"""Long texts: cut at sentences, spoken one after the other, in one voice."""

import time

import pytest
import torch
from test_modeling_mel_llm_speech import build_speaking

from mel_llm.synthesis_mel_llm import iter_speech, split_sentences


@pytest.fixture(scope="module")
def speaking(tokenizer):
    return build_speaking(tokenizer)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("You have reached a number. Please hang up and try your call again.", 2),
        ('He said "wait here for me, please." Then he went away for good.', 2),
        ("Yes. You have reached a number that is not in service.", 1),  # a word alone joins its neighbour
        ("今日は良い天気ですね、散歩に行きましょうか。" * 2, 2),
        ("no end at all", 1),
        ("A first paragraph without an end\n\nand here is the second one of them", 2),
    ],
)
def test_sentences(text, expected):
    sentences = split_sentences(text)
    assert len(sentences) == expected
    assert "".join("".join(sentences).split()) == "".join(text.split())  # nothing is lost, nothing is added


def test_long_texts_are_cut_where_it_hurts_least():
    text = "word " * 20_000  # 100,000 characters without an end of a sentence
    pieces = split_sentences(text)
    assert all(len(piece) <= 200 for piece in pieces) and " ".join(pieces).split() == text.split()
    clauses = split_sentences("one two three four five six seven; " * 20, max_chars=100)
    assert all(piece.endswith(";") for piece in clauses)
    assert all(len(piece) <= 50 for piece in split_sentences("x" * 1000, max_chars=50))


@pytest.mark.parametrize("text", ["", "  \n ", "... !?", "—"])
def test_nothing_to_speak(text):
    with pytest.raises(ValueError, match="no word"):
        split_sentences(text)


def test_a_text_is_spoken_sentence_by_sentence_in_one_voice(speaking, monkeypatch):
    model, processor = speaking
    voices = []
    generate = model.generate
    monkeypatch.setattr(
        model, "generate", lambda **kwargs: voices.append(kwargs.get("voice_features")) or generate(**kwargs)
    )
    text = "You have reached a number that is not in service. Please hang up and try your call again later. Good bye to you."
    options = {"seed": 5, "max_seconds": 0.4, "stop_threshold": 1e-9, "min_seconds": 0.2}
    spoken = list(iter_speech(model, processor, text, max_chars=60, **options))
    assert [sentence for sentence, _ in spoken] == split_sentences(text, 60) and len(spoken) == 3
    assert voices[0] is None and voices[1].shape == (1, 20, 80) and torch.equal(voices[1], voices[2])
    pause = round(0.15 * 16000)
    assert [len(audio) for _, audio in spoken] == [20 * 160 + pause] * 3
    again = list(iter_speech(model, processor, text, max_chars=60, **options))
    assert all(torch.equal(one[1], two[1]) for one, two in zip(spoken, again, strict=True))
    voices.clear()
    monkeypatch.setattr(model.config.speech_config, "keep_voice", False)  # a model of one voice needs none of it
    assert len(list(iter_speech(model, processor, text, max_chars=60, **options))) == 3 and voices == [None] * 3


def test_a_voice_is_kept_for_every_sentence(speaking, speech_clips, monkeypatch):
    model, processor = speaking
    voices = []
    generate = model.generate
    monkeypatch.setattr(
        model, "generate", lambda **kwargs: voices.append(kwargs["voice_features"]) or generate(**kwargs)
    )
    clip = speech_clips[0]
    text = "You have reached a number that is not in service. Please hang up and try your call again later."
    list(
        iter_speech(
            model, processor, text, voice=clip["array"], voice_text=clip["text"], max_chars=60, max_seconds=0.2
        )
    )
    assert len(voices) == 2 and torch.equal(voices[0], voices[1])


def test_the_time_for_splitting_grows_as_the_text_does():
    def seconds(size):
        started = time.perf_counter()
        assert len(split_sentences("x" * size)) == size // 200
        return time.perf_counter() - started

    seconds(20_000)
    assert seconds(2_000_000) < 400 * max(
        seconds(20_000), 1e-4
    )  # a hundred times the text; its square is 10,000 times


class Streamer:
    def __init__(self):
        self.parts, self.ended = [], 0

    def put(self, samples):
        assert not self.ended
        self.parts.append(samples)

    def end(self):
        self.ended += 1


def test_a_stream_has_all_sentences_and_pauses(speaking):
    model, processor = speaking
    text = "You have reached a number that is not in service. Please hang up and try your call again later."
    options = {"seed": 5, "max_seconds": 3.0, "max_chars": 60, "stop_threshold": 1.0}
    streamer, outputs, early = Streamer(), [], []
    streamed = []
    for sentence, audio in iter_speech(
        model, processor, text, streamer=streamer, on_sentence=lambda *pair: outputs.append(pair), **options
    ):
        streamed.append((sentence, audio))
        early.append(len(streamer.parts))
    assert streamer.ended == 1 and early[0] > 3
    assert torch.equal(torch.cat(streamer.parts), torch.cat([audio for _, audio in streamed]))
    plain = list(iter_speech(model, processor, text, **options))
    for (_, one), (_, two) in zip(streamed, plain, strict=True):
        assert one.shape == two.shape and (one - two).abs().max() < 1e-3 * two.abs().max()
    assert [sentence for sentence, _ in outputs] == [sentence for sentence, _ in plain]
    assert [output.stopped for _, output in outputs] == [[False], [False]]
    assert outputs[0][1].spectrogram[0].shape[0] * 160 + 2400 == len(plain[0][1])


def test_pieces_fit_the_language_model(tokenizer, speech_clips):
    """200 letters of four bytes each are more tokens than this model has positions for."""
    model, processor = build_speaking(tokenizer, text={"max_position_embeddings": 256})
    text = "𝒶𝒷𝒸" * 60
    pieces = [sentence for sentence, _ in iter_speech(model, processor, text, max_seconds=0.1)]
    assert "".join(pieces) == text and len(pieces) > 3
    clip = max(speech_clips, key=lambda clip: clip["duration"])
    with pytest.raises(ValueError, match="no room for a sentence"):
        iter_speech(model, processor, "Yes.", voice=clip["array"], voice_text=clip["text"] * 4)


def test_what_cannot_be_spoken_is_named_once(speaking, caplog, monkeypatch):
    from transformers.utils import logging

    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)
    model, processor = speaking
    text = "Please hang \x00 up and try your call again. It is \x07 no use, they said to us."
    with caplog.at_level("WARNING", logger="mel_llm"):
        spoken = [sentence for sentence, _ in iter_speech(model, processor, text, max_seconds=0.1, max_chars=45)]
    named = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert len(named) == 1 and r"'\x00', '\x07'" in named[0]
    assert spoken == ["Please hang up and try your call again.", "It is no use, they said to us."]


def test_errors_come_before_work(speaking, tokenizer, speech_clips):
    model, processor = speaking
    for wrong in (None, 5, b"Yes.", ["Yes."]):
        with pytest.raises(ValueError, match="`text` must be a string"):
            iter_speech(model, processor, wrong)
    for name, value in (
        ("temperature", float("nan")), ("temperature", -1), ("max_seconds", float("inf")), ("seed", 0.5),
        ("max_seconds", "long"), ("stop_threshold", float("nan")), ("max_new_tokens", 0),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=name):
            iter_speech(model, processor, "Yes.", **{name: value})
    with pytest.raises(ValueError, match="go together"):
        iter_speech(model, processor, "Yes.", voice=speech_clips[0]["array"])
    with pytest.raises(FileNotFoundError):
        iter_speech(model, processor, "Yes.", voice="gone.wav", voice_text="x")
    with pytest.raises(ValueError, match="no word"):
        iter_speech(model, processor, "...")
    with pytest.raises(ValueError, match="max_chars"):
        iter_speech(model, processor, "Yes.", max_chars=5)
    silent, _ = build_speaking(tokenizer, vocoder=False)
    with pytest.raises(ValueError, match="no vocoder"):
        iter_speech(silent, processor, "Yes.")
