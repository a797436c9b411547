"""Connectors: one adapter to an engine a file, registered under the entry points `avp.connectors`."""
