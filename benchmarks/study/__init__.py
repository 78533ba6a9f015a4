"""The study that asks whether NA-LoRA beats plain LoRA: cells of task × model × arm × learning rate × seed."""
