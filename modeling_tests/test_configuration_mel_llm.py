"""The configuration: presets, round trips, and errors that name the field."""

import json

import pytest
import torch
from conftest import BACKBONES, TINY_AUDIO, tiny_text_config
from transformers import AutoConfig
from transformers.models.auto import modeling_auto

from mel_llm import (
    MelLLMAudioConfig,
    MelLLMConfig,
    MelLLMFeatureExtractor,
    MelLLMForSpeechSeq2Seq,
    MelLLMSpeechConfig,
    MelLLMVocoderConfig,
)


def test_default_is_the_paper():
    config = MelLLMConfig()
    assert config.to_dict() == MelLLMConfig.from_preset("paper").to_dict()
    audio, text = config.audio_config, config.text_config
    assert (audio.num_mel_bins, audio.reduction_factor, audio.conv_channels, audio.hidden_size) == (80, 8, 1024, 1024)
    assert (audio.embedder_type, audio.projector_type, audio.encoder_type) == ("conv", "mlp", "none")
    assert (text.num_hidden_layers, text.hidden_size, text.num_attention_heads) == (32, 3072, 24)
    assert config.speech_config is None and config.vocoder_config is None


def test_paper_audio_stack_has_the_published_size():
    # method.md A.2, A.3: 12.6M + 12.6M
    with torch.device("meta"):
        model = MelLLMForSpeechSeq2Seq(MelLLMConfig())
    assert sum(p.numel() for p in model.model.audio_embedder.parameters()) == 12_616_704
    assert sum(p.numel() for p in model.model.multi_modal_projector.parameters()) == 12_589_056


@pytest.mark.parametrize("model_type", [*BACKBONES, "gpt2", "gpt_neox"])
def test_any_backbone_round_trips_through_json(model_type, tmp_path):
    config = MelLLMConfig(
        text_config=tiny_text_config(model_type),
        audio_config=TINY_AUDIO,
        speech_config={"flux_type": "clipped"},
        vocoder_config={},
        audio_token_id=3,
        prompt_prefix_ids=[1, 4],
        prompt_suffix_ids=[5],
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is MelLLMConfig
    assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()
    assert type(loaded.text_config) is type(config.text_config)
    assert isinstance(loaded.speech_config, MelLLMSpeechConfig) and loaded.speech_config.flux_type == "clipped"
    assert isinstance(loaded.vocoder_config, MelLLMVocoderConfig)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "mel_llm"


def test_small_preset_takes_overrides():
    config = MelLLMConfig.from_preset(
        "small", vocab_size=400, eos_token_id=2, text_config={"num_hidden_layers": 3}, audio_config={"hidden_size": 64}
    )
    assert config.vocab_size == 400 and config.text_config.num_hidden_layers == 3
    assert config.audio_config.hidden_size == 64 and config.audio_config.reduction_factor == 4
    assert config.pad_token_id == config.eos_token_id == 2


def test_a_multimodal_backbone_gives_its_language_model():
    config = MelLLMConfig(text_config={"model_type": "gemma3"}, audio_token_id=5)
    assert config.text_config.model_type == "gemma3_text"


def test_token_ids_come_from_the_text_config_or_from_the_caller():
    text = tiny_text_config(eos_token_id=[7, 8], pad_token_id=None, bos_token_id=None)
    config = MelLLMConfig(text_config=text, audio_token_id=3)
    assert config.eos_token_id == [7, 8] and config.response_eos_token_id == 8
    assert config.pad_token_id == 7 and config.decoder_start_token_id == 7
    assert MelLLMConfig(text_config=text, audio_token_id=3, pad_token_id=4).pad_token_id == 4


@pytest.mark.parametrize("reduction_factor", [1, 2, 4, 8, 16])
def test_audio_tokens_are_the_ceiling_for_every_length(reduction_factor):
    config = MelLLMAudioConfig(reduction_factor=reduction_factor)
    lengths = torch.arange(1, 401)
    tokens = config.num_audio_tokens(lengths)
    assert tokens.tolist() == [-(-n // reduction_factor) for n in range(1, 401)]
    assert [config.num_audio_tokens(n) for n in range(1, 401)] == tokens.tolist()


BAD_FIELDS = [
    (MelLLMAudioConfig, "reduction_factor", 3),
    (MelLLMAudioConfig, "reduction_factor", True),
    (MelLLMAudioConfig, "num_mel_bins", "80"),
    (MelLLMAudioConfig, "num_mel_bins", 0),
    (MelLLMAudioConfig, "conv_channels", 1 << 40),
    (MelLLMAudioConfig, "hidden_size", 12.5),
    (MelLLMAudioConfig, "embedder_type", "cnn"),
    (MelLLMAudioConfig, "projector_type", None),
    (MelLLMAudioConfig, "projector_dropout", 1.5),
    (MelLLMAudioConfig, "encoder_type", "whisper"),
    (MelLLMAudioConfig, "encoder_config", {"num_blocks": 2}),
    (MelLLMAudioConfig, "bidirectional_attention", "yes"),
    (MelLLMAudioConfig, "max_audio_seconds", 0.5),
    (MelLLMAudioConfig, "max_audio_seconds", "30 s"),
    (MelLLMAudioConfig, "max_audio_seconds", float("nan")),
    (MelLLMAudioConfig, "silence_threshold", "low"),
    (MelLLMSpeechConfig, "head_type", "gan"),
    (MelLLMSpeechConfig, "kl_weight", -1.0),
    (MelLLMSpeechConfig, "history_dropout", 2),
    (MelLLMSpeechConfig, "postnet_layers", -1),
    (MelLLMVocoderConfig, "vocoder_type", "wavenet"),
    (MelLLMVocoderConfig, "feature_config", [1]),
    (MelLLMConfig, "audio_token_id", 200_064),
    (MelLLMConfig, "audio_token_id", "<|audio|>"),
    (MelLLMConfig, "prompt_prefix_ids", [-1]),
    (MelLLMConfig, "prompt_suffix_ids", ["a"]),
    (MelLLMConfig, "max_text_tokens_per_second", "many"),
    (MelLLMConfig, "text_config", {"hidden_size": 3}),
    (MelLLMConfig, "text_config", {"model_type": "no_such_model"}),
    (MelLLMConfig, "text_config", {"model_type": "t5"}),
    (MelLLMConfig, "text_config", "llama"),
    (MelLLMConfig, "text_config", {"model_type": "bert"}),
    (MelLLMConfig, "audio_config", [80]),
    (MelLLMConfig, "eos_token_id", []),
    (MelLLMConfig, "eos_token_id", 200_064),
    (MelLLMConfig, "pad_token_id", -1),
    (MelLLMConfig, "bos_token_id", 1.5),
    (MelLLMConfig, "response_eos_token_id", "x"),
    (MelLLMConfig, "decoder_start_token_id", -3),
    (MelLLMConfig, "prompt_prefix_ids", [True]),
    (MelLLMConfig, "tie_word_embeddings", "no"),
    (MelLLMAudioConfig, "initializer_range", -5),
    (MelLLMAudioConfig, "conv_activation", "reluu"),
    (MelLLMAudioConfig, "projector_activation", 5),
]


@pytest.mark.parametrize(
    ("vocoder_type", "fields", "message"),
    [
        ("istft", [1], "a dict or None"),
        ("griffin_lim", {"hidden_size": 8}, "empty for Griffin-Lim"),
        ("istft", {"hiden_size": 8}, "without hiden_size"),
        ("istft", {"hidden_size": 1 << 20}, "`hidden_size` is an integer from 1 to 8192"),
        ("istft", {"num_layers": True}, "`num_layers`"),
        ("istft", {"kernel_size": 6}, "`kernel_size` is odd"),
        ("istft", {"lookahead": 4}, "`lookahead` is at most half the kernel, 3"),
        ("hifigan", {"model_in_dim": 80}, "without `model_in_dim`"),
        ("hifigan", {"upsample_initial_channel": 1 << 30}, "`upsample_initial_channel`"),
        ("hifigan", {"upsample_rates": 4}, "`upsample_rates`"),
        ("hifigan", {"upsample_rates": [4, 4, 4, 4]}, "`upsample_kernel_sizes` of one length"),
        ("hifigan", {"upsample_rates": [4, 8], "upsample_kernel_sizes": [8, 4]}, "at least the `upsample_rates`"),
        ("hifigan", {"resblock_kernel_sizes": [4], "resblock_dilation_sizes": [[1]]}, "are odd"),
        ("hifigan", {"resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1 << 20]]}, "resblock_dilation_sizes"),
    ],
)
def test_what_a_vocoder_is_built_from_is_checked(vocoder_type, fields, message):
    with pytest.raises(ValueError, match="MelLLMVocoderConfig: `vocoder_kwargs`") as error:
        MelLLMVocoderConfig(vocoder_type=vocoder_type, vocoder_kwargs=fields)
    assert message in str(error.value)


def test_a_vocoder_config_round_trips_through_json(tmp_path):
    extractor = MelLLMFeatureExtractor.from_preset("hifigan16k")
    config = MelLLMVocoderConfig.from_feature_extractor(
        extractor, vocoder_type="istft", vocoder_kwargs={"num_layers": 2}
    )
    config.save_pretrained(tmp_path)
    loaded = MelLLMVocoderConfig.from_pretrained(tmp_path)
    assert {**loaded.to_dict(), "_name_or_path": ""} == {**config.to_dict(), "_name_or_path": ""}
    assert MelLLMFeatureExtractor(**loaded.feature_config).to_dict() == extractor.to_dict()


@pytest.mark.parametrize(("config_class", "field", "value"), BAD_FIELDS)
def test_errors_name_the_field_and_the_value(config_class, field, value):
    extra = {"audio_token_id": 3} if field == "text_config" else {}
    with pytest.raises(ValueError, match=f"`{field}`"):
        config_class(**{field: value}, **extra)


def test_a_sub_config_error_is_found_through_the_whole_config():
    with pytest.raises(
        ValueError, match=r"MelLLMAudioConfig: `reduction_factor` must be one of 1, 2, 4, 8, 16, got 5"
    ):
        MelLLMConfig(audio_config={"reduction_factor": 5})
    with pytest.raises(ValueError, match="`audio_token_id`"):
        MelLLMConfig(text_config={"model_type": "llama"})
    with pytest.raises(ValueError, match="one of paper, small"):
        MelLLMConfig.from_preset("large")


@pytest.mark.parametrize(
    ("config_class", "typo", "meant"),
    [
        (MelLLMAudioConfig, "reduction_facter", "reduction_factor"),
        (MelLLMSpeechConfig, "kl_weights", "kl_weight"),
        (MelLLMConfig, "audio_token_ids", "audio_token_id"),
    ],
)
def test_typos_are_found(config_class, typo, meant):
    with pytest.raises(ValueError, match=f"`{typo}`; did you mean `{meant}`"):
        config_class(**{typo: 4})
    # fields that a later version may write are kept, and those that every config may have pass
    assert config_class(of_the_future=1, torch_dtype="float32").of_the_future == 1


def test_ids_beyond_a_shrunken_vocabulary_are_not_inherited():
    text = {"model_type": "phi3", "vocab_size": 300, "hidden_size": 32, "num_attention_heads": 2, "pad_token_id": 0}
    config = MelLLMConfig(text_config=text, audio_token_id=3)  # Phi-3's own end of text is 32000
    assert config.eos_token_id is None and config.pad_token_id == 0


def test_conformer_needs_the_convolution():
    with pytest.raises(ValueError, match="`encoder_type`"):
        MelLLMAudioConfig(encoder_type="conformer", embedder_type="linear")
    with pytest.raises(ValueError, match="`encoder_type`"):
        MelLLMAudioConfig(encoder_type="conformer", reduction_factor=1)
    for bad in ([1], {"num_blockz": 3}):
        with pytest.raises(ValueError, match="`encoder_config`"):
            MelLLMAudioConfig(encoder_type="conformer", encoder_config=bad)


def test_static_name_tables_know_the_model():
    # Without these, the pipeline takes the model for CTC and `transformers serve` refuses it
    assert modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES["mel_llm"] == "MelLLMForSpeechSeq2Seq"
    assert modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES["mel_llm"] == "MelLLMForSpeechSeq2Seq"
    # and the lazy mappings, which walk the same tables, still work
    assert len(list(modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING.keys())) > 5
