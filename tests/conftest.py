"""Every test runs on two CPU devices, and an implicit rank promotion is an error."""

import os

# Read when JAX starts its backend, so set before anything imports it.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
).strip()

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
