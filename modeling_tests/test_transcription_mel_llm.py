"""Long audio: where it is cut, that nothing is lost, and what becomes of the pieces."""

import io
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, build_tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

import mel_llm
from mel_llm.audio_utils_mel_llm import TruncatedAudioError
from mel_llm.transcription_mel_llm import iter_segments, join_texts, split_audio, transcribe


RATE = 16000


def silence(seconds):
    return np.zeros(round(seconds * RATE), np.float32)


def noise(seconds, level=0.1, seed=0):
    return (level * np.random.default_rng(seed).standard_normal(round(seconds * RATE))).astype(np.float32)


def music(seconds):
    """A chord progression without a rest."""
    time = np.arange(round(seconds * RATE)) / RATE
    roots = np.array([220.0, 174.6, 261.6, 196.0])[(time // 2).astype(int) % 4]
    chord = sum(np.sin(2 * np.pi * np.cumsum(roots * ratio) / RATE) for ratio in (1, 1.25, 1.5))
    return (0.2 * chord * (0.6 + 0.4 * np.cos(2 * np.pi * time / 2))).astype(np.float32)


def check_tiling(audio, pieces, max_seconds):
    """Pieces are in order, no longer than they may be, and leave out nothing but digital silence."""
    left_out = np.ones(len(audio), bool)
    position = 0
    for piece in pieces:
        start, end = round(piece.start * RATE), round(piece.end * RATE)
        assert position <= start < end <= len(audio) and end - start <= max_seconds * RATE
        assert np.array_equal(piece.samples, audio[start:end])
        left_out[start:end] = False
        position = end
    rest = audio[left_out]
    assert len(rest) == 0 or np.sqrt(np.mean(rest**2)) < 10 ** (-70 / 20)


def pieces_of(audio, max_seconds=30.0, block=RATE):
    blocks = (audio[i : i + block] for i in range(0, len(audio), block))
    return list(split_audio(blocks, RATE, max_seconds))


@pytest.fixture
def talk(speech_clips):
    """All clips with short pauses between them, and where each begins and ends."""
    parts, spans, position = [], [], 0
    for clip in speech_clips:
        parts += [clip["array"], noise(0.6, 1e-3)]
        spans.append((position, position + len(clip["array"])))
        position += len(clip["array"]) + len(parts[-1])
    return np.concatenate(parts), spans


class TestSplit:
    def test_short_audio_is_one_piece(self, speech_clips):
        audio = speech_clips[0]["array"]
        (piece,) = pieces_of(audio)
        assert np.array_equal(piece.samples, audio) and (piece.start, piece.end) == (0, len(audio) / RATE)

    @pytest.mark.parametrize("max_seconds", [1, 2.5, 6, 8, 15, 30])
    def test_nothing_is_lost_or_doubled(self, talk, max_seconds):
        audio, _ = talk
        pieces = pieces_of(audio, max_seconds)
        check_tiling(audio, pieces, max_seconds)
        if max_seconds > 1:  # a piece of a second may hold nothing but the silence of a recording
            assert sum(len(piece.samples) for piece in pieces) == len(audio)
        for block in (777, len(audio)):
            assert [piece.end for piece in pieces_of(audio, max_seconds, block)] == [piece.end for piece in pieces]

    @pytest.mark.parametrize("max_seconds", [8, 15, 30])
    def test_cuts_fall_into_pauses(self, talk, max_seconds):
        audio, spans = talk
        for piece in pieces_of(audio, max_seconds)[:-1]:
            cut = round(piece.end * RATE)
            inside = [(begin, end) for begin, end in spans if begin <= cut < end]
            if inside:  # within a recording: where its speaker pauses
                around = audio[cut - RATE // 20 : cut + RATE // 20]
                assert 10 * np.log10(np.mean(around**2)) < -50

    def test_pause_between_two_clips(self, speech_clips):
        first, second = speech_clips[0]["array"], speech_clips[1]["array"]
        audio = np.concatenate([first, noise(0.5, 1e-4), second])
        one, two = pieces_of(audio, 6.0)
        assert one.end == two.start and len(first) <= round(one.end * RATE) <= len(first) + RATE // 2

    def test_late_and_long_pauses_are_preferred(self):
        hush = lambda seconds: noise(seconds, 1e-4)  # noqa: E731
        audio = np.concatenate([noise(6), hush(0.8), noise(9), hush(0.3), noise(2), hush(0.8), noise(9), noise(30)])
        assert 17.8 < pieces_of(audio, 20.0)[0].end < 18.6  # late rather than early
        audio = np.concatenate([noise(14), hush(0.8), noise(3), hush(0.16), noise(40)])
        assert 14 < pieces_of(audio, 20.0)[0].end < 14.8  # long rather than late

    @pytest.mark.parametrize("seconds", [30.1, 31, 44, 46, 59, 60.5, 61])
    def test_no_tiny_piece_is_left_at_the_end(self, seconds):
        pieces = pieces_of(noise(seconds), 30.0)
        check_tiling(noise(seconds), pieces, 30.0)
        assert min(piece.end - piece.start for piece in pieces) > 7

    def test_what_remains_is_halved(self):
        audio = np.concatenate([noise(15.5), noise(0.5, 1e-4), noise(15)])
        assert [round(piece.end - piece.start) for piece in pieces_of(audio, 30.0)] == [16, 15]

    @pytest.mark.parametrize("make", [music, noise])
    def test_without_pauses(self, make):
        audio = make(100)
        check_tiling(audio, pieces_of(audio, 30.0), 30.0)
        assert sum(len(piece.samples) for piece in pieces_of(audio, 30.0)) == len(audio)

    def test_the_quietest_place_is_cut_where_there_is_no_pause(self):
        audio = noise(50)
        audio[22 * RATE : 22 * RATE + 1600] *= 0.05  # 0.1 s: too short for a pause
        assert 22 <= pieces_of(audio, 30.0)[0].end <= 22.1

    def test_silence_is_skipped_and_quiet_sound_is_not(self, speech_clips):
        clip = speech_clips[0]["array"]
        audio = np.concatenate([silence(70), clip, silence(200), clip, silence(31)])
        pieces = pieces_of(audio)
        check_tiling(audio, pieces, 30.0)
        assert len(pieces) == 2 and all(piece.end - piece.start < len(clip) / RATE + 0.5 for piece in pieces)
        assert 69.7 < pieces[0].start <= 70
        assert pieces_of(silence(100)) == [] and pieces_of(silence(0.03)) == []
        assert pieces_of(silence(100) + 0.1) == []  # a constant is no sound
        quiet = noise(100, 10 ** (-66 / 20))
        assert sum(len(piece.samples) for piece in pieces_of(quiet)) == len(quiet)

    def test_short_silences_stay(self):
        audio = np.concatenate([silence(0.9), noise(3), silence(5), noise(3), silence(0.9)])
        (piece,) = pieces_of(audio)
        assert len(piece.samples) == len(audio)

    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(st.tuples(st.sampled_from([0.0, 1e-4, 1e-3, 0.1]), st.floats(0.001, 6)), max_size=12),
        st.floats(1, 8),
    )
    def test_any_sequence_of_sound_and_silence(self, parts, max_seconds):
        audio = np.concatenate([silence(0), *(noise(seconds, level) for level, seconds in parts)])
        pieces = pieces_of(audio, max_seconds)
        check_tiling(audio, pieces, max_seconds)
        for block in (1777, max(1, len(audio))):
            assert [piece.end for piece in pieces_of(audio, max_seconds, block)] == [piece.end for piece in pieces]

    @pytest.mark.parametrize("max_seconds", [0.5, float("nan"), float("inf"), -3])
    def test_bad_arguments(self, max_seconds):
        with pytest.raises(ValueError, match="`max_seconds`"):
            split_audio([], RATE, max_seconds)

    def test_pieces_of_a_truncated_stream_come_first(self):
        def blocks():
            yield noise(40)
            raise TruncatedAudioError("cut.wav is truncated")

        pieces = split_audio(blocks(), RATE)
        assert next(pieces).end + next(pieces).samples.size / RATE == 40
        with pytest.raises(TruncatedAudioError, match="cut.wav"):
            next(pieces)


class TestTranscribe:
    @pytest.mark.parametrize("request_kwargs", [{}, {"language": "en", "prompt": "Names: Ada."}])
    def test_a_batch_is_one_by_one(self, tiny, talk, request_kwargs):
        model, processor = tiny
        audio = talk[0][: len(talk[0]) // 2]
        together, alone = (
            transcribe(model, processor, audio, batch_size=size, max_segment_seconds=8, **request_kwargs)
            for size in (4, 1)
        )
        assert together == alone and len(together.segments) > 4
        assert together.duration == len(audio) / RATE and not together.truncated
        assert together.text == join_texts(segment.text for segment in together.segments)
        assert model.transcribe(audio, processor, max_segment_seconds=8, **request_kwargs) == together

    def test_a_piece_is_what_generate_makes_of_it(self, tiny, talk):
        model, processor = tiny
        audio, _ = talk
        pieces = pieces_of(audio, 30.0)
        ids = model.generate(**processor(audio=[piece.samples for piece in pieces]))
        texts = [text for text in processor.batch_decode(ids, return_format="transcription_only") if text]
        assert [segment.text for segment in transcribe(model, processor, audio).segments] == texts

    def test_times(self, tiny, speech_clips):
        model, processor = tiny
        clip = speech_clips[0]["array"]
        audio = np.concatenate([silence(40), clip, silence(40), clip])
        segments = transcribe(model, processor, audio).segments
        ends = [40 + len(clip) / RATE, len(audio) / RATE]
        assert len(segments) == 2
        for segment, end in zip(segments, ends, strict=True):
            assert end - len(clip) / RATE <= segment.start < end - len(clip) / RATE + 0.5
            assert end - 0.5 < segment.end <= end
        segments = transcribe(model, processor, np.concatenate([music(20), clip]), max_segment_seconds=5).segments
        times = [time for segment in segments for time in (segment.start, segment.end)]
        assert times == sorted(times) and times[0] >= 0 and times[-1] <= 20 + len(clip) / RATE

    def test_silence_is_not_decoded(self, tiny, monkeypatch):
        model, processor = tiny
        monkeypatch.setattr(model, "generate", lambda **kwargs: pytest.fail("was decoded"))
        result = transcribe(model, processor, silence(100))
        assert (result.text, result.segments, result.duration) == ("", [], 100.0)

    @pytest.mark.parametrize("audio", [noise(0.03), noise(40), music(40)], ids=["30 ms", "noise", "music"])
    def test_what_is_no_speech_does_no_harm(self, tiny, audio):
        result = transcribe(*tiny, audio)
        assert result.duration == len(audio) / RATE

    def test_a_prompt_still_has_a_budget(self, tiny, speech_clips, monkeypatch):
        """A model that never stops gets what its audio allows, whatever is beside it."""
        model, processor = tiny
        model.config.max_text_tokens_per_second = 4.0
        calls = []
        generate = model.generate

        def endless(**kwargs):
            calls.append(kwargs)
            return generate(**kwargs, min_new_tokens=kwargs["max_new_tokens"])

        monkeypatch.setattr(model, "generate", endless)
        short, long = noise(2), noise(9, seed=1)
        audio = np.concatenate([long, silence(30), short])
        texts = [
            [segment.text for segment in transcribe(model, processor, audio, prompt="x", batch_size=size).segments]
            for size in (2, 1)
        ]
        assert texts[0] == texts[1]
        assert [call["max_new_tokens"] for call in calls] == [53, 53, 25]  # 16 + 4 a second, with 0.2 s of silence
        transcribe(model, processor, audio, prompt="x", max_new_tokens=5)
        assert calls[-1]["max_new_tokens"] == 5
        transcribe(model, processor, audio, prompt="x", generation_config=GenerationConfig(max_new_tokens=20))
        assert calls[-1]["max_new_tokens"] == 20

    def test_segments_come_as_they_are_decoded(self, tiny, talk, monkeypatch):
        model, processor = tiny
        calls, generate, done = [], model.generate, []
        monkeypatch.setattr(model, "generate", lambda **kwargs: calls.append(1) or generate(**kwargs))
        segments = iter_segments(
            model, processor, talk[0], batch_size=2, max_segment_seconds=6, on_progress=done.append
        )
        next(segments)
        assert len(calls) == 1 and not done
        rest = list(segments)
        assert len(rest) > 4 and done == sorted(done) and done[-1] == pytest.approx(len(talk[0]) / RATE)

    def test_training_mode_is_left_as_it_was(self, tiny, speech_clips):
        model, processor = tiny
        expected = transcribe(model, processor, speech_clips[0]["array"])
        model.train()
        model.model.audio_embedder.eval()
        before = [module.training for module in model.modules()]
        assert transcribe(model, processor, speech_clips[0]["array"]) == expected
        assert [module.training for module in model.modules()] == before

    def test_bfloat16_and_adapters(self, tiny, speech_clips):
        from peft import LoraConfig, get_peft_model

        model, processor = tiny
        audio = speech_clips[0]["array"]
        expected = transcribe(model, processor, audio)
        assert transcribe(model.to(torch.bfloat16), processor, audio).duration == expected.duration
        model = get_peft_model(model.float(), LoraConfig(r=2, target_modules="all-linear"))
        assert transcribe(model, processor, audio, prompt="x").duration == expected.duration

    @pytest.mark.parametrize("container", [{"format": "WAV"}, {"format": "FLAC"}, {"format": "MP3"}])
    def test_truncated_file(self, tiny, speech_clips, tmp_path, container, caplog):
        model, processor = tiny
        buffer = io.BytesIO()
        audio = np.concatenate([clip["array"] for clip in speech_clips[:8]])
        soundfile.write(buffer, audio, RATE, **container)
        path = tmp_path / "cut.bin"
        path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
        result = transcribe(model, processor, path, max_segment_seconds=6)
        assert result.truncated and "cut.bin is truncated" in result.warning and "cut.bin" in caplog.text
        assert result.text and 0.35 * len(audio) < result.duration * RATE < 0.65 * len(audio)
        segments = iter_segments(model, processor, path, max_segment_seconds=6)
        found = []
        with pytest.raises(TruncatedAudioError, match="cut.bin"):
            found.extend(segments)
        assert found == result.segments

    def test_nothing_readable(self, tiny, speech_clips, tmp_path):
        buffer = io.BytesIO()
        soundfile.write(buffer, speech_clips[0]["array"], RATE, format="FLAC")
        (tmp_path / "cut.flac").write_bytes(buffer.getvalue()[:200])
        (tmp_path / "text.wav").write_text("no audio")
        for name in ("cut.flac", "text.wav"):
            with pytest.raises(ValueError, match=name):
                transcribe(*tiny, tmp_path / name)

    @pytest.mark.parametrize("kwargs", [{"batch_size": 0}, {"max_segment_seconds": 0.1}, {"num_return_sequences": 2}])
    def test_bad_arguments(self, tiny, speech_clips, kwargs):
        with pytest.raises(ValueError):
            transcribe(*tiny, speech_clips[0]["array"], do_sample=True, **kwargs)

    def test_the_config_says_how_long_pieces_are(self, tokenizer):
        model, processor = build_tiny(tokenizer, audio_config={"max_audio_seconds": 4.0})
        assert len(transcribe(model, processor, noise(30), max_new_tokens=4).segments) >= 8


def test_texts_are_joined_as_their_scripts_are():
    assert join_texts(["One.", " two ", "", "three"]) == "One. two three"
    assert join_texts(["今日は。", "良い天気", "ok", "です"]) == "今日は。良い天気 ok です"
    assert join_texts(["สวัสดี", "ครับ"]) == "สวัสดีครับ"
    assert join_texts(["안녕", "하세요"]) == "안녕 하세요"
    assert join_texts([]) == ""


def test_memory_does_not_grow_with_the_file(tmp_path):
    """Ten minutes and an hour through a model that only counts."""
    block = noise(10, 0.1)[::2]  # 8 kHz, so that it is resampled too
    peaks = {}
    for minutes in (10, 60):
        path = tmp_path / f"{minutes}.wav"
        with soundfile.SoundFile(path, "w", 8000, 1, "PCM_16") as file:
            for _ in range(minutes * 6):
                file.write(block)
        code = f"""
import resource, tracemalloc, types, torch
from mel_llm.transcription_mel_llm import transcribe
model = torch.nn.Module()
model.device = "cpu"
model.config = types.SimpleNamespace(audio_config=types.SimpleNamespace(max_audio_seconds=30.0))
model.generate = lambda clips: torch.zeros(len(clips), 1)
class Inputs(dict):
    to = lambda self, device: self
processor = lambda audio, sampling_rate: Inputs(clips=[len(clip) for clip in audio])
class Processor:
    feature_extractor = types.SimpleNamespace(sampling_rate=16000)
    __call__ = staticmethod(processor)
    batch_decode = staticmethod(lambda ids, return_format: ["x"] * len(ids))
tracemalloc.start()
result = transcribe(model, Processor(), {str(path)!r})
assert result.duration == {minutes * 60} and len(result.segments) >= {minutes * 2}
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, tracemalloc.get_traced_memory()[1] / 2**20)
"""
        environment = {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stderr
        peaks[minutes] = [float(number) for number in result.stdout.split()]
        path.unlink()
    print(f"peak memory in MiB, of the process and of the transcription, by minutes of audio: {peaks}")
    assert peaks[60][0] < peaks[10][0] + 24  # an hour as float32 is 220 MiB
    # The process's peak is that of the imports; what the audio takes by itself is a batch and a window
    assert peaks[60][1] < peaks[10][1] + 4 and peaks[60][1] < 48


def test_public_names():
    assert mel_llm.transcribe is transcribe and mel_llm.split_audio is split_audio
