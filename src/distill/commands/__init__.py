"""Subcommands of `distill` that need no trainer: a public function each, and `main(arguments)` around it."""
