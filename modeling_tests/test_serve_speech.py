"""`mel-llm serve-speech` under OpenAI's client, and under clients that are many, slow, rude or wrong."""

import asyncio
import concurrent.futures
import contextlib
import gc
import importlib
import io
import itertools
import json
import signal
import socket
import sys
import threading
import time
import types
import urllib.error
import urllib.request

import numpy as np
import pytest
import soundfile
import torch
from test_modeling_mel_llm_speech import build_speaking
from test_serve import running_server
from transformers import AutoModelForTextToWaveform, AutoProcessor
from typer.testing import CliRunner

import mel_llm
from mel_llm.cli import app
from mel_llm.serving.audio_encoding import FORMATS, AudioEncoder
from mel_llm.synthesis_mel_llm import iter_speech


openai = pytest.importorskip("openai", reason="needs the extra `serve`: openai is not installed")
pytest.importorskip("uvicorn", reason="needs the extra `serve`: uvicorn is not installed")
pytest.importorskip("fastapi", reason="needs the extra `serve`: fastapi is not installed")
speech = importlib.import_module("mel_llm.serving.speech")
http_server = importlib.import_module("mel_llm.serving.http_server")


# --- formats ------------------------------------------------------------------------------------------------------------


def tone(rate: int, seconds: float = 1.5) -> np.ndarray:
    return (0.3 * np.sin(np.arange(round(rate * seconds)) * 2 * np.pi * 440 / rate)).astype(np.float32)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("rate", [16000, 22050])
def test_encoded_audio_is_the_audio(name, stream, rate):
    wave = tone(rate)
    encoder = AudioEncoder(name, rate, stream)
    pieces = [encoder.push(wave[start : start + 999]) for start in range(0, len(wave), 999)]
    assert any(pieces) is stream  # bytes come while it is spoken
    data = b"".join([*pieces, encoder.finish()])
    if name == "pcm":
        decoded, rate = np.frombuffer(data, "<i2") / 32768, 24000
    else:
        decoded, rate = mel_llm.load_audio(data, sampling_rate=encoder.sampling_rate), encoder.sampling_rate
    padding = {"mp3": 0.25, "opus": 0.05}.get(name, 0.001)  # what the codec adds where its header cannot say so
    assert 1.5 - padding / 10 <= len(decoded) / rate <= 1.5 + padding
    spectrum = np.abs(np.fft.rfft(decoded))
    assert abs(spectrum.argmax() * rate / len(decoded) - 440) < 2
    assert abs(np.abs(decoded[rate // 2 : rate]).max() - 0.3) < 0.03


def test_whole_files_have_headers_that_every_reader_takes():
    for name in ("wav", "flac", "mp3", "opus"):
        encoder = AudioEncoder(name, 16000, stream=False)
        encoder.push(tone(16000))
        assert soundfile.info(io.BytesIO(encoder.finish())).frames == 24000


def test_formats_that_are_none():
    with pytest.raises(ValueError, match="mp3, opus, flac, wav, pcm, got 'aac'"):
        AudioEncoder("aac", 16000)


# --- the real thing -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory) -> str:
    """A tiny model that speaks to the limit of its text."""
    folder = tmp_path_factory.mktemp("speaking") / "model"
    model, processor = build_speaking(tokenizer)
    with torch.no_grad():
        model.speech_head.stop.bias.fill_(-50.0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def server(folder, speech_clips, tmp_path_factory):
    clip = speech_clips[0]
    command = [sys.executable, "-m", "mel_llm.cli", "serve-speech", folder, "--served-model-name", "mel"]
    options = ["--voice", f"ada={clip['path']}:{clip['text']}", "--api-key", "secret", "--max-chars", "300"]
    limits = ["--max-seconds", "30", "--shutdown-seconds", "1", "--device", "cpu", "--dtype", "float32"]
    with running_server([*command, *options, *limits], tmp_path_factory.mktemp("serve")) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key="secret", max_retries=0, timeout=60)


def spoken(folder: str, clip: dict, text: str) -> np.ndarray:
    """What the server should have spoken, as 16 bit samples."""
    model = AutoModelForTextToWaveform.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    pieces: list[torch.Tensor] = []
    streamer = types.SimpleNamespace(put=pieces.append, end=lambda: None)
    voice = {"voice": clip["array"], "voice_text": clip["text"]}
    for _ in iter_speech(model, processor, text, **voice, seed=7, streamer=streamer):
        pass
    encoder = AudioEncoder("wav", 16000, stream=False)
    encoder.push(torch.cat(pieces).numpy())
    return soundfile.read(io.BytesIO(encoder.finish()), dtype="int16")[0]


def test_speech_is_streamed_as_it_is_spoken(client, folder, speech_clips):
    asked = {"model": "mel", "input": "Please hang up.", "voice": "ada", "extra_body": {"seed": 7}}
    create = client.audio.speech.with_streaming_response.create
    with create(response_format="wav", **asked) as response:
        assert response.headers["content-type"] == "audio/wav" and "content-length" not in response.headers
        pieces = list(response.iter_bytes())
    assert len(pieces) > 3
    streamed = soundfile.read(io.BytesIO(b"".join(pieces)), dtype="int16")[0]
    assert len(streamed) > 3 * 16000
    assert np.array_equal(streamed, spoken(folder, speech_clips[0], "Please hang up."))


def test_formats_and_voices(client):
    asked = {"model": "mel", "input": "Yes.", "voice": "default"}
    for name in ("mp3", "opus", "flac", "wav"):
        for stream in (True, False):
            answer = client.audio.speech.create(response_format=name, extra_body={"stream": stream}, **asked)
            assert answer.response.headers["content-type"] == FORMATS[name]
            assert ("content-length" in answer.response.headers) is not stream
            assert 2 < len(mel_llm.load_audio(answer.content)) / 16000 < 12
    assert client.audio.speech.create(**asked).response.headers["content-type"] == "audio/mpeg"  # OpenAI's default
    assert len(client.audio.speech.create(response_format="pcm", **asked).content) > 2 * 2 * 24000


def test_listings(client, server):
    assert [model.id for model in client.models.list()] == ["mel"] and client.models.retrieve("mel").id == "mel"
    assert json.load(urllib.request.urlopen(f"{server[0]}/health")) == {"status": "ok", "waiting": 0}
    request = urllib.request.Request(f"{server[0]}/v1/audio/voices", headers={"Authorization": "Bearer secret"})
    assert json.load(urllib.request.urlopen(request)) == {"voices": ["default", "ada"]}


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"voice": "alloy"}, 400, "There is no voice 'alloy'; there are default, ada"),
        ({"voice": {"id": "alloy"}}, 400, "There is no voice 'alloy'"),
        ({"voice": {"id": ["ada"]}}, 400, "voice"),
        ({"input": ""}, 400, "no word"),
        ({"input": "...!"}, 400, "no word"),
        ({"input": "word " * 61}, 400, "305 characters, more than the 300"),
        ({"response_format": "aac"}, 400, "must be one of mp3"),
        ({"speed": 1.5}, 400, "speed 1.0"),
        ({"instructions": "Whisper."}, 400, "instructions"),
        ({"stream_format": "sse"}, 400, "stream_format"),
        ({"model": "tts-1"}, 404, "There is no model 'tts-1'"),
        ({"extra_body": {"seed": -1}}, 400, "seed"),
        ({"extra_body": {"temperature": "hot"}}, 400, "temperature"),
        ({"extra_body": {"pitch": 2}}, 400, "pitch"),
    ],
)
def test_wrong_requests_are_told_so(client, change, status, words):
    with pytest.raises(openai.APIStatusError, match=words) as caught:
        client.audio.speech.create(**{"model": "mel", "input": "Yes.", "voice": "ada", **change})
    assert caught.value.status_code == status
    assert caught.value.body["type"] == "invalid_request_error"


def post(address: str, body: bytes, **headers: str | None) -> tuple[int, dict]:
    """Status and error of a request that is refused. Underscores in the headers' names are hyphens."""
    merged = {"Authorization": "Bearer secret", "Content_Type": "application/json", **headers}
    named = {name.replace("_", "-"): value for name, value in merged.items()}
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(urllib.request.Request(f"{address}/v1/audio/speech", data=body, headers=named))
    return caught.value.code, json.load(caught.value)["error"]


def test_what_a_foreign_page_can_make_a_browser_send_is_refused(server):
    body = json.dumps({"model": "mel", "input": "Yes."}).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "", "text/plain; application/json"):
        status, error = post(server[0], body, Content_Type=kind)
        assert status == 415 and "application/json" in error["message"]
    for host in ("evil.example", "evil.example:8000", "", "[", "localhost.evil.example"):
        status, error = post(server[0], body, Host=host)
        assert status == 400 and error["code"] == "wrong_host"
    for host in ("localhost:8000", "127.0.0.1", "[::1]:8000", "LOCALHOST"):
        urllib.request.urlopen(urllib.request.Request(f"{server[0]}/health", headers={"Host": host})).close()


def test_bodies_that_are_none(server, client):
    for body, status in ((b"", 400), (b"{", 400), (b"[1]", 400), (b'{"model": "\xff"}', 400), (b" " * (1 << 21), 413)):
        assert post(server[0], body)[0] == status
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("tts-1")


# What the client's transport says of a body without its end
BROKEN = "closed connection without sending complete message body"


def test_speech_that_is_too_long(client):
    asked = {
        "model": "mel",
        "input": "Please hang up and try again. " * 9,
        "voice": "default",
        "response_format": "wav",
    }
    with pytest.raises(openai.BadRequestError, match="longer than 30 seconds"):
        client.audio.speech.create(extra_body={"stream": False}, **asked)
    # As a stream, its status has been sent by then: the client must see that the end is missing
    num_bytes = 0
    with client.audio.speech.with_streaming_response.create(**asked) as answer:
        with pytest.raises(Exception, match=BROKEN):
            for piece in answer.iter_bytes():
                num_bytes += len(piece)
    assert 25 * 32000 < num_bytes <= 44 + 30 * 32000


def test_sigterm_ends_the_server_while_it_speaks(client, server):
    """Last in this group: the server is gone afterwards."""
    _, process = server
    create = client.audio.speech.with_streaming_response.create
    with create(
        model="mel", input="Please hang up and try again. " * 9, voice="default", response_format="wav"
    ) as answer:
        stream = answer.iter_bytes()
        next(stream)
        process.send_signal(signal.SIGTERM)
        with pytest.raises(Exception, match=BROKEN):
            for _ in stream:
                pass
    assert process.wait(timeout=20) in (0, -signal.SIGTERM)


# --- what it does under load, with speech that the test controls --------------------------------------------------------


class Speaker:
    """In the place of `iter_speech`: speaks one second after the other, as many as `seconds`, once `gate` is open."""

    def __init__(self, seconds: float = 2.0):
        self.seconds, self.gate, self.started = seconds, threading.Event(), threading.Event()
        self.num_ended = 0

    def __call__(self, model, processor, text, *, streamer, **options):
        try:
            self.started.set()
            self.gate.wait(30)
            left = self.seconds
            while left > 0:
                streamer.put(torch.zeros(16000))
                left -= 1
                yield text, torch.zeros(0)
                if self.seconds == float("inf"):
                    time.sleep(0.01)
        finally:
            self.num_ended += 1


@pytest.fixture
def loaded(monkeypatch):
    """A server of stubs in a thread of this process: `start(speaker, limits...)` gives its address and its worker."""
    servers = []

    def start(speaker: Speaker, shutdown_seconds: int = 10, **limits):
        monkeypatch.setattr(speech, "iter_speech", speaker)
        model = types.SimpleNamespace(vocoder=True, config=types.SimpleNamespace(sampling_rate=16000))
        app = speech.create_app(model, None, "mel", limits=speech.Limits(**limits))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        server = http_server.make_server(app, None, shutdown_seconds, host="127.0.0.1", port=port, log_config=None)
        thread = threading.Thread(target=server.run)
        thread.start()
        servers.append((server, thread, speaker))
        wait_until(lambda: server.started)
        return f"http://127.0.0.1:{port}", app.state.worker

    start.servers = servers
    yield start
    for server, thread, speaker in servers:
        speaker.gate.set()
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def wait_until(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def ask(address: str, response_format: str = "wav", **options) -> int:
    """Bytes of speech."""
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60)
    with client:
        answer = client.audio.speech.create(
            model="mel", input="Yes.", voice="default", response_format=response_format, **options
        )
        return len(answer.content)


def test_a_full_queue_refuses_and_nothing_grows(loaded):
    speaker = Speaker(seconds=2)
    address, worker = loaded(speaker, max_queue=2)
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        held = [pool.submit(ask, address) for _ in range(3)]
        wait_until(lambda: worker.num_waiting == 2 and speaker.started.is_set())
        threads = threading.active_count()
        refused = [pool.submit(ask, address) for _ in range(40)]
        for answer in refused:
            with pytest.raises(openai.RateLimitError, match="no more are queued") as caught:
                answer.result()
            assert caught.value.response.headers["retry-after"]
        assert worker.num_waiting == 2 and threading.active_count() <= threads + 12  # the clients' own
        speaker.gate.set()
        assert [answer.result() for answer in held] == [44 + 2 * 32000] * 3
    wait_until(lambda: worker._num_held == 0)
    assert ask(address) == 44 + 2 * 32000 and worker.is_open


def test_many_requests_leave_nothing_behind(loaded):
    psutil = pytest.importorskip("psutil")
    speaker = Speaker(seconds=20)
    speaker.gate.set()
    address, worker = loaded(speaker, max_queue=8)

    def many(count: int) -> float:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            assert set(pool.map(lambda _: ask(address), range(count))) == {44 + 20 * 32000}
        gc.collect()
        return psutil.Process().memory_info().rss / 2**20

    num_threads = threading.active_count()
    # Each request is 0.6 MiB of audio. What allocators take and keep grows once, what is left behind grows in every round
    sizes = [many(20), *(many(60) for _ in range(3))]
    assert min(after - before for before, after in itertools.pairwise(sizes)) < 20  # MiB
    assert worker._num_held == 0 and threading.active_count() == num_threads  # none for each request


def test_a_client_that_leaves_ends_its_speech(loaded):
    speaker = Speaker(seconds=float("inf"))
    speaker.gate.set()
    address, worker = loaded(speaker, max_queue=0, max_seconds=1e6)
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60)
    asked = {"model": "mel", "input": "Yes.", "voice": "default", "response_format": "pcm"}
    for number in range(2):  # the second is served only because the first one ended
        with client.audio.speech.with_streaming_response.create(**asked) as answer:
            stream = answer.iter_bytes()
            assert next(stream) and speaker.num_ended == number
        wait_until(lambda number=number: speaker.num_ended == number + 1 and worker._num_held == 0)


def test_a_client_that_leaves_the_queue_is_not_spoken_to(loaded):
    speaker = Speaker(seconds=1)
    address, worker = loaded(speaker, max_queue=2)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, address)
        wait_until(speaker.started.is_set)
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=0.5)
        with pytest.raises(openai.APITimeoutError):
            client.audio.speech.create(model="mel", input="Yes.", voice="default")
        wait_until(lambda: worker.num_waiting == 0 and worker._num_held == 1)
        speaker.gate.set()
        assert first.result() > 32000
    assert speaker.num_ended == 1


def test_a_client_that_takes_nothing_is_dropped(loaded):
    speaker = Speaker(seconds=590)  # 19 MB, more than sockets hold
    speaker.gate.set()
    address, worker = loaded(speaker, max_queue=0, stall_seconds=0.5)
    host, port = address.removeprefix("http://").split(":")
    with socket.socket() as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.connect((host, int(port)))
        body = json.dumps({"model": "mel", "input": "Yes.", "response_format": "wav"}).encode()
        lazy.sendall(HEAD % len(body) + body)
        wait_until(speaker.started.is_set)
        wait_until(lambda: worker._num_held == 0)


HEAD = b"POST /v1/audio/speech HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


def connect(address: str) -> socket.socket:
    host, port = address.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def is_closed(connection: socket.socket) -> bool:
    """Waits for the other side to close."""
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True


def test_silent_connections_shut_nobody_out(loaded, monkeypatch):
    monkeypatch.setattr(http_server.Protocol, "max_connections", 20)
    speaker = Speaker(seconds=1)
    speaker.gate.set()
    address, _ = loaded(speaker)
    with contextlib.ExitStack() as stack:
        for number in range(60):  # some say nothing, some begin
            silent = stack.enter_context(connect(address))
            silent.sendall(b"GET /health HTTP/1.1\r\nHo"[: 24 * (number % 2)])
        assert ask(address) == 44 + 32000


def test_connections_without_a_request_are_closed(loaded, monkeypatch):
    monkeypatch.setattr(http_server.Protocol, "request_seconds", 0.5)
    speaker = Speaker(seconds=1)
    address, _ = loaded(speaker)
    head = b"GET /health HTTP/1.1\r\nHost: x\r\n"
    with connect(address) as silent, connect(address) as slow, connect(address) as second:
        second.sendall(head + b"\r\n")
        assert b" 200 OK" in second.recv(4096)
        second.sendall(head)  # and never its end
        with contextlib.suppress(ConnectionError):
            for number in range(200):  # a byte now and then does not keep it open
                slow.sendall(head[number : number + 1] or b"x")
                time.sleep(0.01)
            pytest.fail("two seconds were accepted")
        assert is_closed(silent) and is_closed(second)
        pending = concurrent.futures.ThreadPoolExecutor(1).submit(ask, address)
        wait_until(speaker.started.is_set)
        time.sleep(0.8)  # who waits for an answer is not silent
        speaker.gate.set()
        assert pending.result() == 44 + 32000


def test_where_all_connections_are_busy_the_next_is_refused(loaded, monkeypatch):
    monkeypatch.setattr(http_server.Protocol, "max_connections", 1)
    speaker = Speaker(seconds=1)
    address, _ = loaded(speaker)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, address)
        wait_until(speaker.started.is_set)
        with pytest.raises(openai.InternalServerError, match="too many connections") as caught:
            ask(address)
        assert caught.value.status_code == 503 and caught.value.body["type"] == "server_error"
        speaker.gate.set()
        assert first.result() == 44 + 32000


def test_endless_headers_are_refused(loaded):
    address, _ = loaded(Speaker())
    with connect(address) as endless:
        answer = b""
        with contextlib.suppress(ConnectionError):  # what was left unread resets the connection
            endless.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"X-A: b\r\n" * 10000)  # 80 kB, and no end
        with contextlib.suppress(ConnectionError):
            while data := endless.recv(4096):
                answer += data
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert json.loads(answer.split(b"\r\n\r\n")[1])["error"]["type"] == "invalid_request_error"
    with connect(address) as endless, pytest.raises(ConnectionError):
        for _ in range(200):  # 13 MB, more than sockets hold
            endless.sendall(b"X-A: b\r\n" * 8192)


def test_clients_that_go_away_leave_no_traceback(loaded, caplog):
    speaker = Speaker(seconds=1)
    speaker.gate.set()
    address, worker = loaded(speaker, max_queue=4)
    body = json.dumps({"model": "mel", "input": "Yes."}).encode()
    for number in range(60):  # after all of the request, or half of it
        with connect(address) as leaving:
            leaving.sendall(HEAD % len(body) + body[: len(body) // (1 + number % 2)])
    wait_until(lambda: worker._num_held == 0)
    assert ask(address) > 32000
    assert not [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]


def test_bodies_that_do_not_come(loaded, monkeypatch):
    monkeypatch.setattr(speech, "_BODY_SECONDS", 0.2)
    address, _ = loaded(Speaker())
    with connect(address) as half:
        half.sendall(HEAD % 100 + b"{")
        assert half.recv(4096).startswith(b"HTTP/1.1 408 ")


def test_the_end_of_the_server_does_not_wait_for_half_a_body(loaded, caplog):
    speaker = Speaker(seconds=float("inf"))
    speaker.gate.set()
    address, _ = loaded(speaker, shutdown_seconds=1, max_seconds=1e6)
    with connect(address) as half, connect(address) as spoken_to:
        half.sendall(HEAD % 100 + b"{")
        wait_until(lambda: len(loaded.servers[0][0].server_state.tasks) == 1)
        loaded.servers[0][0].should_exit = True
        answer = half.recv(4096)
        assert answer.startswith(b"HTTP/1.1 503 ") and b"shutting_down" in answer and is_closed(half)
        assert is_closed(spoken_to)
    loaded.servers[0][1].join(5)
    assert not loaded.servers[0][1].is_alive()
    assert not [record for record in caplog.records if record.exc_info]


def hear_it_break_off(address: str, end) -> None:
    """Asks for endless speech and has it ended: that must not look like its end."""
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60)
    asked = {"model": "mel", "input": "Yes.", "voice": "default", "response_format": "pcm"}
    with client.audio.speech.with_streaming_response.create(**asked) as answer:
        stream = answer.iter_bytes()
        next(stream)
        end()
        with pytest.raises(Exception, match=BROKEN):
            for _ in stream:
                pass


def test_speech_that_the_end_breaks_off_leaves_no_traceback(loaded, caplog):
    speaker = Speaker(seconds=float("inf"))
    speaker.gate.set()
    address, _ = loaded(speaker, shutdown_seconds=1, max_seconds=1e6)
    hear_it_break_off(address, lambda: setattr(loaded.servers[0][0], "should_exit", True))
    loaded.servers[0][1].join(5)
    assert not loaded.servers[0][1].is_alive()
    assert "Speech was broken off" in caplog.text
    assert not [record for record in caplog.records if record.exc_info]


def test_speech_that_the_worker_ends_is_not_taken_for_whole(loaded, caplog):
    """A cancelled task may go on: asyncio.wait_for of Python 3.11 swallows what comes while its future ends."""
    speaker = Speaker(seconds=float("inf"))
    speaker.gate.set()
    address, worker = loaded(speaker, max_seconds=1e6)
    hear_it_break_off(address, worker.close)
    assert "Speech was broken off" in caplog.text


def test_failures_are_told_and_survived(loaded):
    speaker = Speaker()
    speaker.gate.set()
    problems = iter([ValueError("`text` has no word to be spoken."), RuntimeError("out of memory, secretly")])

    def failing(*args, **kwargs):
        problem = next(problems, None)
        if problem is not None:
            raise problem
        return Speaker.__call__(speaker, *args, **kwargs)

    address, worker = loaded(speaker, max_queue=1)
    speech.iter_speech = failing  # undone with the fixture's patch
    with pytest.raises(openai.BadRequestError, match="no word"):
        ask(address)
    with pytest.raises(openai.InternalServerError, match="the server's log says why") as caught:
        ask(address)
    assert "secretly" not in str(caught.value)
    assert ask(address) > 32000 and worker.is_open


def test_draining_tells_those_who_wait(loaded):
    speaker = Speaker(seconds=1)
    address, worker = loaded(speaker, max_queue=2)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, address)
        wait_until(speaker.started.is_set)
        second = pool.submit(ask, address)
        wait_until(lambda: worker.num_waiting == 1)
        worker.drain()
        for answer in (second, pool.submit(ask, address)):
            with pytest.raises(openai.InternalServerError, match="shutting down") as caught:
                answer.result()
            assert caught.value.status_code == 503
        speaker.gate.set()
        assert first.result() > 32000  # what was being spoken came to its end
    with pytest.raises(urllib.error.HTTPError, match="503"):
        urllib.request.urlopen(f"{address}/health")


# --- what is wrong from the start ---------------------------------------------------------------------------------------


def test_voices_are_parsed(tmp_path, speech_clips):
    path = speech_clips[0]["path"]
    name, voice = speech.Voice.parse(f"ada={path}:Press 1: the menu", 16000)
    assert (name, voice.text) == ("ada", "Press 1: the menu") and len(voice.audio) == len(speech_clips[0]["array"])
    (tmp_path / "a:b.txt").write_text("beside it\n")
    soundfile.write(tmp_path / "a:b.wav", speech_clips[0]["array"], 16000)
    assert speech.Voice.parse(f"bob={tmp_path / 'a:b.wav'}", 16000)[1].text == "beside it"
    (tmp_path / "no.wav").write_text("no audio")
    for value, words in (
        ("ada", "must be NAME=FILE:TRANSCRIPT"),
        ("ada=nowhere.wav:text", "no file 'nowhere.wav:text'"),
        (f"ada={path}:  ", "transcript is empty"),
        (f"ada={path}", "what is said in it"),
        (f"ada={tmp_path / 'no.wav'}:text", "--voice ada"),
    ):
        with pytest.raises(ValueError, match=words):
            speech.Voice.parse(value, 16000)


def test_models_that_make_no_sound(tokenizer):
    silent, processor = build_speaking(tokenizer, vocoder=False)
    with pytest.raises(ValueError, match="no vocoder"):
        speech.create_app(silent, processor, "mel")


def test_the_command_fails_in_one_line_before_the_work(tiny_folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(app, ["serve-speech", tiny_folder, "--port", port])
    assert result.exit_code == 2 and result.stderr.startswith(f"mel-llm: cannot listen on 127.0.0.1:{port}")
    for options, words in (
        ([], "speech_config"),  # a model that only reads
        (["--log-level", "loud"], "--log-level"),
        (["--dtype", "int3"], "--dtype"),
        (["--api-key", ""], "API key is empty"),
        (["--api-key", "  "], "API key is empty"),
    ):
        result = CliRunner().invoke(app, ["serve-speech", tiny_folder, "--port", "0", *options])
        assert result.exit_code == 2 and words in result.stderr and result.stderr.startswith("mel-llm: ")


def test_an_api_key_does_not_fail_open(tiny_folder, monkeypatch):
    monkeypatch.setenv("MEL_LLM_API_KEY", "")  # as `MEL_LLM_API_KEY=$TYPO` does
    result = CliRunner().invoke(app, ["serve-speech", tiny_folder, "--port", "0"])
    assert result.exit_code == 2 and "API key is empty" in result.stderr
    model = types.SimpleNamespace(vocoder=True)
    with pytest.raises(ValueError, match="`api_key` is empty"):
        speech.create_app(model, None, "mel", api_key="")


@pytest.mark.parametrize(
    ("options", "warned", "hosts"),
    [
        ([], False, {"localhost", "127.0.0.1", "::1"}),
        (["--allowed-host", "Speech.example"], False, {"localhost", "127.0.0.1", "::1", "speech.example"}),
        (["--host", "0.0.0.0"], True, None),
        (["--host", "0.0.0.0", "--api-key", "secret"], False, None),
    ],
)
def test_who_is_let_in(folder, monkeypatch, options, warned, hosts):
    create, given = speech.create_app, []
    monkeypatch.delenv("MEL_LLM_API_KEY", raising=False)
    monkeypatch.setattr(speech, "create_app", lambda *args: given.append(args[-1]) or create(*args))
    monkeypatch.setattr(speech, "run", lambda app, *args: app.state.worker.close())
    result = CliRunner().invoke(app, ["serve-speech", folder, "--port", "0", "--device", "cpu", *options])
    assert result.exit_code == 0 and ("there is no --api-key" in result.stderr) is warned
    assert given == [None] if hosts is None else set(given[0]) == hosts


def test_jobs_outlive_their_loop():
    """A speaking thread that is still busy when the server's loop is gone must not fail."""

    async def make():
        return speech._Job(speech.SpeechRequest(model="mel", input="Yes."), None)

    asyncio.run(make()).send(b"too late")
