"""The parser of the trainer's commands, whose errors are one line with the whole key, value and remedy.

jsonargparse tells in several lines what it has tried; what a user needs is read out of its words. Another version may
word them otherwise; a message is then as long as it was made.
"""

import re
from collections.abc import Callable
from typing import Any, NoReturn

import yaml
from jsonargparse import get_loader, set_loader
from lightning.pytorch.cli import LightningArgumentParser

from distill.commands.twice import refuse_twice
from distill.errors import UserError, did_you_mean

KIND = r"<class '\w+'>|typing\.Literal\[[^\]]*\]"  # a type as it is printed
REQUIRED = "the following arguments are required: "


def load_once(load: Callable[[str], Any]) -> Callable[..., Any]:
    """A loader of YAML that refuses what stands twice, where another takes the last.

    Args:
        load: jsonargparse's own, which reads numbers as users write them.
    """

    def loader(stream: str, path: str = "") -> Any:
        refuse_twice(stream, str(path or ""))
        return load(stream)

    return loader


set_loader("yaml", load_once(get_loader("yaml")), exceptions=(yaml.YAMLError,))


class OptionError(UserError):
    """A key or value that a parser does not take; the parser of the section it stands in adds the section's name."""


class Parser(LightningArgumentParser):
    """A parser whose errors are one line with the whole key, not the usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        section = re.match(r'Parser key "([\w.]+)"', str(message))
        inner = told(ex)
        if section and isinstance(inner, OptionError):
            raise OptionError(f"{section[1]}.{inner}")
        if inner:
            raise inner
        if misspelt := re.match(r"Option '([\w.]+)' is not accepted", str(message)):
            keys = [action.dest for action in self._actions if action.dest != "help"]
            raise OptionError(f"{misspelt[1]}: there is no such key; {did_you_mean(misspelt[1], keys)}")
        raise OptionError(shorten(str(message)))


def told(error: BaseException | None) -> UserError | None:
    """The UserError that an exception was raised from, which jsonargparse wraps in messages of its own."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


def shorten(message: str) -> str:
    """One line of a jsonargparse message; of an optional class what its own keys say, not what null would be.

    Example:
        >>> shorten("the following arguments are required: fit.model.teacher, fit.data.dataset")
        'model.teacher: required, like data.dataset; give it in the configuration file or on the command line'
    """
    text = " ".join(message.split())
    if text.startswith(REQUIRED):
        keys = re.sub(r"(?<= )(fit|validate|test|check)\.", "", f" {text.removeprefix(REQUIRED)}").strip().split(", ")
        like = f", like {' and '.join(keys[1:])}" if keys[1:] else ""
        return f"{keys[0]}: required{like}; give it in the configuration file or on the command line"
    union = re.search(
        r"Does not validate against any of the Union subtypes .*?Errors: - (.*?) Given value type: .*", text
    )
    if union:
        errors = [error for error in union[1].split(" - ") if "NoneType" not in error]
        given = text.rpartition("Given value: ")[2]
        # Of a value within the given one, such as a list's item, the sentence is left as it is.
        kinds = [error.removeprefix("Expected a ").removesuffix(f". Got value: {given}") for error in errors]
        if all(re.fullmatch(KIND, kind) for kind in kinds):
            said = unlike(given, kinds)
        else:
            said = ", or ".join(error for error in errors if not error.startswith("Expected a <class '"))
            said += f" (given: {given})"
        text = text[: union.start()] + said
    text = re.sub(r"Parser key \"([\w.]+)\"", r"\1", text)
    text = re.sub(r" \(given: (Namespace|NestedArg)\(.*", "", text)  # as Python prints what the user wrote as YAML
    text = re.sub(r"(has no attribute '\w+'), or Not a valid subclass of .*", r"\1; give its import path", text)
    text = re.sub(r"- Expected a path but \S+ either not accessible or invalid - ", "", text)
    named = "section; give its keys, or null"
    if "lightning.pytorch" in message:
        named = "class of that name; give its import path"
    text = re.sub(r"Expected a dot import path string: ([^\s,]+).*", rf"\1 is no {named}", text)
    return re.sub(rf"Expected a ({KIND})\. Got value: (.*)", lambda found: unlike(found[2], [found[1]]), text)


def unlike(given: str, kinds: list[str]) -> str:
    """What a value is not, of types and choices as they are printed.

    Example:
        >>> unlike("ten", ["<class 'int'>", "typing.Literal['auto']"])
        "ten is no int, nor one of 'auto'"
    """
    types = [kind[8:-2].replace("tuple", "list") for kind in kinds if kind.startswith("<")]
    choices = ", ".join(kind[15:-1] for kind in kinds if not kind.startswith("<"))
    if not types:
        return f"{given} is not one of {choices}"
    return f"{given} is no {' or '.join(types)}" + (f", nor one of {choices}" if choices else "")
