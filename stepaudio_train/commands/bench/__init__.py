"""`stepaudio bench`: what the project computes beside what one would run instead, in one process, in turns."""
