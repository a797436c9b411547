"""The house: which module may import which, what `import avp` loads, how long files and functions may be."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import avp

SOURCE = Path(avp.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

# Each layer may import the layers before it, and itself. `registry` hands out plug-ins, so everybody may ask it.
LAYERS = [
    {"errors"},
    {"buffers", "folders", "protocols", "registry", "security", "telemetry"},
    {"identity", "segment", "shared", "context", "manifest", "table", "bundle", "blob", "vocabulary"},
    {"codecs"},
    {"receipt", "handshake", "greeting", "handle", "delta"},
    {"projections", "stores", "session", "wire"},
    {"endpoint", "direct", "transfer", "fetching", "portal"},
    {"connectors", "transports"},
    {"remote_stream", "remote", "interop", "network", "oneline", "agent", "testing"},
    {"bench"},
    {"cli"},
]
LEAVES = {
    "torch": ("connectors", "projections", "bench", "testing/tiny.py"),
    "transformers": ("connectors", "bench", "cli", "testing/tiny.py"),
    "zstandard": ("codecs/lossless.py", "testing/codec.py", "interop"),
    "matplotlib": ("bench",),
    "click": ("cli", "bench"),
    "rich": ("cli", "bench"),
    "httptools": ("transports/http",),
    "starlette": ("transports/http", "interop/avp04_http.py"),
    "uvicorn": ("transports/http",),
    "hypercorn": ("transports/http_both.py",),
    "h2": ("transports/http_both.py",),
    "httpcore2": ("transports/http_client.py", "transports/http_net.py"),
    "anyio": ("transports/http_net.py",),
    "grpc": ("transports/grpc",),
    "redis": ("stores/redis.py",),
    "obstore": ("stores/s3.py",),
    "llama_cpp": ("connectors/llamacpp_engine.py",),
    "vllm": ("connectors/vllm_plugin.py", "connectors/vllm_engine.py", "bench/engines_vllm.py"),
    "httpx2": ("connectors/vllm_engine.py", "transports/http_client.py"),
}


def part(path: Path) -> str:
    relative = path.relative_to(SOURCE)
    return relative.parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Modules imported at run time; what stands under TYPE_CHECKING is for the type checker only."""
    tree = ast.parse(path.read_text())
    checked = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    skipped = {id(child) for node in checked for child in ast.walk(node)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" if node.module == "avp" else node.module for alias in node.names}
    return found


def level(name: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if name in layer)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_dependencies_point_one_way(path: Path) -> None:
    if path.name == "__init__.py" and path.parent == SOURCE:
        return
    mine = level(part(path))
    for module in imports(path):
        if not module.startswith("avp."):
            continue
        theirs = module.split(".")[1]
        # A context packs itself; the import stands inside the method, and one layer holds both.
        assert level(theirs) <= mine, f"{path.name} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_connectors_and_transports_do_not_know_each_other(path: Path) -> None:
    foreign = {"connectors": "avp.transports", "transports": "avp.connectors"}.get(part(path))
    assert foreign is None or not [module for module in imports(path) if module.startswith(foreign)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_optional_libraries_are_imported_only_in_their_leaves(path: Path) -> None:
    relative = str(path.relative_to(SOURCE))
    for module in imports(path):
        allowed = LEAVES.get(module.split(".")[0])
        assert allowed is None or relative.startswith(allowed), f"{relative} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = [
                child
                for child in node.body
                if not (isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant))
            ]
            first = body[0].lineno if body else node.lineno
            assert (node.end_lineno or 0) - first < 50, f"{path.name}: {node.name}"


def test_the_baseline_imports_nothing_of_avp() -> None:
    assert not [module for module in imports(SOURCE / "bench" / "baseline.py") if module.startswith("avp")]


def test_import_avp_needs_only_four_libraries() -> None:
    code = (
        "import sys; before = set(sys.modules); import avp; "
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name for name in done.stdout.split() if not name.startswith("_")}
    assert loaded <= {"avp", "numpy", "safetensors", "blake3", "xxhash"}


def test_the_public_surface_is_what_all_says() -> None:
    assert sorted(avp.__all__) == list(avp.__all__)
    here = [name for name in avp.__all__ if name != "LlamaCppConnector" or find_spec("llama_cpp")]
    for name in here:
        assert getattr(avp, name) is not None
    documented = [name for name in here if not (getattr(avp, name).__doc__ or "").strip()]
    assert documented == []
    assert avp.testing.synthetic_context(tokens=1)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = avp.nothing
