"""Going on with a prompt: what is generated is what training sees, alone and in batches, in text and in speech."""

import copy
import json

import numpy as np
import pytest
import torch
from conftest import load_script
from test_modeling_mel_llm_continuation import CONFORMER, build_continuing
from transformers import GenerationConfig
from transformers.utils import logging


@pytest.fixture(scope="module")
def continuing(tokenizer):
    return build_continuing(tokenizer, vocoder=True)


@pytest.fixture
def warnings(caplog):
    logger = logging.get_logger("mel_llm")
    logger.propagate, before = True, logger.propagate
    logging.get_logger("mel_llm.continuation_generation_mel_llm").warning_once.cache_clear()
    yield caplog
    logger.propagate = before


def prompts(number: int = 3) -> dict:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3, 40, 80, generator=generator) * 3 + 12
    mask = torch.ones(3, 40, dtype=torch.long)
    mask[1, 22:] = 0
    return {"input_features": features[:number], "input_features_mask": mask[:number]}


def one(inputs: dict, row: int) -> dict:
    frames = int(inputs["input_features_mask"][row].sum())
    return {"input_features": inputs["input_features"][row : row + 1, :frames]}


def free(**more) -> dict:
    """Arguments with which speech goes on to the limit."""
    return {"stop_threshold": 1.0, "seed": 3, "max_new_tokens": 12, "max_seconds": 0.1, "temperature": 0.0, **more}


def ending_at_different_places(model, inputs: dict):
    """The model with one more end of text: a token that it writes early in one row and late or never in another."""
    model = copy.deepcopy(model)
    rows = model.generate(**inputs, **free(return_text_only=True)).sequences.tolist()
    places = {token: [row.index(token) if token in row else len(row) for row in rows] for row in rows for token in row}
    end = max(places, key=lambda token: (len(set(places[token])), -min(places[token])))
    assert len(set(places[end])) > 1, "the random model writes the same text in every row"
    model.generation_config.eos_token_id = [2, end]
    return model


def assert_teacher_forced(model, inputs: dict, output, skip_text: bool = False) -> None:
    """Text and speech are what the model says of them when it is given them."""
    for row, (spectrogram, tokens) in enumerate(zip(output.spectrogram, output.sequences, strict=True)):
        labels = torch.full((1, 1), -100) if skip_text else tokens[tokens != model.config.pad_token_id][None]
        forced = model(**one(inputs, row), labels=labels, spectrogram_labels=spectrogram[None])
        torch.testing.assert_close(forced.spectrogram[0], model.normalize(spectrogram), rtol=1e-4, atol=1e-4)
        if not skip_text:
            assert torch.equal(forced.logits[0].argmax(-1), labels[0])


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "mistral"])
@pytest.mark.parametrize("form", ["spectron", "conformer", "ours", "bidirectional"])
def test_generation_is_teacher_forcing(tokenizer, family, form):
    """With one cache for both; rows end their text at different places, and a window of 16 tokens slides over it."""
    audio = {"conformer": CONFORMER, "bidirectional": {"bidirectional_attention": True}}.get(form, {})
    speech = {"postnet_layers": 0} if form == "ours" else {}
    text = {"tie_word_embeddings": False}  # Gemma's random weights would repeat the last token for ever
    model, _ = build_continuing(
        tokenizer, family, "small" if form == "ours" else "spectron", audio, text=text, **speech
    )
    inputs = prompts()
    model = ending_at_different_places(model, inputs)
    output = model.generate(**inputs, **free())
    lengths = (output.sequences != model.config.pad_token_id).sum(-1)
    assert len(set(lengths.tolist())) > 1
    assert_teacher_forced(model, inputs, output)
    assert_teacher_forced(model, inputs, model.generate(**inputs, **free(skip_text=True)), skip_text=True)


def test_one_cache_for_text_and_speech(continuing, monkeypatch):
    """What was read is not read again: behind the text, the language model gets its end and "begin" alone."""
    model, _ = continuing
    seen = []
    run = model.model.language_model.forward
    monkeypatch.setattr(
        model.model.language_model,
        "forward",
        lambda *args, **kwargs: seen.append(kwargs["inputs_embeds"].shape[1]) or run(*args, **kwargs),
    )
    output = model.generate(**prompts(1), **free())
    assert seen[0] > 10 and set(seen[1:12]) == {1}
    assert seen[12] == 3  # the last token of a text that was cut off, its end, "begin"
    assert set(seen[13:]) == {1} and len(seen) == 13 + len(output.spectrogram[0]) - 1


@pytest.mark.parametrize("options", [{}, {"skip_text": True}, {"do_sample": True, "temperature": 0.9, "top_p": 0.9}])
@pytest.mark.parametrize("preset", ["spectron", "small"])
def test_a_prompt_goes_on_the_same_in_any_batch(tokenizer, options, preset):
    model, _ = build_continuing(tokenizer, preset=preset, vocoder=True, history_dropout=0.2)
    model = ending_at_different_places(model, prompts())
    together = model.generate(**prompts(), **free(**options))
    for row in range(3):
        alone = model.generate(**one(prompts(), row), **free(**options))
        tokens = alone.sequences.shape[1]
        assert torch.equal(alone.sequences[0], together.sequences[row, :tokens])
        assert (together.sequences[row, tokens:] == model.config.pad_token_id).all()
        torch.testing.assert_close(alone.spectrogram[0], together.spectrogram[row], rtol=1e-3, atol=1e-2)
        assert alone.audio[0].shape == together.audio[row].shape == (len(alone.spectrogram[0]) * 160,)


def test_drawn_text(continuing):
    model, _ = continuing
    greedy = model.generate(**prompts(), **free(return_text_only=True)).sequences
    options = {"return_text_only": True, "temperature": 1.0, "do_sample": True}
    drawn = model.generate(**prompts(), **free(**options)).sequences
    assert not torch.equal(drawn, greedy)
    assert torch.equal(model.generate(**prompts(), **free(**options)).sequences, drawn)
    assert not torch.equal(model.generate(**prompts(), **free(**{**options, "seed": 4})).sequences, drawn)
    assert torch.equal(model.generate(**prompts(), **free(**options, top_k=1)).sequences, greedy)
    assert torch.equal(model.generate(**prompts(), **free(**options, text_temperature=0.0)).sequences, greedy)
    config = GenerationConfig(do_sample=True, max_new_tokens=3)
    assert model.generate(**prompts(), generation_config=config, return_text_only=True).sequences.shape[1] <= 3
    # the frequencies are the probabilities
    row = {name: value[:1].expand(400, *value.shape[1:]) for name, value in prompts(1).items()}
    first = model.generate(**row, max_new_tokens=1, do_sample=True, return_text_only=True, seed=list(range(400)))
    ids, mask = model._build_prompt(prompts(1)["input_features"], None, model._prompt_of("continuation"))
    scores = super(type(model), model).forward(
        input_ids=ids, attention_mask=mask, input_features=prompts(1)["input_features"]
    )
    likeliest = scores.logits[0, -1].softmax(-1).max(-1)
    share = (first.sequences[:, 0] == likeliest.indices).float().mean().item()
    assert share == pytest.approx(likeliest.values.item(), abs=4 * 0.5 / 20)


def test_a_loop_in_the_text_is_cut_and_not_spoken_of(continuing, monkeypatch):
    """A text that repeats itself ends, and the speech is that of the text without the loop."""
    model, _ = continuing
    scores = model._output_logits
    monkeypatch.setattr(
        model, "_output_logits", lambda states: scores(states) + 1e4 * torch.eye(model.config.vocab_size)[7]
    )
    output = model.generate(**prompts(), **free(max_new_tokens=400))
    assert output.sequences.shape[1] < 100
    assert [row[row != model.config.pad_token_id].tolist() for row in output.sequences] == [[7]] * 3
    for row, spectrogram in enumerate(output.spectrogram):
        forced = model(**one(prompts(), row), labels=torch.tensor([[7]]), spectrogram_labels=spectrogram[None])
        torch.testing.assert_close(forced.spectrogram[0], model.normalize(spectrogram), rtol=1e-4, atol=1e-4)


def test_transcript_and_continuation_are_told_apart(continuing, monkeypatch):
    model, processor = continuing
    written = [
        processor.continuation_text_ids("what is it", "it is nothing"),
        processor.continuation_text_ids("what is it"),
        processor.continuation_text_ids("what is it", "two lines\nof it"),
    ]
    steps = [torch.tensor([*ids, 2, *[2] * 40]) for ids in written]
    count = iter(range(10_000))
    scores = model._output_logits

    def recite(states):
        step = next(count)
        wanted = torch.stack([row[step] for row in steps])
        return scores(states) + 1e4 * torch.nn.functional.one_hot(wanted, model.config.vocab_size)[:, None]

    monkeypatch.setattr(model, "_output_logits", recite)
    output = model.generate(**prompts(), **free(max_new_tokens=40))
    rows = processor.decode_continuation(output)
    assert rows[0] == {
        "text": "what is it\nit is nothing",
        "transcript": "what is it",
        "continuation": "it is nothing",
    }
    assert rows[1] == {"text": "what is it", "transcript": None, "continuation": None}
    assert rows[2]["transcript"] == "what is it" and rows[2]["continuation"] == "two lines\nof it"
    monkeypatch.setattr(model, "_output_logits", scores)
    assert_teacher_forced_speech(model, prompts(), output, written)


def assert_teacher_forced_speech(model, inputs, output, written) -> None:
    for row, spectrogram in enumerate(output.spectrogram):
        labels = torch.tensor([written[row]])
        forced = model(**one(inputs, row), labels=labels, spectrogram_labels=spectrogram[None])
        torch.testing.assert_close(forced.spectrogram[0], model.normalize(spectrogram), rtol=1e-4, atol=1e-4)


# --- options ------------------------------------------------------------------------------------------------------------


def test_what_is_left_out(continuing):
    model, processor = continuing
    text = model.generate(**prompts(), **free(return_text_only=True))
    assert text.audio is text.spectrogram is text.stopped is None and text.sequences.shape == (3, 12)
    speech = model.generate(**prompts(), **free(skip_text=True))
    assert speech.sequences.shape == (3, 0) and len(speech.audio) == 3
    assert processor.decode_continuation(speech)[0] == {"text": "", "transcript": None, "continuation": None}
    both = model.generate(**prompts(), **free())
    assert torch.equal(both.sequences, text.sequences)
    assert not torch.allclose(both.spectrogram[0], speech.spectrogram[0])
    answer = model.generate(**prompts(), **free(task="qa"))
    assert not torch.equal(answer.sequences, both.sequences)
    for streamed in (both, answer):
        assert [audio.shape for audio in streamed.audio] == [(1600,)] * 3


def test_limits_and_the_stop(continuing):
    model, _ = continuing
    inputs = prompts()
    output = model.generate(**inputs, max_new_tokens=6, stop_threshold=1.0)
    # 2 seconds, and one and a half tokens a second
    assert [len(rows) for rows in output.spectrogram] == [600] * 3 and output.stopped == [False] * 3
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.speech_head.stop.bias.fill_(50.0)
    output = model.generate(**inputs, max_new_tokens=6)
    assert [len(rows) for rows in output.spectrogram] == [1] * 3 and output.stopped == [True] * 3
    output = model.generate(**inputs, max_new_tokens=6, min_seconds=0.05, max_seconds=1)
    assert [len(rows) for rows in output.spectrogram] == [5] * 3


class Streamer:
    def __init__(self):
        self.pieces, self.ended = [], 0

    def put(self, value):
        assert not self.ended
        self.pieces.append(value)

    def end(self):
        self.ended += 1


def test_text_is_streamed_and_then_audio(continuing):
    model, _ = continuing
    text, sound, order = Streamer(), Streamer(), []
    text.put = lambda value, put=text.put: order.append("text") or put(value)
    sound.put = lambda value, put=sound.put: order.append("sound") or put(value)
    options = free(max_seconds=0.5)
    expected = model.generate(**prompts(1), **options)
    output = model.generate(**prompts(1), **options, text_streamer=text, streamer=sound)
    assert torch.cat([piece.flatten() for piece in text.pieces[1:]]).tolist() == expected.sequences[0].tolist()
    assert (text.ended, sound.ended) == (1, 1) and len(sound.pieces) > 1
    assert order == sorted(order, reverse=True)
    heard = torch.cat(sound.pieces)
    assert heard.shape == expected.audio[0].shape
    assert (heard - expected.audio[0]).abs().max() < 1e-3 * expected.audio[0].abs().max()
    torch.testing.assert_close(output.spectrogram[0], expected.spectrogram[0], rtol=1e-4, atol=1e-3)
    with pytest.raises(ValueError, match="one row at a time, got a batch of 3"):
        model.generate(**prompts(), streamer=Streamer())


def test_without_a_vocoder_there_is_a_spectrogram(tokenizer):
    model, _ = build_continuing(tokenizer)
    output = model.generate(**prompts(1), **free())
    assert output.audio is None and output.spectrogram[0].shape == (10, 80)


def test_a_prompt_of_ones_own(continuing):
    model, _ = continuing
    inputs = prompts()
    expected = model.generate(**inputs, **free())
    ids, mask = model._build_prompt(*inputs.values(), model._prompt_of("continuation"))
    output = model.generate(input_ids=ids, attention_mask=mask, **inputs, **free())
    assert torch.equal(output.sequences, expected.sequences)
    torch.testing.assert_close(output.spectrogram[1], expected.spectrogram[1], rtol=1e-4, atol=1e-3)
    named = model.generate(inputs["input_features"], attention_mask=inputs["input_features_mask"], **free())
    assert torch.equal(named.sequences, expected.sequences)


# --- prompts that are none ----------------------------------------------------------------------------------------------


def test_a_silent_prompt_has_no_text_and_no_speech(continuing, warnings, speech_clips):
    model, processor = continuing
    speech = speech_clips[0]["array"]
    inputs = processor(audio=[np.zeros(16000, np.float32), speech, np.zeros(8000, np.float32)])
    output = model.generate(**inputs, **free())
    assert "2 of 3 prompts are silent" in warnings.text
    rows = processor.decode_continuation(output)
    assert rows[0] == rows[2] == {"text": "", "transcript": None, "continuation": None} and rows[1]["text"]
    assert [audio.shape[0] for audio in output.audio] == [0, 1600, 0] and output.stopped == [True, False, True]
    alone = model.generate(**processor(audio=speech), **free())
    tokens = alone.sequences.shape[1]
    assert torch.equal(output.sequences[1, :tokens], alone.sequences[0])
    torch.testing.assert_close(output.spectrogram[1], alone.spectrogram[0], rtol=1e-4, atol=1e-2)
    text, sound = Streamer(), Streamer()
    nothing = model.generate(**processor(audio=np.zeros(16000)), **free(), streamer=sound, text_streamer=text)
    assert (
        nothing.audio[0].shape == (0,) and nothing.spectrogram[0].shape == (0, 80) and text.ended == sound.ended == 1
    )
    assert model.generate(**processor(audio=np.zeros(16000)), **free(return_text_only=True)).audio is None


def test_a_prompt_that_is_too_short_or_too_long(continuing, warnings):
    model, _ = continuing
    with pytest.raises(ValueError, match=r"row 1 has 0.020 s of audio, less than one audio token \(0.040 s\)"):
        mask = torch.ones(2, 10, dtype=torch.long)
        mask[1, 2:] = 0
        model.generate(torch.randn(2, 10, 80) + 12, attention_mask=mask)
    model = copy.deepcopy(model)
    model.config.audio_config.max_audio_seconds = 1.0
    long = torch.randn(1, 150, 80) * 3 + 12
    assert len(model.generate(long, **free()).audio) == 1
    assert "A prompt has 1.5 s, but the model was trained on at most 1 s" in warnings.text
    model.config.text_config.max_position_embeddings = 40
    with pytest.raises(ValueError, match="The prompt has .* tokens, but the language model was made for 40"):
        model.generate(long, **free())


def test_there_is_room_for_speech_behind_a_long_text(continuing):
    model, _ = continuing
    model = copy.deepcopy(model)
    ids, _ = model._build_prompt(prompts(1)["input_features"], None, model._prompt_of("continuation"))
    model.config.text_config.max_position_embeddings = ids.shape[1] + 20
    output = model.generate(**prompts(1), stop_threshold=1.0, max_new_tokens=400)
    used = ids.shape[1] + output.sequences.shape[1] + 2 + len(output.spectrogram[0]) - 1
    assert len(output.spectrogram[0]) >= 1 and used <= ids.shape[1] + 20


@pytest.mark.parametrize(
    "options, message",
    [
        ({"task": "sing"}, "`task` must be one of 'continuation', 'qa', got 'sing'"),
        ({"return_text_only": True, "skip_text": True}, "leave nothing to be written"),
        ({"num_beams": 4}, "does not know the arguments num_beams"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be a whole number of at least 1"),
        ({"top_p": 1.5}, "`top_p` must be a number from 0 to 1"),
        ({"max_seconds": -1.0}, "`max_seconds` must be more than 0"),
        ({"seed": [1, 2]}, "`seed` has 2 numbers for 3 texts"),
        (
            {"attention_mask": torch.ones(3, 7), "input_ids": torch.ones(3, 9, dtype=torch.long)},
            "shape of `input_ids`",
        ),
    ],
)
def test_bad_arguments_are_told(continuing, options, message):
    model, _ = continuing
    with pytest.raises(ValueError, match=message):
        model.generate(**{**prompts(), **options})


def test_a_task_needs_a_recording(continuing):
    model, processor = continuing
    with pytest.raises(ValueError, match="needs `input_features`"):
        model.generate(**processor.apply_speech_request("Yes."), task="qa")


def test_weights_without_numbers(continuing):
    model, _ = continuing
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.speech_head.latent.bias.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="NaN or infinity"):
        model.generate(**prompts(1), **free())


# --- the whole ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("form, clips, steps, furthest", [("spectron", 2, 240, 0.15), ("ours", 2, 320, 0.25)])
def test_recordings_are_learnt_and_gone_on_with(tmp_path, form, clips, steps, furthest):
    """The joint objective on real speech: from the beginning of a recording the right words, and free-running the mel that
    followed (mean error in deviations), with its end; also without the words in between, if less well."""
    demo = load_script("demo_continuation")
    sizes = ("--clips", str(clips), "--steps", str(steps))
    demo.main(["--output_dir", str(tmp_path), "--form", form, *sizes, "--plot"])
    figures = json.loads((tmp_path / "figures.json").read_text())
    for clip in figures["text, then speech"]["clips"]:
        assert clip["written"] == clip["said"]
        assert clip["mel_l1"] < furthest and clip["stopped"]
        assert abs(clip["frames"] - clip["real_frames"]) <= 0.15 * clip["real_frames"]
    for clip in figures["speech alone"]["clips"]:
        assert clip["written"] == "" and clip["mel_l1"] < 0.6  # of another recording it is 0.75 to 1.1
    assert len(list(tmp_path.glob("*.wav"))) == clips and (tmp_path / "continuation.png").stat().st_size > 10_000
