"""Where KV lives: `pages` on the device, `pool` and `radix` on the host (no jax import)."""
