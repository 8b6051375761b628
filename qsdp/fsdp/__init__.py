"""The only folder that touches FSDP2."""
