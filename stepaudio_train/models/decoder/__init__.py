"""The speech decoder (paper 3.3): flow matching makes a mel spectrum of dual-code tokens, a vocoder makes it sound."""
