"""Language models made smaller: layers and tokens that stay behave as before."""

import json

import pytest
import torch
from conftest import load_script, tiny_text_config
from test_train_script import folder, script, train, words  # noqa: F401  (fixtures among them)
from transformers import AutoModelForCausalLM, AutoModelForTextToWaveform, AutoProcessor

from mel_llm.conversion import from_text_llm, keep_layers, parse_layers, prune_vocabulary
from mel_llm.training import train_tokenizer


TEXTS = ["the cat sat on the mat", "a cat and a hat", "that cat"] * 5


@pytest.fixture(scope="module")
def big_tokenizer(speech_clips):
    tokenizer = train_tokenizer([clip["text"] for clip in speech_clips] * 4 + TEXTS * 4, vocab_size=600)
    tokenizer.add_tokens(["<|spare|>", "<|reserved_special_token_0|>"], special_tokens=True)
    return tokenizer


def language_model(tokenizer, **overrides):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_text_config(vocab_size=len(tokenizer), **overrides)).eval()


def test_layers_are_written_as_ranges():
    assert parse_layers("0-2, 5,7-7") == [0, 1, 2, 5, 7]
    for text in ("", "a", "3-", "-1", "1;2"):
        with pytest.raises(ValueError, match="are written"):
            parse_layers(text)


def test_the_layers_that_stay_compute_what_they_did(big_tokenizer):
    model = language_model(big_tokenizer, num_hidden_layers=4)
    smaller = keep_layers(model, [0, 1])
    ids = torch.tensor([[3, 4, 5, 6]])
    expected = model.model(ids, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(
        smaller.model(ids, output_hidden_states=True).hidden_states[1],
        model.model(ids, output_hidden_states=True).hidden_states[1],
    )
    torch.testing.assert_close(smaller.model(ids).last_hidden_state, smaller.model.norm(expected))
    assert smaller.config.num_hidden_layers == 2 and model.config.num_hidden_layers == 4
    # A cache needs layers that know their new places
    skipping = keep_layers(model, [0, 3])
    assert skipping.generate(ids, max_new_tokens=4, do_sample=False, use_cache=True).tolist() == (
        skipping.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False).tolist()
    )
    sliding = keep_layers(language_model(big_tokenizer, model_type="gemma3_text", num_hidden_layers=6), [0, 5])
    assert sliding.config.layer_types == ["sliding_attention", "full_attention"]
    for layers in ([], [4], [0, 0]):
        with pytest.raises(ValueError, match="numbers from 0 to 3"):
            keep_layers(model, layers)


def test_texts_of_tokens_that_stay_are_what_they_were(big_tokenizer):
    model = language_model(big_tokenizer)
    before = [big_tokenizer.tokenize(text) for text in TEXTS]
    ids = big_tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    expected = model(ids).logits
    embedded = model.get_input_embeddings()(ids)

    model, smaller = prune_vocabulary(model, big_tokenizer, TEXTS, vocab_size=300)
    assert len(smaller) <= 300 < len(big_tokenizer) and model.config.vocab_size == len(smaller)
    assert [smaller.tokenize(text) for text in TEXTS] == before
    new_ids = smaller(TEXTS[0], return_tensors="pt")["input_ids"]
    torch.testing.assert_close(model.get_input_embeddings()(new_ids), embedded)
    kept = big_tokenizer.convert_tokens_to_ids(smaller.convert_ids_to_tokens(range(len(smaller))))
    torch.testing.assert_close(model(new_ids).logits, expected[..., kept])
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight

    for text in ("Völlig anders: 東京!", "  spaces  stay ", "The mat."):
        assert smaller.decode(smaller(text)["input_ids"]) == big_tokenizer.decode(big_tokenizer(text)["input_ids"])
    for name in ("bos_token", "eos_token", "pad_token"):
        assert getattr(smaller, name) == getattr(big_tokenizer, name)
    assert smaller.convert_ids_to_tokens(model.config.eos_token_id) == smaller.eos_token
    assert smaller.tokenize("<|spare|>") == ["<|spare|>"]
    reader, processor = from_text_llm(model, smaller)
    assert reader.config.vocab_size == len(smaller) and processor.audio_token in smaller.get_vocab()


def test_a_vocabulary_that_cannot_be_pruned(big_tokenizer):
    with pytest.raises(ValueError, match="bytes and special tokens; got 100"):
        prune_vocabulary(language_model(big_tokenizer), big_tokenizer, TEXTS, vocab_size=100)


@pytest.fixture(scope="module")
def converter():
    return load_script("convert_text_llm")


def test_the_script_makes_what_train_goes_on_with(converter, script, folder, big_tokenizer, tmp_path, capsys):  # noqa: F811
    language_model(big_tokenizer, num_hidden_layers=3).save_pretrained(tmp_path / "llm")
    big_tokenizer.save_pretrained(tmp_path / "llm")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    output = tmp_path / "start"
    arguments = [str(tmp_path / "llm"), "--output_dir", str(output), "--layers", "0,2", "--speaks"]
    arguments += ["--vocab_size", "400", "--vocab_texts", str(tmp_path / "texts.txt")]
    arguments += ["--audio_config", json.dumps({"reduction_factor": 4, "conv_channels": 8, "hidden_size": 32})]
    arguments += ["--speech_config", json.dumps({"head_hidden_size": 16, "postnet_channels": 8})]
    converter.main(arguments)
    assert "2 layers" in capsys.readouterr().out
    processor = AutoProcessor.from_pretrained(output)
    whole = AutoModelForTextToWaveform.from_pretrained(output)
    assert whole.config.text_config.num_hidden_layers == 2 and len(processor.tokenizer) <= 400
    # The words of the prompt did not fall to pieces
    prompt = processor.tokenizer.convert_ids_to_tokens(whole.config.prompt_suffix_ids)
    assert len(prompt) < 1.5 * len(big_tokenizer.tokenize(processor.tokenizer.decode(whole.config.prompt_suffix_ids)))

    train(
        script,
        *words(
            folder, tmp_path / "run", "--model_name_or_path", str(output), "--tasks", "asr,tts", "--max_steps", "2"
        ),
    )
    trained = AutoModelForTextToWaveform.from_pretrained(tmp_path / "run")
    assert trained.model.audio_embedder.normalizer.global_mean.abs().min() > 1  # it was measured

    with pytest.raises(FileExistsError, match="not an empty folder"):
        converter.main(arguments)
    with pytest.raises(SystemExit):
        converter.parse_arguments([str(tmp_path), "--output_dir", "x", "--vocab_size", "5"])
