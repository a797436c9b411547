"""The plug-in's figures, all in one run: first token with a prefix of 1,000 tokens loaded against computed, and what
the plug-in costs a request that finds nothing. Prints one JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from random import Random
from statistics import median

sys.path.insert(0, str(Path(__file__).parent))
from engines import Process, Said, offline

from avp.connectors import loading

LENGTH, ANSWER = 1000, 4


def prompts(seed: int, count: int) -> list[list[int]]:
    random = Random(seed)
    return [random.choices(range(1000, 40000), k=LENGTH) for _ in range(count)]


def serve(engine: Process, ids: list[int]) -> Said:
    engine.reset()
    return engine.generate(ids, count=ANSWER)[0]


def first_tokens(python: str, model: Path, folder: str, repeats: int) -> tuple[list[float], list[float], int]:
    """Seconds to the first token in a process that computes, and in another that loads; positions loaded."""
    extra, log, known = {"store": f"disk:{folder}/known"}, Path(folder) / "log", prompts(1, repeats)
    with offline(python, model, extra, log) as engine:
        serve(engine, prompts(3, 1)[0])
        computed = [serve(engine, ids).ttft for ids in known]
    with offline(python, model, extra, log) as engine:
        serve(engine, prompts(4, 1)[0])
        return computed, [serve(engine, ids).ttft for ids in known], engine.hits()


def costs(python: str, model: Path, folder: str, repeats: int, save: str) -> tuple[list[float], ...]:
    """Of requests that find nothing, with the plug-in's sides and without, in turn: their seconds, and the share of
    those with them that was spent in hooks.
    """
    extra = {"store": f"disk:{folder}/{save}", "save": save}
    with_them, without, shares = [], [], []
    with offline(python, model, extra, Path(folder) / "log") as engine:
        serve(engine, prompts(5, 1)[0])
        for index, ids in enumerate(prompts(6, 2 * repeats)):
            engine.plug(index % 2 == 0)
            said = serve(engine, ids)
            (without if index % 2 else with_them).append(said.seconds)
            shares += [] if index % 2 else [said.hooked / said.seconds]
    return with_them, without, shares


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--python", required=True, help="vLLM's")
    options.add_argument("--repeats", type=int, default=7)
    given = options.parse_args()
    model = Path(loading.resolve("smollm2"))
    with tempfile.TemporaryDirectory() as folder:
        computed, loaded, hits = first_tokens(given.python, model, folder, given.repeats)
        looking, idle, looked = costs(given.python, model, folder, given.repeats, "nothing")
        saving, spared, saved = costs(given.python, model, folder, given.repeats, "all")
    figures = {
        "first token, computed": computed,
        "first token, loaded": loaded,
        "request without the plug-in": idle,
        "request, nothing to load": looking,
        "request without the plug-in, beside saving": spared,
        "request, nothing to load, all saved": saving,
        "share of hooks, nothing to load": looked,
        "share of hooks, all saved": saved,
    }
    found = {name: {"median": median(values), "all": values} for name, values in figures.items()}
    ratios = {
        "loaded positions": hits,
        "times faster to the first token": median(computed) / median(loaded),
        "cost with nothing to load": median(looking) / median(idle) - 1,
        "cost with all saved": median(saving) / median(spared) - 1,
    }
    print(json.dumps({**found, **ratios}))


if __name__ == "__main__":
    main()
