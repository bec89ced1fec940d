"""Sources, decoding, selection, order and augmentation of training data."""

import csv
import json
import pickle
import shutil

import numpy as np
import pytest
import soundfile
import torch

from mel_llm.training import (
    SpecAugment,
    SpeechDataset,
    SpeechSampler,
    SpeechSource,
    SpeedPerturbation,
    TranscriptionCollator,
    load_source,
    select_clips,
)


def write_folder(folder, clips, **extra_columns):
    folder.mkdir(parents=True)
    with open(folder / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "text", *extra_columns])
        for index, clip in enumerate(clips):
            soundfile.write(folder / f"{index:02}.wav", clip["array"], 16000)
            writer.writerow([f"{index:02}.wav", clip["text"], *(column[index] for column in extra_columns.values())])
    return folder


@pytest.fixture
def folder(speech_clips, tmp_path):
    """Six clips to train on and two to evaluate on, as an audiofolder."""
    write_folder(tmp_path / "speech" / "train", speech_clips[:6], speaker=["a", "a", "a", "b", "b", "b"])
    write_folder(tmp_path / "speech" / "validation", speech_clips[6:8])
    return tmp_path / "speech"


# --- sources --------------------------------------------------------------------------------------------------------


def test_a_source_is_written_as_one_word():
    source = SpeechSource.parse("org/set,config=clean,split=train.100,weight=2,streaming=true,text_column=sentence")
    assert source == SpeechSource("org/set", "train.100", "clean", 2.0, True, text_column="sentence")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "needs a folder"),
        ("x,wieght=2", "wieght=2.*not understood.*weight"),
        ("x,weight=lots", "must be a number"),
        ("x,weight=0", "more than 0"),
        ("x,streaming=maybe", "true or false"),
        ("x,exclude=a", "COLUMN:PATTERN"),
    ],
)
def test_a_source_that_is_written_wrong_is_told(spec, message):
    with pytest.raises(ValueError, match=message):
        SpeechSource.parse(spec)


def test_an_audiofolder(folder, speech_clips):
    train = load_source(SpeechSource(str(folder)))
    assert train.column_names == ["audio", "text", "duration", "offset", "speaker", "instruction", "origin"]
    assert train["text"][:] == [clip["text"] for clip in speech_clips[:6]]
    assert train[0]["origin"] == train[0]["audio"]["path"] == str(folder / "train" / "00.wav")
    assert len(load_source(SpeechSource(str(folder)), split="validation")) == 2
    assert len(load_source(SpeechSource(str(folder), exclude="speaker:b*"))) == 3
    with pytest.raises(FileNotFoundError, match=r"no split 'test'.*train, validation"):
        load_source(SpeechSource(str(folder)), split="test")
    with pytest.raises(FileNotFoundError, match="no folder or manifest"):
        load_source(SpeechSource("./nothing-here"))


def test_a_folder_without_splits_is_for_training(speech_clips, tmp_path):
    write_folder(tmp_path / "flat", speech_clips[:2])
    assert len(load_source(SpeechSource(str(tmp_path / "flat")))) == 2
    with pytest.raises(FileNotFoundError, match="not divided into splits"):
        load_source(SpeechSource(str(tmp_path / "flat")), split="validation")


def test_manifests_pairs_and_saved_datasets(folder, speech_clips, tmp_path):
    manifest = tmp_path / "nemo.jsonl"
    rows = [{"audio_filepath": "speech/train/00.wav", "text": "One.", "duration": 1.5, "lang": "en"}]
    manifest.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    loaded = load_source(SpeechSource(str(manifest)))[0]
    assert loaded["duration"] == 1.5 and loaded["audio"]["path"] == str(tmp_path / "speech/train/00.wav")

    pairs = tmp_path / "pairs" / "deep"
    pairs.mkdir(parents=True)
    shutil.copy(folder / "train" / "00.wav", pairs / "a.wav")
    (pairs / "a.txt").write_text("One.\n")
    assert load_source(SpeechSource(str(tmp_path / "pairs")))["text"][:] == ["One."]

    load_source(SpeechSource(str(folder))).save_to_disk(tmp_path / "saved")
    assert len(load_source(SpeechSource(str(tmp_path / "saved")))) == 6

    manifest.write_text('{"audio_filepath": "a.wav"\n')
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        load_source(SpeechSource(str(manifest)))


def test_transcripts_stay_text(folder):
    """A reader that guesses types would make a number of one and nothing of the other."""
    (folder / "train" / "metadata.csv").write_text("file_name,text\n00.wav,0042\n01.wav,NA\n")
    assert load_source(SpeechSource(str(folder)))["text"][:] == ["0042", "NA"]


def test_columns_that_are_missing_are_named(folder):
    (folder / "train" / "metadata.csv").write_text("file_name,words\n00.wav,One.\n")
    with pytest.raises(ValueError, match=r"file_name, words.*text_column="):
        load_source(SpeechSource(str(folder)))
    assert load_source(SpeechSource(str(folder), text_column="words"))["text"][:] == ["One."]
    (folder / "train" / "metadata.csv").write_text("clip,text\n00.wav,One.\n")
    with pytest.raises(ValueError, match="row 1.*audio_filepath"):
        load_source(SpeechSource(str(folder)))


def test_transcripts_are_normalised_when_asked(folder, speech_clips):
    assert (
        load_source(SpeechSource(str(folder)), text_normalizer=str.upper)["text"][0] == speech_clips[0]["text"].upper()
    )


# --- selection ------------------------------------------------------------------------------------------------------


def test_the_report_names_what_is_left_out(folder, speech_clips, tokenizer):
    with open(folder / "train" / "metadata.csv", "a") as file:
        file.write("gone.wav,Gone.,a\nbroken.wav,Broken.,a\n05.wav,,a\n")
    (folder / "train" / "broken.wav").write_text("this is not audio")
    data = load_source(SpeechSource(str(folder)))
    longest = max(clip["duration"] for clip in speech_clips[:6])
    kept, lengths, report = select_clips(data, tokenizer, max_seconds=longest - 0.01)
    assert len(kept) == len(lengths) == report.num_clips == 5
    assert report.left_out == {
        "missing or not audio": 2,
        "without a transcript": 1,
        f"longer than {longest - 0.01:g} s": 1,
    }
    assert "gone.wav" in report.unreadable[0] and "broken.wav" in report.unreadable[1]
    assert report.hours == pytest.approx(sum(lengths) / 3600) and report.seconds[0] == pytest.approx(
        min(lengths), abs=1e-3
    )
    assert "5 clips" in str(report) and "gone.wav" in str(report)
    _, _, none_left = select_clips(data, tokenizer, min_seconds=1000)
    assert none_left.num_clips == 0 and "0 clips" in str(none_left)


# --- decoding -------------------------------------------------------------------------------------------------------


def test_a_bad_clip_is_replaced_reported_and_counted(folder, speech_clips, caplog):
    data = load_source(SpeechSource(str(folder)))
    (folder / "train" / "01.wav").unlink()
    (folder / "train" / "02.wav").write_bytes(b"RIFF")
    dataset = SpeechDataset(data)
    with caplog.at_level("WARNING", logger="mel_llm"):
        for _ in range(2):
            assert [dataset[i]["text"] for i in (0, 1, 2)] == [speech_clips[i]["text"] for i in (0, 3, 3)]
    assert dataset.num_bad_clips == 2 and dataset.bad_clips()[0].endswith("01.wav")
    assert len([record for record in caplog.records if "Skipped" in record.message]) == 2


def test_bad_clips_are_counted_across_workers(folder):
    data = load_source(SpeechSource(str(folder)))
    (folder / "train" / "01.wav").unlink()
    dataset = SpeechDataset(data)
    loader = torch.utils.data.DataLoader(dataset, batch_size=2, num_workers=2, collate_fn=list)
    assert sum(len(batch) for batch in loader) == 6 and dataset.num_bad_clips == 1


def test_nothing_but_bad_clips_is_an_error(folder):
    data = load_source(SpeechSource(str(folder)))
    for file in (folder / "train").glob("*.wav"):
        file.unlink()
    with pytest.raises(RuntimeError, match="check the data"):
        SpeechDataset(data)[0]
    with pytest.raises(ValueError, match="empty"):
        SpeechDataset(data.select([]))


def test_clips_at_other_rates_are_resampled(speech_clips, tmp_path):
    soundfile.write(tmp_path / "a.wav", np.repeat(speech_clips[0]["array"], 3), 48000)
    dataset = SpeechDataset([{"audio": {"path": str(tmp_path / "a.wav"), "bytes": None}, "text": "One."}])
    assert abs(len(dataset[0]["audio"]) - len(speech_clips[0]["array"])) <= 1


# --- augmentation ---------------------------------------------------------------------------------------------------


def test_augmentation_is_a_function_of_seed_epoch_and_clip(folder):
    dataset = SpeechDataset(load_source(SpeechSource(str(folder))), speed=SpeedPerturbation((0.8, 1.25)), seed=3)
    again = pickle.loads(pickle.dumps(dataset))
    for key in ((0, 1), (4, 2)):
        assert np.array_equal(dataset[key]["audio"], again[key]["audio"])
        assert dataset[key]["augment_seed"] == again[key]["augment_seed"]
    lengths = {len(dataset[epoch, 0]["audio"]) for epoch in range(8)}
    whole = len(dataset[0]["audio"])
    assert len(lengths) == 2 and min(lengths) / whole == pytest.approx(0.8, abs=0.01)
    assert "augment_seed" not in dataset[0]  # evaluation asks without an epoch and gets the clip as it is


def test_speed_changes_length_and_pitch():
    tone = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000).astype(np.float32)
    fast = SpeedPerturbation((1.25,))(tone, 16000, seed=0)
    assert abs(len(fast) - 12800) <= 2
    peak = np.abs(np.fft.rfft(fast[:12000])).argmax() * 16000 / 12000
    assert peak == pytest.approx(550, abs=2)
    assert SpeedPerturbation((1.0,))(tone, 16000, seed=0) is tone
    with pytest.raises(ValueError, match="0.5 to 2"):
        SpeedPerturbation((0.1,))


def test_spec_augment_masks_with_the_mean_and_no_more_than_asked():
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (200, 80), generator=generator) * 2 - 1  # no value is near the mean
    features = torch.linspace(8, 14, 80) + signs * (1 + torch.rand(200, 80, generator=generator))
    augment = SpecAugment(num_time_masks=1, max_time_frames=30, num_freq_masks=1, max_freq_bins=10)
    before = features.clone()
    state = torch.get_rng_state()
    for seed in range(20):
        masked = augment(features, seed)
        assert torch.equal(masked, augment(features, seed))
        changed = (masked - features).abs() > 1e-4
        rows, columns = changed.all(1).sum().item(), changed.all(0).sum().item()
        assert rows <= 30 and columns <= 10
        outside = changed[~changed.all(1)][:, ~changed.all(0)]
        assert not outside.any()
        mean = features.mean(0)
        assert torch.allclose(masked[changed], mean.expand_as(masked)[changed], atol=1e-4)
    assert torch.equal(features, before) and torch.equal(torch.get_rng_state(), state)
    assert any(((augment(features, seed) - features).abs() > 1e-4).any() for seed in range(5))


def test_the_collator_masks_only_what_is_to_be_augmented(tiny, speech_clips):
    _, processor = tiny
    examples = [{"audio": clip["array"], "text": clip["text"]} for clip in speech_clips[:2]]
    plain = TranscriptionCollator(processor)(examples)
    collator = TranscriptionCollator(processor, spec_augment=SpecAugment())
    examples[1]["augment_seed"] = 7
    batch = collator(examples)
    assert torch.equal(batch["input_features"][0], plain["input_features"][0])
    assert not torch.equal(batch["input_features"][1], plain["input_features"][1])
    length = int(batch["attention_mask"][1].sum())
    assert torch.equal(batch["input_features"][1, length:], plain["input_features"][1, length:])
    assert torch.equal(batch["labels"], plain["labels"])


# --- order ----------------------------------------------------------------------------------------------------------


def test_an_epoch_visits_every_clip_once_in_an_order_of_its_own():
    sampler = SpeechSampler(np.random.default_rng(0).uniform(1, 20, 103), batch_size=4, seed=1)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        keys = list(sampler)
        assert {key[0] for key in keys} == {epoch} and sorted(key[1] for key in keys) == list(range(103))
        assert keys == list(sampler)
        orders.append([key[1] for key in keys])
    assert orders[0] != orders[1] != orders[2]


def test_similar_lengths_share_a_batch_and_the_longest_comes_first():
    lengths = np.random.default_rng(0).uniform(1, 20, 1000)
    grouped = np.array([i for _, i in SpeechSampler(lengths, batch_size=8)]).reshape(-1, 8)
    loose = np.array([i for _, i in SpeechSampler(lengths)]).reshape(-1, 8)

    def padding(batches):
        return sum(lengths[batch].max() * 8 for batch in batches) / lengths.sum() - 1

    assert padding(grouped) < 0.1 < padding(loose)
    assert lengths[grouped[0]].max() == lengths.max()


def test_sources_are_mixed_by_weight():
    sampler = SpeechSampler([1.0] * 1000, sizes=[100, 900], weights=[1, 1])
    seen = set()
    for epoch in range(2):
        sampler.set_epoch(epoch)
        indices = [index for _, index in sampler]
        assert len(indices) == 1000
        small = [index for index in indices if index < 100]
        assert len(small) == 500 and {small.count(i) for i in set(small)} == {5}
        large = [index for index in indices if index >= 100]
        assert len(set(large)) >= 450
        seen |= set(large)
    assert len(seen) == 900  # the second epoch goes on where the first left off
    with pytest.raises(ValueError, match="one positive number for each"):
        SpeechSampler([1.0] * 10, sizes=[5, 5], weights=[1])


# --- what users bring -----------------------------------------------------------------------------------------------


def test_metadata_that_would_be_misread_is_told(folder):
    path = folder / "train" / "metadata.csv"
    path.write_text("file_name,text\n00.wav,plain\n01.wav,hello there, my dear, friend\n")
    with pytest.raises(ValueError, match="line 3: more cells than columns"):
        load_source(SpeechSource(str(folder)))
    path.write_bytes("file_name,text\n00.wav,Größe\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"metadata\.csv is not written in UTF-8"):
        load_source(SpeechSource(str(folder)))
    path.unlink()
    (folder / "train" / "metadata.tsv").write_text('file_name\ttext\n00.wav\t"Hello he said\n01.wav\tTwo.\n')
    assert load_source(SpeechSource(str(folder)))["text"][:] == ['"Hello he said', "Two."]


def test_parts_of_a_file_and_lengths_that_are_no_numbers(folder, tokenizer, tmp_path):
    manifest = tmp_path / "parts.jsonl"
    rows = [
        {"audio_filepath": "speech/train/00.wav", "text": "part", "offset": 0.25, "duration": 0.5},
        {"audio_filepath": "speech/train/00.wav", "text": "all", "duration": float("nan")},
        {"audio_filepath": "speech/train/00.wav", "text": 7},
        {"audio_filepath": "speech/train/00.wav", "text": "no length", "offset": 0.25},
    ]
    manifest.write_text("\n".join(map(json.dumps, rows)))
    kept, lengths, report = select_clips(load_source(SpeechSource(str(manifest))), tokenizer)
    assert lengths[0] == 0.5 and lengths[1] == lengths[2] > 1 and len(kept) == 3
    assert "needs a `duration`" in report.unreadable[0]
    dataset = SpeechDataset(kept)
    whole = dataset[1]["audio"]
    assert np.allclose(dataset[0]["audio"], whole[4000:12000], atol=1e-6) and dataset[2]["text"] == "7"


def test_arrays_and_parquet(folder, speech_clips, tmp_path):
    from datasets import Dataset

    audio = [{"array": clip["array"], "sampling_rate": 16000, "path": None} for clip in speech_clips[:2]]
    in_memory = Dataset.from_dict({"audio": audio, "text": ["One.", "Two."]})
    in_memory.save_to_disk(tmp_path / "arrays")
    files = {path.name for path in (tmp_path / "arrays").iterdir()}
    loaded = SpeechDataset(load_source(SpeechSource(str(tmp_path / "arrays"))))
    assert np.allclose(loaded[1]["audio"], speech_clips[1]["array"], atol=1e-6)
    assert {path.name for path in (tmp_path / "arrays").iterdir()} == files  # nothing is left in the user's folder

    with open(speech_clips[0]["path"], "rb") as file:
        content = file.read()
    (tmp_path / "hub").mkdir()
    rows = {"audio": [{"bytes": content, "path": "a.flac"}], "text": ["One."]}
    Dataset.from_dict(rows).to_parquet(tmp_path / "hub" / "train-00000-of-00001.parquet")
    for place in (tmp_path / "hub", tmp_path / "hub" / "train-00000-of-00001.parquet"):
        assert np.allclose(SpeechDataset(load_source(SpeechSource(str(place))))[0]["audio"], speech_clips[0]["array"])
