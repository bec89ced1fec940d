"""Long texts: cut at sentences, spoken one after the other, in one voice."""

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


def test_errors_come_before_work(speaking, tokenizer):
    model, processor = speaking
    with pytest.raises(ValueError, match="no word"):
        iter_speech(model, processor, "...")
    with pytest.raises(ValueError, match="max_chars"):
        iter_speech(model, processor, "Yes.", max_chars=5)
    silent, _ = build_speaking(tokenizer, vocoder=False)
    with pytest.raises(ValueError, match="no vocoder"):
        iter_speech(silent, processor, "Yes.")
