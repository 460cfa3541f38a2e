"""What a user can put right where a model or tokenizer does not load, in place of what transformers raises.

Its errors are told apart by their type, a few words of their text, and what lies in the folder.
"""

import json
from pathlib import Path

from distill.errors import UserError


def explain(error: Exception, source: str, key: str, folder: str | None = None, tokenizer: bool = False) -> None:
    """Raises a UserError in place of what `from_pretrained` raised, where a user can put it right; else returns.

    Args:
        error: what was raised.
        source: as the user named it.
        key: YAML key that the message names.
        folder: what was loaded, a folder or a hub id; None = nothing from outside.
        tokenizer: whether it was a tokenizer.

    Raises:
        UserError: names key, source, reason and remedy.
    """
    text = " ".join(str(error).split())
    local = Path(folder) if folder is not None and Path(folder).is_dir() else None
    if "custom code" in text or "trust_remote_code" in text:
        reason = "brings its own code, which is refused; read it and set trust_remote_code: true"
    elif "gated repo" in text or "401 Client Error" in text:
        reason = "is gated or private on the hub; run `hf auth login` with an account that may read it"
    elif isinstance(error, ImportError):
        reason = f"needs a package that is not installed ({text}); install it, or give another model"
    elif local is not None and (lost := missing_files(local)):
        others = f" and {len(lost) - 1} more" if lost[1:] else ""
        reason = f"lacks {lost[0]}{others}, which the index of its weights names; copy or download it again"
    elif "no file named model.safetensors" in text or "cannot be loaded with `safetensors`" in text:
        pickled = local is None or any(local.glob("*.bin"))
        reason = "has no weights, or parts of them without their index; copy or download it again"
        if pickled:
            reason = "has no safetensors weights and pickled ones are refused; set allow_pickle: true if you trust it"
    elif type(error).__name__ == "SafetensorError":
        reason = f"has truncated or damaged weights ({text}); copy or download them again"
    elif "size mismatch" in text or "ignore_mismatched_sizes" in text:
        reason = "has weights and a config.json that disagree about shapes; give files of one model"
    elif "Unrecognized configuration class" in text:
        reason = "is not a causal language model; give one that AutoModelForCausalLM loads"
    elif "does not recognize this architecture" in text or "Unrecognized model" in text:
        reason = "has no config.json, or is of a kind that this transformers does not know; give another or upgrade"
    elif tokenizer and isinstance(error, (ValueError, OSError)) and "connect" not in text:
        reason = "has no usable tokenizer files; give a source that has tokenizer.json"
    elif local is not None and isinstance(error, (OSError, json.JSONDecodeError)):
        reason = f"cannot be read ({text}); copy or download it again"
    elif isinstance(error, OSError):
        reason = "is not on the hub, or the hub is out of reach; check spelling and network, or give a local folder"
    else:
        return
    raise UserError(f"{key}: {source!r} {reason}") from error


def missing_files(folder: Path) -> list[str]:
    """Files of weights that a folder's own index names and that are not there, in order."""
    names: set[str] = set()
    for index in folder.glob("*.index.json"):
        try:
            names |= set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # a damaged one fails by itself
            continue
    return sorted(name for name in names if not (folder / name).exists())
