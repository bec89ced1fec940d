"""The card of a model: what it is, how it was trained, what it can do, filled from files and never from imagination.

What is not known is left out, or said to be unknown. Error rates are ratios in this package and per cent on a card, as
on the Hub.
"""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .card_results import (
    ASR,
    GOES_ON,
    TTS,
    Evaluation,
    is_hub_id,
    local_name,
    read_evaluations,
    results_table,
    scores_of,
    source_keys,
    table,
    without_local_paths,
)
from .checkpoint_files import read_weights
from .configuration_mel_llm import MelLLMConfig
from .whole_files import write_whole


CARD = "README.md"
_TEMPLATE = "model_card.md"
_SUMMARY, _STATE = "training_summary.json", "trainer_state.json"
_MARK = "<!-- Written by mel_llm.create_model_card, and anew as long as nobody edits it: {} -->"
_MARKED = re.compile(r"\n<!-- Written by mel_llm\.create_model_card[^\n]*: ([0-9a-f]{16}) -->\n*\Z")
_LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual")
_NAME_OF_LICENSE = re.compile(r"[a-z0-9]+([.-][a-z0-9]+)*")
_SEEN = "**The model was trained on these clips**: this does not tell how it does on others."
_TASK_TAGS = {"asr": ASR, "tts": TTS, "continuation": GOES_ON, "qa": GOES_ON}
_TASK_VERBS = {"asr": "read", "tts": "speak", "continuation": "go on with speech", "qa": "answer spoken questions"}
_PRECISIONS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def create_model_card(
    folder: str | os.PathLike,
    *,
    name: str | None = None,
    repo_id: str | None = None,
    description: str | None = None,
    base_model: str | None = None,
    language: str | Sequence[str] | None = None,
    license: str | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
    data: Sequence[dict] = (),
    evaluations: Sequence = (),
    samples: Sequence = (),
    tasks: Sequence[str] | None = None,
    pipeline_tag: str | None = None,
    tags: Sequence[str] = (),
    intended_use: str | None = None,
    limits: str | None = None,
    attribution: str | None = None,
    training: dict | None = None,
    config: MelLLMConfig | None = None,
    with_code: bool = False,
    overwrite: bool = False,
) -> ModelCard:
    r"""Writes `README.md` into the folder of a model or of adapters: its card for the Hub.

    The model is described from its config and the headers of its weights; the training from `training_summary.json` and
    `trainer_state.json`, as `scripts/train.py` leaves them; the results from `evaluations`. A card that this function
    wrote is written anew as long as nobody has edited it.

    Args:
        folder: Where the model lies.
        name (`str`, *optional*): Of the model; by default that of the repository or the folder.
        repo_id (`str`, *optional*): `ORG/NAME` on the Hub, for the snippets.
        description (`str`, *optional*): A first paragraph; by default what the model does.
        base_model (`str`, *optional*): Hub name of the model that it was made from; by default what the training run or
            the config says, if it is a name of the Hub.
        language (`str` or list, *optional*): ISO 639 codes, such as `"en"`, or `"multilingual"`.
        license (`str`, *optional*): As the Hub writes them, `"apache-2.0"`, `"cc-by-sa-3.0"`; `"other"` needs
            `license_name`, and `license_link` is where it can be read.
        data: What is to be said about the training data: dicts with `name` (of the folder, or of a dataset of the Hub),
            and `license`, `url`, `attribution`, `hours`, `clips`.
        evaluations: JSON files, or dicts; see [`mel_llm.card_results.read_evaluations`].
        samples: Recordings in the folder, or URLs: names, or dicts with `path` and `text`.
        tasks (list, *optional*): `"asr"`, `"tts"`, `"continuation"`, `"qa"`: what it was trained for; by default as the
            training run says.
        pipeline_tag (`str`, *optional*): What the Hub shows it as: `"automatic-speech-recognition"`, `"text-to-speech"` or
            `"audio-to-audio"`; by default the first of these that it does.
        tags: More tags.
        intended_use, limits, attribution (`str`, *optional*): More to be said, in Markdown.
        training (`dict`, *optional*): What a training run knows that is not in the folder's files yet; the same names.
        config ([`MelLLMConfig`], *optional*): Read from the folder, or the adapters' base, by default.
        with_code (`bool`, defaults to `False`): The repository will have this package's code (`scripts/push.py
            --with-code`). A folder that has it already is recognised.
        overwrite (`bool`, defaults to `False`): Also replace a card that somebody wrote or edited.

    Returns:
        `huggingface_hub.ModelCard`: What was written.

    Raises:
        FileExistsError: There is a `README.md` that this function did not write, or that was edited since.
        ValueError: There is no model, an argument is wrong, or an evaluation cannot be understood; nothing is written.
    """
    folder = Path(folder)
    target = folder / CARD
    if not folder.is_dir():
        raise ValueError(f"`folder`: there is no folder {folder}.")
    if target.is_file() and not overwrite and not is_generated(target.read_text(encoding="utf-8")):
        raise FileExistsError(f"{target} was written by somebody: pass `overwrite=True` to replace it.")
    name = name or (repo_id or local_name(str(folder.absolute()))).split("/")[-1]
    adapter = _read_json(folder / "adapter_config.json")
    if config is None:
        config = _read_config(folder, adapter)
    run = {**(training or {}), **_read_json(folder / _SUMMARY)}
    state = _read_json(folder / _STATE) or (training or {}).get("state") or {}
    tasks = list(tasks or (run.get("length") or {}).get("tasks") or [])
    if set(tasks) - set(_TASK_TAGS):
        raise ValueError(f"`tasks` must be of {', '.join(_TASK_TAGS)}, got {tasks}.")
    goes_on = not {"continuation", "qa"}.isdisjoint(tasks)
    # One that was trained further to read or to speak is taken not to have lost the other; SPECTRON's tasks teach neither
    speaks = config is not None and config.speech_config is not None and ("tts" in tasks or not goes_on)
    reads = "asr" in tasks or not (goes_on or (tasks == ["tts"] and speaks))
    rows = _data_rows(run, data)
    read = [evaluation for source in evaluations for evaluation in read_evaluations(source, name)]
    results = [_checked(evaluation, run) for evaluation in read]
    _check_names(results)
    while_training = _training_evaluations(run)
    base_model, adapter_base = _base_models(base_model, run, config, adapter)
    place = repo_id or f"./{name}"

    told = (
        (reads, ASR, "writes down what is said"),
        (speaks, TTS, "reads texts aloud"),
        (goes_on, GOES_ON, "goes on with speech"),
    )
    abilities = [tag for done, tag, _ in told if done]
    purposes = [text for done, _, text in told if done]
    if pipeline_tag is not None and pipeline_tag not in abilities:
        raise ValueError(f"`pipeline_tag` must be one of {', '.join(abilities)}, which it does, got {pipeline_tag!r}.")
    card_data = _metadata(
        {
            "language": language,
            "license": license,
            "license_name": license_name,
            "license_link": license_link,
            "library_name": "peft" if adapter else "transformers",
            "pipeline_tag": pipeline_tag or abilities[0],
            "tags": ["mel_llm", "speech", *abilities, *tags]
            # As PEFT tags adapters, whose library is PEFT itself
            + (["transformers"] if adapter else [])
            + (["lora"] if adapter.get("peft_type") == "LORA" else []),
            "base_model": adapter_base or base_model,
            "base_model_relation": ("adapter" if adapter else "finetune") if adapter_base or base_model else None,
            "datasets": list(dict.fromkeys(row["id"] for row in rows if row["id"])),
        },
        name,
        [*results, *while_training],
    )
    environment = _environment()
    text = environment.get_template(_TEMPLATE).render(
        name=name,
        description=description or f"A language model that {' and '.join(purposes)}.",
        facts=_facts(folder, config, adapter, run, base_model, tasks, reads),
        place=place,
        reads=reads,
        speaks=speaks,
        goes_on=goes_on,
        answers="qa" in tasks,
        has_code=with_code or bool(_read_json(folder / "config.json").get("auto_map")),
        is_adapter=bool(adapter),
        adapter_base=adapter_base,
        samples=_samples(folder, samples),
        training=_training_text(run, state, rows, tasks),
        results=_results_text(results, while_training),
        use=_use_text(config, reads, speaks, goes_on, rows, results, intended_use, limits, language),
        licence=_licence_text(license, license_name, license_link, base_model, rows, attribution),
        peft_version=run.get("versions", {}).get("peft") if adapter else None,
    )
    # No more than one empty line, wherever a part was left out
    body = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
    content = f"---\n{card_data.to_yaml()}\n---\n\n{body}"
    problems = metadata_problems(content)
    if problems:
        raise ValueError(f"The card would not be valid: {'; '.join(problems)}.")
    content = f"{content}\n{_MARK.format(_digest(content))}\n"
    write_whole(target, content)
    return ModelCard(content)


def is_generated(text: str) -> bool:
    """Whether a card is as [`create_model_card`] wrote it: nobody has edited it."""
    mark = _MARKED.search(text)
    return mark is not None and mark.group(1) == _digest(text[: mark.start()])


def metadata_problems(content: str) -> list[str]:
    """What the Hub would not accept in a card's metadata, one line each; as far as that can be told without it.

    The Hub's own lists of licences and tasks are its business: a misspelt licence is found only there.
    """
    if not re.match(r"---[ \t]*\r?\n.*?\n---[ \t]*(\r?\n|$)", content, re.DOTALL):
        return ["there is no metadata: the card must begin with YAML between two lines of ---"]
    try:
        data = ModelCard(content).data
    except Exception as error:  # yaml's errors, and what huggingface_hub raises for metadata that is no mapping
        return [f"the metadata cannot be read: {' '.join(str(error).split())}"]
    problems = []
    for key in ("language", "datasets", "tags", "metrics", "base_model"):
        value = data.get(key)
        values = value if isinstance(value, list) else [] if value is None else [value]
        for entry in values:
            if not isinstance(entry, str) or not entry.strip():
                problems.append(f"`{key}` must be text, got {entry!r}")  # YAML reads the language `no` as False
            elif key == "language" and not _LANGUAGE.fullmatch(entry):
                problems.append(
                    f"`language` must be an ISO 639 code in small letters or 'multilingual', got {entry!r}"
                )
            elif key in ("datasets", "base_model"):
                problems += _id_problems(key, entry)
    for key in ("library_name", "pipeline_tag", "license", "license_name", "license_link"):
        value = data.get(key)
        if value is not None and (not isinstance(value, str) or not value.strip()):
            problems.append(f"`{key}` must be text, got {value!r}")
    license = data.get("license")
    if isinstance(license, str) and not _NAME_OF_LICENSE.fullmatch(license):
        problems.append(f"`license` must be written as the Hub does, such as 'apache-2.0' or 'other', got {license!r}")
    if license == "other" and not data.get("license_name"):
        problems.append("`license: other` needs `license_name`")
    for result in data.get("eval_results") or []:
        if isinstance(result.metric_value, bool) or not isinstance(
            result.metric_value, int | float | str | list | dict
        ):
            problems.append(f"`model-index`: {result.metric_type} must have a value, got {result.metric_value!r}")
    return problems


def _id_problems(key: str, value: str) -> list[str]:
    try:
        validate_repo_id(value)
    except HFValidationError:
        return [f"`{key}` must be a name on the Hub, got {value!r}"]
    return []


# --- what the files say ---------------------------------------------------------------------------------------------


def _read_json(path: Path) -> dict:
    """A file's content; empty if there is none."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object.")
    return content


def _read_config(folder: Path, adapter: dict) -> MelLLMConfig | None:
    """The model's config, or that of the adapters' base where it lies on this machine; else `None`."""
    content = _read_json(folder / "config.json")
    if not content and adapter:
        base = Path(str(adapter.get("base_model_name_or_path") or ""))
        content = _read_json(base / "config.json") if base.is_dir() else {}
        if not content:
            return None
    if content.get("model_type") != MelLLMConfig.model_type:
        what = f"of the type {content['model_type']!r}" if "model_type" in content else "without a model"
        raise ValueError(f"`folder`: {folder} is {what}, and cards are for Mel-LLM models and their adapters.")
    return MelLLMConfig.from_dict(content)


def _base_models(given: str | None, run: dict, config, adapter: dict) -> tuple[str | None, str | None]:
    """Hub names of the model that it all began with, and of the one that adapters belong to."""
    setup = run.get("setup") or {}
    began = setup.get("model_name_or_path")
    candidates = [began, *([getattr(config.text_config, "_name_or_path", None)] if config is not None else [])]
    # A name without an organisation is told from a folder's only where the run looked
    known = [began] if began and setup.get("model_is_local") is False else []
    base = given or next(iter([*known, *filter(is_hub_id, candidates)]), None)
    adapter_base = adapter.get("base_model_name_or_path")
    return base, adapter_base if is_hub_id(adapter_base) else None


def _data_rows(run: dict, given: Sequence[dict]) -> list[dict]:
    """What is known about each source of training data: from the run's report, and what the caller adds."""
    setup = run.get("setup") or {}
    reports = (run.get("data") or {}).get("train") or {}
    sources = setup.get("train_data") or [{"place": place} for place in reports]
    rows: dict[str, dict] = {}
    keys = source_keys(source["place"] for source in sources)
    for source, key in zip(sources, keys, strict=True):
        place = source["place"]
        is_id = is_hub_id(place) if source.get("is_local") is None else not source["is_local"]
        report = reports.get(key) or {}
        details = [f"{name} {source[name]}" for name in ("config", "split", "task") if source.get(name)]
        rows[key] = {
            "id": place if is_id else None,
            "name": place if is_id else local_name(place),
            "details": details,
            "clips": report.get("num_clips"),
            "hours": report.get("hours"),
            "left_out": sum((report.get("left_out") or {}).values()),
            "streaming": bool(source.get("streaming")),
        }
    for entry in given:
        if not isinstance(entry, dict) or not entry.get("name"):
            raise ValueError(f"`data` must be dicts with at least a `name`, got {entry!r}.")
        unknown = entry.keys() - {"name", "license", "url", "attribution", "hours", "clips"}
        if unknown:
            raise ValueError(f"`data`: {entry['name']} has no field {', '.join(sorted(unknown))}.")
        matching = [row for key, row in rows.items() if entry["name"] in (key, row["name"])]
        if not matching:
            is_id = is_hub_id(entry["name"])
            new = {"id": entry["name"] if is_id else None, "name": entry["name"], "details": [], "streaming": False}
            rows[entry["name"]] = new
            matching = [new]
        for row in matching:
            row.update({key: value for key, value in entry.items() if key != "name" and value is not None})
    return list(rows.values())


def _training_evaluations(run: dict) -> list[Evaluation]:
    """What the training run measured at its end, on its evaluation data."""
    metrics, setup = run.get("metrics") or {}, run.get("setup") or {}
    reports = (run.get("data") or {}).get("eval") or {}
    scores: dict[str, dict] = {ASR: {}, TTS: {}}
    for key, value in metrics.items():
        if key.startswith("eval_") and not key.startswith(("eval_continuation_", "eval_qa_")):
            task = TTS if key.startswith("eval_tts_") else ASR
            scores[task][re.sub(r"^eval_((asr|tts)_)?", "", key)] = value
    sources = setup.get("eval_data") or [{"place": place} for place in reports]
    trained_on = {_identity(source) for source in setup.get("train_data") or []}
    num_seen = setup.get("eval_clips_trained_on")
    seen = bool(num_seen) or any(_identity(source) in trained_on for source in sources)
    is_known = num_seen is not None or seen
    tasks = (run.get("length") or {}).get("tasks")
    if tasks in (["continuation"], ["qa"]):
        return []  # a loss of several terms, for whoever trains
    if tasks == ["tts"]:
        scores = {ASR: {}, TTS: scores[ASR] | scores[TTS]}
    evaluations = []
    for task, numbers in scores.items():
        # The terms of the loss are for whoever trains; the run's log has them
        found = [score for score in scores_of(numbers) if score.metric in ("wer", "cer", "loss")]
        if found and sources:
            places = [source["place"] for source in sources]
            hub_id = len(places) == 1 and is_hub_id(places[0])
            clips = sum(report.get("num_clips") or 0 for report in reports.values())
            splits = {source.get("split") for source in sources}
            notes = []
            if task == ASR and setup.get("wer_normalizer") and "wer" in numbers:
                notes.append(f"Normaliser of texts: {setup['wer_normalizer']}.")
            asks = task == ASR and any(source.get("asks") for source in sources)
            if asks:
                notes.append("Among the references are answers to questions about the recordings: no transcripts.")
            if seen:
                notes.append(_SEEN)
            elif not is_known:
                notes.append("Whether it was trained on these clips too is not recorded.")
            evaluations.append(
                Evaluation(
                    task=task,
                    dataset=places[0] if hub_id else " and ".join(map(local_name, places)),
                    rows=[("this model", str(clips or ""), found)],
                    split=splits.pop() if len(splits) == 1 else None,
                    is_local=not hub_id,
                    notes=notes,
                    is_published=is_known and not seen and not asks,
                )
            )
    return evaluations


def _checked(evaluation: Evaluation, run: dict) -> Evaluation:
    """The evaluation; no result if it was made on what the run names as its training data."""
    for source in (run.get("setup") or {}).get("train_data") or []:
        place = local_name(source["place"]) if source.get("is_local") else source["place"]
        if (place, source.get("config"), source.get("split")) == (
            evaluation.dataset,
            evaluation.config,
            evaluation.split,
        ):
            evaluation.is_published = False
            evaluation.notes.append(_SEEN)
            break
    return evaluation


def _check_names(evaluations: Sequence[Evaluation]) -> None:
    """Refuses two folders that the card would call by one name: their numbers would be those of one set of data."""
    places: dict[tuple, str] = {}
    for evaluation in evaluations:
        place = os.path.normpath(str(evaluation.place))
        before = places.setdefault((evaluation.task, evaluation.title), place)
        if before != place:
            raise ValueError(
                f"`evaluations`: {before} and {place} would both be {evaluation.title!r} on the card: give one of them "
                "another `dataset`."
            )


def _identity(source: dict) -> tuple:
    return source["place"], source.get("config"), source.get("split")


# --- what the card says ---------------------------------------------------------------------------------------------


def _environment():
    import jinja2  # comes with torch

    source = resources.files(__package__).joinpath("templates", _TEMPLATE).read_text(encoding="utf-8")
    return jinja2.Environment(
        loader=jinja2.DictLoader({_TEMPLATE: source}),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        autoescape=False,
    )


def _digest(content: str) -> str:
    return hashlib.sha256(content.strip().encode()).hexdigest()[:16]


def _metadata(fields: dict, name: str, evaluations: Sequence[Evaluation]) -> ModelCardData:
    results, seen = [], set()
    for result in (result for evaluation in evaluations for result in evaluation.eval_results()):
        key = (result.unique_identifier, result.dataset_name, result.metric_type)
        if key not in seen:
            seen.add(key)
            results.append(result)
    metrics = list(dict.fromkeys(result.metric_type for result in results if result.metric_type in ("wer", "cer")))
    fields = {key: value for key, value in {**fields, "metrics": metrics}.items() if value}
    if isinstance(fields.get("language"), tuple):
        fields["language"] = list(fields["language"])
    relation = fields.pop("base_model_relation", None)
    extra = {"base_model_relation": relation} if relation else {}
    if results:
        extra.update(eval_results=results, model_name=name)
    return ModelCardData(**fields, **extra)


def _facts(
    folder: Path, config, adapter: dict, run: dict, base_model: str | None, tasks: list[str], reads: bool
) -> str:
    rows: list[tuple[str, str]] = []
    if base_model:
        rows.append(("made from", f"[{base_model}](https://huggingface.co/{base_model})"))
    elif "setup" in run:
        began = run["setup"].get("model_name_or_path")
        rows.append(
            ("made from", f"`{local_name(began)}`, which is not on the Hub" if began else "trained from scratch")
        )
    weights = read_weights(folder, "adapter_model" if adapter else "model")
    if weights is not None:
        precision = ", ".join(_PRECISIONS.get(name, name) for name in weights.dtypes)
        what = "parameters of the adapters and of what is saved with them" if adapter else "parameters"
        # The files also hold what is no parameter, such as the normalisation; a run may have had heads that are not in them
        known = None if adapter else (run.get("parameters") or {}).get("all")
        count = min(known or weights.parameters, weights.parameters)
        rows.append((what, f"{count:,} ({precision}; {weights.bytes / 1e6:,.1f} MB)"))
    if adapter.get("peft_type") == "LORA":
        rows.append(("LoRA", f"r {adapter.get('r')}, alpha {adapter.get('lora_alpha')}"))
    if config is not None:
        rows += _config_rows(config, tasks, reads)
    if not rows:
        return "Nothing is known of it but its adapters: the config of its base model is not at hand."
    return table(("", ""), rows)


def _config_rows(config: MelLLMConfig, tasks: list[str], reads: bool) -> list[tuple[str, str]]:
    audio, text, speech = config.audio_config, config.text_config, config.speech_config
    size = {
        "layers": getattr(text, "num_hidden_layers", None),
        "width": getattr(text, "hidden_size", None),
        "vocabulary": getattr(text, "vocab_size", None),
    }
    backbone = ", ".join(f"{key} {value:,}" for key, value in size.items() if isinstance(value, int))
    stem = f"convolution, {audio.conv_channels} channels" if audio.has_conv else "linear patches"
    encoder = "" if audio.encoder_type == "none" else f", {audio.encoder_type} encoder"
    rows = [
        ("backbone", f"{text.model_type}: {backbone}"),
        (
            "features",
            f"log-mel, {audio.num_mel_bins} bins, {audio.frame_rate:g} frames a second, of audio at "
            f"{audio.sampling_rate:,} Hz",
        ),
        (
            "audio tokens",
            f"{audio.frame_rate / audio.reduction_factor:g} a second ({audio.reduction_factor} frames each; {stem}"
            f"{encoder}; {audio.projector_type} projector)",
        ),
    ]
    longer = ["longer recordings are cut at pauses"] if reads else []
    if not {"continuation", "qa"}.isdisjoint(tasks):
        longer.append("of longer prompts the end is heard")
    if longer:
        rows.append(("longest piece", "; ".join([f"{audio.max_audio_seconds:.3g} s", *longer])))
    if speech is not None:
        rows.append(
            ("speech head", f"{speech.head_type}, {speech.reduction_factor or audio.reduction_factor} frames a step")
        )
        vocoder = (
            "none: it writes spectrograms" if config.vocoder_config is None else config.vocoder_config.vocoder_type
        )
        rows.append(("vocoder", vocoder))
    if getattr(audio, "ctc_weight", 0) > 0:
        rows.append(("CTC head", f"weight {audio.ctc_weight:g} in training"))
    if tasks:
        rows.append(("trained to", " and ".join(_TASK_VERBS[task] for task in tasks)))
    return rows


def _training_text(run: dict, state: dict, rows: list[dict], tasks: list[str]) -> str:
    parts = []
    if rows:
        lines = []
        for row in rows:
            shown = f"[{row['id']}](https://huggingface.co/datasets/{row['id']})" if row["id"] else f"`{row['name']}`"
            if row.get("url") and not row["id"]:
                shown = f"[{row['name']}]({row['url']})"
            shown = ", ".join([shown, *row["details"]])
            clips, hours = row.get("clips"), row.get("hours")
            lines.append(
                (
                    shown,
                    f"{clips:,}"
                    if clips is not None
                    else "streamed, not counted"
                    if row["streaming"]
                    else "not recorded",
                    f"{hours:.2f}" if hours is not None else "not recorded",
                    row.get("license") or "not stated",
                )
            )
        parts.append(table(("data", "clips", "hours", "licence"), lines))
    length, setup = run.get("length") or {}, run.get("setup") or {}
    facts: list[tuple[str, object]] = []
    if state.get("global_step"):
        epochs = state.get("epoch")
        facts.append(("steps", f"{state['global_step']:,}" + (f" ({epochs:.3g} epochs)" if epochs else "")))
    parameters = run.get("parameters") or {}
    if parameters.get("trained") is not None:
        facts.append(("parameters trained", f"{parameters['trained']:,} of {parameters['all']:,}"))
    if length.get("lora"):
        facts.append(("LoRA preset", length["lora"] + (", merged" if length.get("merge_lora") else "")))
    facts += [(key.replace("_", " "), without_local_paths(value)) for key, value in _hyperparameters(run)]
    facts += [
        (key.replace("_", " "), "yes" if value is True else value)
        for key, value in {**(setup.get("augmentation") or {}), **(setup.get("teacher") or {})}.items()
        if value
    ]
    facts += _losses(state)
    versions = run.get("versions") or {}
    if versions:
        facts.append(("versions", ", ".join(f"{key} {value}" for key, value in versions.items())))
    if facts:
        parts.append(table(("", ""), facts))
    return "\n\n".join(parts) or "How it was trained is not recorded in its files."


def _hyperparameters(run: dict) -> list[tuple[str, str]]:
    values = (run.get("setup") or {}).get("hyperparameters") or run.get("hyperparameters") or {}
    return [
        (key, re.sub(r"^Use (OptimizerNames\.)?(\w+)", lambda match: match.group(2).lower(), str(value)))
        for key, value in values.items()
        if not key.startswith(("eval_", "total_eval_"))
    ]


def _losses(state: dict) -> list[tuple[str, str]]:
    """The first and the last of each loss that was logged."""
    facts = []
    for name, label in (("loss", "loss"), ("asr_loss", "loss of reading"), ("tts_loss", "loss of speaking")):
        logged = [(entry.get("step"), float(entry[name])) for entry in state.get("log_history") or [] if name in entry]
        if logged:
            (first_step, first), (last_step, last) = logged[0], logged[-1]
            facts.append((label, f"{first:.3f} (step {first_step}) to {last:.3f} (step {last_step})"))
    return facts


def _results_text(results: list[Evaluation], while_training: list[Evaluation]) -> str:
    parts = []
    for evaluation in results:
        parts.append(f"### {evaluation.heading}: {evaluation.title}")
        parts.append(results_table(evaluation))
        if evaluation.command:
            parts.append(f"```bash\n{without_local_paths(evaluation.command)}\n```")
        parts += evaluation.notes
    if not results:
        parts.append("**Not measured** by an evaluation of its own.")
    for evaluation in while_training:
        parts.append(
            f"At the end of training, {'speaking' if evaluation.task == TTS else 'reading'} {evaluation.title}:"
        )
        parts.append(results_table(evaluation))
        parts += evaluation.notes
    return "\n\n".join(parts)


def _use_text(config, reads, speaks, goes_on, rows, results, intended_use, limits, language) -> str:
    parts = [intended_use] if intended_use else []
    told = ((reads, "transcribing speech"), (speaks, "speaking texts"), (goes_on, "going on with speech"))
    uses = [text for done, text in told if done]
    languages = [language] if isinstance(language, str) else list(language or [])
    known = f" in {', '.join(languages)}" if languages else ""
    if not intended_use:
        parts.append(f"For {' and '.join(uses)}{known}, of the kind that it was trained on.")
    hours = [row.get("hours") for row in rows]
    lines = []
    if hours and all(value is not None for value in hours):
        lines.append(
            f"It was trained on {sum(hours):.2f} hours of speech: what is not like that speech, it does not know."
        )
    if not results:
        lines.append("How well it does on speech that it has not heard is not measured.")
    lines.append(
        "Other languages, accents, voices, noise and far microphones are not measured unless a result says so."
    )
    if reads:
        lines.append(
            "Transcripts may have words that nobody said. Do not decide on them what matters to somebody unheard."
        )
        if config is not None:
            lines.append(
                f"It knows pieces of up to {config.audio_config.max_audio_seconds:.3g} s; `model.transcribe` cuts "
                "longer recordings at their pauses."
            )
    if speaks or goes_on:
        lines.append("Do not speak in the voice of a person who has not agreed, and say that the speech is synthetic.")
    return "\n\n".join([*parts, "\n".join(f"* {line}" for line in lines), *([limits] if limits else [])])


def _licence_text(license, license_name, license_link, base_model, rows, attribution) -> str:
    parts = []
    if license:
        shown = license_name or license
        parts.append(f"The weights: {f'[{shown}]({license_link})' if license_link else shown}.")
    else:
        parts.append("The licence of the weights is **not stated**: ask whoever published them before you use them.")
    if base_model:
        parts.append(
            f"They were made from [{base_model}](https://huggingface.co/{base_model}), whose licence holds too."
        )
    for row in rows:
        if row.get("attribution") or row.get("license"):
            words = "; ".join(str(row[key]) for key in ("license", "attribution", "url") if row.get(key))
            parts.append(f"Training data {row['name']}: {words.removesuffix('.')}.")
    # Parts of one corpus are several rows, and one licence
    return "\n\n".join([*dict.fromkeys(parts), *([attribution] if attribution else [])])


def _samples(folder: Path, samples: Sequence) -> str:
    lines = []
    for entry in samples:
        entry = {"path": os.fspath(entry)} if isinstance(entry, str | os.PathLike) else dict(entry)
        path = str(entry.get("path") or "")
        if not path.startswith(("http://", "https://")):
            if os.path.isabs(path):
                path = os.path.relpath(path, folder.absolute())
            path = Path(path).as_posix()
            if path.startswith("..") or not (folder / path).is_file():
                raise ValueError(f"`samples`: there is no file {path!r} in {folder}.")
        text = f": {entry['text']}" if entry.get("text") else ""
        lines.append(f"* [{path.rsplit('/', 1)[-1]}]({path.replace(' ', '%20')}){text}")
    return "\n".join(lines)


__all__ = ["create_model_card", "is_generated", "metadata_problems"]
