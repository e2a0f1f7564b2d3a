"""What a trained model says of one question: answers, attention, the modulation of every channel."""
