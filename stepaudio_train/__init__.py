"""Training framework for unified speech-text language models: the system of the Step-Audio paper (arXiv 2502.11946)."""

__version__ = "0.1.0"
