"""`python -m bench.gpu`: what parts.py holds."""

from bench.gpu.parts import main

if __name__ == "__main__":
    main()
