"""New preference pairs out of a model's own answers: what it says wrongly, what it says vaguely."""
