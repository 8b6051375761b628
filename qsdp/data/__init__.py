"""Text to tokens, tokens to files, files to batches."""

from __future__ import annotations
