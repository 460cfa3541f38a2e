"""Continuations are those of plain greedy decoding, for both models, from prompts and from rows."""

import io
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distill.commands import predict as command
from distill.commands.pair import load_pair, run_teacher, validation_data
from distill.commands.predict import predict
from distill.errors import UserError
from helpers.finished_run import finished_run

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}model:{% endif %}"
)


@pytest.fixture(scope="module")
def run(assets, tmp_path_factory):
    return finished_run(assets, tmp_path_factory.mktemp("run"))[0]


@torch.no_grad()
def greedy(model, ids: list[int], count: int) -> list[int]:
    """One argmax after the other, without a cache."""
    out = list(ids)
    while len(out) < len(ids) + count:
        out.append(model(torch.tensor([out])).logits[0, -1].argmax().item())
        if out[-1] == model.generation_config.eos_token_id:
            break
    return out[len(ids) :]


def test_prompts_are_continued_greedily_by_both(run):
    pair = load_pair(run)
    said = list(predict(run, ["for name in", "import"], max_new_tokens=6))
    assert [one.prompt for one in said] == ["for name in", "import"]
    for one in said:
        ids = pair.tokenizers.teacher(one.prompt)["input_ids"]
        for text, model in ((one.teacher, pair.teacher.model), (one.student, pair.student.model)):
            assert text == pair.tokenizers.teacher.decode(greedy(model, ids, 6), skip_special_tokens=True)
        assert one.text == ""


def test_rows_come_with_what_follows_in_the_data(run):
    pair = load_pair(run)
    rows = validation_data(pair).validation_rows
    said = list(predict(run, rows=2, prompt_tokens=10, max_new_tokens=5))
    assert len(said) == 2
    for index, one in enumerate(said):
        ids = rows[index]["input_ids"].tolist()
        assert one.prompt == pair.tokenizers.teacher.decode(ids[:10])
        assert one.text == pair.tokenizers.teacher.decode(ids[10:15])
        expected = greedy(pair.student.model, ids[:10], 5)
        assert one.student == pair.tokenizers.teacher.decode(expected, skip_special_tokens=True)


def test_chat_template_where_there_is_one(run, assets, monkeypatch):
    from distill.models import load as models

    def with_template(source, **options):
        tokenizer = load(source, **options)
        tokenizer.chat_template = TEMPLATE
        return tokenizer

    with pytest.raises(UserError, match=r"--chat: the tokenizer of .* has no chat template"):
        predict(run, ["hello"], chat=True)
    load = models.load_tokenizer
    plain = next(iter(predict(run, ["user: hello\nmodel:"], max_new_tokens=5)))
    monkeypatch.setattr(models, "load_tokenizer", with_template)
    chat = next(iter(predict(run, ["hello"], max_new_tokens=5)))
    bare = next(iter(predict(run, ["user: hello\nmodel:"], max_new_tokens=5, chat=False)))
    assert (chat.prompt, chat.teacher, chat.student) == ("hello", plain.teacher, plain.student)
    assert (bare.teacher, bare.student) == (plain.teacher, plain.student)


def test_both_models_decode_by_the_same_rules_with_the_template_of_the_training(run, assets, monkeypatch):
    """What a model's own generation_config says besides stopping is not used; the run's template options are."""
    from distill.models import load as models

    def peculiar(source, **options):
        model = load_model(source, **options)
        model.generation_config.repetition_penalty, model.generation_config.top_k = 50.0, 1
        return model

    def with_template(source, **options):
        tokenizer = load_tokenizer(source, **options)
        tokenizer.chat_template = TEMPLATE + "{{ ending }}"
        return tokenizer

    load_model, load_tokenizer = models.load_model, models.load_tokenizer
    plain = next(iter(predict(run, ["user: hello\nmodel: !"], max_new_tokens=8)))
    monkeypatch.setattr(models, "load_model", peculiar)
    monkeypatch.setattr(models, "load_tokenizer", with_template)
    options = {"data": {"chat_template_kwargs": {"ending": " !"}}}
    assert next(iter(predict(run, ["hello"], max_new_tokens=8, **options))).teacher == plain.teacher


def test_draws_repeat_with_their_seed(run):
    def draw(seed):
        return [one.student for one in predict(run, ["for"], temperature=1.0, max_new_tokens=8, seed=seed)]

    assert draw(1) == draw(1)
    assert len({draw(seed)[0] for seed in range(4)}) > 1


def test_command(run, tmp_path, capsys, monkeypatch):
    file = tmp_path / "prompts.txt"
    file.write_text("\ufefffor name in\n\nimport\n", encoding="utf-8")  # a byte order mark is no text
    arguments = ["--max_new_tokens", "4", "--json"]
    assert command.main([run, "--prompt", "def", "--prompt_file", str(file), *arguments]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines] == ["def", "for name in", "import"]
    assert set(lines[0]) == {"prompt", "teacher", "student", "text"}
    monkeypatch.setattr("sys.stdin", io.StringIO("import\n"))
    assert command.main([run, "--prompt_file", "-", *arguments]) == 0
    assert json.loads(capsys.readouterr().out) == lines[2]
    assert command.main([run, "--rows", "1", "--max_new_tokens", "4"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("the text itself", "teacher", "student"))


def test_the_teacher_of_a_run_is_the_folder_that_it_was(tmp_path):
    """Wherever it is asked for: a relative name may be another model's there, or nobody's."""
    folders = {"folders": {"model.teacher": str(tmp_path)}}
    student: Any = SimpleNamespace(checkpoint=folders)
    assert run_teacher(student, "teacher") == str(tmp_path)
    folders["folders"]["model.teacher"] = str(tmp_path / "gone")
    assert run_teacher(student, "teacher") == "teacher"
    student.checkpoint = {}
    assert run_teacher(student, "a/hub-id") == "a/hub-id"


def test_refusals(run, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.touch()
    (old := tmp_path / "latin-1.txt").write_bytes("naïve\n".encode("latin-1"))
    for arguments, message in (
        (["--rows", "0"], "--rows: 0; give 1 or more"),
        (["--temperature", "-1"], "--temperature: -1.0 is below 0"),
        (["--prompt_file", "none.txt"], "--prompt_file: none.txt does not exist"),
        (["--prompt_file", str(empty)], "has no prompts; write one a line"),
        (["--prompt_file", str(old)], r"latin-1.txt is no UTF-8 text \('utf-8' codec .*\); save it as UTF-8"),
    ):
        with pytest.raises(UserError, match=message):
            command.main([run, *arguments])
