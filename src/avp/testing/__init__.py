"""For tests of AVP and of its plug-ins: synthetic contexts, tiny models, one conformance suite per plug point.

Tiny models need transformers, and are imported from `avp.testing.tiny`.
"""

from avp.testing.codec import CodecConformance
from avp.testing.conformance import ConnectorConformance
from avp.testing.store import StoreConformance
from avp.testing.synthetic import synthetic_context
from avp.testing.transport import TransportConformance

__all__ = [
    "CodecConformance",
    "ConnectorConformance",
    "StoreConformance",
    "TransportConformance",
    "synthetic_context",
]
