"""The form of payloads: bytes, random numbers, learned levels. ``qsdp.ops`` has the operators."""
