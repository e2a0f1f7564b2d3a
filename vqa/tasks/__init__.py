"""What the model of a task takes besides an image and a question."""
