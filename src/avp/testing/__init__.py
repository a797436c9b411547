"""For tests of AVP and of its plug-ins: synthetic contexts, tiny models, one conformance suite per plug point."""

from avp.testing.synthetic import synthetic_context

__all__ = ["synthetic_context"]
