"""The command line: LightningCLI with our defaults on, and errors for people.

Nothing heavy is imported before it is needed. The price is imports inside `main`.
"""

import sys


def main() -> None:
    """Runs `distill`. Exit code 2 with one line on stderr for bad input, 1 with one where the audit stopped a run."""
    if sys.argv[1:] == ["--version"]:
        from distill import __version__

        print(f"distill {__version__}")
        return

    from distill.errors import AuditError, UserError
    from distill.program import run

    try:
        run()
    except (UserError, AuditError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)


if __name__ == "__main__":
    main()
