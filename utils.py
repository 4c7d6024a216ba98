"""The learning core of LoRe: low-rank reward models for many users (arXiv 2504.14439)."""

from __future__ import annotations


class InputError(ValueError):
    """A mistake in what the user gave; the message alone says where and what to do."""
