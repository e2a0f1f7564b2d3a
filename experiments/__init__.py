"""Experiments: what is trained and compared with the parts in `data` and `vqa`."""
