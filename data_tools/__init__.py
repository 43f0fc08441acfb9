"""Programs that make or convert corpora."""
