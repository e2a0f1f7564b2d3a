"""The parts of the library that are for tasks other than VQA."""
