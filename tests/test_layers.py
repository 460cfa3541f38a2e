"""The order of the folders: none imports one that stands above it, and no two modules import each other."""

import ast
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "distill"
# From the bottom. `losses/engine` stands below `teachers`, whose targets compute their rows with it; the losses above.
ORDER = [
    ("errors", "version", "stop_signals", "curriculum", "breakdown", "batch", "sources"),
    ("vocabularies",),
    ("models",),
    ("losses.engine",),
    ("teachers",),
    ("losses",),
    ("data",),
    ("checkpoints",),
    ("training",),
    ("evaluation",),
    ("preflight",),
    ("commands",),
    ("cli",),
]
READS_FILES_ALONE = "analysis"  # imports root modules only; commands import it
AT_RUN_TIME = {"distill"}  # names that are imported when they are asked for


def modules() -> dict[str, ast.Module]:
    found = {}
    for path in SOURCE.rglob("*.py"):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        name = ".".join(["distill", *(parts[:-1] if parts[-1] == "__init__" else parts)])
        found[name] = ast.parse(path.read_text())
    return found


def imported(tree: ast.AST, known: set[str], within_functions: bool) -> set[str]:
    """Modules of ours that a module imports; those for type checkers alone left out."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "distill":
            whole = {f"{node.module}.{alias.name}" for alias in node.names} & known
            found |= whole or {str(node.module)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.partition(".")[0] == "distill"}
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        elif within_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found |= imported(node, known, within_functions)
    return found


def level(module: str) -> int:
    """Place of a module's folder in the order; the deepest name that is listed counts."""
    inner = module.removeprefix("distill.")
    places = [
        (len(name), place)
        for place, names in enumerate(ORDER)
        for name in names
        if inner == name or inner.startswith(f"{name}.")
    ]
    assert places, f"{module} has no place in ORDER"
    return max(places)[1]


def test_no_folder_imports_one_above_it():
    found = modules()
    wrong = []
    for name, tree in found.items():
        if name in AT_RUN_TIME or name.startswith(f"distill.{READS_FILES_ALONE}"):
            continue
        for other in imported(tree, set(found), within_functions=True):
            if other.startswith(f"distill.{READS_FILES_ALONE}"):
                if level(name) < level("distill.commands"):
                    wrong.append(f"{name} imports {other}")
            elif other not in AT_RUN_TIME and level(other) > level(name):
                wrong.append(f"{name} imports {other}")
    assert wrong == []


def test_analysis_imports_root_modules_alone():
    found = modules()
    for name, tree in found.items():
        if name.startswith(f"distill.{READS_FILES_ALONE}"):
            others = imported(tree, set(found), within_functions=True)
            above = {o for o in others if not o.startswith(f"distill.{READS_FILES_ALONE}") and level(o) > 0}
            assert not above, f"{name} imports {above}"


def test_no_import_goes_round_in_a_circle():
    found = modules()
    graph = {name: imported(tree, set(found), within_functions=False) & set(found) for name, tree in found.items()}
    done: set[str] = set()

    def follow(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name] - {name}):
                follow(other, (*path, name))
            done.add(name)

    for name in graph:
        follow(name, ())
