"""The quantized wire on FSDP2: what it calls, and what ``install`` makes."""
