"""`python -m fkdpipe`: what torchrun starts."""

from fkdpipe.cli import main

if __name__ == "__main__":
    main()
