"""What is compared: plain LoRA with differences, and rules tried as hooks around each step."""
