"""The jobs themselves, which the mains beside this package and a sweep run."""
