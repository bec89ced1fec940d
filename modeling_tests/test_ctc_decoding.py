"""Decoding with the CTC head beside the language model: prefix scores against all alignments, and what `generate` writes."""

import copy
import itertools
import math

import pytest
import torch
from conftest import build_tiny
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_ctc import batch_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForSpeechSeq2Seq, PreTrainedTokenizerFast

from mel_llm.ctc_decoding_mel_llm import CTCLogitsProcessor, CTCPrefixScorer, plain_letters
from mel_llm.spelling import ctc_bytes, token_bytes
from mel_llm.training import lora_config


A, B, SPACE = ord("a"), ord("b"), ord(" ")


@pytest.fixture
def spelling(tokenizer):
    return build_tiny(tokenizer, audio_config={"ctc_weight": 0.5, "ctc_rate": 4})


def all_spellings(log_probs: torch.Tensor) -> dict[bytes, float]:
    """What is spelt, over all paths through a few letters, to its log probability."""
    found: dict[bytes, float] = {}
    letters = [0, A, B, SPACE]
    for path in itertools.product(letters, repeat=len(log_probs)):
        spelt = bytes(letter for letter, _ in itertools.groupby(path) if letter)
        score = sum(float(log_probs[place, letter]) for place, letter in enumerate(path))
        found[spelt] = float(torch.logaddexp(torch.tensor(found.get(spelt, -math.inf)), torch.tensor(score)))
    return found


def few_letters(num_places: int, seed: int) -> torch.Tensor:
    scores = torch.full((num_places, 256), -1e4, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    scores[:, [0, A, B, SPACE]] = torch.randn(num_places, 4, generator=generator, dtype=torch.float64)
    return scores.log_softmax(-1)


@pytest.mark.parametrize("text", [b"a", b"b", b"ab", b"aa", b"a b", b"baa", b"abab"])
def test_prefix_scores_are_those_of_all_alignments(text):
    """Of a clip by itself and beside a longer one, in one go and letter by letter."""
    short, long = few_letters(5, 0), few_letters(7, 1)
    batch = torch.zeros(2, 7, 256, dtype=torch.float64)
    batch[0, :5], batch[1] = short, long
    scorer = CTCPrefixScorer(batch, torch.tensor([5, 7]))
    clips = torch.tensor([0, 1])
    begun = scorer.advance(clips, scorer.start(clips), [0, 1], [text, text])
    stepwise = scorer.start(clips)
    for letter in text:
        stepwise = scorer.advance(clips, stepwise, [0, 1], [bytes([letter])] * 2)
    for clip, log_probs in enumerate((short, long)):
        found = all_spellings(log_probs)
        begins = torch.tensor([score for spelt, score in found.items() if spelt.startswith(text)])
        expected = (begins.logsumexp(0), torch.tensor(found.get(text, -math.inf)))
        for prefixes in (begun, stepwise):
            assert float(prefixes.score[clip]) == pytest.approx(float(expected[0]), abs=1e-5)
            assert float(scorer.ending(prefixes)[clip]) == pytest.approx(float(expected[1]), abs=1e-5)


def test_what_parts_words_is_one_space_between_them():
    log_probs = few_letters(6, 2)
    scorer = CTCPrefixScorer(log_probs[None], torch.tensor([6]))
    clip = torch.tensor([0])

    def score(*texts):
        prefixes = scorer.start(clip)
        for text in texts:
            prefixes = scorer.advance(clip, prefixes, [0], [text])
        return float(prefixes.score), float(scorer.ending(prefixes))

    assert score(b" a", b" ", b" b", b" ") == pytest.approx(score(b"a b "))
    assert score(b" ") == score()
    # A text that ends so far may go on with another word, or be all
    found = all_spellings(log_probs)
    either = torch.tensor([value for spelt, value in found.items() if spelt == b"ab" or spelt.startswith(b"ab ")])
    for texts in ([b"ab "], [b"ab", b" "], [b"ab ", b" "]):
        assert score(*texts) == pytest.approx((float(either.logsumexp(0)), found[b"ab"]), abs=1e-5)


def test_the_ending_is_the_ctc_loss(spelling, speech_clips):
    model, processor = spelling
    clips = speech_clips[:3]
    batch = batch_of(processor, clips)
    features, mask = batch["input_features"], batch["attention_mask"]
    ids, prompt_mask = model._build_prompt(features, mask)
    with torch.no_grad():
        states, _ = model._read_prompts(ids, prompt_mask, features, mask)
        scorer = model._ctc_scorer(ids, states)
        assert torch.equal(CTCPrefixScorer(*model.get_ctc_log_probs(features, attention_mask=mask)).sums, scorer.sums)
        each = torch.arange(3)
        spelt = [bytes(ctc_bytes(clip["text"])) for clip in clips]
        ending = scorer.ending(scorer.advance(each, scorer.start(each), [0, 1, 2], spelt))
        for row, clip in enumerate(clips):
            loss = model(**batch_of(processor, [clip])).ctc_loss * len(spelt[row])
            assert float(-ending[row]) == pytest.approx(float(loss), rel=1e-3)


def test_the_letters_that_are_heard(spelling, tokenizer, speech_clips):
    model, processor = spelling
    inputs = processor(audio=[clip["array"] for clip in speech_clips[:2]], sampling_rate=16000)
    log_probs, num_places = model.get_ctc_log_probs(**inputs)
    tokens = -(-inputs["attention_mask"].sum(1) // model.config.audio_config.reduction_factor)
    assert num_places.tolist() == (4 * tokens).tolist() and log_probs.shape == (2, 4 * int(tokens.max()), 256)
    torch.testing.assert_close(log_probs.exp().sum(-1)[0, : num_places[0]], torch.ones(int(num_places[0])))
    with pytest.raises(ValueError, match="no CTC head"):
        build_tiny(tokenizer)[0].get_ctc_log_probs(**inputs)


def spelt_by(table: torch.Tensor, ids: list[int]) -> str:
    """What the scorer is to spell of tokens, one after the other: all that it has is their bytes."""
    scorer = CTCPrefixScorer(torch.zeros(1, 4, 256), torch.tensor([4]))
    clip, letters, spell = torch.tensor([0]), [], scorer._spell

    def spelling(clips, prefixes, letter):
        letters.append(int(letter))
        return spell(clips, prefixes, letter)

    scorer._spell = spelling
    scorer._open_score = lambda clips, prefixes: prefixes.score  # tries what may come
    prefixes = scorer.start(clip)
    for token in ids:
        prefixes = scorer.advance(clip, prefixes, [0], [table[token].numpy().tobytes().rstrip(b"\0")])
    return bytes(letters).decode()


@pytest.mark.parametrize(
    "text", ["It\u2019s 5 o'clock,  HERE -- \u201cquoted\u201d\u2026", "Übermäßig GROẞE CAFÉS", "Привет, Мир! 東京"]
)
@pytest.mark.parametrize("kind", ["bytes", "metaspace", "fallback"])
def test_tokens_spell_what_their_text_does(tokenizer, text, kind):
    """Whatever the pieces: characters that are split into bytes, too."""
    if kind != "bytes":
        tokenizer = sentencepiece_like(text if kind == "metaspace" else "abc")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    table = token_bytes(tokenizer, len(tokenizer) + 2, 32)
    assert spelt_by(table, ids) == bytes(ctc_bytes(text)).decode()
    assert not table[tokenizer.all_special_ids].any() and not table[len(tokenizer) :].any()


def sentencepiece_like(text: str) -> PreTrainedTokenizerFast:
    """A tokenizer that marks spaces by `▁` and has the letters of a text, and bytes for the others."""
    letters = sorted({"▁", *text.replace(" ", "▁")})
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    backend = Tokenizer(
        models.BPE({token: i for i, token in enumerate(tokens)}, [], unk_token="<unk>", byte_fallback=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def test_words_that_continue_others_are_known_as_such():
    vocabulary = {token: i for i, token in enumerate(["[UNK]", "##s", "the", "dog"])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece(cleanup=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    table = token_bytes(tokenizer, 4, 32)
    assert spelt_by(table, tokenizer("the dogs the dog")["input_ids"]) == "the dogs the dog"


def test_texts_too_long_are_cut_between_characters(tokenizer, caplog):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(["aaaäää"])
    table = token_bytes(tokenizer, len(tokenizer), 6)
    assert bytes(table[-1].tolist()).rstrip(b"\0").decode() == "aaaä"
    assert "longer than 6 bytes" in caplog.text


def spells_nothing(model) -> torch.Tensor:
    texts = [row.numpy().tobytes().rstrip(b"\0").decode(errors="replace") for row in model.token_bytes.table]
    return torch.tensor([not plain_letters(text).strip() for text in texts])


def certain_head(model, processor, clips, texts):
    """Makes the head spell the texts, whatever the states are: it gets the scores of each batch from here."""

    def log_probs(states, places):
        counts = places.sum(-1) * model.ctc_head.rate
        scores = torch.full((len(places), int(counts.max()), 256), -30.0)
        for row, text in enumerate(texts[: len(places)]):
            letters = ctc_bytes(text)
            assert 2 * len(letters) <= counts[row]
            scores[row, :, 0] = 0.0
            for place, letter in enumerate(letters):
                scores[row, 2 * place, [0, letter]] = torch.tensor([-30.0, 0.0])
        return scores.log_softmax(-1), counts

    model.ctc_head.log_probs = log_probs


@pytest.mark.parametrize("num_beams", [1, 3])
def test_an_untrained_language_model_writes_what_the_head_spells(spelling, speech_clips, monkeypatch, num_beams):
    model, processor = spelling
    monkeypatch.setattr("mel_llm.ctc_decoding_mel_llm._NUM_CANDIDATES", model.config.vocab_size)
    texts = ["one two", "three"]
    certain_head(model, processor, speech_clips, texts)
    inputs = processor([clip["array"] for clip in speech_clips[:2]], return_tensors="pt")
    # Of commas and the like the head thinks nothing, and this language model knows nothing of them
    silent = torch.where(spells_nothing(model))[0].tolist()
    unwritten = [token for token in silent if token != model.config.response_eos_token_id]
    options = {"num_beams": num_beams, "max_new_tokens": 24, "ctc_decoding_weight": 0.95, "suppress_tokens": unwritten}
    written = model.generate(**inputs, **options)
    assert [
        bytes(ctc_bytes(text)).decode() for text in processor.batch_decode(written, skip_special_tokens=True)
    ] == texts
    # The checkpoint may say so, and the call has the last word
    model.config.audio_config.ctc_decoding_weight = options.pop("ctc_decoding_weight")
    assert torch.equal(model.generate(**inputs, **options), written)
    assert not torch.equal(model.generate(**inputs, **options, ctc_decoding_weight=0.0), written)


def test_what_spells_nothing_is_not_written_for_ever(spelling, speech_clips, monkeypatch):
    """A head that hears other words than the language model knows leaves it commas, which cost nothing."""
    model, processor = spelling
    monkeypatch.setattr("mel_llm.ctc_decoding_mel_llm._NUM_CANDIDATES", model.config.vocab_size)
    certain_head(model, processor, speech_clips, ["one"])
    inputs = processor([speech_clips[0]["array"]])
    written = model.generate(**inputs, max_new_tokens=24, ctc_decoding_weight=0.95)[0].tolist()
    assert bytes(ctc_bytes(processor.decode(written, skip_special_tokens=True))) == b"one"
    runs = [len(list(run)) for silent, run in itertools.groupby(spells_nothing(model)[written].tolist()) if silent]
    assert max(runs, default=0) < 8  # three that part words, parts of characters, the end of text


def test_a_clip_is_written_the_same_beside_others(spelling, speech_clips):
    model, processor = spelling
    clips = [clip["array"] for clip in speech_clips[:3]]
    options = {"num_beams": 2, "max_new_tokens": 12, "ctc_decoding_weight": 0.3, "length_penalty": 0.0}
    together = model.generate(**processor(clips), **options)
    for row, clip in enumerate(clips):
        alone = model.generate(**processor([clip]), **options)[0]
        text = processor.decode(together[row], skip_special_tokens=True)
        assert processor.decode(alone, skip_special_tokens=True) == text
    silent = model.generate(**processor([0 * clips[0], clips[1]]), **options)
    assert processor.batch_decode(silent, skip_special_tokens=True)[0] == ""
    assert (
        processor.batch_decode(silent, skip_special_tokens=True)[1]
        == processor.batch_decode(together, skip_special_tokens=True)[1]
    )


FIND = CTCLogitsProcessor._find


def test_steps_that_nothing_is_known_of_are_scored_from_the_start(spelling, speech_clips, monkeypatch):
    """Assisted decoding asks about texts that no step before has weighed."""
    model, processor = spelling
    inputs = processor([speech_clips[0]["array"]])
    options = {"max_new_tokens": 10, "ctc_decoding_weight": 0.4}
    expected = model.generate(**inputs, **options)
    assert torch.equal(model.generate(**inputs, **options, prompt_lookup_num_tokens=3), expected)
    monkeypatch.setattr("mel_llm.ctc_decoding_mel_llm.CTCLogitsProcessor._find", _from_the_start)
    assert torch.equal(model.generate(**inputs, **options), expected)


def _from_the_start(self, clips, texts):
    self.known = {}
    return FIND(self, clips, texts)


def test_transcripts_of_any_length_take_it(spelling, speech_clips):
    model, processor = spelling
    audio = speech_clips[0]["array"]
    plain = model.transcribe(audio, processor, max_new_tokens=8).text
    weighed = model.transcribe(audio, processor, max_new_tokens=8, ctc_decoding_weight=0.9).text
    assert plain != weighed


@pytest.mark.parametrize("more", [{}, {"num_beams": 3}, {"do_sample": True}])
@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_a_text_that_does_not_fit_into_its_clip(spelling, speech_clips, more, weight):
    """More letters are asked for than there are places for them: no worse than without the head, alone and beside others."""
    model, processor = spelling
    clip = speech_clips[0]["array"]
    for clips in ([clip[:400]], [clip[:400], clip[:8000]]):
        torch.manual_seed(0)
        options = {"min_new_tokens": 40, "max_new_tokens": 40, "ctc_decoding_weight": weight, **more}
        output = model.generate(**processor(clips), **options, output_scores=True, return_dict_in_generate=True)
        assert output.sequences.shape == (len(clips), 40)
        assert not any(scores.isnan().any() for scores in output.scores)


def test_a_text_without_a_place_can_only_end():
    """The same alone and beside a longer clip."""
    log_probs = few_letters(2, 0)
    batch = torch.zeros(2, 9, 256, dtype=torch.float64)
    batch[0, :2] = log_probs
    for scorer in (CTCPrefixScorer(log_probs[None], torch.tensor([2])), CTCPrefixScorer(batch, torch.tensor([2, 9]))):
        table = torch.tensor([list(b"a"), list(b"b"), [0]], dtype=torch.uint8)
        weigh = CTCLogitsProcessor(scorer, table, 1.0, 0, [2], torch.tensor([2]))
        num_clips = len(scorer.log_probs)
        for text, expected in (
            ([0], None),
            ([0, 1], [-1e3, -1e3]),
            ([0, 1, 0], [-1e3, -1e3]),
            ([0, 1, 0, 1], [-1e3, -1e3]),
        ):
            scores = weigh(torch.tensor([text] * num_clips), torch.zeros(num_clips, 3))[0]
            assert scores.isfinite().all()
            if expected is not None:
                assert scores[:2].tolist() == expected and scores[2] > -1


def hears(text: bytes) -> CTCPrefixScorer:
    """The scorer of a clip in which the head hears these letters, and nearly nothing else."""
    places = torch.full((2 * len(text), 256), -9.0, dtype=torch.float64)
    places[::2, 0] = 0.0  # blanks between them
    for place, letter in enumerate(text):
        places[2 * place + 1, letter] = 0.0
    return CTCPrefixScorer(places.log_softmax(-1)[None], torch.tensor([len(places)]))


def test_what_is_likeliest_next():
    scorer, clip = hears(b"aab ab"), torch.tensor([0])
    begun = scorer.advance(clip, scorer.start(clip), [0, 0, 0], [b"", b"a", b"aab"])
    assert scorer.continuation(torch.tensor([0, 0, 0]), begun, 3) == [b"aab", b"ab ", b" ab"]


def test_a_word_that_the_language_model_does_not_expect_is_written(monkeypatch):
    """Neither among its likeliest nor by commas in the place of it."""
    monkeypatch.setattr("mel_llm.ctc_decoding_mel_llm._NUM_CANDIDATES", 3)
    words = [b"xx", b"yy", b",", b"abba", b" ab", b"bb", b" Ba", b"<end>"]
    table = torch.tensor([list(word.ljust(5, b"\0")) for word in words[:-1]] + [[0] * 5], dtype=torch.uint8)
    weigh = CTCLogitsProcessor(hears(b"abba ba"), table, 0.5, 1, [7], torch.tensor([7]))
    expects = torch.tensor([[5.0, 4.0, 3.0, -9.0, -9.0, -9.0, -9.0, -9.0]])
    written = [7]
    for _ in range(3):
        written.append(int(weigh(torch.tensor([written]), expects).argmax()))
    assert b"".join(words[token] for token in written[1:]) == b"abba Ba<end>"
    # The language model alone decides about a comma
    expects[0, 2] = 6.0
    scores = weigh(torch.tensor([[7, 3]]), expects)
    assert int(scores.argmax()) == 2 and float(scores[0, 2]) > -100


def test_letters_go_with_the_checkpoint(spelling, speech_clips, tmp_path):
    model, processor = spelling
    model.config.audio_config.ctc_decoding_weight = 0.25
    model.save_pretrained(tmp_path)
    again = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path)
    assert torch.equal(again.token_bytes.table, model.token_bytes.table) and again.token_bytes.table.any()
    assert again.config.audio_config.ctc_decoding_weight == 0.25
    inputs = processor([speech_clips[0]["array"]])
    assert torch.equal(again.generate(**inputs, max_new_tokens=6), model.generate(**inputs, max_new_tokens=6))
    size = model.config.vocab_size
    again.resize_token_embeddings(size + 3)
    assert again.token_bytes.table.shape == (size + 3, 32) and not again.token_bytes.table[size:].any()
    again.generate(**inputs, max_new_tokens=2)
    again.save_pretrained(tmp_path / "larger")
    larger = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "larger")
    assert torch.equal(larger.token_bytes.table, again.token_bytes.table)
    again.resize_token_embeddings(size)
    assert torch.equal(again.token_bytes.table, model.token_bytes.table)


def test_adapters_need_no_texts_of_tokens(tokenizer, speech_clips, tmp_path):
    """Their base has them: what adapters saved before there were any still loads."""
    model, _ = build_tiny(tokenizer, audio_config={"ctc_weight": 0.5})
    model.save_pretrained(tmp_path / "base")
    get_peft_model(model, lora_config(model, "small")).save_pretrained(tmp_path / "adapter")
    assert not any("token_bytes" in key for key in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    base = load_file(tmp_path / "base" / "model.safetensors")
    base.pop("token_bytes.table")
    save_file(base, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    base = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "base")
    assert not base.token_bytes.table.any()
    PeftModel.from_pretrained(base, tmp_path / "adapter")


def test_what_cannot_be_decoded_so_is_said(tokenizer, spelling, speech_clips):
    model, processor = spelling
    inputs = processor([speech_clips[0]["array"]])
    for weight in (-0.1, 1.5, "0.3", float("nan")):
        with pytest.raises(ValueError, match="from 0 to 1"):
            model.generate(**inputs, ctc_decoding_weight=weight)
    chat = processor.apply_transcription_request(speech_clips[0]["array"])
    with pytest.raises(ValueError, match="without `input_ids`"):
        model.generate(**chat, ctc_decoding_weight=0.3)
    with pytest.raises(ValueError, match=r"\(\d+, 32\), got \(2, 32\)"):
        model.token_bytes.set(torch.zeros(2, 32))
    model.token_bytes.table.zero_()
    with pytest.raises(ValueError, match="token_bytes"):
        model.generate(**inputs, ctc_decoding_weight=0.3)
    model.token_bytes.set(token_bytes(processor.tokenizer, *model.token_bytes.table.shape))
    model.generate(**inputs, ctc_decoding_weight=0.3, max_new_tokens=1)
    with pytest.raises(ValueError, match="ctc_weight is 0"):
        build_tiny(tokenizer, audio_config={"ctc_decoding_weight": 0.3})
    plain, processor = build_tiny(tokenizer)
    with pytest.raises(ValueError, match="CTC head"):
        plain.generate(**inputs, ctc_decoding_weight=0.3)


def test_places_that_all_texts_are_past_are_left_out():
    """Nothing of what is spelt behind them changes."""
    text = b"ab ba ab aab"
    places = 8 * len(text)
    log_probs = torch.full((places, 256), -40.0, dtype=torch.float64)
    for place in range(places):  # each letter is heard in the middle of eight places
        log_probs[place, text[place // 8] if place % 8 == 4 else 0] = 0.0
    scorer = CTCPrefixScorer(log_probs.log_softmax(-1)[None], torch.tensor([places]))
    clip = torch.tensor([0])
    begun = scorer.start(clip)
    for letter in text[:6]:
        begun = scorer.advance(clip, begun, [0], [bytes([letter])])
    short = scorer.advance(clip, begun, [0, 0], [b"ab", b"ba"])
    assert short.first > 16 and short.spelling.shape[1] == places + 1 - short.first
    whole = scorer.advance(clip, scorer.start(clip), [0, 0], [text[:6] + b"ab", text[:6] + b"ba"])
    assert whole.first == 0
    torch.testing.assert_close(short.score, whole.score)
    torch.testing.assert_close(scorer.ending(short), scorer.ending(whole))
    clips = torch.tensor([0, 0])
    assert scorer.continuation(clips, short, 3) == scorer.continuation(clips, whole, 3)


@pytest.mark.parametrize(
    "more", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"do_sample": True}]
)
def test_audio_is_read_once(spelling, speech_clips, more):
    """For the head and the language model, and for all beams; and what is written is what it was read twice for."""
    model, processor = spelling
    inputs = processor([clip["array"] for clip in speech_clips[:2]])
    options = {"ctc_decoding_weight": 0.4, "max_new_tokens": 12, **more}
    read = []
    handle = model.model.audio_embedder.register_forward_hook(lambda _, args, __: read.append(len(args[0])))
    torch.manual_seed(0)
    once = model.generate(**inputs, **options)
    assert read == [2]
    torch.manual_seed(0)
    twice = model.generate(**inputs, **options, output_hidden_states=True, return_dict_in_generate=True)
    assert len(read) == 3  # the states of the whole prompt are asked for
    handle.remove()
    assert torch.equal(once, twice.sequences)
    assert twice.hidden_states[0][0].shape[1] > 1


def test_no_capital_stands_in_a_word_unless_it_is_the_likeliest():
    """The head hears letters and no capitals, so it must not choose between tokens that spell the same."""
    texts = [b" mail", b"box", b"Box", b" Box", b"mBox", b"BOX"]
    table = torch.zeros(len(texts) + 1, 8, dtype=torch.uint8)
    for row, text in enumerate(texts):
        table[row, : len(text)] = torch.tensor(list(text), dtype=torch.uint8)
    log_probs = torch.full((12, 256), -20.0, dtype=torch.float64)
    for place, letter in enumerate(b"mailbox"):
        log_probs[place, letter] = 0.0
    log_probs[7:, 0] = 0.0
    end = len(texts)
    scorer = CTCPrefixScorer(log_probs.log_softmax(-1)[None], torch.tensor([12]))
    weigh = CTCLogitsProcessor(scorer, table, 0.5, 0, [end], torch.tensor([end]))
    written = torch.tensor([[5.0, 1.0, 2.0, 2.0, 2.0, 2.0, 0.0]])  # the language model would say " mail" again
    scores = weigh(torch.tensor([[0]]), written)[0]
    assert int(scores.argmax()) == 1 and all(scores[token] < -400 for token in (2, 4, 5))
    expected = written.clone()
    expected[0, 2] = 9.0  # what it is sure of it may write
    assert int(weigh(torch.tensor([[0]]), expected)[0].argmax()) == 2
