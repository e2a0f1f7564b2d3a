"""Raw files to batches: question files, images and GloVe vectors, the h5 file, and its loader."""
