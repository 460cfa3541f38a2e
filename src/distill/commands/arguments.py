"""Arguments that commands share; a mistake is one line, and nothing heavy is imported to answer `--help`."""

import argparse
from typing import Any, NoReturn

from distill.commands.twice import refuse_twice
from distill.errors import UserError


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, not the whole usage, and which takes no misspelt argument for another."""

    def __init__(self, prog: str, **kwargs: Any) -> None:
        super().__init__(prog, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")

    def parse(self, arguments: list[str]) -> dict[str, Any]:
        """The arguments by name, `--data.KEY VALUE` gathered as a dict under `data`.

        Raises:
            UserError: an unknown or incomplete argument.
        """
        data: dict[str, Any] = {}
        others, rest = [], list(arguments)
        while rest:  # before argparse, which would take the value for a positional argument
            if not (argument := rest.pop(0)).startswith("--data."):
                others.append(argument)
                continue
            key, sign, value = argument.partition("=")
            if not sign and not rest:
                self.error(f"{key}: no value")
            data[key.removeprefix("--data.")] = _value(value if sign else rest.pop(0))
        known, unknown = self.parse_known_args(others)
        if unknown:
            self.error(f"{unknown[0].partition('=')[0]}: there is no such argument")
        return vars(known) | ({"data": data} if data else {})


def _value(text: str) -> Any:
    import yaml

    refuse_twice(text)
    return yaml.safe_load(text)


def add_pair_arguments(parser: argparse.ArgumentParser) -> None:
    """Student, teacher, data, precision and device, for commands that run both models."""
    parser.add_argument("student", help="checkpoint of a run, model folder, hub id, GGUF file or package://name/file")
    parser.add_argument("--teacher", help="a model; by default that of the checkpoint's run")
    parser.add_argument("--text", help="use all rows of this data set; by default the run's validation rows")
    parser.add_argument("--precision", help="of Lightning, such as bf16-mixed; by default the run's")
    parser.add_argument("--accelerator", default="auto", help="of Lightning; auto by default")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the models")
    parser.add_argument("--allow_pickle", action="store_true", help="load weights that are not safetensors")
    parser.epilog = "--data.KEY VALUE replaces a key of the run's data section, such as --data.sequence_length 512."
