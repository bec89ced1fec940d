"""Evaluation of speech: distances against what they are by definition, judges from outside, runs that are resumed."""

import csv
import io
import json
import sys

import numpy as np
import pytest
import soundfile
import torch
from test_modeling_mel_llm_speech import build_speaking

from mel_llm import MelLLMFeatureExtractor, MelLLMVocoder, MelLLMVocoderConfig
from mel_llm.evaluation import (
    AudioFolder,
    CopySynthesis,
    MelDistance,
    ModelSpeech,
    ReferenceSpeech,
    SpeechEvaluation,
    Utterance,
    WordErrorRate,
    bootstrap_interval,
    choose_voices,
    cosine_similarity,
    load_mos,
    load_recognizer,
    load_speaker_encoder,
    load_utterances,
    make_judges,
    speech_table,
    summarize_speech,
)
from mel_llm.evaluation.mel_distance import mel_cepstra
from mel_llm.evaluation.plugins import describe_callable, describe_folder, load_callable
from mel_llm.evaluation.time_warping import time_warp


# --- time warping ---------------------------------------------------------------------------------------------------


def least_cost(first, second) -> float:
    """The plain recursion, cell by cell."""
    costs = np.linalg.norm(first[:, None] - second[None], axis=-1)
    sums = np.full(costs.shape, np.inf)
    for row in range(len(first)):
        for column in range(len(second)):
            before = [0.0] if row == column == 0 else []
            before += [sums[row - 1, column]] if row else []
            before += [sums[row, column - 1]] if column else []
            before += [sums[row - 1, column - 1]] if row and column else []
            sums[row, column] = costs[row, column] + min(before)
    return sums[-1, -1]


def assert_is_path(path, rows: int, columns: int) -> None:
    steps = np.diff(path, axis=0)
    assert path[0].tolist() == [0, 0] and path[-1].tolist() == [rows - 1, columns - 1]
    assert set(map(tuple, steps.tolist())) <= {(0, 1), (1, 0), (1, 1)}


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 7), (7, 1), (12, 12), (30, 9), (9, 30)])
def test_the_warped_path_is_the_cheapest(rows, columns):
    generator = np.random.default_rng(rows)
    first, second = generator.normal(size=(rows, 3)), generator.normal(size=(columns, 3))
    path = time_warp(first, second)
    assert_is_path(path, rows, columns)
    cost = np.linalg.norm(first[path[:, 0]] - second[path[:, 1]], axis=1).sum()
    assert cost == pytest.approx(least_cost(first, second), rel=1e-12)


@pytest.mark.parametrize(("rows", "columns"), [(400, 400), (400, 90), (90, 400), (2, 400), (400, 2)])
def test_a_band_bounds_the_memory_of_long_recordings(rows, columns):
    times = np.linspace(0, 1, rows)[:, None], np.linspace(0, 1, columns)[:, None]
    path = time_warp(*times, max_cells=4000)
    assert_is_path(path, rows, columns)
    assert np.abs(times[0][path[:, 0]] - times[1][path[:, 1]]).max() < 2.5 / min(rows, columns) + 1e-9


def test_time_warping_refuses_what_does_not_fit():
    for first, second in [((0, 3), (4, 3)), ((4, 3), (4, 2)), ((4,), (4,))]:
        with pytest.raises(ValueError, match="same size"):
            time_warp(np.zeros(first), np.zeros(second))


# --- mel distances --------------------------------------------------------------------------------------------------


def test_distortion_is_the_spectral_difference_in_decibels():
    """Of log power spectra that differ by a cosine, the cepstra see the root mean square in dB; and not the loudness."""
    bins = (np.arange(80) + 0.5) * np.pi / 80
    difference = 0.7 * np.cos(3 * bins) + 5.0
    cepstra = mel_cepstra(difference[None])[0]
    decibels = 10 / np.log(10) * 0.7 * np.cos(3 * bins)
    assert 10 / np.log(10) * np.sqrt(2 * np.square(cepstra).sum()) == pytest.approx(
        np.sqrt(np.square(decibels).mean()), rel=1e-9
    )


def test_mel_distances(speech_clips):
    audio = speech_clips[0]["array"]
    distance = MelDistance(np.full(80, 2.0))
    assert distance(audio, audio) == {"mcd": 0.0, "mel_l1": 0.0}
    noise = np.random.default_rng(0).standard_normal(len(audio)).astype(np.float32)
    little, much = (distance(audio + level * noise, audio) for level in (1e-3, 1e-2))
    assert 0 < little["mcd"] < much["mcd"] and 0 < little["mel_l1"] < much["mel_l1"]
    # In deviations: half of them if deviations are twice as large
    assert MelDistance(np.full(80, 4.0))(audio + 1e-2 * noise, audio)["mel_l1"] == pytest.approx(much["mel_l1"] / 2)
    # A pause in between costs little where the frames are warped, and the other recording far more
    pause = np.concatenate([audio[:8000], audio[8000:8160].repeat(10), audio[8000:]])
    other = speech_clips[1]["array"]
    assert distance(pause, audio)["mcd"] < 0.5 * distance(other, audio)["mcd"]
    with pytest.raises(ValueError, match="80 numbers"):
        MelDistance(np.ones(40))


# --- intervals ------------------------------------------------------------------------------------------------------


def test_bootstrap_intervals():
    values = np.random.default_rng(1).normal(3.0, 2.0, size=400)
    low, high = bootstrap_interval(values, num_samples=4000)
    error = values.std() / 20
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)
    assert (
        bootstrap_interval(values, seed=5) == bootstrap_interval(values, seed=5) != bootstrap_interval(values, seed=6)
    )
    # A ratio of sums: utterances with all the words decide
    low, high = bootstrap_interval([0, 10, 0], [100, 100, 100])
    assert 0 <= low < high <= 0.1
    assert bootstrap_interval([1.0]) is None and bootstrap_interval([0, 0], [0, 0]) is None
    with pytest.raises(ValueError, match="As many"):
        bootstrap_interval([1, 2], [1])
    with pytest.raises(ValueError, match="level"):
        bootstrap_interval([1, 2], level=1.5)


# --- what is spoken -------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(speech_clips, tmp_path):
    """Six short recordings with transcripts, as a split."""
    place = tmp_path / "speech" / "validation"
    place.mkdir(parents=True)
    clips = sorted(speech_clips, key=lambda clip: len(clip["array"]))[:6]
    with open(place / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "text"])
        for index, clip in enumerate(clips):
            soundfile.write(place / f"clip{index}.wav", clip["array"], 16000)
            writer.writerow([f"clip{index}.wav", clip["text"]])
    return place.parent


def test_texts_from_files(tmp_path):
    (tmp_path / "texts.txt").write_text("First one.\n\n  Third line. \n", encoding="utf-8")
    assert load_utterances(str(tmp_path / "texts.txt")) == [
        Utterance("0001", "First one."),
        Utterance("0003", "Third line."),
    ]
    (tmp_path / "texts.csv").write_text('id,sentence\na/b,"One, two."\nc,Three.\n', encoding="utf-8")
    assert load_utterances(str(tmp_path / "texts.csv")) == [Utterance("a_b", "One, two."), Utterance("c", "Three.")]
    (tmp_path / "texts.json").write_text(json.dumps([{"text": "One."}, {"text": ""}, {"text": "Two."}]))
    assert [(item.id, item.text) for item in load_utterances(str(tmp_path / "texts.json"))] == [
        ("0001", "One."),
        ("0003", "Two."),
    ]
    (tmp_path / "twice.tsv").write_text("id\ttext\na\tOne.\na\tTwo.\n")
    with pytest.raises(ValueError, match="two rows have the id 'a'"):
        load_utterances(str(tmp_path / "twice.tsv"))
    (tmp_path / "other.csv").write_text("said\nOne.\n")
    with pytest.raises(ValueError, match="text_column"):
        load_utterances(str(tmp_path / "other.csv"))
    assert load_utterances(f"{tmp_path / 'other.csv'},text_column=said")[0].text == "One."
    (tmp_path / "none.txt").write_text("\n")
    with pytest.raises(ValueError, match="no text"):
        load_utterances(str(tmp_path / "none.txt"))
    with pytest.raises(FileNotFoundError):
        load_utterances(str(tmp_path / "nothing.txt"))


def test_recordings_with_and_without_transcripts(folder, tmp_path):
    utterances = load_utterances(str(folder))
    assert [utterance.id for utterance in utterances] == [f"clip{index}" for index in range(6)]
    assert all(utterance.text and utterance.has_recording for utterance in utterances)
    audio, _ = soundfile.read(folder / "validation" / "clip2.wav", dtype="float32")
    np.testing.assert_array_equal(utterances[2].load(16000), audio)

    loose = tmp_path / "loose"  # no splits, no transcripts, the same name twice
    for place in ("a", "b"):
        (loose / place).mkdir(parents=True)
        soundfile.write(loose / place / "x.wav", audio, 16000)
    assert [(item.id, item.text) for item in load_utterances(str(loose))] == [("00000_x", ""), ("00001_x", "")]
    (loose / "b" / "x.wav").write_bytes(b"no audio")
    with pytest.raises(ValueError, match=r"x\.wav"):
        load_utterances(str(loose))
    with pytest.raises(ValueError, match="cannot stream"):
        load_utterances("some/dataset,streaming=true")
    with pytest.raises(FileNotFoundError, match="no split 'test'"):
        load_utterances(f"{folder},split=test")


def test_voices(folder, tmp_path):
    utterances = load_utterances(str(folder))
    assert choose_voices(utterances) == [None] * 6
    assert [voice.name for voice in choose_voices(utterances, "reference")] == [item.id for item in utterances]
    previous = choose_voices(utterances, "previous")
    assert [voice.name for voice in previous] == ["clip5", "clip0", "clip1", "clip2", "clip3", "clip4"]
    assert previous[1].text == utterances[0].text and np.array_equal(
        previous[1].load(16000), utterances[0].load(16000)
    )
    file = str(folder / "validation" / "clip0.wav")
    assert choose_voices(utterances, file, "What it says.")[0].text == "What it says."
    with pytest.raises(ValueError, match="word for word"):
        choose_voices(utterances, file)
    assert choose_voices(utterances, file, needs_text=False)[3].name == "clip0.wav"
    with pytest.raises(FileNotFoundError, match="no 'nowhere'"):
        choose_voices(utterances, "nowhere")
    with pytest.raises(ValueError, match="0001 has no recording"):
        choose_voices([Utterance("0001", "One.")], "reference")
    with pytest.raises(ValueError, match="--voice_text is for a file"):
        choose_voices(utterances, "previous", "text")


# --- who listens ----------------------------------------------------------------------------------------------------


def test_judges_from_outside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = tmp_path / "outside_judge.py"
    module.write_text(
        "def listen(audio, rate):\n    return f'{len(audio)} at {rate}'\n\n"
        "class Judge:\n    def __call__(self, audio, rate):\n        return 1.5\n\nnumber = 3\n"
    )
    assert load_recognizer("python:outside_judge.listen")(np.zeros(5), 8000) == "5 at 8000"
    assert load_mos("python:outside_judge.Judge")(np.zeros(5), 8000) == 1.5
    assert str(tmp_path) not in sys.path
    described = describe_callable(load_callable("python:outside_judge.listen", "--asr"))
    assert described.startswith("outside_judge.listen ")
    module.write_text(module.read_text() + "# another state\n")
    assert describe_callable(load_callable("python:outside_judge.listen", "--asr")) != described
    for spec, error, message in [
        ("python:outside_judge.nobody", ValueError, "has no 'nobody'"),
        ("python:outside_judge.number", ValueError, "cannot be called"),
        ("python:listen", ValueError, "write python:module.function"),
        ("python:no_such_module.listen", ImportError, "--asr python:no_such_module.listen"),
    ]:
        with pytest.raises(error, match=message):
            load_recognizer(spec)
    with pytest.raises(ValueError, match="choose its language itself"):
        load_recognizer("python:outside_judge.listen", language="en")
    with pytest.raises(ValueError, match="--mos must be dnsmos"):
        load_mos("nisqa")
    with pytest.raises(ValueError, match="--speaker_encoder must be resemblyzer"):
        load_speaker_encoder("wavlm")


def test_what_is_not_installed_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "resemblyzer", None)
    monkeypatch.setitem(sys.modules, "speechmos", None)
    with pytest.raises(ImportError, match="--no-deps resemblyzer"):
        load_speaker_encoder("resemblyzer")
    with pytest.raises(ImportError, match="tts-eval"):
        load_mos("dnsmos")


def test_our_own_model_listens(tiny_folder, speech_clips):
    from transformers import pipeline

    audio = speech_clips[0]["array"]
    recognizer = load_recognizer(tiny_folder, device="cpu")
    expected = pipeline("automatic-speech-recognition", model=tiny_folder)(audio)["text"]
    assert recognizer(audio, 16000).strip() == expected.strip()
    louder = np.repeat(audio, 2)  # any rate
    assert isinstance(recognizer(louder, 32000), str)
    assert tiny_folder in recognizer.description


def test_any_model_of_the_pipeline_listens(tmp_path):
    """A tiny wav2vec 2.0 with CTC, on half a second and on more than a window."""
    from transformers import (
        Wav2Vec2Config,
        Wav2Vec2CTCTokenizer,
        Wav2Vec2FeatureExtractor,
        Wav2Vec2ForCTC,
        pipeline,
    )

    (tmp_path / "vocab.json").write_text(json.dumps({"<pad>": 0, "<unk>": 1, "|": 2, "a": 3, "b": 4}))
    tokenizer = Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"), pad_token="<pad>", unk_token="<unk>")
    config = Wav2Vec2Config(
        vocab_size=5,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=(8, 8),
        conv_stride=(20, 16),
        conv_kernel=(20, 16),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    torch.manual_seed(0)
    folder = tmp_path / "ctc"
    for part in (Wav2Vec2ForCTC(config), tokenizer, Wav2Vec2FeatureExtractor()):
        part.save_pretrained(folder)
    recognizer = load_recognizer(str(folder), device="cpu")
    noise = np.random.default_rng(0).standard_normal(31 * 16000).astype(np.float32)
    plain = pipeline("automatic-speech-recognition", model=str(folder), device="cpu")
    assert recognizer(noise[:8000], 16000) == plain(noise[:8000])["text"] != ""
    windows = plain(noise, chunk_length_s=30.0, stride_length_s=5.0)["text"]
    assert recognizer(noise, 16000) == windows
    with pytest.raises(ValueError, match="cannot be told a language"):
        load_recognizer(str(folder), language="en", device="cpu")


def test_judges_are_tried_before_the_work():
    texts = [Utterance("0001", "One.")]

    def fails(audio, rate):
        raise RuntimeError("no weights")

    with pytest.raises(ValueError, match=r"recogniser .*fails \w+ fails: RuntimeError: no weights"):
        make_judges(texts, recognizer=fails)
    with pytest.raises(ValueError, match="must return a text, got int"):
        make_judges(texts, recognizer=lambda audio, rate: 3)
    with pytest.raises(ValueError, match="must return a number or a dict of numbers, got str"):
        make_judges(texts, mos=lambda audio, rate: "good")
    with pytest.raises(ValueError, match="must return a vector"):
        make_judges(texts, speaker_encoder=lambda audio, rate: 0.5)
    assert make_judges(texts) == []  # nothing to compare with


def test_cosines():
    assert cosine_similarity([1.0, 0.0], [2.0, 0.0]) == 1.0
    assert cosine_similarity([1.0, 1.0], [1.0, 0.0]) == pytest.approx(np.sqrt(0.5))
    for bad in ([0.0, 0.0], [np.nan, 1.0], [1.0, 0.0, 0.0]):
        with pytest.raises(ValueError):
            cosine_similarity([1.0, 0.0], bad)


@pytest.mark.slow
def test_packages_with_their_own_weights(speech_clips):
    pytest.importorskip(
        "resemblyzer", reason="resemblyzer is not installed (extra tts-eval, and --no-deps resemblyzer)"
    )
    pytest.importorskip("speechmos.dnsmos", reason="speechmos is not installed (extra tts-eval)")
    encoder, mos = load_speaker_encoder("resemblyzer", device="cpu"), load_mos("dnsmos")
    audio = speech_clips[0]["array"]
    noise = 0.1 * np.random.default_rng(0).standard_normal(len(audio)).astype(np.float32)
    same = cosine_similarity(encoder(audio, 16000), encoder(speech_clips[1]["array"], 16000))
    assert same > cosine_similarity(encoder(audio, 16000), encoder(noise, 16000)) + 0.1
    assert mos(audio, 16000)["ovrl"] > 2 > mos(noise, 16000)["ovrl"]
    with pytest.raises(ValueError, match="silent"):
        encoder(np.zeros(16000, np.float32), 16000)


# --- the whole ------------------------------------------------------------------------------------------------------


class Judges:
    """Judges that know what they hear by its length, and count how often they are asked."""

    def __init__(self, utterances):
        self.texts = {len(item.load(16000)): item.text for item in utterances if item.has_recording}
        self.calls = {"asr": 0, "speaker": 0, "mos": 0}

    def listen(self, audio, rate):
        self.calls["asr"] += 1
        nearest = min(self.texts, key=lambda length: abs(length - len(audio)), default=None)
        return self.texts[nearest] if nearest and abs(nearest - len(audio)) <= 160 else "something else"

    def embed(self, audio, rate):
        self.calls["speaker"] += 1
        return np.abs(np.fft.rfft(audio, 512))[:64]

    def rate(self, audio, rate):
        self.calls["mos"] += 1
        return {"ovrl": 1 + float(np.abs(audio).mean())}

    def all(self, utterances):
        return make_judges(utterances, self.listen, self.embed, self.rate)


@pytest.fixture(scope="module")
def speaking(tokenizer):
    return build_speaking(tokenizer)


def griffin_lim(name="copy", iterations=2):
    extractor = MelLLMFeatureExtractor.from_preset("phi4", edge_padding=120)
    return CopySynthesis(
        MelLLMVocoder(MelLLMVocoderConfig.from_feature_extractor(extractor, num_iterations=iterations)), name
    )


def test_one_table_for_people_vocoders_files_and_models(folder, speaking, tmp_path):
    utterances = load_utterances(str(folder))
    spoken = tmp_path / "spoken"
    spoken.mkdir()
    for utterance in utterances:  # another rate, and half as loud
        soundfile.write(spoken / f"{utterance.id}.flac", 0.5 * utterance.load(24000), 24000)
    judges = Judges(utterances)
    model, processor = speaking
    systems = [
        ReferenceSpeech(),
        griffin_lim(),
        AudioFolder(str(spoken), "files"),
        ModelSpeech(model, processor, "model", max_seconds=0.3, stop_threshold=1.0),
    ]
    voices = choose_voices(utterances, "previous")
    evaluation = SpeechEvaluation(utterances, voices, systems, judges.all(utterances), tmp_path / "out", batch_size=4)
    summaries = [summarize_speech(result) for result in evaluation.run()]
    natural, copy, files, spoken_by_model = (summary["totals"] for summary in summaries)

    assert natural["wer"]["value"] == copy["wer"]["value"] == files["wer"]["value"] == 0
    assert not {"mcd", "duration_ratio", "rtfx", "guarded"} & natural.keys()  # compared with itself
    assert natural["similarity"]["value"] < 1  # of different recordings
    assert 0 < files["mcd"]["value"] < spoken_by_model["mcd"]["value"]
    assert 0 < copy["mel_l1"]["value"] < spoken_by_model["mel_l1"]["value"]
    assert files["duration_ratio"]["value"] == pytest.approx(1.0, abs=0.01)
    assert files["mos_ovrl"]["value"] < natural["mos_ovrl"]["value"]
    assert spoken_by_model["guarded"]["value"] == 1.0 and copy["rtfx"]["threads"] == [torch.get_num_threads()]
    assert "rtfx" not in files

    row = summaries[3]["utterances"][2]
    wav, rate = soundfile.read(tmp_path / "out" / summaries[3]["folder"] / f"{row['id']}.wav")
    assert rate == 16000 and len(wav) / rate == row["audio"]["seconds"] == pytest.approx(0.32)
    assert row["voice"] == row["to"] == "clip1" and row["audio"]["stopped"] is False
    assert row["duration_ratio"] == pytest.approx(len(wav) / len(utterances[2].load(16000)))
    expected = WordErrorRate().compute(
        predictions=[item["transcript"] for item in summaries[3]["utterances"]],
        references=[item.text for item in utterances],
    )
    assert spoken_by_model["wer"]["value"] == expected["wer"] > 0
    assert spoken_by_model["wer"]["low"] <= expected["wer"] <= spoken_by_model["wer"]["high"]

    table = speech_table(summaries)
    lines = table.splitlines()
    assert len(lines) == 6 and len({line.count("|") for line in lines}) == 1
    assert lines[0].startswith("| system | utterances | WER, % | CER, % | speaker similarity | MOS ovrl | MCD, dB |")
    assert lines[2].startswith("| natural speech | 6 | 0.0 (0.0–0.0)")


def test_nothing_is_done_twice(folder, speaking, tmp_path, monkeypatch):
    utterances = load_utterances(str(folder))[:4]
    model, processor = speaking
    spoken = []
    generate = type(model).generate
    monkeypatch.setattr(
        type(model),
        "generate",
        lambda self, *args, **kwargs: spoken.append(len(kwargs["input_ids"])) or generate(self, *args, **kwargs),
    )
    judges = Judges(utterances)

    def run(asked=None, seed=0, **options):
        system = ModelSpeech(model, processor, "model", seed=seed, max_seconds=0.2, stop_threshold=1.0)
        system._is_warm = True
        before = dict(judges.calls)
        spoken.clear()
        evaluation = SpeechEvaluation(
            utterances,
            [None] * 4,
            [system],
            asked or judges.all(utterances),
            tmp_path / "out",
            batch_size=2,
            **options,
        )
        probes = 0 if asked else 1
        (result,) = evaluation.run()
        calls = {name: count - before[name] - probes for name, count in judges.calls.items()}
        return summarize_speech(result), calls, sum(spoken)

    # Interrupted at the third utterance
    broken = judges.all(utterances)
    score = broken[0].score

    def interrupted(audio, utterance, voice):
        if judges.calls["asr"] == 3:
            raise KeyboardInterrupt
        return score(audio, utterance, voice)

    broken[0].score = interrupted
    with pytest.raises(KeyboardInterrupt):
        run(broken)
    summary, calls, num_spoken = run()
    assert num_spoken == 0 and calls["asr"] == 2  # all were spoken, two of them were heard
    whole = summary["totals"]
    first = {path.name: path.read_bytes() for path in (tmp_path / "out" / summary["folder"]).glob("*.wav")}
    assert len(first) == 4

    again, calls, num_spoken = run()
    assert num_spoken == 0 and calls == {"asr": 0, "speaker": 0, "mos": 0}
    assert again["totals"] == whole

    # Another judge beside the same others: only that one listens; and the first one's scores are still there
    def other(audio, rate):
        return "nothing"

    changed = [judge for judge in judges.all(utterances) if judge.name != "asr"]
    changed += [judge for judge in make_judges(utterances, other, mel_distance=False)]
    summary, calls, num_spoken = run(changed)
    assert num_spoken == 0 and not any(calls.values()) and summary["totals"]["wer"]["value"] == 1.0
    assert run()[0]["totals"] == whole

    # Sound that somebody replaced is spoken again, and is what it was
    victim = tmp_path / "out" / summary["folder"] / "clip1.wav"
    soundfile.write(victim, np.zeros(100), 16000)
    _, calls, num_spoken = run()
    assert num_spoken == 1 and calls["asr"] == 1
    sound, before = soundfile.read(victim)[0], soundfile.read(io.BytesIO(first["clip1.wav"]))[0]
    assert np.abs(sound - before).max() < 2e-3 * np.abs(before).max()  # alone now, and before in a batch
    first["clip1.wav"] = victim.read_bytes()

    # Another seed goes elsewhere
    other_seed, _, num_spoken = run(seed=1)
    assert num_spoken == 4 and other_seed["folder"] != summary["folder"]
    assert victim.read_bytes() == first["clip1.wav"]
    # Without sound there are the same scores, and they are enough
    light = tmp_path / "out" / other_seed["folder"]
    before = other_seed["totals"]
    run(seed=1, keep_audio=False)
    assert not list(light.glob("*.wav")) and not list(light.glob(".partial*"))
    summary, calls, num_spoken = run(seed=1, keep_audio=False)
    assert num_spoken == 0 and not any(calls.values()) and summary["totals"]["mcd"] == before["mcd"]

    utterances[0] = Utterance("clip0", "Another text.", utterances[0].source, utterances[0].index)
    with pytest.raises(FileExistsError, match="other texts"):
        run()


def test_a_recording_that_changes_is_copied_and_compared_anew(folder, tmp_path):
    utterances = load_utterances(str(folder))[:2]
    asked = []
    judge = make_judges(utterances, mos=lambda audio, rate: asked.append(len(audio)) or 1.0)

    def run():
        asked.clear()
        systems = [ReferenceSpeech(), griffin_lim()]
        evaluation = SpeechEvaluation(load_utterances(str(folder))[:2], [None] * 2, systems, judge, tmp_path / "out")
        return [summarize_speech(result) for result in evaluation.run()][1]["utterances"]

    first = run()
    assert len(asked) == 4
    assert run() == first and not asked
    longer = np.concatenate([utterances[0].load(16000), utterances[1].load(16000)])
    soundfile.write(folder / "validation" / "clip0.wav", longer, 16000)
    second = run()
    assert len(asked) == 2 and asked[0] == len(longer) and abs(asked[1] - len(longer)) < 160
    assert second[0]["reference_seconds"] == len(longer) / 16000 and second[1] == first[1]
    assert second[0]["mcd"] != first[0]["mcd"]


def test_one_utterance_that_fails_costs_no_other(speaking, tmp_path, monkeypatch):
    model, processor = speaking
    texts = ["Please try again.", "Not this one.", "Good bye to you."]
    utterances = [Utterance(str(index), text) for index, text in enumerate(texts)]
    request = type(processor).apply_speech_request

    def refuse(self, text, **kwargs):
        if "Not this one." in text:
            raise ValueError("too long")
        return request(self, text, **kwargs)

    monkeypatch.setattr(type(processor), "apply_speech_request", refuse)

    def listen(audio, rate):
        if listen.fails and np.abs(audio).max() > 0.05:
            raise RuntimeError("overrun")
        return "please try again"

    listen.fails = False
    judges = make_judges(utterances, listen)
    system = ModelSpeech(model, processor, "model", max_seconds=0.2)
    (result,) = SpeechEvaluation(utterances, [None] * 3, [system], judges, tmp_path / "out").run()
    summary = summarize_speech(result)
    assert summary["failed"] == ["1"] and "too long" in summary["utterances"][1]["error"]
    assert summary["totals"]["wer"]["utterances"] == 2 and "3, 1 failed" in speech_table([summary])

    monkeypatch.setattr(type(processor), "apply_speech_request", request)
    (result,) = SpeechEvaluation(utterances, [None] * 3, [system], judges, tmp_path / "out").run()
    assert summarize_speech(result)["failed"] == []  # tried again

    def refuse_all(audio, rate):
        if len(audio) != 16000:  # but for the second of noise with which it is tried
            raise RuntimeError("overrun")
        return ""

    (result,) = SpeechEvaluation(
        utterances, [None] * 3, [system], make_judges(utterances, refuse_all), tmp_path / "out"
    ).run()
    summary = summarize_speech(result)
    assert summary["failed"] == ["0", "1", "2"] and "wer" not in summary["totals"]
    assert "overrun" in summary["utterances"][0]["judge_errors"]["asr"]


def test_speech_does_not_depend_on_the_batch_and_long_texts_are_spoken_whole(speaking, tmp_path):
    model, processor = speaking
    long = "You have reached a number that is not in service. " * 8  # two pieces of up to 200 characters
    texts = ["Please try again.", long.strip(), "Yes."]
    utterances = [Utterance(str(index), text) for index, text in enumerate(texts)]

    def seconds(batch_size):
        system = ModelSpeech(model, processor, "model", max_seconds=0.2, min_seconds=0.2, stop_threshold=1.0, seed=2)
        evaluation = SpeechEvaluation(
            utterances, [None] * 3, [system], [], tmp_path / f"out{batch_size}", batch_size=batch_size
        )
        (result,) = evaluation.run()
        folder = tmp_path / f"out{batch_size}" / result["folder"]
        return result, [soundfile.read(folder / f"{index}.wav")[0] for index in range(3)]

    (result, alone), (_, together) = seconds(1), seconds(3)
    for one, other in zip(alone, together, strict=True):
        assert len(one) == len(other) and np.abs(one - other).max() < 2e-3 * np.abs(other).max() + 1e-4
    pieces = len(alone[1]) / 16000 / (0.2 + 0.15)  # with the pause behind each
    assert pieces == pytest.approx(round(pieces)) and pieces >= 2
    assert [row["audio"]["stopped"] for row in result["utterances"]] == [False, False, False]


def test_what_is_missing_is_told_before_the_work(folder, speaking, tokenizer, tmp_path):
    utterances = load_utterances(str(folder))
    texts = [Utterance("0001", "One more time.")]
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="nothing to evaluate"):
        SpeechEvaluation(texts, [None], [], [], out)
    for system, message in [(ReferenceSpeech(), "--reference needs"), (griffin_lim(), "--copy_synthesis needs")]:
        with pytest.raises(ValueError, match=f"{message} recordings; 1 of 1 texts have none"):
            SpeechEvaluation(texts, [None], [system], [], out)
    (folder / "some").mkdir()
    with pytest.raises(ValueError, match=r"6 of 6 utterances have no file there; expected clip0\.wav"):
        SpeechEvaluation(utterances, [None] * 6, [AudioFolder(str(folder / "some"))], [], out)
    with pytest.raises(FileNotFoundError, match="no folder"):
        AudioFolder("nowhere")
    with pytest.raises(ValueError, match="named twice"):
        SpeechEvaluation(utterances, [None] * 6, [griffin_lim(), griffin_lim()], [], out)
    model, processor = speaking
    with pytest.raises(ValueError, match="0002 cannot be spoken"):
        SpeechEvaluation([*texts, Utterance("0002", "...")], [None] * 2, [ModelSpeech(model, processor, "m")], [], out)
    silent, _ = build_speaking(tokenizer, vocoder=False)
    with pytest.raises(ValueError, match="has no vocoder"):
        ModelSpeech(silent, processor, "m")
    assert not out.exists()


def test_a_model_that_was_trained_on_is_another(tmp_path):
    (tmp_path / "weights").write_bytes(b"1")
    before = describe_folder(str(tmp_path))
    assert describe_folder(str(tmp_path)) == before
    (tmp_path / "weights").write_bytes(b"22")
    assert describe_folder(str(tmp_path)) != before
    assert describe_folder("some/hub-name") == "some/hub-name"
