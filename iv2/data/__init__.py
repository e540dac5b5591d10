"""Video data: lists, decoding, sampling, crops, batches, and the toy world."""
