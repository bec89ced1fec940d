"""scripts/evaluate_asr.py as a user runs it: with peers, again, interrupted, on the leaderboard's sets, on bad input."""

import json
import os
import shutil

import jiwer
import numpy as np
import pytest
import soundfile
import torch
import transformers
import yaml
from conftest import ROOT, build_tiny, load_script
from safetensors.torch import load_file, save_file
from test_registration import run
from test_training_data import write_folder
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor, pipeline

import mel_llm
from mel_llm import create_model_card
from mel_llm.evaluation import ClipEvaluation, get_text_normalizer, load_clip_set, make_transcriber
from mel_llm.evaluation.clip_systems import ClipSystem
from mel_llm.evaluation.open_asr import BENCHMARKS, eval_results


SCRIPT = str(ROOT / "scripts" / "evaluate_asr.py")


@pytest.fixture(scope="module")
def script():
    return load_script("evaluate_asr")


@pytest.fixture(scope="module")
def folder(speech_clips, tmp_path_factory):
    """Six recordings as an audiofolder with two splits."""
    place = tmp_path_factory.mktemp("data") / "speech"
    write_folder(place / "test", speech_clips[:5])
    write_folder(place / "train", speech_clips[5:7])
    return place


@pytest.fixture(scope="module")
def whisper_folder(tmp_path_factory) -> str:
    """A tiny Whisper with random weights, whose tokens are bytes."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    place = tmp_path_factory.mktemp("peers") / "whisper"
    vocab = {letter: index for index, letter in enumerate(bytes_to_unicode().values())}
    tokenizer = transformers.WhisperTokenizer(vocab={**vocab, "<|endoftext|>": 256}, merges=[])
    tokenizer.add_tokens(["<|startoftranscript|>", "<|notimestamps|>", "<|0.00|>"], special_tokens=True)
    ids = {"eos_token_id": 256, "pad_token_id": 256, "bos_token_id": 256, "decoder_start_token_id": 257}
    transformers.set_seed(0)
    config = transformers.WhisperConfig(
        vocab_size=260, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, d_model=16, max_target_positions=32, init_std=0.5,
        begin_suppress_tokens=None, **ids,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config)
    model.generation_config = transformers.GenerationConfig(max_length=12, no_timestamps_token_id=258, **ids)
    model.save_pretrained(place)
    transformers.WhisperProcessor(transformers.WhisperFeatureExtractor(), tokenizer).save_pretrained(place)
    return str(place)


@pytest.fixture(scope="module")
def wav2vec2_folder(tmp_path_factory) -> str:
    """A tiny model with CTC and random weights, whose tokens are letters."""
    place = tmp_path_factory.mktemp("peers") / "wav2vec2"
    place.mkdir()
    tokens = ["<pad>", "<s>", "</s>", "<unk>", "|", *"abcdefghijklmnopqrstuvwxyz'"]
    (place / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    transformers.set_seed(0)
    config = transformers.Wav2Vec2Config(
        vocab_size=len(tokens), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        conv_dim=(8, 8, 8), conv_kernel=(10, 8, 8), conv_stride=(5, 8, 8), num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2, feat_extract_norm="layer", initializer_range=0.5,
    )  # fmt: skip
    transformers.Wav2Vec2ForCTC(config).save_pretrained(place)
    extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    tokenizer = transformers.Wav2Vec2CTCTokenizer(str(place / "vocab.json"))
    transformers.Wav2Vec2Processor(extractor, tokenizer).save_pretrained(place)
    return str(place)


def words(output, *more) -> list[str]:
    return ["--output_dir", str(output), "--device", "cpu", "--bootstrap_samples", "50", *map(str, more)]


def evaluate(script, *arguments):
    """The results, and whether all went well."""
    evaluation, parsed, *more = script.prepare(list(arguments))
    is_complete = script.report(evaluation.run(), evaluation, parsed, *more)
    path = parsed.output_dir
    with open(f"{path}/results.json", encoding="utf-8") as file:
        return json.load(file), is_complete


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- a run ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_command_and_the_same_again(
    script, folder, tiny_folder, whisper_folder, wav2vec2_folder, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    argv = words(out, "--data", folder, "--model", tiny_folder, "--peer", whisper_folder, wav2vec2_folder)
    argv += ["--batch-size", "2", "--max_new_tokens", "6"]
    first = run(SCRIPT, *argv)
    assert first.returncode == 0, first.stderr
    assert "speech test: 5 clips" in first.stderr
    table = first.stdout.splitlines()
    assert len(table) == 5 and "speech test (5 clips), WER %" in table[0] and f"speed / {whisper_folder}" in table[0]
    assert table[3].startswith(f"| {whisper_folder} |") and table[3].endswith("| 1.00 |")

    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert f"--model {tiny_folder}" in results["environment"]["command"] and results["normalizer"] == "whisper"
    assert (out / "results.md").read_text(encoding="utf-8").endswith(first.stdout)
    normalize = get_text_normalizer("whisper")
    for model in results["models"]:
        (raw,) = (out / model["folder"]).glob("MODEL_*_DATASET_speech-*_test.jsonl")
        lines = lines_of(raw)
        assert [line["audio_filepath"] for line in lines] == ["00", "01", "02", "03", "04"]
        assert all(line.keys() >= {"duration", "time", "text", "pred_text"} for line in lines)
        totals = model["sets"][0]["totals"]
        texts = ([normalize(line[key]) for line in lines] for key in ("text", "pred_text"))
        assert totals["wer"]["value"] == pytest.approx(jiwer.wer(*texts))
        assert totals["rtfx"]["value"] == pytest.approx(
            sum(line["duration"] for line in lines) / sum(line["time"] for line in lines)
        )
        assert model["speed_ratio"] == pytest.approx(model["rtfx"]["value"] / results["models"][1]["rtfx"]["value"])
        assert model["num_parameters"] > 1000
    assert [model["is_peer"] for model in results["models"]] == [False, True, True]

    # Again: no model is loaded; with other rules it is scored anew
    monkeypatch.setattr("mel_llm.evaluation.clip_systems.ModelSystem.load", lambda self: pytest.fail("loaded"))
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("MODEL_*")}
    again, is_complete = evaluate(script, *argv)
    assert is_complete and capsys.readouterr().out == first.stdout
    assert again["models"] == results["models"]
    other, _ = evaluate(script, *argv, "--normalizer", "none")
    assert other["models"][2]["sets"][0]["totals"]["wer"] != results["models"][2]["sets"][0]["totals"]["wer"]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("MODEL_*")} == stamps
    assert not list(out.rglob(".partial*"))


def test_texts_are_those_of_the_models(folder, tiny_folder, whisper_folder, wav2vec2_folder, speech_clips):
    """In batches of different lengths, what the stock pipeline writes of each clip alone."""
    clips = [clip["array"] for clip in speech_clips[:3]]
    processor = AutoProcessor.from_pretrained(tiny_folder)
    model = AutoModelForSpeechSeq2Seq.from_pretrained(tiny_folder).eval()
    alone = [model.generate(**processor(audio=clip), max_new_tokens=6) for clip in clips]
    expected = [processor.batch_decode(ids, return_format="transcription_only")[0] for ids in alone]
    system = make_transcriber(tiny_folder, generate_kwargs={"max_new_tokens": 6})
    system.load()
    assert system.run(clips, [None] * 3) == expected
    for place in (whisper_folder, wav2vec2_folder):
        recogniser = pipeline("automatic-speech-recognition", model=place)
        options = {"generate_kwargs": {"num_beams": 1}} if place == whisper_folder else {}
        expected = [recogniser(clip.copy(), **options)["text"].strip() for clip in clips]
        system = make_transcriber(place)
        system.load()
        assert system.run(clips, [None] * 3) == expected
        assert len(set(expected)) > 1 or place == whisper_folder


def test_long_clips(tiny_folder, whisper_folder, speech_clips):
    """A Mel-LLM's are cut at pauses or heard whole, as asked; Whisper goes on behind its 30 seconds."""
    clip = np.concatenate([clip["array"] for clip in speech_clips[:3]])
    model = AutoModelForSpeechSeq2Seq.from_pretrained(tiny_folder).eval()
    processor = AutoProcessor.from_pretrained(tiny_folder)
    texts = {}
    for long_form in ("cut", "never"):
        system = make_transcriber(tiny_folder, long_form=long_form)
        system.config.audio_config.max_audio_seconds = 3.0
        system.load()
        system.model.config.audio_config.max_audio_seconds = 3.0
        (texts[long_form],) = system.run([clip], [None])
    whole = processor.batch_decode(model.generate(**processor(audio=clip)), return_format="transcription_only")[0]
    assert texts["never"] == whole != texts["cut"]
    assert texts["cut"] == model.transcribe(clip, processor, max_segment_seconds=3.0).text

    system = make_transcriber(whisper_folder, generate_kwargs={"max_new_tokens": 6})
    system.load()
    calls = []
    system.model.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
    system.run([np.tile(clip, 8), clip], [None, None])
    assert len(np.tile(clip, 8)) > 30 * 16000 and len(calls) > 6  # more than one window's tokens


def test_adapters_are_a_model(tiny, tmp_path, speech_clips):
    from peft import get_peft_model

    from mel_llm.training import lora_config

    model, processor = tiny
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    model = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "base")
    adapted = get_peft_model(model, lora_config(model, "small")).eval()
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or ("modules_to_save" in name and parameter.ndim > 1):
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(tmp_path / "adapters")
    processor.save_pretrained(tmp_path / "adapters")
    clips = [clip["array"] for clip in speech_clips[:2]]
    ids = adapted.generate(**processor(audio=clips), max_new_tokens=6)
    system = make_transcriber(str(tmp_path / "adapters"), generate_kwargs={"max_new_tokens": 6})
    system.load()
    assert system.run(clips, [None] * 2) == processor.batch_decode(ids, return_format="transcription_only")
    base = make_transcriber(str(tmp_path / "base"), generate_kwargs={"max_new_tokens": 6})
    base.load()
    assert system.run(clips, [None] * 2) != base.run(clips, [None] * 2)

    # Another model has taken the place of the base, which PEFT would not notice
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="is not there"):
        make_transcriber(str(tmp_path / "adapters"))
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        make_transcriber(str(tmp_path / "nowhere"))
    encoder = {"encoder_type": "conformer", "encoder_config": {"num_blocks": 1, "intermediate_size": 16}}
    audio_config = {**model.config.audio_config.to_dict(), **encoder}
    other = type(model)(type(model.config)(**{**model.config.to_dict(), "audio_config": audio_config}))
    other.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="another model than the base"):
        make_transcriber(str(tmp_path / "adapters")).load()
    (tmp_path / "elsewhere").rename(tmp_path / "adapters" / "base")  # beside the adapters, it is found
    system = make_transcriber(str(tmp_path / "adapters"), generate_kwargs={"max_new_tokens": 6})
    system.load()
    assert system.run(clips, [None] * 2) == processor.batch_decode(ids, return_format="transcription_only")
    weights = load_file(tmp_path / "adapters" / "adapter_model.safetensors")
    extra = {"base_model.model.model.audio_embedder.encoder.weight": torch.zeros(1)}
    save_file(weights | extra, tmp_path / "adapters" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="another model than the base.*1 weights differ"):
        make_transcriber(str(tmp_path / "adapters")).load()


def test_a_part_of_the_data_is_a_part(folder):
    names = {part: [clip.id for clip in load_clip_set(f"{folder}{part}").utterances] for part in ("", ",fraction=0.4")}
    assert len(names[",fraction=0.4"]) == 2 and set(names[",fraction=0.4"]) < set(names[""])
    assert len(load_clip_set(f"{folder},hours=0.0001")) == 1


def test_clips_of_one_name_and_size_are_not_taken_for_each_other(tmp_path, speech_clips):
    """As cut to one length and unpacked by a program that sets one time: a row less, and their numbers are others."""
    for place, name in enumerate("abc"):
        (tmp_path / name).mkdir()
        soundfile.write(tmp_path / name / "1.wav", speech_clips[place]["array"][:8000], 16000)
        os.utime(tmp_path / name / "1.wav", (0, 0))
    rows = [f"{name}/1.wav,text {name}" for name in "abc"]
    keys = []
    for kept in (rows, [rows[0], rows[2]]):
        (tmp_path / "metadata.csv").write_text("\n".join(["file_name,text", *kept]) + "\n")
        clips = load_clip_set(str(tmp_path))
        keys.append({clips.utterances[index].id: clips.key(index) for index in range(len(clips))})
    assert keys[0]["00000_1"] == keys[1]["00000_1"] and keys[0]["00001_1"] != keys[1]["00001_1"]


# --- resuming, and what goes wrong on the way ------------------------------------------------------------------------


class Listener(ClipSystem):
    """Says how long each clip is; stops the program, or fails, where it is told to."""

    def __init__(self, name="listener", stop_after=None, refuses=lambda clip: False):
        self.name, self.settings, self.heard, self.batches = name, {"kind": "test"}, [], []
        self.stop_after, self.refuses = stop_after, refuses

    def run(self, clips, prompts):
        if self.stop_after is not None and len(self.batches) >= self.stop_after:
            raise KeyboardInterrupt
        self.batches.append([len(clip) for clip in clips])
        if any(self.refuses(clip) for clip in clips):
            raise ValueError("this clip is not for me")
        self.heard += [len(clip) for clip in clips]
        return [f"{len(clip)} samples" for clip in clips]


def test_an_interrupted_run_goes_on(folder, tmp_path):
    clips = load_clip_set(str(folder))
    lengths = sorted((round(16000 * utterance.seconds) for utterance in clips.utterances), reverse=True)
    with pytest.raises(KeyboardInterrupt):
        ClipEvaluation([clips], [Listener(stop_after=2)], tmp_path, batch_size=2, warmup_steps=1).run()
    (partial,) = tmp_path.rglob(".partial-*")
    assert not list(tmp_path.rglob("MODEL_*")) and len(partial.read_text().split()) > 0
    with open(partial, "a") as file:
        file.write('{"id": "00", "pred_te')  # killed while it wrote
    listener = Listener()
    (result,) = ClipEvaluation([clips], [listener], tmp_path, batch_size=2, warmup_steps=0).run()
    assert listener.batches == [lengths[2:4], lengths[4:]]  # the first batch was the warm-up, then the first was done
    lines = result["sets"][0]["lines"]
    assert [line["id"] for line in lines] == [utterance.id for utterance in clips.utterances]
    assert [line["pred_text"] for line in lines] == [
        f"{round(16000 * utterance.seconds)} samples" for utterance in clips.utterances
    ]
    assert not list(tmp_path.rglob(".partial-*"))

    # A recording that was changed is heard again, a transcript that was corrected is not
    array, rate = soundfile.read(folder / "test" / "01.wav", dtype="float32")
    copy = tmp_path / "copy"
    write_folder(copy / "test", [{"array": array, "text": "one"}, {"array": array, "text": "two"}])
    first = Listener()
    ClipEvaluation([load_clip_set(str(copy))], [first], tmp_path, warmup_steps=0).run()
    soundfile.write(copy / "test" / "00.wav", array[:8000], rate)
    text = (copy / "test" / "metadata.csv").read_text().replace("two", "deux")
    (copy / "test" / "metadata.csv").write_text(text)
    second = Listener()
    (result,) = ClipEvaluation([load_clip_set(str(copy))], [second], tmp_path, warmup_steps=0).run()
    assert second.heard == [8000] and result["sets"][0]["lines"][1]["text"] == "deux"


def test_systems_take_turns_or_not(folder, tmp_path):
    clips = load_clip_set(str(folder))
    order = []
    for interleave in (True, False):
        systems = [Listener("one"), Listener("two")]
        systems[1].settings = {"kind": "other"}
        for system in systems:
            system.refuses = lambda clip, name=system.name: order.append(name)
        options = {"batch_size": 3, "warmup_steps": 0, "interleave": interleave, "sort_by_length": False}
        results = ClipEvaluation([clips], systems, tmp_path / str(interleave), **options).run()
        assert [result["name"] for result in results] == ["one", "two"]
        assert systems[0].batches == systems[1].batches
        assert systems[0].batches[0] == [round(16000 * utterance.seconds) for utterance in clips.utterances[:3]]
    assert order == ["one"] * 3 + ["two"] * 3 + ["one"] * 2 + ["two"] * 2 + ["one"] * 5 + ["two"] * 5


def test_a_clip_that_fails_does_not_cost_the_others(script, folder, speech_clips, tmp_path):
    clips = load_clip_set(str(folder))
    shortest = min(round(16000 * utterance.seconds) for utterance in clips.utterances)
    listener = Listener(refuses=lambda clip: len(clip) == shortest)
    (result,) = ClipEvaluation([clips], [listener], tmp_path / "a", batch_size=5, warmup_steps=0).run()
    assert len(result["sets"][0]["lines"]) == 4
    assert list(result["sets"][0]["failed"].values()) == ["ValueError: this clip is not for me"]
    with pytest.raises(ValueError, match="not for me"):  # a model that can do nothing is told at once
        ClipEvaluation([clips], [Listener(refuses=lambda clip: True)], tmp_path / "b", batch_size=2).run()

    # A file whose row says how long it is, and which is no sound
    (tmp_path / "judge.py").write_text("def listen(audio, rate):\n    return 'please try again'\n")
    soundfile.write(tmp_path / "good.wav", speech_clips[0]["array"], 16000)
    (tmp_path / "bad.wav").write_bytes(b"RIFF of nothing")
    rows = [{"audio": name, "text": "Please, try again!", "duration": 1.0} for name in ("good.wav", "bad.wav")]
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("\n".join(map(json.dumps, rows)))
    argv = [SCRIPT, *words("out", "--data", "manifest.jsonl", "--model", "python:judge.listen")]
    result = run(*argv, cwd=tmp_path)
    assert result.returncode == 1 and "bad" in result.stderr and "1 failed" in result.stdout
    totals = json.loads((tmp_path / "out" / "results.json").read_text())["models"][0]["sets"][0]
    assert totals["totals"]["wer"]["value"] == 0 and totals["totals"]["num_utterances"] == 1
    assert list(totals["failed"]) == ["bad"] and totals["split"] is None


def test_times_of_two_machines_are_not_added(folder, tmp_path, script):
    clips = load_clip_set(str(folder))
    evaluation = ClipEvaluation([clips], [Listener()], tmp_path, warmup_steps=0)
    (result,) = evaluation.run()
    from mel_llm.evaluation import summarize_asr

    assert summarize_asr(result, [clips])["rtfx"]["value"] > 0
    result["sets"][0]["lines"][2]["timed_on"] = "another machine"
    summary = summarize_asr(result, [clips])
    assert summary["rtfx"] is None and "rtfx" not in summary["sets"][0]["totals"]


# --- the leaderboard's sets -------------------------------------------------------------------------------------------


@pytest.fixture
def hub(folder, speech_clips, tmp_path, monkeypatch):
    """The datasets of the Hub, as far as they are used: five clips in each, one of them marked to be ignored."""
    import datasets
    import huggingface_hub

    asked = []
    (tmp_path / "hub" / "audio").mkdir(parents=True)
    for index, clip in enumerate(speech_clips[:4]):
        soundfile.write(tmp_path / "hub" / "audio" / f"{index}.flac", clip["array"], 16000)

    def load_dataset(place, config=None, split=None, **kwargs):
        asked.append((place, config, split))
        texts = [clip["text"] for clip in speech_clips[:4]]
        if place.endswith("-chunked"):
            names = [f"{index}.flac" for index in (1, 0, 2, 3)]
            rows = {"file_name": names, "parent_id": ["a", "a", "b", "b"], "chunk_index": [1, 0, 0, 1]}
            return datasets.Dataset.from_dict(rows)
        if place.endswith("Earnings22-Cleaned-AA"):
            return datasets.Dataset.from_dict({"id": ["a", "b"], "text": [" ".join(texts[:2]), " ".join(texts[2:])]})
        audio = [{"bytes": (folder / "test" / f"{i:02}.wav").read_bytes(), "path": None} for i in range(5)]
        texts = [clip["text"] for clip in speech_clips[:4]] + ["ignore time segment in scoring"]
        data = datasets.Dataset.from_dict({"id": list("abcde"), "audio": audio, "text": texts})
        return data.cast_column("audio", datasets.Audio(decode=False)).cast_column("audio", datasets.Audio())

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: str(tmp_path / "hub"))
    return asked


def test_a_benchmark(script, hub, speech_clips, tmp_path, monkeypatch):
    texts = {len(clip["array"]): clip["text"] for clip in speech_clips[:4]}
    (tmp_path / "asr_judge.py").write_text(
        f"TEXTS = {texts!r}\n\ndef listen(audio, rate):\n    return TEXTS.get(len(audio), 'nothing')\n"
        "\ndef deaf(audio, rate):\n    return ''\n"
    )
    monkeypatch.chdir(tmp_path)
    argv = words(
        "out", "--benchmark", "open_asr", "--model", "python:asr_judge.listen", "--peer", "python:asr_judge.deaf"
    )
    results, is_complete = evaluate(script, *argv)
    assert is_complete
    assert ("hf-audio/open-asr-leaderboard", "librispeech", "test.other") in hub
    best, worst = results["models"]
    assert [of_set["name"] for of_set in best["sets"]] == [entry.name for entry in BENCHMARKS["open_asr"]]
    assert best["mean_wer"] == 0 and worst["mean_wer"] == 1
    totals = {of_set["name"]: of_set["totals"] for of_set in best["sets"]}
    assert totals["spgispeech"]["left_out"] == 1 and totals["spgispeech"]["num_utterances"] == 4
    # Chunks in their order make up the calls whose transcripts there are
    assert totals["earnings22_cleaned_aa_chunked"]["num_recordings"] == 2
    names = {path.name for path in (tmp_path / "out" / best["folder"]).iterdir()}
    # as the leaderboard's scorer looks for them
    assert "MODEL_asr_judge.listen_DATASET_hf-audio-open-asr-leaderboard_librispeech_test.clean.jsonl" in names
    chunked = "ArtificialAnalysis-Earnings22-Cleaned-AA-chunked_earnings22_cleaned_aa_chunked_test"
    lines = lines_of(tmp_path / "out" / best["folder"] / f"MODEL_asr_judge.listen_DATASET_{chunked}.jsonl")
    assert [(line["parent_id"], line["chunk_index"]) for line in lines] == [("a", 1), ("a", 0), ("b", 0), ("b", 1)]

    (file,) = (tmp_path / "out" / "scores").glob("asr_judge.listen*/.eval_results/open_asr_leaderboard.yaml")
    entries = yaml.safe_load(file.read_text())
    values = {entry["dataset"]["task_id"]: entry["value"] for entry in entries}
    assert values["mean_wer"] == 0 and values["librispeech_clean_wer"] == 0 and values["rtfx"] > 0
    assert {entry["dataset"]["id"] for entry in entries} == {"hf-audio/open-asr-leaderboard"}
    assert entries[0]["date"] == results["environment"]["date"].split()[0]

    part, _ = evaluate(script, *argv[:4], *words("part", "--benchmark", "esb", "--subsets", "ami", "tedlium")[2:],
                       "--output_dir", "part", "--model", "python:asr_judge.deaf")  # fmt: skip
    assert [of_set["name"] for of_set in part["models"][0]["sets"]] == ["ami", "tedlium"]
    (file,) = (tmp_path / "part").rglob("open_asr_leaderboard.yaml")  # no mean over a part of the sets
    assert {e["dataset"]["task_id"] for e in yaml.safe_load(file.read_text())} == {"ami_wer", "tedlium_wer"}


def test_a_recording_is_not_cut_off_in_its_parts(hub, tmp_path):
    from mel_llm.evaluation.open_asr import load_benchmark

    (clips,) = load_benchmark("open_asr", tmp_path, ["earnings22_cleaned_aa_chunked"], max_samples=1)
    assert clips.sessions == [("a", 1), ("a", 0)]
    (clips,) = load_benchmark("open_asr", tmp_path, ["spgispeech"], max_samples=3)
    assert len(clips) == 3


def test_results_of_a_benchmark_have_the_hubs_form():
    totals = {"wer": {"value": 0.1234}}
    summary = {"sets": [{"name": "ami", "totals": totals}], "mean_wer": 0.1234, "rtfx": None}
    (entry,) = eval_results(summary, "esb", "2026-11-21", source_url="https://example.org", notes="a note")
    assert entry == {
        "dataset": {"id": "hf-audio/open-asr-leaderboard", "task_id": "ami_wer"},
        "value": 12.34,
        "date": "2026-11-21",
        "source": {"url": "https://example.org"},
        "notes": "a note",
    }


# --- cards, and bad input ---------------------------------------------------------------------------------------------


def test_a_card_reads_the_scores(script, folder, tiny_folder, tmp_path):
    evaluate(script, *words(tmp_path / "out", "--data", folder, "--model", tiny_folder, "--max_new_tokens", "4"))
    (scores,) = (tmp_path / "out" / "scores").rglob("*.json")
    copy = shutil.copytree(tiny_folder, tmp_path / "model")
    card = create_model_card(copy, evaluations=[scores])
    result = {result.metric_type: result for result in card.data.eval_results}["wer"]
    given = json.loads(scores.read_text())
    assert result.metric_value == pytest.approx(100 * given["metrics"]["wer"], abs=1e-3)
    assert (result.dataset_type, result.dataset_split) == ("speech", "test")
    assert result.task_type == "automatic-speech-recognition"
    assert "Normaliser: whisper" in str(card) and str(tmp_path) not in str(card)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model {model}", "Give --data or --benchmark"),
        ("--model {model} --data {data} --benchmark esb", "Give --data or --benchmark"),
        ("--data {data}", "give --model"),
        ("--model {model} --data {data} --batch_size 0", "--batch_size must be at least 1"),
        ("--model {model} --data {data} --dtype float8", "--dtype must be one of auto"),
        ("--model {model} --data {data} --compile fast", "--compile must be one of default"),
        ("--model {model} --data {data} --long_form maybe", "--long_form must be cut or never"),
        ("--model {model} --data {data} --normalizer shouting", "no text normalizer 'shouting'"),
        ("--model {model} --data {data} --warmup_steps -1", "--warmup_steps must be at least 0"),
        ("--model {model} --data {data} --split dev", "has no split 'dev'"),
        ("--model {model} --data {data} {data}", "is given twice"),
        ("--model {model} {model} --data {data}", "named twice"),
        ("--model {model} --data {data},streaming=true", "cannot stream"),
        ("--model {model} --data {data},text_column=words", "no column 'words'"),
        ("--model {model} --data {tmp}/untold.jsonl", "none of the columns audio, speaker is called text"),
        ("--model {model} --data {tmp}/silent.jsonl", "none of the 1 clips has a text"),
        ("--model {model} --data {tmp}/fillers.jsonl", "no reference is left after --normalizer whisper"),
        ("--model {model} --data {tmp}/missing.jsonl", "nowhere.wav: there is no such file"),
        ("--model {model} --data {tmp}/empty", "the split 'test' is empty"),
        ("--model {model} --benchmark leaderboard", "--benchmark must be one of open_asr"),
        ("--model {model} --benchmark esb --subsets librispeech", "has no set 'librispeech'"),
        ("--model {model} --data {data} --subsets ami", "--subsets is for --benchmark"),
        ("--model {tmp}/nothing --data {data}", "nothing"),
        ("--model {bert} --data {data}", "no class of that kind"),
        ("--model python:nowhere.listen --data {data}", "No module named 'nowhere'"),
    ],
)
def test_what_a_user_can_mend_is_told_before_work(script, folder, tiny_folder, tmp_path, arguments, message):
    import datasets

    wav = {"audio": str(folder / "test" / "00.wav")}
    manifests = {
        "untold": {**wav, "speaker": "a"},
        "silent": {**wav, "text": ""},
        "fillers": {**wav, "text": "uh, um"},
        "missing": {"audio": "nowhere.wav", "text": "What is said."},
    }
    for name, row in manifests.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    features = datasets.Features({"audio": datasets.Value("string"), "text": datasets.Value("string")})
    empty = datasets.Dataset.from_dict({"audio": [], "text": []}, features=features)
    (tmp_path / "empty").mkdir()
    empty.to_parquet(tmp_path / "empty" / "test.parquet")
    transformers.BertConfig().save_pretrained(tmp_path / "bert")
    places = {"data": folder, "model": tiny_folder, "tmp": tmp_path, "bert": tmp_path / "bert"}
    with pytest.raises((ValueError, OSError, ImportError)) as caught:
        script.prepare(words(tmp_path / "out", *arguments.format(**places).split()))
    assert message in str(caught.value)
    assert not list((tmp_path / "out").rglob("*.jsonl"))


def test_user_errors_have_no_traceback(tiny_folder, tmp_path):
    result = run(SCRIPT, *words(tmp_path / "out", "--model", tiny_folder, "--data", tmp_path / "nowhere"))
    assert result.returncode == 1 and result.stderr.strip().splitlines()[-1].startswith("evaluate_asr.py: There is no")
    assert "Traceback" not in result.stderr


def test_a_normalizer_of_ones_own(script, folder, tmp_path, monkeypatch):
    """As the leaderboard's own is given: a class without arguments, from a folder on the path."""
    (tmp_path / "asr_rules.py").write_text(
        "class Rules:\n    def __call__(self, text):\n        return 'same'\n\ndef listen(audio, rate):\n    return 'x'\n"
    )
    monkeypatch.chdir(tmp_path)
    argv = words(
        "out", "--data", folder, "--model", "python:asr_rules.listen", "--normalizer", "python:asr_rules.Rules"
    )
    results, _ = evaluate(script, *argv)
    assert results["models"][0]["mean_wer"] == 0 and results["normalizer"].startswith("asr_rules.Rules ")
    assert mel_llm.__version__ == results["environment"]["versions"]["mel_llm"]


def test_bfloat16_and_a_static_cache(tokenizer, tmp_path, speech_clips):
    """What --dtype and --compile set: the texts are those of the model in that form."""
    model, processor = build_tiny(tokenizer)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    clips = [clip["array"] for clip in speech_clips[:2]]
    kwargs = {"generate_kwargs": {"max_new_tokens": 6}, "batch_size": 3}
    system = make_transcriber(str(tmp_path), dtype="bfloat16", **kwargs)
    system.load()
    assert system.model.dtype == torch.bfloat16 and len(system.run(clips, [None] * 2)) == 2
    plain = make_transcriber(str(tmp_path), **kwargs)
    compiled = make_transcriber(str(tmp_path), compile_mode="default", **kwargs)
    plain.load(), compiled.load()
    shapes = []
    compiled.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    assert compiled.run(clips, [None] * 2) == plain.run(clips, [None] * 2)
    assert set(shapes) == {3}  # filled up, so that the last batch is not compiled anew
