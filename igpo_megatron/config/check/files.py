"""Model folder, questions and rollouts to replay are there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from igpo_megatron.config.check.common import evaluates, model_shape
from igpo_megatron.config.schema import Config


def check_model_files(folder: Path) -> Iterator[str]:
    """The model's folder is whole."""
    if not folder.is_dir():
        yield f"model.path={folder}: no such folder; expected a Hugging Face model folder (config.json, *.safetensors, tokenizer)"
        return
    if not (folder / "config.json").is_file():
        yield f"model.path={folder}: no config.json in it; expected a Hugging Face model folder"
    elif not model_shape(folder):
        yield f"model.path={folder}: config.json is not a JSON object; fetch the model again"
    if not any(folder.glob("*.safetensors")):
        yield f"model.path={folder}: no *.safetensors in it; older checkpoints in other formats must be saved as safetensors first"
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        yield f"model.path={folder}: no tokenizer.json or tokenizer_config.json in it; put the model's tokenizer files there"


def check_training_files(config: Config) -> Iterator[str]:
    """What training and evaluation read is there."""
    if config.run.replay is not None:
        if not config.run.replay.is_file():
            yield f"run.replay={config.run.replay}: no such file; expected a rollout file (parquet) of an earlier run"
    else:
        yield from check_question_files("data.train", config.data.train)
    if evaluates(config) and not config.data.eval:
        yield "data.eval is empty, but eval.every or eval.at_ends asks for evaluations; name a parquet file, or set both to 0 and false"
    elif config.data.eval:
        yield from check_question_files("data.eval", config.data.eval)


def check_question_files(key: str, paths: Sequence[Path]) -> Iterator[str]:
    """The files of setting `key` are there."""
    if not paths:
        yield f"{key} is empty; name at least one parquet file of questions (`igpo data prepare` makes one)"
    for path in paths:
        if not path.is_file():
            yield f"{key}: {path}: no such file"
