"""``--qsdp-bits auto``: how weights and gradients should travel, by measurement."""
