"""Rules over what a run left behind: each takes its `RunFiles` and returns its findings, none where all is well."""
