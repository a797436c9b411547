"""The exceptions of AVP.

```
AVPError
├── UsageError            the call itself is wrong: an unknown name, an impossible argument
├── MissingExtra          a library that this feature needs is not installed
├── ModelNotFound         no model of that name, here or on a hub
├── IdentityMismatch      the state belongs to other weights
├── UnsupportedCache      the model's cache is of a kind that AVP does not carry
├── ContextTooLong        the prompt does not fit the model's context
├── NoAgreement           two agents have no way to hand over that both accept
├── HandleExpired         a handle that is unknown here, expired, revoked or evicted
├── SegmentMissing        a store does not hold the KV that was asked for
├── StoreFailed           a store cannot be opened, read or written
├── AccessDenied          no token, a wrong one, or a certificate that is not trusted
├── Busy                  too much at once; try again after `retry_after` seconds
├── ConnectionFailed      the other end cannot be reached, broke off, or answers nonsense
│   └── TimedOut          it did not answer in time
└── BundleError           bytes that are not a valid bundle
    ├── TruncatedBundle   they end too early
    ├── LimitExceeded     they ask for more than the reader's Limits allow
    ├── DigestMismatch    a tensor's bytes are not those that were written
    └── UnsupportedBundle a version, codec, kind or dtype that this reader does not know
```

Every message says what happened, why, and how to fix it.
"""

from __future__ import annotations


class AVPError(Exception):
    """Root of every error that AVP raises on purpose."""


class UsageError(AVPError, ValueError):
    """A call that cannot be carried out as written: an unknown name, an impossible argument."""


class MissingExtra(AVPError, ImportError):
    """A library that this feature needs is not installed; the message names the extra that brings it."""


class ModelNotFound(AVPError, LookupError):
    """No model of that name: not a built-in one, not a path, not on a hub that can be reached."""


class IdentityMismatch(AVPError):
    """The state was computed by other weights than those that would continue it."""


class UnsupportedCache(AVPError):
    """The model keeps its state in a form that AVP does not carry; the message names the layer type."""


class ContextTooLong(AVPError):
    """The context and the prompt together exceed the positions that the model was made for."""


class NoAgreement(AVPError):
    """Two agents have no way to hand over that both accept; the message holds the reason for each mode."""


class HandleExpired(AVPError, LookupError):
    """The handle is unknown here: expired, revoked, evicted, or another tenant's."""


class SegmentMissing(AVPError, LookupError):
    """A store does not hold the KV that was asked for, or no longer."""


class StoreFailed(AVPError, OSError):
    """A store cannot be opened, read or written."""


class AccessDenied(AVPError, PermissionError):
    """No token, a wrong one, or a certificate that is not trusted."""


class Busy(AVPError):
    """The other end has too much to do, or no room; nothing was done. Try again after `retry_after` seconds."""

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ConnectionFailed(AVPError, ConnectionError):
    """The other end cannot be reached, broke off in the middle, or does not speak this protocol."""


class TimedOut(ConnectionFailed, TimeoutError):
    """The other end did not answer in time; what it did of the call is not known."""


class BundleError(AVPError, ValueError):
    """The bytes are not a valid bundle (docs/spec/bundle.md)."""


class TruncatedBundle(BundleError):
    """The bytes end before the header or the tensors that it declares."""


class LimitExceeded(BundleError):
    """The bundle asks for more than the reader's `Limits` allow; nothing was allocated for it."""


class DigestMismatch(BundleError):
    """A tensor's bytes are not those that were written; none of them was used."""


class UnsupportedBundle(BundleError):
    """A format version, kind, codec or dtype that this reader does not know."""
