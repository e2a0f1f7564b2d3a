"""Questions and answers as text: tokenizer, official normal form, vocabulary of answers. Imports no torch."""
