"""Trains a small language model on sentences: a backbone that knows how texts go before it hears any.

    python scripts/train_text_lm.py --texts recordings/train/metadata.csv --output_dir runs/text --max_steps 1000

For studies at small scale, in which "pretrained" must mean something and nothing can be downloaded
(docs/study.md); for anything else take a language model that somebody trained. `scripts/train.py --model_name_or_path
runs/text` makes a Mel-LLM of it. Everything here is ours.
"""

import argparse
import json
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, DataCollatorForLanguageModeling, Trainer, TrainingArguments, set_seed

from mel_llm import MelLLMConfig
from mel_llm.conversion.new_folder import new_folder
from mel_llm.script_errors import told_in_a_line
from mel_llm.training import count_parameters, train_tokenizer
from mel_llm.training.sources import TEXT_COLUMNS, read_rows


SUMMARY = "training_summary.json"


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--texts",
        type=Path,
        nargs="+",
        required=True,
        help="text files, a sentence on each line; or csv, tsv, json, jsonl with a column of transcripts",
    )
    parser.add_argument("--eval_texts", type=Path, nargs="+", default=[], help="the same, for the loss at the end")
    parser.add_argument("--output_dir", type=Path, required=True, help="a new folder")
    parser.add_argument("--vocab_size", type=int, default=512, help="of the tokenizer that is learnt from the texts")
    parser.add_argument("--text_config", default="{}", help="fields of a Llama config in JSON; a small one by default")
    parser.add_argument("--max_steps", type=int, default=1000)
    parser.add_argument("--batch_size", type=int, default=32, help="sentences in a step")
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--use_cpu", action="store_true", help="even where there is a GPU")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    for name in ("max_steps", "batch_size", "learning_rate"):
        if getattr(arguments, name) <= 0:
            parser.error(f"--{name} must be more than 0, got {getattr(arguments, name)}.")
    try:
        arguments.text_config = json.loads(arguments.text_config)
    except json.JSONDecodeError as error:
        parser.error(f"--text_config is not JSON: {error}.")
    if not isinstance(arguments.text_config, dict):
        parser.error("--text_config must be a JSON object.")
    return arguments


def read_texts(path: Path) -> list[str]:
    """The sentences of a file.

    Raises:
        OSError: It cannot be read.
        ValueError: It has no column of transcripts, or no sentence.
    """
    with open(path, newline="", encoding="utf-8-sig") as file:
        if path.suffix not in (".csv", ".tsv", ".json", ".jsonl"):
            texts = list(file)
        else:
            rows = list(read_rows(file, path))
            column = next((name for name in TEXT_COLUMNS if rows and name in rows[0]), None)
            if rows and column is None:
                raise ValueError(
                    f"{path}: no column is called {' or '.join(TEXT_COLUMNS)}; it has {', '.join(rows[0])}."
                )
            texts = [row.get(column) or "" for row in rows]
    texts = [" ".join(text.split()) for text in texts]
    texts = [text for text in texts if text]
    if not texts:
        raise ValueError(f"{path} has no sentence in it.")
    return texts


def train(arguments: argparse.Namespace) -> None:
    folder = arguments.output_dir
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty. Choose another --output_dir.")
    # A sentence that many clips have counts once: this is about the language
    texts = list(dict.fromkeys(text for path in arguments.texts for text in read_texts(path)))
    eval_texts = list(dict.fromkeys(text for path in arguments.eval_texts for text in read_texts(path)))
    set_seed(arguments.seed)
    tokenizer = train_tokenizer(texts, vocab_size=arguments.vocab_size)
    small = MelLLMConfig.from_preset("small", vocab_size=len(tokenizer), text_config=arguments.text_config)
    config = small.text_config
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    model = AutoModelForCausalLM.from_config(config)

    def tokenized(sentences: list[str]) -> list[dict]:
        longest = config.max_position_embeddings - 1
        ids = (tokenizer(text, add_special_tokens=False)["input_ids"][:longest] for text in sentences)
        return [{"input_ids": [*row, tokenizer.eos_token_id]} for row in ids]

    trainer = Trainer(
        model,
        TrainingArguments(
            str(folder),
            max_steps=arguments.max_steps,
            per_device_train_batch_size=arguments.batch_size,
            per_device_eval_batch_size=arguments.batch_size,
            learning_rate=arguments.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=arguments.use_cpu,
            seed=arguments.seed,
        ),
        train_dataset=tokenized(texts),
        eval_dataset=tokenized(eval_texts) if eval_texts else None,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    metrics = trainer.train().metrics
    if eval_texts:
        metrics |= trainer.evaluate()
    summary = {
        "metrics": metrics,
        "texts": len(texts),
        "parameters": {"trained": count_parameters(model)[0], "all": count_parameters(model)[1]},
    }
    with new_folder(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(f"{folder}: {summary['parameters']['all']:,} parameters, {len(texts)} sentences, {metrics}")


if __name__ == "__main__":
    with told_in_a_line("train_text_lm.py", (OSError, ValueError, TypeError)):
        train(parse_arguments(sys.argv[1:]))
