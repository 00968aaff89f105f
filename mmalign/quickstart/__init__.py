"""Complete demonstrations: a small real model, embedded data, training, and a report."""
