"""Video and audio-visual language models."""
