"""From an adapter to something that others can run, check and build anew: merged weights, GGUF, card, bill, signature, app (notebook 06)."""
