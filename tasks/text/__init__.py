"""Text: parallel files, data sets, the vocabulary, ids."""
