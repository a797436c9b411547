"""The plug points of AVP. Whoever adds an engine, a codec or a projection writes one of these and registers it."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

from avp.buffers import Buffer

if TYPE_CHECKING:
    import torch

    from avp.blob import Blob
    from avp.context import Context
    from avp.identity import ModelIdentity
    from avp.manifest import Limits
    from avp.receipt import Generation
    from avp.security import Caller, Security
    from avp.segment import Exactness, Want

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


class TextStream(Protocol):
    """A generation as it comes."""

    def __iter__(self) -> Iterator[str]:
        """The pieces of text."""
        ...

    @property
    def result(self) -> Generation:
        """The whole; waits for its end."""
        ...

    def close(self) -> None:
        """End the run early."""
        ...


class Connector(Protocol):
    """Our adapter to an engine; the laws it obeys are in `avp.testing.ConnectorConformance`."""

    @property
    def identity(self) -> ModelIdentity:
        """What the engine runs."""
        ...

    @property
    def engine(self) -> str:
        """Name of the engine, as segments carry it: "transformers", …"""
        ...

    @property
    def dtype(self) -> str:
        """Dtype of its cache: "float32", …"""
        ...

    @property
    def max_positions(self) -> int:
        """The longest context that the model was made for."""
        ...

    def vocabulary(self) -> Sequence[str]:
        """The tokens as the tokenizer spells them, by id; an id without a token is ""."""
        ...

    def prefill(self, prompt: Prompt, *, context: Context | None = None) -> Context:
        """The context after the prompt; computes only what is new."""
        ...

    def prefill_steps(self, prompt: Prompt, *, context: Context | None = None) -> Iterator[Context]:
        """As `prefill`, a segment at a time: growing contexts, the last one the whole. The first computes nothing: of
        its tokens, those after `len` are what is to be computed.
        """
        ...

    def think(self, prompt: Prompt, *, steps: int = 20, context: Context | None = None) -> Context:
        """The context after the prompt and `steps` latent positions."""
        ...

    def generate(
        self, prompt: Prompt = "", *, context: Context | None = None, max_new_tokens: int = 512, accept: str = "exact"
    ) -> Generation:
        """Text after the context and the prompt."""
        ...

    def stream(
        self,
        prompt: Prompt = "",
        *,
        context: Context | None = None,
        max_new_tokens: int = 512,
        min_new_tokens: int = 0,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
        tools: Sequence[Mapping[str, object]] | None = None,
        chat_template_kwargs: Mapping[str, object] | None = None,
        accept: str = "exact",
    ) -> TextStream:
        """The same, piece by piece."""
        ...


@dataclass(frozen=True, slots=True)
class StoredSegment:
    """What a store says of one segment that it holds; times are seconds since the epoch."""

    tenant: str
    page: str  # id of its last page
    start: int
    count: int
    dtype: str
    engine: str
    exactness: Exactness
    codec: str
    nbytes: int
    created: float
    used: float


class Store(Protocol):
    """Segments by tenant and page id; of one page it may hold several: by dtype, engine and exactness.

    Threads, and for all but memory processes, may use one store at once. A segment is found by each of its pages.
    """

    def put(self, blob: Blob, *, tenant: str) -> None:
        """Keep a segment whose digests were verified; once this returns, it is not lost by the end of the process.

        Raises:
            StoreFailed: it could not be written, or is larger than the store's budget.
        """
        ...

    def have(self, pages: Sequence[str], *, tenant: str, want: Want) -> list[bool]:
        """For each page, whether KV that will do is here."""
        ...

    def get(self, page: str, *, tenant: str, want: Want) -> Blob:
        """The segment that holds the page; of several the best by exactness, then the one with most pages from there.

        Raises:
            SegmentMissing: there is none that will do. BundleError: what was stored is damaged.
        """
        ...

    def entries(self, *, tenant: str | None = None) -> Iterator[StoredSegment]:
        """What is here, most lately used first; of all tenants where None."""
        ...

    def remove(self, page: str, *, tenant: str) -> int:
        """Forget every segment that holds the page; how many there were."""
        ...

    def collect(self) -> int:
        """Forget what is expired, unreadable or over the budget, least lately used first; bytes that became free."""
        ...

    def verify(self) -> Iterator[StoredSegment]:
        """Read all of it; the segments that are damaged."""
        ...

    def close(self) -> None:
        """Let go of files and connections."""
        ...


Event: TypeAlias = Mapping[str, object]  # small, JSON
Item: TypeAlias = "Event | Blob | Context"  # what a call carries, both ways; a context comes without its segments


class Endpoint(Protocol):
    """The far end of a call: what an agent answers, whatever the transport."""

    @property
    def limits(self) -> Limits:
        """What may be read from a caller."""
        ...

    def admit(self, token: str | None, *, address: str) -> Caller:
        """Who calls.

        Raises:
            AccessDenied: nobody that may.
        """
        ...

    def answer(self, verb: str, items: AsyncIterator[Item], *, caller: Caller) -> AsyncIterator[Item]:
        """Carry out `verb` on what the caller sends; `items` is read no faster than it is used.

        Raises:
            AVPError: before the first item, it is the whole answer; later, the answer ends with it.
        """
        ...


@dataclass(slots=True)
class Meter:
    """Bytes that a call put on its socket and took from it, headers included."""

    sent: int = 0
    received: int = 0


class Channel(Protocol):
    """The near end of a call. Used in one event loop; calls may run side by side."""

    def call(
        self, verb: str, items: AsyncIterable[Item], *, meter: Meter
    ) -> AbstractAsyncContextManager[AsyncIterator[Item]]:
        """Send the verb and the items; what the far end answers. Leaving the block early ends the call at both ends.

        The answer may begin only when all items were sent, but a refusal does not wait for them: it ends the sending.

        Raises:
            AVPError: what the far end raised. ConnectionFailed: it could not be reached or broke off.
        """
        ...

    async def close(self) -> None:
        """End all connections."""
        ...


class Listener(Protocol):
    """An endpoint that is being served."""

    @property
    def url(self) -> str:
        """Where, with the port that was chosen for 0."""
        ...

    async def close(self) -> None:
        """Take no more calls, let those under way end (a few seconds), then end them."""
        ...


class Transport(Protocol):
    """Puts an endpoint at a distance; one URL scheme each."""

    def connect(self, url: str, *, security: Security) -> Channel:
        """The near end; nothing is sent before the first call.

        Raises:
            UsageError: the URL is none of this transport's.
        """
        ...

    async def serve(self, endpoint: Endpoint, url: str, *, security: Security) -> Listener:
        """Listen at the URL.

        Raises:
            UsageError: not an address of this machine, or beyond loopback without authentication.
        """
        ...
