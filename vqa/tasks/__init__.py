"""What each task other than VQA adds to the library."""
