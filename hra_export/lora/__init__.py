"""LoRA adapters: PEFT's and diffusers' files, read and planned."""
