"""Every Python block of the README and the docs runs, in the order in which a reader meets it."""

import importlib
import re
import shutil

import pytest
import soundfile
from conftest import ROOT
from hub_server import HubServer
from test_registration import run


DOCUMENTS = sorted(path for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")])


def blocks(path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_snippets_run(path, tiny_folder, speech_clips, tmp_path):
    if not blocks(path):
        pytest.skip("has no Python block")
    shutil.copytree(tiny_folder, tmp_path / "my-mel-llm")
    soundfile.write(tmp_path / "speech.wav", speech_clips[0]["array"], 16000)
    (tmp_path / "document.py").write_text("\n".join(blocks(path)), encoding="utf-8")
    if path.name != "sharing.md":
        result = run("document.py", cwd=tmp_path)
    else:
        with HubServer() as hub:
            online = {
                "HF_HUB_OFFLINE": "0",
                "TRANSFORMERS_OFFLINE": "0",
                "HF_HUB_DISABLE_XET": "1",
                "NO_PROXY": "127.0.0.1,localhost",
            }
            result = run(
                "document.py",
                cwd=tmp_path,
                HF_ENDPOINT=hub.endpoint,
                HF_TOKEN="hf_reader",
                HF_HOME=str(tmp_path / "home"),
                **online,
            )
            assert set(hub.repos) == {"your-name/my-mel-llm", "your-name/my-release"}
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8"))
    for link in links:
        assert (path.parent / link).exists(), f"{path.name} links to {link}"


def test_commands_that_the_readme_names_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for script in ("scripts/demo.sh", "scripts/test.sh"):
        assert script in text and (ROOT / script).is_file()
    assert "bash scripts/test.sh" in text and "scripts/test.sh" in (ROOT / ".ci" / "run").read_text()
    help_text = run("-m", "mel_llm.cli", "transcribe", "--help", TERM="dumb", NO_COLOR="1", COLUMNS="120").stdout
    assert "--model" in help_text and "files" in help_text.lower()


def test_the_five_commands_of_the_readme_are_understood(monkeypatch):
    """Their arguments exist and fit together; that they do what they say, the scripts' own tests hold."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("## From Phi-4-multimodal to a table")[1]
    commands = re.findall(r"python scripts/(\w+)\.py ([^&\n]+)", text.split("```")[1].replace("\\\n", " "))
    assert [name for name, _ in commands] == ["convert_phi4mm", "train", "train", "evaluate_asr", "push"]
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    for name, words in commands:
        module = importlib.import_module(name)
        if name == "evaluate_asr":
            (arguments,) = module.HfArgumentParser(module.AsrArguments).parse_args_into_dataclasses(words.split())
            assert arguments.benchmark in module.BENCHMARKS
        else:
            module.parse_arguments(words.split())
