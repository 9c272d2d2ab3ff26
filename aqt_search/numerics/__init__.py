"""A format is data: formats, scales, and tensors put into them."""
