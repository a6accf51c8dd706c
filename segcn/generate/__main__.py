"""`accelerate launch -m segcn.generate`: one process of `segcn generate`."""

from segcn.generate.writer import main

if __name__ == "__main__":
    main()
