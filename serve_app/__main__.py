"""`python -m rayseek.serve_app`: the `rayseek` command."""

from rayseek.serve_app.cli import main

main()
