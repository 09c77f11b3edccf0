"""`wgpt verify`: whether data, a run, a model, a codec or its training is whole, byte by byte."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from wgpt import codec, commits
from wgpt.cli import one_line
from wgpt.codec.training.corpus import Corpus
from wgpt.data.dataset import Dataset
from wgpt.errors import ConfigError, WgptError
from wgpt.model import HybridModel
from wgpt.runs.model_record import ModelRecord
from wgpt.runs.pretrained import NAME, model_folder
from wgpt.runs.run import Run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `wgpt verify`."""
    names = ", ".join((NAME, *codec.PACKAGED))
    parser.add_argument("folder", help=f"data, run, model, codec or WORK folder, or {names}")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def findings(folder: str) -> Iterator[tuple[str, str]]:
    """(part, what is wrong with it, empty where it is whole) of a folder or a packaged name.

    Raises ConfigError for a folder of another kind.
    """
    path = Path(folder)
    if folder in codec.PACKAGED:
        yield f"codec {folder}", _problem(lambda: codec.load(folder))
    elif folder == NAME:
        yield f"model {folder}", _problem(lambda: _check_model(model_folder(folder)))
    elif (path / "manifest.json").exists():
        yield f"data {path}", _problem(lambda: Dataset(path).verify())
    elif (path / "corpus" / "corpus.json").exists():  # --work of `wgpt codec-train`
        yield f"corpus {path / 'corpus'}", _problem(lambda: Corpus(path / "corpus"))
        for step in commits.list_steps(path / "checkpoints"):
            yield f"step {step}", commits.damage(step)
    elif Run.exists(path) and not (path / "model.safetensors").exists():
        yield f"settings {path / 'config.json'}", _problem(lambda: Run.open(path))
        steps = commits.list_steps(path / "checkpoints")
        for step in steps:
            yield f"step {step}", commits.damage(step)
        if steps and not commits.damage(steps[-1]):
            yield f"rows {path / 'metrics.csv'}", _metrics_problem(path, steps[-1])
        if steps:
            yield f"model {path / 'model'}", _problem(lambda: _check_model(path / "model"))
    elif (path / "model.safetensors").exists():
        try:
            ModelRecord.read(path)
        except ConfigError:
            yield f"codec {path}", _problem(lambda: codec.load(path))
        else:
            yield f"model {path}", _problem(lambda: _check_model(path))
    else:
        raise ConfigError(f"{folder}: holds no prepared data, run, model or codec of wgpt")


def _check_model(path: Path) -> None:
    ModelRecord.read(path)
    HybridModel.from_pretrained(path)


def _metrics_problem(run: Path, newest: Path) -> str:
    """metrics.csv must begin with the rows committed; version 0.1 committed none."""
    rows, kept = run / "metrics.csv", newest / "metrics.csv"
    if kept.is_file() and not (rows.is_file() and rows.read_bytes().startswith(kept.read_bytes())):
        return f"{rows}: differs from the rows committed; --resume restores it"
    return ""


def _problem(check: Callable[[], object]) -> str:
    try:
        check()
    except WgptError as error:
        return str(error)
    return ""


def run(args: argparse.Namespace) -> int:
    """Prints a line for each part; 0 where all are whole, else 1."""
    found = list(findings(args.folder))
    if args.json:
        parts = [{"part": part, "problem": problem} for part, problem in found]
        whole = not any(problem for _, problem in found)
        sys.stdout.write(json.dumps({"whole": whole, "parts": parts}) + "\n")
    else:
        for part, problem in found:
            said = f"DAMAGED  {part}: {problem}" if problem else f"whole    {part}"
            sys.stdout.write(one_line(said) + "\n")
    return int(any(problem for _, problem in found))


if __name__ == "__main__":
    from wgpt.cli import main

    sys.exit(main(["verify", *sys.argv[1:]]))
