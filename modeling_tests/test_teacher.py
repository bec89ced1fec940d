"""A teacher's states: made once, of the clip alone; the head that learns them; and runs that listen beside one."""

import json

import numpy as np
import pytest
import torch
from conftest import build_tiny, tiny_text_config
from safetensors import safe_open
from test_train_script import SCRATCH, folder, losses, script, train, words  # noqa: F401  (fixtures among them)
from transformers import (
    AutoModelForSpeechSeq2Seq,
    LlamaForCausalLM,
    TrainerCallback,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
    set_seed,
)

from mel_llm.training import (
    SpeechDataset,
    SpeechTeacher,
    TeacherError,
    TranscriptionCollator,
    add_alignment_head,
    fit_states,
    last_checkpoint,
    remove_alignment_head,
)


@pytest.fixture(scope="module")
def whisper(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("teachers") / "whisper"
    set_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 32, "max_source_positions": 500}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    model = WhisperModel(WhisperConfig(**sizes, **heads, **tokens))
    model.save_pretrained(path)
    WhisperFeatureExtractor().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def wav2vec2(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("teachers") / "wav2vec2"
    set_seed(0)
    config = Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=(8,) * 7
    )
    Wav2Vec2Model(config).save_pretrained(path)
    Wav2Vec2FeatureExtractor().save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("kind", ["whisper", "wav2vec2"])
def test_states_are_of_the_clip_and_nothing_behind_it(kind, speech_clips, request):
    teacher = SpeechTeacher(request.getfixturevalue(kind))
    assert (teacher.size, teacher.rate, teacher.sampling_rate) == (16, 50.0, 16000)
    for clip in speech_clips[:2]:  # of different lengths, one after the other
        states = teacher(clip["array"])
        assert states.dtype == np.float16 and states.shape[1] == 16
        assert len(states) == pytest.approx(50 * clip["duration"], abs=2)
        np.testing.assert_array_equal(states, teacher(clip["array"]))


def test_whispers_states_are_those_of_its_encoder(whisper, speech_clips):
    """Of a clip as long as the encoder's full length, where transformers takes it as it is."""
    audio = np.resize(speech_clips[0]["array"], 160_000)
    inputs = WhisperFeatureExtractor.from_pretrained(whisper)(
        audio, sampling_rate=16000, padding="longest", return_tensors="pt"
    )
    with torch.no_grad():
        expected = WhisperModel.from_pretrained(whisper).encoder(**inputs).last_hidden_state[0]
    torch.testing.assert_close(torch.from_numpy(SpeechTeacher(whisper)(audio)).float(), expected, atol=2e-3, rtol=2e-3)
    with pytest.raises(TeacherError, match=r"12\.0 s is longer than the 10 s .* --max_seconds"):
        SpeechTeacher(whisper)(np.resize(audio, 192_000))
    teacher = SpeechTeacher(whisper)
    teacher.positions = teacher.positions.repeat(3, 1)
    assert len(teacher(np.resize(audio, 448_000))) == 1400
    with pytest.raises(TeacherError, match=r"33\.0 s is longer than the 30 s"):  # nothing is left out in silence
        teacher(np.resize(audio, 528_000))


def test_states_are_made_once(whisper, wav2vec2, speech_clips, tmp_path, monkeypatch):
    audio = speech_clips[0]["array"]
    states = SpeechTeacher(whisper, tmp_path)(audio)
    again = SpeechTeacher(whisper, tmp_path)
    monkeypatch.setattr(again, "_listen", lambda audio: pytest.fail("it listened again"))
    np.testing.assert_array_equal(again(audio), states)
    # Another teacher's are others, and what broke off is made again
    other = SpeechTeacher(wav2vec2, tmp_path)(audio)
    assert not np.array_equal(other[: len(states)], states[: len(other)])
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == 2 and not list(tmp_path.rglob("*.partial"))
    for file in files:
        file.write_bytes(file.read_bytes()[:100])
    np.testing.assert_array_equal(SpeechTeacher(whisper, tmp_path)(audio), states)


def test_what_is_no_teacher_is_refused(tmp_path):
    LlamaForCausalLM(tiny_text_config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="type 'llama'. A teacher is a Whisper"):
        SpeechTeacher(str(tmp_path))


def test_states_are_stretched_to_the_audio_tokens():
    states = torch.arange(12.0).reshape(6, 2)
    torch.testing.assert_close(fit_states(states, 3, 2), states.reshape(3, 4))
    # Played faster: fewer tokens, from beginning to end
    fewer = fit_states(states.numpy().astype(np.float16), 2, 2)
    assert fewer.shape == (2, 4) and (fewer.reshape(4, 2)[1:] > fewer.reshape(4, 2)[:-1]).all()
    assert fit_states(states[:1], 5, 1).tolist() == [[0.0, 1.0]] * 5


def teacher_batch(processor, clips, size=3):
    random = np.random.default_rng(0)
    examples = [
        {
            "audio": clip["array"],
            "text": clip["text"],
            "teacher_states": random.normal(5, 3, (int(50 * clip["duration"]), size)).astype(np.float16),
        }
        for clip in clips
    ]
    return TranscriptionCollator(processor, spell=True, teacher_rate=2)(examples)


def test_the_head_learns_what_the_teacher_hears(tokenizer, speech_clips):
    model, processor = build_tiny(tokenizer, audio_config={"ctc_weight": 0.5, "ctc_rate": 2})
    batch = teacher_batch(processor, speech_clips[:3])
    counts = model.config.audio_config.num_audio_tokens(batch["attention_mask"].sum(-1))
    assert batch["teacher_states"].shape == (3, int(counts.max()), 6)
    plain = model(**batch)  # without a head nothing is made of them
    assert "alignment" not in plain.losses
    head = add_alignment_head(model, 6, weight=2.0)
    assert head.layer == model.ctc_head.layer
    model.train()
    first = model(**batch)
    alignment = first.losses["alignment"]
    torch.testing.assert_close(first.loss, first.losses["text"] + 0.5 * first.losses["ctc"] + 2 * alignment)
    assert 0.5 < float(alignment) < 3  # a share of the variance, whatever the teacher's scale
    # What a clip is padded with does not count
    padded = {**batch, "teacher_states": torch.nn.functional.pad(batch["teacher_states"], (0, 0, 0, 4), value=1e4)}
    torch.testing.assert_close(model(**padded).losses["alignment"], alignment)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(12):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    assert model.model.audio_embedder.conv.out.weight.grad.abs().sum() > 0
    assert float(model(**batch).losses["alignment"]) < 0.9 * float(alignment)


def test_halves_of_a_batch_add_up(tokenizer, speech_clips):
    model, processor = build_tiny(tokenizer)
    add_alignment_head(model, 6, weight=1.0)
    batch = teacher_batch(processor, speech_clips[:2])
    batch.pop("transcript_bytes")
    count = (batch["labels"] != -100).sum()
    whole = model(**batch)
    part = model(**batch, num_items_in_batch=2 * count)
    torch.testing.assert_close(part.loss, whole.loss / 2)
    torch.testing.assert_close(part.losses["alignment"], whole.losses["alignment"])


def test_bad_heads_are_refused(tiny):
    model, _ = tiny
    with pytest.raises(ValueError, match="`layer` must be from 1 to 2"):
        add_alignment_head(model, 6, weight=1.0, layer=3)
    with pytest.raises(ValueError, match="`weight` must be more than 0"):
        add_alignment_head(model, 6, weight=0.0)


class StopAfterTwoSteps(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2


def test_a_run_with_a_teacher(script, folder, whisper, tmp_path):  # noqa: F811
    """Stopped and gone on with, it comes to what one that was never stopped comes to; and leaves a model without a head."""
    common = (
        *SCRATCH,
        "--max_seconds",
        "10",
        "--teacher",
        whisper,
        "--teacher_cache",
        str(tmp_path / "cache"),
        "--teacher_weight",
        "0.5",
    )
    more = (*common, "--save_strategy", "steps", "--save_steps", "2", "--speed_factors", "0.9", "1.1")
    train(script, *words(folder, tmp_path / "whole", *more, "--max_steps", "4"))
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")}
    assert len(made) == 12
    cut = tmp_path / "cut"
    first = script.prepare(words(folder, cut, *more, "--max_steps", "4"))
    first.trainer.add_callback(StopAfterTwoSteps())
    first.trainer.train()
    run = train(script, *words(folder, cut, *more, "--max_steps", "4"))
    assert run.checkpoint == str(cut / "checkpoint-2")
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert losses(cut)[4] == losses(tmp_path / "whole")[4]
    log = json.loads((cut / "trainer_state.json").read_text())["log_history"]
    assert all("asr_alignment" in entry and "asr_text" in entry for entry in log if "loss" in entry)
    checkpoint = last_checkpoint(str(cut))
    for path, has_head in ((checkpoint, True), (cut, False)):
        with safe_open(f"{path}/model.safetensors", "pt") as file:
            assert any(name.startswith("alignment_head.") for name in file.keys()) == has_head
        model, info = AutoModelForSpeechSeq2Seq.from_pretrained(path, output_loading_info=True)
        assert model.alignment_head is None
        assert not info["missing_keys"] and not info["unexpected_keys"]


def test_going_on_with_another_teacher_is_refused(script, folder, whisper, wav2vec2, tmp_path):  # noqa: F811
    common = (*SCRATCH, "--max_seconds", "10", "--max_steps", "2", "--save_strategy", "steps", "--save_steps", "1")
    plain, taught = (words(folder, tmp_path / name, *common) for name in ("plain", "taught"))
    train(script, *plain)
    train(script, *taught, "--teacher", whisper)
    setup = json.loads((tmp_path / "taught" / "training_summary.json").read_text())["setup"]
    assert setup["teacher"] == {"teacher": "whisper", "teacher_weight": 2.0, "teacher_layer": None}
    longer = ("--max_steps", "3")
    for arguments, told in (
        ((*plain, *longer, "--teacher", whisper), "without a teacher"),
        ((*taught, *longer), "with a teacher"),
        ((*taught, *longer, "--teacher", wav2vec2), "another --teacher"),
    ):
        with pytest.raises(ValueError, match=told):
            script.prepare(list(arguments))
    with pytest.raises(ValueError, match="clips of up to 10 s. Leave longer ones out: --max_seconds 10"):
        script.prepare(words(folder, tmp_path / "long", *SCRATCH, "--teacher", whisper))


def test_a_teacher_that_fails_is_no_broken_clip(whisper, speech_clips, tmp_path, monkeypatch, caplog):
    rows = [{"audio": {"path": clip["path"], "bytes": None}, "text": clip["text"]} for clip in speech_clips[:2]]
    teacher = SpeechTeacher(whisper)
    data = SpeechDataset(rows, teacher=teacher)
    monkeypatch.setattr(teacher, "_listen", lambda audio: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(TeacherError, match="could not listen to a clip .* out of memory"):
        data[0, 0]
    assert data.num_bad_clips == 0
    # A cache that cannot be written to costs time and nothing else
    (tmp_path / "cache").write_text("a file")
    teacher = SpeechTeacher(whisper, tmp_path / "cache")
    assert len(SpeechDataset(rows, teacher=teacher)[0, 1]["teacher_states"]) > 10
    assert teacher.cache is None
    # Questions are not what a teacher helps with
    assert "teacher_states" not in SpeechDataset([{**rows[0], "instruction": "Who speaks?"}], teacher=teacher)[0, 0]


def test_a_single_audio_token_has_nothing_to_align(tokenizer, speech_clips):
    model, processor = build_tiny(tokenizer)
    add_alignment_head(model, 6, weight=1.0)
    model.train()
    clip = {**speech_clips[0], "array": speech_clips[0]["array"][:500], "duration": 0.04}
    losses_ = model(**{**teacher_batch(processor, [clip]), "transcript_bytes": None}).losses
    assert float(losses_["alignment"]) == 0.0


def test_weights_of_16_bits_learn_from_a_teacher_too(tokenizer, speech_clips):
    model, processor = build_tiny(tokenizer)
    model = model.to(torch.bfloat16).train()
    add_alignment_head(model, 6, weight=1.0)
    batch = teacher_batch(processor, speech_clips[:2])
    batch.pop("transcript_bytes")
    output = model(**batch)
    output.loss.backward()
    assert output.losses["alignment"].isfinite() and model.alignment_head.proj.weight.grad.abs().sum() > 0


def test_taking_the_head_away(tiny):
    model, _ = tiny
    before = model.state_dict().keys()
    add_alignment_head(model, 6, weight=1.0)
    assert any(name.startswith("alignment_head.") for name in model.state_dict())
    remove_alignment_head(model)
    assert model.state_dict().keys() == before


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--teacher", "x", "--lora", "small"], "--teacher is for reading"),
        (["--teacher", "x", "--tasks", "tts"], "--teacher is for reading"),
        (["--teacher", "x", "--packing"], "--teacher is for reading"),
        (["--teacher_cache", "x"], "--teacher_cache needs --teacher"),
        (["--teacher_layer", "1"], "--teacher_layer needs --teacher"),
        (["--teacher", "x", "--teacher_weight", "0"], "--teacher_weight must be more than 0"),
    ],
)
def test_arguments_that_do_not_fit(script, folder, tmp_path, more, told, capsys):  # noqa: F811
    with pytest.raises(SystemExit):
        script.prepare(words(folder, tmp_path / "run", *SCRATCH, *more))
    assert told in capsys.readouterr().err
