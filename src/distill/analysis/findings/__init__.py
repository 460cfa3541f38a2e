"""Rules over what a run left behind: each takes a `Run` and returns its findings, none where all is well."""
