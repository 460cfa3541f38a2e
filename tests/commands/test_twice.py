"""YAML that names a key twice is refused with both lines, wherever it stands; a loader would take the last."""

import pytest
import yaml

from distill.commands.arguments import Parser
from distill.commands.twice import refuse_twice
from distill.errors import UserError


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("model:\n  a: 1\ndata:\n  b: 2\nmodel:\n  c: 3\n", "model: stands twice, on lines 1 and 5; keep one of them"),
        ("a:\n  b:\n    c: 1\n    d: 2\n    c: 1\n", "a.b.c: stands twice, on lines 3 and 5; keep one of them"),
        ("a:\n- x: 1\n- y: 1\n  z: {u: 1, u: 2}\n", r"a\[1\].z.u: stands twice, on lines 4 and 4; keep one of them"),
        ('{"a": 1,\n "a": 2}', "a: stands twice, on lines 1 and 2; keep one of them"),
        ("\ufeffa: 1\na: 2\n", "a: stands twice, on lines 1 and 2"),
        ("'a': 1\n# words\na: 2\n", "a: stands twice, on lines 1 and 3"),
        ("trainer:\n  steps: 1\ndata: x\ntrainer.steps: 2\n", "trainer: stands twice, on lines 1 and 4"),
        ("trainer.steps: 1\ntrainer:\n  devices: 1\n", "trainer: stands twice, on lines 1 and 2"),
        ("m:\n  loss: {b: 1}\n  loss.c.d: 2\n", "m.loss: stands twice, on lines 2 and 3"),
    ],
)
def test_both_lines_are_named(text, told):
    with pytest.raises(UserError, match=f"^{told}"):
        refuse_twice(text)
    with pytest.raises(UserError, match=r" of run\.yaml; keep"):
        refuse_twice(text, "run.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "a: &one\n  b: 1\nc: *one\nd:\n  <<: *one\n  b: 2\n",
        "1: a\n'1': b\n",
        "a: {b: 1}\nc: {b: 1}\n",
        "- a: 1\n- a: 2\n",
        "a.b: 1\na.c: 2\nab: 3\n'0.1': 4\n0: 5\n",
        "a: [unclosed\na: 1",
        "plain words: with a colon",
        "",
    ],
)
def test_what_stands_once_is_left_alone(text):
    refuse_twice(text)


def refused(monkeypatch, capfd, *arguments: str) -> str:
    from distill.cli import main

    monkeypatch.setattr("sys.argv", ["distill", *arguments])
    capfd.readouterr()
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    return capfd.readouterr().err


@pytest.mark.parametrize("subcommand", ["fit", "validate", "check"])
def test_a_configuration(config, tmp_path, monkeypatch, capfd, subcommand):
    path = tmp_path / "twice.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=True) + "model:\n  student_layers: 1\n")
    lines = path.read_text().splitlines()
    told = f"on lines {lines.index('model:') + 1} and {len(lines) - 1} of {path.name}"
    for option in (["--config", str(path)], [f"--config={path}"]):
        err = refused(monkeypatch, capfd, subcommand, *option)
        assert err == f"error: model: stands twice, {told}; keep one of them\n"


def test_the_second_of_two_configurations(config, tmp_path, monkeypatch, capfd):
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "two.yaml").write_text("trainer:\n  max_steps: 1\n  accelerator: cpu\n  max_steps: 2\n")
    both = [part for name in ("one", "two") for part in ("--config", str(tmp_path / f"{name}.yaml"))]
    assert "trainer.max_steps: stands twice, on lines 2 and 4 of" in refused(monkeypatch, capfd, "fit", *both)


def test_values_on_the_command_line(monkeypatch, capfd):
    given = ["--model.teacher", "x", "--data.dataset", "y", "--data.chat_template_kwargs", "{a: 1, a: 2}"]
    assert "a: stands twice" in refused(monkeypatch, capfd, "fit", *given)
    parser = Parser("distill predict")
    with pytest.raises(UserError, match=r"^a: stands twice"):
        parser.parse(["--data.chat_template_kwargs", "{a: 1, a: 2}"])
