"""Reading audio: every kind of source gives the same waveform, and what cannot be read says why."""

import base64
import builtins
import http.server
import importlib
import io
import pathlib
import threading

import numpy as np
import pytest
import soundfile
import soxr
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mel_llm.audio_utils_mel_llm import TruncatedAudioError, load_audio, resample, stream_audio, to_mono_float


RATE = 16000


@pytest.fixture
def clip(speech_clips):
    return speech_clips[0]


def encode(array, rate=RATE, **kwargs) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, array, rate, **{"format": "WAV", **kwargs})
    return buffer.getvalue()


def tone(seconds, rate, frequency=440.0):
    return (0.5 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


@pytest.fixture
def server():
    """Serves `files[path]`; anything else is 404."""
    files = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            content = files.get(self.path)
            self.send_response(404 if content is None else 200)
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *args):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}", files
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture
def online(monkeypatch):
    """The test server is local: neither offline mode nor a proxy may stand between."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")


class TestSources:
    def test_all_kinds_give_the_same_waveform(self, clip, tmp_path):
        content = pathlib.Path(clip["path"]).read_bytes()
        data_uri = "data:audio/flac;base64," + base64.b64encode(content).decode()
        array = clip["array"]
        at_end = io.BytesIO(content)
        at_end.seek(0, 2)
        sources = [
            clip["path"],
            pathlib.Path(clip["path"]),
            content,
            bytearray(content),
            at_end,
            data_uri,
            array,
            array.astype(np.float64),
            array.tolist(),
            torch.from_numpy(array),
            np.stack([array, array]),
            (array, RATE),
            {"array": array, "sampling_rate": RATE, "path": None},
            {"array": array.tolist(), "sampling_rate": np.int64(RATE)},
            {"bytes": content, "path": "gone.flac"},
            {"bytes": None, "path": clip["path"]},
        ]
        for source in sources:
            loaded = load_audio(source)
            assert loaded.dtype == np.float32 and loaded.ndim == 1
            assert np.array_equal(loaded, array)

    def test_file_objects_stay_open(self, clip):
        with open(clip["path"], "rb") as file:
            load_audio(file)
            assert not file.closed

    def test_stream_that_cannot_seek(self, clip):
        assert np.array_equal(load_audio(Pipe(pathlib.Path(clip["path"]).read_bytes())), clip["array"])

    def test_url(self, clip, server, online):
        address, files = server
        files["/clip.flac"] = pathlib.Path(clip["path"]).read_bytes()
        files["/page.html"] = b"<html>sign in first</html>"
        assert np.array_equal(load_audio(f"{address}/clip.flac"), clip["array"])
        with pytest.raises(ConnectionError, match="/gone.flac.*404"):
            load_audio(f"{address}/gone.flac")
        with pytest.raises(ValueError, match="page.html is not audio"):
            load_audio(f"{address}/page.html")

    def test_unreachable_url(self, server, online):
        with pytest.raises(ConnectionError, match="http://127.0.0.1:9/clip.wav"):
            load_audio("http://127.0.0.1:9/clip.wav")

    @pytest.mark.parametrize(
        "kwargs",
        [
            {"format": "WAV", "subtype": "PCM_16"},
            {"format": "WAV", "subtype": "PCM_24"},
            {"format": "WAV", "subtype": "FLOAT"},
            {"format": "WAV", "subtype": "PCM_U8"},
            {"format": "FLAC"},
            {"format": "OGG", "subtype": "VORBIS"},
            {"format": "OGG", "subtype": "OPUS"},
            {"format": "MP3"},
            {"format": "AIFF"},
        ],
        ids=lambda kwargs: "-".join(kwargs.values()),
    )
    def test_formats(self, clip, kwargs):
        loaded = load_audio(encode(clip["array"], **kwargs))
        assert abs(len(loaded) - len(clip["array"])) <= 1200  # MP3 may keep its encoder's padding
        assert np.corrcoef(loaded[: len(clip["array"])], clip["array"][: len(loaded)])[0, 1] > 0.95

    def test_channels_are_averaged(self):
        stereo = np.stack([tone(0.2, RATE), tone(0.2, RATE, 880)], axis=1)
        loaded = load_audio(encode(stereo, subtype="FLOAT"))
        assert np.allclose(loaded, stereo.mean(axis=1), atol=1e-7)

    def test_reading_in_blocks_does_not_show(self, monkeypatch):
        stereo = np.stack([tone(6, 44100), tone(6, 44100, 880)], axis=1)
        content = encode(stereo, 44100, subtype="FLOAT")
        expected = load_audio(content)
        assert np.array_equal(expected, soxr.resample(stereo.mean(axis=1), 44100, RATE)[: len(expected)])
        monkeypatch.setattr("mel_llm.audio_utils_mel_llm._BLOCK_SAMPLES", 1000)
        assert np.allclose(load_audio(content), expected, atol=1e-6)


class Pipe(io.BytesIO):
    """As standard input: it cannot go back."""

    def seekable(self):
        return False

    def seek(self, *args):
        raise io.UnsupportedOperation("seek")


class TestStreaming:
    @pytest.mark.parametrize("block_seconds", [0.001, 0.7, 10.0, 1e6])
    def test_blocks_joined_are_the_whole(self, clip, block_seconds):
        content = pathlib.Path(clip["path"]).read_bytes()
        stereo = encode(np.stack([tone(6, 44100), tone(6, 44100, 880)], axis=1), 44100)
        sources = [
            clip["path"],
            content,
            io.BytesIO(content),
            stereo,
            clip["array"],
            clip["array"].tolist(),
            (tone(2, 44100), 44100),
            {"array": clip["array"], "sampling_rate": 8000},
            {"bytes": content},
            encode(clip["array"], 22050, format="MP3"),
        ]
        for source in sources if block_seconds > 0.1 else sources[:2]:
            blocks = list(stream_audio(source, block_seconds=block_seconds))
            expected = load_audio(source)
            assert np.array_equal(np.concatenate(blocks), expected)
            assert all(block.dtype == np.float32 for block in blocks)
            size = round(block_seconds * RATE)
            assert all(len(block) == size for block in blocks[:-1]) and 0 < len(blocks[-1]) <= size

    def test_a_stream_that_cannot_seek_goes_through_the_disk(self, clip, monkeypatch):
        reads = []

        class Counting(Pipe):
            def read(self, size=-1):
                reads.append(size)
                return super().read(size)

        blocks = stream_audio(Counting(pathlib.Path(clip["path"]).read_bytes()))
        assert np.array_equal(np.concatenate(list(blocks)), clip["array"])
        assert min(reads) > 0  # never everything at once

    def test_url(self, clip, server, online):
        address, files = server
        files["/clip.flac"] = pathlib.Path(clip["path"]).read_bytes()
        assert np.array_equal(np.concatenate(list(stream_audio(f"{address}/clip.flac"))), clip["array"])
        with pytest.raises(ConnectionError, match="404"):
            next(stream_audio(f"{address}/gone.flac"))

    @pytest.mark.parametrize("rate", [RATE, 22050])
    @pytest.mark.parametrize("kwargs", [{"format": "WAV"}, {"format": "FLAC"}, {"format": "MP3"}])
    def test_truncated_file_gives_what_it_has(self, clip, tmp_path, kwargs, rate):
        whole = np.tile(clip["array"], 3)
        content = encode(whole, rate, **kwargs)
        path = tmp_path / "cut.bin"
        path.write_bytes(content[: len(content) * 6 // 10])
        blocks = []
        with pytest.raises(TruncatedAudioError, match="cut.bin is truncated"):
            blocks.extend(stream_audio(path, block_seconds=1.0))
        found = np.concatenate(blocks)
        expected = load_audio(content)
        assert 0.45 * len(expected) < len(found) < 0.75 * len(expected)
        sure = len(found) - 2000  # a resampler looks ahead, and MP3 frames lean on each other
        assert np.corrcoef(found[:sure], expected[:sure])[0, 1] > (0.99 if kwargs["format"] == "MP3" else 0.99999)

    def test_no_audio_raises_at_the_first_block(self, tmp_path):
        (tmp_path / "text.wav").write_text("no audio here " * 100)
        for path, error in ((tmp_path / "text.wav", ValueError), (tmp_path / "gone.wav", FileNotFoundError)):
            blocks = stream_audio(path)
            with pytest.raises(error, match=path.name):
                next(blocks)

    def test_the_name_says_nothing_about_the_content(self, clip, tmp_path):
        path = tmp_path / "wave.mp3"
        path.write_bytes(encode(clip["array"], subtype="FLOAT"))
        assert np.array_equal(np.concatenate(list(stream_audio(path))), clip["array"])

    @pytest.mark.parametrize("kwargs", [{"block_seconds": 0}, {"block_seconds": float("nan")}, {"sampling_rate": 1}])
    def test_bad_arguments_are_named(self, clip, kwargs):
        with pytest.raises(ValueError, match=f"`{next(iter(kwargs))}`"):
            stream_audio(clip["path"], **kwargs)


class TestParts:
    def test_offset_and_duration(self, clip):
        for source in (clip["path"], clip["array"], encode(clip["array"], subtype="FLOAT")):
            part = load_audio(source, offset=0.5, duration=0.25)
            assert np.array_equal(part, clip["array"][8000:12000])
            assert np.array_equal(load_audio(source, offset=0.5), clip["array"][8000:])
            assert np.array_equal(load_audio(source, duration=3600), clip["array"])

    def test_seconds_are_those_of_the_file(self):
        part = load_audio(encode(tone(2, 44100), 44100), offset=0.5, duration=0.75)
        assert len(part) == 12000
        assert np.abs(part[2000:-2000] - tone(2, RATE)[8000:20000][2000:-2000]).max() < 1e-3

    @pytest.mark.parametrize(
        "kwargs",
        [
            {"offset": -1.0},
            {"offset": float("nan")},
            {"duration": 0.0},
            {"duration": -2.0},
            {"duration": float("inf")},
            {"offset": 1e6},
            {"sampling_rate": 0},
            {"sampling_rate": 22050.5},
            {"sampling_rate": "16k"},
        ],
    )
    def test_bad_arguments_are_named(self, clip, kwargs):
        with pytest.raises(ValueError, match=f"`{next(iter(kwargs))}`"):
            load_audio(clip["path"], **kwargs)


class TestResampling:
    @pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000])
    def test_file_array_and_resample_agree(self, rate):
        wave = tone(1.0, rate)
        expected = resample(wave, rate, RATE)
        assert np.abs(expected[1000:-1000] - tone(1.0, RATE)[1000:-1000]).max() < 1e-3
        for source in ((wave, rate), {"array": wave, "sampling_rate": rate}, encode(wave, rate, subtype="FLOAT")):
            assert np.array_equal(load_audio(source), expected)

    @settings(max_examples=50, deadline=None)
    @given(st.integers(1, 5000), st.sampled_from([8000, 11025, 16000, 44100, 96000]), st.sampled_from([8000, RATE]))
    def test_length(self, num_samples, from_rate, to_rate):
        output = resample(np.full(num_samples, 0.25, np.float32), from_rate, to_rate)
        assert len(output) == -(-num_samples * to_rate // from_rate) and np.isfinite(output).all()

    def test_what_is_too_high_is_gone(self):
        assert np.abs(resample(tone(1.0, 48000, 12000.0), 48000, RATE)[1000:-1000]).max() < 1e-3

    def test_same_rate_is_no_copy(self):
        wave = tone(0.1, RATE)
        assert resample(wave, RATE, RATE) is wave

    @pytest.mark.parametrize(("from_rate", "to_rate", "name"), [(0, RATE, "from_rate"), (RATE, 10**9, "to_rate")])
    def test_rates_are_checked(self, from_rate, to_rate, name):
        with pytest.raises(ValueError, match=f"`{name}`"):
            resample(tone(0.1, RATE), from_rate, to_rate)


class TestErrors:
    def test_missing_file_and_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="gone.wav"):
            load_audio(tmp_path / "gone.wav")
        with pytest.raises(IsADirectoryError, match=tmp_path.name):
            load_audio(str(tmp_path))

    @pytest.mark.parametrize("name", ["speech.wav", "speech.txt", "speech.raw", "speech.mp4"])
    def test_not_audio_names_the_file_and_the_formats(self, tmp_path, name):
        path = tmp_path / name
        path.write_bytes(b"\x00\x00\x00\x20ftypisom" + b"no audio here " * 100)
        with pytest.raises(ValueError, match=rf"{name} is not audio.*WAV, FLAC, OGG.*ffmpeg"):
            load_audio(path)

    def test_empty_file(self, tmp_path):
        (tmp_path / "empty.wav").touch()
        with pytest.raises(ValueError, match=r"empty.wav is empty \(0 bytes\)"):
            load_audio(tmp_path / "empty.wav")
        with pytest.raises(ValueError, match="0 bytes"):
            load_audio(b"")

    def test_no_samples(self, tmp_path):
        (tmp_path / "silent.wav").write_bytes(encode(np.zeros(0)))
        with pytest.raises(ValueError, match="silent.wav.*0 samples"):
            load_audio(tmp_path / "silent.wav")

    @pytest.mark.parametrize("kwargs", [{"format": "WAV"}, {"format": "FLAC"}, {"format": "MP3"}])
    @pytest.mark.parametrize("kept", [0.0015, 0.5, 0.8])
    def test_truncated(self, clip, tmp_path, kwargs, kept):
        content = encode(np.tile(clip["array"], 2), **kwargs)
        path = tmp_path / "cut.bin"
        path.write_bytes(content[: int(len(content) * kept)])
        with pytest.raises(ValueError, match="cut.bin.*truncated"):
            load_audio(path)

    def test_wav_written_to_a_pipe_is_not_truncated(self, clip):
        """ffmpeg cannot go back to write the sizes and leaves 0xFFFFFFFF."""
        content = bytearray(encode(clip["array"], subtype="PCM_16"))
        data = content.index(b"data")
        content[4:8] = content[data + 4 : data + 8] = b"\xff" * 4
        assert np.array_equal(load_audio(bytes(content)), clip["array"])

    def test_flac_written_to_a_pipe_is_not_truncated(self, clip):
        """The number of samples, 36 bits from the 13th byte after "fLaC" and its block's header, is 0."""
        content = bytearray(encode(clip["array"], format="FLAC"))
        content[21] &= 0xF0
        content[22:26] = bytes(4)
        assert np.array_equal(load_audio(bytes(content)), clip["array"])
        assert np.array_equal(load_audio(bytes(content), offset=0.5, duration=0.25), clip["array"][8000:12000])

    def test_nan_in_a_file(self, tmp_path):
        wave = tone(0.1, RATE)
        wave[7] = np.nan
        (tmp_path / "broken.wav").write_bytes(encode(wave, subtype="FLOAT"))
        with pytest.raises(ValueError, match="broken.wav.*NaN"):
            load_audio(tmp_path / "broken.wav")

    def test_forged_sampling_rate(self):
        """At 1 Hz this small file would become hours of audio."""
        content = bytearray(encode(np.zeros(100000), subtype="PCM_U8"))
        content[24:28] = (1).to_bytes(4, "little")
        with pytest.raises(ValueError, match="sampling rate"):
            load_audio(bytes(content))

    @pytest.mark.parametrize("uri", ["data:audio/wav,abc", "data:audio/wav;base64", "data:audio/wav;base64,a*b"])
    def test_bad_data_uri(self, uri):
        with pytest.raises(ValueError, match="data: URI"):
            load_audio(uri)

    @pytest.mark.parametrize(
        ("source", "error"),
        [
            (None, TypeError),
            (3.5, TypeError),
            (io.StringIO("text"), TypeError),
            ((RATE, np.zeros(100)), TypeError),
            ({}, ValueError),
            ({"array": np.zeros(100)}, ValueError),
            ({"path": None, "bytes": None}, ValueError),
            ((np.zeros(100), "16k"), ValueError),
            (np.zeros(0), ValueError),
            (np.zeros((100, 2)), ValueError),
        ],
        ids=[
            "None",
            "number",
            "text stream",
            "rate first",
            "empty dict",
            "no rate",
            "neither",
            "rate in words",
            "empty",
            "samples first",
        ],
    )
    def test_bad_sources(self, source, error):
        with pytest.raises(error):
            load_audio(source)

    @pytest.mark.parametrize("module", ["soundfile", "soxr"])
    def test_missing_package_says_what_to_install(self, clip, monkeypatch, module):
        def import_module(name, *args):
            if name == module:
                raise ImportError(name)
            return __import__(name)

        monkeypatch.setattr(importlib, "import_module", import_module)
        with pytest.raises(ImportError, match=f"needs {module}: `pip install"):
            load_audio(clip["path"], sampling_rate=8000)
        assert np.array_equal(load_audio(clip["array"]), clip["array"])  # neither is needed for this

    def test_module_loads_without_them(self, monkeypatch):
        """As remote code on a machine that has transformers only."""
        real_import = builtins.__import__

        def guarded(name, *args, **kwargs):
            if name.split(".")[0] in ("soundfile", "soxr"):
                raise ImportError(name)
            return real_import(name, *args, **kwargs)

        import mel_llm.audio_utils_mel_llm as module

        spec = importlib.util.spec_from_file_location("audio_utils_alone", module.__file__)
        alone = importlib.util.module_from_spec(spec)
        monkeypatch.setattr(builtins, "__import__", guarded)
        spec.loader.exec_module(alone)
        assert len(alone.to_mono_float([0.5, 0.25])) == 2


class TestToMonoFloat:
    def test_ranges_of_integers(self):
        assert to_mono_float(np.array([-(2**15), 0, 2**14], np.int16)).tolist() == [-1, 0, 0.5]
        assert to_mono_float(np.array([-(2**31), 0, 2**30], np.int32)).tolist() == [-1, 0, 0.5]
        assert to_mono_float(np.array([0, 128, 192], np.uint8)).tolist() == [-1, 0, 0.5]

    def test_numbers_of_a_list_are_taken_as_they_are(self):
        assert to_mono_float([0, 1, -1]).tolist() == [0, 1, -1]

    def test_float32_is_not_copied(self):
        wave = tone(0.1, RATE)
        assert to_mono_float(wave) is wave

    def test_errors_use_the_name(self):
        with pytest.raises(ValueError, match="`clips\\[3\\]` contains NaN"):
            to_mono_float(np.array([0, np.nan]), "clips[3]")
        with pytest.raises(TypeError, match="`voice` must be.*str"):
            to_mono_float("speech.wav", "voice")
