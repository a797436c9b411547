"""`avp bench engines`: one context across engines. A computes in one engine, B goes on in another, of equal weights.

The contexts go over `unix:` to an agent that keeps them, and from there over `unix:` to the engine that goes on; every
engine is a process of its own, vLLM in its own environment. What B says then is held against what it says after its own
prefill. The weights are those of one GGUF file, and of the float32 GGUF file that is written from it.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

import click

from avp.bench.engines_pairs import PAIRS, SEATS, Pair
from avp.bench.engines_run import Desk, Found, measure_group
from avp.bench.engines_task import Sizes, Task, cut
from avp.bench.results import environment, write_json
from avp.errors import UsageError
from avp.folders import cache_dir

_VLLM = "AVP_VLLM_PYTHON"
_TEXT = 2_000_000  # characters of the text that are read


@dataclass(frozen=True, slots=True)
class Settings:
    """What makes two runs comparable."""

    model: str
    data: str
    positions: int
    prompts: int
    plain: int
    sizes: Sizes


class _Clock:
    """Tells how far the run is."""

    def __init__(self, steps: int, tell: Callable[[str], object]) -> None:
        self._steps, self._tell, self._done, self._started = steps, tell, 0, perf_counter()

    def step(self, what: str) -> None:
        """One step begins."""
        gone = perf_counter() - self._started
        left = gone / self._done * (self._steps - self._done) if self._done else 0.0
        ahead = f", about {left / 60:.0f} min left" if self._done else ""
        self._done += 1
        self._tell(f"[{self._done}/{self._steps}] {what} … ({gone / 60:.1f} min gone{ahead})")


@click.command()
@click.option(
    "--data",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    required=True,
    help="Held-out text, such as WikiText-2's test split.",
)
@click.option("--model", default="smollm2", show_default=True, help="Built-in name, or a .gguf file.")
@click.option("--pairs", default=",".join(pair.name for pair in PAIRS), show_default=True, help="sender>receiver, …")
@click.option("--positions", default=2000, show_default=True, type=click.IntRange(1), help="Judged next tokens a pair.")
@click.option("--prompts", default=100, show_default=True, type=click.IntRange(1), help="Greedy continuations a pair.")
@click.option(
    "--plain", default=5, show_default=True, type=click.IntRange(0), help="Of these also generated without a draft."
)
@click.option(
    "--threads", default=os.cpu_count() or 1, type=click.IntRange(1), help="Of each engine; by default all cores."
)
@click.option("--out", type=click.Path(path_type=Path), default=None, help="Folder for engines.json and its plots.")
@click.option("--resume", is_flag=True, help="Keep the pairs that engines.json in --out holds already.")
@click.option("--json", "as_json", is_flag=True, help="Print the JSON document on standard output.")
def command(
    data: Path,
    model: str,
    pairs: str,
    positions: int,
    prompts: int,
    plain: int,
    threads: int,
    out: Path | None,
    resume: bool,
    as_json: bool,
) -> None:
    """One context across engines: agreement, KL and identical continuations of each ordered pair, with controls."""
    from rich.console import Console

    console = Console(stderr=True)
    wanted = tuple(Pair.parse(text) for text in pairs.split(","))
    settings = Settings(model, data.name, positions, prompts, plain, Sizes())
    target = out / "engines.json" if out is not None else None
    document = _begin(settings, target if resume else None)
    left = [pair for pair in wanted if pair.name not in _names(document)]

    def keep(found: Found) -> None:
        _add(document, found)
        if target is not None:
            write_json(document, target, echo=click.echo)
        for each in found.records:
            console.print(f"  {each['pair']}: {_words(each)}", markup=False, highlight=False)

    _measure(
        left,
        settings,
        data,
        threads=threads,
        keep=keep,
        tell=lambda line: console.print(line, markup=False, highlight=False),
    )
    if out is not None:
        from avp.bench.engines_plot import plot_engines

        plot_engines(document, out)
    if as_json:
        write_json(document, None, echo=click.echo)


def _measure(
    pairs: Sequence[Pair],
    settings: Settings,
    data: Path,
    *,
    threads: int,
    keep: Callable[[Found], None],
    tell: Callable[[str], object],
) -> None:
    """Pairs of one kind of weights after those of the other; each record is kept as soon as it is there."""
    if not pairs:
        return
    groups = {weights: [pair for pair in pairs if SEATS[pair.sender][1] == weights] for weights in ("Q4_1", "F32")}
    clock = _Clock(sum(_steps(group) for group in groups.values()), tell)
    clock.step("weights and text")
    with tempfile.TemporaryDirectory(prefix="avp-engines-") as scratch:
        places = _models(settings.model, {seat for pair in pairs for seat in (pair.sender, pair.receiver)})
        task = _task(places, settings, data).save(Path(scratch) / "task.json")
        answers: dict[str, object] = {}
        for group in groups.values():
            with ExitStack() as stack:
                desk = Desk(stack, Path(scratch), task, places, settings.plain, threads, clock.step, answers)
                measure_group(group, desk, keep=keep)


def _steps(pairs: Sequence[Pair]) -> int:
    seats = {seat for pair in pairs for seat in (pair.sender, pair.receiver)}
    return len(seats) * 3 + len({pair.receiver for pair in pairs}) + len(pairs) + (1 if seats else 0)


def _models(model: str, seats: set[str]) -> dict[str, tuple[str, str]]:
    """The Python that runs an engine and the model that it loads, by the engine's name in a pair.

    Raises:
        UsageError: vLLM's environment is not there.
    """
    import sys

    from avp.bench.engines_gguf import write_float32
    from avp.connectors import loading, models
    from avp.connectors.gguf_header import file_digest

    source = models.fetch(model) if model in models.BUILTIN else Path(model)
    wide = cache_dir() / "bench" / f"{file_digest(source)[:32]}-f32.gguf"
    found: dict[str, tuple[str, str]] = {}
    for seat in sorted(seats):
        engine, weights = SEATS[seat]
        if weights == "F32":
            wide.parent.mkdir(parents=True, exist_ok=True)
            found[seat] = (sys.executable, str(write_float32(source, wide)))
        else:
            found[seat] = (_vllm_python(), str(loading.resolve(model))) if engine == "vllm" else (sys.executable, model)
    return found


def _vllm_python() -> str:
    python = Path(os.environ.get(_VLLM) or cache_dir() / "vllm-0.32.0" / "bin" / "python")
    if not python.is_file():
        raise UsageError(
            f"there is no Python of vLLM at {python}. Fix: run tools/vllm_env.sh, name its Python in {_VLLM}, "
            "or leave vllm out of --pairs."
        )
    return str(python)


def _task(places: Mapping[str, tuple[str, str]], settings: Settings, data: Path) -> Task:
    from transformers import AutoTokenizer

    from avp.connectors import loading

    tokenizer = AutoTokenizer.from_pretrained(loading.resolve(settings.model))
    text = data.read_text(encoding="utf-8")[:_TEXT]
    ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    return cut(ids, positions=settings.positions, prompts=settings.prompts, sizes=settings.sizes)


# --- the document


def _begin(settings: Settings, path: Path | None) -> dict[str, object]:
    """An empty document, or what an earlier run of the same settings left.

    Raises:
        UsageError: the earlier run had other settings.
    """
    if path is not None and path.is_file():
        found: dict[str, object] = json.loads(path.read_text())
        if found.get("settings") != asdict(settings):
            raise UsageError(f"{path} was measured with other settings. Fix: repeat them, or leave --resume out.")
        return found
    return {
        "benchmark": "engines",
        "settings": asdict(settings),
        "environment": environment(),
        "engines": {},
        "results": [],
    }


def _names(document: Mapping[str, object]) -> set[str]:
    results = document["results"]
    return {str(each["pair"]) for each in results} if isinstance(results, list) else set()


def _add(document: dict[str, object], found: Found) -> None:
    results, engines = document["results"], document["engines"]
    if isinstance(results, list) and isinstance(engines, dict):
        results.extend(found.records)
        engines.update(found.engines)


def _words(row: Mapping[str, object]) -> str:
    agreement, identical, control = row["agreement"], row["identical"], row["control"]
    if not (isinstance(agreement, dict) and isinstance(identical, dict) and isinstance(control, dict)):
        return ""
    return (
        f"{agreement['share']:.2%} of {agreement['n']} next tokens, KL {float(str(row['kl'])):.2g}, "
        f"{identical['hits']} of {identical['n']} continuations; its own KV {control['agreement']['share']:.2%}, "
        f"{control['identical']['hits']}; reached: {row['reached']}"
    )
