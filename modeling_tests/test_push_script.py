"""scripts/push.py: what it refuses, what it uploads, and how it fails."""

import json
import os
import shutil
import subprocess
import sys

import huggingface_hub
import pytest
import soundfile
import torch
from conftest import ROOT, build_tiny, load_script
from hub_server import HubServer
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import filter_repo_objects, httpx
from peft import get_peft_model

from mel_llm import MelLLMFeatureExtractor, MelLLMSpeechConfig, MelLLMVocoderConfig, create_model_card
from mel_llm.checkpoint_files import read_weights
from mel_llm.publishing import file_problems, try_model
from mel_llm.training import lora_config


@pytest.fixture(scope="module")
def push():
    return load_script("push")


@pytest.fixture(scope="module")
def published(tokenizer, tmp_path_factory):
    """A folder as it should be: a small model that reads and speaks, in shards, with its card and a sample."""
    folder = tmp_path_factory.mktemp("cards") / "my-model"
    extractor = MelLLMFeatureExtractor.from_preset("phi4", edge_padding=120)
    speech = MelLLMSpeechConfig(head_hidden_size=16, postnet_layers=1, postnet_channels=8, min_tokens_per_second=20.0)
    vocoder = MelLLMVocoderConfig.from_feature_extractor(extractor, num_iterations=2)
    model, processor = build_tiny(tokenizer, feature_extractor=extractor, speech_config=speech, vocoder_config=vocoder)
    model.save_pretrained(folder, max_shard_size="200KB")
    processor.save_pretrained(folder)
    assert (folder / "model.safetensors.index.json").is_file()
    (folder / "samples").mkdir()
    soundfile.write(folder / "samples" / "0.wav", torch.zeros(160).numpy(), 16000)
    create_model_card(folder, repo_id="ada/my-model", samples=["samples/0.wav"])
    return folder


@pytest.fixture
def folder(published, tmp_path):
    return shutil.copytree(published, tmp_path / "my-model")


class FakeApi:
    """`HfApi` as far as the script uses it."""

    error: Exception | None = None
    calls: list = []  # noqa: RUF012

    def __init__(self, token=None):
        assert token is None

    def create_repo(self, repo_id, private=None, exist_ok=False):
        self.calls.append(("create_repo", repo_id, private, exist_ok))
        if self.error is not None:
            raise self.error
        return type("Repo", (), {"repo_id": repo_id})

    def create_branch(self, repo_id, branch, exist_ok=False):
        self.calls.append(("create_branch", branch))

    def upload_folder(self, **kwargs):
        names = sorted(p.relative_to(kwargs["folder_path"]).as_posix() for p in kwargs["folder_path"].rglob("*"))
        self.calls.append(("upload_folder", kwargs, names))
        return type("Commit", (), {"commit_url": "https://hub.example/ada/my-model/commit/1"})

    def list_repo_files(self, repo_id, revision=None):
        return ["README.md", ".gitattributes", "old-notes.txt"]


@pytest.fixture
def hub(push, monkeypatch):
    fake = type("Api", (FakeApi,), {"calls": []})
    monkeypatch.setattr(push, "HfApi", fake)
    monkeypatch.setattr(huggingface_hub, "HfApi", fake)
    monkeypatch.setattr(push, "get_token", lambda: "hf_secret")
    return fake


def test_a_dry_run_checks_everything_and_uploads_nothing(push, hub, folder, capsys):
    push.main([str(folder), "--repo", "ada/my-model", "--dry-run"])
    printed = capsys.readouterr().out
    assert "hears en_hello-world.flac as" in printed and "speaks (" in printed and "MelLLMForTextToSpeech" in printed
    assert "Dry run" in printed and "samples/0.wav" in printed and hub.calls == []


def test_one_commit_brings_the_folder_and_takes_other_weights_away(push, hub, folder, capsys):
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x").write_text("not for the Hub")
    (folder / ".eval_results").mkdir()
    (folder / ".eval_results" / "mine.yaml").write_text("- value: 1")
    (folder / ".env").write_text("SECRET=1")
    push.main([str(folder), "--repo", "ada/my-model", "--private", "--revision", "v2"])
    create, branch, (_, upload, names) = hub.calls
    assert create == ("create_repo", "ada/my-model", True, True) and branch == ("create_branch", "v2")
    assert upload["revision"] == "v2" and "model-*.safetensors" in upload["delete_patterns"]
    files = ["README.md", ".cache/x", ".env", "samples/.x", ".eval_results/mine.yaml", "samples/0.wav"]
    kept = set(filter_repo_objects(files, ignore_patterns=upload["ignore_patterns"]))
    assert kept == {"README.md", ".eval_results/mine.yaml", "samples/0.wav"} and kept <= set(names)
    printed = capsys.readouterr()
    assert "https://hub.example/ada/my-model/commit/1" in printed.out and "old-notes.txt" in printed.err
    assert "hf_secret" not in printed.out + printed.err


def response(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("POST", "https://hub.example/api/repos/create"))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (HfHubHTTPError("no", response=response(401)), "hf auth login"),
        (HfHubHTTPError("no", response=response(403)), "may not write to 'ada/my-model'"),
        (HfHubHTTPError("teapot", response=response(418)), "teapot Push again"),
        (httpx.ConnectError("[Errno -2] Name or service not known"), "ConnectError: .Errno -2. Name or service"),
        (OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE"),
        (ValueError('Invalid metadata in README.md.\n- "license" must be one of ...'), "Invalid metadata"),
    ],
)
def test_each_failure_is_one_line(push, hub, folder, monkeypatch, error, message):
    monkeypatch.setattr(hub, "error", error)
    monkeypatch.setattr(push, "check", lambda *args: {"model_class": "", "transcript": ""})
    with pytest.raises(push.Refused, match=message) as told:
        push.main([str(folder), "--repo", "ada/my-model"])
    assert "\n" not in str(told.value)


def test_without_a_token_nothing_is_sent(push, hub, folder, monkeypatch):
    monkeypatch.setattr(push, "get_token", lambda: None)
    monkeypatch.setattr(push, "check", lambda *args: {"model_class": "", "transcript": ""})
    with pytest.raises(push.Refused, match="hf auth login"):
        push.main([str(folder), "--repo", "ada/my-model"])
    assert hub.calls == []


@pytest.mark.parametrize("name", ["my-model", "a/b/c", "ada/my model", "../x"])
def test_names_that_are_no_repository(push, hub, folder, name):
    with pytest.raises(push.Refused, match="--repo"):
        push.main([str(folder), "--repo", name, "--dry-run"])


def edit_json(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def shard(folder):
    return sorted(folder.glob("model-*.safetensors"))[0]


DAMAGE = {
    "a pickle": (lambda f: (f / "training_args.bin").write_bytes(b"x"), "training_args.bin"),
    "a nested pickle": (lambda f: (f / "samples" / "a.PT").write_bytes(b"x"), "a.PT"),
    "a checkpoint": (lambda f: shutil.copytree(f / "samples", f / "checkpoint-5"), "left behind.*checkpoint-5"),
    "no card": (lambda f: (f / "README.md").unlink(), "no README.md"),
    "bad metadata": (lambda f: (f / "README.md").write_text("---\nlicense: Mine!\n---\n"), "license"),
    "a cut shard": (lambda f: cut(shard(f)), "its header announces"),
    "a pointer": (
        lambda f: shard(f).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        "git lfs pull",
    ),
    "an empty file": (lambda f: (f / "notes.txt").write_bytes(b""), "notes.txt is empty"),
    "a lost shard": (lambda f: shard(f).unlink(), "not there"),
    "shards of another model": (lambda f: shutil.copy(shard(f), f / "model-9.safetensors"), "model-9.*no part"),
    "no processor": (lambda f: (f / "processor_config.json").unlink(), "no processor"),
    "a path": (lambda f: edit_json(f / "config.json", _name_or_path="/home/ada/base"), "_name_or_path.*/home/ada"),
    "a path below": (lambda f: edit_json(f / "config.json", x={"y": ["C:\\Users\\ada\\z"]}), "x.y"),
    "a path in a record": (
        lambda f: (f / "training_summary.json").write_text('{"data": {"train": {"/home/ada/my speech": 1}}}'),
        "data.train.*/home/ada/my speech(.|\n)*pack.py",
    ),
    "a trace": (lambda f: (f / "notes.md").write_text(f"See {f.parent.resolve()}/data"), "names a folder"),
    "broken JSON": (lambda f: (f / "generation_config.json").write_text("{"), "not JSON"),
    **{
        f"what is nobody's business: {name}": (
            lambda f, name=name: (f / name).parent.mkdir(exist_ok=True) or (f / name).write_text("x"),
            f"{name}.*--also",
        )
        for name in (
            "id_rsa",
            "server.key",
            "credentials.json",
            "wandb/run.json",
            "runs/events.out",
            "a.log",
            "b.sqlite",
            "samples/notes.txt",
            "private/a.wav",
        )
    },
    "a token": (lambda f: (f / "NOTICE.md").write_text("hf_" + "aB3" * 11), "NOTICE.md has a token of the Hub"),
    "a key": (
        lambda f: (f / "LICENSE").write_text("-----BEGIN OPENSSH PRIVATE KEY-----"),
        "LICENSE has a private key",
    ),
    "a link": (lambda f: (f / "link.txt").symlink_to(f / "README.md"), "link.txt is a link"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_folders_that_are_not_fit_to_be_published(push, hub, folder, damage):
    assert file_problems(folder) == []
    break_it, message = damage
    break_it(folder)
    with pytest.raises(push.Refused, match=message):
        push.main([str(folder), "--repo", "ada/my-model"])
    assert hub.calls == []


def test_other_files_are_asked_for_by_name(push, hub, folder):
    (folder / "losses.csv").write_text("step,loss\n")
    (folder / "figures").mkdir()
    (folder / "figures" / "a.pdf").write_bytes(b"%PDF")
    (folder / "LICENSE").write_text("MIT")
    more = ["--also", "losses.csv", "--also", "figures/*.pdf"]
    push.main([str(folder), "--repo", "ada/my-model", *more])
    assert {"losses.csv", "figures/a.pdf", "LICENSE"} <= set(hub.calls[-1][-1])
    # A pattern allows a file, not what is in it
    (folder / "losses.csv").write_text("token hf_" + "aB3" * 11)
    with pytest.raises(push.Refused, match=r"losses\.csv has a token") as told:
        push.main([str(folder), "--repo", "ada/my-model", *more])
    assert "aB3" not in str(told.value)


def test_files_that_are_too_large(push, hub, folder):
    with pytest.raises(push.Refused, match=r"more than 0\.1"):
        push.main([str(folder), "--repo", "ada/my-model", "--max-file-mb", "0.1"])


def test_a_model_that_lacks_weights_does_not_pass(push, hub, folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    lost = shard(folder)
    lost.unlink()
    index["weight_map"] = {key: value for key, value in index["weight_map"].items() if value != lost.name}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert file_problems(folder) == []
    with pytest.raises(ValueError, match="missing keys"):
        push.main([str(folder), "--repo", "ada/my-model"])
    assert hub.calls == []


def test_adapters_need_a_base_that_others_have(tiny, speech_clips, tiny_folder, tmp_path):
    model, processor = tiny
    model.name_or_path = model.config._name_or_path = tiny_folder
    folder = tmp_path / "adapter"
    get_peft_model(model, lora_config(model, "small", r=2)).save_pretrained(folder)
    processor.save_pretrained(folder)
    create_model_card(folder, overwrite=True)
    (problem,) = file_problems(folder)
    assert "base_model_name_or_path" in problem and tiny_folder in problem
    assert isinstance(try_model(folder, speech_clips[0]["path"])["transcript"], str)

    for base, is_wrong in (("./base", True), ("ada/base", False)):
        edit_json(folder / "adapter_config.json", base_model_name_or_path=base)
        assert bool(file_problems(folder)) == is_wrong


def test_code_goes_into_a_copy(push, hub, folder, monkeypatch, capsys):
    tried = []
    monkeypatch.setattr(push, "try_remote_code", lambda folder, recording: tried.append(folder))
    export = lambda target: (target / "modeling_mel_llm.py").write_text("# code")  # noqa: E731
    monkeypatch.setattr(push, "export_remote_code", export)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    push.main([str(folder), "--repo", "ada/my-model", "--with-code"])
    (_, _, names) = hub.calls[-1]
    assert "with_code=True" in capsys.readouterr().err  # the card knows nothing of it
    assert "modeling_mel_llm.py" in names and "samples/0.wav" in names and len(tried) == 1
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert not tried[0].exists()


def test_a_folder_goes_to_a_hub_over_http_with_its_code(folder, tmp_path):
    """The command as a user runs it, up to a stranger's first transcript."""
    home = {"HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_alice", "NO_PROXY": "127.0.0.1,localhost"}
    with HubServer() as server:
        environment = {**os.environ, **home, "HF_ENDPOINT": server.endpoint, "HF_HUB_DISABLE_XET": "1"}
        environment = {name: value for name, value in environment.items() if not name.endswith("_OFFLINE")}
        command = [sys.executable, str(ROOT / "scripts" / "push.py"), str(folder), "--repo"]
        more = ["alice/spoken", "--with-code", "--private"]
        done = subprocess.run([*command, *more], env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        repo = server.repos["alice/spoken"]
        assert repo.private and len(repo.history("main")) == 2  # made, and filled at once
        files = repo.history("main")[0].files
        assert {"config.json", "modeling_mel_llm.py", "README.md", "samples/0.wav"} <= set(files)
        denied = subprocess.run([*command, "bob/spoken"], env=environment, capture_output=True, text=True, timeout=300)
    assert denied.returncode == 1 and "may not write" in denied.stderr and "Traceback" not in denied.stderr


def test_weights_are_read_from_their_headers(published, tiny_folder):
    from pathlib import Path

    from mel_llm import MelLLMForSpeechSeq2Seq

    model = MelLLMForSpeechSeq2Seq.from_pretrained(tiny_folder)
    weights = read_weights(Path(tiny_folder))
    in_files = sum(t.numel() for name, t in model.state_dict().items() if name != "lm_head.weight")  # tied
    assert weights.parameters == in_files and weights.dtypes == ("F32",) and weights.files == ("model.safetensors",)
    assert len(read_weights(published).files) > 1
