"""The diffusion modality: noise, places to score at, and the adapter for denoising models."""
