"""What is made of a model's own answers: preference pairs, and predictions for benchmarks."""
