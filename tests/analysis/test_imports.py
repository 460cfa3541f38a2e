"""A run is judged and drawn without torch: what stands in `analysis` imports nothing heavy and nothing above it."""

import json
import subprocess
import sys

SCRIPT = """
import importlib, json, pkgutil, sys
import distill.analysis
names = [found.name for found in pkgutil.walk_packages(distill.analysis.__path__, "distill.analysis.")]
for name in names:
    importlib.import_module(name)
print(json.dumps([names, sorted(sys.modules)]))
"""
ROOT = {"distill", "distill.curriculum", "distill.errors", "distill.version"}


def test_analysis_imports_no_torch_and_of_distill_only_root_modules():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    names, modules = json.loads(done.stdout)
    assert {"distill.analysis.run_files", "distill.analysis.findings.trends", "distill.analysis.report.page"} <= {
        *names
    }
    assert [name for name in ("torch", "lightning", "transformers", "datasets") if name in modules] == []
    ours = {name for name in modules if name.split(".")[0] == "distill"}
    assert ours - {"distill.analysis", *names} <= ROOT
