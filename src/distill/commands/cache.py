"""`distill cache`: a teacher's targets on disk, from which runs learn without the teacher.

`distill cache --config FILE --output FOLDER` builds one for the rows of a configuration, `distill cache verify FOLDER`
reads every byte of one, `distill cache info FOLDER` shows what it holds.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.errors import UserError

if TYPE_CHECKING:
    from distill.commands.fit import ProgramTrainer
    from distill.data.datamodule import DistillationDataModule
    from distill.training.cache_request import Request
    from distill.training.module import DistillationModule


def build(
    trainer: "ProgramTrainer", module: "DistillationModule", data: "DistillationDataModule", request: "Request"
) -> None:
    """Builds a cache on all ranks of a trainer, which has not run anything else.

    Raises:
        UserError: see `CacheBuilder`.
    """
    launcher = trainer.strategy.launcher
    if launcher is None:
        _on_this_rank(trainer, module, data, request)
    else:
        launcher.launch(_on_this_rank, trainer, module, data, request, trainer=trainer)


def _on_this_rank(
    trainer: "ProgramTrainer", module: "DistillationModule", data: "DistillationDataModule", request: "Request"
) -> None:
    from lightning.pytorch.utilities import rank_zero_info

    from distill.commands.evaluate import tracked
    from distill.training.build import curriculum_of
    from distill.training.cache_build import CacheBuilder

    if data.streaming:
        raise UserError(
            "data.streaming: true, but a window of a stream has no row number to be found by; set it to false"
        )
    strategy = trainer.strategy
    strategy.connect(module)
    strategy.setup_environment()
    data.trainer = trainer
    if trainer.local_rank == 0:
        data.prepare_data()
    strategy.barrier()
    data.setup("fit")
    builder = CacheBuilder(request, module.options, trainer, data, curriculum_of(trainer), rank_zero_info)
    manifest = builder.build(lambda tasks: tracked(tasks, "Caching"))
    if trainer.is_global_zero:
        print("\n".join(described(Path(request.output), manifest)), flush=True)


def described(folder: Path, manifest: Any) -> list[str]:
    """What a cache holds, in lines."""
    from distill.teachers.cache_files import summary
    from distill.teachers.cached_states import States

    teacher, states = manifest.teacher, States.described_by(manifest.states)
    lines = [
        f"{folder}: format {manifest.format}, of {teacher['source']} ({teacher['kind']}, "
        f"{teacher['parameters'] / 1e6:,.1f}M parameters in {teacher['dtype']}, {teacher['vocabulary']:,} ids)"
    ]
    if teacher["revision"]:
        lines.append(f"  revision: {teacher['revision']}")
    lines += [f"  weights: {teacher['weights']}", f"  tokenizer: {manifest.tokenizer}"]
    lines += [f"  {key}: {value}" for key, value in manifest.data.items() if value not in (None, {})]
    for part, sums in summary(manifest).items():
        options = {key: value for key, value in manifest.encodings[part].items() if key != "name"}
        told = ", ".join(f"{key} {value}" for key, value in options.items())
        lines.append(
            f"  {part}: {sums['encoding']} ({told}), {sums['rows']:,} rows, {sums['tokens']:,} targets, "
            f"{sums['bytes'] / 1e6:,.1f} MB, {sums['bytes_per_target']:.1f} B a target"
        )
        if sums["positions"]:
            lines.append(
                f"    beside them {states}: {sums['positions']:,} positions, "
                f"{sums['positions'] * states.bytes / 1e6:,.1f} MB, {states.bytes:,} B a position"
            )
    return lines


def verify(folder: str) -> str | None:
    """What is wrong with a cache, None where every byte is as its manifest says.

    Raises:
        UserError: it is unfinished, its manifest is damaged, or of a newer format.
    """
    from distill.teachers.cache_files import damage, read_manifest

    path = Path(folder).expanduser()
    return damage(path, read_manifest(path))


def main(arguments: list[str]) -> int:
    """Runs `distill cache`; its exit code is 0, or 1 where `verify` finds damage."""
    if arguments[:1] not in (["verify"], ["info"]):
        from distill.commands.fit import run

        command = ["cache", *arguments]
        run(None if sys.argv[1:] == command else command)
        return 0
    from distill.commands.arguments import Parser
    from distill.teachers.cache_files import read_manifest

    parser = Parser(prog=f"distill cache {arguments[0]}", description="Reads a cache of teacher targets.")
    parser.add_argument("folder", help="that `distill cache --output` wrote")
    folder = parser.parse(arguments[1:])["folder"]
    manifest = read_manifest(Path(folder).expanduser())
    if arguments[0] == "info":
        print("\n".join(described(Path(folder), manifest)))
        return 0
    wrong = verify(folder)
    files = len(manifest.shards) + len(manifest.files)
    size = sum(shard.bytes for shard in manifest.shards) / 1e6
    print(f"{folder}: {wrong or f'all {files} files are whole ({size:,.1f} MB of shards)'}")
    return int(wrong is not None)
