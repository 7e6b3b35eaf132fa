"""`python -m bench.gpu`: runs the parts in parts.py."""

from bench.gpu.parts import main

if __name__ == "__main__":
    main()
