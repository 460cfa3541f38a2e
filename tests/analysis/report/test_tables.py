"""The figures that people compare, and in which digits."""

import math

import pytest

from distill.analysis.report import runs, tables
from helpers.written_run import CONFIG, METRICS, Reader, page, read, write


def test_summary_has_the_last_values_and_the_lowest_kl(folder):
    rows = {row.label: row.cells[0].text for row in tables.summary([read(folder)], comparable=True)}
    assert rows["Steps"] == "6 / 6"
    assert rows["KL to the teacher"] == "1.5000"
    assert rows["lowest"] == "1.2500"
    assert rows["Top-1 agreement"] == "0.6250"
    assert rows["Student perplexity"] == "48.0000"
    assert rows["student / teacher"] == "3.0000"
    assert rows["Tokens per second"] == "200.0000"
    assert float(rows["validation / training"]) == pytest.approx(1.75 / 1.5, abs=1e-4)


def test_best_of_a_row_is_marked_only_where_runs_compare(tmp_path, folder):
    better = write(tmp_path / "better", METRICS.replace(",1.5,1.75,", ",0.5,1.75,"))
    rows = tables.summary(runs.read_runs([folder, better]), comparable=True)
    assert [cell.best for cell in rows[1].cells] == [False, True]
    other = write(tmp_path / "other", config=CONFIG | {"data": {"dataset": "b.txt", "per_device_batch_size": 8}})
    html = page(folder, other)
    assert "These runs differ in data.dataset: their figures do not compare." in html
    assert "(best)" not in html
    assert ["data.per_device_batch_size", "1", "8"] in Reader(html).rows
    assert ["model.teacher", "big", "big"] not in Reader(html).rows


@pytest.mark.parametrize(
    ("value", "text"),
    [(2.24810602, "2.2481"), (7.96e-6, "7.960e-06"), (0.0, "0.0000"), (1934567.8, "1,934,568"), (math.nan, "nan")],
)
def test_numbers_have_the_digits_of_the_log(value, text):
    assert tables.number(value) == text
