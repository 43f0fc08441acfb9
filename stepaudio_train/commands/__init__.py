"""What the subcommands of `stepaudio` do; one module each, imported when its command runs."""
