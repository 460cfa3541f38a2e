"""How good the student is: what validation and tasks measured, whatever the curriculum weighs."""

from dataclasses import replace

from distill.analysis.report.charts import Group, Section, colour_of, only, overlay, with_teacher
from distill.analysis.report.drawing import Chart, Line
from distill.analysis.report.runs import RunHistory, sets_of


def outcome(runs: list[RunHistory]) -> list[Chart]:
    """The charts beside the table: KL, agreement and perplexity, and training against validation."""
    closeness = divergence(runs)
    if closeness is not None and len(runs) == 1:
        for index, name in enumerate(sets_of(runs), start=1):
            other = divergence(runs, name)
            if other is not None and other.unit == closeness.unit:
                closeness.lines.append(replace(other.lines[0], colour=colour_of(index)))
    return only([closeness, perplexity(runs), agreement(runs), train_and_validation(runs)])


def divergence(runs: list[RunHistory], name: str = "") -> Chart | None:
    """The distance to the teacher on a validation set."""
    prefix = f"val/{name}/" if name else "val/"
    return overlay(runs, f"{prefix}kl_div_T1", "KL to the teacher", "nats per token, T = 1", from_zero=True) or overlay(
        runs, f"{prefix}bits_per_byte", "Bits per byte", "across tokenizers"
    )


def perplexity(runs: list[RunHistory], name: str = "") -> Chart | None:
    """The student's perplexity on a validation set, with the teacher's."""
    prefix = f"val/{name}/" if name else "val/"
    unit = f"on {name}" if name else "on the validation set"
    chart = overlay(runs, f"{prefix}student_perplexity", "Perplexity", unit, logarithmic=True)
    return with_teacher(runs, chart, f"{prefix}teacher_perplexity")


def agreement(runs: list[RunHistory], name: str = "") -> Chart | None:
    """Agreement of the likeliest token, and of the teacher's five likeliest where that was logged."""
    prefix = f"val/{name}/" if name else "val/"
    chart = overlay(runs, f"{prefix}top1_agreement", "Agreement", "share of tokens", from_zero=True)
    five = overlay(runs, f"{prefix}top5_agreement", "", "")
    if chart is not None and five is not None:
        for line in five.lines:
            label = f"{line.label}, top 5" if len(runs) > 1 else line.label
            chart.lines.append(replace(line, label=label, dash=1))
    return chart


def acceptance(runs: list[RunHistory], name: str = "") -> Chart | None:
    """The share of the student's drafts that the teacher would accept."""
    metric = f"val/{name}/acceptance" if name else "val/acceptance"
    return overlay(runs, metric, "Acceptance", "share of drafts", from_zero=True)


def train_and_validation(runs: list[RunHistory]) -> Chart | None:
    """Both totals on the same weighting."""
    lines = []
    for index, run in enumerate(runs):
        prefix = f"{run.name} " if len(runs) > 1 else ""
        train, validation = run.series.get("train/loss"), run.series.get("val/loss")
        if train is not None:
            lines.append(Line(f"{prefix}training", train.steps, train.values, colour_of(index), 2 if prefix else 0))
        if validation is not None:
            colour = colour_of(index) if prefix else 1
            lines.append(Line(f"{prefix}validation", validation.steps, validation.values, colour, kind="marked"))
    note = "Both totals carry the curriculum's weights of their step."
    return Chart("Training and validation loss", "weighted total", lines, note=note) if lines else None


def weight_free(runs: list[RunHistory]) -> Section:
    """The other metrics that no weight enters."""
    nll = overlay(runs, "val/student_nll", "Negative log-likelihood", "nats per token")
    entropy = overlay(runs, "val/student_entropy", "Entropy of the prediction", "nats per token")
    charts = only(
        [
            with_teacher(runs, nll, "val/teacher_nll"),
            with_teacher(runs, entropy, "val/teacher_entropy"),
            overlay(runs, "val/ece", "Calibration error", "15 equal bins", from_zero=True),
            acceptance(runs),
        ]
    )
    section = Section("metrics", "Other weight-free metrics", [Group("", charts)] if charts else [])
    if not charts:
        section.absent.append("No validation was logged.")
    return section


def validation_sets(runs: list[RunHistory]) -> Section | None:
    """The validation sets beside the first one, a row of charts for each; None where there is only one."""
    section = Section("sets", "Further validation sets")
    for name in sets_of(runs):
        charts = only(part(runs, name) for part in (divergence, perplexity, agreement, acceptance))
        if charts:
            section.groups.append(Group(name, charts))
    return section if section.groups else None


def tasks(runs: list[RunHistory]) -> Section | None:
    """Scores of tasks over the steps; None where none was logged."""
    names = dict.fromkeys(name for run in runs for name in run.series if name.startswith("tasks/"))
    charts = []
    for name in names:
        task, _, score = name.removeprefix("tasks/").rpartition("/")
        if "_stderr" not in score and not score.startswith("teacher_"):
            charts.append(with_teacher(runs, overlay(runs, name, task, score), f"tasks/{task}/teacher_{score}"))
    return Section("tasks", "Tasks", [Group("", only(charts))]) if charts else None
