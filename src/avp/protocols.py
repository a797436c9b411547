"""The plug points of AVP. Whoever adds an engine, a codec or a projection writes one of these and registers it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, TypeAlias

from avp.buffers import Buffer

if TYPE_CHECKING:
    import torch

    from avp.context import Context
    from avp.identity import ModelIdentity
    from avp.receipt import Generation
    from avp.segment import Exactness

Message: TypeAlias = Mapping[str, object]
Prompt: TypeAlias = str | Sequence[Message] | Sequence[int]


class Tensors(Protocol):
    """Where the KV of one segment lies: an engine's memory, a mapped file, received bytes."""

    def read(self, layer: int, part: str) -> Buffer:
        """K (`part` "k") or V ("v") of a layer: [kv_heads, tokens, head_dim], host memory.

        Raises:
            DigestMismatch: the bytes are not those that were written.
        """
        ...


class Codec(Protocol):
    """How one tensor becomes bytes and a tensor again. One codec, one file in `avp/codecs`."""

    @property
    def name(self) -> str:
        """Name in the manifest and in `to_bytes(codec=…)`."""
        ...

    @property
    def exactness(self) -> Exactness:
        """What a tensor is after a round trip: `exact`, or `bounded` for a lossy codec."""
        ...

    def parts(self, dtype: str, shape: tuple[int, ...]) -> Mapping[str, tuple[str, tuple[int, ...] | None]]:
        """Suffix -> (dtype, shape) of each tensor written for one of `dtype` and `shape`; shape None: bytes of any
        length.

        Raises:
            UsageError: the codec does not take this dtype.
        """
        ...

    def encode(self, tensor: Buffer) -> Mapping[str, Buffer]:
        """The parts of `tensor`, by suffix, in the order of `parts`."""
        ...

    def decode(self, parts: Mapping[str, Buffer], dtype: str, shape: tuple[int, ...]) -> Buffer:
        """The tensor of `dtype` and `shape` again; allocates no more than that.

        Raises:
            BundleError: the parts are not what `encode` writes.
        """
        ...


class Embeddings(Protocol):
    """What a projection may know of a model: its tables and the factor on its inputs."""

    @property
    def w_in(self) -> torch.Tensor:
        """Input embeddings, [vocabulary, hidden]."""
        ...

    @property
    def w_out(self) -> torch.Tensor:
        """Output embeddings (the LM head), [vocabulary, hidden]."""
        ...

    @property
    def scale(self) -> float:
        """Factor that the model puts on an input embedding (Gemma: the square root of `hidden`), else 1."""
        ...


class Step(Protocol):
    """A fitted projection."""

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states after the final norm, [n, source hidden], to input vectors of the target, [n, target
        hidden].
        """
        ...


class Projection(Protocol):
    """State of one model made into state that another takes; from a model to itself it is the latent step."""

    @property
    def name(self) -> str:
        """Name in `think(method=…)`."""
        ...

    def fit(self, source: Embeddings, target: Embeddings) -> Step:
        """Prepare the map between the two models, on their device and in their dtype."""
        ...


class Connector(Protocol):
    """Our adapter to an engine; the laws it obeys are in `avp.testing.ConnectorConformance`."""

    @property
    def identity(self) -> ModelIdentity:
        """What the engine runs."""
        ...

    def prefill(self, prompt: Prompt, *, context: Context | None = None) -> Context:
        """The context after the prompt; computes only what is new."""
        ...

    def think(self, prompt: Prompt, *, steps: int = 20, context: Context | None = None) -> Context:
        """The context after the prompt and `steps` latent positions."""
        ...

    def generate(self, prompt: Prompt, *, context: Context | None = None, max_new_tokens: int = 512) -> Generation:
        """Text after the context and the prompt."""
        ...

    def stream(self, prompt: Prompt, *, context: Context | None = None, max_new_tokens: int = 512) -> Iterator[str]:
        """The same, piece by piece."""
        ...
