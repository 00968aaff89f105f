"""Rounds: draw responses, judge them, make pairs, train, and again."""
