"""`distill check` across tokenizers: coverage, classes, what is left out, and the warning where that is much."""

import re

import pytest

from helpers.two_tokenizers import pair_config, write_pair


@pytest.fixture
def config(tmp_path, monkeypatch) -> dict:
    monkeypatch.chdir(tmp_path)
    write_pair(tmp_path)
    return pair_config(tmp_path)


def checked(distill, config, capsys, *flags) -> str:
    with pytest.raises(SystemExit):  # random weights look bad
        distill("check", config, *flags)
    return capsys.readouterr().out


def test_the_table_counts_what_the_teacher_says(distill, config, capsys):
    shown = checked(distill, config, capsys)
    assert re.search(r"tokens with a target *│ *9[89]\.\d%", shown)
    assert re.search(r"within a token of the teacher *│ *[12]\d\.\d%", shown)
    assert re.search(r"left to next tokens *│ *0 of [01] ", shown)
    assert re.search(r"largest class of the student's ids *│ *1 ", shown)
    assert re.search(r"mass that leads nowhere *│ *0\.\d{4} ", shown)
    assert "model.vocabulary" not in shown
    for side, ids in (("teacher", 420), ("student", 330)):
        assert re.search(rf"│ tokenizer *│ {ids} .*\n│ {side} *│ {ids} ", shown)


def test_little_coverage_is_suspicious(distill, config, capsys, tmp_path):
    lines = ["plain words that both sides spell", *(f"<eos> in a text is a special token, {n}" for n in range(9))]
    (tmp_path / "lines.jsonl").write_text("\n".join(f'{{"text": "{line}"}}' for line in lines * 20))
    config["data"]["dataset"] = str(tmp_path / "lines.jsonl")
    shown = checked(distill, config, capsys)
    assert re.search(r"Suspicious: model.vocabulary: the teacher says something of [\d.]+% of the student's tok", shown)


def test_a_cache_is_compared_with_its_teacher(distill, config, capsys):
    distill("cache", config, "--output", "kept", "--max_rows", "200")
    config["model"]["teacher"] = "kept"
    config["data"]["max_sequences"] = 100
    shown = checked(distill, config, capsys)
    assert re.search(r"largest difference of a log-probability \d\S* nats", shown)
    assert "differs from its teacher" not in shown
