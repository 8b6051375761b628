"""Collectives over payloads. They know process groups, not FSDP."""
