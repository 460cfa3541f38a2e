"""A logger of a user's own."""

from lightning.pytorch.loggers import Logger


class Recorder(Logger):
    """Keeps in memory what it is given, and has no directory of its own."""

    def __init__(self, version: str | None = None) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.rows: list[dict] = []  # with `at`, the step
        self._version = version

    @property
    def name(self) -> str:
        return "recorder"

    @property
    def version(self) -> str | int:
        return self._version or 3

    def log_metrics(self, metrics, step=None) -> None:
        self.names |= metrics.keys()
        self.rows.append(dict(metrics) | {"at": step})

    def log_hyperparams(self, params, *args, **kwargs) -> None:
        self.params = params
