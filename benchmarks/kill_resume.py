"""Kills a run with SIGKILL at random moments and resumes it, until it ends; its parameters must be the unbroken run's.

The run is tiny and real: the `distill fit` command, with dropout, all routing losses, accumulation, a validation every
few steps, a data worker and a checkpoint after every second step. Half of the moments are drawn by the clock; the
others die within a drawn call of what the clock would seldom hit: a step, a validation, the writing of a checkpoint
(half of it on disk), its renaming. Each run is forked from this process, which has imported the libraries already: a
start of its own would cost some six seconds more for each kill, and change nothing about what is on disk.

    python benchmarks/kill_resume.py
"""

import itertools
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import torch
import yaml
from rich.console import Console
from rich.table import Table

import distill.cli
from distill.checkpoints.files import earlier_runs, find_last
from distill.training.callbacks.last_checkpoint import LastCheckpoint
from distill.training.module import DistillationModule

KILLS, STEPS, SEED = 20, 60, 0

# Where -> the number of calls among which the one that dies is drawn.
CALLS = {"step": 16, "validation": 8, "writing": 6, "renaming": 10, "after saving": 6}
CLOCK = "any time"


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def plant(where: str, at: int) -> None:
    """Makes this process die within call number `at` of what `where` says."""
    count = itertools.count(1)

    def dying(true: Callable, before: bool = False) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            now = next(count) == at
            if now and before:
                die()
            result = true(*args, **kwargs)
            if now:
                die()
            return result

        return call

    def torn(content: Any, file: Any, save: Callable = torch.save) -> None:
        if next(count) == at:
            file.write(os.urandom(50_000))
            file.flush()
            die()
        save(content, file)

    if where == "step":
        DistillationModule.training_step = dying(DistillationModule.training_step)  # type: ignore[method-assign]
    elif where == "validation":
        DistillationModule.validation_step = dying(DistillationModule.validation_step)  # type: ignore[method-assign]
    elif where == "writing":
        torch.save = torn
    elif where == "renaming":
        Path.rename = Path.replace = dying(Path.rename, before=True)  # type: ignore[method-assign,assignment]
    elif where == "after saving":
        LastCheckpoint._save = dying(LastCheckpoint._save)  # type: ignore[method-assign]


def prepare(folder: Path) -> None:
    """Writes teacher, tokenizer, text and configuration of the run into `folder`."""
    from tiny import tiny_llama
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from conftest import VOCABULARY, text_of_stdlib

    text = text_of_stdlib(20_000)
    (folder / "text.txt").write_text(text)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    tiny_llama(vocab_size=VOCABULARY, num_hidden_layers=4).save_pretrained(folder / "teacher")
    fast.save_pretrained(folder / "teacher")
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_dropout": 0.2}
    configuration = {
        "seed_everything": 1,
        "model": {
            "teacher": str(folder / "teacher"),
            "student_config": {"model_type": "llama", **sizes, **heads},
            "routing": {"teacher_layers": 2, "num_experts": 4},
            "learning_rate": 1e-3,
        },
        "data": {
            "dataset": str(folder / "text.txt"),
            "sequence_length": 32,
            "per_device_batch_size": 2,
            "max_sequences": 62,  # 31 micro-batches an epoch: the last window is short
            "max_validation_sequences": 16,
            "num_workers": 1,
        },
        "trainer": {
            "max_steps": STEPS,
            "accumulate_grad_batches": 2,
            "val_check_interval": 10,
            "accelerator": "cpu",
            "num_sanity_val_steps": 0,
        },
        "last_checkpoint": {"every_n_steps": 2},
        "progress": None,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(configuration))


def fit(folder: Path, where: str = "", at: float = 0) -> int:
    """One `distill fit --ckpt_path last` in `folder`; its exit code, -9 where it was killed.

    Args:
        folder: of this run and those that it goes on from.
        where: key of CALLS, CLOCK, or nothing, which lets it live.
        at: number of the call, or seconds.
    """
    folder.mkdir(exist_ok=True)
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        output = os.open("output.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        plant(where, int(at))
        sys.argv = ["distill", "fit", "--config", str(folder.parent / "config.yaml"), "--ckpt_path", "last"]
        code = 0
        try:
            distill.cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException:
            traceback.print_exc()
            code = 99
        sys.stdout.flush()
        os._exit(code)
    if where == CLOCK:
        time.sleep(at)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def last_step(folder: Path) -> int:
    """The step of the checkpoint that the next run goes on from."""
    path = find_last(earlier_runs(folder))
    return torch.load(path, weights_only=True)["global_step"] if path else 0


def state(folder: Path) -> dict[str, torch.Tensor]:
    """Parameters, buffers, moments and the learning rate at the end."""
    path = find_last(earlier_runs(folder))
    assert path is not None
    content = torch.load(path, weights_only=True)
    moments = {
        f"{index}.{name}": value
        for index, values in content["optimizer_states"][0]["state"].items()
        for name, value in values.items()
    }
    assert content["global_step"] == STEPS
    return content["state_dict"] | moments


def main() -> int:
    torch.set_num_threads(1)
    draw = random.Random(SEED)
    wheres = [list(CALLS)[index % len(CALLS)] for index in range(KILLS // 2)] + [CLOCK] * (KILLS - KILLS // 2)
    draw.shuffle(wheres)
    table = Table("kill", "during", "call or seconds", "went on from step", "left a checkpoint of step", "seconds")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        assert fit(folder / "unbroken") == 0, (folder / "unbroken" / "output.txt").read_text()[-2000:]
        whole_s = time.perf_counter() - started
        expected = state(folder / "unbroken")
        runs, killed, ended_early = [folder / "broken_0"], 0, 0
        while killed < KILLS and ended_early < KILLS:
            before, where, clock = last_step(runs[-1]), wheres[killed], time.perf_counter()
            at = draw.uniform(0.1, 0.6) * whole_s if where == CLOCK else draw.randint(1, CALLS[where])
            code = fit(runs[-1], where, at)
            if code == 0:  # the run ended before that moment came: compare it, and begin another one
                runs.append(folder / f"broken_{len(runs)}")
                ended_early += 1
                continue
            assert code == -9, (runs[-1] / "output.txt").read_text()[-2000:]
            killed += 1
            seconds = f"{time.perf_counter() - clock:.1f}"
            table.add_row(str(killed), where, f"{at:.3g}", str(before), str(last_step(runs[-1])), seconds)
        assert fit(runs[-1]) == 0, (runs[-1] / "output.txt").read_text()[-2000:]
        states = [state(run) for run in runs]
    same = sum(
        ours.keys() == expected.keys() and all(torch.equal(ours[k], expected[k]) for k in ours) for ours in states
    )
    Console(width=100).print(table)
    print(f"{len(runs)} broken runs of {STEPS} steps, {time.perf_counter() - started:.0f} s in all")
    verdicts = []
    for title, value, target in (("kills", killed, KILLS), ("runs_bitwise_equal", same, len(runs))):
        verdicts.append(value >= target)
        print(f"{title} {value} {target} {'ok' if verdicts[-1] else 'short'}")
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
