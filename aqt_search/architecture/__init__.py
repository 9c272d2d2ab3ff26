"""Architecture choices as data: subnets of a model are the same model with masked variables."""
