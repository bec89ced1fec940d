"""The processor: placeholders, prompts, labels, padding, outputs."""

import base64
import io

import numpy as np
import pytest
import soundfile
import torch
from conftest import build_tiny
from tokenizers.processors import TemplateProcessing
from transformers import AutoProcessor, BatchFeature

from mel_llm import MelLLMProcessor
from mel_llm.training import train_tokenizer


CHATML = """\
{%- if messages[0].role != 'system' -%}{{- '<|im_start|>system\\nBe brief.<|im_end|>\\n' -}}{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


@pytest.fixture
def chat(speech_clips):
    """A tiny model behind a tokenizer with a chat template, as instruction-tuned backbones have."""
    tokenizer = train_tokenizer([clip["text"] for clip in speech_clips], vocab_size=300)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = CHATML
    return build_tiny(tokenizer)


# --- what a call returns ------------------------------------------------------------------------------------------------


def test_audio_alone(tiny, speech_clips):
    _, processor = tiny
    array = speech_clips[0]["array"]
    by_position = processor(array, sampling_rate=16000, return_tensors="pt")
    assert set(by_position) == {"input_features", "attention_mask"}
    by_name = processor(audio=speech_clips[0]["path"])
    torch.testing.assert_close(by_name["input_features"], by_position["input_features"])
    batch = processor([clip["array"] for clip in speech_clips[:3]])
    assert batch["input_features"].shape[0] == batch["attention_mask"].shape[0] == 3


def test_text_alone(tiny):
    _, processor = tiny
    # the text-to-speech pipeline passes text in first place, and casts what it gets
    for call in (lambda: processor(["Hello."]), lambda: processor("Hello."), lambda: processor(text="Hello.")):
        batch = call()
        assert isinstance(batch, BatchFeature) and set(batch) == {"input_ids", "attention_mask"}
        assert batch.to(dtype=torch.bfloat16)["input_ids"].dtype == torch.long
    assert processor.tokenizer.decode(batch["input_ids"][0]) == "Hello."


def test_placeholders_are_exact(tiny, speech_clips):
    model, processor = tiny
    arrays = [clip["array"] for clip in speech_clips[:3]]
    token = processor.audio_token
    batch = processor(text=[f"A {token} b", f"{token} and {token}"], audio=arrays)
    assert set(batch) == {"input_ids", "attention_mask", "input_features", "input_features_mask"}
    counts = [-(-processor.feature_extractor.num_frames(len(array)) // 4) for array in arrays]
    places = (batch["input_ids"] == processor.audio_token_id).sum(-1).tolist()
    assert places == [counts[0], counts[1] + counts[2]]
    assert batch["input_features_mask"].sum(-1).tolist() == [
        processor.feature_extractor.num_frames(len(array)) for array in arrays
    ]
    nested = processor(text=[f"A {token} b", f"{token} and {token}"], audio=[arrays[:1], arrays[1:]])
    assert torch.equal(nested["input_ids"], batch["input_ids"])
    model(**batch)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_texts_padding_side_never_reaches_the_audio(tiny, speech_clips, side):
    _, processor = tiny
    arrays = [clip["array"] for clip in speech_clips[:3]]
    processor.tokenizer.padding_side = side
    expected = processor(audio=arrays)
    for kwargs in ({}, {"padding_side": side}, {"text_kwargs": {"padding_side": side}}):
        batch = processor(text=[processor.audio_token + " b" * i for i in range(3)], audio=arrays, **kwargs)
        assert torch.equal(batch["input_features"], expected["input_features"])
        assert torch.equal(batch["input_features_mask"], expected["attention_mask"])
        assert (batch["input_features_mask"][:, 0] == 1).all()


def test_text_is_padded_left_for_generation(tiny):
    _, processor = tiny
    mask = processor(text=["a", "a longer one"])["attention_mask"]
    assert mask[0, 0] == 0 and mask[0, -1] == 1
    mask = processor(text=["a", "a longer one"], padding_side="right")["attention_mask"]
    assert mask[0, 0] == 1 and mask[0, -1] == 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p, a: p(), ValueError, "audio"),
        (lambda p, a: p(text=f"{p.audio_token}{p.audio_token}", audio=[a]), ValueError, "2 places .* 1 clips"),
        (lambda p, a: p(text="no place", audio=[a]), ValueError, "0 places .* 1 clips"),
        (lambda p, a: p(text=f"{p.audio_token}"), ValueError, "1 places .* 0 clips"),
        (lambda p, a: p(text=7), ValueError, "text"),
        (lambda p, a: p(a, sampling_rate=8000), ValueError, "8000 Hz"),
        (lambda p, a: p(audio=[]), ValueError, "empty"),
        (lambda p, a: p(audio=np.zeros(0)), ValueError, "raw_speech|empty"),
        (lambda p, a: p(audio="no_such_file.wav"), (ValueError, FileNotFoundError), "no_such_file.wav"),
        (lambda p, a: p(audio=[a], output_labels=True), ValueError, "response"),
        (lambda p, a: p(audio=[a], response="x"), ValueError, "text"),
        (lambda p, a: p(a, "text", "more"), TypeError, "two positional"),
        (lambda p, a: p(a, a), TypeError, "twice"),
        (lambda p, a: p(text=f"{p.audio_token}", audio=[a], return_tensors="np"), ValueError, "return_tensors"),
        (lambda p, a: p.apply_transcription_request([a], language="xx"), ValueError, "language"),
        (lambda p, a: p.apply_transcription_request([a], prompt=["a", "b"]), ValueError, "2 entries for 1"),
        (lambda p, a: p.apply_transcription_request([]), ValueError, "empty"),
        (lambda p, a: p.decode([1], return_format="json"), ValueError, "return_format"),
    ],
)
def test_bad_calls_say_what_is_wrong(tiny, speech_clips, call, error, message):
    with pytest.raises(error, match=message):
        call(tiny[1], speech_clips[0]["array"])


def test_bad_construction(tiny):
    _, processor = tiny
    with pytest.raises(ValueError, match="audio_token"):
        MelLLMProcessor(processor.feature_extractor, processor.tokenizer, audio_token="<|no_such_token|>")
    with pytest.raises(ValueError, match="reduction_factor"):
        MelLLMProcessor(processor.feature_extractor, processor.tokenizer, reduction_factor=0)


def test_every_form_of_audio_gives_the_same_features(tiny, speech_clips, tmp_path):
    _, processor = tiny
    clip = speech_clips[0]
    raw = open(clip["path"], "rb").read()
    buffer = io.BytesIO()
    soundfile.write(buffer, clip["array"], 16000, format="WAV", subtype="FLOAT")
    expected = processor(clip["array"])["input_features"]
    forms = [
        clip["array"].astype(np.float64),
        torch.tensor(clip["array"]),
        clip["array"].tolist(),
        np.stack([clip["array"]] * 2),
        [clip["array"]],
        raw,
        {"array": clip["array"], "sampling_rate": 16000},
        {"bytes": raw, "path": None},
        {"bytes": None, "path": clip["path"]},
        (clip["array"], 16000),
        (clip["array"], np.int64(16000)),
        "data:audio/wav;base64," + base64.b64encode(buffer.getvalue()).decode(),
    ]
    for form in forms:
        torch.testing.assert_close(processor(audio=form)["input_features"], expected, rtol=1e-4, atol=1e-4)


# --- prompts ------------------------------------------------------------------------------------------------------------


def test_a_backbone_without_a_template(tiny, speech_clips):
    model, processor = tiny
    text = processor.apply_transcription_request(speech_clips[0]["array"], tokenize=False)
    assert text == [f"{processor.audio_token}Write it.\n"]
    prefix, suffix = processor.default_prompt_ids()
    assert (model.config.prompt_prefix_ids, model.config.prompt_suffix_ids) == (prefix, suffix)
    assert processor.tokenizer.decode(suffix) == "Write it.\n"
    assert model.config.response_eos_token_id == processor.tokenizer.eos_token_id


def test_a_backbone_with_a_template(chat, speech_clips):
    model, processor = chat
    text = processor.apply_transcription_request(speech_clips[0]["array"], tokenize=False)[0]
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        f"<|im_start|>user\n{processor.audio_token}Write it.<|im_end|>\n<|im_start|>assistant\n"
    )
    im_end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert model.config.response_eos_token_id == im_end
    assert im_end in model.config.eos_token_id  # a transcript that ends so must end generation too
    assert im_end in model.generation_config.eos_token_id


@pytest.mark.parametrize("post", ["$A <|eos|>", "<|bos|> $A", "<|bos|> $A <|eos|>"])
@pytest.mark.parametrize("template_has_bos", [False, True])
def test_tokenizers_that_open_and_close_every_text(speech_clips, post, template_has_bos):
    """Llama's opens every text, and so do the templates of some; a few close it too. A prompt is opened once, and not
    closed, whichever way it is made."""
    tokenizer = train_tokenizer([clip["text"] for clip in speech_clips], vocab_size=300)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=post, special_tokens=[("<|bos|>", 1), ("<|eos|>", 2)]
    )
    if template_has_bos:
        tokenizer.chat_template = "{{- bos_token -}}" + CHATML.replace("<|im_start|>", "<s>").replace(
            "<|im_end|>", "</s>"
        )
    model, processor = build_tiny(tokenizer)
    array = speech_clips[0]["array"]
    audio = processor(audio=array)
    built, _ = model._build_prompt(audio["input_features"], audio["attention_mask"])
    rendered = processor.apply_transcription_request(array, tokenize=False)[0]
    for prompt in (
        processor.apply_transcription_request(array)["input_ids"],
        processor(text=rendered, audio=array)["input_ids"],
        processor(text=rendered, audio=array, response="x")["input_ids"][:, : built.shape[1]],
    ):
        assert torch.equal(prompt, built)
    opened = "<|bos|>" in post or template_has_bos
    assert (built == 1).sum() == int(opened) and not (built == 2).any()


def test_token_type_ids_are_left_out(tiny, speech_clips):
    model, processor = tiny
    processor.tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    try:
        for batch in (processor("a"), processor.apply_transcription_request(speech_clips[0]["array"])):
            assert "token_type_ids" not in batch
            model.generate(**batch, max_new_tokens=2)
    finally:
        processor.tokenizer.model_input_names = ["input_ids", "attention_mask"]


def test_languages(tiny):
    _, processor = tiny
    for given, written in {
        "en": "English", "EN": "English", "en-US": "English", "zh_CN": "Chinese", "french": "French", "Lao": "Lao",
        "Brazilian Portuguese": "Brazilian Portuguese",
    }.items():  # fmt: skip
        text = processor.apply_transcription_request([None], language=given, tokenize=False)[0]
        assert f"The language is {written}." in text


def test_language_and_prompt_reach_the_text(tiny, speech_clips):
    _, processor = tiny
    arrays = [clip["array"] for clip in speech_clips[:2]]
    texts = processor.apply_transcription_request(
        arrays, language=["en", "French"], prompt=["Names: Ada, Grace.", None], tokenize=False
    )
    assert texts[0].endswith("Write it. The language is English. Names: Ada, Grace.\n")
    assert texts[1].endswith("Write it. The language is French.\n")
    batch = processor.apply_transcription_request(arrays, language="en")
    assert set(batch) == {"input_ids", "attention_mask", "input_features", "input_features_mask"}


def test_conversations_in_every_form(chat, speech_clips):
    model, processor = chat
    clip, other = speech_clips[:2]
    raw = open(clip["path"], "rb").read()
    parts = [
        {"type": "audio", "path": clip["path"]},
        {"type": "audio", "audio": clip["array"]},
        {"type": "audio", "audio": clip["array"], "sampling_rate": 16000},
        {"type": "audio", "url": clip["path"]},
        {"type": "input_audio", "input_audio": {"data": base64.b64encode(raw).decode(), "format": "flac"}},
        {"type": "audio_url", "audio_url": {"url": "data:audio/flac;base64," + base64.b64encode(raw).decode()}},
    ]
    expected = None
    for part in parts:
        conversation = [
            {"role": "system", "content": "You hear well."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "First:"}, part, {"type": "audio", "path": other["path"]}],
            },
        ]
        batch = processor.apply_chat_template(
            conversation, tokenize=True, return_dict=True, add_generation_prompt=True
        )
        if expected is None:
            expected = batch
            model(**batch)
        assert torch.equal(batch["input_ids"], expected["input_ids"])
        torch.testing.assert_close(batch["input_features"], expected["input_features"], rtol=1e-4, atol=1e-4)
        assert conversation[1]["content"][1] is part and len(conversation[1]["content"]) == 3  # left as it was
    with pytest.raises(ValueError, match="image"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "image", "url": "x.png"}]}])
    with pytest.raises(ValueError, match="no audio"):
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "audio"}]}], tokenize=True, return_dict=True
        )


# --- labels -------------------------------------------------------------------------------------------------------------


def labelled_text(processor, batch) -> list[str]:
    return [processor.tokenizer.decode(row[row != -100]) for row in batch["labels"]]


def test_labels_hold_the_answers_and_nothing_else(chat, tiny, speech_clips):
    for (_, processor), end in ((chat, "<|im_end|>"), (tiny, "<|eos|>")):
        conversations = [
            [*processor._request(clip["array"], None, None), {"role": "assistant", "content": clip["text"]}]
            for clip in speech_clips[:3]
        ]
        batch = processor.apply_chat_template(conversations, output_labels=True)
        assert labelled_text(processor, batch) == [clip["text"] + end for clip in speech_clips[:3]]
        assert batch["attention_mask"][:, 0].all()  # padded on the right for training
        counted = batch["labels"] != -100
        assert torch.equal(batch["labels"][counted], batch["input_ids"][counted])
        # the prompt in training has the very tokens of the prompt in generation
        request = processor.apply_transcription_request(speech_clips[0]["array"])["input_ids"][0]
        assert torch.equal(batch["input_ids"][0, : len(request)], request)


def test_labels_of_several_turns(chat, speech_clips):
    _, processor = chat
    conversation = [
        *processor._request(speech_clips[0]["array"], None, None),
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "And again?"},
        {"role": "assistant", "content": "two"},
    ]
    batch = processor.apply_chat_template(conversation, output_labels=True)
    assert labelled_text(processor, batch) == ["one<|im_end|>two<|im_end|>"]
    with pytest.raises(ValueError, match="assistant"):
        processor.apply_chat_template(conversation[:1], output_labels=True)


def test_labels_from_text_and_response(tiny, speech_clips):
    _, processor = tiny
    prompts = [f"{processor.audio_token}Write it.\n"] * 2
    arrays = [clip["array"] for clip in speech_clips[:2]]
    responses = [clip["text"] for clip in speech_clips[:2]]
    batch = processor(text=prompts, audio=arrays, response=responses, output_labels=True)
    expected = processor.apply_chat_template(
        [
            [*processor._request(array, None, None), {"role": "assistant", "content": text}]
            for array, text in zip(arrays, responses, strict=True)
        ],
        output_labels=True,
    )
    assert torch.equal(batch["labels"], expected["labels"]) and torch.equal(batch["input_ids"], expected["input_ids"])
    assert "labels" not in processor(text=prompts, audio=arrays, response=responses)


def test_a_template_that_rewrites_the_past_is_refused_for_labels(chat, speech_clips):
    _, processor = chat
    rewriting = "{{- messages | length -}}" + processor.chat_template
    conversation = [
        *processor._request(speech_clips[0]["array"], None, None),
        {"role": "assistant", "content": "one"},
    ]
    with pytest.raises(ValueError, match="rewrites earlier messages"):
        processor.apply_chat_template(conversation, chat_template=rewriting, output_labels=True)


# --- outputs ------------------------------------------------------------------------------------------------------------


def test_decode_leaves_out_the_prompt(chat, tiny, speech_clips):
    for _, processor in (chat, tiny):
        answer = processor.tokenizer("Hello\nthere.")["input_ids"] + [processor.tokenizer.eos_token_id]
        for kwargs in ({}, {"language": "en", "prompt": "Names: Ada."}):
            prompt = processor.apply_transcription_request(speech_clips[0]["array"], **kwargs)["input_ids"][0].tolist()
            for ids in (answer, prompt + answer):
                assert processor.decode(ids, return_format="transcription_only") == "Hello\nthere."
                assert processor.decode(torch.tensor([ids]), return_format="parsed") == [
                    {"language": None, "transcription": "Hello\nthere."}
                ]
        assert processor.batch_decode([answer], return_format="transcription_only") == ["Hello\nthere."]
        assert processor.batch_decode([answer], skip_special_tokens=True) == ["Hello\nthere."]
        assert processor.decode(torch.tensor([answer]), skip_special_tokens=True) == ["Hello\nthere."]


def test_save_audio_is_whole_or_not_at_all(tiny, tmp_path):
    _, processor = tiny
    wave = torch.sin(torch.arange(1600) / 10) * 0.5
    for name in ("a.wav", "a.flac", "a.ogg"):
        processor.save_audio(wave[None], tmp_path / name)
        back, rate = soundfile.read(tmp_path / name)
        assert rate == 16000 and len(back) == 1600
        (tmp_path / "like").touch()  # with the rights of any file: a server runs as somebody else
        assert (tmp_path / name).stat().st_mode == (tmp_path / "like").stat().st_mode
        (tmp_path / "like").unlink()
    processor.save_audio(wave, tmp_path / "b.wav", sampling_rate=24000)
    assert soundfile.info(str(tmp_path / "b.wav")).samplerate == 24000
    before = (tmp_path / "a.wav").read_bytes()
    for bad in (torch.full((10,), torch.nan), torch.zeros(2, 10), torch.zeros(0)):
        with pytest.raises(ValueError, match="audio"):
            processor.save_audio(bad, tmp_path / "a.wav")
    with pytest.raises(Exception, match=r"(?i)format|extension"):
        processor.save_audio(wave, tmp_path / "c.nonsense")
    assert (tmp_path / "a.wav").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.flac", "a.ogg", "a.wav", "b.wav"]


def test_save_and_load(chat, tiny, tmp_path, speech_clips):
    for i, (_, processor) in enumerate((chat, tiny)):
        folder = tmp_path / str(i)
        processor.save_pretrained(folder)
        for _ in range(2):  # and once more from what was loaded
            loaded = AutoProcessor.from_pretrained(folder)
            assert type(loaded) is MelLLMProcessor
            assert loaded.to_dict() == processor.to_dict()
            assert loaded.chat_template == processor.chat_template
            a = loaded.apply_transcription_request(speech_clips[0]["array"])
            b = processor.apply_transcription_request(speech_clips[0]["array"])
            assert all(torch.equal(a[key], b[key]) for key in b)
            loaded.save_pretrained(folder)


def test_names_that_clients_look_for(tiny):
    _, processor = tiny
    assert processor.model_input_names[0] == "input_features"  # run_speech_recognition_seq2seq.py
    assert processor.feature_extractor.model_input_names[0] == "input_features"
    assert processor.feature_extractor.sampling_rate == 16000
    assert processor.tokenizer is not None


def test_serving_engines_get_the_places_of_audio(tiny, speech_clips):
    # vLLM asks for these offsets and relies on them
    _, processor = tiny
    token = processor.audio_token
    batch = processor(
        text=f"A {token} b", audio=speech_clips[0]["array"], text_kwargs={"return_text_replacement_offsets": True}
    )
    (offsets,) = batch["text_replacement_offsets"][0]
    assert offsets["type"] == "audio" and offsets["span"] == (2, 2 + len(token))
    count = (batch["input_ids"] == processor.audio_token_id).sum().item()
    assert offsets["replacement"] == token * count
