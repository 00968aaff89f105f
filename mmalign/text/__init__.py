"""The text modality: encoding, scoring, and the adapter for causal language models."""
