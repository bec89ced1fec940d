"""`transformers serve`, started with `python -m mel_llm serve`, answers OpenAI's client over a real socket."""

import base64
import concurrent.futures
import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import soundfile
from conftest import ROOT
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor


@contextlib.contextmanager
def running_server(
    command: list[str], folder: Path, env: dict | None = None, seconds: float = 120
) -> Iterator[tuple[str, subprocess.Popen]]:
    """Starts a server on a free port of the loopback and waits until `/health` answers; ends it afterwards."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    address = f"http://127.0.0.1:{port}"
    with open(folder / "server.log", "w+") as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=env or {**os.environ, "PYTHONPATH": path},
        )
        try:
            deadline = time.monotonic() + seconds
            while True:
                try:
                    urllib.request.urlopen(f"{address}/health", timeout=5).close()
                    break
                except (urllib.error.URLError, ConnectionError, TimeoutError):
                    if time.monotonic() > deadline or process.poll() is not None:
                        log.seek(0)
                        pytest.fail(f"the server did not start:\n{log.read()[-6000:]}")
                    time.sleep(0.2)
            yield address, process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture(scope="module")
def client(tiny_folder, tmp_path_factory):
    openai = pytest.importorskip("openai", reason="needs the extra `serve`: openai is not installed")
    for name in ("fastapi", "uvicorn", "multipart"):
        pytest.importorskip(name, reason=f"needs the extra `serve`: {name} is not installed")
    command = [sys.executable, "-m", "mel_llm", "serve", tiny_folder, "--device", "cpu"]
    with running_server(command, tmp_path_factory.mktemp("serve")) as (address, _):
        yield openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def local(tiny_folder):
    processor = AutoProcessor.from_pretrained(tiny_folder)
    return AutoModelForSpeechSeq2Seq.from_pretrained(tiny_folder).eval(), processor


def transcript(local, audio) -> str:
    model, processor = local
    return processor.decode(model.generate(**processor(audio=audio))[0], skip_special_tokens=True)


def test_files_are_transcribed(client, local, tiny_folder, speech_clips):
    def ask(clip):
        with open(clip["path"], "rb") as file:
            return client.audio.transcriptions.create(model=tiny_folder, file=file).text

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        texts = list(pool.map(ask, speech_clips[:3]))
    assert texts == [transcript(local, clip["path"]) for clip in speech_clips[:3]]
    assert len(set(texts)) == 3

    resampled = io.BytesIO()
    soundfile.write(resampled, speech_clips[0]["array"][::2], 8000, format="WAV")
    assert client.audio.transcriptions.create(model=tiny_folder, file=("a.wav", resampled.getvalue())).text


def test_transcripts_are_streamed(client, tiny_folder, local, speech_clips):
    """Plain text in server-sent events, which OpenAI's client reads only as a raw response."""
    path = speech_clips[0]["path"]
    with open(path, "rb") as file:
        create = client.audio.transcriptions.with_streaming_response.create
        with create(model=tiny_folder, file=file, stream=True) as response:
            body = response.read().decode()
    pieces = [piece.removeprefix("data: ") for piece in body.split("\n\n")]
    text = "".join(pieces)
    assert len(pieces) > 10 and len(text) > 10
    assert transcript(local, path).startswith(text)  # bytes that make no character are held back at the end


def test_chat_with_audio(client, tiny_folder, local, speech_clips):
    data = base64.b64encode(Path(speech_clips[0]["path"]).read_bytes()).decode()
    question = {"type": "text", "text": "What is said?"}
    messages = [
        {
            "role": "user",
            "content": [{"type": "input_audio", "input_audio": {"data": data, "format": "flac"}}, question],
        }
    ]
    asked = {"model": tiny_folder, "messages": messages, "max_tokens": 12, "temperature": 0}
    model, processor = local
    content = [{"type": "audio", "audio": speech_clips[0]["array"]}, question]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    ids = model.generate(**inputs, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
    expected = processor.decode(ids, skip_special_tokens=True)
    assert client.chat.completions.create(**asked).choices[0].message.content == expected
    chunks = client.chat.completions.create(**asked, stream=True)
    assert expected.startswith("".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices))


def test_what_is_no_audio_does_not_end_the_server(client, tiny_folder, speech_clips):
    import openai

    with pytest.raises(openai.APIStatusError):
        client.audio.transcriptions.create(model=tiny_folder, file=("a.wav", b"no audio at all"))
    client = client.with_options(max_retries=3)  # the server closes the connection behind such an error
    with open(speech_clips[0]["path"], "rb") as file:
        assert client.audio.transcriptions.create(model=tiny_folder, file=file).text
