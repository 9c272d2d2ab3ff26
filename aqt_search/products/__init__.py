"""What you train is what you serve: products of quantized operands, emulated and native."""
