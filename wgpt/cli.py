"""The command line: `wgpt COMMAND`.

stdout is data, stderr is log and progress; exit codes: 0 done, 1 failed, 2 usage. A verb is a
module with `add_arguments(parser)` and `run(args) -> exit code`; COMMANDS is the table of them.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import logging
import os
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from wgpt import __version__
from wgpt.errors import ConfigError, WgptError, did_you_mean, is_out_of_memory
from wgpt.files import read_json

COMMANDS = {  # verb: (module, summary), in the order of the data flow
    "prepare": ("wgpt.prepare", "turn a folder of recordings into tokens and mel slices"),
    "merge": ("wgpt.merge", "join what several machines prepared into one data folder"),
    "train": ("wgpt.train", "train a model on prepared data"),
    "codec-train": ("wgpt.codec_train", "train a codec on recordings of your own"),
    "eval": ("wgpt.evaluate", "NLL, accuracy and perplexity of a run beside baselines"),
    "generate": ("wgpt.generate", "continue a recording, or start from silence"),
    "serve": ("wgpt.serve", "a page on this machine: continue a recording and listen"),
    "study": ("wgpt.study", "train the hybrid, its token-only twins and controls; one table"),
    "demo": ("wgpt.demo", "the whole pipeline on the sound in the package; writes a report"),
    "presets": ("wgpt.presets", "list the model presets"),
    "verify": ("wgpt.verify", "whether data, a run, a model or a codec is whole, byte by byte"),
    "doctor": ("wgpt.doctor", "what is installed, and what will run"),
}

# What other training programs call our flags.
OTHER_SPELLINGS = {
    "--gradient-checkpointing": "--activation-checkpointing",
    "--learning-rate": "--lr",
    "--max-grad-norm": "--grad-clip",
    "--num-workers": "--jobs",
    "--output": "--out",
    "--output-dir": "--out",
}

DESCRIPTION = "Train, evaluate and sample audio language models over mel slices and codec tokens."
EPILOG = """\
`wgpt COMMAND --help` lists the flags of a command. Start with `wgpt demo`, or with your own sound:

  wgpt prepare RECORDINGS --out DATA
  wgpt train --data DATA --out RUN
  wgpt eval RUN
  wgpt generate RUN --prompt x.wav --seconds 10 --out y.wav
"""


def printable(text: str) -> str:
    """The text with what a terminal would obey (a file can bear any name) as `\\x1b`, `\\udce9`."""
    return "".join(
        c if c.isprintable() or c in "\n\t" or unicodedata.category(c) == "Zs" else ascii(c)[1:-1]
        for c in text
    )


def one_line(name: object) -> str:
    """A name for stdout: a terminal gets no new line that stands in it, a program its bytes."""
    text = str(name)
    return _without_new_lines(text) if sys.stdout.isatty() else text


def _without_new_lines(text: str) -> str:
    return text.replace("\n", "\\n")


class CommandParser(argparse.ArgumentParser):
    """The parser of one verb: knows other spellings of its flags, and suggests the nearest one."""

    def parse_known_args(  # type: ignore[override]  # one signature for argparse's three
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parses after `--batch_size` became `--batch-size` and `--learning-rate` `--lr`.

        An unknown flag is reported before a missing one: the misspelt flag is often the missing.
        """
        words = list(sys.argv[1:] if args is None else args)
        end = words.index("--") if "--" in words else len(words)
        known = self._option_string_actions
        for i, word in enumerate(words[:end]):
            if not word.startswith("--"):
                continue
            flag, equals, value = word.partition("=")
            flag = flag.replace("_", "-")
            if flag not in known and OTHER_SPELLINGS.get(flag) in known:
                flag = OTHER_SPELLINGS[flag]
            if not any(name.startswith(flag) for name in known):
                self.error(f"unknown flag {flag}{did_you_mean(flag, known)}")
            words[i] = flag + equals + value
        for i, word in enumerate(words[:end]):
            flag, equals, value = word.partition("=")  # which argparse lets abbreviate
            if flag.startswith("--c") and [f for f in known if f.startswith(flag)] == ["--config"]:
                self._take_config(value if equals else "".join(words[i + 1 : end][:1]))
        return super().parse_known_args(words, namespace)

    def _take_config(self, path: str) -> None:
        """Makes what a file says the defaults, so that flags of the command line go before it."""
        actions = {action.dest: action for action in self._actions}
        actions |= {word.lstrip("-").replace("-", "_"): a for a in self._actions
                    for word in a.option_strings}  # fmt: skip
        for name, value in read_settings(path).items():
            action = actions.get(name.replace("-", "_"))
            if action is None or name in ("config", "help"):
                known = [word for a in self._actions for word in a.option_strings]
                near = did_you_mean("--" + name.replace("_", "-"), known)
                self.error(f"{path}: unknown setting {name}{near}")
            if value is None:
                continue
            if action.nargs == 0:
                if not isinstance(value, bool):
                    self.error(f"{path}: {name} must be true or false, got {value!r}")
                action.default = action.const if value else action.default
                continue
            if isinstance(value, bool) and "on,off" in str(action.metavar):  # YAML's own words
                value = "on" if value else "off"
            is_list = action.nargs in ("*", "+")
            if isinstance(value, list | dict) != is_list or isinstance(value, bool | dict):
                kind = "a list" if is_list else "one value"
                self.error(f"{path}: {name} must be {kind}, got {value!r}")
            try:
                values = [self._get_value(action, str(v)) for v in (value if is_list else [value])]
                for one in values:
                    self._check_value(action, one)
            except argparse.ArgumentError as error:
                self.error(f"{path}: {error}")
            action.default, action.required = values if is_list else values[0], False
            if not action.option_strings:  # may be absent now
                action.nargs = "*" if is_list else "?"

    def error(self, message: str) -> NoReturn:
        super().error(printable(_without_new_lines(message)))

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            near = did_you_mean(value, action.choices or ())
            raise argparse.ArgumentError(action, f"{error.message}{near}") from None


def read_settings(path: str) -> dict[str, Any]:
    """Flags by name from a YAML or JSON file, or from the config.json of a run.

    Raises ConfigError naming the file.
    """
    try:
        settings = _yaml(path) if Path(path).suffix in (".yaml", ".yml") else read_json(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: cannot be read: {error}") from None
    if not isinstance(settings, dict) or not all(isinstance(name, str) for name in settings):
        raise ConfigError(f"{path}: must hold flags by name, such as `batch_size: 8`")
    if {"preset", "model", "train", "data"} <= settings.keys():  # of a run
        if not all(isinstance(settings[name], dict) for name in ("model", "train", "data")):
            raise ConfigError(f"{path}: model, train and data of a run must be objects")
        if settings.get("changes"):
            raise ConfigError(
                f"{path}: this run was resumed with other settings (`changes`), so no single "
                "command repeats it; copy the settings you want into a file of your own"
            )
        start = {} if settings["train"].get("init") else {"preset": settings["preset"]}
        shape = {**settings["model"], **settings["train"], "data": settings["data"].get("path")}
        return {n: v for n, v in {**start, **shape}.items() if v != ""}
    return settings


def _yaml(path: str) -> Any:
    try:
        import yaml
    except ModuleNotFoundError:
        raise ConfigError(f"{path}: YAML needs pyyaml: pip install pyyaml; or use JSON") from None
    try:
        return yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: must be YAML, got {' '.join(str(error).split())}") from None


def parser_for(command: str) -> CommandParser:
    """The parser of one verb, whose module alone is imported."""
    module, summary = COMMANDS[command]
    parser = CommandParser(
        prog=f"wgpt {command}", description=f"{summary[0].upper()}{summary[1:]}."
    )
    _add_arguments(parser, module)
    return parser


def _add_arguments(parser: argparse.ArgumentParser, module: str) -> None:
    importlib.import_module(module).add_arguments(parser)
    parser.add_argument(
        "--config", metavar="FILE", help="flags by name, YAML or JSON; those given here go before"
    )


def completion(shell: str) -> str:
    """A script that completes commands, flags and their values. Needs shtab."""
    try:
        import shtab
    except ModuleNotFoundError:
        raise ConfigError("--completion needs shtab: pip install shtab") from None
    if shell not in shtab.SUPPORTED_SHELLS:
        raise ConfigError(
            f"--completion: must be one of {', '.join(shtab.SUPPORTED_SHELLS)}, got {shell!r}"
        )
    whole = argparse.ArgumentParser("wgpt")
    commands = whole.add_subparsers()
    for name, (module, summary) in COMMANDS.items():
        _add_arguments(commands.add_parser(name, help=summary), module)
    return str(shtab.complete(whole, shell))


def overview() -> str:
    """What `wgpt` and `wgpt --help` print."""
    verbs = "\n".join(f"  {name:10} {summary}" for name, (_, summary) in COMMANDS.items())
    return (
        f"usage: wgpt COMMAND ...\n\n{DESCRIPTION}\n\ncommands:\n{verbs}\n\n"
        "options:\n  --version            print the version\n  --help               print this\n"
        f"  --completion SHELL   print a script that completes in bash, zsh, ...\n\n{EPILOG}"
    )


def _run(argv: list[str]) -> int:
    """Finds the verb and runs it. Usage errors leave as SystemExit(2), as argparse has it."""
    command, rest = argv[0] if argv else "--help", argv[1:]
    if command in ("-h", "--help", "help"):
        if rest and rest[0] in COMMANDS:
            parser_for(rest[0]).print_help()
        else:
            sys.stdout.write(overview())
        return 0
    if command == "--version":
        sys.stdout.write(f"wgpt {__version__}\n")
        return 0
    if command == "--completion":
        sys.stdout.write(completion(rest[0] if rest else "") + "\n")
        return 0
    if command not in COMMANDS:
        near = did_you_mean(command, COMMANDS) or f"; the commands are {', '.join(COMMANDS)}"
        _say("wgpt", f"there is no command {command!r}{near}")
        return 2
    args = parser_for(command).parse_args(rest)
    with _names_of_files():
        return int(importlib.import_module(COMMANDS[command][0]).run(args))


class _LogFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        if isinstance(record.args, tuple):  # names, and errors that quote them, not our own words
            args = tuple(
                _without_new_lines(str(value)) if "\n" in str(value) else value
                for value in record.args
            )
            record = logging.makeLogRecord({**vars(record), "args": args})
        return printable(super().format(record))


class _Terminal:
    """A terminal that is written to by `printable`."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return int(self._stream.write(printable(text)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _names_of_files() -> Iterator[None]:
    """What stdout does with names: escapes them on a terminal, gives a program their bytes."""
    out = sys.stdout
    if out.isatty():
        terminal: Any = _Terminal(out)
        with contextlib.redirect_stdout(terminal):
            yield
        return
    if isinstance(out, io.TextIOWrapper):
        out.reconfigure(errors="surrogateescape")
    yield


def _say(who: str, what: object) -> None:
    """One line on stderr."""
    sys.stderr.write(printable(_without_new_lines(f"{who}: {what}")) + "\n")


def _to_nowhere() -> None:
    """Sends stdout to the null device: its reader left, and Python would flush it again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code. Errors of ours become one line on stderr."""
    argv = sys.argv[1:] if argv is None else argv
    who = f"wgpt {argv[0]}" if argv and argv[0] in COMMANDS else "wgpt"
    if sys.stdout is None:  # started with it closed, by `>&-` or a daemon
        sys.stdout = open(os.devnull, "w")
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")
    log = logging.StreamHandler(sys.stderr)
    log.setFormatter(_LogFormatter("%(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[log])
    for noisy in ("httpx", "huggingface_hub", "matplotlib", "aiobotocore", "botocore"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()  # here, so that a full disk or a reader who left is reported
    except KeyboardInterrupt:
        _say(who, "interrupted")
        return 1
    except BrokenPipeError:
        _to_nowhere()
        return 1
    except WgptError as error:
        _say(who, error)
        return error.exit_code
    except OSError as error:
        _to_nowhere()
        _say(who, error)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        _say(who, f"out of memory ({reason}); close other programs, or ask for less at once")
        return 1


if __name__ == "__main__":
    sys.exit(main())
