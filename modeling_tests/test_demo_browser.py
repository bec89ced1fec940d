"""The demo page in a real browser without a window: where gradio, playwright and a Chromium are installed.

    pip install gradio playwright && apt-get install chromium     # or: playwright install chromium
    python -m pytest modeling_tests/test_demo_browser.py

With MEL_LLM_SCREENSHOT=page.png, what the browser shows is kept.
"""

import os
import shutil

import pytest
import soundfile
from conftest import build_tiny

from mel_llm import MelLLMFeatureExtractor, MelLLMSpeechConfig, MelLLMVocoderConfig
from mel_llm.demo_page import Demo, build_page


pytest.importorskip("gradio", reason="gradio is not installed (the extra `demo`)")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")


@pytest.fixture
def browser():
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_api.sync_playwright() as playwright:
        if program is None and not os.path.exists(playwright.chromium.executable_path):
            pytest.skip("no Chromium is installed")
        # As root, Chromium only starts without its sandbox
        chromium = playwright.chromium.launch(
            executable_path=program, args=["--no-sandbox", "--disable-background-networking", "--disable-gpu"]
        )
        yield chromium
        chromium.close()


@pytest.fixture
def url(tokenizer):
    extractor = MelLLMFeatureExtractor.from_preset("phi4", edge_padding=120)
    speech = MelLLMSpeechConfig(
        head_hidden_size=16, postnet_layers=1, postnet_channels=8, prenet_hidden_size=16, min_tokens_per_second=30.0
    )
    vocoder = MelLLMVocoderConfig.from_feature_extractor(extractor, num_iterations=2)
    tiny = build_tiny(tokenizer, feature_extractor=extractor, speech_config=speech, vocoder_config=vocoder)
    page = build_page(Demo(*tiny, max_seconds=20))
    page.queue(max_size=2, default_concurrency_limit=1)
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, share=False, ssr_mode=False)
    yield address
    page.close()


@pytest.mark.timeout(180)
def test_a_visitor_transcribes_and_speaks(browser, url, speech_clips, tmp_path):
    recording = tmp_path / "recording.wav"
    soundfile.write(recording, speech_clips[0]["array"], 16000)
    page = browser.new_page(viewport={"width": 1000, "height": 1000})
    elsewhere = []
    page.on("request", lambda request: elsewhere.append(request.url) if _is_elsewhere(request.url) else None)
    page.goto(url)
    expect = sync_api.expect

    # The recorder comes first; a file has a button of its own
    page.get_by_label("Upload file").click(timeout=60_000)
    page.set_input_files("input[type=file]", str(recording))
    expect(page.locator("audio, canvas, [data-testid=waveform-recording]").first).to_be_attached(timeout=60_000)
    page.get_by_role("button", name="Transcribe").click()
    expect(page.get_by_text("audio tokens")).to_be_visible(timeout=60_000)
    assert page.get_by_label("What the model writes").input_value()
    expect(page.locator("img[src*='/file=']").first).to_be_visible()

    page.get_by_role("tab", name="Speak").click()
    page.get_by_label("Text, up to").fill("Hello there.")
    page.get_by_role("button", name="Speak", exact=True).click()
    expect(page.get_by_text("It is synthetic.")).to_be_visible(timeout=60_000)
    if os.environ.get("MEL_LLM_SCREENSHOT"):
        page.screenshot(path=os.environ["MEL_LLM_SCREENSHOT"])

    # What cannot be done is said on the page
    page.get_by_label("Text, up to").fill("")
    page.get_by_role("button", name="Speak", exact=True).click()
    expect(page.get_by_text("no text").first).to_be_visible(timeout=60_000)
    assert not elsewhere


def _is_elsewhere(address: str) -> bool:
    return not address.startswith(("http://127.0.0.1", "data:", "blob:", "about:"))
