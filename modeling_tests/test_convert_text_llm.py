"""scripts/convert_text_llm.py: any causal language model, from a folder, a GGUF file or the Hub, to an untrained Mel-LLM."""

import json

import numpy as np
import pytest
import torch
from conftest import TINY_AUDIO, build_tiny, load_script, tiny_text_config
from phi4mm_checkpoints import phi4_tokenizer, tiny_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSpeechSeq2Seq,
    AutoModelForTextToWaveform,
    AutoProcessor,
    AutoTokenizer,
    pipeline,
    set_seed,
)

from mel_llm.conversion import take_ears


AUDIO = ["--audio_config", json.dumps(TINY_AUDIO)]


@pytest.fixture(scope="module")
def converter():
    return load_script("convert_text_llm")


def language_model(model_type="llama", **overrides):
    set_seed(0)
    return AutoModelForCausalLM.from_config(tiny_text_config(model_type, **overrides)).eval()


def save(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def check_scores(output, text_model, atol=1e-5):
    """The language model is what it was, and what is new lets sound through."""
    model = AutoModelForSpeechSeq2Seq.from_pretrained(output, dtype=torch.float32).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=ids).logits[..., :300], text_model(input_ids=ids).logits[..., :300], rtol=0, atol=atol
        )
        features = torch.randn(1, 40, 80)
        assert model.get_audio_features(features).pooler_output.std() > 1e-3
    return model


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "phi3"])
def test_a_folder(converter, tokenizer, speech_clips, tmp_path, model_type, capsys):
    text_model = language_model(model_type)
    source = save(text_model, tokenizer, tmp_path / "llm")
    converter.main([source, "--output_dir", str(tmp_path / "out"), *AUDIO])
    model = check_scores(tmp_path / "out", text_model)
    # The tokenizer's own <|audio|> is reused, so that nothing was added and nothing resized
    assert model.config.vocab_size == text_model.config.vocab_size and "'<|audio|>'" in capsys.readouterr().out
    assert len(AutoProcessor.from_pretrained(tmp_path / "out").tokenizer) == len(tokenizer)
    recogniser = pipeline("automatic-speech-recognition", model=str(tmp_path / "out"))
    assert isinstance(recogniser(speech_clips[0]["array"])["text"], str)


def test_another_chat_template(converter, tokenizer, tmp_path):
    source = save(language_model("llama"), tokenizer, tmp_path / "llm")
    template = tmp_path / "short.jinja"
    template.write_text(
        "{% for message in messages %}{{ message['content'] }}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
    )
    converter.main([source, "--output_dir", str(tmp_path / "out"), "--chat_template", str(template), *AUDIO])
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    content = [{"type": "audio", "audio": None}, {"type": "text", "text": "Go."}]
    asked = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert asked == "<|audio|>Go.:"
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.prompt_prefix_ids, config.prompt_suffix_ids) == processor.default_prompt_ids()
    with pytest.raises(OSError, match="nowhere.jinja"):
        converter.main(
            [source, "--output_dir", str(tmp_path / "no"), "--chat_template", str(tmp_path / "nowhere.jinja"), *AUDIO]
        )
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(("rate", "places"), [(2, [1, 2]), (8, [0, 0, 0, 1, 2, 3, 3, 3])])
def test_a_reader_goes_over_to_another_token_rate(converter, tokenizer, speech_clips, tmp_path, rate, places):
    """With what it knew of the language and, as far as it can be, of sound: 4 letters at 8 frames."""
    reader, processor = build_tiny(tokenizer, audio_config={"ctc_weight": 0.3, "reduction_factor": 8, "ctc_rate": 4})
    reader.save_pretrained(tmp_path / "reader")
    processor.save_pretrained(tmp_path / "reader")
    changed = json.dumps({"reduction_factor": 2 * rate, "ctc_rate": rate})
    converter.main([str(tmp_path / "reader"), "--output_dir", str(tmp_path / "out"), "--audio_config", changed])
    model = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "out").eval()
    its = AutoProcessor.from_pretrained(tmp_path / "out")
    assert model.config.audio_config.reduction_factor == its.reduction_factor == 2 * rate
    features = its(audio=speech_clips[0]["array"])
    num_tokens = len(model.get_audio_features(features["input_features"]).pooler_output)
    assert num_tokens == pytest.approx(features["input_features"].shape[1] / (2 * rate), abs=1)

    ours, theirs = model.model, reader.model
    for name, weights in theirs.language_model.state_dict().items():
        torch.testing.assert_close(ours.language_model.state_dict()[name], weights)
    torch.testing.assert_close(
        ours.audio_embedder.normalizer.global_mean, theirs.audio_embedder.normalizer.global_mean
    )
    stages = [conv.audio_embedder.conv.conv.state_dict() for conv in (ours, theirs)]
    shared = stages[0].keys() & stages[1].keys()
    assert len(shared) == min(map(len, stages)) and all(torch.equal(stages[0][key], stages[1][key]) for key in shared)
    assert torch.equal(ours.multi_modal_projector.linear_1.weight, theirs.multi_modal_projector.linear_1.weight)
    for new, spelt in zip(model.ctc_head.parameters(), reader.ctc_head.parameters(), strict=True):
        assert torch.equal(new.unflatten(0, (rate, 256)), spelt.unflatten(0, (4, 256))[places])


def test_ears_that_do_not_fit_are_refused_as_a_whole(tokenizer):
    linear = {"embedder_type": "linear", "reduction_factor": 8}
    (old, _), (new, _) = (build_tiny(tokenizer, audio_config=linear | more) for more in ({}, {"reduction_factor": 4}))
    with pytest.raises(ValueError, match="8 frames in a token and the model 4, which only a convolutional stem"):
        take_ears(new, old)
    (small, _), (large, _) = (
        build_tiny(tokenizer, audio_config={"ctc_weight": 0.3}, text={"hidden_size": width}) for width in (32, 64)
    )
    before = {name: value.clone() for name, value in large.state_dict().items()}
    with pytest.raises(ValueError, match="of another size.*linear_1"):
        take_ears(large, small)
    assert all(torch.equal(value, before[name]) for name, value in large.state_dict().items())


def test_a_reader_becomes_a_speaker_of_letters(converter, tokenizer, speech_clips, tmp_path, capsys):
    reader, processor = build_tiny(tokenizer, audio_config={"ctc_weight": 0.3})
    reader.save_pretrained(tmp_path / "reader")
    processor.save_pretrained(tmp_path / "reader")
    template = tmp_path / "short.jinja"
    template.write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    more = ["--letters_only", "--speaks", "--speech_instruction", "Say:", "--chat_template", str(template)]
    more += ["--transcription_instruction", ""]
    converter.main([str(tmp_path / "reader"), "--output_dir", str(tmp_path / "out"), *more])
    speaker = AutoModelForTextToWaveform.from_pretrained(tmp_path / "out").eval()
    its = AutoProcessor.from_pretrained(tmp_path / "out")
    assert its.tokenizer.tokenize("So it is.") == [*"SoĠitĠis."]
    assert its.tokenizer.decode(speaker.config.speech_prefix_ids) == "Say:\n"
    assert speaker.config.text_config.vocab_size == len(its.tokenizer) < len(tokenizer)

    # It hears what the reader hears, and thinks of it what the reader thinks
    features = processor(audio=speech_clips[0]["array"])
    with torch.no_grad():
        heard, before = (model.get_audio_features(features["input_features"]) for model in (speaker, reader.eval()))
        torch.testing.assert_close(heard.pooler_output, before.pooler_output)
        letters = its.tokenizer("be", add_special_tokens=False, return_tensors="pt")["input_ids"]
        same = torch.tensor([tokenizer.convert_tokens_to_ids(["b", "e"])])
        torch.testing.assert_close(
            speaker.model.language_model(input_ids=letters).last_hidden_state,
            reader.model.language_model(input_ids=same).last_hidden_state,
        )
    assert torch.equal(speaker.ctc_head.proj.weight, reader.ctc_head.proj.weight)
    assert len(speaker.generate(**its.apply_speech_request("So."), max_seconds=0.2)[0]) > 0

    with pytest.raises(ValueError, match="--audio_config is for new ears.*only `reduction_factor` and `ctc_rate`"):
        converter.main([str(tmp_path / "reader"), "--output_dir", str(tmp_path / "other"), *AUDIO])
    with pytest.raises(SystemExit):
        converter.parse_arguments(
            ["x", "--output_dir", "y", "--letters_only", "--vocab_size", "9", "--vocab_texts", "z"]
        )
    # What it is asked is what it was asked, unless something else is given; and where there was no threshold there is none
    reader.config.audio_config.silence_threshold = None
    reader.save_pretrained(tmp_path / "unthresholded")
    processor.save_pretrained(tmp_path / "unthresholded")
    converter.main([str(tmp_path / "unthresholded"), "--output_dir", str(tmp_path / "same")])
    same = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "same")
    assert same.config.prompt_suffix_ids == reader.config.prompt_suffix_ids
    assert same.config.audio_config.silence_threshold is None
    assert AutoProcessor.from_pretrained(tmp_path / "same").transcription_instruction == "Write it."
    with pytest.raises(ValueError, match="its voice cannot be taken along"):
        converter.main([str(tmp_path / "out"), "--output_dir", str(tmp_path / "again"), "--speaks"])
    converter.main([str(tmp_path / "reader"), "--output_dir", str(tmp_path / "llm"), "--text_only"])
    text_model = AutoModelForCausalLM.from_pretrained(tmp_path / "llm")
    assert torch.equal(text_model.lm_head.weight, reader.lm_head.weight)


def test_a_language_model_is_only_made_smaller(converter, tokenizer, speech_clips, tmp_path, capsys):
    text_model = language_model("llama")
    source = save(text_model, tokenizer, tmp_path / "llm")
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(clip["text"] for clip in speech_clips))
    smaller = ["--layers", "0", "--vocab_size", "300", "--vocab_texts", str(texts)]
    converter.main([source, "--output_dir", str(tmp_path / "out"), *smaller, "--text_only"])
    assert "1 layers, 300 tokens, a language model without ears" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    words = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.config.model_type == "llama" and model.config.num_hidden_layers == 1 and len(words) <= 300
    # It is what a Mel-LLM is made of in one go
    converter.main([source, "--output_dir", str(tmp_path / "whole"), *smaller, *AUDIO])
    whole = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "whole")
    assert torch.equal(whole.lm_head.weight, model.lm_head.weight)
    ids = words(speech_clips[0]["text"])["input_ids"]
    assert ids == AutoProcessor.from_pretrained(tmp_path / "whole").tokenizer(speech_clips[0]["text"])["input_ids"]
    with pytest.raises(SystemExit):
        converter.main([source, "--output_dir", str(tmp_path / "no"), "--text_only", *AUDIO])
    assert "leave --audio_config and --speaks out" in capsys.readouterr().err


def write_gguf(model, tokenizer, path):
    """A Llama as llama.cpp's converter writes it."""
    gguf = pytest.importorskip("gguf", reason="writing and reading GGUF files needs the package gguf")
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = {entry["content"] for entry in state["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in state["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)

    def permuted(value: np.ndarray, heads: int) -> np.ndarray:
        rows, columns = value.shape
        return np.ascontiguousarray(
            value.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
        )

    names = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        **{f"self_attn.{part}_proj": f"attn_{'output' if part == 'o' else part}" for part in "qkvo"},
        **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
    }
    for name, value in model.state_dict().items():
        array = value.float().numpy()
        if name == "model.embed_tokens.weight":
            writer.add_tensor("token_embd.weight", array)
        elif name == "model.norm.weight":
            writer.add_tensor("output_norm.weight", array)
        elif name != "lm_head.weight":
            _, _, layer, module = name.removesuffix(".weight").split(".", 3)
            if module[-6:] in ("q_proj", "k_proj"):
                heads = config.num_attention_heads if module[-6] == "q" else config.num_key_value_heads
                array = permuted(array, heads)
            writer.add_tensor(f"blk.{layer}.{names[module]}.weight", array)
    for step in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        step()


def test_a_gguf_file(converter, tokenizer, tmp_path):
    text_model = language_model(vocab_size=len(tokenizer))
    write_gguf(text_model, tokenizer, tmp_path / "tiny.gguf")
    converter.main([str(tmp_path / "tiny.gguf"), "--output_dir", str(tmp_path / "out"), *AUDIO])
    model = check_scores(tmp_path / "out", text_model)
    assert not hasattr(model.config.text_config, "quantization_config")
    assert all(parameter.requires_grad for parameter in model.parameters())
    text = "What is said in it."
    assert AutoProcessor.from_pretrained(tmp_path / "out").tokenizer(text)["input_ids"] == tokenizer(text)["input_ids"]
    converter.main([str(tmp_path), "--gguf_file", "tiny.gguf", "--output_dir", str(tmp_path / "again"), *AUDIO])
    check_scores(tmp_path / "again", text_model)


def test_what_cannot_be_converted_is_named(converter, tokenizer, tmp_path):
    output = ["--output_dir", str(tmp_path / "out"), *AUDIO]
    phi4_words = phi4_tokenizer(["hello"])
    phi4 = save(tiny_model(phi4_words), phi4_words, tmp_path / "phi4")
    with pytest.raises(ValueError, match="scripts/convert_phi4mm.py"):
        converter.main([phi4, *output])
    with pytest.raises(OSError, match="nowhere"):
        converter.main([str(tmp_path / "nowhere"), *output])
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(SystemExit):
        converter.main([str(tmp_path / "weights.bin"), *output])
    assert not (tmp_path / "out").exists()


def test_an_interrupted_conversion(converter, tokenizer, tmp_path, monkeypatch):
    text_model = language_model()
    source = save(text_model, tokenizer, tmp_path / "llm")
    arguments = [source, "--output_dir", str(tmp_path / "out"), *AUDIO]
    stale = tmp_path / ".out.partial"  # of a run that was killed
    stale.mkdir()
    (stale / "model-00001-of-00002.safetensors").write_bytes(b"half")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mel_llm.MelLLMProcessor.save_pretrained", interrupted)
        with pytest.raises(KeyboardInterrupt):
            converter.main(arguments)
    assert not stale.exists() and not (tmp_path / "out").exists()
    converter.main(arguments)
    assert not list((tmp_path / "out").glob("model-*"))
    check_scores(tmp_path / "out", text_model)
    with pytest.raises(FileExistsError, match="not an empty folder"):
        converter.main(arguments)
