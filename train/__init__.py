"""Defended training of diffusion models: data, trainer, sampling. See docs/architecture.md."""
