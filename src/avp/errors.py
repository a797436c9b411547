"""The exceptions of AVP.

```
AVPError
├── UsageError            the call itself is wrong: an unknown name, an impossible argument
├── MissingExtra          a library that this feature needs is not installed
├── ModelNotFound         no model of that name, here or on a hub
├── IdentityMismatch      the state belongs to other weights
├── UnsupportedCache      the model's cache is of a kind that AVP does not carry
├── ContextTooLong        the prompt does not fit the model's context
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
