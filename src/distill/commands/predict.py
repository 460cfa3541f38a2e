"""`distill predict`: what teacher and student say to the same prompts, side by side.

Greedy unless a temperature is given, so that a difference between the two is one of the models and not of chance.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.errors import UserError

if TYPE_CHECKING:
    from distill.commands.pair import Pair


Ids = dict[str, list[int]]  # teacher and student -> a prompt's


@dataclass(frozen=True)
class Continuation:
    """A prompt and what follows.

    Args:
        prompt: as given, before the chat template.
        teacher: its continuation.
        student: its continuation.
        text: what follows in the data, empty for prompts of one's own.
    """

    prompt: str
    teacher: str
    student: str
    text: str = ""


def predict(
    student: str,
    prompts: Sequence[str] = (),
    *,
    teacher: str | None = None,
    text: str | None = None,
    rows: int = 3,
    prompt_tokens: int = 32,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool | None = None,
    data: dict[str, Any] | None = None,
    precision: str | None = None,
    accelerator: str = "auto",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> Iterable[Continuation]:
    """Continuations of prompts by both models, one after the other as they are made.

    Args:
        student: checkpoint, folder, hub id, GGUF file or `package://name/file`.
        prompts: of one's own; without any, the beginnings of the first validation rows.
        teacher: a model; by default that of the checkpoint's run.
        text: take rows from this source, as `data.dataset` takes it; by default the run's validation rows.
        rows: how many of them.
        prompt_tokens: of a row that make the prompt.
        max_new_tokens: of a continuation.
        temperature: 0 = greedy.
        seed: of the draws; both models draw with the same.
        chat: put prompts into the tokenizer's chat template; None = where it has one. Rows are never put into it.
        data: keys of the data section that replace the run's.
        precision: Lightning's name of it; by default the run's.
        accelerator: Lightning's name of the kind of device.
        trust_remote_code: run code that comes with the models.
        allow_pickle: accept `pytorch_model.bin`.

    Raises:
        UserError: models or data that cannot be had, a chat template that is not there, numbers out of range.
    """
    for name, value in (("--rows", rows), ("--prompt_tokens", prompt_tokens), ("--max_new_tokens", max_new_tokens)):
        if value < 1:
            raise UserError(f"{name}: {value}; give 1 or more")
    if temperature < 0:
        raise UserError(f"--temperature: {temperature} is below 0; give 0 for greedy continuations")

    from distill.commands.pair import load_pair
    from distill.commands.quiet import quieten

    quieten()
    options = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
    pair = load_pair(student, teacher, precision=precision, accelerator=accelerator, **options)
    tasks = _asked(pair, prompts, chat, data) or _begun(pair, text, data, rows, prompt_tokens, max_new_tokens)
    return _continue(pair, tasks, max_new_tokens, temperature, seed)


def _tokenizers(pair: "Pair") -> dict[str, Any]:
    """What each side reads prompts with."""
    if pair.tokenizers.vocabularies is not None:
        return {"teacher": pair.tokenizers.teacher, "student": pair.tokenizers.student}
    own = pair.student.tokenizer.chat_template is not None  # the same ids, and the template of its training
    return dict.fromkeys(("teacher", "student"), pair.student.tokenizer if own else pair.tokenizers.teacher)


def _asked(
    pair: "Pair", prompts: Iterable[str], chat: bool | None, data: Mapping[str, Any] | None
) -> list[tuple[str, Ids, str]]:
    """Each prompt, its ids, in the chat template where that is wanted, and no text that goes on."""
    sides = _tokenizers(pair)
    templates = {name: tokenizer.chat_template for name, tokenizer in sides.items()}
    if chat and (lacking := [name for name, template in templates.items() if template is None]):
        source = pair.teacher_source if "teacher" in lacking else "the student"
        raise UserError(f"--chat: the tokenizer of {source!r} has no chat template; leave it out")
    options = {**pair.config.get("data", {}), **(data or {})}.get("chat_template_kwargs") or {}
    tasks: list[tuple[str, Ids, str]] = []
    for prompt in prompts:
        ids: Ids = {}
        for name, tokenizer in sides.items():
            if templates[name] is not None and chat is not False:
                said = [{"role": "user", "content": prompt}]
                asked = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=True, **options)
                ids[name] = list(asked["input_ids"])
            else:
                ids[name] = list(tokenizer(prompt)["input_ids"])
        tasks.append((prompt, ids, ""))
    return tasks


def _begun(
    pair: "Pair", text: str | None, data: Mapping[str, Any] | None, rows: int, prompt_tokens: int, new_tokens: int
) -> list[tuple[str, Ids, str]]:
    """The beginnings of validation rows as prompts, their ids, and how the text goes on; tokens are the student's."""
    from distill.commands.pair import validation_data

    tokenizers, tasks = pair.tokenizers, []
    found = validation_data(pair, text, data).validation_rows
    assert found is not None
    for index in range(min(rows, len(found))):
        row = found[index]
        ids = row["input_ids"][: row["document_lengths"][0]].tolist()  # no prompt across documents
        cut = min(prompt_tokens, max(1, len(ids) - 1))
        decoded = [tokenizers.student.decode(part) for part in (ids[:cut], ids[cut : cut + new_tokens])]
        theirs = ids[:cut] if tokenizers.vocabularies is None else list(tokenizers.teacher(decoded[0])["input_ids"])
        tasks.append((decoded[0], {"teacher": theirs, "student": ids[:cut]}, decoded[1]))
    return tasks


def _continue(
    pair: "Pair", tasks: list[tuple[str, Ids, str]], max_new_tokens: int, temperature: float, seed: int
) -> Iterable[Continuation]:
    import torch
    from transformers import GenerationConfig

    tokenizers = {"teacher": pair.tokenizers.teacher, "student": pair.tokenizers.student}
    drawn = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
    sides: dict[str, Any] = {"teacher": pair.teacher.model, "student": pair.student.model}
    stops = {name: model.generation_config.eos_token_id for name, model in sides.items()}
    for model in sides.values():  # its own penalties and cut-offs would fill what is not set below
        model.generation_config = GenerationConfig()
    for prompt, ids, text in tasks:
        said = {}
        for name, model in sides.items():
            tokenizer, stop = tokenizers[name], stops[name]  # chat models name more than the tokenizer does
            input_ids_1L = torch.tensor([ids[name]], device=pair.fabric.device)
            settings = GenerationConfig(
                max_new_tokens=max_new_tokens,
                eos_token_id=tokenizer.eos_token_id if stop is None else stop,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
                **drawn,
            )
            torch.manual_seed(seed)
            with torch.inference_mode(), pair.fabric.autocast():
                out_1L = model.generate(
                    input_ids_1L, attention_mask=torch.ones_like(input_ids_1L), generation_config=settings
                )
            said[name] = tokenizer.decode(out_1L[0, len(ids[name]) :], skip_special_tokens=True)
        yield Continuation(prompt, said["teacher"], said["student"], text)


def print_continuation(continuation: Continuation) -> None:
    """Prompt, teacher and student in columns on stdout."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(continuation.prompt), title_justify="left", expand=True, show_lines=True)
    columns = {"teacher": continuation.teacher, "student": continuation.student}
    if continuation.text:
        columns = {"the text itself": continuation.text, **columns}
    for name in columns:
        table.add_column(name, ratio=1, overflow="fold")
    table.add_row(*(Text(value if value.strip() else repr(value)) for value in columns.values()))
    Console().print(table)


def main(arguments: list[str]) -> int:
    """Runs `distill predict`; its exit code is 0."""
    from distill.commands.arguments import Parser, add_pair_arguments

    parser = Parser(prog="distill predict", description="What teacher and student say to the same prompts.")
    add_pair_arguments(parser)
    parser.add_argument("--prompt", action="append", help="repeatable; without any, the first validation rows")
    parser.add_argument("--prompt_file", help="a text file, one prompt a line, or - for stdin")
    parser.add_argument("--rows", type=int, default=3, help="validation rows to continue (3)")
    parser.add_argument("--prompt_tokens", type=int, default=32, help="tokens of a row that make the prompt (32)")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="of a continuation (64)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = greedy, the default")
    parser.add_argument("--seed", type=int, default=0, help="of the draws where the temperature is above 0")
    parser.add_argument(
        "--chat", action=argparse.BooleanOptionalAction, default=None, help="put prompts into the chat template"
    )
    parser.add_argument("--json", action="store_true", help="print JSON Lines")
    given = parser.parse(arguments)
    prompts, file, as_json = given.pop("prompt") or [], given.pop("prompt_file"), given.pop("json")
    if file is not None:
        if file != "-" and not Path(file).is_file():
            raise UserError(f"--prompt_file: {file} does not exist; correct the path")
        try:
            text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"--prompt_file: {file} is no UTF-8 text ({error}); save it as UTF-8") from error
        lines = text.removeprefix("\ufeff").splitlines()  # a byte order mark is no text
        prompts += [line for line in lines if line.strip()]
        if not prompts:
            raise UserError(f"--prompt_file: {file} has no prompts; write one a line")
    for continuation in predict(given.pop("student"), prompts, **given):
        if as_json:
            print(json.dumps(asdict(continuation), ensure_ascii=False), flush=True)
        else:
            print_continuation(continuation)
    return 0
