"""The operators in plain PyTorch: the specification that every kernel agrees with bit for bit."""
