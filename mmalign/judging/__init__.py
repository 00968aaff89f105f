"""Which of several responses is better: judges, judged files, and the pairs made of them."""
