"""Codecs that turn tensors into bytes for every wire. Knows no transport."""
