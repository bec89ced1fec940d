"""Pushing and pulling with the real `huggingface_hub` client, over HTTP, against the Hub in hub_server.py."""

import json

import pytest
from conftest import ROOT
from hub_client import Client, ClientError
from hub_server import HubServer


SETUP = """
import copy, json, os, resource, sys, tempfile
import torch
from huggingface_hub import HfApi
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor, logging, pipeline
import mel_llm
from conftest import build_tiny
from mel_llm.training import train_tokenizer

logging.disable_progress_bar()

def fresh():
    return tempfile.mkdtemp(prefix="cache-", dir=os.environ["HF_HOME"])

def total(model):
    return sum(float(p.double().abs().sum()) for p in model.parameters())

def load(repo, **kwargs):
    kwargs.setdefault("cache_dir", fresh())
    return AutoModelForSpeechSeq2Seq.from_pretrained(repo, **kwargs)

def scaled(factor):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(factor)
    return other

def leftovers(folder):  # of downloads that broke off
    return [name for _, _, names in os.walk(folder) for name in names if name.endswith(".incomplete")]

tokenizer = train_tokenizer(["hello world this is it"] * 40, vocab_size=290)
model, processor = build_tiny(tokenizer)
"""


@pytest.fixture(scope="module")
def hub():
    with HubServer() as hub:
        yield hub


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    with Client(tmp_path_factory.mktemp("home"), hub.endpoint, "hf_alice") as client:
        client(SETUP)
        yield client


@pytest.fixture(autouse=True)
def no_faults_left(hub):
    yield
    hub.faults.clear()
    hub.part_size = 1 << 30


# --- what works ---------------------------------------------------------------------------------------------------------


def test_a_private_model_goes_there_and_comes_back(hub, client):
    client('model.push_to_hub("alice/first", private=True, tags=["speech"])')
    client('processor.push_to_hub("alice/first", commit_message="The processor")')
    repo = hub.repos["alice/first"]
    assert repo.private
    assert [commit.title for commit in repo.history("main")][:2] == ["The processor", "Upload model"]
    files = hub.files("alice/first")
    assert {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "README.md"} <= set(files)
    assert not [name for name in files if name.endswith((".py", ".bin"))]
    assert b"speech" in files["README.md"] and b"library_name: transformers" in files["README.md"]
    assert client('other = load("alice/first"); result = total(other) == total(model)')
    assert client('result = type(AutoProcessor.from_pretrained("alice/first", cache_dir=fresh())).__name__') == (
        "MelLLMProcessor"
    )
    assert client(
        'p = pipeline("automatic-speech-recognition", model="alice/first")\n'
        'result = [p.type, isinstance(p(torch.randn(8000).numpy(), generate_kwargs={"max_new_tokens": 3})["text"], str)]'
    ) == ["seq2seq", True]
    # large files lie on another host, which is no business of the token's
    sent = [headers for method, path, headers in hub.requests if path.startswith("/lfs-object")]
    assert sent and not any("authorization" in headers for headers in sent)


@pytest.mark.parametrize("token", ["hf_bob", False])
def test_private_is_private(client, token):
    client('model.push_to_hub("alice/secret", private=True)')
    with pytest.raises(ClientError, match="private|not a valid model identifier") as error:
        client("load('alice/secret', token=token)", token=token)
    assert "OSError" in error.value.kinds and "token" in error.value.message


def test_branches_tags_and_commits(hub, client):
    first = client('result = model.push_to_hub("alice/versions").oid')
    client('HfApi().create_tag("alice/versions", tag="v1")')
    client('scaled(2.0).push_to_hub("alice/versions", revision="dev")')
    assert hub.files("alice/versions", first) == hub.files("alice/versions", "main")
    assert client(
        'result = [total(load("alice/versions", revision=r)) / total(model) for r in revisions]',
        revisions=[None, "v1", "dev", first],
    ) == pytest.approx([1.0, 1.0, 2.0, 1.0])
    with pytest.raises(ClientError, match="no_such_branch") as error:
        client('load("alice/versions", revision="no_such_branch")')
    assert "OSError" in error.value.kinds


def test_a_pull_request_leaves_the_branch_alone(hub, client):
    before = client('model.push_to_hub("alice/asked"); result = HfApi().model_info("alice/asked").sha')
    client('model.push_to_hub("alice/asked", token="hf_bob", create_pr=True, max_shard_size="100KB")')
    assert hub.repos["alice/asked"].refs["main"] == before
    assert "model.safetensors.index.json" in hub.files("alice/asked", "refs/pr/1")


def test_shards_replace_a_whole_file_and_the_other_way_round(hub, client):
    """transformers reads model.safetensors before it looks for shards: an old one beside them would be the model."""
    client('model.push_to_hub("alice/shards"); processor.push_to_hub("alice/shards")')
    client('scaled(3.0).push_to_hub("alice/shards", max_shard_size="100KB")')
    files = set(hub.files("alice/shards"))
    assert "model.safetensors" not in files and "model.safetensors.index.json" in files
    assert sum(name.startswith("model-") for name in files) > 1 and "tokenizer.json" in files
    assert client('result = total(load("alice/shards")) / total(model)') == pytest.approx(3.0)
    client('model.push_to_hub("alice/shards")')
    assert [name for name in hub.files("alice/shards") if name.startswith("model")] == ["model.safetensors"]
    assert client('result = total(load("alice/shards")) / total(model)') == pytest.approx(1.0)


def test_large_files_in_parts(hub, client):
    hub.part_size = 50_000
    client('scaled(5.0).push_to_hub("alice/parts")')
    assert sum(path.startswith("/lfs-part") for method, path, _ in hub.requests) > 3
    assert client('result = total(load("alice/parts")) / total(model)') == pytest.approx(5.0)


def test_nothing_new_is_no_commit(hub, client):
    client('model.push_to_hub("alice/same")')
    before = hub.repos["alice/same"].refs["main"]
    client('model.push_to_hub("alice/same")')
    assert hub.repos["alice/same"].refs["main"] == before


def test_adapters(hub, client):
    code = """
from mel_llm.training import lora_config
from packaging.version import Version
from peft import PeftModel, get_peft_model
import transformers
model.push_to_hub("alice/base"); processor.push_to_hub("alice/base")
base = load("alice/base")
tuned = get_peft_model(base, lora_config(base, "small", init_lora_weights=False)).eval()
tuned.push_to_hub("alice/adapter", private=True)
processor.push_to_hub("alice/adapter")
inputs = processor(audio=torch.randn(8000).numpy())
expected = tuned.generate(**inputs, max_new_tokens=8)
loaded = PeftModel.from_pretrained(load("alice/base"), "alice/adapter", cache_dir=fresh()).eval()
result = [torch.equal(loaded.generate(**inputs, max_new_tokens=8), expected)]
if Version(transformers.__version__) >= Version("5.18"):  # before, modules_to_save are lost this way (README)
    result.append(torch.equal(load("alice/adapter").eval().generate(**inputs, max_new_tokens=8), expected))
"""
    assert all(client(code))
    files = hub.files("alice/adapter")
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "alice/base"
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    # and a whole model over it: adapters that are not its own would be loaded on top
    client('tuned.merge_and_unload().push_to_hub("alice/adapter")')
    assert not [name for name in hub.files("alice/adapter") if name.startswith("adapter")]


# --- what goes wrong: uploads -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "repo, token, advice",
    [
        ("alice/refused", "hf_bob", "may not write"),
        ("alice/refused", "hf_alice_read", "may not write"),
        ("alice/refused", "hf_nobody", "hf auth login"),
        ("alice/refused", False, "hf auth login"),
        ("nobody/refused", "hf_alice", "may not write"),
    ],
)
def test_who_may_not_write_is_told_what_to_do(hub, client, repo, token, advice):
    with pytest.raises(ClientError, match=advice) as error:
        client("model.push_to_hub(repo, token=token)", repo=repo, token=token)
    assert "HfHubHTTPError" in error.value.kinds
    assert repo not in hub.repos


@pytest.mark.parametrize(
    "method, path, how",
    [
        ("PUT", "/lfs-object/", {"cut_after": 0, "times": 20}),
        ("PUT", "/lfs-object/", {"corrupt": True, "times": 20}),
        ("PUT", "/lfs-object/", {"status": 507, "times": 20}),
        ("POST", "/objects/batch", {"status": 500, "times": 20}),
        ("POST", "/preupload/", {"cut_after": 0, "times": 20}),
        ("POST", "/commit/", {"status": 503}),
        ("POST", "/commit/", {"cut_after": 0}),
    ],
    ids=["cut", "another content", "storage full", "batch", "preupload", "commit", "commit cut"],
)
def test_an_upload_that_breaks_off_changes_nothing(hub, client, method, path, how):
    client('model.push_to_hub("alice/broken")')
    before = hub.files("alice/broken")
    hub.break_next(method, path, **how)
    factor = 2.0 + len(hub.requests) / 1000  # content that the server has not seen
    with pytest.raises(ClientError, match="(?i)push again") as error:
        client('scaled(factor).push_to_hub("alice/broken")', factor=factor)
    assert "OSError" in error.value.kinds
    assert hub.files("alice/broken") == before
    hub.faults.clear()
    client('scaled(factor).push_to_hub("alice/broken")', factor=factor)
    assert client('result = total(load("alice/broken")) / total(model)') == pytest.approx(factor)


def test_a_lost_answer_is_told_from_a_lost_commit(hub, client):
    client('model.push_to_hub("alice/lost")')
    hub.break_next("POST", "/commit/", cut_after=5)  # of the answer, when the commit is made
    with pytest.raises(ClientError, match="has a new commit"):
        client('scaled(3.0).push_to_hub("alice/lost")')
    assert client('result = total(load("alice/lost")) / total(model)') == pytest.approx(3.0)
    hub.break_next("POST", "/commit/", cut_after=0)
    with pytest.raises(ClientError, match="is as it was"):
        client('scaled(4.0).push_to_hub("alice/lost")')
    with pytest.raises(ClientError, match="no folder '/nonexistent'"):
        client('from mel_llm.sharing_mel_llm import push_folder; push_folder("/nonexistent", "alice/lost")')


def test_another_tokenizers_files_do_not_stay(hub, client):
    old = {"special_tokens_map.json": b'{"eos_token": "<old>"}', "added_tokens.json": b'{"<old>": 290}'}
    hub.put("alice/mix", {**old, "vocab.json": b"{}", "notes.txt": b"mine"})
    client('model.push_to_hub("alice/mix"); processor.push_to_hub("alice/mix")')
    assert not {*old, "vocab.json"} & hub.files("alice/mix").keys()
    assert {"notes.txt", "config.json", "tokenizer.json", "processor_config.json"} <= hub.files("alice/mix").keys()
    script = "pulled = AutoProcessor.from_pretrained('alice/mix', cache_dir=fresh()).tokenizer\n"
    script += "result = [pulled.eos_token, len(pulled)] == [processor.tokenizer.eos_token, len(processor.tokenizer)]"
    assert client(script)


def test_what_was_uploaded_whole_is_not_sent_again(hub, client):
    hub.break_next("POST", "/commit/", status=503)
    with pytest.raises(ClientError):
        client('scaled(7.0).push_to_hub("alice/again", max_shard_size="100KB")')
    sent = sum(method == "PUT" for method, _, _ in hub.requests)
    client('scaled(7.0).push_to_hub("alice/again", max_shard_size="100KB")')
    assert sum(method == "PUT" for method, _, _ in hub.requests) == sent
    assert client('result = total(load("alice/again")) / total(model)') == pytest.approx(7.0)


FULL_DISK = """
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
try:
    {}
finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
"""


def test_a_full_disk_while_saving_changes_nothing(hub, client):
    client('model.push_to_hub("alice/full")')
    before = hub.files("alice/full")
    with pytest.raises(ClientError, match="(?i)too large|space"):
        client(FULL_DISK.format('scaled(9.0).push_to_hub("alice/full")'))
    assert hub.files("alice/full") == before


# --- what goes wrong: downloads -----------------------------------------------------------------------------------------


def test_a_download_goes_on_where_it_was_cut(hub, client):
    client(
        "from huggingface_hub import constants; constants.DOWNLOAD_CHUNK_SIZE = 10_000"
    )  # small enough for this model
    hub.break_next("GET", "/lfs-object/", times=2, cut_after=45_000)
    hub.requests.clear()
    assert client('result = total(load("alice/shards")) / total(model)') == pytest.approx(1.0)
    ranges = [headers["range"] for method, path, headers in hub.requests if "range" in headers]
    assert ranges == ["bytes=40000-", "bytes=80000-"]


@pytest.mark.parametrize(
    "prepare, code",
    [
        ({"cut_after": 0, "times": 50}, "load('alice/shards', cache_dir=cache)"),
        ({"status": 500, "times": 50}, "load('alice/shards', cache_dir=cache)"),
        (None, FULL_DISK.format("load('alice/shards', cache_dir=cache)")),
    ],
    ids=["cut", "server", "full disk"],
)
def test_a_download_that_fails_leaves_a_cache_that_works(hub, client, prepare, code):
    client("cache = fresh()")
    if prepare:
        hub.break_next("GET", "/lfs-object/", **prepare)
    with pytest.raises(ClientError):
        client(code)
    assert client("result = leftovers(cache)") == []
    hub.faults.clear()
    assert client('result = total(load("alice/shards", cache_dir=cache)) / total(model)') == pytest.approx(1.0)


def test_a_hub_that_is_down_is_no_trouble_for_what_is_cached(hub, client):
    client('cache = fresh(); load("alice/shards", cache_dir=cache)')
    hub.break_next("GET", ".", times=200, status=503)
    hub.break_next("HEAD", ".", times=200, status=503)
    assert client('result = total(load("alice/shards", cache_dir=cache)) / total(model)') == pytest.approx(1.0)
    with pytest.raises(ClientError) as error:
        client('load("alice/shards")')
    assert "OSError" in error.value.kinds


def test_another_content_of_the_same_size_is_found_by_a_check(hub, client):
    """Over plain HTTP the client compares sizes only; docs/sharing.md says how to compare the hashes."""
    hub.break_next("GET", "/lfs-object/", corrupt=True)
    client('cache = fresh(); load("alice/shards", cache_dir=cache)')
    code = 'result = [m["path"] for m in HfApi().verify_repo_checksums("alice/shards", cache_dir=cache).mismatches]'
    assert client(code) == ["model.safetensors"]
    client('load("alice/shards", cache_dir=cache, force_download=True)')
    assert client(code) == []


@pytest.mark.parametrize("token", ["hf_bob", False])
def test_gated_models(hub, client, token):
    client('model.push_to_hub("alice/gated")')
    hub.repos["alice/gated"].gated = True
    with pytest.raises(ClientError, match="gated") as error:
        client('load("alice/gated", token=token)', token=token)
    assert "OSError" in error.value.kinds


# --- the Trainer --------------------------------------------------------------------------------------------------------

TRAINING = """
import importlib.util
from test_training_data import write_folder
from transformers import Trainer, TrainingArguments
from mel_llm.training import TranscriptionCollator

spec = importlib.util.spec_from_file_location("train_script", script)
train_script = sys.modules["train_script"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train_script)
clips = [
    {"path": None, "array": torch.randn(8000).numpy() * 0.1, "text": "hello world", "duration": 0.5} for _ in range(4)
]
data = fresh()
write_folder(__import__("pathlib").Path(data) / "train", clips)
words = [
    "--train_data", data, "--max_steps", "2", "--save_steps", "1", "--per_device_train_batch_size", "2",
    "--report_to", "none", "--disable_tqdm", "true", "--push_to_hub",
    *([] if torch.cuda.is_available() else ["--use_cpu"]),
]
scratch = [
    "--text_config", '{"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32}',
    "--audio_config", '{"conv_channels": 4, "hidden_size": 16}',
]

def train(*more):
    run = train_script.prepare([*words, *more])
    if run is not None:
        train_script.train(run)
"""


@pytest.fixture(scope="module")
def trainer(client):
    client(TRAINING, script=str(ROOT / "scripts" / "train.py"))
    return client


def test_the_stock_trainer(hub, trainer):
    trainer("""
examples = [{"audio": clip["array"], "text": clip["text"]} for clip in clips]
arguments = TrainingArguments(
    fresh(), max_steps=2, save_steps=1, push_to_hub=True, hub_model_id="alice/stock", report_to="none",
    remove_unused_columns=False, disable_tqdm=True, use_cpu=True,
)
stock = Trainer(
    load("alice/shards"), arguments, train_dataset=examples, data_collator=TranscriptionCollator(processor),
    processing_class=processor,
)
stock.train()
stock.push_to_hub()
""")
    assert trainer('result = total(load("alice/stock")) == total(stock.model)')
    assert {"processor_config.json", "tokenizer.json", "README.md"} <= set(hub.files("alice/stock"))


def test_our_script(hub, trainer):
    where = trainer("result = out = fresh() + '/mine'")
    trainer('train("--output_dir", out, "--hub_token", "hf_alice", "--remote_code", *scratch)')
    repo = hub.repos["alice/mine"]
    assert len(repo.history("main")) >= 2, "checkpoints are pushed while it trains"
    files = hub.files("alice/mine")
    assert {"model.safetensors", "modeling_mel_llm.py", "processing_mel_llm.py", "training_summary.json"} <= set(files)
    assert not [name for name in files if name.startswith((".saving", "checkpoint")) or name.endswith(".bin")]
    with open(f"{where}/model.safetensors", "rb") as file:
        assert file.read() == files["model.safetensors"]
    # the token is in no file of any commit
    everything = [entry.content for commit in repo.commits.values() for entry in commit.files.values()]
    assert everything and not any(b"hf_alice" in content for content in everything)


def test_our_script_with_adapters_and_a_branch(hub, trainer):
    trainer('out = fresh() + "/tuned"')
    options = '"--output_dir", out, "--lora", "small", "--hub_revision", "trial", "--hub_private_repo", "true"'
    trainer(f"train({options}, *scratch)")
    assert hub.repos["alice/tuned"].private and hub.repos["alice/tuned-base"].private
    files = hub.files("alice/tuned", "trial")
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "alice/tuned-base"
    assert not [name for name in files if name.startswith("base/")]
    assert "adapter_config.json" not in hub.files("alice/tuned", "main")
    trainer("""
from peft import PeftModel
PeftModel.from_pretrained(load("alice/tuned-base"), "alice/tuned", revision="trial", cache_dir=fresh())
""")


def test_our_script_when_the_last_push_fails(hub, trainer):
    trainer('out = fresh() + "/late"')
    options = '"--output_dir", out, "--hub_strategy", "end", *scratch'
    hub.break_next("POST", "/commit/", status=503)
    with pytest.raises(ClientError, match="only pushes it") as error:
        trainer(f"train({options})")
    assert "SystemExit" in error.value.kinds
    assert "model.safetensors" not in hub.files("alice/late")
    # the same command again: there is nothing to train, so it only pushes
    assert trainer(f"result = train_script.prepare([*words, {options}]) is None")
    assert "model.safetensors" in hub.files("alice/late")


def test_our_script_says_at_once_that_it_may_not_push(hub, trainer):
    with pytest.raises(ClientError, match="may not write"):
        trainer('train("--output_dir", fresh() + "/x", "--hub_model_id", "bob/x", *scratch)')
