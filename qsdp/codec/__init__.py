"""Floats to bytes and back. Importing it registers the operators."""

from qsdp.codec import magnitude as magnitude
from qsdp.codec import native as native
from qsdp.codec import ops as ops
from qsdp.codec import sparse as sparse

native.load()
