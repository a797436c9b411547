"""raw: the bytes as they are; nothing is copied in either direction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from avp.buffers import Buffer
from avp.protocols import Codec
from avp.segment import Exactness


@dataclass(frozen=True, slots=True)
class Raw:
    """One part, which is the tensor."""

    name: str = "raw"
    exactness: Exactness = Exactness.EXACT

    def parts(self, dtype: str, shape: tuple[int, ...]) -> Mapping[str, tuple[str, tuple[int, ...] | None]]:
        """The tensor itself."""
        return {"": (dtype, shape)}

    def encode(self, tensor: Buffer) -> Mapping[str, Buffer]:
        """The tensor itself."""
        return {"": tensor}

    def decode(self, parts: Mapping[str, Buffer], dtype: str, shape: tuple[int, ...]) -> Buffer:
        """The part itself."""
        return parts[""]


CODEC: Codec = Raw()
