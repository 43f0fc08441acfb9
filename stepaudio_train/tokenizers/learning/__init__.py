"""Training of the speech tokenizers from transcribed recordings."""
