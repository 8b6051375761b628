"""What the quantized wire does to the loss."""
