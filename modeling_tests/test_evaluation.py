"""Error rates and real-time factor: values counted by hand, normalisation, and what `evaluate` users do with metrics."""

import builtins
import math
import pickle
import random
import time
from types import SimpleNamespace

import evaluate
import numpy as np
import pytest
import torch
from test_registration import run
from transformers import EvalPrediction

from mel_llm.evaluation import (
    TEXT_NORMALIZERS,
    CharacterErrorRate,
    RealTimeFactor,
    WordErrorRate,
    get_text_normalizer,
    make_compute_metrics,
)
from mel_llm.evaluation import normalizers as normalizers_module


def wer(prediction: str, reference: str, **kwargs) -> float:
    return WordErrorRate(normalizer="none").compute(predictions=[prediction], references=[reference], **kwargs)["wer"]


def cer(prediction: str, reference: str) -> float:
    return CharacterErrorRate(normalizer="none").compute(predictions=[prediction], references=[reference])["cer"]


# --- Values


@pytest.mark.parametrize(
    "prediction, reference, expected",
    [
        ("a b c d", "a b c d", 0),
        ("a x c d", "a b c d", 1 / 4),  # substitution
        ("a c d", "a b c d", 1 / 4),  # deletion
        ("a b x c d", "a b c d", 1 / 4),  # insertion
        ("x b d e", "a b c d", 3 / 4),  # one of each
        ("", "a b c d", 1),
        ("x y z a", "a", 3),  # more inserted than said
        ("b a", "a b", 2 / 2),
        ("A b", "a b", 1 / 2),
        ("a\tb\n c ", "a b c", 0),  # any whitespace separates words
    ],
)
def test_word_error_rate_counted_by_hand(prediction, reference, expected):
    assert wer(prediction, reference) == pytest.approx(expected)


@pytest.mark.parametrize(
    "prediction, reference, expected",
    [
        ("abcd", "abcd", 0),
        ("abxd", "abcd", 1 / 4),
        ("abd", "abcd", 1 / 4),
        ("abcxd", "abcd", 1 / 4),
        ("ab cd", "abcd", 1 / 4),
        ("abc", "ab c", 1 / 4),  # the space counts
        ("你号", "你好", 1 / 2),
        ("สวัสดี", "สวัสดี", 0),
        ("", "abcd", 1),
    ],
)
def test_character_error_rate_counted_by_hand(prediction, reference, expected):
    assert cer(prediction, reference) == pytest.approx(expected)


def test_the_corpus_counts_and_not_the_mean_of_the_utterances():
    # 1 + 9 words, 1 + 17 characters; the mean of the utterances would be 1/2
    texts = {"predictions": ["x", "b c d e f g h i j"], "references": ["a", "b c d e f g h i j"]}
    assert WordErrorRate().compute(**texts) == {"wer": pytest.approx(1 / 10)}
    assert CharacterErrorRate().compute(**texts) == {"cer": pytest.approx(1 / 18)}


def edit_distance(left: list, right: list) -> int:
    """The textbook's, to compare with."""
    row = list(range(len(right) + 1))
    for index, item in enumerate(left, start=1):
        row, above = [index], row
        for column, other in enumerate(right, start=1):
            row.append(min(row[-1] + 1, above[column] + 1, above[column - 1] + (item != other)))
    return row[-1]


def test_against_the_textbook():
    random.seed(0)
    sentences = [[" ".join(random.choices("abc", k=random.randint(1, 9))) for _ in range(60)] for _ in range(2)]
    predictions, references = sentences
    edits = sum(edit_distance(p.split(), r.split()) for p, r in zip(predictions, references, strict=True))
    expected = edits / sum(len(reference.split()) for reference in references)
    metric = WordErrorRate(normalizer="none")
    assert metric.compute(predictions=predictions, references=references)["wer"] == pytest.approx(expected)
    edits = sum(edit_distance(list(p), list(r)) for p, r in zip(predictions, references, strict=True))
    expected = edits / sum(len(reference) for reference in references)
    metric = CharacterErrorRate(normalizer="none")
    assert metric.compute(predictions=predictions, references=references)["cer"] == pytest.approx(expected)


def test_details():
    result = WordErrorRate().compute(
        predictions=["a x c c c", "", "Hello..."], references=["a b c", "one two", "..."], details=True
    )
    utterances = result.pop("utterances")
    # "Hello" beside an empty reference is an insertion; it adds nothing to the length
    assert result == {"wer": 5 / 4, "substitutions": 1, "deletions": 1, "insertions": 3, "reference_words": 4}
    assert [utterance["reference_words"] for utterance in utterances] == [3, 1, 0]  # Whisper's writes "12"
    assert utterances[0] == {
        "wer": pytest.approx(1),
        "substitutions": 1,
        "deletions": 0,
        "insertions": 2,
        "reference_words": 3,
        "prediction": "a x c c c",
        "reference": "a b c",
    }
    assert utterances[2]["wer"] is None and utterances[2]["insertions"] == 1
    for name in ("substitutions", "deletions", "insertions", "reference_words"):
        assert sum(utterance[name] for utterance in utterances) == result[name]


def test_details_of_characters():
    result = CharacterErrorRate().compute(predictions=["abxx"], references=["abcde"], details=True)
    utterance = result.pop("utterances")
    assert result == {
        "cer": pytest.approx(3 / 5),
        "substitutions": 2,
        "deletions": 1,
        "insertions": 0,
        "reference_characters": 5,
    }
    assert utterance == [{**result, "prediction": "abxx", "reference": "abcde"}]


# --- Normalisers


@pytest.mark.parametrize("name", TEXT_NORMALIZERS)
@pytest.mark.parametrize("text", ["", "   ", "a", "wait...", "Größe", "हिन्दी", "你好"])
def test_every_normalizer_returns_clean_text(name, text):
    normalized = get_text_normalizer(name)(text)
    assert isinstance(normalized, str)
    if name != "none":
        assert normalized == " ".join(normalized.split())


@pytest.mark.parametrize(
    "name, text, expected",
    [
        ("none", " A  b. ", " A  b. "),
        ("lower", " The  Colour,\n don't ", "the colour, don't"),
        ("lower_no_punctuation", "The colour: don’t, twenty-one... (really)!", "the colour don't twenty one really"),
        ("lower_no_punctuation", "'quoted' rock 'n' roll, dogs'", "quoted rock n roll dogs"),
        ("lower_no_punctuation", "L’été, c'est l'ami", "l'été c'est l'ami"),
        ("lower_no_punctuation", "Cafe\u0301", "café"),
        ("lower_no_punctuation", "3.5 and 50%", "3 5 and 50"),
        ("lower_no_punctuation", "...", ""),
        ("lower_no_punctuation", "हिन्दी भाषा।", "हिन्दी भाषा"),  # vowel signs stay
        ("lower_no_punctuation", "你好，世界！", "你好 世界"),
        ("lower_no_punctuation", "Καλημέρα, κόσμε", "καλημέρα κόσμε"),
        ("lower_no_punctuation", "паралл·лель", "паралл·лель"),
        ("lower_no_punctuation", "می\u200cخواهم.", "می\u200cخواهم"),  # the joiner is spelling
        ("lower_no_punctuation", "co\u00adop", "coop"),
        ("lower_no_punctuation", "I \u2764\ufe0f you", "i you"),  # the heart's variation selector is no word
        ("lower_no_punctuation", "hi \U0001f469\u200d\U0001f467 you", "hi you"),  # nor is the emojis' joiner
        ("whisper", "The colour", "the color"),
        ("whisper", "Mr. Smith", "mister smith"),
        ("whisper", "twenty-one", "21"),
        ("whisper", "ten thousand dollars and fifty percent", "$10000 and 50%"),
        ("whisper", "1,000", "1000"),
        ("whisper", "I don't, we'll", "i do not we will"),
        ("whisper", "I don’t, weʼll", "i do not we will"),  # as models write it
        ("whisper", "um, hello [noise] (laughs)", "hello"),
        ("whisper", "wait... what…", "wait what"),
        ("whisper", "...", ""),
        ("whisper", "I \u2764\ufe0f you, \U0001f469\u200d\U0001f467!", "i you"),
        ("whisper_basic", "Größe: ÉTÉ, ñandú!", "größe été ñandú"),
        ("whisper_basic", "The colour of don't", "the colour of don t"),
        ("whisper_basic", "wait... [noise]", "wait"),
        ("whisper_basic", "Привет, мир", "привет мир"),
        ("whisper_basic", "हिन्दी", "ह न द"),  # as documented: not for Indic scripts
        ("whisper_basic", "hi \U0001f469\u200d\U0001f467 you", "hi you"),
    ],
)
def test_normalizers(name, text, expected):
    assert get_text_normalizer(name)(text) == expected


@pytest.mark.parametrize("name", ["lower", "lower_no_punctuation", "whisper", "whisper_basic"])
def test_normalizing_twice_changes_nothing(name):
    normalize = get_text_normalizer(name)
    for text in ("The colour, of Mr. Smith's 21 cats...", "don’t!", "Größe", "हिन्दी भाषा।", "I \u2764\ufe0f you"):
        assert normalize(normalize(text)) == normalize(text)


def test_the_normalizer_of_the_constructor_and_of_compute():
    pair = {"predictions": ["The colour!"], "references": ["the color"]}
    assert WordErrorRate().compute(**pair) == {"wer": 0}  # Whisper's
    assert WordErrorRate(normalizer="none").compute(**pair) == {"wer": 1}
    metric = WordErrorRate(normalizer="lower_no_punctuation")
    assert metric.compute(**pair) == {"wer": 0.5}
    assert metric.compute(**pair, normalizer="whisper") == {"wer": 0}
    assert metric.compute(**pair) == {"wer": 0.5}  # that was for one call
    assert CharacterErrorRate(normalizer="lower").compute(**pair)["cer"] == pytest.approx(2 / 9)


def test_a_function_as_normalizer():
    assert get_text_normalizer(str.upper) is str.upper
    assert wer("A b", "a B", normalizer=str.upper) == 0
    metric = WordErrorRate(normalizer=lambda text: text.replace("x", ""))
    assert metric.compute(predictions=["ax"], references=["a"]) == {"wer": 0}
    with pytest.raises(TypeError, match="must return a string, got list"):
        wer("a", "a", normalizer=str.split)


@pytest.mark.parametrize("name", ["Whisper", "english", "", 3, None, ["none"]])
def test_unknown_normalizers(name):
    with pytest.raises(ValueError, match="lower_no_punctuation"):
        get_text_normalizer(name)
    with pytest.raises(ValueError, match="There is no text normalizer"):
        CharacterErrorRate(normalizer=name)
    if name is not None:
        with pytest.raises(ValueError, match="There is no text normalizer"):
            wer("a", "a", normalizer=name)


@pytest.mark.parametrize("name", ["whisper", "whisper_basic"])
def test_without_whisper_normalizer(name, monkeypatch):
    real = builtins.__import__

    def without(module, *args, **kwargs):
        if module.startswith("whisper_normalizer"):
            raise ImportError(module)
        return real(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    normalizers_module._build.cache_clear()
    with pytest.raises(ImportError, match=f'"{name}".*pip install whisper-normalizer'):
        WordErrorRate(normalizer=name)
    assert WordErrorRate(normalizer="lower").compute(predictions=["A"], references=["a"]) == {"wer": 0}
    monkeypatch.undo()
    assert get_text_normalizer(name)("A") == "a"  # the failure was not remembered


# --- Adding, and what is refused


def test_adding_before_computing():
    metric = WordErrorRate()
    metric.add(prediction="a b", reference="a c")
    metric.add_batch(predictions=["d", "e"], references=["d", "f"])
    metric.add(predictions="g", references="g")  # as evaluate's own examples have it
    assert len(metric) == 4
    assert metric.compute() == {"wer": 2 / 5}
    metric.add(prediction="a", reference="a")
    assert metric.compute(predictions=["x"], references=["y"]) == {"wer": 1 / 2}
    with pytest.raises(ValueError, match="nothing to compute"):
        metric.compute()


@pytest.mark.parametrize("wrap", [list, tuple, np.array, iter], ids=["list", "tuple", "array", "iterator"])
def test_kinds_of_lists(wrap):
    assert WordErrorRate().compute(predictions=wrap(["a", "b"]), references=wrap(["a", "c"])) == {"wer": 0.5}


def test_an_empty_reference_counts_what_was_inserted():
    metric = WordErrorRate()
    assert metric.compute(predictions=["hello there", "a b"], references=["...", "a b"]) == {"wer": 2 / 2}
    assert metric.compute(predictions=["um...", "a b"], references=["", "a b"]) == {"wer": 0}
    assert CharacterErrorRate().compute(predictions=["abc", "a"], references=["", "a"]) == {"cer": 3}


@pytest.mark.parametrize("metric", [WordErrorRate, CharacterErrorRate])
@pytest.mark.parametrize(
    "predictions, references", [(["a"], ["..."]), (["", ""], ["", "  "]), ([], [])], ids=["dots", "blanks", "no pairs"]
)
def test_without_references_there_is_no_rate(metric, predictions, references):
    metric = metric()
    with pytest.raises(ValueError, match="not defined"):
        metric.compute(predictions=predictions, references=references)
    # and nothing of it is left behind
    assert list(metric.compute(predictions=["a"], references=["a"]).values()) == [0]


@pytest.mark.parametrize("value", [None, 3, 1.5, b"a", ["a"], math.nan], ids=str)
def test_texts_that_are_no_strings(value):
    metric = WordErrorRate()
    with pytest.raises(TypeError, match=r"`predictions\[1\]` must be a string"):
        metric.compute(predictions=["a", value], references=["a", "b"])
    with pytest.raises(TypeError, match=r"`references\[2\]` must be a string"):
        metric.add_batch(predictions=["a", "b", "c"], references=["a", "b", value])
    with pytest.raises(TypeError, match=r"must be a string"):
        metric.add(prediction="a", reference=value)
    assert metric.compute(predictions=["a"], references=["a"]) == {"wer": 0}


def test_one_string_is_not_a_list_of_letters():
    with pytest.raises(TypeError, match="`predictions` must be a list, got str"):
        WordErrorRate().compute(predictions="ab", references="ab")


def test_inputs_that_do_not_fit_together():
    metric = WordErrorRate()
    with pytest.raises(ValueError, match="1 predictions, 2 references"):
        metric.compute(predictions=["a"], references=["a", "b"])
    with pytest.raises(ValueError, match="missing: references"):
        metric.compute(predictions=["a"])
    with pytest.raises(ValueError, match="missing: predictions"):
        metric.add_batch(references=["a"])
    with pytest.raises(ValueError, match="not hypotheses"):
        metric.add_batch(predictions=["a"], references=["a"], hypotheses=["a"])
    assert metric.compute(predictions=["a"], references=["a"]) == {"wer": 0}


def test_misspelt_arguments_are_not_passed_over():
    with pytest.raises(TypeError, match="unexpected arguments: normaliser"):
        WordErrorRate().compute(predictions=["a"], references=["a"], normaliser="none")
    with pytest.raises(TypeError, match="unexpected arguments: normaliser"):
        WordErrorRate(normaliser="none")
    with pytest.raises(TypeError):
        WordErrorRate("none")  # would be the name of a configuration
    with pytest.raises(TypeError, match="unexpected arguments: normalizer"):
        RealTimeFactor(normalizer="none")


def test_an_unknown_normalizer_loses_nothing_that_was_added():
    metric = WordErrorRate()
    metric.add(prediction="a", reference="b")
    with pytest.raises(ValueError, match="no text normalizer"):
        metric.compute(normalizer="nun")
    assert metric.compute() == {"wer": 1}


def test_two_instances_do_not_collide():
    first, second = WordErrorRate(), WordErrorRate()
    first.add(prediction="a", reference="b")
    second.add(prediction="a", reference="a")
    assert (first.compute(), second.compute()) == ({"wer": 1}, {"wer": 0})


def test_pickled():
    metric = pickle.loads(pickle.dumps(WordErrorRate(normalizer="lower")))
    assert metric.compute(predictions=["A."], references=["a"]) == {"wer": 1}


def test_in_files(tmp_path):
    # What `evaluate.load` asks for
    metric = WordErrorRate(keep_in_memory=False, cache_dir=str(tmp_path))
    metric.add(prediction="a", reference="b")
    assert list(tmp_path.rglob("*.arrow"))
    assert metric.compute(predictions=["c"], references=["c"]) == {"wer": 0.5}


def test_thousands_of_pairs():
    references = [f"the quick brown fox number {index} did not jump over the lazy dog" for index in range(4000)]
    predictions = [reference.replace("quick", "thick") for reference in references]
    started = time.perf_counter()
    for metric in (WordErrorRate(), CharacterErrorRate()):
        metric.compute(predictions=predictions, references=references, details=True)
    assert time.perf_counter() - started < 20  # some 2 s; the rest is for busy machines


# --- Speed


def test_real_time_factor():
    metric = RealTimeFactor()
    # All over all, not the mean of 10 and 1
    assert metric.compute(audio_seconds=[10, 10], processing_seconds=[1, 10]) == {"rtfx": pytest.approx(20 / 11)}
    assert metric.compute(audio_seconds=12.5, processing_seconds=2) == {"rtfx": 6.25}
    assert metric.compute(audio_seconds=np.array([1.0, 2.0]), processing_seconds=torch.tensor([1.0, 0.5])) == {
        "rtfx": 2
    }
    assert metric.compute(audio_seconds=np.float32(3), processing_seconds=torch.tensor(1.5)) == {"rtfx": 2}
    assert metric.compute(audio_seconds=[0], processing_seconds=[1]) == {"rtfx": 0}
    metric.add(audio_seconds=3, processing_seconds=1)
    metric.add_batch(audio_seconds=[3], processing_seconds=[1])
    assert metric.compute(details=True) == {"rtfx": 3, "audio_seconds": 6, "processing_seconds": 2}


@pytest.mark.parametrize(
    "audio, processing, error, message",
    [
        ([1, -1], [1, 1], ValueError, r"`audio_seconds\[1\]`.*not negative"),
        ([1], [math.nan], ValueError, r"`processing_seconds\[0\]`.*finite"),
        ([math.inf], [1], ValueError, "finite"),
        ([None], [1], TypeError, r"`audio_seconds\[0\]` must be a number.*NoneType"),
        (["1"], [1], TypeError, "must be a number.*str"),
        ([True], [1], TypeError, "must be a number.*bool"),
        ("1", [1], TypeError, "must be a list"),
        ([1, 2], [1], ValueError, "2 audio_seconds, 1 processing_seconds"),
        ([1], [0], ValueError, "no processing time"),
        ([], [], ValueError, "no processing time"),
        ([1], None, ValueError, "missing: processing_seconds"),
        (None, None, ValueError, "nothing to compute"),
    ],
)
def test_real_time_factor_refuses(audio, processing, error, message):
    metric = RealTimeFactor()
    with pytest.raises(error, match=message):
        metric.compute(audio_seconds=audio, processing_seconds=processing)
    assert metric.compute(audio_seconds=1, processing_seconds=1) == {"rtfx": 1}


# --- Together


TEXTS = {"predictions": ["a b x d"], "references": ["a b c d"]}
TIMES = {"audio_seconds": [3.0], "processing_seconds": [1.5]}
RATES = {"wer": 1 / 4, "cer": 1 / 7}


def test_combine_error_rates():
    combined = evaluate.combine([WordErrorRate(), CharacterErrorRate()])
    assert combined.compute(**TEXTS) == pytest.approx(RATES)
    combined.add(prediction=TEXTS["predictions"][0], reference=TEXTS["references"][0])
    combined.add_batch(**TEXTS)
    assert combined.compute() == pytest.approx(RATES)
    assert combined.compute(**TEXTS, normalizer=lambda text: "a") == {"wer": 0, "cer": 0}


def test_combine_all_three():
    combined = evaluate.combine([WordErrorRate(), CharacterErrorRate(), RealTimeFactor()])
    assert combined.compute(**TEXTS, **TIMES) == pytest.approx({**RATES, "rtfx": 2})
    assert combined.compute(**TEXTS, audio_seconds=3, processing_seconds=1.5) == pytest.approx({**RATES, "rtfx": 2})
    # As many times as one likes: here five clips in one batch
    combined.add_batch(predictions=["a"] * 5, references=["a"] * 5, **TIMES)
    assert combined.compute() == {"wer": 0, "cer": 0, "rtfx": 2}
    combined.add(prediction="a", reference="b", audio_seconds=3, processing_seconds=1.5)
    assert combined.compute() == {"wer": 1, "cer": 1, "rtfx": 2}
    with pytest.raises(ValueError, match="RealTimeFactor has nothing to compute"):
        combined.compute(**TEXTS)
    with pytest.raises(TypeError, match="normaliser"):
        combined.compute(**TEXTS, **TIMES, normaliser="none")


def test_combine_with_details_and_names():
    combined = evaluate.combine({"words": WordErrorRate(), "characters": CharacterErrorRate()})
    result = combined.compute(**TEXTS, details=True)
    assert (result["wer"], result["reference_words"], result["words_substitutions"]) == (1 / 4, 4, 1)
    assert (result["reference_characters"], result["characters_utterances"][0]["cer"]) == (7, pytest.approx(1 / 7))
    two = evaluate.combine({"raw": WordErrorRate(normalizer="none"), "normalized": WordErrorRate()})
    assert two.compute(predictions=["A"], references=["a"]) == {"raw_wer": 1, "normalized_wer": 0}


# --- Other programs


def test_importing_mel_llm_imports_no_metrics():
    result = run(
        "-c", "import sys, mel_llm; print(sorted({'evaluate', 'jiwer', 'whisper_normalizer'} & set(sys.modules)))"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


COMPUTE = """
from mel_llm.evaluation import CharacterErrorRate, RealTimeFactor, WordErrorRate
pair = {"predictions": ["a b"], "references": ["a c"]}
metric = WordErrorRate()
metric.add(prediction="a b", reference="a c")
print(metric.compute(), CharacterErrorRate().compute(**pair))
print(RealTimeFactor().compute(audio_seconds=1, processing_seconds=1))
"""


def test_works_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").touch()  # no folder can be made below a file, not even by root
    result = run(
        "-c",
        COMPUTE,
        cwd=tmp_path,
        HF_HOME=str(tmp_path / "file" / "cache"),
        HF_HUB_OFFLINE="1",
        HF_EVALUATE_OFFLINE="1",
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["{'wer': 0.5} {'cer': 0.3333333333333333}", "{'rtfx': 1.0}"]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


LOCAL_METRIC = """
import mel_llm.evaluation


class WER(mel_llm.evaluation.WordErrorRate):
    def _compute(self, *args, **kwargs):
        return super()._compute(*args, **kwargs)["wer"]
"""
STOCK_SCRIPT = """
import evaluate

metric = evaluate.load("wer")
print(metric.compute(predictions=["The colour!", "x"], references=["the color", "y"]))
metric.add_batch(predictions=["a"], references=["b"])
print(metric.compute())
print(evaluate.load("wer", normalizer="none").compute(predictions=["A b"], references=["a b"]))
"""


def test_scripts_that_load_wer_work_offline_with_a_folder_beside_them(tmp_path):
    (tmp_path / "wer").mkdir()
    (tmp_path / "wer" / "wer.py").write_text(LOCAL_METRIC)
    (tmp_path / "script.py").write_text(STOCK_SCRIPT)
    result = run(
        "script.py", cwd=tmp_path, HF_HOME=str(tmp_path / "cache"), HF_HUB_OFFLINE="1", HF_EVALUATE_OFFLINE="1"
    )
    assert result.returncode == 0, result.stderr
    assert [float(line) for line in result.stdout.split()] == pytest.approx([1 / 3, 1, 1 / 2])


# --- In the Trainer


def padded(rows: list[list[int]], value: int = -100) -> np.ndarray:
    width = max(map(len, rows))
    return np.array([row + [value] * (width - len(row)) for row in rows])


@pytest.fixture
def ids(tokenizer):
    """Token ids of texts, with the end of text, padded with -100 as the Trainer pads."""

    def encode(*texts):
        return padded([[*tokenizer(text, add_special_tokens=False).input_ids, 2] for text in texts])

    return encode


@pytest.fixture
def processor(tokenizer):
    return SimpleNamespace(tokenizer=tokenizer)


def test_compute_metrics(ids, processor):
    compute_metrics = make_compute_metrics(processor)
    predictions, labels = ids("A b, x d", "e"), ids("a b c d", "e f g")
    expected = {"wer": pytest.approx(3 / 7), "cer": pytest.approx(5 / 12)}
    assert compute_metrics(EvalPrediction(predictions, labels)) == expected
    assert compute_metrics(EvalPrediction((predictions, np.zeros(3)), labels)) == expected
    assert compute_metrics(EvalPrediction(predictions.astype(np.int32), labels)) == expected
    assert compute_metrics(EvalPrediction(np.where(predictions == -100, 0, predictions), labels)) == expected
    # Labels that begin with -100, where the prompt was
    prompt = np.full((2, 3), -100)
    assert compute_metrics(EvalPrediction(predictions, np.concatenate([prompt, labels], axis=1))) == expected
    strict = make_compute_metrics(processor, normalizer="none")(EvalPrediction(predictions, labels))
    assert strict["wer"] == pytest.approx(5 / 7)  # and "A", "b,"


def test_compute_metrics_of_empty_predictions(ids, processor):
    nothing = np.full((2, 4), -100)
    assert make_compute_metrics(processor)(EvalPrediction(nothing, ids("a b", "c"))) == {"wer": 1, "cer": 1}


def test_compute_metrics_refuses(ids, processor):
    with pytest.raises(ValueError, match="no text normalizer"):
        make_compute_metrics(processor, normalizer="english")
    compute_metrics = make_compute_metrics(processor)
    labels = ids("a b")
    for logits in (np.zeros((1, 4, 320), np.float32), (np.zeros((1, 4, 320), np.float32),), np.zeros((1, 4))):
        with pytest.raises(ValueError, match="predict_with_generate"):
            compute_metrics(EvalPrediction(logits, labels))
    with pytest.raises(ValueError, match="no labels"):
        compute_metrics(EvalPrediction(labels, None))
