"""Settings from a command line: flags and a file together."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser


def parse_arguments(*kinds: type, words: Sequence[str] | None = None, **defaults: Any) -> tuple[Any, ...]:
    """Dataclasses from a command line: from flags and from a YAML or JSON file together, where a flag wins.

    `--config` names the file, or it is the first word. Its keys are the names of the flags.

    Args:
        kinds: The dataclasses; every field is a flag.
        words: Default: those of the command line.
        defaults: Of some flags other ones than the fields'.

    Returns:
        An object of each class.

    Raises:
        ValueError: The file is no mapping, or has a key that is no flag.
    """
    parser, words = argument_parser(*kinds, words=words, **defaults)
    return tuple(parser.parse_args_into_dataclasses(words))


def argument_parser(
    *kinds: type, words: Sequence[str] | None = None, strict: bool = True, prog: str | None = None, **defaults: Any
) -> tuple[HfArgumentParser, list[str]]:
    """The parser of `parse_arguments`, whose defaults are the file's values, and the words that it has to read.

    Args:
        kinds, words, defaults: As there.
        strict: Whether a key of the file that is no flag is an error; otherwise it is passed over.
        prog: What the help calls the command.
    """
    words = list(sys.argv[1:] if words is None else words)
    if words and Path(words[0]).suffix in (".yaml", ".yml", ".json"):
        words.insert(0, "--config")
    for_file = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for_file.add_argument("--config")
    named, words = for_file.parse_known_args(words)
    about = "--config FILE reads flags from a YAML or JSON file; those beside it win."
    parser = HfArgumentParser(kinds, prog=prog, description=about)
    flags = {action.dest: action for action in parser._actions}
    values = defaults | (_read_file(named.config, flags, strict) if named.config else {})
    for name in values:
        flags[name].required = False
    parser.set_defaults(**values)
    return parser, words


def _read_file(file: str, flags: dict[str, argparse.Action], strict: bool) -> dict[str, Any]:
    """The flags in a YAML or JSON file."""
    values = yaml.safe_load(Path(file).read_text(encoding="utf-8"))  # YAML reads JSON, too
    if not isinstance(values, dict):
        raise ValueError(f"{file} must hold lines `name: value`, got a {type(values).__name__}.")
    unknown = sorted(map(str, values.keys() - flags.keys()))
    if strict and unknown:
        raise ValueError(f"{file} has {unknown}, and there are no such flags: --help lists them.")
    known = {name: value for name, value in values.items() if name in flags}
    off = {name: "no" for name, value in known.items() if value is False and "no" in (flags[name].choices or ())}
    return known | off  # YAML reads a plain `no` as false
