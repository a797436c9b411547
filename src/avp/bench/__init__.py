"""Benchmarks; never imported by the rest of AVP."""
