"""The demo model's recipe: a nested Gemma 3n-style model of 12 million parameters, trained on tales."""
