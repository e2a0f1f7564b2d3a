"""Questions and answers: tokenizer, text encoders, official normal form, vocabulary of answers. Imports no torch."""
