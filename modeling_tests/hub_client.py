"""Another Python process that does what it is told: `huggingface_hub` reads `HF_ENDPOINT` when it is imported, and a
process without this package has to be one of its own."""

import json
import os
import subprocess
import sys

from conftest import ROOT


_WORKER = """
import contextlib, io, json, os, sys, time

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.02))  # retries wait for up to half a minute
if os.environ.get("WITHOUT_MEL_LLM"):
    class Block:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "mel_llm":
                raise ModuleNotFoundError("No module named 'mel_llm'", name="mel_llm")
    sys.meta_path.insert(0, Block())
names = {}
for line in sys.stdin:
    output, error = io.StringIO(), None
    names["result"] = None
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            exec(compile(json.loads(line), "<code>", "exec"), names)
        except BaseException as caught:
            kinds = [kind.__name__ for kind in type(caught).__mro__]
            error = {"kinds": kinds, "message": str(caught)}
    print(json.dumps({"result": names["result"], "error": error, "output": output.getvalue()}), file=answers, flush=True)
"""


class ClientError(Exception):
    """What the other process raised; `kinds` are the names of its class and of its base classes."""

    def __init__(self, kinds: list[str], message: str, output: str):
        super().__init__(f"{kinds[0]}: {message}")
        self.kinds, self.message, self.output = kinds, message, output


class Client:
    """Calling it runs code in the process and returns what the code leaves in `result`; names stay from call to call.

    Args:
        home: Where its caches go.
        endpoint: The Hub; without one it is offline.
        token: Who it is there.
        package: Whether `mel_llm` can be imported.
    """

    def __init__(self, home, endpoint: str | None = None, token: str | None = None, package: bool = True):
        source = str(ROOT / "src")
        paths = [path for path in sys.path if path and os.path.abspath(path) != source]
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))
        }
        environment.update(
            HF_HOME=str(home),
            HF_HUB_DISABLE_XET="1",
            HF_HUB_DISABLE_TELEMETRY="1",
            HF_HUB_DISABLE_PROGRESS_BARS="1",
            NO_PROXY="127.0.0.1,localhost",
            PYTHONPATH=os.pathsep.join([source, *paths] if package else paths),
        )
        environment.update({"HF_ENDPOINT": endpoint} if endpoint else {"HF_HUB_OFFLINE": "1"})
        if token:
            environment["HF_TOKEN"] = token
        if not package:
            environment["WITHOUT_MEL_LLM"] = "1"
        self.output = ""
        self._process = subprocess.Popen(
            [sys.executable, "-c", _WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            cwd=home,
            text=True,
        )

    def __call__(self, code: str, **values):
        code = "".join(f"{name} = {value!r}\n" for name, value in values.items()) + code
        print(json.dumps(code), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        assert line, f"the process died with {self._process.wait(timeout=10)}"
        answer = json.loads(line)
        self.output = answer["output"]
        if answer["error"] is not None:
            raise ClientError(answer["error"]["kinds"], answer["error"]["message"], answer["output"])
        return answer["result"]

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *exc) -> None:
        self._process.stdin.close()
        self._process.terminate()
        self._process.wait(timeout=30)
