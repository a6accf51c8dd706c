"""`accelerate launch -m segcn.train`: one training process, with the flags of diffusers' train_controlnet.py."""

from segcn.train.loop import main

if __name__ == "__main__":
    main()
