"""The effect of a question on a trained model: answers, attention, the modulation of every channel."""
