"""The model: the stem against Phi-4-multimodal's own, lengths, equalities, losses, saving."""

import inspect
import shutil
import sys

import pytest
import torch
from conftest import BACKBONES, TINY_AUDIO, build_tiny, tiny_text_config
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSpeechSeq2Seq,
    Phi4MultimodalAudioConfig,
    Phi4MultimodalAudioModel,
    set_seed,
)

from mel_llm import MelLLMAudioConfig, MelLLMConfig, MelLLMForSpeechSeq2Seq, MelLLMModel, modeling_mel_llm
from mel_llm.conversion import from_text_llm
from mel_llm.modeling_mel_llm import MelLLMAudioEmbedder, MelLLMConvSubsampling


def features(*lengths: int, bins: int = 80) -> tuple[torch.Tensor, torch.Tensor]:
    """Random log-mel of clips of these lengths, with junk in the padding: nothing may read it."""
    torch.manual_seed(sum(lengths))
    x = torch.rand(len(lengths), max(lengths), bins) * 12 + 6
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return torch.where(mask[..., None], x, 1e4), mask.long()


def embedder(**config) -> tuple[MelLLMAudioEmbedder, MelLLMAudioConfig]:
    config = MelLLMAudioConfig(**{**TINY_AUDIO, **config})
    set_seed(0)
    return MelLLMAudioEmbedder(config).eval(), config


# --- the stem ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction_factor", [2, 4, 8, 16])
def test_stem_is_phi4s_stem(reduction_factor):
    source = Phi4MultimodalAudioModel(
        Phi4MultimodalAudioConfig(
            time_reduction=reduction_factor, nemo_conv_channels=8, hidden_size=32, num_blocks=1, num_attention_heads=2,
            intermediate_size=16, ext_pw_out_channel=32, depthwise_separable_out_channel=32,
        )
    ).embed  # fmt: skip
    ours = MelLLMConvSubsampling(MelLLMAudioConfig(**{**TINY_AUDIO, "reduction_factor": reduction_factor}))
    ours.load_state_dict(source.state_dict())  # the names are the same
    x = torch.randn(2, 101, 80)
    expected, _ = source(x, None)
    torch.testing.assert_close(ours(x, None), expected)
    torch.testing.assert_close(ours(x, torch.tensor([101, 101])), expected)


@pytest.mark.parametrize("activation", ["relu", "sigmoid"])  # one of which makes something of nothing
@pytest.mark.parametrize("reduction_factor", [2, 8])
def test_stem_in_blocks_is_the_stem(reduction_factor, activation, monkeypatch):
    # without gradients, and in whole; long enough for several blocks, and with ends in every place of one
    module, config = embedder(reduction_factor=reduction_factor, conv_activation=activation)
    for lengths in ([401, 1, 64 * reduction_factor], [24 * reduction_factor + 1, 17], [8 * reduction_factor]):
        x, mask = features(*lengths)
        expected = module(x, mask.sum(-1), torch.float32)
        assert expected.requires_grad
        for values in (1, modeling_mel_llm._CPU_BLOCK_VALUES):
            monkeypatch.setattr(modeling_mel_llm, "_CPU_BLOCK_VALUES", values)
            with torch.no_grad():
                torch.testing.assert_close(module(x, mask.sum(-1), torch.float32), expected, rtol=1e-4, atol=1e-5)
                for index, length in enumerate(lengths):
                    alone = module(x[index : index + 1, :length], None, torch.float32)
                    n = config.num_audio_tokens(length)
                    torch.testing.assert_close(alone[0], expected[index, :n], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("embedder_type", ["conv", "linear"])
@pytest.mark.parametrize("reduction_factor", [1, 2, 4, 8, 16])
def test_token_count_for_every_length(reduction_factor, embedder_type):
    module, config = embedder(
        reduction_factor=reduction_factor, embedder_type=embedder_type, conv_channels=2, hidden_size=4
    )
    for length in range(1, 401):
        out = module(torch.zeros(1, length, 80), None, torch.float32)
        assert out.shape == (1, config.num_audio_tokens(length), config.embedder_size)


@pytest.mark.parametrize("embedder_type", ["conv", "linear"])
@pytest.mark.parametrize("reduction_factor", [1, 2, 4, 8, 16])
def test_tokens_of_a_clip_do_not_depend_on_its_batch(reduction_factor, embedder_type):
    module, config = embedder(reduction_factor=reduction_factor, embedder_type=embedder_type)
    lengths = [97, 64, 33, 9, 1]
    x, mask = features(*lengths)
    batched = module(x, mask.sum(-1), torch.float32)
    for i, length in enumerate(lengths):
        alone = module(x[i : i + 1, :length], None, torch.float32)[0]
        torch.testing.assert_close(batched[i, : len(alone)], alone, rtol=0, atol=2e-5)
        assert len(alone) == config.num_audio_tokens(length)


def test_a_token_sees_its_own_frames_and_a_patch_before_and_nothing_after():
    # method.md A.2: at r = 8, token 5 sees frames 33..47
    module, _ = embedder(reduction_factor=8)
    x = torch.randn(1, 96, 80, requires_grad=True)
    module(x, None, torch.float32)[0, 5].sum().backward()
    seen = x.grad[0].abs().sum(-1).nonzero().flatten().tolist()
    assert seen == list(range(33, 48))


def test_initialisation_of_the_audio_stack():
    # method.md A.2: first convolution and depthwise ones uniform in +-1/3, pointwise ones in +-1/sqrt(channels)
    model = MelLLMModel(MelLLMConfig.from_preset("small", audio_config={"conv_channels": 64}))
    convolutions = [layer for layer in model.audio_embedder.modules() if isinstance(layer, torch.nn.Conv2d)]
    assert len(convolutions) == 3
    for layer in convolutions:
        bound = 1 / 8 if layer.kernel_size == (1, 1) else 1 / 3
        assert 0.9 * bound < layer.weight.abs().max() <= bound
    # With the normal distribution of width 0.02 that every other layer gets, tokens would differ in the fifth digit
    tokens = model.get_audio_features(torch.randn(1, 100, 80)).pooler_output
    assert tokens.std(0).mean() > 3e-3
    for layer in model.language_model.modules():
        if isinstance(layer, torch.nn.Linear):
            assert 0.01 < layer.weight.std() < 0.03


def test_linear_patches_and_linear_projector_are_one_matrix():
    config = MelLLMConfig(
        text_config=tiny_text_config(),
        audio_config={"embedder_type": "linear", "projector_type": "linear", "reduction_factor": 4},
        audio_token_id=3,
    )
    model = MelLLMModel(config)
    names = [name for name, _ in model.named_parameters() if not name.startswith("language_model")]
    assert names == ["multi_modal_projector.linear_1.weight", "multi_modal_projector.linear_1.bias"]
    x = torch.randn(1, 8, 80)
    expected = model.multi_modal_projector.linear_1(x.reshape(1, 2, 320))
    torch.testing.assert_close(model.get_audio_features(x).last_hidden_state, expected)


# --- the Conformer of the paper's baselines ---------------------------------------------------------------------------

CONFORMER = {
    "encoder_type": "conformer",
    "hidden_size": 32,
    "encoder_config": {"num_blocks": 2, "num_attention_heads": 2, "intermediate_size": 48},
}


def test_conformer_equals_phi4_on_one_clip():
    module, _ = embedder(**CONFORMER)
    source = Phi4MultimodalAudioModel(
        Phi4MultimodalAudioConfig(
            time_reduction=4, nemo_conv_channels=8, hidden_size=32, num_blocks=2, num_attention_heads=2,
            intermediate_size=48, ext_pw_out_channel=32, depthwise_separable_out_channel=32,
        )
    ).eval()  # fmt: skip
    source.load_state_dict(
        {
            **{f"embed.{k}": v for k, v in module.conv.state_dict().items()},
            **{f"encoder_embedding.{k}": v for k, v in module.normalizer.state_dict().items()},
            **module.encoder.state_dict(),
        }
    )
    x = torch.randn(1, 203, 80)
    torch.testing.assert_close(module(x, None, torch.float32), source(x, None), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lengths", [(100, 41, 7), (2200, 1999, 300)])
def test_conformer_of_a_clip_does_not_depend_on_its_batch(lengths):
    module, _config = embedder(**CONFORMER)  # 2200 frames are 550 tokens: two pieces of at most 500
    x, mask = features(*lengths)
    batched = module(x, mask.sum(-1), torch.float32)
    for i, length in enumerate(lengths):
        alone = module(x[i : i + 1, :length], torch.tensor([length]), torch.float32)[0]
        torch.testing.assert_close(batched[i, : len(alone)], alone, rtol=0, atol=1e-4)


# --- audio features ---------------------------------------------------------------------------------------------------


def test_get_audio_features_gives_valid_tokens_only(tiny):
    model, _ = tiny
    x, mask = features(50, 21)
    out = model.get_audio_features(x, mask)
    assert out.last_hidden_state.shape == (2, 13, 64)
    assert out.pooler_output.shape == (13 + 6, 64)
    torch.testing.assert_close(out.pooler_output[13:], out.last_hidden_state[1, :6])
    # the extractor's own name for the mask, and the lists that serving engines pass
    torch.testing.assert_close(model.get_audio_features(x, attention_mask=mask).pooler_output, out.pooler_output)
    ragged = model.get_audio_features([x[0], x[1, :21]], input_features_mask=[mask[0], mask[1, :21]], return_dict=True)
    torch.testing.assert_close(ragged.pooler_output, out.pooler_output)
    assert isinstance(model.get_audio_features(x, mask, return_dict=False), tuple)


@pytest.mark.parametrize(
    ("x", "mask", "message"),
    [
        (torch.zeros(2, 10, 40), None, r"\(batch, frames, 80\)"),
        (torch.zeros(10, 80), None, r"\(batch, frames, 80\)"),
        (torch.zeros(1, 0, 80), None, r"\(batch, frames, 80\)"),
        (torch.zeros(1, 10, 80), torch.ones(1, 9), "input_features_mask"),
        (torch.zeros(1, 4, 80), torch.tensor([[0, 0, 1, 1]]), "padded on the right"),
        ("speech.wav", None, "tensor or a list of tensors"),
    ],
)
def test_features_of_the_wrong_shape_are_refused(tiny, x, mask, message):
    with pytest.raises(ValueError, match=message):
        tiny[0].get_audio_features(x, mask)


def test_feature_statistics(tiny):
    model = tiny[0].model
    mean, std = torch.linspace(5, 15, 80), torch.linspace(1, 4, 80)
    model.set_feature_statistics(mean, std)
    x = mean + std * torch.randn(1, 4, 80)
    torch.testing.assert_close(model.audio_embedder.normalizer(x), (x - mean) / std)
    for bad in (torch.zeros(80), torch.ones(40), torch.full((80,), torch.nan)):
        with pytest.raises(ValueError, match="std"):
            model.set_feature_statistics(mean, bad)


# --- forward ----------------------------------------------------------------------------------------------------------


def test_input_ids_come_first():
    # generic code calls model.forward(input_ids, ...) by position
    for cls in (MelLLMModel, MelLLMForSpeechSeq2Seq):
        assert list(inspect.signature(cls.forward).parameters)[1] == "input_ids"
    assert MelLLMForSpeechSeq2Seq.main_input_name == "input_features"


def batch_of(processor, clips, answer=True):
    conversations = []
    for clip in clips:
        request = processor._request(clip["array"], None, None)
        if answer:
            request.append({"role": "assistant", "content": clip["text"]})
        conversations.append(request)
    return processor.apply_chat_template(conversations, output_labels=True)


@pytest.mark.parametrize("model_type", BACKBONES)
def test_both_ways_of_calling_give_the_same_loss(tokenizer, speech_clips, model_type):
    model, processor = build_tiny(tokenizer, model_type)
    clips = speech_clips[:3]
    as_llm = model(**batch_of(processor, clips))
    audio = processor(audio=[clip["array"] for clip in clips])
    ids = [torch.tensor(tokenizer(clip["text"])["input_ids"]) for clip in clips]
    labels = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-100)
    as_recogniser = model(**audio, labels=labels)
    assert as_recogniser.logits.shape[:2] == labels.shape
    torch.testing.assert_close(as_recogniser.loss, as_llm.loss, rtol=1e-4, atol=1e-5)
    assert as_llm.loss.item() > 0


def test_labels_may_bring_their_own_end_of_text(tiny, speech_clips):
    model, processor = tiny
    audio = processor(audio=[clip["array"] for clip in speech_clips[:2]])
    bare = torch.tensor([[10, 11, 12], [10, 11, -100]])
    ended = torch.tensor([[10, 11, 12, 2], [10, 11, 2, -100]])
    torch.testing.assert_close(model(**audio, labels=bare).loss, model(**audio, labels=ended).loss)
    mixed = torch.tensor([[10, 11, 12, 2], [10, 11, -100, -100]])
    torch.testing.assert_close(model(**audio, labels=mixed).loss, model(**audio, labels=ended).loss)


def test_an_empty_transcript_is_a_label_too(tiny, speech_clips):
    model, processor = tiny
    audio = processor(audio=[clip["array"] for clip in speech_clips[:2]])
    loss = model(**audio, labels=torch.full((2, 1), -100)).loss
    assert torch.isfinite(loss) and loss > 0  # that of the end of text


def test_left_padded_labels_are_refused(tiny, speech_clips):
    model, processor = tiny
    audio = processor(audio=speech_clips[0]["array"])
    with pytest.raises(ValueError, match="padded on the right"):
        model(**audio, labels=torch.tensor([[-100, 10, 11]]))


def test_features_alone_are_refused_in_forward(tiny, speech_clips):
    # what a pipeline that takes the model for CTC would do: better an error than garbage
    model, processor = tiny
    with pytest.raises(ValueError, match="generate"):
        model(**processor(audio=speech_clips[0]["array"]))


def test_loss_over_accumulated_batches(tiny, speech_clips):
    model, processor = tiny
    batch = batch_of(processor, speech_clips[:4])
    whole = model(**batch).loss
    count = (batch["labels"][:, 1:] != -100).sum()
    parts = []
    for i in range(4):
        part = batch_of(processor, speech_clips[i : i + 1])
        parts.append(model(**part, num_items_in_batch=count).loss)
    torch.testing.assert_close(sum(parts), whole, rtol=1e-4, atol=1e-5)


def test_audio_places_do_not_count_in_the_loss(tiny, speech_clips):
    model, processor = tiny
    batch = batch_of(processor, speech_clips[:2])
    is_audio = batch["input_ids"] == model.config.audio_token_id
    assert is_audio.any() and (batch["labels"][is_audio] == -100).all()


def test_logits_to_keep(tiny, speech_clips):
    model, processor = tiny
    inputs = processor.apply_transcription_request([clip["array"] for clip in speech_clips[:2]])
    full = model(**inputs).logits
    torch.testing.assert_close(model(**inputs, logits_to_keep=3).logits, full[:, -3:])
    index = torch.tensor([0, 5])
    torch.testing.assert_close(model(**inputs, logits_to_keep=index).logits, full[:, index])


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("model_type", BACKBONES)
def test_left_and_right_padding_of_the_text_change_nothing(tokenizer, speech_clips, model_type, bidirectional):
    model, processor = build_tiny(tokenizer, model_type, {"bidirectional_attention": bidirectional})
    arrays = [clip["array"] for clip in speech_clips[:3]]
    alone = [model(**processor.apply_transcription_request(array)).logits[0] for array in arrays]
    for side in ("left", "right"):
        batch = processor.apply_transcription_request(arrays, processor_kwargs={"text_kwargs": {"padding_side": side}})
        mask = batch["attention_mask"]
        logits = model(**batch, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
        for row, row_mask, expected in zip(logits, mask.bool(), alone, strict=True):
            torch.testing.assert_close(row[row_mask], expected, rtol=1e-4, atol=1e-4)


def test_several_clips_in_one_text(tiny, speech_clips):
    model, processor = tiny
    a, b = (clip["array"] for clip in speech_clips[:2])
    text = f"{processor.audio_token} and {processor.audio_token} differ:"
    logits = model(**processor(text=text, audio=[a, b])).logits
    swapped = model(**processor(text=text, audio=[b, a])).logits
    assert not torch.allclose(logits[:, -1], swapped[:, -1], atol=1e-4)


def test_wrong_numbers_of_audio_tokens_are_refused(tiny, speech_clips):
    model, processor = tiny
    inputs = processor.apply_transcription_request(speech_clips[0]["array"])
    with pytest.raises(ValueError, match=r"audio tokens .* reduction_factor = 4"):
        model(**{**inputs, "input_ids": inputs["input_ids"][:, 2:], "attention_mask": None})
    with pytest.raises(ValueError, match="no `input_features`"):
        model(input_ids=inputs["input_ids"])
    with pytest.raises(ValueError, match="either `input_ids` or `inputs_embeds`"):
        model()
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(ValueError, match="needs `input_ids`"):
        model(inputs_embeds=embeds, input_features=inputs["input_features"])


def test_text_alone_is_an_ordinary_language_model(tiny):
    model, processor = tiny
    inputs = processor("Please try again.")
    expected = model.model.language_model(input_ids=inputs["input_ids"]).last_hidden_state @ model.lm_head.weight.T
    torch.testing.assert_close(model(**inputs).logits, expected)


# --- attention --------------------------------------------------------------------------------------------------------


flex_attention_compiles = pytest.mark.skipif(
    shutil.which("g++") is None or " " in sys.prefix,
    reason="flex_attention compiles: needs g++, and a path without spaces",
)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
@pytest.mark.parametrize(
    ("implementation", "bidirectional"),
    [
        ("eager", False),
        ("eager", True),
        # Each compiles for long; without a prefix there is nothing of ours in the mask
        pytest.param("flex_attention", True, marks=flex_attention_compiles),
    ],
)
@torch.no_grad()  # flex_attention has no backward on the CPU
def test_attention_implementations_agree(tokenizer, speech_clips, implementation, model_type, bidirectional, caplog):
    model, processor = build_tiny(tokenizer, model_type, {"bidirectional_attention": bidirectional})
    inputs = processor.apply_transcription_request([clip["array"] for clip in speech_clips[:3]])
    mask = inputs["attention_mask"].bool()
    model.set_attn_implementation("sdpa")
    expected = model(**inputs).logits[mask]
    model.set_attn_implementation(implementation)
    assert model.model.language_model.config._attn_implementation == implementation
    torch.testing.assert_close(model(**inputs).logits[mask], expected, rtol=1e-3, atol=1e-4)


def gradient_reach(model, processor, arrays, target: int) -> list[int]:
    """The positions whose embeddings position `target` depends on."""
    text = f"a{processor.audio_token * len(arrays)}b"
    inputs = processor(text=text, audio=arrays)
    embeddings = model.get_input_embeddings()
    leaf = {}

    def keep(module, args, output):
        leaf["x"] = output.detach().requires_grad_()
        return leaf["x"]

    handle = embeddings.register_forward_hook(keep)
    audio_leaf = {}

    def keep_audio(module, args, output):
        audio_leaf["x"] = output.detach().requires_grad_()
        return audio_leaf["x"]

    audio_handle = model.model.multi_modal_projector.register_forward_hook(keep_audio)
    hidden = model.model(**inputs).last_hidden_state
    hidden[0, target].sum().backward()
    handle.remove()
    audio_handle.remove()
    is_audio = inputs["input_ids"][0] == processor.audio_token_id
    lengths = model.config.audio_config.num_audio_tokens(inputs["input_features_mask"].sum(-1))
    audio_grad = torch.cat([grad[:n].abs().sum(-1) for grad, n in zip(audio_leaf["x"].grad, lengths, strict=True)])
    reach = leaf["x"].grad[0].abs().sum(-1).masked_scatter(is_audio, audio_grad)
    return reach.nonzero().flatten().tolist()


@pytest.mark.parametrize("bidirectional", [False, True])
def test_who_sees_whom(tokenizer, speech_clips, bidirectional):
    model, processor = build_tiny(tokenizer, "llama", {"bidirectional_attention": bidirectional})
    arrays = [speech_clips[0]["array"][:8000], speech_clips[1]["array"][:4800]]  # 12 and 7 tokens, side by side
    # a = 0, first clip 1..12, second clip 13..19, b = 20
    first_of_first, in_second, last = 1, 15, 20
    causal = lambda place: list(range(place + 1))  # noqa: E731
    if bidirectional:
        assert gradient_reach(model, processor, arrays, first_of_first) == causal(12)
        assert gradient_reach(model, processor, arrays, in_second) == causal(19)
    else:
        assert gradient_reach(model, processor, arrays, first_of_first) == causal(first_of_first)
        assert gradient_reach(model, processor, arrays, in_second) == causal(in_second)
    assert gradient_reach(model, processor, arrays, 0) == [0]
    assert gradient_reach(model, processor, arrays, last) == causal(last)


def test_bidirectional_refuses_masks_it_cannot_join(tokenizer, speech_clips):
    model, processor = build_tiny(tokenizer, "llama", {"bidirectional_attention": True})
    inputs = processor.apply_transcription_request(speech_clips[0]["array"])
    size = inputs["input_ids"].shape[1]
    with pytest.raises(ValueError, match="attention_mask"):
        model(**{**inputs, "attention_mask": torch.ones(1, 1, size, size, dtype=torch.bool)})
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash attention"):
        model(**inputs)


# --- training ---------------------------------------------------------------------------------------------------------


def test_gradient_checkpointing_gives_the_same_gradients(tokenizer, speech_clips):
    grads = []
    for checkpointing in (False, True):
        model, processor = build_tiny(tokenizer, audio_config=CONFORMER)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert (
                model.model.language_model.gradient_checkpointing
                and model.model.audio_embedder.encoder.gradient_checkpointing
            )
        model(**batch_of(processor, speech_clips[:2]), use_cache=False).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert all(grad is not None for grad in grads[0].values()), "a parameter takes no part in training"
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-6)


def test_freeze_feature_encoder_freezes_the_stem_alone(tiny):
    model, _ = tiny
    model.freeze_feature_encoder()
    frozen = {name.split(".")[1] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"audio_embedder"}


# --- saving, loading, changing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("model_type", [*BACKBONES, "gpt2", "gpt_neox"])
def test_saved_is_loaded(tokenizer, speech_clips, tmp_path, model_type, tie):
    model, processor = build_tiny(tokenizer, model_type, text={"tie_word_embeddings": tie})
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is MelLLMForSpeechSeq2Seq
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    inputs = processor.apply_transcription_request(speech_clips[0]["array"])
    assert torch.equal(loaded.eval()(**inputs).logits, model(**inputs).logits)
    shared = loaded.lm_head.weight.data_ptr() == loaded.get_input_embeddings().weight.data_ptr()
    assert shared == tie


def test_base_model_loads_alone(tiny_folder, tokenizer, speech_clips):
    base = AutoModel.from_pretrained(tiny_folder)
    whole = AutoModelForSpeechSeq2Seq.from_pretrained(tiny_folder)
    assert type(base) is MelLLMModel
    x, mask = features(30)
    torch.testing.assert_close(
        base.eval().get_audio_features(x, mask).pooler_output, whole.eval().get_audio_features(x, mask).pooler_output
    )


def test_shards_and_device_map(tiny, tmp_path, speech_clips):
    pytest.importorskip("accelerate")
    model, processor = tiny
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = MelLLMForSpeechSeq2Seq.from_pretrained(tmp_path, device_map="cpu").eval()
    inputs = processor.apply_transcription_request(speech_clips[0]["array"])
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_projector_on_disk(tiny_folder, tiny, tmp_path, speech_clips):
    pytest.importorskip("accelerate")
    model, processor = tiny
    device_map = {"model.audio_embedder": "cpu", "model.language_model": "cpu", "lm_head": "cpu"}
    loaded = MelLLMForSpeechSeq2Seq.from_pretrained(
        tiny_folder, device_map={**device_map, "model.multi_modal_projector": "disk"}, offload_folder=str(tmp_path)
    ).eval()
    inputs = processor.apply_transcription_request(speech_clips[0]["array"])
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)


def test_bfloat16_keeps_its_statistics_and_agrees(tiny_folder, speech_clips, tiny):
    _, processor = tiny
    full = MelLLMForSpeechSeq2Seq.from_pretrained(tiny_folder).eval()
    half = MelLLMForSpeechSeq2Seq.from_pretrained(tiny_folder, dtype=torch.bfloat16).eval()
    assert half.lm_head.weight.dtype == torch.bfloat16
    assert half.model.audio_embedder.normalizer.global_mean.dtype == torch.float32
    inputs = processor.apply_transcription_request([clip["array"] for clip in speech_clips[:2]])
    mask = inputs["attention_mask"].bool()
    a, b = full(**inputs).logits[mask], half(**inputs).logits[mask].float()
    assert (a - b).abs().mean() < 0.05 * a.std()


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.bfloat16()])
def test_casting_a_model_keeps_its_statistics(tiny, cast):
    model, _ = tiny
    model.model.set_feature_statistics(torch.full((80,), 12.3456), torch.full((80,), 3.21))
    cast(model)
    normalizer = model.model.audio_embedder.normalizer
    assert torch.equal(normalizer.global_mean, torch.full((80,), 12.3456))
    assert normalizer.global_invstd.dtype == torch.float32


def test_resizing_the_vocabulary(tiny, speech_clips):
    model, processor = tiny
    inputs = processor.apply_transcription_request(speech_clips[0]["array"])
    before = model(**inputs).logits
    model.resize_token_embeddings(330)
    assert model.config.vocab_size == model.config.text_config.vocab_size == 330
    torch.testing.assert_close(model(**inputs).logits[..., :320], before)
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("gemma2", {"final_logit_softcapping": 3.0}),
        ("granite", {"logits_scaling": 5.0}),
        ("cohere", {"logit_scale": 0.3}),
        ("phi", {}),  # has a bias in its output layer
        ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 64}),
    ],
)
def test_backbones_with_output_layers_of_their_own(tokenizer, tmp_path, model_type, fields):
    set_seed(0)
    text_model = AutoModelForCausalLM.from_config(tiny_text_config(model_type, **fields)).eval()
    if text_model.get_output_embeddings().bias is not None:
        torch.nn.init.normal_(text_model.get_output_embeddings().bias)
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = text_model(input_ids=ids).logits
    model, _ = from_text_llm(text_model, tokenizer, audio_config=TINY_AUDIO)
    torch.testing.assert_close(model.eval()(input_ids=ids).logits, expected)
    model.save_pretrained(tmp_path)
    loaded, info = MelLLMForSpeechSeq2Seq.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(loaded.eval()(input_ids=ids).logits, expected)


def test_buffers_that_a_backbone_keeps_out_of_its_checkpoint_are_restored(tmp_path):
    text = tiny_text_config("falcon_h1", mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=16)
    config = MelLLMConfig(text_config=text, audio_config=TINY_AUDIO, audio_token_id=3)
    model = MelLLMForSpeechSeq2Seq(config).eval()
    model.save_pretrained(tmp_path)
    loaded = MelLLMForSpeechSeq2Seq.from_pretrained(tmp_path).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        ("mamba", {}, "'mamba' takes no past_key_values"),
        ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}, "32 dimensions"),
    ],
)
def test_backbones_that_cannot_work_are_refused(model_type, fields, message):
    text = tiny_text_config(model_type, **fields)
    with pytest.raises(ValueError, match=message):
        MelLLMForSpeechSeq2Seq(MelLLMConfig(text_config=text, audio_config=TINY_AUDIO, audio_token_id=3))
