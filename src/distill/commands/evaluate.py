"""`distill evaluate`: student, teacher and baselines on the same rows, as a table or JSON.

For a checkpoint the figures equal those that `distill validate` logs; the table says what they were measured on.
"""

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from distill.errors import UserError

if TYPE_CHECKING:
    from distill.checkpoints.students import Student
    from distill.commands.pair import Pair
    from distill.data.datamodule import DistillationDataModule

# Key of a figure -> how the table calls it, and its format.
ROWS = {
    "nll": ("NLL (nats per token)", ".4f"),
    "perplexity": ("perplexity", ".4f"),
    "bits_per_byte": ("bits per byte", ".4f"),
    "accuracy": ("next token right", ".4f"),
    "ece": ("ECE (15 bins)", ".4f"),
    "entropy": ("entropy (nats)", ".4f"),
    "entropy_gap": ("entropy gap (nats)", "+.4f"),
    "kl_div_T1": ("KL at T = 1 (nats)", ".4f"),
    "top1_agreement": ("top-1 agreement", ".4f"),
    "top5_agreement": ("top-5 agreement", ".4f"),
    "acceptance": ("drafts accepted", ".4f"),
    "retention_percent": ("retention (%)", ".1f"),
    "parameters": ("parameters", ",.0f"),
    "weights_MB": ("weights (MB)", ",.1f"),
    "tokens_per_s": ("tokens per second", ",.0f"),
}
ON_EACH_SET = ("perplexity", "kl_div_T1", "top1_agreement", "acceptance", "bits_per_byte")  # rows for further sets
GAPS = {
    "nll": "NLL gap student closes (%)",
    "bits_per_byte": "bits per byte student closes (%)",
    "kl_div_T1": "KL student closes (%)",
}
ACROSS = (
    "\nTeacher and student have different tokenizers: figures per token are of each one's own, bits per byte compare, "
    "and the KL is between classes of the student's ids, over the tokens for which the teacher says something."
)
NOTES = (
    "KL, agreements and entropy gap are to the teacher. Retention is the teacher's perplexity in percent of the "
    "model's. Tokens per second are the decoder's on these batches."
)


def evaluate(
    student: str,
    *,
    teacher: str | None = None,
    text: str | None = None,
    baselines: Mapping[str, str] | None = None,
    data: Mapping[str, Any] | None = None,
    tasks: Iterable[str] = (),
    task_folder: str | None = None,
    limit: int | None = None,
    precision: str | None = None,
    accelerator: str = "auto",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> dict[str, Any]:
    """Measures student, teacher and baselines on the same rows.

    Args:
        student: checkpoint, folder, hub id, GGUF file or `package://name/file`.
        teacher: a model; by default that of the checkpoint's run.
        text: all rows of this source, as `data.dataset` takes it; by default the run's validation rows.
        baselines: name -> what `student` takes, for instance the untrained student or one trained without a teacher.
        data: keys of the data section that replace the run's.
        tasks: of lm-evaluation-harness, for every model.
        task_folder: with task files of your own.
        limit: examples per task.
        precision: Lightning's name of it; by default the run's.
        accelerator: Lightning's name of the kind of device.
        trust_remote_code: run code that comes with the models.
        allow_pickle: accept `pytorch_model.bin`.

    Returns:
        `measured_on` (student, teacher, dataset, rows, tokens, sequence_length, precision, device, and tokenizers, the
        ids of each side, where there are two), `models` (name -> figures, see `distill.evaluation.measure.figures`),
        `gap_closed_percent` (baseline -> nll, or bits_per_byte across tokenizers, and kl_div_T1: how much of its
        distance to the teacher the student covers), `sets` where `data.validation` names some (name ->
        rows, tokens and models; those above are the first one's), `tasks` (task -> model -> metric -> value),
        `peak_memory_MB` of the process, or of the device where there is one.

    Raises:
        UserError: models or data that cannot be had, ids that mean different tokens, a task that is not there.
    """
    from distill.commands.pair import load_pair
    from distill.commands.quiet import quieten
    from distill.evaluation.measure import TEACHER
    from distill.training.step_sums import peak_memory

    quieten()
    if limit is not None and limit < 1:
        raise UserError(f"--limit: {limit}; give 1 or more")
    if names := list(tasks):
        from distill.evaluation.tasks import open_tasks, run_tasks

        manager, _ = open_tasks(names, task_folder)
    options = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
    pair = load_pair(student, teacher, precision=precision, accelerator=accelerator, **options)
    students = {"student": pair.student} | _baselines(pair, baselines or {}, options)
    rows = _rows(pair, students, text, data)
    sets = _on_each_set(pair, students, rows)
    found, across = next(iter(sets.values()))["models"], pair.tokenizers.vocabularies is not None
    report: dict[str, Any] = {
        "measured_on": {"student": student, "teacher": pair.teacher_source, **_measured_on(pair, rows, text)},
        "models": found,
        "gap_closed_percent": {
            name: _closed(found[name], found["student"], found[TEACHER], across) for name in baselines or {}
        },
    }
    if "" not in sets:
        report["sets"] = sets
    if names:
        every = {TEACHER: pair.teacher.model} | {name: other.model for name, other in students.items()}
        tokenizers = {TEACHER: pair.tokenizers.teacher} | {name: other.tokenizer for name, other in students.items()}
        report["tasks"] = run_tasks(manager, every, tokenizers, names, limit, rows.per_device_batch_size)
    report["peak_memory_MB"] = peak_memory(pair.fabric.device) / 1e6
    return report


def _rows(
    pair: "Pair", students: Mapping[str, "Student"], text: str | None, data: Mapping[str, Any] | None
) -> "DistillationDataModule":
    """The rows of an evaluation, which all models can read.

    Raises:
        UserError: rows are packed and a model would not keep their documents apart.
    """
    from distill.commands.pair import validation_data
    from distill.models.load import check_packing

    rows = validation_data(pair, text, data)
    if rows.packing:
        for name, other in students.items():
            check_packing(other.model, name)
        check_packing(pair.teacher.model, "--teacher")
    return rows


def _on_each_set(
    pair: "Pair", students: Mapping[str, "Student"], rows: "DistillationDataModule"
) -> dict[str, dict[str, Any]]:
    """Name of each validation set -> its rows and tokens, and the figures of teacher and students there."""
    from distill.evaluation.measure import measure

    models = {name: other.model for name, other in students.items()}
    chunk_size = pair.config.get("model", {}).get("chunk_size")
    sets = {}
    for name, loader in by_name(rows.val_dataloader()).items():
        there, batches = rows.held_out[name], tracked(loader, f"Evaluating {name}".strip())
        figures = measure(models, pair.teacher, batches, pair.fabric, chunk_size, pair.tokenizers.vocabularies)
        sets[name] = {"rows": len(there), "tokens": int(there.units_R["tokens"].sum()), "models": figures}
    return sets


def _closed(
    baseline: Mapping[str, Any], student: Mapping[str, Any], teacher: Mapping[str, Any], across: bool
) -> dict[str, float | None]:
    """How much of a baseline's distance to the teacher the student covers, in percent.

    Args:
        baseline, student, teacher: their figures.
        across: whether tokenizers differ, so that bits per byte alone compare.
    """
    from distill.evaluation.measure import gap_closed_percent

    per = "bits_per_byte" if across else "nll"
    goals = {key: teacher[key] for key in (per,) if key in teacher} | {"kl_div_T1": 0.0}
    return {key: gap_closed_percent(baseline[key], student[key], goal) for key, goal in goals.items()}


def _baselines(pair: "Pair", sources: Mapping[str, str], options: dict[str, bool]) -> dict[str, "Student"]:
    """Name -> each further student, on the pair's device."""
    from distill.commands.pair import load_other
    from distill.models.load import check_vocabularies
    from distill.vocabularies.relation import relation

    found = {}
    for name, source in sources.items():
        if name in ("teacher", "student"):
            raise UserError(f"--baseline: {name!r} is taken; give it another name")
        found[name] = load_other(source, pair.precision, key=f"--baseline {name}", **options)
        if pair.tokenizers.vocabularies is None:
            check_vocabularies(pair.tokenizers.teacher, found[name].tokenizer, f"--baseline {name}")
        elif relation(pair.tokenizers.student, found[name].tokenizer) == "different":
            raise UserError(
                f"--baseline {name}: its tokenizer is another than the student's; evaluate it by itself, as the student"
            )
        pair.fabric.to_device(found[name].model)
    return found


def _measured_on(pair: "Pair", rows: "DistillationDataModule", text: str | None) -> dict[str, Any]:
    """Rows, precision and device of an evaluation."""
    counts = rows.validation_rows
    both = pair.tokenizers
    ids = {} if both.vocabularies is None else {"teacher": len(both.teacher), "student": len(both.student)}
    return ({"tokenizers": ids} if ids else {}) | {
        "dataset": text or rows.dataset,
        "rows": len(counts) if counts is not None else None,
        "tokens": int(counts.units_R["tokens"].sum()) if counts is not None else None,
        "sequence_length": rows.sequence_length,
        "batch_size": rows.per_device_batch_size,
        "precision": pair.precision,
        "device": str(pair.fabric.device),
    }


def by_name(loaders: Any) -> dict[str, Any]:
    """Loaders of validation sets by their names; the only set of a run without names has an empty one."""
    return loaders if isinstance(loaders, dict) else {"": loaders}


def tracked(batches: Any, title: str) -> Iterable[Any]:
    """The batches behind a progress bar on stderr, where that is a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    total = len(batches) if hasattr(batches, "__len__") else None
    return track(batches, title, total=total, console=console, transient=True, disable=not console.is_terminal)


def print_report(report: Mapping[str, Any]) -> None:
    """The report as tables on stdout."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    on, models = report["measured_on"], report["models"]
    names = list(models)
    table = Table("", *names, title="Evaluation", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for key, (title, form) in ROWS.items():
        values = [models[name].get(key) for name in names]
        if any(value is not None for value in values):
            table.add_row(title, *("" if value is None else format(value, form) for value in values))
    gaps = report["gap_closed_percent"]
    for key, title in GAPS.items():
        values = [gaps.get(name, {}).get(key) for name in names]
        if any(value is not None for value in values):
            table.add_row(title, *("" if value is None else f"{value:.1f}" for value in values))
    for name, one in list(report.get("sets", {}).items())[1:]:
        for key in ON_EACH_SET:
            title, form = ROWS[key]
            values = [one["models"][model].get(key) for model in names]
            if any(value is not None for value in values):
                table.add_row(f"{name}: {title}", *("" if value is None else format(value, form) for value in values))
    for task, by_model in report.get("tasks", {}).items():
        for metric in next(iter(by_model.values())):
            table.add_row(f"{task}: {metric}", *(f"{by_model[name][metric]:.4f}" for name in names))
    console.print(table)
    console.print(
        f"{on['student']} against {on['teacher']} on {on['dataset']}: {on['rows']} rows of at most "
        f"{on['sequence_length']} tokens, {on['tokens']:,} targets, batches of {on['batch_size']}, {on['precision']} "
        f"on {on['device']}; peak memory {report['peak_memory_MB']:,.0f} MB with all models loaded.\n{NOTES}"
        f"{ACROSS if 'tokenizers' in on else ''}",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )


def main(arguments: list[str]) -> int:
    """Runs `distill evaluate`; its exit code is 0."""
    from distill.commands.arguments import Parser, add_pair_arguments

    parser = Parser(prog="distill evaluate", description="Student, teacher and baselines on the same rows.")
    add_pair_arguments(parser)
    parser.add_argument("--baseline", action="append", metavar="NAME=MODEL", help="also measure this; repeatable")
    parser.add_argument("--tasks", help="of lm-evaluation-harness, comma-separated; needs the extra `tasks`")
    parser.add_argument("--task_folder", help="with task files of your own")
    parser.add_argument("--limit", type=int, help="examples per task")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    given = parser.parse(arguments)
    as_json = given.pop("json")
    pairs = [pair.partition("=") for pair in given.pop("baseline") or []]
    if wrong := [name for name, sign, source in pairs if not (name and sign and source)]:
        raise UserError(f"--baseline: {wrong[0]!r} is not of the form NAME=MODEL; correct it")
    tasks = [name for name in (given.pop("tasks") or "").split(",") if name]
    report = evaluate(baselines={name: source for name, _, source in pairs}, tasks=tasks, **given)
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        print_report(report)
    return 0
