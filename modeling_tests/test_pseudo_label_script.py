"""scripts/pseudo_label.py: what it writes for recognisers of every kind, how sure it says they were, and interruptions."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, load_script
from test_registration import run
from transformers import (
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2Processor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

from mel_llm.training import SpeechSource, load_source, select_clips
from mel_llm.training.pseudo_labels import Labeler, PseudoLabels


SCRIPT = str(ROOT / "scripts" / "pseudo_label.py")

# Says how long a piece is, and takes its time
LISTENER = """
import time

def listen(audio, rate):
    assert rate == 16000
    time.sleep(0.05)
    return f"{len(audio)} samples"
"""


@pytest.fixture(scope="module")
def script():
    return load_script("pseudo_label")


@pytest.fixture
def speech(speech_clips, tmp_path):
    """Recordings without transcripts: short ones, one of 12 seconds, one at another rate, one that is no sound."""
    folder = tmp_path / "speech"
    (folder / "deep").mkdir(parents=True)
    for number, clip in enumerate(speech_clips[:4]):
        soundfile.write(folder / f"clip{number}.wav", clip["array"], 16000)
    pause = np.zeros(8000, np.float32)
    long = np.concatenate([part for clip in speech_clips[4:8] for part in (clip["array"], pause)])
    soundfile.write(folder / "deep" / "long.flac", long, 16000)
    soundfile.write(folder / "deep" / "other.wav", speech_clips[8]["array"], 22050)
    return str(folder)


def metadata(folder) -> list[dict]:
    with open(folder / "metadata.csv", newline="") as file:
        return list(csv.DictReader(file))


def labelled(script, *arguments):
    labels, rows = script.prepare([*arguments])
    return labels.run(rows)


@pytest.fixture(scope="module")
def whisper_folder(tmp_path_factory, tokenizer):
    """A tiny random one that writes this project's tokens."""
    folder = tmp_path_factory.mktemp("whisper")
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=len(tokenizer), num_mel_bins=80, d_model=32, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
        max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        suppress_tokens=None, begin_suppress_tokens=None, init_std=0.5,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    model.generation_config.max_new_tokens = 8
    model.generation_config.no_timestamps_token_id = len(tokenizer) - 1
    model.save_pretrained(folder)
    WhisperFeatureExtractor().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def ctc_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ctc")
    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *"abcdefghij"]
    (folder / "vocab.json").write_text(json.dumps({letter: number for number, letter in enumerate(letters)}))
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        vocab_size=len(letters), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        conv_dim=(16, 16), conv_stride=(10, 32), conv_kernel=(10, 32), num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2, pad_token_id=0, feat_extract_norm="layer", initializer_range=0.5,
    )  # fmt: skip
    Wav2Vec2ForCTC(config).save_pretrained(folder)
    tokenizer = Wav2Vec2CTCTokenizer(str(folder / "vocab.json"), pad_token="<pad>", word_delimiter_token="|")
    Wav2Vec2Processor(Wav2Vec2FeatureExtractor(return_attention_mask=True), tokenizer).save_pretrained(folder)
    return str(folder)


# --- who listens ----------------------------------------------------------------------------------------------------------


def test_the_confidence_is_that_of_the_tokens_chosen(tiny_folder, speech_clips):
    """Each clip's, whoever is beside it, as transformers would have it from all scores."""
    labeler = Labeler(tiny_folder, device="cpu")
    clips = [clip["array"] for clip in speech_clips[:3]]
    together = labeler(clips)
    model, processor = (
        AutoModelForSpeechSeq2Seq.from_pretrained(tiny_folder),
        AutoProcessor.from_pretrained(tiny_folder),
    )
    for clip, (text, confidence) in zip(clips, together, strict=True):
        output = model.generate(**processor(audio=[clip]), return_dict_in_generate=True, output_scores=True)
        # Greedily, the likeliest token is the one that is chosen
        likeliest = torch.stack([scores[0].log_softmax(-1).max() for scores in output.scores])
        assert len(likeliest) > 3 and confidence == pytest.approx(float(likeliest.mean()), abs=1e-3)
        assert text == processor.decode(output.sequences[0], return_format="transcription_only").strip()
        assert confidence < 0


def test_every_kind_of_recogniser(tiny_folder, whisper_folder, ctc_folder, speech_clips, tmp_path, monkeypatch):
    clips = [speech_clips[index]["array"] for index in (0, 7, 10)]
    for folder in (whisper_folder, ctc_folder):
        labeler = Labeler(folder, device="cpu")
        together, alone = labeler(clips), [labeler([clip])[0] for clip in clips]
        assert [text for text, _ in together] == [text for text, _ in alone]
        assert [value for _, value in together] == pytest.approx([value for _, value in alone], abs=1e-3)
        assert all(value < 0 for _, value in together) and any(text for text, _ in together)
        if folder == ctc_folder:  # the other one's tokenizer is not Whisper's, which the pipeline wants
            assert [text for text, _ in together] == [labeler.recognizer(clip, 16000).strip() for clip in clips]
    (tmp_path / "listener.py").write_text(LISTENER)
    monkeypatch.chdir(tmp_path)
    labeler = Labeler("python:listener.listen")
    assert labeler(clips[:1]) == [(f"{len(clips[0])} samples", None)] and not labeler.has_confidence


# --- what is written ------------------------------------------------------------------------------------------------------


def test_a_folder_that_can_be_trained_on(script, speech, ctc_folder, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = [
        "--data",
        speech,
        "--asr",
        ctc_folder,
        "--output_dir",
        str(output),
        "--max-seconds",
        "4",
        "--device",
        "cpu",
    ]
    summary = labelled(script, *arguments)
    rows = metadata(output)
    assert summary["recordings"] == 6 and summary["transcribed"] == summary["pieces"] > 8 and not summary["failed"]
    assert len(rows) == summary["kept"] and {row["recording"] for row in rows} >= {"clip0.wav", "deep/long.flac"}
    assert list(rows[0]) == ["file_name", "text", "duration", "confidence", "model", "speaker", "recording", "start"]
    assert all(row["text"] and float(row["confidence"]) < 0 for row in rows)
    assert {row["model"] for row in rows} == {os.path.basename(ctc_folder)}
    # The pieces are the sound, at the recogniser's rate
    of_long = [row for row in rows if row["recording"] == "deep/long.flac"]
    whole, _ = soundfile.read(os.path.join(speech, "deep/long.flac"), dtype="float32")
    for row in of_long:
        piece, rate = soundfile.read(output / row["file_name"], dtype="float32")
        start = round(float(row["start"]) * 16000)
        assert rate == 16000 and len(piece) / 16000 == pytest.approx(float(row["duration"]), abs=1e-3)
        assert np.abs(piece - whole[start : start + len(piece)]).max() < 1e-4
    data, seconds, report = select_clips(load_source(SpeechSource(str(output))), None)
    assert len(data) == len(rows) and sum(seconds) * 1 == pytest.approx(summary["kept_seconds"], abs=0.01)
    assert {row["model"] for row in rows} and not report.left_out

    # Again: nothing is transcribed; with a threshold, only the table is another
    before = (output / "metadata.csv").read_bytes()
    assert labelled(script, *arguments)["transcribed"] == 0 and (output / "metadata.csv").read_bytes() == before
    values = sorted(float(row["confidence"]) for row in rows)
    middle = values[len(values) // 2]
    summary = labelled(script, *arguments, "--min_confidence", str(middle))
    assert summary["transcribed"] == 0 and 0 < summary["kept"] < len(rows)
    assert {row["file_name"] for row in metadata(output)} == {
        row["file_name"] for row in rows if float(row["confidence"]) >= middle
    }

    # The other way round: what was not good enough had no file, and gets one
    other = tmp_path / "other"
    arguments[5] = str(other)
    labelled(script, *arguments, "--min_confidence", str(middle))
    files = set(other.rglob("*.flac"))
    assert len(files) == summary["kept"]
    assert labelled(script, *arguments)["transcribed"] == 0
    assert len(set(other.rglob("*.flac"))) == len(rows) and (other / "metadata.csv").read_bytes() == before


def test_recordings_can_stay_where_they_are(script, speech, ctc_folder, tmp_path):
    output = tmp_path / "out"
    common = ["--data", speech, "--asr", ctc_folder, "--max_seconds", "4", "--device", "cpu"]
    labelled(script, *common, "--output_dir", str(output), "--in_place")
    labelled(script, *common, "--output_dir", str(tmp_path / "copied"))
    assert not (output / "audio").exists()
    in_place, copied = (load_source(SpeechSource(str(folder))) for folder in (output, tmp_path / "copied"))
    assert in_place["text"] == copied["text"] and in_place["duration"] == copied["duration"]
    assert len(set(in_place["offset"])) > 1 and select_clips(in_place, None)[2].left_out == {}


def test_shards_are_all_of_it(script, speech, ctc_folder, tmp_path):
    recordings = []
    for number in (1, 2):
        output = tmp_path / f"out{number}"
        labelled(
            script, "--data", speech, "--asr", ctc_folder, "--output_dir", str(output), "--shard", f"{number}/2",
            "--device", "cpu",
        )  # fmt: skip
        recordings.append({row["recording"] for row in metadata(output)})
    assert not recordings[0] & recordings[1] and len(recordings[0] | recordings[1]) == 6


def test_what_cannot_be_read_is_told_and_the_rest_is_done(speech, tmp_path):
    (tmp_path / "listener.py").write_text(LISTENER)
    shutil.copy(ROOT / "modeling_tests" / "data" / "truncated.flac", os.path.join(speech, "cut.flac"))
    (tmp_path / "speech" / "none.wav").write_bytes(b"no sound")
    result = run(SCRIPT, "--data", speech, "--asr", "python:listener.listen", "--output_dir", "out", cwd=tmp_path)
    assert result.returncode == 1 and "1 recordings could not be read" in result.stderr and "none.wav" in result.stderr
    rows = metadata(tmp_path / "out")
    # A file that breaks off has what was there; nobody says how sure they were
    assert {row["recording"] for row in rows} == {
        *(f"clip{i}.wav" for i in range(4)),
        "deep/long.flac",
        "deep/other.wav",
        "cut.flac",
    }
    assert all(row["confidence"] == "" for row in rows)


def test_killed_and_started_again(script, speech, tmp_path, monkeypatch, capsys, caplog):
    (tmp_path / "listener.py").write_text(LISTENER)
    words = ["--data", speech, "--asr", "python:listener.listen", "--max_seconds", "2", "--batch_size", "1"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(tmp_path)])}
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *words, "--output_dir", "cut"],
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.DEVNULL,
    )
    journal = tmp_path / "cut" / "pseudo_labels.jsonl"
    waited = time.time() + 120
    while not journal.is_file() or journal.read_bytes().count(b"\n") < 4:
        assert time.time() < waited and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut" / "metadata.csv").exists()
    done = journal.read_bytes().count(b'"text"')
    with open(journal, "ab") as file:  # as a machine that lost its power may leave it
        file.write(b'{"recording": "clip0')
    monkeypatch.chdir(tmp_path)
    summary = labelled(script, *words, "--output_dir", "cut")
    labelled(script, *words, "--output_dir", "whole")
    assert f"Going on: {done} pieces" in capsys.readouterr().err + caplog.text
    total = len(metadata(tmp_path / "whole"))
    assert total > done >= 3 and summary["transcribed"] == total - done
    assert (tmp_path / "cut" / "metadata.csv").read_bytes() == (tmp_path / "whole" / "metadata.csv").read_bytes()
    files = [
        sorted(path.relative_to(tmp_path / name) for path in (tmp_path / name).rglob("*.flac"))
        for name in ("cut", "whole")
    ]
    assert files[0] == files[1] and len(files[0]) == total


# --- what is refused ------------------------------------------------------------------------------------------------------


class Silent(Labeler):
    def __init__(self):
        self.rate, self.max_seconds, self.has_confidence, self.description = 16000, 30.0, False, "silent"

    def __call__(self, clips):
        return [("a word", None)] * len(clips)


def test_nothing_is_overwritten(speech, tmp_path):
    rows = load_source(SpeechSource(speech), needs_text=False)
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="something else"):
        PseudoLabels(output, speech, {"model": "a"}, Silent())
    (output / "mine.txt").unlink()
    PseudoLabels(output, speech, {"model": "a"}, Silent()).run(rows)
    with pytest.raises(FileExistsError, match="another model"):
        PseudoLabels(output, speech, {"model": "b"}, Silent())
    with pytest.raises(FileExistsError, match="another max_seconds"):
        PseudoLabels(output, speech, {"model": "a"}, Silent(), max_seconds=10.0)
    with pytest.raises(ValueError, match="does not tell how sure"):
        PseudoLabels(output, speech, {"model": "a"}, Silent(), min_confidence=-1.0)
    # Who corrects a transcript keeps it
    table = output / "metadata.csv"
    table.write_text(table.read_text().replace("a word", "another word"))
    with pytest.raises(FileExistsError, match="edited by somebody"):
        PseudoLabels(output, speech, {"model": "a"}, Silent())


def test_a_recording_that_was_replaced_keeps_no_transcript(speech, tmp_path, speech_clips):
    rows = load_source(SpeechSource(speech), needs_text=False)
    for name in ("copied", "in_place"):
        options = {"in_place": name == "in_place"}
        PseudoLabels(tmp_path / name, speech, {}, Silent(), **options).run(rows)
    before = len(metadata(tmp_path / "copied"))
    soundfile.write(os.path.join(speech, "clip1.wav"), speech_clips[9]["array"], 16000)
    for name in ("copied", "in_place"):
        options = {"in_place": name == "in_place"}
        summary = PseudoLabels(tmp_path / name, speech, {}, Silent(), **options).run(rows)
        (why,) = summary["failed"].values()
        assert "has changed since it was transcribed" in why
        assert "clip1.wav" not in {row["recording"] for row in metadata(tmp_path / name)}
        assert len(metadata(tmp_path / name)) == before - 1


def test_stretches_that_begin_close_to_each_other_are_two(speech, tmp_path):
    audio = {"path": os.path.join(speech, "clip0.wav"), "bytes": None}
    rows = [
        {"audio": audio, "origin": audio["path"], "offset": start, "duration": 0.5} for start in (0.1234567, 0.1234568)
    ]
    labels = PseudoLabels(tmp_path / "out", speech, {}, Silent(), min_seconds=0.1)
    assert labels.run(rows)["pieces"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shard", "3/2"], "--shard must be I/N"),
        (["--max_seconds", "0.5"], "--max_seconds must be at least 1"),
        (["--dtype", "int8"], "--dtype must be"),
        (["--data", "nowhere/at/all/"], "nowhere/at/all"),
    ],
)
def test_arguments_that_do_not_fit(script, speech, tmp_path, arguments, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "listener.py").write_text(LISTENER)
    common = ["--data", speech, "--asr", "python:listener.listen", "--output_dir", "out"]
    with pytest.raises((ValueError, OSError), match=message):
        script.prepare([*common, *arguments])
    assert not (tmp_path / "out").exists()
