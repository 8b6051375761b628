"""Collectives over payloads. Knows process groups, not FSDP."""
