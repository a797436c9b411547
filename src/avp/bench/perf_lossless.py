"""The lossless codec on the KV of real text, and how zstd's other settings would do on the same exponents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from types import MappingProxyType

import numpy as np

from avp.bench.perf_figure import Figure, Target, rounds, timed
from avp.buffers import Buffer
from avp.codecs.lossless import CODEC, compressor
from avp.connectors.huggingface import HuggingFaceConnector
from avp.context import Context

STORED = MappingProxyType(
    {
        "bfloat16": Target("bytes of the raw KV held in bfloat16; stored bytes / it", at_most=0.75),
        "float32": Target("bytes of the raw KV held in float32; stored bytes / it"),
    }
)
WIKITEXT = Path("../shared/data/wikitext2_test.txt")
_LEVELS = (None, -5, -1, 1, 2, 3)  # None: the codec's own parameters
TEXT = """
The lighthouse at the end of the harbour was built in 1874, three years after the storm that took eleven
fishing boats in one night. Its first keeper, a former ship's carpenter called Anders Holm, wrote in the log
every evening for twenty-nine years, and never once missed a day. He noted the wind, the height of the sea,
the ships that passed and the birds that struck the glass. On Sundays he added a line about his family. When
he died, the books filled a shelf of nearly four metres, and the harbour office did not know what to do with
them.

For a long time nobody read them. They were moved from the office to the cellar of the town hall, and from
there to the attic of the school, where the damp took two of them and mice a third. In 1951 a young teacher of
physics, Ingrid Voss, looked for something to do on a rainy afternoon and opened the volume of 1888. She saw
at once that the figures were careful. Holm had read his barometer three times a day, at the same hours, and
he had written down the temperature of the room beside it, so that the readings could be corrected. There were
more than thirty thousand of them.

She began to copy the numbers into tables. Her pupils helped, at first as a punishment and later because they
liked it. Each took one month and checked the month of a neighbour. Where two copies differed they went back
to the book, and where the book was in doubt they left a gap. After four winters the tables were complete, and
Voss took the train to the capital with a suitcase full of paper. The director of the weather service kept her
waiting for two hours. Then he read for three, and asked whether she would like to work for him.

What the log showed was a slow change that no single year could show. Westerly gales came earlier in autumn
towards the end of the century than at its middle, by about nine days, and the pressure before them fell
faster. The service had records of its own from that time, but its stations had been moved again and again,
and each move had left a step in the curve. Holm's barometer had hung from the same nail until the day he
died. "It is not a good instrument," wrote Voss in the paper that made her known, "but it is always the same
instrument, and the same man looked at it."

There were errors, of course. In March 1893 the readings are too high by the same amount for seventeen days,
and then right again. A pupil found the reason in a Sunday line: the keeper's daughter had been married that
month, the house was full of guests, and the barometer had been hung in the kitchen. In the summer of 1896 all
temperatures end in zero or five. The keeper had broken his glasses, and a new pair took eleven weeks to come
by ship. Voss liked to tell these stories to students. Data, she said, are made by people who have weddings
and lose their glasses; whoever wants to use them should know the people first.

The lighthouse was made automatic in 1968. A lamp of 400 watts took the place of the oil burner, and a switch
that answers to daylight took the place of the keeper. The building is open to visitors from May to September,
on weekdays from ten to four, and costs 6 euros for adults and 2.50 for children under twelve. In the round
room below the lantern stand the books, dry and behind glass, all but three of them. The barometer hangs
beside the door, from the old nail. It still works. Visitors are asked not to tap it, and nearly all of them
do.

Last year the town put a screen next to it, which shows the pressure measured by a sensor on the roof, to a
hundredth of a hectopascal, once a second. The two seldom agree. On most days the old barometer stands a
little high, as it did in 1893, and the guide explains that nobody has ever corrected it, on purpose. If it
were set right, she says, the line that began in 1874 would have a step in it, and somebody would have to find
out why. Then she opens the volume of that day's date, in whatever year the visitors choose, and reads aloud
what the weather was: wind from the north-west, sea high, two barques and a schooner passing, one gull. On
Sundays she reads the other line as well.
"""


def real_text(path: Path | None) -> str:
    """The text of `path`; else WikiText-2 where it lies beside us; else our own."""
    chosen = path or (WIKITEXT if WIKITEXT.is_file() else None)
    return chosen.read_text(encoding="utf-8") if chosen else TEXT


def text_ids(connector: HuggingFaceConnector, text: str, count: int) -> list[int]:
    """The first `count` ids of `text`, which is repeated if it is too short; characters beyond need are not read."""
    ids = [int(i) for i in connector.tokenizer(text[: 8 * count])["input_ids"]]
    return (ids * -(-count // len(ids)))[:count]


def lossless(
    connectors: Mapping[str, Callable[[], HuggingFaceConnector]], text: str, *, tokens: int, n: int
) -> list[Figure]:
    """Stored size and speed for the cache in each dtype."""
    figures = []
    for dtype, connector in connectors.items():
        made = connector()
        context = made.prefill(text_ids(made, text, tokens))
        figures.append(_figure(dtype, context, n=n))
    return figures


def _figure(dtype: str, context: Context, *, n: int) -> Figure:
    layers = range(len(context.model.layout.layers) if context.model else 0)
    tensors = [part.read(layer, name) for part in context.segments for layer in layers for name in ("k", "v")]
    encoded = [CODEC.encode(tensor) for tensor in tensors]

    def decode() -> list[Buffer]:
        return [CODEC.decode(parts, dtype, tensor.shape) for parts, tensor in zip(encoded, tensors, strict=True)]

    same = all(one.tobytes() == other.tobytes() for one, other in zip(decode(), tensors, strict=True))
    seconds = rounds(
        {"encode": timed(lambda: [CODEC.encode(tensor) for tensor in tensors]), "decode": timed(decode)}, n
    )
    raw = sum(tensor.nbytes for tensor in tensors)
    stored = sum(part.nbytes for parts in encoded for part in parts.values())
    exponents = sum(parts[".exp"].nbytes for parts in encoded)
    values = sum(tensor.array.size for tensor in tensors)
    detail: dict[str, object] = {
        "raw_bytes": raw,
        "stored_bytes": stored,
        "bundle_bytes": len(context.to_bytes(codec="lossless")),
        "tokens": len(context),
        "encode_MB_per_s": raw / median(seconds["encode"]) / 1e6,
        "decode_MB_per_s": raw / median(seconds["decode"]) / 1e6,
        "exponents_stored": exponents / values,
        "bit_identical": same,
        "zstd_levels": _levels(tensors, values, n),
    }
    return Figure(f"lossless_{dtype}", STORED[dtype], (stored / raw,), detail)


def _levels(tensors: list[Buffer], values: int, n: int) -> list[dict[str, object]]:
    """The codec's parameters and zstd's levels on the same exponents: share that is left, speed over those bytes."""
    bits = {2: np.uint16, 4: np.uint32}
    exponents = [
        (np.swapaxes(one.array.view(bits[one.array.itemsize]), -1, -2) >> (8 * one.array.itemsize - 9))
        .astype(np.uint8, order="C")
        .reshape(-1)
        for one in tensors
    ]

    def run(level: int | None) -> int:
        compress = compressor(level).compress
        return sum(len(compress(one.data)) for one in exponents)

    seconds = rounds({str(level): timed(partial(run, level)) for level in _LEVELS}, n)
    return [
        {"level": level, "stored": run(level) / values, "MB_per_s": values / median(seconds[str(level)]) / 1e6}
        for level in _LEVELS
    ]
