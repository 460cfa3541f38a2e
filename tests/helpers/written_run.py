"""A run's folder written by hand, six steps of two components, and a reader of the page made of it."""

from html.parser import HTMLParser
from pathlib import Path

import yaml

from distill.analysis.report import runs
from distill.commands.report import report

ASSETS = Path(__file__).parents[1] / "assets" / "run"
METRICS = (ASSETS / "metrics.csv").read_text()
LOG = (ASSETS / "training.log").read_text()
CONFIG = yaml.safe_load((ASSETS / "config.yaml").read_text())


class Reader(HTMLParser):
    """Ids, links, text of table rows, and elements with their attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.cell = False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.cell = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.cell = False

    def handle_data(self, data):
        if self.cell:
            self.rows[-1][-1] += data


def write(folder: Path, metrics: str | None = METRICS, log: str | None = LOG, config: dict | None = CONFIG) -> Path:
    folder.mkdir(parents=True)
    texts = {"metrics.csv": metrics, "training.log": log, "config.yaml": None if config is None else yaml.dump(config)}
    for name, text in texts.items():
        if text is not None:
            (folder / name).write_text(text)
    return folder


def read(folder: Path) -> runs.RunHistory:
    return runs.read_runs([folder])[0]


def page(*folders: Path) -> str:
    return report(folders).read_text()
