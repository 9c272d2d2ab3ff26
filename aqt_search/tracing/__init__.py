"""Quantization is a function transformation: sites of a traced function, and running it again."""
