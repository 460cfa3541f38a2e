"""The command line: LightningCLI for what runs a trainer, plain functions for the rest, and errors for people.

Nothing heavy is imported before it is needed, so that `--help` and `--version` answer at once; hence the table of names
here and the imports inside `main`.
"""

import importlib
import os
import sys

# Subcommand -> what it does. Those of the trainer are LightningCLI's; each other one is `main(arguments) -> exit code`
# of the module of its name in `distill.commands`.
TRAINER = {
    "fit": "distil, as a configuration says",
    "check": "show what a run would read, compute and need, and what looks wrong, before it is started",
    "validate": "validate a checkpoint with the weights that training had there",
    "test": "the same on the test data",
}
COMMANDS: dict[str, str] = {
    "cache": "write a teacher's targets to disk, from which runs learn without it; verify or show them",
    "diagnose": "say in plain words what a run's log and metrics show, and what to fix",
    "evaluate": "measure student, teacher and baselines on the same rows",
    "export": "write a checkpoint's student as a transformers folder",
    "predict": "what teacher and student say to the same prompts, side by side",
    "report": "write one HTML file about a run, or about several",
}


def main() -> None:
    """Runs `distill`.

    Exit codes: 0; 1 where a run was stopped by the audit or by the system, or a command has findings, 2 for bad input,
    each with one line on stderr.
    """
    arguments = sys.argv[1:]
    if arguments == ["--version"]:
        from distill.version import __version__

        print(f"distill {__version__}")
        return
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        sys.exit(0 if arguments else 2)

    from distill.errors import RunError, UserError, did_you_mean

    try:
        name, known = arguments[0], TRAINER | COMMANDS
        if not name.startswith("-") and name not in known:
            raise UserError(f"{name}: there is no such command; {did_you_mean(name, known)}")
        if name in COMMANDS:
            command = importlib.import_module(f"distill.commands.{name}")
            sys.exit(command.main(arguments[1:]))
        from distill.commands.fit import run

        run()
    except (UserError, RunError) as error:
        print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        where = error.filename or name
        print(f"error: {where}: {error.strerror or error}; put that right and try again", file=sys.stderr)
        sys.exit(1)


def usage() -> str:
    """The top-level help, without importing what would make it slow."""
    rows = "\n".join(f"  {name:<10} {text}" for name, text in (TRAINER | COMMANDS).items())
    return f"usage: distill COMMAND ...\n\n{rows}\n\ndistill COMMAND --help explains a command's keys."


if __name__ == "__main__":
    main()
