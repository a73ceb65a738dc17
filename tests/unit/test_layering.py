"""A file imports from its own group or an earlier one, and heavy libraries stay behind their fences."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent.parent / "hf_hyper"

GROUPS = [
    {"errors", "_native", "_triton", "scheme", "packing", "layout", "routing"},
    {"hyperfunctions", "rotation"},
    {"encoders", "codec", "storage", "rounding"},
    {"kernels"},
    {"nn"},
    {"config", "plan", "quantizer", "pipeline", "eval", "cli", "bench"},
]
RANK = {name: rank for rank, group in enumerate(GROUPS) for name in group}

FENCES = {
    "transformers": {"config", "quantizer", "pipeline", "eval", "cli", "bench"},
    "huggingface_hub": {"pipeline", "cli", "bench"},
    "datasets": {"eval"},
    "evaluate": {"eval"},
    "triton": {"_triton"},
    "vllm": {"serving"},
    "bitsandbytes": {"bench"},
    "sklearn": {"bench"},
    "skimage": {"bench"},
    "matplotlib": {"bench", "cli"},
}


def imports(path: Path) -> list[tuple[str, str]]:
    """Absolute module and imported name of every import in a file, function bodies included."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [(node.module or "", alias.name) for alias in node.names]
    return found


def part(path: Path) -> str:
    """Top-level part of the package that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def files() -> list[Path]:
    found = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]
    assert len(found) > 20
    return found


def test_imports_point_one_way() -> None:
    wrong = []
    for path in files():
        for module, name in imports(path):
            if module.split(".")[0] != "hf_hyper":
                continue
            target = module.split(".")[1] if "." in module else name
            if target in RANK and RANK[target] > RANK[part(path)]:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {module}.{name}")
    assert wrong == []


def test_every_part_has_a_place_in_the_layering() -> None:
    assert {part(path) for path in files()} <= set(RANK)


def test_heavy_libraries_stay_behind_their_fences() -> None:
    wrong = []
    for path in files():
        for module, _ in imports(path):
            allowed = FENCES.get(module.split(".")[0])
            if allowed is not None and part(path) not in allowed:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {module}")
    assert wrong == []


def test_no_drawer_files() -> None:
    assert [path for path in files() if path.stem in {"utils", "helpers", "misc", "common"}] == []
