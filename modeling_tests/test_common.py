"""The cases of transformers' common model and generation tests that the other modules do not have."""

import copy
import pickle

import pytest
import torch
from conftest import BACKBONES, build_tiny
from transformers import AutoModelForSpeechSeq2Seq, DynamicCache, GenerationConfig, set_seed

from mel_llm import MelLLMConfig, MelLLMForSpeechSeq2Seq


@pytest.fixture(params=BACKBONES)
def any_tiny(request, tokenizer):
    return build_tiny(tokenizer, request.param)


def request_of(processor, clips, **kwargs):
    return processor.apply_transcription_request([clip["array"] for clip in clips], **kwargs)


def test_hidden_states_and_attentions(any_tiny, speech_clips):
    model, processor = any_tiny
    model.set_attn_implementation("eager")
    inputs = request_of(processor, speech_clips[:2])
    length = inputs["input_ids"].shape[1]
    out = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 3 and len(out.attentions) == 2
    assert all(state.shape == (2, length, 64) for state in out.hidden_states)
    assert all(weights.shape == (2, 4, length, length) for weights in out.attentions)
    num_audio = (inputs["input_ids"] == processor.audio_token_id).sum()
    assert out.audio_hidden_states.shape == (num_audio, 64)


def test_tuples_and_dicts_are_the_same(tiny, speech_clips):
    model, processor = tiny
    inputs = request_of(processor, speech_clips[:2])
    as_dict = model(**inputs, labels=inputs["input_ids"])
    as_tuple = model(**inputs, labels=inputs["input_ids"], return_dict=False)
    assert torch.equal(as_tuple[0], as_dict.loss) and torch.equal(as_tuple[1], as_dict.logits)


def test_the_same_input_gives_the_same_output(any_tiny, speech_clips):
    model, processor = any_tiny
    inputs = request_of(processor, speech_clips[:2])
    assert torch.equal(model(**inputs).logits, model(**inputs).logits)
    audio = processor(audio=speech_clips[0]["array"])
    drawn = []
    for _ in range(2):
        set_seed(7)
        drawn.append(model.generate(**audio, do_sample=True, max_new_tokens=10))
    assert torch.equal(*drawn)


def test_embeddings_in_place_of_ids(tiny, speech_clips):
    model, processor = tiny
    inputs = request_of(processor, speech_clips[:2])
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    audio = model.get_audio_features(inputs["input_features"], inputs["input_features_mask"]).pooler_output
    places = (inputs["input_ids"] == processor.audio_token_id)[..., None].expand_as(embeds)
    embeds = embeds.masked_scatter(places, audio)
    mask = inputs["attention_mask"]
    torch.testing.assert_close(
        model(inputs_embeds=embeds, attention_mask=mask).logits, model(**inputs).logits, rtol=1e-5, atol=1e-5
    )
    from_embeds = model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=8)
    from_ids = model.generate(**inputs, max_new_tokens=8)
    assert torch.equal(from_embeds[:, -8:], from_ids[:, -8:])


def test_a_conversation_goes_on_from_its_cache(tiny, speech_clips):
    model, processor = tiny
    first = processor(text=f"{processor.audio_token}What?\n", audio=speech_clips[0]["array"])
    cache = DynamicCache(config=model.config.text_config)
    out = model.generate(**first, past_key_values=cache, max_new_tokens=5)
    more = torch.cat([out, processor.tokenizer("And?\n", return_tensors="pt")["input_ids"]], dim=1)
    from_cache = model.generate(input_ids=more, past_key_values=cache, max_new_tokens=5)
    again = model.generate(
        input_ids=more,
        input_features=first["input_features"],
        input_features_mask=first["input_features_mask"],
        max_new_tokens=5,
    )
    assert torch.equal(from_cache, again)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_second_clip_after_a_cache(tokenizer, speech_clips, bidirectional):
    """Audio in a later turn, of which the cache holds the turns before, is seen as it would be all at once."""
    model, processor = build_tiny(tokenizer, audio_config={"bidirectional_attention": bidirectional})
    a, b = (clip["array"][:6400] for clip in speech_clips[:2])
    token = processor.audio_token
    whole = processor(text=f"{token}First.\n{token}Second.\n", audio=[a, b])
    expected = model(**whole).logits
    first = processor(text=f"{token}First.\n", audio=a)
    out = model(**first, use_cache=True)
    length = first["input_ids"].shape[1]
    second = processor(audio=b)
    rest = model(
        input_ids=whole["input_ids"][:, length:],
        input_features=second["input_features"],
        input_features_mask=second["attention_mask"],
        attention_mask=whole["attention_mask"],
        past_key_values=out.past_key_values,
    )
    torch.testing.assert_close(rest.logits, expected[:, length:], rtol=1e-4, atol=1e-4)


def test_generation_config_objects(tiny, speech_clips):
    model, processor = tiny
    audio = processor(audio=speech_clips[0]["array"])
    expected = model.generate(**audio, max_new_tokens=6, num_beams=2)
    config = GenerationConfig(max_new_tokens=6, num_beams=2)
    assert torch.equal(model.generate(**audio, generation_config=config), expected)
    assert config.max_new_tokens == 6 and config.num_beams == 2  # the caller's own
    # older pipelines pass the model's own
    assert model.generate(**audio, generation_config=model.generation_config, max_new_tokens=6).shape[1] <= 6


def test_several_end_tokens(tiny, speech_clips):
    model, processor = tiny
    audio = processor(audio=speech_clips[0]["array"])
    free = model.generate(**audio, max_new_tokens=12)[0].tolist()
    stop = free[4]
    out = model.generate(**audio, max_new_tokens=12, eos_token_id=[2, stop])[0].tolist()
    assert out == free[: free.index(stop) + 1]


def test_copies_and_pickles(tiny, speech_clips):
    model, processor = tiny
    audio = processor(audio=speech_clips[0]["array"])
    expected = model.generate(**audio, max_new_tokens=6)
    assert torch.equal(copy.deepcopy(model).generate(**audio, max_new_tokens=6), expected)
    assert copy.deepcopy(model.config).to_dict() == model.config.to_dict()
    again = pickle.loads(pickle.dumps(processor))  # as workers of a DataLoader get it
    assert torch.equal(again(audio=speech_clips[0]["array"])["input_features"], audio["input_features"])


def test_loading_options(tiny_folder):
    for implementation in ("eager", "sdpa"):
        model = AutoModelForSpeechSeq2Seq.from_pretrained(tiny_folder, attn_implementation=implementation)
        assert model.model.language_model.config._attn_implementation == implementation
    assert AutoModelForSpeechSeq2Seq.from_pretrained(tiny_folder, dtype="bfloat16").dtype == torch.bfloat16
    with torch.device("meta"):
        model = MelLLMForSpeechSeq2Seq(MelLLMConfig())  # 4 billion parameters, no memory
    assert model.num_parameters() > 3.8e9


def test_names_of_the_weights_are_stable(tiny):
    """A checkpoint of today must load in every later version."""
    model, _ = tiny
    names = {name for name in model.state_dict() if "language_model" not in name}
    assert names == {
        "lm_head.weight",
        "model.audio_embedder.normalizer.global_mean",
        "model.audio_embedder.normalizer.global_invstd",
        *(f"model.audio_embedder.conv.conv.{i}.{kind}" for i in (0, 2, 3) for kind in ("weight", "bias")),
        "model.audio_embedder.conv.out.weight",
        "model.audio_embedder.conv.out.bias",
        *(f"model.multi_modal_projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")),
    }


@pytest.mark.cuda
def test_cuda_static_cache_and_compiled_decoding(tiny_folder, speech_clips, tiny):
    _, processor = tiny
    model = AutoModelForSpeechSeq2Seq.from_pretrained(tiny_folder).to("cuda").eval()
    audio = processor(audio=[clip["array"] for clip in speech_clips[:4]]).to("cuda")
    expected = model.generate(**audio, max_new_tokens=20)
    # on a GPU transformers compiles the decoding step of a static cache by itself
    assert torch.equal(model.generate(**audio, max_new_tokens=20, cache_implementation="static"), expected)
