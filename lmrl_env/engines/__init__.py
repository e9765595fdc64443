"""Engines: what samples the tokens."""
